package engine

import (
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/invariants"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// applyLoads bounds the loads of segments that an object waits for.
const applyLoads = 16

// applier enters the extents of one data object, or of a group of them, into the map,
// in order and a few at a time, as the segments come into memory. Until the last one
// is entered the object, or the group, is not accepted: the map is between two states
// then, no checkpoint begins, and what its writes have in the log stays there. The
// reactor owns it.
type applier struct {
	b          *batch        // that h was put for; nil in recovery
	h          *objectHeader // nil: nothing is being applied
	entered    int           // objects of a group that are entered, h not counted
	next       int           // extent
	done       uint64        // sectors of it
	off        int           // offset of the next data in the object's data, in sectors
	waiting    bool          // for a segment
	loads      int
	prefetched int // extents whose segments have been asked for
	timer      Timer
	runs       []extmap.Extent // scratch
}

// beginApply begins to enter a data object, the next in order.
func (im *Image) beginApply(h *objectHeader) {
	a := &im.apply
	if h.seq != im.accepted.object+uint64(a.entered)+1 {
		panic("engine: objects accepted out of order")
	}
	im.table.add(infoOf(h))
	a.h, a.next, a.done, a.off, a.prefetched = h, 0, 0, 0, 0
}

// applyPart enters what of the next extent lies in one segment, which must be in
// memory.
func (im *Image) applyPart() {
	a := &im.apply
	e := a.h.extents[a.next]
	s := e.sector + a.done
	n := min(uint64(e.n)-a.done, segmentStart(segmentOf(s)+1)-s)
	switch {
	case e.zero && mutate.On(mutate.DiscardUndestaged):
	case e.zero:
		im.unmap(s, n)
	case a.h.cleaned():
		im.move(a.h, s, n, a.off)
	default:
		im.checkpoint.touch(segmentOf(s))
		im.objs.Insert(s, n, refOfSeq(a.h.seq).loc(a.off))
	}
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

// unmap removes what the map has of n sectors from s, in one segment.
func (im *Image) unmap(s, n uint64) {
	if _, ok := im.objs.Next(s, s+n); ok {
		im.checkpoint.touch(segmentOf(s))
		im.objs.Remove(s, n)
	}
}

// move makes the map refer to the cleaner's object h for those of the n sectors
// from s that it has read; off is where their data is. Sectors that an object
// after h.base has changed since are left as they are: their data in h is dead.
func (im *Image) move(h *objectHeader, s, n uint64, off int) {
	a := &im.apply
	a.runs = movable(im.objs.Map, h, s, n, a.runs[:0])
	moved := uint64(0)
	for _, e := range a.runs {
		im.checkpoint.touch(segmentOf(s))
		im.objs.Insert(e.Sector, uint64(e.N), refOfSeq(h.seq).loc(off+int(e.Sector-s)))
		moved += uint64(e.N)
	}
	if moved < n {
		im.table.release(im.table.find(h.seq), uint32(n-moved), h.seq)
	}
}

// movable appends to runs what of the n sectors from s the cleaner's object h has
// read and nothing has changed since.
func movable(m *extmap.Map, h *objectHeader, s, n uint64, runs []extmap.Extent) []extmap.Extent {
	for at := s; at < s+n; {
		e, ok := m.Next(at, s+n)
		if !ok {
			break
		}
		if refOf(e.Loc).seq() <= h.base || mutate.On(mutate.MovedOverNewer) {
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

// applyNow is beginApply, and all that follows. It blocks, and is for the time before
// Start.
func (im *Image) applyNow(ctx context.Context, h *objectHeader) error {
	a := &im.apply
	im.beginApply(h)
	for a.next < len(h.extents) {
		if !im.objs.ready(segmentOf(h.extents[a.next].sector + a.done)) {
			rest := func(fn func(uint32) bool) { h.segmentsFrom(a.next, a.done, fn) }
			if err := im.loadSegments(ctx, rest); err != nil {
				return err
			}
		}
		im.applyPart()
	}
	im.endApply()
	im.objs.charge() // where there is a reactor, evict does
	return nil
}

// segments calls fn for the segments that the object's extents meet, in
// ascending order, until it returns false.
func (h *objectHeader) segments(fn func(uint32) bool) { h.segmentsFrom(0, 0, fn) }

// segmentsFrom is segments from the extent of that index on, without its first sectors
// that are done.
func (h *objectHeader) segmentsFrom(extent int, done uint64, fn func(uint32) bool) {
	next := uint32(0)
	for _, e := range h.extents[extent:] {
		first, last := segmentOf(e.sector+done), segmentOf(e.sector+uint64(e.n)-1)
		done = 0
		for i := max(first, next); i <= last; i++ {
			if !fn(i) {
				return
			}
			next = i + 1
		}
	}
}

// replaced is told by the object map of data that it does not refer to any more.
func (im *Image) replaced(loc uint64, n uint32) {
	o := im.table.find(refOf(loc).seq())
	if o == nil || o.live < n {
		im.mapWrong(loc)
		return
	}
	im.table.release(o, n, im.apply.h.seq)
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
	for im.leased() && !a.waiting {
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
		if im.stint.over() {
			a.timer.Reset(0)
			return false
		}
		im.stint.spend(1)
		im.prefetch()
		i := segmentOf(a.h.extents[a.next].sector + a.done)
		if !im.objs.ready(i) {
			a.waiting = true
			im.withSegment(i, im.applyGoesOn)
			return false
		}
		im.applyPart()
	}
	return true
}

// prefetch asks for the segments of the extents to come.
func (im *Image) prefetch() {
	a := &im.apply
	for a.prefetched < len(a.h.extents) && a.loads < applyLoads {
		e := a.h.extents[a.prefetched]
		a.prefetched++
		if e.zero && e.n > segmentSectors {
			continue // as many segments as it meets: one after the other
		}
		if i := segmentOf(e.sector); !im.objs.ready(i) {
			a.loads++
			im.withSegment(i, func(error) { a.loads-- })
		}
	}
}

// applyGoesOn is told that the segment that advance waits for is there. One that
// cannot be had ends the image's progress: what the object overwrites cannot be
// accounted for.
func (im *Image) applyGoesOn(err error) {
	a := &im.apply
	a.waiting = false
	if err == nil {
		im.advance()
		return
	}
	if im.state == Fenced || im.state == Released {
		return
	}
	im.logger.Error("part of the map cannot be read: what is written stays in the log until it can", "err", err)
	im.storeFailed(useOther, err)
	a.waiting = true
	im.env.AfterFunc(im.cfg.RetryMax, func() { a.waiting = false; im.advance() })
}

// applied does what becomes possible when a batch's object has been accepted.
func (im *Image) applied(b *batch) {
	if !mutate.On(mutate.TrimEarly) {
		im.log.Trim(b.end)
	}
	im.pace.trimmedLog(b.end - b.start)
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
