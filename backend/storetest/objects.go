package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

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

// wantRanges fails the test unless reading ranges of the object key gives what want has there.
func wantRanges(t *testing.T, s backend.Store, key string, want []byte, ranges []backend.Range) {
	t.Helper()
	if err := backend.GetRanges(testContext(t), s, key, ranges); err != nil {
		t.Errorf("GetRanges of %d: %v", len(ranges), err)
		return
	}
	for _, r := range ranges {
		from := min(int(r.Off), len(want))
		if b := want[from:min(from+len(r.P), len(want))]; r.N != len(b) || !bytes.Equal(r.P[:r.N], b) {
			t.Errorf("GetRanges: of %d bytes from %d %d, want %d, or they differ", len(r.P), r.Off, r.N, len(b))
		}
	}
}

func testManyRanges(t *testing.T, s backend.Store, another func() backend.Store) {
	const size = 100000
	data := Pattern(1, size)
	put(t, s, "a", data)
	put(t, s, "empty", nil)
	part := func(off int64, n int) backend.Range {
		return backend.Range{Off: off, P: bytes.Repeat([]byte{0xee}, n), N: -1}
	}
	wantRanges(t, s, "a", data, nil)
	wantRanges(t, another(), "a", data, []backend.Range{part(4096, 4096)})
	wantRanges(t, s, "a", data, []backend.Range{part(0, 1), part(1, 1), part(4095, 2), part(size-1, 1)})
	// They overlap, and are in no order.
	wantRanges(t, s, "a", data, []backend.Range{part(50000, 30000), part(0, size), part(40000, 20000), part(50000, 30000)})
	// The object ends in, before or after some.
	wantRanges(t, s, "a", data, []backend.Range{part(size-10, 20), part(0, size+1), part(size, 1), part(10, 10), part(backend.MaxObject-1, 1), part(20, 10)})
	wantRanges(t, s, "empty", nil, []backend.Range{part(0, 1), part(1000, 1000)})
	for _, n := range []int{backend.MaxRanges, 2*backend.MaxRanges + 1} {
		var ranges []backend.Range
		for i := range n {
			ranges = append(ranges, part(int64(i*90), 1+i%70))
		}
		wantRanges(t, s, "a", data, ranges)
	}
}

func testBadRanges(t *testing.T, s backend.Store, _ func() backend.Store) {
	const size = 1000
	put(t, s, "a", Pattern(1, size))
	part := func(off int64, n int) backend.Range { return backend.Range{Off: off, P: make([]byte, n)} }
	get := func(key string, ranges ...backend.Range) error {
		return backend.GetRanges(testContext(t), s, key, ranges)
	}
	WantError(t, "GetRanges of an absent key", get("none/x", part(0, 1), part(1, 1)), backend.ErrNotFound)
	for what, ranges := range map[string][]backend.Range{
		"no bytes":            {part(0, 1), part(0, 0)},
		"a negative offset":   {part(0, 1), part(-1, 1)},
		"what no object has":  {part(0, 1), part(backend.MaxObject, 1)},
		"what overflows":      {part(0, 1), part(1<<63-1, 1)},
		"more than an object": {part(0, backend.MaxObject), part(0, 1)},
	} {
		WantError(t, "GetRanges of "+what, get("a", ranges...), backend.ErrPermanent)
	}
	g, ok := s.(backend.RangeGetter)
	if !ok {
		return
	}
	many := make([]backend.Range, backend.MaxRanges+1)
	for i := range many {
		many[i] = part(0, 1)
	}
	WantError(t, "one operation for no ranges", g.GetRanges(testContext(t), "a", nil), backend.ErrPermanent)
	WantError(t, "one operation for too many", g.GetRanges(testContext(t), "a", many), backend.ErrPermanent)
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
	began := time.Now()
	for key, want := range map[string]int64{"a/0": 0, "a/5000": 5000, "m/0": 0, "m/5000": 5000} {
		is, err := s.Stat(testContext(t), key)
		if err != nil || is.Size != want {
			t.Errorf("Stat %s = %+v, %v; want %d", key, is, err, want)
		}
		if age := began.Sub(is.Modified); age < -time.Second || age > time.Minute { // the store's clock is this machine's
			t.Errorf("%s was modified %v before it was put", key, age)
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
			"Put": s.Put(ctx, key, nil), "Get": getErr, "Stat": statErr, "GetRanges": getOne(ctx, s, key),
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
