package daemon

import (
	"context"
	"sync/atomic"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
)

// storeOp is what a store is asked for.
type storeOp int

const (
	opPut storeOp = iota
	opGet
	opGetRanges
	opStat
	opDelete
	opList
	opLoad
	opSwap
	storeOpCount
)

func (o storeOp) String() string {
	return [storeOpCount]string{"put", "get", "get_ranges", "stat", "delete", "list", "load", "swap"}[o]
}

// storeOps counts what the stores of a daemon's images are asked for, successful or not: by
// operation, and by what the object is to an image. Any goroutine may use it.
type storeOps struct {
	n, bytes [storeOpCount][engine.ObjectKinds]atomic.Uint64
}

// count counts an operation on the object of a key, by which so many bytes go there or come back.
func (c *storeOps) count(op storeOp, key string, bytes int) {
	kind := engine.KindOf(key)
	c.n[op][kind].Add(1)
	c.bytes[op][kind].Add(uint64(bytes))
}

// each calls fn for all that has been asked for at least once.
func (c *storeOps) each(fn func(op, object string, n, bytes uint64)) {
	for op := range storeOpCount {
		for kind := range engine.ObjectKinds {
			if n := c.n[op][kind].Load(); n > 0 {
				fn(op.String(), kind.String(), n, c.bytes[op][kind].Load())
			}
		}
	}
}

// counted returns st with its operations counted.
func (c *storeOps) counted(st backend.Store) backend.Store {
	s := &countedStore{st, c}
	if f, ok := st.(backend.Fencer); ok {
		return struct {
			*countedStore
			backend.Fencer
		}{s, f}
	}
	return s
}

// A countedStore is a store whose operations are counted.
type countedStore struct {
	backend.Store
	ops *storeOps
}

// Put implements backend.Store.
func (s *countedStore) Put(ctx context.Context, key string, data []byte) error {
	s.ops.count(opPut, key, len(data))
	return s.Store.Put(ctx, key, data)
}

// Get implements backend.Store.
func (s *countedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	s.ops.count(opGet, key, n)
	return n, err
}

// GetRanges implements backend.RangeGetter.
func (s *countedStore) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	err := backend.GetOnce(ctx, s.Store, key, ranges)
	n := 0
	for _, r := range ranges {
		n += r.N
	}
	s.ops.count(opGetRanges, key, n)
	return err
}

// Stat implements backend.Store.
func (s *countedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	s.ops.count(opStat, key, 0)
	return s.Store.Stat(ctx, key)
}

// Delete implements backend.Store.
func (s *countedStore) Delete(ctx context.Context, key string) error {
	s.ops.count(opDelete, key, 0)
	return s.Store.Delete(ctx, key)
}

// List implements backend.Store.
func (s *countedStore) List(ctx context.Context, prefix string, fn func(key string) error) error {
	s.ops.count(opList, prefix, 0)
	return s.Store.List(ctx, prefix, fn)
}

// Load implements backend.Store.
func (s *countedStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	data, v, err := s.Store.Load(ctx, key)
	s.ops.count(opLoad, key, len(data))
	return data, v, err
}

// Swap implements backend.Store.
func (s *countedStore) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	s.ops.count(opSwap, key, len(data))
	return s.Store.Swap(ctx, key, old, data)
}
