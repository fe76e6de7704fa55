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
	mu                    sync.Mutex
	calls, changes, bytes int // guarded by mu
}

// count counts a call that has moved n bytes.
func (s *countedStore) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.bytes = s.calls+1, s.bytes+n
}

// changed counts a call that changes something.
func (s *countedStore) changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
}

func (s *countedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	s.count(n)
	return n, err
}

func (s *countedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
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
	s.changed()
	return s.Store.Swap(ctx, key, old, b)
}

func (s *countedStore) Put(ctx context.Context, key string, b []byte) error {
	s.count(len(b))
	s.changed()
	return s.Store.Put(ctx, key, b)
}

func (s *countedStore) Delete(ctx context.Context, key string) error {
	s.count(0)
	s.changed()
	return s.Store.Delete(ctx, key)
}

func (s *countedStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	s.count(0)
	return s.Store.List(ctx, prefix, fn)
}

// constantOp is something that is to take the same time for images of all sizes.
type constantOp struct {
	name           string
	calls, changes int // at most, of the store
	do             func(ctx context.Context, st backend.Store) error
}

// constantOps are those, in an order in which all of them can be done to the image huge.
func constantOps(id uuid.UUID) []constantOp {
	create := func(name string) func(context.Context, backend.Store) error {
		return func(ctx context.Context, st backend.Store) error {
			_, err := CreateSnapshot(ctx, st, id, name, SnapshotOptions{Parallel: 1})
			return err
		}
	}
	remove := func(name string) func(context.Context, backend.Store) error {
		return func(ctx context.Context, st backend.Store) error {
			_, err := Remove(ctx, st, name, RemoveOptions{Snapshots: true})
			return err
		}
	}
	return []constantOp{
		{"create", 4, 1, create("a")},
		{"create another", 4, 1, create("b")},
		{"rename", 4, 1, func(ctx context.Context, st backend.Store) error { return RenameSnapshot(ctx, st, id, "b", "c") }},
		{"roll back", 4, 1, func(ctx context.Context, st backend.Store) error {
			return Rollback(ctx, st, id, "a", RollbackOptions{Parallel: 1})
		}},
		{"create after that", 4, 1, create("d")},
		{"remove", 4, 1, func(ctx context.Context, st backend.Store) error { return RemoveSnapshot(ctx, st, id, "a") }},
		{"list", 4, 0, func(ctx context.Context, st backend.Store) error { _, err := Snapshots(ctx, st, id); return err }},
		// Its state, its superblock, that it is there, and its name; and a look at the metadata of
		// the image.
		{"clone", 11, 4, func(ctx context.Context, st backend.Store) error {
			_, err := Clone(ctx, st, id, "copy", CloneOptions{Snapshot: "d", SnapshotOptions: SnapshotOptions{Parallel: 1}})
			return err
		}},
		// The superblock, and the name.
		{"remove the clone", 6, 2, remove("copy")},
		{"remove the image", 6, 2, remove("huge")},
	}
}

var constantSizes = []uint64{1 << 30, 1 << 40, MaxSize}

// TestSnapshotsTakeTheSame: what is done to snapshots, the making of a clone, and the removal of
// an image ask as much of the store for an image of 64 TiB as for one of 1 GiB, and that is not
// much.
func TestSnapshotsTakeTheSame(t *testing.T) {
	want := map[string]string{}
	for _, size := range constantSizes {
		huge := newHugeStore(t, size)
		for _, op := range constantOps(huge.id) {
			st := &countedStore{Store: huge}
			if err := op.do(context.Background(), st); err != nil {
				t.Fatalf("%s of %d bytes: %v", op.name, size, err)
			}
			got := fmt.Sprintf("%d calls, %d of them changes, and %d bytes", st.calls, st.changes, st.bytes)
			if want[op.name] == "" {
				want[op.name] = got
			}
			if got != want[op.name] || st.calls > op.calls || st.changes > op.changes || st.bytes > (op.calls-1)*superUnit {
				t.Errorf("%s of %d bytes: %s, of the smallest image %s", op.name, size, got, want[op.name])
			}
		}
	}
}

// BenchmarkSnapshots tells what these take, against the size of the image.
func BenchmarkSnapshots(b *testing.B) {
	ctx := context.Background()
	for _, size := range constantSizes {
		huge := newHugeStore(b, size)
		before, _, err := loadSuperblock(ctx, huge, huge.id)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%dGiB", size>>30), func(b *testing.B) {
			for b.Loop() {
				for _, op := range constantOps(huge.id) {
					if err := op.do(ctx, huge); err != nil {
						b.Fatal(err)
					}
				}
				if err := restoreImage(ctx, huge, huge.id, before); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// restoreImage brings an image back as it was, and takes its clones away.
func restoreImage(ctx context.Context, st backend.Store, id uuid.UUID, before *superblock) error {
	var clones []uuid.UUID
	_, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error {
		for _, c := range sb.Clones {
			clones = append(clones, c.ID)
		}
		*sb = *before.clone()
		return nil
	})
	for _, id := range clones {
		if err == nil {
			err = st.Delete(ctx, SuperblockKey(id))
		}
	}
	if err == nil {
		err = backend.Link(ctx, st, before.Name, id)
	}
	return err
}
