// Package storetest holds the suite of tests that every implementation of
// backend.Store must pass.
package storetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// Run runs the suite. Each call of newPlace makes a new, empty place for
// objects, which it removes in t.Cleanup; each call of the function that it
// returns opens one more handle on that place, which the suite closes.
func Run(t *testing.T, newPlace func(t *testing.T) func(t *testing.T) backend.Store) {
	tests := []struct {
		name string
		run  func(t *testing.T, s backend.Store, another func() backend.Store)
	}{
		{"PutGet", testPutGet},
		{"PutExists", testPutExists},
		{"PutKeepsNothing", testPutKeepsNothing},
		{"PutRace", testPutRace},
		{"GetRanges", testGetRanges},
		{"GetWhilePut", testGetWhilePut},
		{"Stat", testStat},
		{"Delete", testDelete},
		{"List", testList},
		{"ListMany", testListMany},
		{"KeysInKeys", testKeysInKeys},
		{"BadArguments", testBadArguments},
		{"Largest", testLargest},
		{"LoadSwap", testLoadSwap},
		{"SwapConflict", testSwapConflict},
		{"SwapVersions", testSwapVersions},
		{"SwapSizes", testSwapSizes},
		{"SwapCreateRace", testSwapCreateRace},
		{"SwapCounter", testSwapCounter},
		{"SwapDeleteRace", testSwapDeleteRace},
		{"Cancelled", testCancelled},
		{"CancelledMidway", testCancelledMidway},
		{"Reopen", testReopen},
		{"Closed", testClosed},
		{"Random", testRandom},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			open := newPlace(t)
			another := func() backend.Store {
				s := open(t)
				t.Cleanup(func() {
					if err := s.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				})
				return s
			}
			tt.run(t, another(), another)
		})
	}
}

var classes = []error{
	backend.ErrNotFound,
	backend.ErrExists,
	backend.ErrConflict,
	backend.ErrTemporary,
	backend.ErrPermanent,
	context.Canceled,
	context.DeadlineExceeded,
}

// WantError fails the test unless err matches class, no other class, and is
// one line.
func WantError(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: error %v; want %v", what, err, class)
		return
	}
	for _, c := range classes {
		if c != class && errors.Is(err, c) {
			t.Errorf("%s: error %q matches %q besides %q", what, err, c, class)
		}
	}
	if s := err.Error(); s == "" || strings.Contains(s, "\n") {
		t.Errorf("%s: error %q is not one line", what, s)
	}
}

// Pattern returns size bytes that depend on seed.
func Pattern(seed uint64, size int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	p := make([]byte, size)
	rand.NewChaCha8(key).Read(p)
	return p
}

// testContext returns a context that ends before the test's binary gives up,
// so that a call which never returns shows where.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func put(t *testing.T, s backend.Store, key string, data []byte) {
	t.Helper()
	if err := s.Put(testContext(t), key, data); err != nil {
		t.Fatalf("Put %s of %d bytes: %v", key, len(data), err)
	}
}

// wantObject fails the test unless the immutable object key holds want.
func wantObject(t *testing.T, s backend.Store, key string, want []byte) {
	t.Helper()
	p := make([]byte, len(want)+1)
	n, err := s.Get(testContext(t), key, p, 0)
	if err != nil || n != len(want) || !bytes.Equal(p[:n], want) {
		t.Errorf("Get %s: %d bytes, %v; want %d, or they differ", key, n, err, len(want))
	}
}

func swap(t *testing.T, s backend.Store, key string, old backend.Version, data []byte) backend.Version {
	t.Helper()
	v, err := s.Swap(testContext(t), key, old, data)
	if err != nil {
		t.Fatalf("Swap %s: %v", key, err)
	}
	return v
}

func wantMutable(t *testing.T, s backend.Store, key string, version backend.Version, want []byte) {
	t.Helper()
	data, v, err := s.Load(testContext(t), key)
	if err != nil || v != version || !bytes.Equal(data, want) {
		t.Errorf("Load %s: %d bytes, version %q, %v; want %d bytes, version %q, or they differ",
			key, len(data), v, err, len(want), version)
	}
}

func testPutGet(t *testing.T, s backend.Store, another func() backend.Store) {
	s2 := another()
	for i, size := range []int{0, 1, 511, 4096, 1<<20 + 1} {
		key := fmt.Sprintf("img/data/%d", i)
		data := Pattern(uint64(i), size)
		put(t, s, key, data)
		wantObject(t, s, key, data)
		wantObject(t, s2, key, data)
	}
	put(t, s, "img/nil", nil)
	wantObject(t, s, "img/nil", nil)
	_, err := s.Get(testContext(t), "img/data/none", make([]byte, 1), 0)
	WantError(t, "Get of an absent key", err, backend.ErrNotFound)
	_, err = s.Get(testContext(t), "none/at/all", make([]byte, 1), 0)
	WantError(t, "Get of an absent key", err, backend.ErrNotFound)
	_, err = s.Get(testContext(t), "none", nil, 0)
	WantError(t, "Get of nothing of an absent key", err, backend.ErrNotFound)
}

func testPutExists(t *testing.T, s backend.Store, another func() backend.Store) {
	data := Pattern(1, 5000)
	put(t, s, "a/b", data)
	for _, other := range [][]byte{nil, data, Pattern(2, 10000)} {
		WantError(t, "second Put", s.Put(testContext(t), "a/b", other), backend.ErrExists)
		WantError(t, "second Put", another().Put(testContext(t), "a/b", other), backend.ErrExists)
		wantObject(t, s, "a/b", data)
	}
	put(t, s, "empty", nil)
	WantError(t, "second Put of an empty object", s.Put(testContext(t), "empty", data), backend.ErrExists)
	wantObject(t, s, "empty", nil)
}

func testPutKeepsNothing(t *testing.T, s backend.Store, _ func() backend.Store) {
	data := Pattern(1, 100000)
	want := bytes.Clone(data)
	put(t, s, "a", data)
	clear(data)
	wantObject(t, s, "a", want)

	copy(data, want)
	v := swap(t, s, "m", backend.NoVersion, data)
	clear(data)
	wantMutable(t, s, "m", v, want)
	got, _, err := s.Load(testContext(t), "m")
	if err != nil {
		t.Fatal(err)
	}
	clear(got) // the caller owns it
	wantMutable(t, s, "m", v, want)
}

func testPutRace(t *testing.T, s backend.Store, another func() backend.Store) {
	handles := []backend.Store{s, another(), another()}
	for round := range 8 {
		key := fmt.Sprintf("race/%d", round)
		var winner atomic.Int64
		winner.Store(-1)
		var wg sync.WaitGroup
		for i := range 9 {
			wg.Go(func() {
				err := handles[i%3].Put(testContext(t), key, Pattern(uint64(i), 10000+i))
				if err != nil {
					WantError(t, "racing Put", err, backend.ErrExists)
				} else if w := winner.Swap(int64(i)); w >= 0 {
					t.Errorf("both %d and %d created %s", w, i, key)
				}
			})
		}
		wg.Wait()
		w := winner.Load()
		if w < 0 {
			t.Fatal("nobody won")
		}
		wantObject(t, s, key, Pattern(uint64(w), 10000+int(w)))
	}
}

func testGetRanges(t *testing.T, s backend.Store, _ func() backend.Store) {
	const size = 10000
	data := Pattern(1, size)
	put(t, s, "a", data)
	for _, off := range []int64{0, 1, 4095, 4096, size - 1, size, size + 1, 1 << 40, 1<<63 - 1} {
		for _, n := range []int{0, 1, 4096, size, size + 1} {
			p := bytes.Repeat([]byte{0xee}, n)
			got, err := s.Get(testContext(t), "a", p, off)
			want := data[min(off, size):min(min(off, size)+int64(n), size)]
			if err != nil || !bytes.Equal(p[:got], want) {
				t.Errorf("Get of %d bytes from %d: %d, %v; want %d, or they differ", n, off, got, err, len(want))
			}
		}
	}
}

// testGetWhilePut checks that a reader sees an object whole or not at all.
func testGetWhilePut(t *testing.T, s backend.Store, another func() backend.Store) {
	const rounds, size = 10, 1 << 20
	r := another()
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		p := make([]byte, size)
		for i := 0; i < rounds && !done.Load(); {
			n, err := r.Get(testContext(t), fmt.Sprintf("o/%d", i), p, 0)
			if errors.Is(err, backend.ErrNotFound) {
				continue
			}
			if err != nil || n != size || !bytes.Equal(p, Pattern(uint64(i), size)) {
				t.Errorf("Get while Put: %d bytes, %v, or they differ", n, err)
			}
			i++
		}
	})
	for i := range rounds {
		if err := s.Put(testContext(t), fmt.Sprintf("o/%d", i), Pattern(uint64(i), size)); err != nil {
			t.Errorf("Put: %v", err)
			break
		}
	}
	done.Store(t.Failed())
	wg.Wait()
}

func testStat(t *testing.T, s backend.Store, _ func() backend.Store) {
	put(t, s, "a/0", nil)
	put(t, s, "a/5000", make([]byte, 5000))
	swap(t, s, "m/0", backend.NoVersion, nil)
	swap(t, s, "m/5000", backend.NoVersion, make([]byte, 5000))
	for key, want := range map[string]int64{"a/0": 0, "a/5000": 5000, "m/0": 0, "m/5000": 5000} {
		if n, err := s.Stat(testContext(t), key); err != nil || n != want {
			t.Errorf("Stat %s = %d, %v; want %d", key, n, err, want)
		}
	}
	for _, key := range []string{"a", "a/1", "none/x"} {
		_, err := s.Stat(testContext(t), key)
		WantError(t, "Stat of an absent key", err, backend.ErrNotFound)
	}
}

func testDelete(t *testing.T, s backend.Store, another func() backend.Store) {
	put(t, s, "a/b", []byte("one"))
	if err := another().Delete(testContext(t), "a/b"); err != nil {
		t.Fatal(err)
	}
	_, err := s.Get(testContext(t), "a/b", make([]byte, 1), 0)
	WantError(t, "Get after Delete", err, backend.ErrNotFound)
	WantError(t, "second Delete", s.Delete(testContext(t), "a/b"), backend.ErrNotFound)
	put(t, s, "a/b", []byte("two"))
	wantObject(t, s, "a/b", []byte("two"))

	swap(t, s, "m", backend.NoVersion, []byte("one"))
	if err := s.Delete(testContext(t), "m"); err != nil {
		t.Fatal(err)
	}
	_, _, err = s.Load(testContext(t), "m")
	WantError(t, "Load after Delete", err, backend.ErrNotFound)
	WantError(t, "second Delete", s.Delete(testContext(t), "m"), backend.ErrNotFound)
	WantError(t, "Delete of an absent key", s.Delete(testContext(t), "none/x"), backend.ErrNotFound)
}

func list(t *testing.T, s backend.Store, prefix string) []string {
	t.Helper()
	var keys []string
	err := s.List(testContext(t), prefix, func(key string) error {
		keys = append(keys, key)
		return nil
	})
	if err != nil {
		t.Fatalf("List %q: %v", prefix, err)
	}
	slices.Sort(keys)
	return keys
}

func testList(t *testing.T, s backend.Store, _ func() backend.Store) {
	if keys := list(t, s, ""); len(keys) != 0 {
		t.Errorf("List of a new store: %q", keys)
	}
	all := []string{"a", "ab/1", "ab/2", "ab/2x/y", "b/a", "b/m"}
	for _, key := range all[:5] {
		put(t, s, key, []byte(key))
	}
	swap(t, s, "b/m", backend.NoVersion, nil)
	for _, prefix := range []string{"", "a", "ab", "ab/", "ab/2", "ab/2x", "ab/2x/", "ab/2x/y", "b/", "c", "ab/3", "b/mm"} {
		var want []string
		for _, key := range all {
			if strings.HasPrefix(key, prefix) {
				want = append(want, key)
			}
		}
		if keys := list(t, s, prefix); !slices.Equal(keys, want) {
			t.Errorf("List %q: %q; want %q", prefix, keys, want)
		}
	}

	stop := errors.New("stop")
	n := 0
	err := s.List(testContext(t), "", func(string) error { n++; return stop })
	if err != stop || n != 1 {
		t.Errorf("List stopped by %v after %d calls; want stop, 1", err, n)
	}
	// fn may use the store.
	err = s.List(testContext(t), "", func(key string) error { return s.Delete(testContext(t), key) })
	if err != nil {
		t.Errorf("List that deletes: %v", err)
	}
	if keys := list(t, s, ""); len(keys) != 0 {
		t.Errorf("List after deleting all: %q", keys)
	}
}

func testListMany(t *testing.T, s backend.Store, _ func() backend.Store) {
	var want []string
	var wg sync.WaitGroup
	keys := make(chan string)
	for range 8 {
		wg.Go(func() {
			for key := range keys {
				if err := s.Put(testContext(t), key, nil); err != nil {
					t.Errorf("Put: %v", err)
				}
			}
		})
	}
	for i := range 1500 {
		key := fmt.Sprintf("many/%d/%04d", i%2, i)
		want = append(want, key)
		keys <- key
	}
	close(keys)
	wg.Wait()
	slices.Sort(want)
	if got := list(t, s, "many/"); !slices.Equal(got, want) {
		t.Errorf("List: %d keys; want %d, or they differ", len(got), len(want))
	}
}

// testKeysInKeys checks that a key may begin with another one and a slash.
func testKeysInKeys(t *testing.T, s backend.Store, _ func() backend.Store) {
	keys := []string{"a", "a/b", "a/b/c", "x/y/z", "x/y", "x"}
	for _, key := range keys {
		put(t, s, key, []byte(key))
	}
	for _, key := range keys {
		wantObject(t, s, key, []byte(key))
	}
	if err := s.Delete(testContext(t), "a"); err != nil {
		t.Fatal(err)
	}
	wantObject(t, s, "a/b", []byte("a/b"))
	long := strings.Repeat("k", backend.MaxKey)
	deep := strings.Repeat("d/", backend.MaxKey/2-1) + "dd"
	for _, key := range []string{long, deep} {
		put(t, s, key, []byte("x"))
		wantObject(t, s, key, []byte("x"))
		if err := s.Delete(testContext(t), key); err != nil {
			t.Error(err)
		}
		swap(t, s, key, backend.NoVersion, []byte("x"))
	}
	if got := list(t, s, "d/d/"); !slices.Equal(got, []string{deep}) {
		t.Errorf("List: %q; want %q", got, deep)
	}
}

func testBadArguments(t *testing.T, s backend.Store, _ func() backend.Store) {
	ctx := testContext(t)
	bad := []string{"", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", ".a", "a/.b", "A", "a b", "a\n", "a\x00b", "é", "a+obj", strings.Repeat("k", backend.MaxKey+1)}
	for _, key := range bad {
		_, getErr := s.Get(ctx, key, nil, 0)
		_, statErr := s.Stat(ctx, key)
		_, _, loadErr := s.Load(ctx, key)
		_, swapErr := s.Swap(ctx, key, backend.NoVersion, nil)
		for op, err := range map[string]error{
			"Put": s.Put(ctx, key, nil), "Get": getErr, "Stat": statErr,
			"Delete": s.Delete(ctx, key), "Load": loadErr, "Swap": swapErr,
		} {
			WantError(t, fmt.Sprintf("%s with key %q", op, key), err, backend.ErrPermanent)
		}
	}
	none := func(key string) error {
		t.Errorf("List shows %q", key)
		return nil
	}
	for _, prefix := range []string{"/", "..", "a//", "A"} {
		WantError(t, "List", s.List(ctx, prefix, none), backend.ErrPermanent)
	}
	_, err := s.Get(ctx, "a", nil, -1)
	WantError(t, "Get at a negative offset", err, backend.ErrPermanent)
	WantError(t, "Put of too much", s.Put(ctx, "a", make([]byte, backend.MaxObject+1)), backend.ErrPermanent)
	_, err = s.Swap(ctx, "a", backend.NoVersion, make([]byte, backend.MaxMutable+1))
	WantError(t, "Swap of too much", err, backend.ErrPermanent)
	if err := s.List(ctx, "", none); err != nil {
		t.Error(err)
	}
}

func testLargest(t *testing.T, s backend.Store, _ func() backend.Store) {
	if testing.Short() {
		t.Skip("64 MiB object: not with -short")
	}
	data := Pattern(1, backend.MaxObject)
	put(t, s, "big", data)
	wantObject(t, s, "big", data)
	p := make([]byte, 100)
	if n, err := s.Get(testContext(t), "big", p, backend.MaxObject-50); n != 50 || err != nil || !bytes.Equal(p[:50], data[len(data)-50:]) {
		t.Errorf("Get of the end: %d, %v", n, err)
	}
	if err := s.Delete(testContext(t), "big"); err != nil {
		t.Error(err)
	}
}

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
		if n, err := s.Stat(testContext(t), "m"); n != int64(size) || err != nil {
			t.Errorf("Stat = %d, %v; want %d", n, err, size)
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

func testCancelled(t *testing.T, s backend.Store, _ func() backend.Store) {
	put(t, s, "a", []byte("x"))
	v := swap(t, s, "m", backend.NoVersion, []byte("x"))
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	late, cancel := context.WithDeadline(context.Background(), time.Unix(0, 0))
	defer cancel()
	for _, ctx := range []context.Context{cancelled, late} {
		_, getErr := s.Get(ctx, "a", make([]byte, 1), 0)
		_, statErr := s.Stat(ctx, "a")
		_, _, loadErr := s.Load(ctx, "m")
		_, swapErr := s.Swap(ctx, "m", v, nil)
		for op, err := range map[string]error{
			"Put": s.Put(ctx, "b", nil), "Get": getErr, "Stat": statErr,
			"Delete": s.Delete(ctx, "a"), "Load": loadErr, "Swap": swapErr,
			"List": s.List(ctx, "", func(string) error { return nil }),
		} {
			WantError(t, op, err, ctx.Err())
		}
	}
	// A context that had ended before the call: nothing was done at all.
	wantObject(t, s, "a", []byte("x"))
	wantMutable(t, s, "m", v, []byte("x"))
	if keys := list(t, s, ""); !slices.Equal(keys, []string{"a", "m"}) {
		t.Errorf("List: %q; want a, m", keys)
	}
}

// testCancelledMidway ends contexts at any time: a call then either did all or
// nothing, and if it succeeded it did.
func testCancelledMidway(t *testing.T, s backend.Store, _ func() backend.Store) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 30 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(3000))*time.Microsecond)
		key := fmt.Sprintf("o/%d", i)
		data := Pattern(uint64(i), 200000)
		err := s.Put(ctx, key, data)
		if err != nil {
			WantError(t, "Put", err, context.DeadlineExceeded)
		}
		p := make([]byte, len(data))
		n, getErr := s.Get(testContext(t), key, p, 0)
		switch {
		case getErr == nil:
			if n != len(data) || !bytes.Equal(p, data) {
				t.Errorf("Get after Put that ended with %v: %d bytes, or they differ", err, n)
			}
		case err == nil || !errors.Is(getErr, backend.ErrNotFound):
			t.Errorf("Get after Put that ended with %v: %v", err, getErr)
		}
		cancel()
	}
	var last uint64
	for range 30 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(3000))*time.Microsecond)
		n, err := Increment(ctx, s, "counter")
		cancel()
		if err != nil {
			WantError(t, "Increment", err, context.DeadlineExceeded)
			continue
		}
		if n <= last {
			t.Errorf("counter went from %d to %d", last, n)
		}
		last = n
	}
}

func testReopen(t *testing.T, s backend.Store, another func() backend.Store) {
	put(t, s, "a/b", []byte("x"))
	v := swap(t, s, "m", backend.NoVersion, []byte("y"))
	for range 3 {
		s := another()
		wantObject(t, s, "a/b", []byte("x"))
		wantMutable(t, s, "m", v, []byte("y"))
		if keys := list(t, s, ""); !slices.Equal(keys, []string{"a/b", "m"}) {
			t.Errorf("List: %q; want a/b, m", keys)
		}
	}
}

// testClosed: a handle that was closed does nothing any more, and another one of the
// same place goes on.
func testClosed(t *testing.T, s backend.Store, another func() backend.Store) {
	ctx := testContext(t)
	v := swap(t, s, "m", backend.NoVersion, []byte("y"))
	put(t, s, "a", []byte("x"))
	other := another()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, getErr := s.Get(ctx, "a", make([]byte, 1), 0)
	_, statErr := s.Stat(ctx, "a")
	_, _, loadErr := s.Load(ctx, "m")
	_, swapErr := s.Swap(ctx, "m", v, []byte("z"))
	for op, err := range map[string]error{
		"Put": s.Put(ctx, "b", nil), "Get": getErr, "Stat": statErr, "Delete": s.Delete(ctx, "a"), "Load": loadErr, "Swap": swapErr,
		"List": s.List(ctx, "", func(string) error { return nil }),
	} {
		WantError(t, op, err, backend.ErrPermanent)
	}
	wantObject(t, other, "a", []byte("x"))
	wantMutable(t, other, "m", v, []byte("y"))
	if keys := list(t, other, ""); !slices.Equal(keys, []string{"a", "m"}) {
		t.Errorf("List: %q; want a, m", keys)
	}
}

// testRandom compares a sequence of random calls with a model.
func testRandom(t *testing.T, s backend.Store, another func() backend.Store) {
	type object struct {
		data    []byte
		version backend.Version
	}
	ctx := testContext(t)
	model := make(map[string]object)
	rng := rand.New(rand.NewPCG(3, 4))
	handles := []backend.Store{s, another()}
	for i := range 300 {
		s := handles[rng.IntN(2)]
		key := fmt.Sprintf("%c/%d", "im"[rng.IntN(2)], rng.IntN(6))
		mutable := key[0] == 'm'
		o, there := model[key]
		data := Pattern(uint64(i), rng.IntN(20000))
		switch op := rng.IntN(5); {
		case op < 2 && mutable:
			v, err := s.Swap(ctx, key, o.version, data)
			if err != nil {
				t.Fatalf("Swap %s: %v", key, err)
			}
			model[key] = object{data, v}
		case op < 2:
			err := s.Put(ctx, key, data)
			if there {
				WantError(t, "Put", err, backend.ErrExists)
			} else if err != nil {
				t.Fatalf("Put %s: %v", key, err)
			} else {
				model[key] = object{data: data}
			}
		case op == 2:
			err := s.Delete(ctx, key)
			if !there {
				WantError(t, "Delete", err, backend.ErrNotFound)
			} else if err != nil {
				t.Fatalf("Delete %s: %v", key, err)
			}
			delete(model, key)
		case !there:
			_, err := s.Stat(ctx, key)
			WantError(t, "Stat", err, backend.ErrNotFound)
		case mutable:
			wantMutable(t, s, key, o.version, o.data)
		default:
			wantObject(t, s, key, o.data)
		}
	}
}
