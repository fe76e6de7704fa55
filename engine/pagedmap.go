package engine

import (
	"context"
	"errors"
	"math"
	"math/bits"
	"slices"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// pagedMap is the object map, of which some segments are in memory and the others
// in the store, as the last checkpoint wrote them. The reactor owns it.
type pagedMap struct {
	*extmap.Map
	storedMap // as the last checkpoint has left it, and the running one has gone on

	resident bitset // the segment is in memory, with all its changes
	used     bitset // it was looked at since the clock's hand passed
	ring     []uint32
	hand     int
	loads    map[uint32]*segmentLoad
	grown    bool // by what nothing was loaded for, so that the budget does not know

	changes     map[uint32]*segmentChanges // by segment
	changed     bitset                     // those that have some
	changeBytes int64                      // what they take
	copyBytes   int64                      // what the copies take that the running checkpoint has yet to put
	copiesPart  int64                      // the part of the budget that they may take; tests change it
	deltaFrom   int                        // see there; tests change it
	bases       map[uint32]uint64          // of the cleaner's objects among them

	budget    *Budget
	member    *member // of the budget; nil while no reactor has the map
	charged   int64   // what the budget has been charged
	evictions uint64
	loaded    uint64
}

// segmentLoad is a load of a segment that is under way.
type segmentLoad struct {
	waiters  []func(error)
	tries    int
	again    bool // also if the segment is in memory
	stale    bool // a checkpoint has stored the segment anew meanwhile
	entering bool // the map has part of it
}

func newPagedMap(sectors uint64, b *Budget) *pagedMap {
	n := segmentsOf(sectors)
	return &pagedMap{
		Map:      extmap.New(sectors),
		resident: newBitset(n), used: newBitset(n), changed: newBitset(n),
		loads: map[uint32]*segmentLoad{}, changes: map[uint32]*segmentChanges{}, bases: map[uint32]uint64{}, budget: b, copiesPart: copiesPart, deltaFrom: deltaFrom,
	}
}

// grow makes the map one of an image of so many sectors, which are more than it has.
func (p *pagedMap) grow(sectors uint64) {
	n := segmentsOf(sectors)
	p.Grow(sectors)
	p.resident, p.used, p.changed = p.resident.grown(n), p.used.grown(n), p.changed.grown(n)
}

// here reports whether segment i is in memory, or empty.
func (p *pagedMap) here(i uint32) bool {
	return p.resident.has(i) || p.empty(i) && !p.changed.has(i)
}

// ready reports whether segment i is in memory, and notes that it is used.
func (p *pagedMap) ready(i uint32) bool {
	if p.resident.has(i) {
		p.used.set(i)
		return true
	}
	return p.here(i)
}

// attach puts the extents of segment i, which is not in memory, into the map as they are
// stored: span, or none if it is nil. Its changes are to follow.
func (p *pagedMap) attach(i uint32, span *extmap.Span) {
	if span != nil {
		p.Attach(span)
		p.loaded++
	}
	if c := p.changes[i]; c != nil {
		c.entered = 0
	}
}

// hold makes segment i one of those in memory.
func (p *pagedMap) hold(i uint32) {
	if !p.resident.has(i) {
		p.resident.set(i)
		p.ring = append(p.ring, i)
	}
	p.used.set(i)
}

// charge tells the budget what the map takes now.
func (p *pagedMap) charge() {
	now := int64(p.Bytes()) + p.changeBytes + p.copyBytes
	p.budget.used.Add(now - p.charged)
	p.charged = now
	if p.member != nil {
		p.member.held.Store(int64(len(p.ring)))
	}
}

// exceed reports whether so many bytes are more than that part of the budget, or, while
// memory is short, of the image's even share.
func (p *pagedMap) exceed(bytes, part int64) bool {
	return bytes > p.budget.Limit()/part || p.budget.over() > 0 && bytes > p.budget.share()/part
}

// join makes the map one of those that give memory back when another one needs it:
// ask, which any goroutine may call, has give called on the reactor.
func (p *pagedMap) join(ask func()) {
	p.member = &member{ask: ask}
	p.budget.join(p.member)
}

// leave gives the budget back what the map took, when its image ends.
func (p *pagedMap) leave() {
	p.budget.used.Add(-p.charged)
	if p.member != nil {
		p.budget.leave(p.member)
	}
	p.budget, p.member, p.charged = &Budget{limit: math.MaxInt64}, nil, 0
}

// evict has segments taken out of memory that have not been used lately,
// of any image, until the budget is kept or none is left. Other images give when
// their reactors come to it; if these do not, or the map is not on a reactor, the map
// gives what it has itself.
func (p *pagedMap) evict() {
	p.charge()
	if p.budget.over() == 0 {
		return
	}
	if p.member != nil {
		p.pass(p.budget.take())
	}
	if p.member == nil || p.budget.over() > p.budget.Limit()/budgetSlack && p.budget.asks() {
		for passes := 0; passes < 3 && p.sweep(); passes++ {
		}
	}
}

// budgetSlack is the part of a budget by which it may be exceeded while an image is
// asked to give.
const budgetSlack = 16

// give takes out of memory what the map can give, because the budget's hand is at
// it.
func (p *pagedMap) give() {
	if p.member != nil {
		p.pass(p.member)
	}
}

// pass moves the budget's hand on from m.
func (p *pagedMap) pass(m *member) {
	for m != nil && m == p.member {
		m = p.budget.gave(p.sweep())
	}
	if m != nil {
		m.ask()
	}
}

// sweep moves the clock's hand on to the end of the ring, or until the budget is
// kept, and takes segments out of memory that were not used since it came by.
// It reports whether the end was reached.
func (p *pagedMap) sweep() (end bool) {
	for p.hand < len(p.ring) {
		if p.budget.over() == 0 {
			return false
		}
		i := p.ring[p.hand]
		switch {
		case p.used.has(i):
			p.used.clear(i)
			p.hand++
		default:
			p.drop(p.hand)
		}
	}
	p.hand = 0
	return true
}

// drop takes the segment at k in the ring out of memory.
func (p *pagedMap) drop(k int) {
	i, last := p.ring[k], len(p.ring)-1
	p.ring[k] = p.ring[last]
	p.ring = p.ring[:last]
	p.resident.clear(i)
	p.Detach(segmentStart(i), segmentPages)
	p.charge()
	p.evictions++
}

// bitset is a set of segments.
type bitset []uint64

func newBitset(n uint32) bitset { return make(bitset, (n+63)/64) }

// grown returns the set with room for n segments, which are more than it has room for.
func (b bitset) grown(n uint32) bitset { return slices.Concat(b, newBitset(n)[len(b):]) }

// has reports whether i is a member; one for which there is no room is none.
func (b bitset) has(i uint32) bool { return int(i/64) < len(b) && b[i/64]&(1<<(i%64)) != 0 }

func (b bitset) set(i uint32)   { b[i/64] |= 1 << (i % 64) }
func (b bitset) clear(i uint32) { b[i/64] &^= 1 << (i % 64) }

// each calls fn for the members in ascending order.
func (b bitset) each(fn func(uint32)) {
	for w, word := range b {
		for ; word != 0; word &= word - 1 {
			fn(uint32(w*64 + bits.TrailingZeros64(word)))
		}
	}
}

// withSegment calls fn on the reactor when segment i is in memory, at once if it
// is there already, or with the error for which it cannot be had.
func (im *Image) withSegment(i uint32, fn func(error)) {
	if im.ready(i) {
		fn(nil)
		return
	}
	im.awaitLoad(i, false, fn)
}

// awaitLoad calls fn, not at once, when a load of segment i has ended; again says that it
// is to be loaded if it is in memory as well.
func (im *Image) awaitLoad(i uint32, again bool, fn func(error)) {
	l := im.objs.loads[i]
	begin := l == nil
	if begin {
		l = new(segmentLoad)
		im.objs.loads[i] = l
	}
	l.waiters, l.again = append(l.waiters, fn), l.again || again
	if begin {
		im.loadSegment(i, l)
	}
}

// loadSegment starts, or repeats, a load.
func (im *Image) loadSegment(i uint32, l *segmentLoad) {
	l.stale = false
	if im.objs.empty(i) {
		im.afterTurn(func() { im.segmentRead(i, l, nil) })
		return
	}
	im.fetchSegment(im.objs.places(i), i, func(span *extmap.Span, err error) {
		switch {
		case l.stale:
			im.loadSegment(i, l)
		case retryable(err) && im.state != Fenced && im.state != Released:
			im.storeFailed(useOther, err)
			im.checkpoint.missed(i, err)
			wait := im.backoff(l.tries)
			l.tries++
			im.pumpNow() // objects that wait for the cleaner do not if that waits for this
			im.jobs++
			im.env.AfterFunc(wait, func() {
				im.jobs--
				im.loadSegment(i, l)
			})
		case err != nil:
			im.segmentLoaded(i, l, err)
		default:
			im.storeWorks(useOther)
			l.tries = 0
			im.segmentRead(i, l, span)
		}
	})
}

// afterTurn calls fn in a turn after this one.
func (im *Image) afterTurn(fn func()) {
	im.jobs++
	im.env.AfterFunc(0, func() {
		im.jobs--
		fn()
	})
}

// segmentRead goes on with a load when there is what is stored: span, nil if that is
// nothing.
func (im *Image) segmentRead(i uint32, l *segmentLoad, span *extmap.Span) {
	m := im.objs
	switch {
	case l.stale:
		im.loadSegment(i, l)
		return
	case m.resident.has(i) && !l.again: // it was empty, and has been written
		im.segmentLoaded(i, l, nil)
		return
	case m.resident.has(i):
		m.drop(slices.Index(m.ring, i))
	}
	m.attach(i, span)
	l.entering = true
	im.enterSome(i, l)
}

// enterSome enters what a turn has room for of the changes of segment i, which is being
// loaded, and not too few: a client may wait for it. A zone that was written over and over
// before a crash may have a million.
func (im *Image) enterSome(i uint32, l *segmentLoad) {
	if l.stale {
		im.loadSegment(i, l)
		return
	}
	dead := len(im.table.dead)
	if !im.enterChanges(i, max(im.stint.left, stintBase)) {
		im.afterTurn(func() { im.enterSome(i, l) })
	} else {
		im.segmentLoaded(i, l, nil)
	}
	if len(im.table.dead) > dead && !im.readOnly {
		im.reap() // the table did not know of them
	}
}

// segmentLoaded ends a load.
func (im *Image) segmentLoaded(i uint32, l *segmentLoad, err error) {
	delete(im.objs.loads, i)
	for _, fn := range l.waiters {
		fn(err)
	}
	// Only now: those who waited have used the segment.
	im.objs.evict()
}

// retryable reports whether a read from the store that has failed may go through
// later.
func retryable(err error) bool {
	return err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, backend.ErrNotFound) && !errors.Is(err, context.Canceled)
}
