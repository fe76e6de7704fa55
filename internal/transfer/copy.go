package transfer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// copyPrefix begins the name of the snapshot of an image that a copy keeps of it until it is
// whole; the id of the copy follows.
const copyPrefix = "lsdctl-copy-"

const (
	// noteBytes is how much a copy writes, in bytes, before it notes how far it is, and
	// noteEvery how long it takes at most.
	noteBytes = 1 << 30
	noteEvery = time.Minute
	// snapshotTimeout is how long the host that has the source attached may take for a
	// snapshot.
	snapshotTimeout = time.Minute
)

// CopyOptions says how an image is copied.
type CopyOptions struct {
	Options
	HeadOnly bool // without the snapshots
	// Whole says that nothing is kept of a copy that has not come to its end, and that none that
	// was begun before is gone on with.
	Whole bool
	// Of is the id of a snapshot that is copied in place of what the image is now, with those
	// before it. It must stay. It is for Whole.
	Of uuid.UUID
	// Snapshot says how the snapshot of the source is made that is copied as what it is now.
	Snapshot engine.SnapshotOptions

	noteBytes uint64 // 0 means the constant
}

// Copied is what has been made by Copy.
type Copied struct {
	ID        uuid.UUID
	Size      uint64 // bytes
	Snapshots int
	Data      uint64 // bytes of data that were written, this time
	Resumed   bool   // part of it was there
}

// Unfinished says that a copy has not come to its end: the same call goes on where it was.
type Unfinished struct {
	ID       uuid.UUID // of what there is of it
	Snapshot string    // of the source, which it needs
	Err      error
}

// Error says why.
func (e *Unfinished) Error() string { return e.Err.Error() }

// Unwrap returns why.
func (e *Unfinished) Unwrap() error { return e.Err }

// Copy makes an image of that name in the store dst that is what the image source in src is
// now, with all its snapshots. It needs nothing of src then, also if source is a clone. Whoever
// has source attached goes on. If it fails, also because ctx ends, with an *Unfinished, or if
// the process dies, what there is of the copy is kept, without a name, and so is a snapshot of
// the source: the next call goes on with them.
func Copy(ctx context.Context, src backend.Store, source uuid.UUID, dst backend.Store, name string, o CopyOptions) (Copied, error) {
	o.Options = o.Options.withDefaults()
	if o.noteBytes == 0 {
		o.noteBytes = noteBytes
	}
	c := &copier{src: src, source: source, dst: dst, name: name, o: o}
	if done, err := c.begin(ctx); done || err != nil {
		return c.copied, err
	}
	err := c.run(ctx)
	switch {
	case errors.Is(err, backend.ErrExists), errors.Is(err, engine.ErrCollected):
		return Copied{}, c.giveUp(ctx, err)
	case err != nil && o.Whole:
		return Copied{}, c.giveUp(ctx, err)
	case err != nil:
		return Copied{}, &Unfinished{c.copied.ID, c.keep, err}
	}
	return c.copied, c.end(ctx)
}

// copier makes one copy.
type copier struct {
	src    backend.Store
	source uuid.UUID
	dst    backend.Store
	name   string
	o      CopyOptions

	keep   string            // the snapshot of the source that is kept for this, unless it is o.Of
	states []engine.Snapshot // of the source that are copied, in their order; keep, or o.Of, is the last
	next   int               // the first of them that is not whole in the copy
	at     engine.CopyState
	im     *inproc.Image
	copied Copied
}

// begin finds a copy that has been begun, or begins one. done says that one was whole.
func (c *copier) begin(ctx context.Context) (done bool, err error) {
	now, err := backend.Lookup(ctx, c.dst, c.name)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return false, err
	}
	taken := err == nil
	all, err := engine.Snapshots(ctx, c.src, c.source)
	if err != nil {
		return false, err
	}
	for _, s := range all {
		id, ok := copyID(s.Name)
		switch {
		case ok && taken && id == now && !c.o.Whole:
			return true, c.wasWhole(ctx, s, id)
		case !ok || taken || c.o.Whole:
			continue
		}
		at, name, err := engine.CopyOf(ctx, c.dst, id)
		if errors.Is(err, backend.ErrNotFound) || err == nil && (name != c.name || at.Source != c.source) {
			continue // one for another image or store
		}
		if err != nil {
			return false, err
		}
		c.copied.ID, c.copied.Resumed, c.keep, c.at = id, true, s.Name, at
		if !s.Pending {
			if fits, err := c.resume(ctx, all); fits || err != nil {
				return false, err
			}
		}
		if err := c.replace(ctx); err != nil {
			return false, err
		}
		c.copied, c.next = Copied{}, 0
	}
	if taken {
		return false, fmt.Errorf("image %s %w", c.name, backend.ErrExists)
	}
	return false, c.create(ctx)
}

// copyID returns the id of the copy for which a snapshot of that name is kept, if it is for
// one.
func copyID(snapshot string) (uuid.UUID, bool) {
	text, ok := strings.CutPrefix(snapshot, copyPrefix)
	if !ok {
		return uuid.Nil, false
	}
	id, err := uuid.Parse(text)
	return id, err == nil
}

// wasWhole ends a copy that has got its name, as the image id, and no more.
func (c *copier) wasWhole(ctx context.Context, s engine.Snapshot, id uuid.UUID) error {
	c.keep, c.copied = s.Name, Copied{ID: id, Size: s.Size, Resumed: true}
	list, err := engine.Snapshots(ctx, c.dst, id)
	if err != nil {
		return err
	}
	c.copied.Snapshots = len(list)
	if _, _, err := engine.CopyOf(ctx, c.dst, id); err == nil {
		if err := engine.Finish(ctx, c.dst, c.name, id, 0); err != nil {
			return err
		}
	}
	return c.end(ctx)
}

// take takes the states that are to be copied from the snapshots of the source. What came
// after the one that is kept does not belong to them.
func (c *copier) take(all []engine.Snapshot) error {
	c.states = nil
	for _, s := range all {
		_, other := copyID(s.Name)
		switch {
		case s.Name == c.keep && c.o.Of == uuid.Nil, s.ID == c.o.Of && !s.Pending:
			c.states = append(c.states, s)
			return nil
		case other || c.o.HeadOnly || s.Pending:
		default:
			c.states = append(c.states, s)
		}
	}
	if c.o.Of != uuid.Nil {
		return engine.ErrNoSnapshot
	}
	return fmt.Errorf("the snapshot %s of the source has been removed", c.keep)
}

// resume finds how far the copy is, and reports whether it can go on: if the source has all
// that is in the copy, under the same names, and what was being copied is what comes next.
func (c *copier) resume(ctx context.Context, all []engine.Snapshot) (bool, error) {
	if err := c.take(all); err != nil {
		return false, err
	}
	have, err := engine.Snapshots(ctx, c.dst, c.copied.ID)
	if err != nil {
		return false, err
	}
	c.next = 0
	for i, s := range c.states {
		if s.ID == c.at.From {
			c.next = i + 1
		}
	}
	heads := c.next == len(c.states)
	want := c.next
	if heads {
		want-- // the last one has no snapshot
	}
	if c.at.To != uuid.Nil && (heads || c.at.To != c.states[c.next].ID) {
		return false, nil
	}
	// Names alone do not tell: with ages of snapshots, each gets that of the one before.
	if c.next != c.at.Count || len(have) < want || len(have) > min(want+1, len(c.states)-1) {
		return false, nil
	}
	for i, s := range have {
		if s.Name != c.states[i].Name {
			return false, nil
		}
	}
	return true, nil
}

// create begins a copy: it is there before what is kept for it.
func (c *copier) create(ctx context.Context) error {
	info, err := engine.DescribeID(ctx, c.src, c.source)
	if err != nil {
		return err
	}
	size := info.Size
	for _, s := range info.Snapshots {
		if _, other := copyID(s.Name); !other && !s.Pending && !c.o.HeadOnly {
			size = s.Size // the first that is going to be copied
			break
		}
	}
	id, err := engine.CreatePartial(ctx, c.dst, c.name, engine.CreateOptions{Size: size, BlockSize: info.BlockSize, ObjectSize: info.ObjectSize})
	if err != nil {
		return err
	}
	c.copied.ID, c.keep, c.at = id, copyPrefix+id.String(), engine.CopyState{Source: c.source}
	if err = engine.NoteCopy(ctx, c.dst, id, c.at); err == nil && c.o.Of == uuid.Nil {
		soon, stop := context.WithTimeoutCause(ctx, snapshotTimeout, fmt.Errorf("%v are over", snapshotTimeout))
		_, err = engine.CreateSnapshot(soon, c.src, c.source, c.keep, c.o.Snapshot)
		stop()
	}
	var all []engine.Snapshot
	if err == nil {
		all, err = engine.Snapshots(ctx, c.src, c.source)
	}
	if err == nil {
		err = c.take(all)
	}
	if err != nil {
		return c.giveUp(ctx, err)
	}
	return nil
}

// replace removes a copy that cannot go on, unless another command is at it.
func (c *copier) replace(ctx context.Context) error {
	im, err := c.open(ctx)
	if errors.As(err, new(*engine.OwnedError)) {
		return err
	}
	if err == nil {
		leave(im, errors.New("it is removed"))
	}
	c.o.Progress("removing a copy that does not fit any more", 0, 0)
	return c.giveUp(ctx, nil)
}

// open takes the copy.
func (c *copier) open(ctx context.Context) (*inproc.Image, error) {
	options := c.o.inproc()
	options.Partial = true
	return inproc.Open(ctx, c.dst, c.copied.ID, options)
}

// giveUp removes the copy, and what is kept for it, because of why.
func (c *copier) giveUp(ctx context.Context, why error) error {
	err := engine.Abort(ctx, c.dst, c.copied.ID, why)
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer stop()
	if e := c.release(ctx); e != nil && err == nil {
		err = e
	}
	return err
}

// release removes the snapshot of the source that was kept.
func (c *copier) release(ctx context.Context) error {
	if c.o.Of != uuid.Nil {
		return nil
	}
	err := engine.RemoveSnapshot(ctx, c.src, c.source, c.keep)
	if err != nil && !errors.Is(err, engine.ErrNoSnapshot) {
		return fmt.Errorf("the snapshot %s of what was copied is left, which lsdctl snap rm removes: %w", c.keep, err)
	}
	return nil
}

// end releases what was kept for a copy that is whole.
func (c *copier) end(ctx context.Context) error {
	if err := c.release(ctx); err != nil {
		return fmt.Errorf("the copy is whole, but %w", err)
	}
	return nil
}

// run copies what is missing, and gives the copy its name.
func (c *copier) run(ctx context.Context) error {
	if err := c.fill(ctx); err != nil {
		return err
	}
	if err := engine.CopyMetadata(ctx, c.src, c.source, c.dst, c.copied.ID); err != nil {
		return fmt.Errorf("copy the metadata: %w", err)
	}
	c.copied.Size, c.copied.Snapshots = c.states[len(c.states)-1].Size, len(c.states)-1
	return engine.Finish(ctx, c.dst, c.name, c.copied.ID, 0)
}

// fill copies all states that are missing. The copy is nobody's then, also where another
// process has copied all and died before it said so.
func (c *copier) fill(ctx context.Context) error {
	var err error
	if c.im, err = c.open(ctx); err != nil {
		return err
	}
	err = c.im.Refresh(ctx) // a snapshot may have been asked for and not taken
	for err == nil && c.next < len(c.states) {
		err = c.state(ctx)
	}
	if err != nil {
		return leaveGently(ctx, c.im, err)
	}
	return c.im.Close(ctx)
}

// state copies the next state, as what it is on top of the one before, and makes a snapshot of
// it, unless it is the last one.
func (c *copier) state(ctx context.Context) error {
	s := &c.states[c.next]
	last := c.next == len(c.states)-1
	made, err := c.has(ctx, s.Name)
	if err != nil {
		return err
	}
	if !made {
		if err := c.copyState(ctx, s); err != nil {
			return fmt.Errorf("copy snapshot %s: %w", s.Name, err)
		}
	}
	// Before a snapshot is asked for all that it holds is in the store: if this process dies,
	// whoever opens the copy next takes it.
	err = c.im.Destage(ctx)
	if err == nil && !made && !last {
		err = c.im.Snapshot(ctx, s.Name)
	}
	if err == nil {
		err = c.note(ctx, engine.CopyState{Source: c.source, From: s.ID, Count: c.next + 1})
	}
	if err != nil {
		return err
	}
	c.next++
	return nil
}

// has reports whether the copy has the snapshot of that name.
func (c *copier) has(ctx context.Context, name string) (bool, error) {
	list, err := engine.Snapshots(ctx, c.dst, c.copied.ID)
	for _, s := range list {
		if s.Name == name && !s.Pending {
			return true, err
		}
	}
	return false, err
}

func (c *copier) note(ctx context.Context, at engine.CopyState) error {
	if err := engine.NoteCopy(ctx, c.dst, c.copied.ID, at); err != nil {
		return fmt.Errorf("note how far the copy is: %w", err)
	}
	c.at = at
	return nil
}

// copyState writes in what the state s differs from the one before.
func (c *copier) copyState(ctx context.Context, s *engine.Snapshot) error {
	what := fmt.Sprintf("copying %s, %d of %d", s.Name, c.next+1, len(c.states))
	c.o.Progress(what, 0, 0)
	to, err := engine.OpenView(ctx, c.src, c.source, engine.ViewOptions{Snapshot: s.ID})
	if err != nil {
		return err
	}
	defer to.Close()
	var from *engine.View
	var before, total uint64 // bytes of the states before this one, and of all
	for i := range c.states {
		if total += c.states[i].Size; i < c.next {
			before += c.states[i].Size
		}
	}
	if c.next > 0 {
		if from, err = engine.OpenView(ctx, c.src, c.source, engine.ViewOptions{Snapshot: c.states[c.next-1].ID}); err != nil {
			return err
		}
		defer from.Close()
	}
	if c.at.To != s.ID {
		// Noted before anything of it is written: what is on top of the state before is known.
		if err := c.note(ctx, engine.CopyState{Source: c.source, From: c.at.From, Count: c.at.Count, To: s.ID}); err != nil {
			return err
		}
	}
	if err := resize(ctx, c.dst, c.copied.ID, c.im, to.Size(), c.o.Options); err != nil {
		return err
	}
	w := inproc.NewWriter(ctx, c.im, c.next == 0)
	defer w.Stop()
	noted, at := uint64(0), time.Now()
	err = engine.DiffDataFrom(ctx, from, to, c.at.Offset, func(r engine.Range, data []byte) error {
		if err := write(w, r, data); err != nil {
			return err
		}
		c.o.Progress(what, before+r.Offset+r.Length, total)
		if w.Wrote()-noted < c.o.noteBytes && time.Since(at) < noteEvery {
			return nil
		}
		noted, at = w.Wrote(), time.Now()
		if err := w.Wait(); err != nil {
			return err
		}
		if err := c.im.Destage(ctx); err != nil {
			return err
		}
		next := c.at
		next.Offset = r.Offset + r.Length
		return c.note(ctx, next)
	})
	if err == nil {
		err = w.Wait()
	}
	c.copied.Data += w.Wrote()
	return err
}

// write writes a range: its data, or zeroes where there is none.
func write(w *inproc.Writer, r engine.Range, data []byte) error {
	if r.Zero {
		return w.Discard(r.Offset, r.Length)
	}
	for off := r.Offset; len(data) > 0; {
		b, err := w.Buffer()
		if err != nil {
			return err
		}
		n := copy(b, data)
		if err := w.Write(b[:n], off); err != nil {
			return err
		}
		data, off = data[n:], off+uint64(n)
	}
	return nil
}
