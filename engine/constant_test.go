package engine

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// countedStore counts what is asked of a store.
type countedStore struct {
	backend.Store
	mu           sync.Mutex
	calls, bytes int // guarded by mu
}

// count counts a call that has moved n bytes.
func (s *countedStore) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.bytes = s.calls+1, s.bytes+n
}

func (s *countedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	s.count(n)
	return n, err
}

func (s *countedStore) Stat(ctx context.Context, key string) (int64, error) {
	s.count(0)
	return s.Store.Stat(ctx, key)
}

func (s *countedStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	b, v, err := s.Store.Load(ctx, key)
	s.count(len(b))
	return b, v, err
}

func (s *countedStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	s.count(len(b))
	return s.Store.Swap(ctx, key, old, b)
}

func (s *countedStore) Put(ctx context.Context, key string, b []byte) error {
	s.count(len(b))
	return s.Store.Put(ctx, key, b)
}

func (s *countedStore) Delete(ctx context.Context, key string) error {
	s.count(0)
	return s.Store.Delete(ctx, key)
}

func (s *countedStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	s.count(0)
	return s.Store.List(ctx, prefix, fn)
}

// snapshotOps are what is to take the same time for images of all sizes.
func snapshotOps(id uuid.UUID) []struct {
	name string
	do   func(ctx context.Context, st backend.Store) error
} {
	type op = struct {
		name string
		do   func(ctx context.Context, st backend.Store) error
	}
	create := func(name string) func(context.Context, backend.Store) error {
		return func(ctx context.Context, st backend.Store) error {
			_, err := CreateSnapshot(ctx, st, id, name, SnapshotOptions{Parallel: 1})
			return err
		}
	}
	return []op{
		{"create", create("a")},
		{"create another", create("b")},
		{"rename", func(ctx context.Context, st backend.Store) error { return RenameSnapshot(ctx, st, id, "b", "c") }},
		{"roll back", func(ctx context.Context, st backend.Store) error {
			return Rollback(ctx, st, id, "a", RollbackOptions{Parallel: 1})
		}},
		{"create after that", create("d")},
		{"remove", func(ctx context.Context, st backend.Store) error { return RemoveSnapshot(ctx, st, id, "a") }},
		{"list", func(ctx context.Context, st backend.Store) error { _, err := Snapshots(ctx, st, id); return err }},
	}
}

var constantSizes = []uint64{1 << 30, 1 << 40, MaxSize}

// TestSnapshotsTakeTheSame: what is done to snapshots asks as much of the store for an image
// of 64 TiB as for one of 1 GiB, and that is not much.
func TestSnapshotsTakeTheSame(t *testing.T) {
	want := map[string]string{}
	for _, size := range constantSizes {
		huge := newHugeStore(t, size)
		for _, op := range snapshotOps(huge.id) {
			st := &countedStore{Store: huge}
			if err := op.do(context.Background(), st); err != nil {
				t.Fatalf("%s of %d bytes: %v", op.name, size, err)
			}
			got := fmt.Sprintf("%d calls and %d bytes", st.calls, st.bytes)
			if want[op.name] == "" {
				want[op.name] = got
			}
			if got != want[op.name] || st.calls > 4 || st.bytes > 3*superUnit {
				t.Errorf("%s of %d bytes: %s, of the smallest image %s", op.name, size, got, want[op.name])
			}
		}
	}
}

// BenchmarkSnapshots tells what the commands on snapshots take, against the size of the image.
func BenchmarkSnapshots(b *testing.B) {
	for _, size := range constantSizes {
		huge := newHugeStore(b, size)
		before, _, err := loadSuperblock(context.Background(), huge, huge.id)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%dGiB", size>>30), func(b *testing.B) {
			for b.Loop() {
				for _, op := range snapshotOps(huge.id) {
					if err := op.do(context.Background(), huge); err != nil {
						b.Fatal(err)
					}
				}
				if _, _, err := changeSuperblock(context.Background(), huge, huge.id, func(sb *superblock) error { *sb = *before.clone(); return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
