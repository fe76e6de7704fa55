package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/mutate"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// recoverStore loads the last checkpoint and replays the data objects after it:
// the longest unbroken run.
func (im *Image) recoverStore(ctx context.Context, sb *superblock) error {
	im.takeSuper(sb, im.super.version)
	if err := im.loadCheckpoint(ctx, sb.Checkpoint); err != nil {
		return err
	}
	_, err := im.replay(ctx, sb, maxObjectSeq)
	return err
}

// replay enters the data objects after the last one in the map, up to the object
// last or the end of the run. It returns the number of the object that ends the run
// by not being there, or 0.
func (im *Image) replay(ctx context.Context, sb *superblock, last uint64) (missing uint64, err error) {
	return im.headers(ctx, sb, im.accepted, last, replayer{im})
}

// visitor is told of the data objects of a path, in order.
type visitor interface {
	object(*objectHeader) error
	// rollback is called where the path goes on after a rollback, at which the position is
	// at.
	rollback(at position)
}

// replayer enters objects into the map of an image.
type replayer struct{ im *Image }

func (r replayer) object(h *objectHeader) error {
	r.im.applyNow(h)
	r.im.recoveredLog = h.log
	return nil
}

func (r replayer) rollback(at position) { r.im.accepted, r.im.recoveredLog = at, uuid.Nil }

// endFinder notes the position that a path has come to.
type endFinder struct{ at *position }

func (e endFinder) object(h *objectHeader) error {
	*e.at = h.end()
	return nil
}

func (e endFinder) rollback(at position) { *e.at = at }

// headers reads the headers of the data objects on the path to the object last after a
// position on it, and tells v of them, in order, up to the end of the run. It returns
// the number of the object that ends the run by not being there, or 0.
func (im *Image) headers(ctx context.Context, sb *superblock, at position, last uint64, v visitor) (missing uint64, err error) {
	p := sb.pathTo(last)
	for i, r := range p {
		if at.object > r.last {
			continue
		}
		missing, err = im.headersIn(ctx, sb, at, r.last, v.object)
		switch {
		case err != nil || i+1 == len(p):
			return missing, err
		case missing > 0: // the image does not end there
			return 0, fmt.Errorf("data object %s: %w", im.line.dataKey(missing, sb.epochOf(missing)), backend.ErrNotFound)
		}
		k := slices.IndexFunc(sb.Rollbacks, func(b rollback) bool { return b.Object == p[i+1].after })
		at = position{object: p[i+1].after, seq: sb.Rollbacks[k].Seq}
		v.rollback(at)
	}
	return 0, nil
}

// headersIn reads the headers of the data objects after a position, several at a
// time, and calls fn for each, in order, up to the object last or the end of the
// run. Of a group of objects it calls fn for all or none. It returns the number of the
// object that ends the run by not being there, or 0.
func (im *Image) headersIn(ctx context.Context, sb *superblock, at position, last uint64, fn func(*objectHeader) error) (missing uint64, err error) {
	type answer struct {
		h   *objectHeader
		err error
	}
	ahead := make([]chan answer, 0, im.parallel)
	ctx, stop := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait() // what was asked in vain uses the image still
	defer stop()
	asked := at.object
	var group []*objectHeader // that is not complete
	for next := at.object + 1; next <= last; next++ {
		for len(ahead) < im.parallel && asked < last {
			asked++
			seq, c := asked, make(chan answer, 1)
			ask := func() error {
				h, err := im.loadHeader(ctx, sb, seq)
				c <- answer{h, err}
				return nil
			}
			if ahead = append(ahead, c); im.parallel == 1 {
				_ = ask()
				continue
			}
			asking.Go(func() {
				if err := parallel.Catch(ask); err != nil {
					c <- answer{nil, err}
				}
			})
		}
		a := <-ahead[0]
		ahead = append(ahead[:0], ahead[1:]...)
		parallel.Throw(a.err)
		if errors.Is(a.err, backend.ErrNotFound) {
			if mutate.On(mutate.HalfCounted) && len(group) > 0 {
				group[0].joined = false
				return next, fn(group[0])
			}
			return next, nil
		}
		if a.err != nil {
			return 0, a.err
		}
		if err := im.goesOn(at, group, a.h); err != nil {
			return 0, err
		}
		if group = append(group, a.h); a.h.joined {
			continue
		}
		for _, h := range group {
			if err := fn(h); err != nil {
				return 0, err
			}
		}
		at, group = a.h.end(), group[:0]
	}
	return 0, nil
}

// goesOn returns an error unless the object h goes on where the one before ended: the
// first of a group after the position at, the others with the records of the group.
func (im *Image) goesOn(at position, group []*objectHeader, h *objectHeader) error {
	if h.firstSeq != at.seq+1 {
		return fmt.Errorf("object %s: %w: it begins at record %d, the one before ends at %d",
			im.line.dataKey(h.seq, h.epoch), ErrCorrupt, h.firstSeq, at.seq)
	}
	if len(group) == 0 {
		return nil
	}
	first := group[0]
	if len(group) == maxGroup || h.epoch != first.epoch || h.lastSeq != first.lastSeq || h.log != first.log || h.logEnd != first.logEnd {
		return fmt.Errorf("object %s: %w: it is not of the group that object %d is of", im.line.dataKey(h.seq, h.epoch), ErrCorrupt, first.seq)
	}
	return nil
}

// storeEnd returns where the store's unbroken run of objects ends.
func (im *Image) storeEnd(ctx context.Context, sb *superblock) (position, error) {
	var at position
	if sb.Checkpoint != nil {
		m, err := im.loadManifest(ctx, *sb.Checkpoint)
		if err != nil {
			return at, err
		}
		at = m.at
	}
	_, err := im.headers(ctx, sb, at, maxObjectSeq, endFinder{&at})
	return at, err
}

// loadHeader reads the header of a data object, and makes sure that all of the
// object is there. It fails with ErrNotFound where the run of objects ends.
func (im *Image) loadHeader(ctx context.Context, sb *superblock, seq uint64) (*objectHeader, error) {
	epoch := sb.epochOf(seq)
	if epoch == 0 || seq > maxObjectSeq {
		return nil, backend.ErrNotFound // no epoch has been settled: no object was put
	}
	key := im.line.dataKey(seq, epoch)
	b := make([]byte, firstRead)
	n, err := im.store.Get(ctx, key, b, 0)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*objectHeader, error) { return nil, fmt.Errorf("object %s: %w", key, err) }
	size, err := objectHeaderSize(b[:n])
	if err != nil {
		return fail(err)
	}
	if size > n {
		rest := make([]byte, size)
		m, err := im.store.Get(ctx, key, rest[copy(rest, b[:n]):], int64(n))
		if err != nil {
			return nil, err
		}
		b, n = rest, n+m
	}
	if n < size {
		return fail(fmt.Errorf("%w: it ends after %d bytes, its header has %d", ErrCorrupt, n, size))
	}
	h, err := decodeObjectHeader(b[:size], im.span.Load())
	if err != nil {
		return fail(err)
	}
	if h.image != im.line.of(seq) || h.seq != seq || h.epoch != epoch {
		return fail(fmt.Errorf("%w: it is another object than its name says", ErrCorrupt))
	}
	whole, err := im.store.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	if whole.Size != int64(h.header+h.data) {
		return fail(fmt.Errorf("%w: it has %d bytes, it should have %d", ErrCorrupt, whole.Size, h.header+h.data))
	}
	return h, nil
}

// readWhole reads all of an object.
func readWhole(ctx context.Context, st backend.Store, key string) ([]byte, error) {
	is, err := st.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	if is.Size > backend.MaxObject {
		return nil, fmt.Errorf("object %s: %w: %d bytes", key, ErrCorrupt, is.Size)
	}
	b := make([]byte, is.Size)
	n, err := st.Get(ctx, key, b, 0)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}

func (im *Image) loadManifest(ctx context.Context, c checkpointRef) (*manifest, error) {
	return loadManifest(ctx, im.store, im.line, c, im.span.Load())
}

// loadManifest reads the manifest of a checkpoint of an image of so many sectors at most.
func loadManifest(ctx context.Context, st backend.Store, line *lineage, c checkpointRef, sectors uint64) (*manifest, error) {
	key := line.manifestKey(c, 0)
	m, err := readManifest(ctx, st, line, c, sectors)
	if err == nil && m.ref() != c {
		err = fmt.Errorf("%w: it is another checkpoint than its name says", ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", key, err)
	}
	return m, nil
}

// readManifest reads and decodes the parts of a manifest.
func readManifest(ctx context.Context, st backend.Store, line *lineage, c checkpointRef, sectors uint64) (*manifest, error) {
	b, err := readWhole(ctx, st, line.manifestKey(c, 0))
	if err != nil {
		return nil, err
	}
	size, err := manifestSize(b)
	if err != nil {
		return nil, err
	}
	for part := 1; len(b) < size; part++ {
		more, err := readWhole(ctx, st, line.manifestKey(c, part))
		if err != nil {
			return nil, err
		}
		if len(more) == 0 || len(more) > size-len(b) {
			return nil, fmt.Errorf("%w: its part %d has %d bytes", ErrCorrupt, part, len(more))
		}
		b = append(b, more...)
	}
	return decodeManifest(b, line.of(c.Object), sectors)
}

// loadCheckpoint makes the map that of a checkpoint, nil for the empty one: what
// it says of objects and segments is loaded, the segments come when needed.
func (im *Image) loadCheckpoint(ctx context.Context, c *checkpointRef) error {
	if c == nil {
		return nil
	}
	m, err := im.loadManifest(ctx, *c)
	if err != nil {
		return err
	}
	im.table.load(m.objects)
	im.objs.storedMap = m.storedMap
	last := *c
	im.checkpoint.last = &last
	im.accepted, im.recoveredLog = m.at, m.log
	return nil
}

// errMisfit is matched when a log does not go on where the store ends.
var errMisfit = fmt.Errorf("%w or not of this state of the image", writelog.ErrCorrupt)

// recoverLog replays what the log holds beyond the store, and returns the number
// of the first record that it can ever have held.
func (im *Image) recoverLog(ctx context.Context, o *OpenOptions) (first uint64, err error) {
	if err := im.shared.startScan(ctx); err != nil {
		return 0, err
	}
	defer im.shared.endScan()
	h := im.log.Header()
	first = h.FirstSeq
	if first == 0 { // never used
		first = im.accepted.seq + 1
	}
	start := writelog.Start{Pos: 0, Seq: first}
	if im.recoveredLog == h.Log {
		start = writelog.Start{Pos: im.accepted.logEnd, Seq: im.accepted.seq + 1}
	}
	if wrong := start.Seq; wrong != im.accepted.seq+1 {
		mismatch := fmt.Errorf("%w: it begins at record %d, the store ends at %d", errMisfit, wrong, im.accepted.seq)
		if wrong > im.accepted.seq || im.recoveredLog == h.Log {
			return 0, mismatch
		}
		// An object that the owner before had under way has come after the log was made,
		// and before the superblock said where this ownership begins. Until it does,
		// nothing is acknowledged: the log is empty, and begins where the store ends now.
		last, err := writelog.LastSeq(ctx, o.Log)
		if err == nil && last > 0 {
			err = mismatch
		}
		if err != nil {
			return 0, err
		}
		first = im.accepted.seq + 1
		start.Seq = first
	}
	// Positions of other logs mean nothing here.
	im.accepted.logEnd = start.Pos
	im.sealed = im.accepted
	before := im.accepted
	by := writelog.RecoverOptions{Sectors: im.span.Load(), Boot: o.Boot, ReadAhead: im.parallel > 1}
	err = im.log.Recover(ctx, start, by, func(r writelog.Record) error {
		im.recoverRecord(r, before)
		before.seq, before.logEnd = r.Seq, r.End
		return nil
	})
	if err == nil && im.open != nil {
		im.sealAt(before.seq, before.logEnd)
	}
	return first, err
}

// lastSeq returns the number of the last record that a log holds.
func (im *Image) lastSeq(ctx context.Context, log writelog.File) (uint64, error) {
	if err := im.shared.startScan(ctx); err != nil {
		return 0, err
	}
	defer im.shared.endScan()
	return writelog.LastSeq(ctx, log)
}
