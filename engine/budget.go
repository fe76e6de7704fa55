package engine

import (
	"sync"
	"sync/atomic"
)

// Shared is what the images of one daemon share. All of them may use it at once.
type Shared struct {
	// Map bounds the memory of the images' maps.
	Map Budget
	// Scrub bounds what is read back of the images' objects.
	Scrub ScrubRate
	// destage bounds the memory of the data objects that are built and put.
	destage destageMemory
	buffers sync.Pool // of *[]byte, for them
	// cleaning has a place for each cleaning that may run at one time.
	cleaning chan struct{}
}

// Limits is the memory that the images of a daemon may use together, in bytes. 0
// means the default.
type Limits struct {
	Map     int64 // of maps
	Destage int64 // of data objects on their way to the store
}

// Defaults of what is shared.
const (
	DefaultMapMemory     = 256 << 20 // bytes
	DefaultDestageMemory = 512 << 20 // bytes
	// maxCleanings bounds the cleanings that run in a daemon at one time, and so
	// the memory that they take.
	maxCleanings = 4
)

// NewShared returns what images share.
func NewShared(l Limits) *Shared {
	if l.Map == 0 {
		l.Map = DefaultMapMemory
	}
	if l.Destage == 0 {
		l.Destage = DefaultDestageMemory
	}
	return &Shared{Map: Budget{limit: l.Map}, destage: destageMemory{limit: l.Destage}, cleaning: make(chan struct{}, maxCleanings)}
}

// destageMemory bounds the memory of data objects that are built and put. Each image
// may have one object in any case: else it would wait for another one, whose store
// hangs. Beyond that it may have its even share. So an image that is refused has an
// object whose end tells it to ask again.
type destageMemory struct {
	limit int64 // bytes

	mu     sync.Mutex
	used   int64 // guarded by mu
	images int   // that have some; guarded by mu
}

// take takes n bytes for an image that has own of them, and reports whether it may.
func (m *destageMemory) take(own, n int64) bool {
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
func (m *destageMemory) give(own, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own == n {
		m.images--
	}
	m.used -= n
}

// A Budget bounds the memory that several images use. Going over it is possible,
// and makes the images give back what they can.
type Budget struct {
	limit int64 // bytes
	used  atomic.Int64
}

// Limit returns the bytes that may be used.
func (b *Budget) Limit() int64 { return b.limit }

// Used returns the bytes that are used.
func (b *Budget) Used() int64 { return b.used.Load() }

// over returns by how many bytes the budget is exceeded, or 0.
func (b *Budget) over() int64 { return max(b.used.Load()-b.limit, 0) }

// startCleaning takes a place for a cleaning and reports whether there was one.
func (s *Shared) startCleaning() bool {
	select {
	case s.cleaning <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s *Shared) endCleaning() { <-s.cleaning }
