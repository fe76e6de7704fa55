package engine

import (
	"context"

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

// copiedSegment is a segment, or a delta, on its way into a map object: copied from the map,
// or, if it is unchanged and not in memory, to be read from where it is stored.
type copiedSegment struct {
	segmentPart              // a delta only if it is unchanged
	span        *extmap.Span // the segment as it was when the checkpoint began, or nil
	changes     []change     // of it until then, since it was stored; none if there is to be no delta of them
	stored      places
	size        int // bytes of memory, about
}

// writtenSegment is where a segment, or a delta, has been written.
type writtenSegment struct {
	segmentPart
	at    storedSegment // object is not set; size is 0 if the segment has become empty
	moved bool          // it is what was stored elsewhere
}

// mapPart is what of a map object has been encoded: those of some segments that could be
// had.
type mapPart struct {
	b        []byte
	segments []writtenSegment // in order
	left     []leftSegment
}

// leftSegment is what could not be read, and so stays where it is.
type leftSegment struct {
	segmentPart
	at  place
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

// mostlyDead returns segments and deltas, none of them of segments that are pending, that
// should leave their map objects so that these can go: less than half of each is current.
// Of those that are pending it returns which are to be written whole for that: what always
// changes a little would keep its map object for ever. While the image is flattened those leave
// theirs as well that are in one of an ancestor: nearly all of these are pending, for what they
// refer to has been moved.
func (c *checkpointer) mostlyDead(pending bitset) (list []segmentPart, whole map[uint32]bool) {
	m := c.im.objs
	sparse := make(map[uint32]bool)
	left := uint32(rewriteBytes)
	for i, o := range m.maps {
		switch {
		case o.live > 0 && c.im.flatten != nil && !c.im.line.own(o.at.Object):
			sparse[uint32(i)] = true
		case o.live > 0 && o.live < o.size/2 && o.live <= left:
			sparse[uint32(i)] = true
			left -= o.live
		}
	}
	if len(sparse) == 0 {
		return nil, nil
	}
	whole = make(map[uint32]bool)
	for i := range uint32(len(m.segments[kindWhole])) {
		for kind := range segmentKinds {
			s, p := m.segment(kind, i), segmentPart{i, kind}
			switch {
			case s.size == 0 || !sparse[s.object]:
			case pending.has(i):
				if kind == kindWhole {
					whole[i] = true
				}
			case c.damaged[p] != m.place(kind, i):
				list = append(list, p)
			}
		}
	}
	return list, whole
}

// copy takes segment i of the running checkpoint as it is now.
func (c *checkpointer) copy(i uint32) {
	r := c.running
	r.pending.clear(i)
	var changes []change
	if !r.whole[i] {
		changes = c.im.objs.changes[i].upTo(r.at.object)
	}
	c.takeCopy(segmentPart{index: i}, changes)
}

// takeCopy takes a segment of which the map has what is to be put, or its delta.
func (c *checkpointer) takeCopy(p segmentPart, changes []change) {
	m, start := c.im.objs, segmentStart(p.index)
	c.im.stint.spend(stintCopy)
	m.Compact(start, segmentPages)
	s := copiedSegment{segmentPart: p, span: m.Copy(start, segmentPages), changes: changes, stored: m.places(p.index), size: segmentFixed + m.SpanBytes(start, segmentPages)}
	m.copyBytes += int64(s.size)
	if len(changes) > 0 {
		m.changes[p.index].lent = len(changes)
	}
	c.running.take(s)
}

// take takes a segment that is to be put.
func (r *runningCheckpoint) take(s copiedSegment) {
	r.copied = append(r.copied, s)
	r.size += s.size
}

// next takes segments to be encoded together out of those that have been copied: when a
// busy map is about to change everywhere, these may be far more than are for one map object.
func (c *checkpointer) next() []copiedSegment {
	r := c.running
	n, size := 0, 0
	for n < len(r.copied) && size < c.full() {
		size += r.copied[n].size
		c.uncharge(&r.copied[n])
		n++
	}
	list := r.copied[:n:n]
	r.copied, r.size = r.copied[n:], r.size-size
	return list
}

// uncharge says that a copy is about to be encoded.
func (c *checkpointer) uncharge(s *copiedSegment) {
	m := c.im.objs
	if s.span == nil {
		return
	}
	m.copyBytes -= int64(s.size)
	switch changes := m.changes[s.index]; {
	case len(s.changes) == 0:
	case changes.lent > 0:
		changes.lent = 0
	default: // since the list went on to another array
		m.copyBytes -= int64(len(s.changes)) * changeBytes
	}
}

// full returns how many bytes make a map object, and are encoded at one time.
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
	for n := 0; (n == 0 || !c.im.stint.over()) && r.size < c.full() && r.works < checkpointPuts && len(r.order) > 0; {
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
	case !r.named || r.works >= checkpointPuts:
	case r.size >= c.full() || rest == 0 && len(r.copied) > 0:
		c.encode()
	case rest > len(r.loading) && len(r.loading) < checkpointLoads:
		c.im.env.AfterFunc(0, func() {}) // there is another turn, and an end of it
	case rest > 0 || r.works > 0:
	case len(r.encoded) > 0:
		c.put()
	default:
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
// tried again: without it there is no checkpoint. An image that is let go of does so for a while:
// see goUnread.
func (c *checkpointer) loaded(i uint32, err error) {
	im, r := c.im, c.running
	if err == nil {
		delete(r.loading, i)
		delete(r.unread, i)
		if r.pending.has(i) {
			c.turn(i) // late, if the load was begun by another, and came by without a copy
		}
		c.step()
		return
	}
	im.countStoreError(err)
	c.missed(i, err)
	im.env.AfterFunc(im.cfg.RetryMax, func() {
		if c.running == r {
			delete(r.loading, i)
			r.order = append(r.order, i)
			c.step()
		}
	})
}

// takeUnchanged takes segments and deltas that are to be moved. Those of one segment are
// taken together: did it come into memory between the two, its delta, if that cannot be read,
// would be replaced by all of it, and that again by the whole that is moved.
func (c *checkpointer) takeUnchanged() {
	r, m := c.running, c.im.objs
	for n := 0; (n == 0 || !c.im.stint.over()) && r.size < c.full() && len(r.rewrite) > 0; n++ {
		k, p := 1, r.rewrite[0]
		if len(r.rewrite) > 1 && r.rewrite[1].index == p.index {
			k = 2
		}
		list := r.rewrite[:k]
		r.rewrite = r.rewrite[k:]
		if m.resident.has(p.index) && !m.changed.has(p.index) {
			c.takeCopy(p, nil) // if p is the whole, it has the delta as well
			continue
		}
		for _, p := range list {
			r.take(copiedSegment{segmentPart: p, stored: m.places(p.index), size: int(m.segment(p.kind, p.index).size)})
		}
	}
}

// encode has a worker encode segments that have been copied. A map object is put when
// enough of it has been encoded: of a large map that has changed a little everywhere that is
// what many segments come to.
func (c *checkpointer) encode() {
	im, r := c.im, c.running
	r.works++
	segments := c.next()
	e := mapEncoder{partReader: partReader{st: im.store, line: im.line, timeout: im.cfg.StoreTimeout}, sectors: im.span.Load(), deltaFrom: im.objs.deltaFrom}
	im.spawn(func() { e.encode(im.ctx, segments) }, func() {
		if c.running != r {
			return
		}
		r.works--
		clear(segments) // what is yet to be encoded is in the same array
		c.leave(e.left)
		r.encoded = append(r.encoded, e.mapPart)
		if r.bytes += len(e.b); r.bytes >= c.full() {
			c.put()
		}
		c.step()
	})
	c.step()
}

// put puts what has been encoded as one map object, which gets its number when it is known
// that there is something in it: where as many numbers in a row as may be under way have no
// object, nobody looks further for what a crash has left.
func (c *checkpointer) put() {
	im, r := c.im, c.running
	parts, size := r.encoded, r.bytes
	r.encoded, r.bytes = nil, 0
	r.works++
	if size == 0 {
		c.partDone(0, 0, parts)
		return
	}
	k := uint32(r.parts)
	r.parts++
	var b []byte
	c.work(func(ctx context.Context) error {
		if b == nil {
			b = make([]byte, 0, size)
			for _, p := range parts {
				b = append(b, p.b...)
			}
		}
		return putOwn(ctx, im.store, mapKey(im.id, r.ref, k), b)
	}, func() { c.partDone(k, size, parts) })
}

// partDone goes on when the map object k, of that size, is in the store, or has turned out
// to be empty.
func (c *checkpointer) partDone(k uint32, size int, parts []mapPart) {
	m, r := c.im.objs, c.running
	object, at := len(m.maps), uint32(0)
	if size > 0 {
		m.maps = append(m.maps, mapObject{at: r.ref, part: k, size: uint32(size)})
	}
	for _, p := range parts {
		for i := range p.segments {
			p.segments[i].at.object = uint32(object)
			p.segments[i].at.offset += at
		}
		at += uint32(len(p.b))
	}
	c.storeSome(parts)
}

// storeSome says of the segments of a map object, of which there may be many thousands, that
// they are stored.
func (c *checkpointer) storeSome(parts []mapPart) {
	r := c.running
	for n := 0; len(parts) > 0; n++ {
		p := &parts[0]
		if len(p.segments) == 0 {
			parts = parts[1:]
			continue
		}
		if n > 0 && c.im.stint.over() {
			c.im.env.AfterFunc(0, func() {
				if c.running == r {
					c.storeSome(parts)
				}
			})
			return
		}
		c.im.stint.spend(1)
		c.stored(p.segments[0])
		p.segments = p.segments[1:]
	}
	r.works--
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
			c.damaged = make(map[segmentPart]place)
		}
		c.damaged[s.segmentPart] = s.at
		c.im.logger.Error("part of the map cannot be read: it stays where it is", "err", s.err)
	}
}

// stored says that a segment, or a delta, is in a map object of the running checkpoint: it
// is stored there from here on. The checkpoint before has it where it was, so nothing is
// removed until this one is published.
func (c *checkpointer) stored(w writtenSegment) {
	c.im.objs.settle(w.index, c.running.at.object)
	c.place(w.segmentPart, w.at)
	if w.kind == kindWhole && !w.moved && !mutate.On(mutate.DeltaKept) {
		c.place(segmentPart{w.index, kindDelta}, storedSegment{})
	}
}

// place makes s the place of a segment, or of a delta.
func (c *checkpointer) place(p segmentPart, s storedSegment) {
	m := c.im.objs
	if old := m.segment(p.kind, p.index); old.size > 0 {
		o := &m.maps[old.object]
		if o.live -= old.size; o.live == 0 {
			o.died = uint32(c.running.ref.Object)
		}
	}
	if s.size == 0 {
		s = storedSegment{}
	} else {
		m.maps[s.object].live += s.size
	}
	m.set(p.kind, p.index, s)
}
