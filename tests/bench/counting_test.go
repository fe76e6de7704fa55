package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
)

// countingStore counts the bytes that are put into it, by kind of object, and
// those of data objects that are there. Of data objects it keeps the headers only:
// all that is written is one block, again and again, and that is checked. It is
// for one goroutine.
type countingStore struct {
	*mem.Store
	block []byte
	data  map[string]int64            // bytes of data, of each data object
	put   map[engine.ObjectKind]int64 // bytes put, by kind
	space int64                       // sum of data
	ops   int                         // operations but Load, List and Stat: several parts of an object are read by one
}

func newCountingStore(block []byte) *countingStore {
	return &countingStore{Store: mem.New(), block: block, data: map[string]int64{}, put: map[engine.ObjectKind]int64{}}
}

// total returns all bytes put.
func (s *countingStore) total() (n int64) {
	for _, v := range s.put {
		n += v
	}
	return n
}

// Put implements backend.Store.
func (s *countingStore) Put(ctx context.Context, key string, data []byte) error {
	s.ops++
	kind, kept := engine.KindOf(key), data
	if kind == engine.KindData {
		kept = data[:binary.LittleEndian.Uint32(data[88:])] // the header
		for rest := data[len(kept):]; len(rest) > 0; rest = rest[min(len(rest), len(s.block)):] {
			if n := min(len(rest), len(s.block)); !bytes.Equal(rest[:n], s.block[:n]) {
				return fmt.Errorf("put %s: %w: its data is not what was written", key, backend.ErrPermanent)
			}
		}
	}
	if err := s.Store.Put(ctx, key, kept); err != nil {
		return err
	}
	s.put[kind] += int64(len(data))
	if kind == engine.KindData {
		s.data[key] = int64(len(data) - len(kept))
		s.space += s.data[key]
	}
	return nil
}

// Swap implements backend.Store.
func (s *countingStore) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	s.ops++
	s.put[engine.KindOf(key)] += int64(len(data))
	return s.Store.Swap(ctx, key, old, data)
}

// Get implements backend.Store.
func (s *countingStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.ops++
	return s.get(ctx, key, p, off)
}

// GetRanges implements backend.RangeGetter.
func (s *countingStore) GetRanges(ctx context.Context, key string, ranges []backend.Range) (err error) {
	s.ops++
	for i := range ranges {
		r := &ranges[i]
		if r.N, err = s.get(ctx, key, r.P, r.Off); err != nil {
			return err
		}
	}
	return nil
}

func (s *countingStore) get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	size, ok := s.data[key]
	if err != nil || !ok || n == len(p) {
		return n, err
	}
	header, err := s.Store.Stat(ctx, key)
	at := off + int64(n) - header.Size // in the data
	for n < len(p) && at < size {
		k := copy(p[n:min(int64(len(p)), int64(n)+size-at)], s.block[at%int64(len(s.block)):])
		n, at = n+k, at+int64(k)
	}
	return n, err
}

// Stat implements backend.Store.
func (s *countingStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	is, err := s.Store.Stat(ctx, key)
	is.Size += s.data[key]
	return is, err
}

// Delete implements backend.Store.
func (s *countingStore) Delete(ctx context.Context, key string) error {
	s.ops++
	err := s.Store.Delete(ctx, key)
	if err == nil {
		s.space -= s.data[key]
		delete(s.data, key)
	}
	return err
}
