package engine

import "sync/atomic"

// Shared is what the images of one daemon share. All of them may use it at once.
type Shared struct {
	// Map bounds the memory of the images' maps.
	Map Budget
	// Scrub bounds what is read back of the images' objects.
	Scrub ScrubRate
	// cleaning has a place for each cleaning that may run at one time.
	cleaning chan struct{}
}

// Defaults of what is shared.
const (
	DefaultMapMemory = 256 << 20 // bytes
	// maxCleanings bounds the cleanings that run in a daemon at one time, and so
	// the memory that they take.
	maxCleanings = 4
)

// NewShared returns what images share; mapMemory is in bytes, 0 means
// DefaultMapMemory.
func NewShared(mapMemory int64) *Shared {
	if mapMemory == 0 {
		mapMemory = DefaultMapMemory
	}
	return &Shared{Map: Budget{limit: mapMemory}, cleaning: make(chan struct{}, maxCleanings)}
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
