package readcache

import (
	"fmt"
	"sync/atomic"

	"github.com/lsd-ceph/lsd/internal/uring"
)

const (
	// warmReads is how often the blocks of a segment have been asked for, on average, when it is taken
	// into memory: a scan that comes by asks once.
	warmReads = 2
	// halveReads is how often all that the cache holds could have been read when heats are halved. What
	// is read evenly has to come to warmReads within that.
	halveReads = 2 * warmReads
	// coldLooks is at how many warm segments is looked for one that is read less than another.
	coldLooks = 16
	// coldRests is after how many calls of Rest in a row without a read a segment is let go of.
	coldRests = 5
)

// warmth is what the cache has in memory of the segments that are read most: whole ones, as they are on
// the SSD. They are read as those that are being filled are, by Copy, and checked like them, so that
// nothing of what is right depends on which they are.
//
// How much a segment is read is its heat: the blocks asked for, halved whenever all that the cache holds
// could have been read halveReads times. Who reads proposes a segment, and Maintain takes it, in place of
// one with half the heat if there is no memory left.
type warmth struct {
	most     int           // segments; 0: the cache has no memory for that
	proposed atomic.Uint32 // segment + 1; 0: none
	count    atomic.Int32  // length of list
	taken    atomic.Uint64 // segments that have been warm
	allocate func(n int) ([]byte, func() error, error)

	// Guarded by Cache.maintain.
	list   []*buffer
	hand   int    // where the next look for a cold one begins
	halved uint64 // bytes that had been found when the heats were halved last
}

// mapped is the default of Options.Allocate.
func mapped(n int) ([]byte, func() error, error) {
	a, err := uring.NewArena(n)
	if err != nil {
		return nil, nil, err
	}
	return a.Bytes(), a.Close, nil
}

// warmFrom is the heat from which on a segment is taken into memory.
func (c *Cache) warmFrom() uint32 { return uint32(c.opt.WarmBlocks) }

// heat notes that a client asks for the blocks of a run that was found.
func (c *Cache) heat(r Run) {
	if c.warm.most == 0 {
		return
	}
	s := r.place.segment()
	seg := &c.segments[s]
	if heat := seg.heat.Add(r.N); r.Memory || heat < c.warmFrom() || heat < seg.next.Load() {
		return
	}
	if c.warm.proposed.CompareAndSwap(0, s+1) {
		c.wants.Store(true)
	}
}

// warmUp takes the segment that was proposed into memory, if it is worth that. The caller holds maintain.
func (c *Cache) warmUp() {
	s := c.warm.proposed.Load()
	if s == 0 {
		return
	}
	s--
	defer c.warm.proposed.Store(0)
	c.halve()
	seg := &c.segments[s]
	heat := seg.heat.Load()
	c.mu.Lock()
	fit, seq := seg.written && heat >= c.warmFrom(), seg.seq
	c.mu.Unlock()
	if !fit || seg.buf.Load() != nil {
		return
	}
	b, err := c.warmBuffer(heat)
	if err != nil {
		c.seldom(c.errs.memory.Add(1), "no memory for what is read most: it comes from the read cache's SSD", "err", err)
	}
	if b == nil {
		seg.next.Store(heat + c.warmFrom()/2) // not with each read
		return
	}
	if !c.readSegment(b, s, seq) {
		c.letGo(b)
		return
	}
	c.warm.list = append(c.warm.list, b)
	c.warm.count.Store(int32(len(c.warm.list)))
	c.warm.taken.Add(1)
	seg.buf.Store(b)
}

// readSegment reads a segment from the SSD, and reports whether it is the one with that number.
func (c *Cache) readSegment(b *buffer, s uint32, seq uint64) bool {
	if c.readAt(b.mem, placeOf(s, 0)) != nil {
		return false
	}
	h, err := c.decode(b.mem[:headerBytes], s)
	if err != nil || h.seq != seq {
		return false // it shows when it is reclaimed
	}
	b.h, b.idle, b.seen = h, 0, 0
	return true
}

// warmBuffer returns a buffer for a segment with that heat, new or one of a segment that has less than
// half of it; none if all are warmer.
func (c *Cache) warmBuffer(heat uint32) (*buffer, error) {
	if len(c.warm.list) < c.warm.most {
		mem, free, err := c.warm.allocate(c.segmentBytes())
		if err != nil {
			return nil, fmt.Errorf("%d bytes for a segment: %w", c.segmentBytes(), err)
		}
		return &buffer{mem: mem, free: free}, nil
	}
	var cold *buffer
	for range min(coldLooks, len(c.warm.list)) {
		c.warm.hand = (c.warm.hand + 1) % len(c.warm.list)
		if b := c.warm.list[c.warm.hand]; cold == nil || c.heatOf(b) < c.heatOf(cold) {
			cold = b
		}
	}
	if c.heatOf(cold) >= heat/2 {
		return nil, nil
	}
	c.cool(cold)
	return cold, nil
}

func (c *Cache) heatOf(b *buffer) uint32 { return c.segments[b.h.index].heat.Load() }

// cool makes a warm segment one that is on the SSD only; its buffer is the caller's.
func (c *Cache) cool(b *buffer) {
	for i, x := range c.warm.list {
		if x == b {
			last := len(c.warm.list) - 1
			c.warm.list[i] = c.warm.list[last]
			c.warm.list[last] = nil
			c.warm.list = c.warm.list[:last]
			break
		}
	}
	c.warm.count.Store(int32(len(c.warm.list)))
	c.detach(b)
}

// letGo frees the memory of a warm segment that is none any more.
func (c *Cache) letGo(b *buffer) {
	if err := b.free(); err != nil {
		c.logger.Error("free memory of the read cache", "err", err)
	}
	b.mem = nil
}

// chill lets go of what is in memory of a written segment. The caller holds maintain.
func (c *Cache) chill(s uint32) {
	if b := c.segments[s].buf.Load(); b != nil {
		c.cool(b)
		c.letGo(b)
	}
}

// halve halves the heats, once for each time that clients have found halveReads times what the cache
// holds since it was done last.
func (c *Cache) halve() {
	c.mu.Lock()
	found := c.gone.HitBytes
	for u := range c.users {
		found += u.hitBytes.Load()
	}
	all := max(uint64(c.index.count)*BlockSize, 1)
	c.mu.Unlock()
	times := (found - c.warm.halved) / (halveReads * all)
	if times == 0 {
		return
	}
	c.warm.halved = found
	for i := range c.segments {
		s := &c.segments[i]
		for old := s.heat.Load(); !s.heat.CompareAndSwap(old, old>>min(times, 31)); old = s.heat.Load() {
		}
		s.next.Store(s.next.Load() >> min(times, 31))
	}
}

// Rest lets go of what has been in memory for long without being read: it is called now and then, and
// may block. What somebody else is at meanwhile has its turn the next time.
func (c *Cache) Rest() {
	if c.warm.most == 0 || !c.maintain.TryLock() {
		return
	}
	defer c.maintain.Unlock()
	for i := len(c.warm.list) - 1; i >= 0; i-- {
		b := c.warm.list[i]
		if heat := c.heatOf(b); heat != b.seen {
			b.seen, b.idle = heat, 0
		} else if b.idle++; b.idle >= coldRests {
			c.cool(b)
			c.letGo(b)
		}
	}
}
