package daemon

import (
	"maps"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func TestCountedStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func(*testing.T) backend.Store {
		s, ops := mem.New(), new(storeOps)
		return func(*testing.T) backend.Store { return ops.counted(s.Handle()) }
	})
}

// fencingStore is a store that can shut clients out.
type fencingStore struct {
	backend.Store
	backend.Fencer
}

// TestCountedFencer: a store is a Fencer when it is counted if it is one without.
func TestCountedFencer(t *testing.T) {
	var ops storeOps
	if _, ok := ops.counted(mem.New()).(backend.Fencer); ok {
		t.Error("a store that cannot shut clients out says that it can")
	}
	f, ok := ops.counted(fencingStore{Store: mem.New()}).(backend.Fencer)
	if _, also := f.(backend.RangeGetter); !ok || !also {
		t.Errorf("a store that can shut clients out: Fencer %v, RangeGetter %v", ok, also)
	}
}

func TestStoreOps(t *testing.T) {
	var ops storeOps
	s, ctx := ops.counted(mem.New()), t.Context()
	const image = "7b1ff3f2-a1f8-4f6c-8f43-2f6c3b1f6e1d"
	if err := s.Put(ctx, image+"/d/00000001.1", make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 80)
	if _, err := s.Get(ctx, image+"/d/00000001.1", p, 50); err != nil { // 50 bytes are there
		t.Fatal(err)
	}
	if err := backend.GetRanges(ctx, s, image+"/d/00000001.1", []backend.Range{{P: p[:10]}, {Off: 90, P: p[10:]}}); err != nil { // 10 and 10
		t.Fatal(err)
	}
	if err := s.Delete(ctx, image+"/m/00000001.1.0"); err == nil { // that counts, too
		t.Fatal("what is not there was deleted")
	}
	v, err := s.Swap(ctx, image+"/super", backend.NoVersion, make([]byte, 30))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Swap(ctx, image+"/super", v, make([]byte, 40)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Load(ctx, image+"/super"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, image+"/super"); err != nil {
		t.Fatal(err)
	}
	if err := s.List(ctx, "", func(string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	got := map[string][2]uint64{}
	ops.each(func(op, object string, n, bytes uint64) { got[op+" "+object] = [2]uint64{n, bytes} })
	want := map[string][2]uint64{
		"put data": {1, 100}, "get data": {1, 50}, "get_ranges data": {1, 20}, "delete map": {1, 0},
		"swap superblock": {2, 70}, "load superblock": {1, 40}, "stat superblock": {1, 0}, "list other": {1, 0},
	}
	if !maps.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
}
