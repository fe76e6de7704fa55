package engine

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// Shared is what the images of one daemon share. All of them may use it at once.
type Shared struct {
	// Map bounds the memory of the images' maps.
	Map Budget
	// Scrub bounds what is read back of the images' objects.
	Scrub   ScrubRate
	destage workMemory // of the data objects that are built and put
	reads   workMemory // of what clients read and the store has to answer
	buffers keptBuffers
	// cleaning has a place for each cleaning that may run at one time.
	cleaning cleaningPlaces
	// scans has a place for each write log that may be read at one time.
	scans chan struct{}
}

// Limits is the memory that the images of a daemon may use together, in bytes. 0
// means the default.
type Limits struct {
	Map     int64 // of maps
	Destage int64 // of data objects on their way to the store
	Reads   int64 // of reads that what is in memory or on the SSD does not answer
}

// Defaults of what is shared.
const (
	DefaultMapMemory     = 256 << 20 // bytes
	DefaultDestageMemory = 512 << 20 // bytes
	DefaultReadMemory    = 256 << 20 // bytes
	// maxCleanings bounds the cleanings that run in a daemon at one time, and so
	// the memory that they take.
	maxCleanings = 4
	// maxScans bounds the write logs that are read at one time when a daemon starts:
	// all of them are on the same few disks, so that more would end no sooner, and each
	// takes the memory of four segments.
	maxScans = 4
)

// NewShared returns what images share.
func NewShared(l Limits) *Shared {
	if l.Map == 0 {
		l.Map = DefaultMapMemory
	}
	if l.Destage == 0 {
		l.Destage = DefaultDestageMemory
	}
	if l.Reads == 0 {
		l.Reads = DefaultReadMemory
	}
	return &Shared{Map: Budget{limit: l.Map}, destage: workMemory{limit: l.Destage}, reads: workMemory{limit: l.Reads}, cleaning: cleaningPlaces{free: maxCleanings}, scans: make(chan struct{}, maxScans)}
}

// workMemory bounds the memory that work of one kind takes in all images. Each image may
// have one piece of it in any case: else it would wait for another one, whose store
// hangs. Beyond that it may have its even share. So an image that is refused has some
// work whose end tells it to ask again.
type workMemory struct {
	limit int64 // bytes

	mu     sync.Mutex
	used   int64 // guarded by mu
	images int   // that have some; guarded by mu
}

// take takes n bytes for an image that has own of them, and reports whether it may.
func (m *workMemory) take(own, n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own > 0 && (m.used+n > m.limit || own+n > m.limit/int64(m.images)) {
		return false
	}
	if own == 0 {
		m.images++
	}
	m.used += n
	return true
}

// give gives back n bytes of an image that has own.
func (m *workMemory) give(own, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own == n {
		m.images--
	}
	m.used -= n
}

// A Budget bounds the memory that the maps of several images use. Going over it is
// possible, and makes the images give back what they can: a hand passes over what
// they have, one image after the other, as that of the CLOCK algorithm does over the
// pages of all processes (Corbató, 1968), and takes what was not used since it was
// there last. So an idle image keeps nothing that another one needs.
type Budget struct {
	limit int64 // bytes
	used  atomic.Int64

	mu      sync.Mutex
	members []*member // in the order in which the hand comes to them; guarded by mu
	hand    int       // the member that it is at; guarded by mu
	moving  bool      // that member has been asked to give; guarded by mu
	passes  int       // that have come to their end since; guarded by mu
}

// member is an image whose map a budget bounds.
type member struct {
	ask  func()       // asks it to give what it can; any goroutine may call it
	held atomic.Int64 // segments that it has in memory
}

// join adds a member.
func (b *Budget) join(m *member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members = append(b.members, m)
}

// leave takes a member out. If it was asked to give, the hand stops; who needs memory
// moves it again.
func (b *Budget) leave(m *member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.members, m)
	switch {
	case i < b.hand:
		b.hand--
	case i == b.hand:
		b.moving = false
	}
	b.members = slices.Delete(b.members, i, i+1)
	if b.hand == len(b.members) {
		b.hand = 0
	}
}

// take starts the hand, unless it moves, and returns the member that is to give, or
// nil.
func (b *Budget) take() *member {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.moving || b.over() == 0 {
		return nil
	}
	b.passes = 0
	return b.next()
}

// gave is told that the member at the hand has given, and whether the pass over all that
// it has came to its end. It returns who is to give now, or nil.
func (b *Budget) gave(end bool) *member {
	b.mu.Lock()
	defer b.mu.Unlock()
	if end {
		b.pass()
	}
	return b.next()
}

// asks reports whether the hand waits for a member to give.
func (b *Budget) asks() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.moving
}

// next returns the member that is to give, from the hand on, or nil when the budget
// is kept or the hand has come round twice: the first time it may have found
// everything used. The caller holds mu.
func (b *Budget) next() *member {
	b.moving = false
	for b.over() > 0 && b.passes <= 2*len(b.members) {
		if m := b.members[b.hand]; m.held.Load() > 0 {
			b.moving = true
			return m
		}
		b.pass()
	}
	return nil
}

// pass ends a pass over what a member has. The caller holds mu.
func (b *Budget) pass() {
	b.hand = (b.hand + 1) % len(b.members)
	b.passes++
}

// share returns what each image may use, if all use the same.
func (b *Budget) share() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit / int64(max(len(b.members), 1))
}

// Limit returns the bytes that may be used.
func (b *Budget) Limit() int64 { return b.limit }

// Used returns the bytes that are used.
func (b *Budget) Used() int64 { return b.used.Load() }

// over returns by how many bytes the budget is exceeded, or 0.
func (b *Budget) over() int64 { return max(b.used.Load()-b.limit, 0) }

// cleaningPlaces bounds the cleanings that run at one time. An image that finds no place
// is told when it is its turn: one that cleans all the time would else have its place
// again before another one asks.
type cleaningPlaces struct {
	mu      sync.Mutex
	free    int             // guarded by mu
	waiting []*cleaningTurn // the first of them have what is free; guarded by mu
}

// cleaningTurn is an image's, which has one cleaning at a time.
type cleaningTurn struct {
	come func() // tells the image that it has come; any goroutine may call it
}

func (t *cleaningTurn) tell() {
	if t != nil {
		t.come()
	}
}

// take takes a place and reports whether there was one. If not, the image waits for it.
func (p *cleaningPlaces) take(t *cleaningTurn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiting, t)
	if i < 0 {
		i, p.waiting = len(p.waiting), append(p.waiting, t)
	}
	if i >= p.free {
		return false
	}
	p.free--
	p.waiting = slices.Delete(p.waiting, i, i+1)
	return true
}

// give gives a place back.
func (p *cleaningPlaces) give() {
	p.mu.Lock()
	p.free++
	next := p.last()
	p.mu.Unlock()
	next.tell()
}

// leave says that the image does not wait any more.
func (p *cleaningPlaces) leave(t *cleaningTurn) {
	p.mu.Lock()
	var next *cleaningTurn
	if i := slices.Index(p.waiting, t); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		if i < p.free {
			next = p.last()
		}
	}
	p.mu.Unlock()
	next.tell()
}

// last returns the last of the turns that have come, if that is because of a place that has
// just become free, or of one before it that is gone. The caller holds mu.
func (p *cleaningPlaces) last() *cleaningTurn {
	if p.free == 0 || p.free > len(p.waiting) {
		return nil
	}
	return p.waiting[p.free-1]
}

// startScan waits for a place to read a write log, at most as long as ctx lasts.
func (s *Shared) startScan(ctx context.Context) error {
	select {
	case s.scans <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the logs of other images to be read: %w", ctx.Err())
	}
}

func (s *Shared) endScan() { <-s.scans }
