package engine

import (
	"fmt"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/invariants"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// applier enters the extents of one data object, or of a group of them, into the map,
// in order and a few at a time; those of segments that are not in memory are noted. Until
// the last one is entered the object, or the group, is not accepted: the map is between
// two states then, no checkpoint begins, and what its writes have in the log stays there.
// The reactor owns it.
type applier struct {
	b       *batch        // that h was put for; nil in recovery
	h       *objectHeader // nil: nothing is being applied
	entered int           // objects of a group that are entered, h not counted
	next    int           // extent
	done    uint64        // sectors of it
	off     int           // offset of the next data in the object's data, in sectors
	timer   Timer
	runs    []extmap.Extent // scratch
}

// beginApply begins to enter a data object, the next in order.
func (im *Image) beginApply(h *objectHeader) {
	a := &im.apply
	if h.seq != im.accepted.object+uint64(a.entered)+1 {
		panic("engine: objects accepted out of order")
	}
	im.table.add(infoOf(h))
	if h.cleaned() {
		im.objs.bases[uint32(h.seq)] = h.base
	}
	a.h, a.next, a.done, a.off = h, 0, 0, 0
}

// applyPart enters what of the next extent lies in one segment.
func (im *Image) applyPart() {
	a := &im.apply
	e := a.h.extents[a.next]
	s := e.sector + a.done
	n := min(uint64(e.n)-a.done, segmentStart(segmentOf(s)+1)-s)
	im.changeMap(s, n, a.off, e.zero)
	if mutate.On(mutate.DirtyDropped) && a.b != nil {
		im.dirty.RemoveRange(s, n, 0, 1<<62)
	}
	if a.b != nil && !a.h.cleaned() {
		im.dirty.RemoveRange(s, n, a.b.start/SectorSize, a.b.end/SectorSize)
	}
	if !e.zero {
		a.off += int(n)
	}
	if a.done += n; a.done == uint64(e.n) {
		a.next, a.done = a.next+1, 0
	}
}

// changeMap changes n sectors from s, which lie in one segment, to what the object that is
// being entered has at off, or to zeroes.
func (im *Image) changeMap(s, n uint64, off int, zero bool) {
	h, i := im.apply.h, segmentOf(s)
	x := change{object: uint32(h.seq), at: uint32(s - segmentStart(i)), n: uint32(n), off: uint32(off)}
	here := im.ready(i)
	switch {
	case zero && mutate.On(mutate.DiscardUndestaged):
		return
	case zero:
		if here {
			if _, ok := im.objs.Next(s, s+n); !ok {
				return
			}
		}
		x.off = changeZeroes
	case h.cleaned():
		x.off |= changeMoves
	}
	if here {
		im.checkpoint.touch(i)
		im.objs.hold(i)
	}
	c := im.objs.note(i, x)
	if here {
		im.enterChange(i, x, true)
		c.counted = len(c.list)
	}
}

// move makes the map refer to a cleaner's object for those of the n sectors from s that
// it has read; off is where their data is. Sectors that an object after its base has
// changed since are left as they are: their data in it is dead.
func (im *Image) move(object uint32, s, n uint64, off int) {
	a := &im.apply
	a.runs = movable(im.objs.Map, im.objs.bases[object], s, n, a.runs[:0])
	moved := uint64(0)
	for _, e := range a.runs {
		im.objs.Insert(e.Sector, uint64(e.N), refOfSeq(uint64(object)).loc(off+int(e.Sector-s)))
		moved += uint64(e.N)
	}
	if moved < n {
		im.replaced(refOfSeq(uint64(object)).loc(off), uint32(n-moved))
	}
}

// movable appends to runs what of the n sectors from s a cleaner's object of that base has
// read and nothing has changed since.
func movable(m *extmap.Map, base, s, n uint64, runs []extmap.Extent) []extmap.Extent {
	for at := s; at < s+n; {
		e, ok := m.Next(at, s+n)
		if !ok {
			break
		}
		if refOf(e.Loc).seq() <= base || mutate.On(mutate.MovedOverNewer) {
			runs = append(runs, e)
		}
		at = e.End()
	}
	return runs
}

// endApply makes the object the last one accepted, unless it is joined to the next.
func (im *Image) endApply() {
	a := &im.apply
	h := a.h
	im.sums.add(uint32(h.seq), h.sums)
	a.h = nil
	if h.joined {
		a.entered++
		return
	}
	im.accepted, a.entered = h.end(), 0
}

// applyNow is beginApply, and all that follows, for the time before Start.
func (im *Image) applyNow(h *objectHeader) {
	im.beginApply(h)
	for im.apply.next < len(h.extents) {
		im.applyPart()
	}
	im.endApply()
	im.objs.charge() // where there is a reactor, evict does
}

// segments calls fn for the segments that the object's extents meet, in
// ascending order, until it returns false.
func (h *objectHeader) segments(fn func(uint32) bool) {
	next := uint32(0)
	for _, e := range h.extents {
		last := segmentOf(e.sector + uint64(e.n) - 1)
		for i := max(segmentOf(e.sector), next); i <= last; i++ {
			if !fn(i) {
				return
			}
			next = i + 1
		}
	}
}

// replaced is told by the object map, or by move, of data that the map does not refer to
// any more, or never will.
func (im *Image) replaced(loc uint64, n uint32) {
	if !im.counting {
		return
	}
	o := im.table.find(refOf(loc).seq())
	if o == nil || o.live < n {
		im.mapWrong(loc)
		return
	}
	im.lose(o, n)
}

// mapWrong is called when the map refers to what no object has, which a
// checkpoint with right checksums and wrong contents could bring about: nothing
// is served from there, and nothing else is touched.
func (im *Image) mapWrong(loc uint64) {
	if invariants.Enabled {
		panic(fmt.Sprintf("engine: the map refers to data that object %d does not have", refOf(loc).seq()))
	}
	im.stats.mapErrors++
	if im.stats.mapErrors == 1 {
		im.logger.Error("the map refers to data that its object does not have: check the image", "object", refOf(loc).seq())
	}
}

// advance accepts the durable objects at the front of the queue, in order. An
// owner whose lease has run out accepts nothing: another may have taken over
// before the object was there, and does not know of it.
func (im *Image) advance() {
	a := &im.apply
	for im.leased() {
		if a.b == nil {
			if !im.mayAccept() {
				break
			}
			a.b = im.queue[0]
			im.queue = append(im.queue[:0], im.queue[1:]...)
			im.beginApply(a.b.built[0].header)
		}
		if !im.applySome() {
			return
		}
		im.endApply()
		if a.entered > 0 {
			im.beginApply(a.b.built[a.entered].header)
			continue
		}
		b := a.b
		a.b = nil
		im.applied(b)
	}
	im.pumpNow()
}

// mayAccept reports whether the first batch of the queue may be accepted.
func (im *Image) mayAccept() bool {
	if len(im.queue) == 0 {
		return false
	}
	b := im.queue[0]
	if b.state != batchDurable && !(mutate.On(mutate.AcceptOutOfOrder) && b.built != nil && len(im.queue) > 1 && im.queue[1].state == batchDurable) {
		return false
	}
	return !im.checkpoint.behind(b.objects)
}

// applySome goes on with the object that is being applied, and reports whether it
// has come to its end. If it has not, advance is called again when it can go on.
func (im *Image) applySome() bool {
	a := &im.apply
	for a.next < len(a.h.extents) {
		if !im.stint.accept() {
			a.timer.Reset(0)
			return false
		}
		im.applyPart()
	}
	return true
}

// applied does what becomes possible when a batch's object has been accepted.
func (im *Image) applied(b *batch) {
	if !mutate.On(mutate.TrimEarly) {
		im.log.Trim(b.end)
	}
	im.trimmedLog(b.end - b.start)
	im.checkInvariants()
	im.objs.evict()
	im.retire(b)
	im.notifyDestaged()
	im.checkpoint.resume()
	im.reap()
	if b.cleaned() {
		im.clean.accepted()
	}
	im.clean.maybe()
}

// enterObject does to a map what accepting a data object does for n sectors from s, of which the
// object has the data at off, or which are zeroes. base is that of a cleaner's object, else 0.
// applyPart does the same for an image that is open, and accounts for it.
func enterObject(m *extmap.Map, object, base uint64, zero bool, s, n uint64, off int) {
	ref := refOfSeq(object)
	switch {
	case zero:
		m.Remove(s, n)
	case base != 0:
		for _, r := range movable(m, base, s, n, nil) {
			m.Insert(r.Sector, uint64(r.N), ref.loc(off+int(r.Sector-s)))
		}
	default:
		m.Insert(s, n, ref.loc(off))
	}
}
