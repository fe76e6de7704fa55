package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
	"github.com/lsd-ceph/lsd/internal/rbddiff"
)

// ErrOtherState is matched when the image is not what a diff begins with.
var ErrOtherState = errors.New("the image is not what the diff begins with")

// PartError says that part of a diff has been applied.
type PartError struct{ Err error }

// Error says why it is not all of it.
func (e *PartError) Error() string { return "the image holds part of the diff: " + e.Err.Error() }

// Unwrap returns why.
func (e *PartError) Unwrap() error { return e.Err }

// Diff is what a file of rbd export-diff says, and what has been applied of it.
type Diff struct {
	rbddiff.Header
	Data   uint64 // bytes of data
	Zeroes uint64 // bytes that were said to be zeroes
}

// CheckDiff reads a file of rbd export-diff to its end, and returns what it has.
func CheckDiff(r io.Reader) (Diff, error) {
	rd, err := rbddiff.NewReader(r)
	if err != nil {
		return Diff{}, err
	}
	d := Diff{Header: rd.Header()}
	for {
		rec, err := rd.Next()
		switch {
		case err == io.EOF:
			return d, nil
		case err != nil:
			return d, err
		}
		d.add(rec)
	}
}

func (d *Diff) add(rec rbddiff.Record) {
	if rec.Zero {
		d.Zeroes += rec.Length
	} else {
		d.Data += rec.Length
	}
}

// ApplyDiff applies a file of rbd export-diff to the image id, which nobody may have: what it
// has is written, the image gets its size, in whole blocks, and then the snapshot that it
// leads to, if it says one. The image must have the snapshot that the diff begins with, and be
// what it was then; without one, it must hold no data. force leaves that out. A
// *PartError says that something has been changed: to apply it again with force is as if it
// had been applied once. A read of r that can take any time is to end with ctx: see
// Interruptible.
func ApplyDiff(ctx context.Context, st backend.Store, id uuid.UUID, r io.Reader, force bool, o Options) (Diff, error) {
	o = o.withDefaults()
	rd, err := rbddiff.NewReader(r)
	if err != nil {
		return Diff{}, err
	}
	x := &applier{st: st, id: id, rd: rd, o: o, done: Diff{Header: rd.Header()}}
	if err := x.check(ctx); err != nil {
		return x.done, err
	}
	if x.im, err = inproc.Open(ctx, st, id, o.inproc()); err != nil {
		return x.done, err
	}
	err = x.run(ctx, force)
	if err != nil {
		err = leaveGently(ctx, x.im, err)
	} else if err = x.im.Close(ctx); err != nil {
		x.changed = true
	}
	if err != nil && x.changed {
		err = &PartError{err}
	}
	return x.done, err
}

// applier applies one diff.
type applier struct {
	st      backend.Store
	id      uuid.UUID
	rd      *rbddiff.Reader
	o       Options
	from    engine.Snapshot // the zero one if it begins with nothing
	im      *inproc.Image
	w       *inproc.Writer
	changed bool // the image, perhaps
	done    Diff
}

// check fails where the diff does not fit the image's snapshots.
func (x *applier) check(ctx context.Context) error {
	h := &x.done.Header
	for _, name := range []string{h.From, h.To} {
		if name == "" {
			continue
		}
		if err := backend.CheckSnapshotName(name); err != nil {
			return fmt.Errorf("a snapshot of the diff: %w", err)
		}
	}
	if h.Size == 0 {
		return errors.New("the diff is of a disk of 0 bytes: an image must have at least one block")
	}
	if h.Size > engine.MaxSize {
		return fmt.Errorf("the diff is of a disk of %d bytes, which is beyond the limit of %d bytes", h.Size, uint64(engine.MaxSize))
	}
	list, err := engine.Snapshots(ctx, x.st, x.id)
	if err != nil {
		return err
	}
	named := func(name string) int {
		return slices.IndexFunc(list, func(s engine.Snapshot) bool { return s.Name == name })
	}
	if h.From != "" {
		i := named(h.From)
		if i < 0 {
			return fmt.Errorf("the diff begins with the snapshot %s: %w", h.From, engine.ErrNoSnapshot)
		}
		if x.from = list[i]; x.from.Pending {
			return fmt.Errorf("the diff begins with the snapshot %s, which has not been taken yet", h.From)
		}
	}
	if h.To != "" && named(h.To) >= 0 {
		return fmt.Errorf("the diff leads to the snapshot %s: %w", h.To, engine.ErrSnapshotExists)
	}
	return nil
}

// run applies the diff to the image, which is open.
func (x *applier) run(ctx context.Context, force bool) error {
	if !force {
		if err := x.fits(ctx); err != nil {
			return err
		}
	}
	before, size := x.im.Size(), wholeBlocks(x.done.Size, x.im.BlockSize())
	if err := x.im.CheckSize(size); err != nil {
		return err
	}
	x.changed = true
	if err := resize(ctx, x.st, x.id, x.im, size, x.o); err != nil {
		return err
	}
	x.w = inproc.NewWriter(ctx, x.im, false)
	var err error
	if before > x.done.Size {
		// The last block may have something beyond the end, which is not to be there if the
		// disk grows again: the diff that makes it grow does not say so.
		err = x.zero(ctx, rbddiff.Record{Offset: x.done.Size, Length: size - x.done.Size})
	}
	if err == nil {
		err = x.records(ctx)
	}
	x.w.Stop()
	if err != nil {
		return err
	}
	x.o.Progress("bringing the rest into the store", 0, 0)
	// Before the snapshot is asked for: if this process dies, whoever has the image next takes
	// it.
	err = x.im.Destage(ctx)
	if err != nil || x.done.To == "" {
		return err
	}
	return x.im.Snapshot(ctx, x.done.To)
}

// fits fails with ErrOtherState unless the image is what the diff begins with.
func (x *applier) fits(ctx context.Context) error {
	x.o.Progress("comparing the image to what the diff begins with", 0, 0)
	now, err := engine.OpenView(ctx, x.st, x.id, engine.ViewOptions{})
	if err != nil {
		return err
	}
	defer now.Close()
	var from *engine.View
	other := fmt.Errorf("%w: it does not begin with a snapshot, and there is data in the image", ErrOtherState)
	if x.from.ID != uuid.Nil {
		if from, err = engine.OpenView(ctx, x.st, x.id, engine.ViewOptions{Snapshot: x.from.ID}); err != nil {
			return err
		}
		defer from.Close()
		if from.Size() != now.Size() {
			return fmt.Errorf("%w: it has had another size since the snapshot %s", ErrOtherState, x.from.Name)
		}
		other = fmt.Errorf("%w: it has been written to since the snapshot %s", ErrOtherState, x.from.Name)
	}
	if from == nil {
		return engine.Diff(ctx, nil, now, func(engine.Range) error { return other })
	}
	// The cleaner may have moved data, so that it is in another place and the same.
	b, zeroes := make([]byte, engine.PieceSize), make([]byte, engine.PieceSize)
	return engine.DiffData(ctx, from, now, func(r engine.Range, data []byte) error {
		for off, end := r.Offset, r.Offset+r.Length; off < end; {
			n := min(end-off, engine.PieceSize)
			want := zeroes[:n]
			if !r.Zero {
				want, data = data[:n], data[n:]
			}
			if err := from.ReadAt(ctx, b[:n], off); err != nil {
				return err
			}
			if !bytes.Equal(b[:n], want) {
				return other
			}
			off += n
		}
		return nil
	})
}

// resize gives an image that is open a size.
func resize(ctx context.Context, st backend.Store, id uuid.UUID, im *inproc.Image, size uint64, o Options) error {
	var err error
	switch now := im.Size(); {
	case size > now:
		if err = engine.Grow(ctx, st, id, size); err == nil {
			err = im.Refresh(ctx)
		}
	case size < now:
		err = im.Shrink(ctx, size, func(done, total uint64) { o.Progress("making it smaller", done, total) })
	}
	if err != nil {
		return fmt.Errorf("give the image %d bytes: %w", size, err)
	}
	return nil
}

// records applies all records.
func (x *applier) records(ctx context.Context) error {
	for {
		rec, err := x.rd.Next()
		switch {
		case err == io.EOF:
			return x.w.Wait()
		case err != nil:
			return err
		case rec.Zero:
			err = x.zero(ctx, rec)
		default:
			err = x.data(ctx, rec)
		}
		if err != nil {
			return err
		}
		x.done.add(rec)
	}
}

// data writes the data of a record, which need not be of whole sectors.
func (x *applier) data(ctx context.Context, rec rbddiff.Record) error {
	for off, left := rec.Offset, rec.Length; left > 0; {
		n := edge(off, left)
		if n > 0 {
			var b [engine.SectorSize]byte
			if _, err := io.ReadFull(x.rd, b[:n]); err != nil {
				return err
			}
			if err := x.patch(ctx, b[:n], off); err != nil {
				return err
			}
		} else {
			n = min(left/engine.SectorSize*engine.SectorSize, inproc.PieceSize)
			b, err := x.w.Buffer()
			if err != nil {
				return err
			}
			if _, err := io.ReadFull(x.rd, b[:n]); err != nil {
				x.w.Return(b)
				return err
			}
			if err := x.w.Write(b[:n], off); err != nil {
				return err
			}
		}
		off, left = off+n, left-n
	}
	return nil
}

// zero makes the range of a record read as zeroes.
func (x *applier) zero(ctx context.Context, rec rbddiff.Record) error {
	for off, left := rec.Offset, rec.Length; left > 0; {
		n := edge(off, left)
		var err error
		if n > 0 {
			err = x.patch(ctx, make([]byte, n), off)
		} else {
			n = left / engine.SectorSize * engine.SectorSize
			err = x.w.Discard(off, n)
		}
		if err != nil {
			return err
		}
		off, left = off+n, left-n
	}
	return nil
}

// edge returns how many of the bytes from off on are only part of a sector.
func edge(off, left uint64) uint64 {
	if off%engine.SectorSize == 0 && left >= engine.SectorSize {
		return 0
	}
	return min(left, engine.SectorSize-off%engine.SectorSize)
}

// patch writes p, which is within a sector.
func (x *applier) patch(ctx context.Context, p []byte, off uint64) error {
	if err := x.w.Wait(); err != nil {
		return err
	}
	b, start := make([]byte, engine.SectorSize), off/engine.SectorSize*engine.SectorSize
	if err := x.im.ReadAt(ctx, b, start); err != nil {
		return err
	}
	copy(b[off-start:], p)
	return x.im.WriteAt(ctx, b, start)
}

// Interruptible returns a reader of r of which a read ends with ctx. Then what r gives is
// lost.
func Interruptible(ctx context.Context, r io.Reader) io.Reader { return interruptible{ctx, r} }

type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (x interruptible) Read(p []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	read := make(chan result, 1)
	b := make([]byte, len(p)) // nobody else's, also when ctx has ended
	go func() {
		n, err := x.r.Read(b)
		read <- result{n, err}
	}()
	select {
	case r := <-read:
		return copy(p, b[:r.n]), r.err
	case <-x.ctx.Done():
		return 0, context.Cause(x.ctx)
	}
}
