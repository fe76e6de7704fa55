package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

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
			"Put": s.Put(ctx, "b", nil), "Get": getErr, "GetRanges": getOne(ctx, s, "a"), "Stat": statErr,
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
		"Put": s.Put(ctx, "b", nil), "Get": getErr, "GetRanges": getOne(ctx, s, "a"), "Stat": statErr,
		"Delete": s.Delete(ctx, "a"), "Load": loadErr, "Swap": swapErr,
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
