// Package storetest holds the suite of tests that every implementation of
// backend.Store must pass.
package storetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
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
		{"ManyRanges", testManyRanges},
		{"BadRanges", testBadRanges},
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

// getOne reads the first byte of the immutable object key by GetRanges.
func getOne(ctx context.Context, s backend.Store, key string) error {
	return backend.GetRanges(ctx, s, key, []backend.Range{{P: make([]byte, 1)}})
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
