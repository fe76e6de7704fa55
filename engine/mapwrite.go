package engine

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
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
