package storetest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
)

func testLoadSwap(t *testing.T, s backend.Store, another func() backend.Store) {
	_, _, err := s.Load(testContext(t), "img/super")
	WantError(t, "Load of an absent key", err, backend.ErrNotFound)
	v1 := swap(t, s, "img/super", backend.NoVersion, []byte("one"))
	if v1 == backend.NoVersion {
		t.Error("Swap returned NoVersion")
	}
	wantMutable(t, s, "img/super", v1, []byte("one"))
	s2 := another()
	wantMutable(t, s2, "img/super", v1, []byte("one"))
	v2 := swap(t, s2, "img/super", v1, []byte("two, longer"))
	wantMutable(t, s, "img/super", v2, []byte("two, longer"))
	v3 := swap(t, s, "img/super", v2, []byte("3"))
	wantMutable(t, s2, "img/super", v3, []byte("3"))
	v4 := swap(t, s, "img/super", v3, nil)
	wantMutable(t, s2, "img/super", v4, nil)
}

func testSwapConflict(t *testing.T, s backend.Store, another func() backend.Store) {
	ctx := testContext(t)
	v1 := swap(t, s, "m", backend.NoVersion, []byte("one"))
	other := swap(t, s, "other", backend.NoVersion, []byte("one"))
	v2 := swap(t, s, "m", v1, []byte("two"))
	for _, old := range []backend.Version{backend.NoVersion, v1, other, "nonsense", "\x00", backend.Version(strings.Repeat("v", 1000)), v2 + "0"} {
		for _, h := range []backend.Store{s, another()} {
			v, err := h.Swap(ctx, "m", old, []byte("bad"))
			WantError(t, fmt.Sprintf("Swap of %q", old), err, backend.ErrConflict)
			if v != backend.NoVersion {
				t.Errorf("failed Swap returned version %q", v)
			}
		}
	}
	wantMutable(t, s, "m", v2, []byte("two"))
	for _, old := range []backend.Version{v1, "nonsense"} {
		_, err := s.Swap(ctx, "absent/m", old, []byte("bad"))
		WantError(t, "Swap of an absent object", err, backend.ErrConflict)
	}
	_, _, err := s.Load(ctx, "absent/m")
	WantError(t, "Load after failed Swap", err, backend.ErrNotFound)
}

func testSwapVersions(t *testing.T, s backend.Store, _ func() backend.Store) {
	seen := make(map[backend.Version]bool)
	var first backend.Version
	for range 5 {
		v := backend.NoVersion
		for range 5 {
			v = swap(t, s, "m", v, []byte("same")) // same contents, new version
			if seen[v] {
				t.Fatalf("version %q came twice", v)
			}
			seen[v] = true
			if first == backend.NoVersion {
				first = v
			}
		}
		if err := s.Delete(testContext(t), "m"); err != nil {
			t.Fatal(err)
		}
		_, err := s.Swap(testContext(t), "m", v, nil)
		WantError(t, "Swap of the deleted version", err, backend.ErrConflict)
	}
	swap(t, s, "m", backend.NoVersion, nil)
	_, err := s.Swap(testContext(t), "m", first, nil)
	WantError(t, "Swap of a version before Delete", err, backend.ErrConflict)
}

func testSwapSizes(t *testing.T, s backend.Store, _ func() backend.Store) {
	v := backend.NoVersion
	for i, size := range []int{backend.MaxMutable, 0, 1, 65535, 65536, 65537, 1 << 20, 100} {
		data := Pattern(uint64(i), size)
		v = swap(t, s, "m", v, data)
		wantMutable(t, s, "m", v, data)
		if is, err := s.Stat(testContext(t), "m"); is.Size != int64(size) || err != nil {
			t.Errorf("Stat = %+v, %v; want %d", is, err, size)
		}
	}
}

func testSwapCreateRace(t *testing.T, s backend.Store, another func() backend.Store) {
	handles := []backend.Store{s, another(), another()}
	for round := range 8 {
		key := fmt.Sprintf("race/%d/super", round)
		var wins atomic.Int64
		var wg sync.WaitGroup
		for i := range 9 {
			wg.Go(func() {
				_, err := handles[i%3].Swap(testContext(t), key, backend.NoVersion, []byte{byte(i)})
				if err == nil {
					wins.Add(1)
				} else {
					WantError(t, "racing Swap", err, backend.ErrConflict)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 {
			t.Errorf("%d created %s; want 1", wins.Load(), key)
		}
	}
}

// Increment adds one to the counter in the mutable object key by Swap, and
// returns its new value.
func Increment(ctx context.Context, s backend.Store, key string) (uint64, error) {
	for {
		data, v, err := s.Load(ctx, key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return 0, err
		}
		var n uint64
		if err == nil {
			if len(data) < 8 {
				return 0, fmt.Errorf("counter of %d bytes", len(data))
			}
			n = binary.LittleEndian.Uint64(data)
		}
		// The length varies, so that a torn replacement shows.
		data = binary.LittleEndian.AppendUint64(nil, n+1)
		data = append(data, make([]byte, n%100)...)
		if _, err = s.Swap(ctx, key, v, data); err == nil {
			return n + 1, nil
		}
		if !errors.Is(err, backend.ErrConflict) {
			return 0, err
		}
	}
}

func testSwapCounter(t *testing.T, s backend.Store, another func() backend.Store) {
	const workers, each = 6, 15
	handles := []backend.Store{s, another(), another()}
	var seen sync.Map
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			for range each {
				n, err := Increment(testContext(t), handles[i%3], "counter")
				if err != nil {
					t.Errorf("Increment: %v", err)
					return
				}
				if _, dup := seen.LoadOrStore(n, true); dup {
					t.Errorf("two workers made %d: an update was lost", n)
				}
			}
		})
	}
	wg.Wait()
	if n, err := Increment(testContext(t), s, "counter"); n != workers*each+1 || err != nil {
		t.Errorf("counter = %d, %v; want %d", n, err, workers*each+1)
	}
}

// testSwapDeleteRace checks that an object deleted while it is being replaced
// is either gone, and the Swap failed, or was replaced first.
func testSwapDeleteRace(t *testing.T, s backend.Store, another func() backend.Store) {
	s2 := another()
	for i := range 20 {
		key := fmt.Sprintf("m%d", i)
		v := swap(t, s, key, backend.NoVersion, []byte("one"))
		var swapErr, deleteErr error
		var wg sync.WaitGroup
		wg.Go(func() { _, swapErr = s.Swap(testContext(t), key, v, []byte("two")) })
		wg.Go(func() { deleteErr = s2.Delete(testContext(t), key) })
		wg.Wait()
		if deleteErr != nil {
			t.Errorf("Delete: %v", deleteErr)
		}
		if swapErr != nil {
			WantError(t, "Swap", swapErr, backend.ErrConflict)
		}
		_, _, err := s.Load(testContext(t), key)
		WantError(t, "Load", err, backend.ErrNotFound)
	}
}
