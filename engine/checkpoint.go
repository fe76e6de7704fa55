package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/invariants"
)

// checkpointer writes checkpoints: the map as it is after one data object. The
// reactor owns it.
//
// A checkpoint writes the segments that have changed, packed into map objects, and
// a manifest that says where every segment is. The segments are brought into memory and
// copied a few at a time, and encoded and put by workers; one in memory that is about to
// change before its turn is copied at once, which costs little: its pages are copied when
// they change (extmap.Map.Copy). If such copies have come to take too much memory, because
// they are not put as fast, it is loaded again when its turn comes. Once it is put, a segment is stored there. The superblock
// names a checkpoint before anything of it is written, and those that were replaced until
// they are removed, so that a crash leaves nothing that the next start does not know of.
type checkpointer struct {
	im   *Image
	last *checkpointRef // the last one published, or nil
	// table.added and table.emptied when it began.
	added, emptied uint64
	parts          int // that its manifest has, at most

	running  *runningCheckpoint
	unbound  bool                  // more may be accepted than its bounds allow: the image is to be let go of
	leftOut  error                 // why the image was let go of without one, or nil
	damaged  map[segmentPart]place // what could not be read to be moved, and where
	old      []oldManifest         // replaced, and not removed so far
	removing bool                  // what nothing needs any more is being removed
	unheld   bool                  // there may be more of that since the removal began
	removals []func(error)         // want to know when the removal has ended
	waiters  []func(error)         // want a checkpoint that begins from now on
}

// idle reports whether a checkpoint may begin.
func (c *checkpointer) idle() bool { return c.running == nil && c.im.apply.h == nil }

// runningCheckpoint is a checkpoint that is being written.
type runningCheckpoint struct {
	at position
	// table.added and table.emptied when it began.
	added, emptied uint64

	ref     checkpointRef
	objects []objectInfo
	pending bitset                 // to be copied
	order   []uint32               // the same, in order
	loading map[uint32]bool        // those whose turn it is, and that are being loaded
	unread  map[uint32]*unreadPart // of these, and of pending, those that could not be
	rewrite []segmentPart          // unchanged ones that leave their map object
	whole   map[uint32]bool        // changed ones that leave it, and so have no delta
	copied  []copiedSegment
	size    int       // bytes of memory that the copies are made from, about
	encoded []mapPart // for the next map object
	bytes   int       // that these have
	parts   int       // map objects whose put was begun
	works   int       // encodings and puts that are under way
	named   bool      // the superblock says that it is being written
	final   bool      // all segments are there; the manifest is being put
	waiters []func(error)
	tries   int
}

// since returns the number of objects accepted since the last checkpoint.
func (c *checkpointer) since() uint64 {
	n := c.im.accepted.object
	if c.last != nil {
		n -= c.last.Object
	}
	return n
}

// due reports whether so much has been accepted since the last checkpoint that there
// should be one: some part of the image, so that its cost stays small beside that of
// the objects, or so many objects that recovery keeps its bound. So it is with what the
// cleaner has emptied and the table has not been told of, which a checkpoint does.
func (c *checkpointer) due() bool {
	t := &c.im.table
	much := max(t.space/spacePerCheckpoint, leastCheckpoint*c.im.object)
	return c.since() >= c.most() || t.added-c.added >= much || t.emptied-c.emptied >= much
}

// most returns how many objects may be accepted before a checkpoint begins. The rest of
// CheckpointEvery is for what comes while it is written, and for the last one's group.
func (c *checkpointer) most() uint64 {
	every := c.im.cfg.CheckpointEvery
	return uint64(max(min(every-every/4, every-maxGroup+1), 1))
}

const (
	// spacePerCheckpoint is the part of the image's space after which there is one: the
	// rarer, the less of the map is put, and the more memory its lists of changes take,
	// which with the map are to keep to 8 bytes for each block.
	spacePerCheckpoint = 12
	// leastCheckpoint is how many objects' worth of data lies between two checkpoints of an
	// image of any size, unless there are too many objects.
	leastCheckpoint = 16
)

// maybe begins a checkpoint when one is due. After the last one something must have been
// accepted, whatever else is due: else it would have that one's name.
func (c *checkpointer) maybe() {
	if c.idle() && c.since() > 0 && (c.due() || c.memoryShort()) {
		c.begin(nil)
	}
}

// atRest begins a checkpoint of an image that has become idle, if that is worth it, and
// reports whether it has: what has died since the last one can go only after the next,
// and so can the memory of the map's changes; nothing else would begin one.
func (c *checkpointer) atRest() bool {
	if !c.idle() || c.since() == 0 || !c.im.leased() {
		return false
	}
	t := &c.im.table
	dead := int(t.movedSpace) * SectorSize // it goes with what tells the table of that
	for _, n := range t.dead {
		o := t.find(uint64(n))
		if o != nil && (c.last == nil || uint64(n) > c.last.Object) && !c.im.super.holds.object(uint64(n), uint64(o.died)) {
			dead += int(o.sectors) * SectorSize
		}
	}
	if m := c.im.objs; m.changeBytes < restChanges && dead+m.uncounted() < restGain*c.im.manifestSize() {
		return false
	}
	c.begin(nil)
	return true
}

const (
	// restGain is how much space a checkpoint of an idle image must free for each byte of
	// its manifest to be worth it.
	restGain = 16
	// restChanges is from how many bytes of memory on the changes of an idle image's map
	// are worth one.
	restChanges = 256 << 10
)

// memoryShort reports whether the changes of the map take so much memory that they
// should be written.
func (c *checkpointer) memoryShort() bool { return c.im.objs.exceed(c.im.objs.changeBytes, 4) }

// behind reports whether so many objects may not be accepted until the running
// checkpoint is published.
func (c *checkpointer) behind(objects int) bool {
	m := c.im.objs
	return c.running != nil && !c.unbound && (c.since()+uint64(objects) > uint64(c.im.cfg.CheckpointEvery) || m.exceed(m.changeBytes, 2))
}

// now writes a checkpoint of the map as it is, unless there is one; fn is told
// when it is published.
func (c *checkpointer) now(fn func(error)) {
	switch {
	case c.im.accepted.object == 0 || c.idle() && c.since() == 0:
		fn(nil)
	case c.idle():
		c.begin([]func(error){fn})
	default:
		c.waiters = append(c.waiters, fn)
	}
}

// resume begins the checkpoints that had to wait for an object to be accepted.
func (c *checkpointer) resume() {
	if !c.idle() {
		return
	}
	waiters := c.waiters
	c.waiters = nil
	for _, fn := range waiters {
		c.now(fn)
	}
	c.maybe()
}

func (c *checkpointer) begin(waiters []func(error)) {
	im := c.im
	m := im.objs
	r := &runningCheckpoint{
		at: im.accepted, added: im.table.added, emptied: im.table.emptied, ref: checkpointRef{im.accepted.object, im.super.sb.Epoch},
		objects: im.table.snapshot(), waiters: waiters, loading: map[uint32]bool{}, unread: map[uint32]*unreadPart{},
	}
	r.pending = slices.Clone(m.changed)
	r.pending.each(func(i uint32) { r.order = append(r.order, i) })
	r.rewrite, r.whole = c.mostlyDead(r.pending)
	c.running = r
	im.changeSuper(func(sb *superblock) { sb.Intent = &r.ref }, func() {
		r.named = true
		c.step()
	})
	c.step()
}

// putOwn puts an object whose name nobody else uses: one that exists is this very
// object, put by an attempt whose outcome was not known.
func putOwn(ctx context.Context, st backend.Store, key string, b []byte) error {
	if err := st.Put(ctx, key, b); !errors.Is(err, backend.ErrExists) {
		return err
	}
	return nil
}

// work runs a step of the checkpoint on a worker, until it goes through, and then
// calls fn.
func (c *checkpointer) work(work func(context.Context) error, fn func()) {
	im, r := c.im, c.running
	im.askStore(work, func(err error) {
		switch {
		case im.state == Fenced || im.state == Released:
		case err != nil:
			im.storeFailed(useCheckpoint, err)
			wait := im.backoff(r.tries)
			r.tries++
			im.env.AfterFunc(wait, func() {
				if c.running == r {
					c.work(work, fn)
				}
			})
		default:
			im.storeWorks(useCheckpoint)
			r.tries = 0
			fn()
		}
	})
}

// finish writes the manifest, publishes it, and removes what it replaces.
func (c *checkpointer) finish() {
	im, r := c.im, c.running
	r.final = true
	m := &manifest{image: im.id, epoch: r.ref.Epoch, at: r.at, log: im.logID, objects: r.objects}
	// A removal may end meanwhile. What it has removed is then named as dead once more,
	// until the next checkpoint.
	now := storedMap{slices.Clone(im.objs.maps), im.objs.segments}
	var b []byte
	c.work(func(ctx context.Context) error {
		if b == nil {
			m.storedMap = now.withoutRemoved()
			b = m.encode()
		}
		return putManifest(ctx, im.store, m, b)
	}, func() {
		im.changeSuper(func(sb *superblock) {
			if old := sb.Checkpoint; old != nil && *old != r.ref && im.line.own(old.Object) {
				sb.Prev = append(sb.Prev, *old)
			}
			sb.Checkpoint, sb.Seq, sb.Intent = &r.ref, r.at.seq, nil
			sb.pruneRollbacks()
		}, func() { c.published(m) })
	})
}

// release says that the map of the running checkpoint refers to n sectors of the object
// number less, by one that is in it.
func (r *runningCheckpoint) release(number, n, by uint32) {
	i, ok := slices.BinarySearchFunc(r.objects, number, func(o objectInfo, number uint32) int { return cmp.Compare(o.number, number) })
	if !ok || r.objects[i].live < n {
		if invariants.Enabled {
			panic(fmt.Sprintf("engine: a checkpoint has no %d live sectors of object %d", n, number))
		}
		return // as mapWrong
	}
	r.objects[i].lose(n, by)
}

// putManifest writes an encoded manifest. The first part, which says how long all
// of it is, comes last. One that nobody could read is refused.
func putManifest(ctx context.Context, st backend.Store, m *manifest, b []byte) error {
	if len(b) > maxManifest {
		return fmt.Errorf("write the manifest of a checkpoint: it has %d bytes, and could not be read again with more than %d", len(b), maxManifest)
	}
	for part := (len(b) - 1) / manifestPart; part >= 0; part-- {
		p := b[part*manifestPart : min((part+1)*manifestPart, len(b))]
		if err := putOwn(ctx, st, manifestKey(m.image, m.ref(), part), p); err != nil {
			return err
		}
	}
	return nil
}

func (c *checkpointer) published(m *manifest) {
	r, im := c.running, c.im
	if c.last != nil && im.line.own(c.last.Object) {
		c.old = append(c.old, oldManifest{*c.last, c.parts})
	}
	c.last, c.added, c.emptied, c.parts, c.running = &r.ref, r.added, r.emptied, m.parts(), nil
	im.objs.storedMap = m.storedMap
	if invariants.Enabled && im.objs.copyBytes != 0 {
		panic(fmt.Sprintf("engine: a checkpoint has ended, its copies are said to take %d bytes", im.objs.copyBytes))
	}
	for n := range im.objs.bases {
		if uint64(n) <= r.at.object {
			delete(im.objs.bases, n)
		}
	}
	// What was empty before it was written, or is now, needs no place in memory.
	im.objs.evict()
	c.removeDead()
	for _, fn := range r.waiters {
		fn(nil)
	}
	c.resume()
	im.reaper.later = nil
	im.reap()
	im.advance()
}

// fail ends the running checkpoint with the image.
func (c *checkpointer) fail(err error) {
	var waiters []func(error)
	if c.running != nil {
		waiters = c.running.waiters
	}
	waiters = slices.Concat(waiters, c.waiters, c.removals)
	c.running, c.waiters, c.removals = nil, nil, nil
	for _, fn := range waiters {
		fn(err)
	}
}
