package daemon

import (
	"context"
	"fmt"
	"sync"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/bytesize"
)

// DefaultLogMemory is the default of Config.LogMemory: enough for a hundred
// images and some.
const DefaultLogMemory = 2 << 30

// DefaultScrubRate is what lsdd verifies in a second unless it is told otherwise:
// 690 GB a day.
const DefaultScrubRate = 8 << 20

const (
	// What a log may have of the budget when its user does not say.
	leastLogMemory = 2 * writelog.SegmentSize
	mostLogMemory  = 4 * writelog.SegmentSize
	// logShare is the part of what is left that such a log gets: the more images
	// there are, the less is taken by the next one.
	logShare = 64
)

// shared is what the images of one daemon have in common: what bounds them all
// together. Each disk gets it, and takes its part from it.
type shared struct {
	engine    *engine.Shared
	logMemory budget
	logPool   *logPool
	gates     gates
	storeOps  storeOps
}

func newShared(cfg Config) *shared {
	s := &shared{
		engine:    engine.NewShared(engine.Limits{Map: cfg.MapMemory, Destage: cfg.DestageMemory, Reads: cfg.ReadMemory}),
		logMemory: budget{total: cfg.LogMemory},
		logPool:   newLogPool(cfg.BurstMemory, cfg.Logger),
	}
	s.engine.Scrub.Set(cfg.ScrubRate)
	return s
}

// A budget is an amount of memory of which the images of a daemon have parts.
// Any goroutine may use it.
type budget struct {
	total int64

	mu   sync.Mutex
	used int64 // guarded by mu
}

// take takes what part says of what is left, which is at most that, and 0 if it
// is too little.
func (b *budget) take(part func(left int64) int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := part(b.total - b.used)
	b.used += n
	return n
}

// give gives a part back.
func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
}

// takeLogMemory takes the memory of a log, of which the user has asked for want
// bytes, or for none in particular: 0. When less than that is left it is less, down
// to a minimum, below which the image is refused.
func (s *shared) takeLogMemory(want int64) (int64, error) {
	n := s.logMemory.take(func(left int64) int64 {
		n := min(want, left)
		if want == 0 {
			n = min(max(left/logShare, leastLogMemory), mostLogMemory, left)
		}
		if n -= n % writelog.SegmentSize; n < leastLogMemory {
			return 0
		}
		return n
	})
	if n == 0 {
		total, least := bytesize.Human(uint64(s.logMemory.total)), bytesize.Human(leastLogMemory)
		return 0, fmt.Errorf("the memory for write logs is used up: %s in all, and an image needs %s at least: detach one, or restart lsdd with a larger --log-memory-total", total, least)
	}
	return n, nil
}

// How many calls of a store that blocks threads run at one time. What renews a
// lease has places of its own: it does not wait behind data.
const (
	gateData  = 64
	gateSuper = 32
)

// gates bound the threads that wait for directories, however many images are in
// them: a call there is a system call, which nothing ends while the file system
// hangs. Stores on Ceph have a bound of their own, for each connection.
type gates struct {
	mu sync.Mutex
	m  map[string]*gate // guarded by mu; by directory; they stay
}

// A gate is the places of one directory.
type gate struct{ data, super chan struct{} }

// bound returns st with the bound of its place, if it needs one.
func (gs *gates) bound(u backend.URL, st backend.Store) backend.Store {
	if u.Scheme != backend.SchemeFile {
		return st
	}
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g := gs.m[u.Dir]
	if g == nil {
		g = &gate{data: make(chan struct{}, gateData), super: make(chan struct{}, gateSuper)}
		if gs.m == nil {
			gs.m = map[string]*gate{}
		}
		gs.m[u.Dir] = g
	}
	return &gatedStore{st, g}
}

// A gatedStore is a store whose calls pass a gate.
type gatedStore struct {
	backend.Store
	gate *gate
}

// pass waits for a place, and returns the error of ctx if there is none in time.
func pass(ctx context.Context, places chan struct{}, op, key string) error {
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w: as many calls as may wait for this store", op, key, ctx.Err())
	}
}

// Put implements backend.Store.
func (s *gatedStore) Put(ctx context.Context, key string, data []byte) error {
	if err := pass(ctx, s.gate.data, "put", key); err != nil {
		return err
	}
	defer func() { <-s.gate.data }()
	return s.Store.Put(ctx, key, data)
}

// Get implements backend.Store.
func (s *gatedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := pass(ctx, s.gate.data, "get", key); err != nil {
		return 0, err
	}
	defer func() { <-s.gate.data }()
	return s.Store.Get(ctx, key, p, off)
}

// GetRanges implements backend.RangeGetter.
func (s *gatedStore) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	if err := pass(ctx, s.gate.data, "get", key); err != nil {
		return err
	}
	defer func() { <-s.gate.data }()
	return backend.GetOnce(ctx, s.Store, key, ranges)
}

// Stat implements backend.Store.
func (s *gatedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := pass(ctx, s.gate.data, "stat", key); err != nil {
		return backend.Info{}, err
	}
	defer func() { <-s.gate.data }()
	return s.Store.Stat(ctx, key)
}

// Delete implements backend.Store.
func (s *gatedStore) Delete(ctx context.Context, key string) error {
	if err := pass(ctx, s.gate.data, "delete", key); err != nil {
		return err
	}
	defer func() { <-s.gate.data }()
	return s.Store.Delete(ctx, key)
}

// List implements backend.Store.
func (s *gatedStore) List(ctx context.Context, prefix string, fn func(key string) error) error {
	if err := pass(ctx, s.gate.data, "list", prefix); err != nil {
		return err
	}
	defer func() { <-s.gate.data }()
	return s.Store.List(ctx, prefix, fn)
}

// Load implements backend.Store.
func (s *gatedStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	if err := pass(ctx, s.gate.super, "load", key); err != nil {
		return nil, backend.NoVersion, err
	}
	defer func() { <-s.gate.super }()
	return s.Store.Load(ctx, key)
}

// Swap implements backend.Store.
func (s *gatedStore) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	if err := pass(ctx, s.gate.super, "swap", key); err != nil {
		return backend.NoVersion, err
	}
	defer func() { <-s.gate.super }()
	return s.Store.Swap(ctx, key, old, data)
}
