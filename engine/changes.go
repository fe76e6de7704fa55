package engine

import (
	"math"
	"slices"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// change is what a data object changes in a segment of the map.
type change struct {
	object uint32 // its number
	at     uint32 // first sector, from the segment's start
	n      uint32 // sectors
	off    uint32 // where their data is in the object's, in sectors; and the bits below
}

const (
	changeZeroes = 1 << 31 // there is no data: the sectors read as zeroes
	changeMoves  = 1 << 30 // the object is a cleaner's

	changeBytes = 16 // of memory for a change
	changeList  = 96 // of memory for a list of them
)

// segmentChanges are the changes of a segment since the checkpoint that has stored it,
// in order. A segment in memory is what is stored with all of them; so it can be dropped
// at any time, and be had again. The table is told once of each what it takes from other
// objects: of the first counted it has been.
type segmentChanges struct {
	list    []change
	counted int
	lent    int // of them, that a checkpoint's copy has, in the same array
	entered int // of them, while the segment is being brought into memory
}

// note appends a change of segment i, which in memory is not changed by that.
func (p *pagedMap) note(i uint32, x change) *segmentChanges {
	c := p.changes[i]
	if c == nil {
		c = new(segmentChanges)
		p.changes[i] = c
		p.changed.set(i)
		p.changeBytes += changeList
	}
	if n := len(c.list); n == cap(c.list) { // by less than append, which may take twice what is needed
		c.list = append(make([]change, 0, n+n/8+4), c.list...)
		p.changeBytes += int64(cap(c.list)-n) * changeBytes
		p.copyBytes += int64(c.lent) * changeBytes // the copy has the old array for itself
		c.lent = 0
	}
	c.list = append(c.list, x)
	return c
}

// upTo returns the changes up to an object. Another goroutine may read them.
func (c *segmentChanges) upTo(object uint64) []change {
	k, _ := slices.BinarySearchFunc(c.list, object, func(x change, object uint64) int {
		if uint64(x.object) <= object {
			return -1
		}
		return 1
	})
	return c.list[:k:k]
}

// settle forgets the changes of segment i up to an object: what is stored has them. A load
// that is under way begins anew.
func (p *pagedMap) settle(i uint32, object uint64) {
	if l := p.loads[i]; l != nil {
		if l.stale = true; l.entering {
			l.entering = false
			p.Detach(segmentStart(i), segmentPages)
		}
	}
	c := p.changes[i]
	if c == nil {
		return
	}
	k := len(c.upTo(object))
	if mutate.On(mutate.ChangesLost) {
		k, c.counted = len(c.list), len(c.list)
	}
	if k == 0 {
		return
	}
	if k > c.counted {
		panic("engine: a segment was stored with changes that are not counted")
	}
	p.changeBytes -= int64(cap(c.list)) * changeBytes
	if k == len(c.list) {
		delete(p.changes, i)
		p.changed.clear(i)
		p.changeBytes -= changeList
		return
	}
	c.list, c.counted = append([]change(nil), c.list[k:]...), c.counted-k
	p.changeBytes += int64(cap(c.list)) * changeBytes
}

// uncounted returns how many bytes the changes replace that the table is not told of, at
// most.
func (p *pagedMap) uncounted() (bytes int) {
	for _, c := range p.changes {
		for _, x := range c.list[c.counted:] {
			bytes += int(x.n) * SectorSize
		}
	}
	return bytes
}

// countsRecovered reports whether the table is told of all changes that were recovered.
// Until it is, an object that an owner before has deleted may live by the table.
func (im *Image) countsRecovered() bool {
	if last := im.checkpoint.last; last != nil && last.Object >= im.recoveredTo {
		return true
	}
	for _, c := range im.objs.changes {
		if c.counted < len(c.list) && uint64(c.list[c.counted].object) <= im.recoveredTo {
			return false
		}
	}
	return true
}

// ready reports whether segment i is in memory, which it is from here on if nothing of it
// is stored and it has no more changes than any turn has room for.
func (im *Image) ready(i uint32) bool {
	m := im.objs
	if m.ready(i) {
		return true
	}
	if !m.empty(i) || m.loads[i] != nil || len(m.changes[i].list) > stintBase {
		return false
	}
	im.enterSegment(i, nil)
	m.grown = true
	return true
}

// enterSegment puts segment i, which was not in memory, there: span, as it is stored, nil
// if it is empty, and all that has changed since.
func (im *Image) enterSegment(i uint32, span *extmap.Span) {
	im.objs.attach(i, span)
	im.enterChanges(i, math.MaxInt)
}

// enterChanges enters up to n of the changes of segment i, of which what is stored is
// attached, and reports whether that was the last of them: then it is in memory.
func (im *Image) enterChanges(i uint32, n int) bool {
	if c := im.objs.changes[i]; c != nil {
		for ; c.entered < len(c.list); n-- {
			if n == 0 {
				return false
			}
			x := c.list[c.entered]
			im.stint.spend(1)
			im.checkpoint.pass(i, x)
			im.enterChange(i, x, c.entered >= c.counted)
			c.entered++
			c.counted = max(c.counted, c.entered)
		}
	}
	im.objs.hold(i)
	return true
}

// enterChange enters a change in segment i, of which the map has what was before; count
// says that the table is not yet told of it.
func (im *Image) enterChange(i uint32, x change, count bool) {
	s, n := segmentStart(i)+uint64(x.at), uint64(x.n)
	im.entering, im.counting = x.object, count
	switch off := int(x.off &^ (changeZeroes | changeMoves)); {
	case x.off&changeZeroes != 0:
		im.objs.Remove(s, n)
	case x.off&changeMoves != 0:
		im.move(x.object, s, n, off)
	default:
		im.objs.Insert(s, n, refOfSeq(uint64(x.object)).loc(off))
	}
}

// lose says that the map has ceased to refer to n sectors of an object's data, by what
// is being entered. A checkpoint that is being written counts what is in it as well.
func (im *Image) lose(o *objectInfo, n uint32) {
	if !im.counting {
		return
	}
	im.table.release(o, n, im.entering)
	if r := im.checkpoint.running; r != nil && uint64(im.entering) <= r.at.object {
		r.release(o.number, n, im.entering)
	}
}
