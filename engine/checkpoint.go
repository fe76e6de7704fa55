package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/invariants"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

const (
	checkpointPuts  = 4  // map objects that are being put at one time
	checkpointLoads = 16 // segments that are being loaded for one
	// mapObjectSize is about the most that a map object has, bytes. Several segments
	// share one, so that a checkpoint of many small changes is few objects.
	mapObjectSize = 4 << 20
	// mapObjectPart is the part of the map's memory that it has at most: those that are
	// being put, and what they are made from, are beside that memory.
	mapObjectPart = 64
	// copiesPart is the part of the map's memory that copies may take which are made before
	// their turn.
	copiesPart = 4
	// rewriteBytes bounds what a checkpoint moves out of map objects that have
	// become mostly dead.
	rewriteBytes = 16 << 20
)

// checkpointer writes checkpoints: the map as it is after one data object. The
// reactor owns it.
//
// A checkpoint writes the segments that have changed, packed into map objects, and
// a manifest that says where every segment is. The segments are brought into memory and
// copied a few at a time, and encoded and put by workers; one in memory that is about to
// change before its turn is copied at once, which costs little: its pages are copied when
// they change (extmap.Map.Copy). Once it is put, a segment is stored there. The superblock
// names a checkpoint before anything of it is written, and those that were replaced until
// they are removed, so that a crash leaves nothing that the next start does not know of.
type checkpointer struct {
	im    *Image
	last  *checkpointRef // the last one published, or nil
	added uint64         // table.added when it began
	parts int            // that its manifest has, at most

	running  *runningCheckpoint
	damaged  map[uint32]place // segments that could not be read to be moved, and where
	old      []oldManifest    // replaced, and not removed so far
	removing bool             // what nothing needs any more is being removed
	unheld   bool             // there may be more of that since the removal began
	removals []func(error)    // want to know when the removal has ended
	waiters  []func(error)    // want a checkpoint that begins from now on
}

// oldManifest is a manifest that has been replaced.
type oldManifest struct {
	ref   checkpointRef
	parts int // that it has, at most
}

// idle reports whether a checkpoint may begin.
func (c *checkpointer) idle() bool { return c.running == nil && c.im.apply.h == nil }

// runningCheckpoint is a checkpoint that is being written.
type runningCheckpoint struct {
	at      position
	added   uint64 // table.added when it began
	ref     checkpointRef
	objects []objectInfo
	pending bitset          // to be copied
	order   []uint32        // the same, in order
	loading map[uint32]bool // those whose turn it is, and that are being loaded
	rewrite []uint32        // unchanged segments that leave their map object
	copied  []copiedSegment
	size    int // bytes that the copies come to, about
	parts   int // map objects whose put was begun
	puts    int
	named   bool // the superblock says that it is being written
	final   bool // all segments are there; the manifest is being put
	waiters []func(error)
	tries   int
}

// copiedSegment is a segment on its way into a map object: copied from the map, or,
// if it is unchanged and not in memory, to be read from where it is stored.
type copiedSegment struct {
	index  uint32
	span   *extmap.Span
	stored place
	size   int // bytes that it comes to, about
}

// mapPart is one map object of a checkpoint.
type mapPart struct {
	segments []copiedSegment
	places   []storedSegment // in the order of segments; object is not set
	size     int
	left     []leftSegment
}

// leftSegment is a segment that could not be read, and so stays where it is.
type leftSegment struct {
	copiedSegment
	err error
}

// touch says that a segment of the map that is in memory is about to change.
func (c *checkpointer) touch(i uint32) {
	if r := c.running; r != nil && r.pending.has(i) && !c.late(i) && !c.crowded() && !mutate.On(mutate.CheckpointMixed) {
		c.copy(i)
	}
}

// pass says that the next change to be entered in segment i, which is being brought into
// memory, is x. Where the running checkpoint ends it copies the segment.
func (c *checkpointer) pass(i uint32, x change) {
	r := c.running
	if r == nil || uint64(x.object) <= r.at.object || !r.pending.has(i) || c.crowded() && !r.loading[i] {
		return
	}
	if e := c.im.objs.changes[i]; e.entered == 0 || uint64(e.list[e.entered-1].object) <= r.at.object {
		c.copy(i)
	}
}

// crowded reports whether the copies take so much memory that segments which are about to
// change are not copied. They are late then: they are loaded again when it is their turn.
func (c *checkpointer) crowded() bool {
	m := c.im.objs
	return m.exceed(m.copyBytes, m.copiesPart)
}

// late reports whether segment i, which is pending, has changed since the running
// checkpoint began.
func (c *checkpointer) late(i uint32) bool {
	list := c.im.objs.changes[i].list
	return uint64(list[len(list)-1].object) > c.running.at.object && !mutate.On(mutate.CheckpointMixed) && !mutate.On(mutate.LateCopied)
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
// the objects, or so many objects that recovery keeps its bound.
func (c *checkpointer) due() bool {
	t, object := &c.im.table, c.im.object
	most := uint64(max(c.im.cfg.CheckpointEvery/2, 1))
	return c.since() >= most || t.added-c.added >= max(t.space/12, leastCheckpoint*object)
}

// leastCheckpoint is how many objects' worth of data lies between two checkpoints of an
// image of any size, unless there are too many objects.
const leastCheckpoint = 16

// maybe begins a checkpoint when one is due.
func (c *checkpointer) maybe() {
	if c.idle() && c.im.accepted.object > 0 && (c.due() || c.since() > 0 && c.memoryShort()) {
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
	dead, t := 0, &c.im.table
	for _, n := range t.dead {
		o := t.find(uint64(n))
		if o != nil && (c.last == nil || uint64(n) > c.last.Object) && !c.im.super.sb.held(uint64(n), uint64(o.died)) {
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
	return c.running != nil && (c.since()+uint64(objects) > uint64(c.im.cfg.CheckpointEvery) || m.exceed(m.changeBytes, 2))
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
		at: im.accepted, added: im.table.added, ref: checkpointRef{im.accepted.object, im.super.sb.Epoch},
		objects: im.table.snapshot(), waiters: waiters, loading: map[uint32]bool{},
	}
	r.pending = slices.Clone(m.changed)
	r.pending.each(func(i uint32) { r.order = append(r.order, i) })
	r.rewrite = c.mostlyDead(r.pending)
	c.running = r
	im.changeSuper(func(sb *superblock) { sb.Intent = &r.ref }, func() {
		r.named = true
		c.step()
	})
	c.step()
}

// mostlyDead returns segments, none of them among those pending, that should leave
// their map objects so that these can go: less than half of each is current.
func (c *checkpointer) mostlyDead(pending bitset) (list []uint32) {
	m := c.im.objs
	sparse := make(map[uint32]bool)
	left := uint32(rewriteBytes)
	for i, o := range m.maps {
		if o.live > 0 && o.live < o.size/2 && o.live <= left {
			sparse[uint32(i)] = true
			left -= o.live
		}
	}
	if len(sparse) == 0 {
		return nil
	}
	for i, s := range m.stored {
		if s.size > 0 && sparse[s.object] && !pending.has(uint32(i)) && c.damaged[uint32(i)] != m.place(uint32(i)) {
			list = append(list, uint32(i))
		}
	}
	return list
}

// copy takes segment i of the running checkpoint as it is now.
func (c *checkpointer) copy(i uint32) {
	r, m := c.running, c.im.objs
	c.im.stint.spend(stintCopy)
	r.pending.clear(i)
	m.Compact(segmentStart(i), segmentPages)
	s := copiedSegment{index: i, span: m.Copy(segmentStart(i), segmentPages), size: segmentFixed + m.SpanBytes(segmentStart(i), segmentPages)}
	m.copyBytes += int64(s.size)
	r.take(s)
}

// take takes a segment that is to be put.
func (r *runningCheckpoint) take(s copiedSegment) {
	r.copied = append(r.copied, s)
	r.size += s.size
}

// next takes the segments of the next map object out of those that have been copied:
// when a busy map is about to change everywhere, these may be far more than one is for.
func (c *checkpointer) next() []copiedSegment {
	r := c.running
	n, size := 0, 0
	for n < len(r.copied) && size < c.full() {
		size += r.copied[n].size
		if r.copied[n].span != nil {
			c.im.objs.copyBytes -= int64(r.copied[n].size)
		}
		n++
	}
	list := r.copied[:n:n]
	r.copied, r.size = r.copied[n:], r.size-size
	return list
}

// full returns how many bytes of segments make a map object.
func (c *checkpointer) full() int {
	return int(min(mapObjectSize, c.im.objs.budget.Limit()/mapObjectPart+1))
}

// step goes on with the running checkpoint. It is called at the end of each turn,
// and copies at least one segment: on an image that is always busy, too, it must come
// to its end.
func (c *checkpointer) step() {
	r := c.running
	if r == nil || r.final || c.im.state == Fenced || c.im.state == Released {
		return
	}
	for n := 0; (n == 0 || !c.im.stint.over()) && r.size < c.full() && r.puts < checkpointPuts && len(r.order) > 0; {
		if len(r.loading) == checkpointLoads {
			break // there is a step when one of them has come
		}
		i := r.order[0]
		r.order = r.order[1:]
		if r.pending.has(i) {
			c.turn(i)
			n++
		}
	}
	if len(r.order) == 0 {
		c.takeUnchanged()
	}
	rest := len(r.order) + len(r.loading) + len(r.rewrite)
	switch {
	case !r.named || r.puts >= checkpointPuts:
	case r.size >= c.full() || rest == 0 && len(r.copied) > 0:
		c.put()
	case rest > len(r.loading) && len(r.loading) < checkpointLoads:
		c.im.env.AfterFunc(0, func() {}) // there is another turn, and an end of it
	case rest > 0:
	case r.puts == 0:
		c.finish()
	}
}

// turn copies segment i, whose turn it is, as it was when the checkpoint began, or has it
// brought into memory for that.
func (c *checkpointer) turn(i uint32) {
	r := c.running
	r.loading[i] = true
	ready := c.im.ready(i)
	switch {
	case !r.pending.has(i): // copied as it came into memory
	case ready && !c.late(i):
		c.copy(i)
	default:
		c.im.awaitLoad(i, true, func(err error) {
			if c.running == r {
				c.loaded(i, err)
			}
		})
		return
	}
	delete(r.loading, i)
}

// loaded goes on with segment i when a load of it has ended. One that cannot be had now is
// tried again: without it there is no checkpoint.
func (c *checkpointer) loaded(i uint32, err error) {
	im, r := c.im, c.running
	if err == nil {
		delete(r.loading, i)
		if r.pending.has(i) {
			c.turn(i) // late, if the load was begun by another, and came by without a copy
		}
		c.step()
		return
	}
	im.logger.Error("part of the map cannot be read: there is no checkpoint until it can", "err", err)
	im.storeFailed(useOther, err)
	im.env.AfterFunc(im.cfg.RetryMax, func() {
		if c.running == r {
			delete(r.loading, i)
			r.order = append(r.order, i)
			c.step()
		}
	})
}

// takeUnchanged takes segments that are to be moved.
func (c *checkpointer) takeUnchanged() {
	r, m := c.running, c.im.objs
	for n := 0; (n == 0 || !c.im.stint.over()) && r.size < c.full() && len(r.rewrite) > 0; n++ {
		i := r.rewrite[0]
		r.rewrite = r.rewrite[1:]
		if m.resident.has(i) && !m.changed.has(i) {
			c.copy(i)
			continue
		}
		at := m.place(i)
		r.take(copiedSegment{index: i, stored: at, size: int(at.size)})
	}
}

// put writes segments that have been copied as one map object, which gets its number when
// it is known that there is something in it: where as many numbers in a row as may be under
// way have no object, nobody looks further for what a crash has left.
func (c *checkpointer) put() {
	im, r := c.im, c.running
	r.puts++
	segments := c.next()
	var part mapPart
	var b []byte
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
		defer stop()
		part, b = encodeMapObject(ctx, im.store, im.id, segments)
	}, func() {
		switch {
		case c.running != r:
			return
		case len(b) == 0:
			c.partDone(0, part)
			return
		}
		k := uint32(r.parts)
		r.parts++
		c.work(func(ctx context.Context) error { return putOwn(ctx, im.store, mapKey(im.id, r.ref, k), b) }, func() { c.partDone(k, part) })
	})
	c.step()
}

// partDone goes on when part k is in the store, or has turned out to be empty.
func (c *checkpointer) partDone(k uint32, part mapPart) {
	m, r := c.im.objs, c.running
	object := uint32(len(m.maps))
	if part.size > 0 {
		m.maps = append(m.maps, mapObject{at: r.ref, part: k, size: uint32(part.size)})
	}
	c.leave(part.left)
	c.storeSome(object, part)
}

// storeSome goes on with what partDone does for the segments of a part, of which there may
// be many thousands.
func (c *checkpointer) storeSome(object uint32, part mapPart) {
	r := c.running
	for n := 0; len(part.segments) > 0; n++ {
		if n > 0 && c.im.stint.over() {
			c.im.env.AfterFunc(0, func() {
				if c.running == r {
					c.storeSome(object, part)
				}
			})
			return
		}
		c.im.stint.spend(1)
		c.stored(object, part.segments[0].index, part.places[0])
		part.segments, part.places = part.segments[1:], part.places[1:]
	}
	if o := c.im.objs.maps; part.size > 0 && o[object].live == 0 {
		o[object].died = uint32(r.ref.Object)
	}
	r.puts--
	c.step()
}

// leave notes the segments that stay where they are. That is no reason not to write the
// checkpoint: to move them only saves space.
func (c *checkpointer) leave(left []leftSegment) {
	for _, s := range left {
		c.im.countStoreError(s.err)
		if !damaged(s.err) {
			continue // the next checkpoint tries again
		}
		if c.damaged == nil {
			c.damaged = make(map[uint32]place)
		}
		c.damaged[s.index] = s.stored
		c.im.logger.Error("part of the map cannot be read: it stays where it is", "err", s.err)
	}
}

// encodeMapObject returns a map object with those of the given segments that can be
// had, and where in it they are.
func encodeMapObject(ctx context.Context, st backend.Store, id uuid.UUID, segments []copiedSegment) (p mapPart, b []byte) {
	for _, s := range segments {
		at := len(b)
		if s.span != nil {
			b = encodeSegment(b, id, s.index, s.span)
		} else {
			raw, err := readUnchanged(ctx, st, id, s)
			if err != nil {
				p.left = append(p.left, leftSegment{s, err})
				continue
			}
			b = append(b, raw...)
		}
		p.segments = append(p.segments, s)
		p.places = append(p.places, storedSegment{offset: uint32(at), size: uint32(len(b) - at)})
	}
	p.size = len(b)
	return p, b
}

// readUnchanged reads a segment from where it is stored.
func readUnchanged(ctx context.Context, st backend.Store, id uuid.UUID, s copiedSegment) ([]byte, error) {
	b, err := readSegmentBytes(ctx, st, id, s.stored)
	if err == nil {
		err = checkObject(b, segmentMagic, segmentVersion, segmentFixed, id)
	}
	if err != nil {
		return nil, fmt.Errorf("map segment %d at byte %d of object %s: %w", s.index, s.stored.offset, mapKey(id, s.stored.object.at, s.stored.object.part), err)
	}
	return b, nil
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
	var err error
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
		defer stop()
		err = work(ctx)
	}, func() {
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
	maps, stored := slices.Clone(im.objs.maps), im.objs.stored
	var b []byte
	c.work(func(ctx context.Context) error {
		if b == nil {
			m.maps, m.segments = withoutRemoved(maps, stored)
			b = m.encode()
		}
		return putManifest(ctx, im.store, m, b)
	}, func() {
		im.changeSuper(func(sb *superblock) {
			if sb.Checkpoint != nil && *sb.Checkpoint != r.ref {
				sb.Prev = append(sb.Prev, *sb.Checkpoint)
			}
			sb.Checkpoint, sb.Intent = &r.ref, nil
		}, func() { c.published(m) })
	})
}

// stored says that segment i is in a map object of the running checkpoint, at a place in
// it: it is stored there from here on. The checkpoint before has it where it was, so nothing
// is removed until this one is published.
func (c *checkpointer) stored(object, i uint32, at storedSegment) {
	m, r := c.im.objs, c.running
	m.settle(i, r.at.object)
	for int(i) >= len(m.stored) {
		m.stored = append(m.stored, storedSegment{})
	}
	old := &m.stored[i]
	if old.size > 0 {
		o := &m.maps[old.object]
		if o.live -= old.size; o.live == 0 {
			o.died = uint32(r.ref.Object)
		}
	}
	*old = storedSegment{}
	if at.size > 0 {
		*old = storedSegment{object, at.offset, at.size}
		m.maps[object].live += at.size
	}
}

// withoutRemoved returns the map objects and the places of all segments, without the map
// objects that have been removed.
func withoutRemoved(maps []mapObject, stored []storedSegment) ([]mapObject, []storedSegment) {
	now := make([]mapObject, 0, len(maps))
	index := make([]uint32, len(maps))
	for i, o := range maps {
		if o.size > 0 {
			index[i] = uint32(len(now))
			now = append(now, o)
		}
	}
	places := slices.Clone(stored)
	for i := range places {
		if p := &places[i]; p.size > 0 {
			p.object = index[p.object]
		}
	}
	return now, places
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
	if c.last != nil {
		c.old = append(c.old, oldManifest{*c.last, c.parts})
	}
	c.last, c.added, c.parts, c.running = &r.ref, r.added, m.parts(), nil
	im.objs.maps, im.objs.stored = m.maps, m.segments
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

// removeDead removes what nothing needs: map objects of which nothing is current, and
// the manifests that have been replaced. What a point needs stays, and so does what
// cannot be removed now: the manifest and the superblock go on to name it, and the next
// checkpoint, or the next start, tries again. Checkpoints begin meanwhile.
func (c *checkpointer) removeDead() {
	switch {
	case c.running != nil:
		return // its end does it
	case c.removing:
		c.unheld = true
		return
	}
	im, sb := c.im, c.im.super.sb
	r := new(removal)
	for i := range im.objs.maps {
		if o := &im.objs.maps[i]; o.size > 0 && o.live == 0 && !sb.heldMap(o.at.Object, uint64(o.died)) {
			r.add(object(mapKey(im.id, o.at, o.part)))
		}
	}
	c.old = slices.DeleteFunc(c.old, func(m oldManifest) bool {
		held := sb.heldManifest(m.ref)
		if held {
			c.forgetPrev(m.ref, true)
		}
		return held
	})
	for _, m := range c.old {
		for part := range m.parts {
			r.add(object(manifestKey(im.id, m.ref, part)))
		}
	}
	if len(r.left) == 0 {
		c.tellRemoved()
		return
	}
	c.removing = true
	im.remove(r, func() { c.removed(r) })
}

// removed ends a removal: what is gone is left out of the next manifest, and of the
// superblock.
func (c *checkpointer) removed(r *removal) {
	im := c.im
	for i := range im.objs.maps {
		if o := &im.objs.maps[i]; o.size > 0 && o.live == 0 && r.ended[object(mapKey(im.id, o.at, o.part))] {
			*o = mapObject{}
		}
	}
	c.old = slices.DeleteFunc(c.old, func(m oldManifest) bool {
		for part := range m.parts {
			if !r.ended[object(manifestKey(im.id, m.ref, part))] {
				return false
			}
		}
		c.forgetPrev(m.ref, false)
		return true
	})
	c.removing = false
	if c.unheld {
		c.unheld = false
		c.removeDead()
		return
	}
	c.tellRemoved()
}

// afterRemoval calls fn when what nothing needs is removed as far as that is possible
// now, or with the error with which the image's service ends before.
func (c *checkpointer) afterRemoval(fn func(error)) {
	c.removals = append(c.removals, fn)
	if !c.removing {
		c.removeDead()
	}
}

func (c *checkpointer) tellRemoved() {
	waiters := c.removals
	c.removals = nil
	for _, fn := range waiters {
		fn(nil)
	}
}

// forgetPrev takes the manifest of the checkpoint old, which was replaced, off the
// superblock's list: it is gone, or held by a point that remembers it, if there still
// is one by then. The next change will do, whatever it is for.
func (c *checkpointer) forgetPrev(old checkpointRef, held bool) {
	forget := func(sb *superblock) {
		if !held || sb.heldManifest(old) {
			sb.Prev = slices.DeleteFunc(sb.Prev, func(x checkpointRef) bool { return x == old })
		}
	}
	c.im.super.changes = append(c.im.super.changes, superChange{forget, func() {}})
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
