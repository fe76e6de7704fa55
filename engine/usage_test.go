package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// measured measures a store, and checks that what it says adds up to what is in the store.
func measured(t *testing.T, st backend.Store) (*StoreUsage, map[string]ImageUsage) {
	t.Helper()
	u, err := addedUp(st)
	if err != nil {
		t.Fatal(err)
	}
	images := map[string]ImageUsage{}
	for _, im := range u.Images {
		images[im.Name] = im
	}
	return u, images
}

// addedUp measures a store that nobody changes meanwhile. What it says must add up to what is in
// the store.
func addedUp(st backend.Store) (*StoreUsage, error) {
	ctx := context.Background()
	u, err := MeasureStore(ctx, st, UsageOptions{Parallel: 1})
	if err != nil {
		return nil, err
	}
	stored, objects := uint64(0), 0
	err = st.List(ctx, "", func(key string) error {
		is, err := st.Stat(ctx, key)
		stored += uint64(is.Size)
		objects++
		return err
	})
	if err != nil {
		return nil, err
	}
	sum := Space{}
	for _, im := range u.Images {
		if im.Live+im.Snapshots != im.Shared+im.Alone {
			err = fmt.Errorf("image %+v does not add up", im)
		}
		sum.Provisioned += im.Provisioned
		sum.Alone += im.Alone
		sum.Reclaimable += im.Reclaimable
	}
	all := u.Total
	switch {
	case err != nil:
	case u.Stored != stored || u.Objects+u.Strange != objects:
		err = fmt.Errorf("%d bytes in %d objects are said to be there, and %d in %d are", u.Stored, u.Objects, stored, objects)
	case u.Stored != all.Live+all.Snapshots+all.Reclaimable+all.Metadata+u.Unknown || all.Alone+all.Shared != all.Live+all.Snapshots ||
		all.Alone != sum.Alone || all.Reclaimable != sum.Reclaimable || all.Provisioned != sum.Provisioned:
		err = fmt.Errorf("%+v does not add up", u)
	}
	return u, err
}

// mustUse compares the space of an image in blocks; metadata is any.
func mustUse(t *testing.T, what string, got Space, live, snapshots, shared, reclaimable uint64) {
	t.Helper()
	const block = objectBlock
	if got.Live != live*block || got.Snapshots != snapshots*block || got.Shared != shared*block || got.Reclaimable != reclaimable*block {
		t.Errorf("%s: live %d, snapshots %d, shared %d, reclaimable %d blocks, want %d, %d, %d, %d; metadata %d bytes", what, got.Live/block,
			got.Snapshots/block, got.Shared/block, got.Reclaimable/block, live, snapshots, shared, reclaimable, got.Metadata)
	}
}

// filled is an image of which all blocks have been written once.
func filled(t *testing.T, st backend.Store) (*host, uuid.UUID) {
	t.Helper()
	h, id := attached(t, st, CreateOptions{Size: 64 << 20}, nil)
	h.mustFill(1000)
	h.mustDestage()
	h.mustClose()
	return h, id
}

// overwrite attaches an image, writes its first n blocks, and detaches it again.
func overwrite(t *testing.T, st backend.Store, id uuid.UUID, n, from uint64) {
	t.Helper()
	h := mustOpen(t, st, id, from)
	for b := range n {
		h.mustWrite(b, from+b)
	}
	h.mustDestage()
	h.mustClose()
}

// TestUsage: what a store holds is what its images refer to, what only their snapshots do, and
// what nothing does.
func TestUsage(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	_, id := filled(t, st)
	u, images := measured(t, st)
	mustUse(t, "a full image", images["disk"].Space, 64, 0, 0, 0)
	if u.Total.Provisioned != 64<<20 || u.Total.Metadata == 0 {
		t.Errorf("%+v", u.Total)
	}
	mustSnapshot(t, st, id, "monday", nil)
	overwrite(t, st, id, 16, 2000)
	_, images = measured(t, st)
	mustUse(t, "a quarter rewritten after a snapshot", images["disk"].Space, 64, 16, 0, 0)

	clone := mustClone(t, st, id, "monday", "copy", nil)
	u, images = measured(t, st)
	mustUse(t, "an image with a clone", images["disk"].Space, 64, 16, 64, 0)
	mustUse(t, "a clone", images["copy"].Space, 64, 0, 64, 0)
	mustUse(t, "both", u.Total, 80, 0, 64, 0)
	if c := images["copy"]; c.Parent != id || c.Snapshot != "monday" || c.Cloned.IsZero() || c.Removed {
		t.Errorf("%+v", c)
	}
	overwrite(t, st, clone, 32, 3000)
	u, images = measured(t, st)
	mustUse(t, "a clone that is half rewritten", images["copy"].Space, 64, 32, 64, 0)
	mustUse(t, "both", u.Total, 64+32, 16, 64, 0)

	if err := RemoveSnapshot(ctx, st, id, "monday"); err != nil {
		t.Fatal(err)
	}
	u, images = measured(t, st)
	if c := images["copy"]; c.Snapshot != "" || c.Cloned.IsZero() {
		t.Errorf("%+v", c)
	}
	mustUse(t, "an image whose snapshot has gone", images["disk"].Space, 64, 0, 48, 0)
	mustUse(t, "both", u.Total, 64+32, 16, 48, 0)

	if _, err := Remove(ctx, st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	u, images = measured(t, st)
	if d := images["disk"]; !d.Removed || d.Provisioned != 0 || d.Live+d.Snapshots != 0 || d.Reclaimable < 16*objectBlock {
		t.Errorf("a removed image: %+v", d)
	}
	mustUse(t, "the clone of a removed image", images["copy"].Space, 64, 0, 0, 0)
	before := u.Total
	if _, err := Reclaim(ctx, st, id, nil); err != nil {
		t.Fatal(err)
	}
	u, images = measured(t, st)
	mustUse(t, "the clone of a removed image", images["copy"].Space, 64, 0, 0, 0)
	if got := before.Reclaimable - u.Total.Reclaimable; got < 16*objectBlock || u.Total.Reclaimable != 32*objectBlock {
		t.Errorf("%d bytes were reclaimed; what the clone has overwritten is left, and %d bytes are", got, u.Total.Reclaimable)
	}
	mustRemove(t, st, "copy")
	u, _ = measured(t, st)
	if len(u.Images) != 0 || u.Stored != u.Total.Metadata {
		t.Errorf("an empty store: %+v", u)
	}
}

// TestUsageAttached: what was put since the last checkpoint counts, and what is left of a removed
// image whose checkpoint has gone already.
func TestUsageAttached(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: 64 << 20}, nil)
	h.mustFill(1000)
	h.mustDestage()
	h.mustWrite(1, 5)
	h.mustDestage()
	_, images := measured(t, st)
	mustUse(t, "an image without a checkpoint", images["disk"].Space, 65, 0, 0, 0)
	h.mustClose()
	_, images = measured(t, st)
	mustUse(t, "with one", images["disk"].Space, 64, 0, 0, 1)
	if _, err := Remove(ctx, st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	stopped, stop := context.WithCancel(ctx)
	if _, err := Reclaim(stopped, st, id, func(int, int) { stop() }); err == nil {
		t.Fatal("it was not interrupted")
	}
	u, images := measured(t, st)
	if d := images["disk"]; d.Reclaimable < 65*objectBlock || d.Reclaimable != u.Total.Reclaimable || d.Live+d.Snapshots != 0 {
		t.Errorf("%+v", d)
	}
}

// TestUsageDamaged: where it is not known what an image needs, nothing that is related to it
// counts as reclaimable, and other images are measured as ever.
func TestUsageDamaged(t *testing.T) {
	ctx := context.Background()
	for _, what := range []string{"/super", "/c/"} {
		st := mem.New()
		_, id := filled(t, st)
		overwrite(t, st, id, 16, 2000)
		mustClone(t, st, id, "", "copy", nil)
		if _, err := Create(ctx, st, "other", CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := st.Put(ctx, "strange", []byte("x")); err != nil {
			t.Fatal(err)
		}
		var lose []string
		_ = st.List(ctx, id.String()+what, func(key string) error { lose = append(lose, key); return nil })
		for _, key := range lose {
			if err := st.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
		}
		u, err := MeasureStore(ctx, st, UsageOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(lose) == 0 || u.Unknown < 16*objectBlock || u.Total.Reclaimable != 0 || u.Strange != 1 || len(u.Images) != 3 {
			t.Errorf("without %q: %+v", lose, u)
		}
		for _, im := range u.Images {
			if bad := im.ID == id || im.Name == "copy" && what == "/c/"; bad != (im.Error != "") || strings.Contains(im.Error, "\n") {
				t.Errorf("without %q: %+v", lose, im)
			}
		}
	}
}

// TestUsageOf: an image alone is measured with those that it is related to.
func TestUsageOf(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	_, id := filled(t, st)
	clone := mustClone(t, st, id, "", "copy", nil)
	last := mustClone(t, st, clone, "", "last", nil)
	if _, err := Create(ctx, st, "other", CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	all, images := measured(t, st)
	for _, of := range []uuid.UUID{id, clone, last} {
		u, err := MeasureStore(ctx, st, UsageOptions{Of: of, Parallel: 1})
		if err != nil || len(u.Images) != 3 || u.Total.Live != all.Total.Live {
			t.Fatalf("%+v, %v", u, err)
		}
		for _, im := range u.Images {
			if im != images[im.Name] {
				t.Errorf("%+v, want %+v", im, images[im.Name])
			}
		}
	}
}

// listedStore is a hugeStore that lists what it computes.
type listedStore struct{ *hugeStore }

func (s listedStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	if err := s.hugeStore.List(ctx, prefix, fn); err != nil {
		return err
	}
	for n := range s.objects {
		if err := fn(dataKey(s.id, uint64((n+1)*s.stride), 1)); err != nil {
			return err
		}
	}
	ref := checkpointRef{Object: s.last(), Epoch: 1}
	for part := uint32(0); part*s.part < segmentsOf(s.sectors); part++ {
		if err := fn(mapKey(s.id, ref, part)); err != nil {
			return err
		}
	}
	return fn(manifestKey(s.id, ref, 0))
}

// TestUsageAsks: what is asked of the store for an image is its superblock and its checkpoint,
// whatever its size.
func TestUsageAsks(t *testing.T) {
	for _, size := range constantSizes {
		huge := newHugeStore(t, size)
		st := &countedStore{Store: listedStore{huge}}
		u, err := MeasureStore(context.Background(), st, UsageOptions{Parallel: 1})
		if err != nil {
			t.Fatal(err)
		}
		// The list, the names, the superblock, the manifest and its size, and that of the names.
		if live := uint64(huge.objects) * hugeBlocks * objectBlock; st.calls != 6 || u.Total.Live != live || u.Total.Reclaimable+u.Unknown > 0 {
			t.Errorf("%d GiB: %d calls, %d bytes live, want %d: %+v", size>>30, st.calls, u.Total.Live, live, u)
		}
	}
}

// meanwhileStore has something happen before the first look at the manifest of a checkpoint.
type meanwhileStore struct {
	backend.Store
	happen func()
}

func (s *meanwhileStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	if do := s.happen; do != nil && strings.Contains(key, "/c/") {
		s.happen = nil
		do()
	}
	return s.Store.Stat(ctx, key)
}

// TestUsageMeanwhile: an image whose owner makes a new checkpoint, and removes the one before it,
// while the store is measured is looked at anew.
func TestUsageMeanwhile(t *testing.T) {
	st := mem.New()
	_, id := filled(t, st)
	manifests := func() (keys []string) {
		_ = st.List(context.Background(), id.String()+"/c/", func(key string) error { keys = append(keys, key); return nil })
		return keys
	}
	before := manifests()
	u, err := MeasureStore(context.Background(), &meanwhileStore{st, func() {
		h := mustOpen(t, st, id, 7)
		h.mustFill(5000)
		h.mustClose()
		h.again()
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.run(3 * leftoverGrace)
		h.mustClose()
	}}, UsageOptions{Parallel: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Stat(context.Background(), before[0]); !errors.Is(err, backend.ErrNotFound) {
		t.Fatalf("%s is still there: %v", before[0], err)
	}
	if u.Images[0].Error != "" || u.Unknown > 0 {
		t.Errorf("%+v", u)
	}
	_, images := measured(t, st)
	mustUse(t, "an image that was filled anew", images["disk"].Space, 64, 0, 0, 0)
}
