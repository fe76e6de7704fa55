package engine

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// newScrubbed returns a host that has an image of some MiB open, and scrubs it at
// the given rate once that is set.
func newScrubbed(t *testing.T, st backend.Store) *host {
	t.Helper()
	h := newHost(t, "alpha", st, 1)
	h.shared = NewShared(Limits{})
	h.shared.Scrub.Set(1 << 20)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 2000; n++ {
		h.mustWrite(n, n)
	}
	h.mustDestage()
	return h
}

func TestScrub(t *testing.T) {
	h := newScrubbed(t, mem.New())
	size := h.im.Stats().DataBytes
	pass := time.Duration(size) * time.Second / (1 << 20)
	began := h.env.now
	for h.im.Stats().Scrub.Passes == 0 {
		h.run(100 * time.Millisecond)
		if h.env.now-began > 2*pass+time.Minute {
			t.Fatalf("it does not come to an end: %+v", h.im.Stats().Scrub)
		}
	}
	s := h.im.Stats().Scrub
	if took := h.env.now - began; took < pass {
		t.Errorf("a pass over %d bytes took %v: faster than its rate, %v", size, took, pass)
	}
	if s.Errors != 0 || s.Bytes < size || s.Objects != s.Total || s.Running || s.Last == 0 {
		t.Errorf("%+v, for %d bytes", s, size)
	}
	if n := h.shared.Scrub.images.Load(); n != 0 {
		t.Errorf("%d images are in a pass", n)
	}
	// The next one begins a day after the first.
	h.run(12 * time.Hour)
	if s := h.im.Stats().Scrub; s.Running || s.Passes != 1 {
		t.Errorf("after half a day: %+v", s)
	}
	h.run(13 * time.Hour)
	if s := h.im.Stats().Scrub; s.Passes != 2 {
		t.Errorf("after a day: %+v", s)
	}
}

// TestScrubFindsDamage: each kind of damage is counted once in a pass, and named,
// and nothing else happens.
func TestScrubFindsDamage(t *testing.T) {
	for name, change := range map[string]func([]byte) int{
		"data flipped": flipLast, "header flipped": flipFirst, "cut": cutLast, "empty": cutAll, "missing": nil,
	} {
		t.Run(name, func(t *testing.T) {
			st := mem.New()
			h := newScrubbed(t, st)
			o := h.im.table.list[len(h.im.table.list)/2]
			key := dataKey(h.im.id, uint64(o.number), uint64(o.epoch))
			var err error
			if change != nil {
				err = damage(context.Background(), st, key, change)
			} else {
				err = st.Delete(context.Background(), key)
			}
			if err != nil {
				t.Fatal(err)
			}
			h.run(time.Hour)
			if s := h.im.Stats().Scrub; s.Errors != 1 || s.Bad != key || s.Passes != 1 || s.Objects != s.Total-1 {
				t.Errorf("%+v; %s is damaged", s, key)
			}
			if s := h.im.Stats(); s.StoreDown || s.StoreErrors > 0 || s.ReadErrors > 0 || s.State != "active" {
				t.Errorf("%+v", s)
			}
			h.mustWrite(1, 77)
			h.mustRead(1, 77)
		})
	}
}

// TestScrubYields: nothing is read while the store is in trouble or clients wait
// for room.
func TestScrubYields(t *testing.T) {
	inner := mem.New()
	down := faultstore.NewSwitch()
	reads := 0
	st := faultstore.New(inner, func(op faultstore.Op) faultstore.Fault {
		if op.Method == faultstore.Get && strings.Contains(op.Key, "/d/") {
			reads++
		}
		if down.On(op) && op.Method == faultstore.Put {
			return faultstore.Fault{Before: backend.ErrTemporary}
		}
		return faultstore.Fault{}
	})
	h := newScrubbed(t, st)
	h.run(3 * time.Second)
	if reads == 0 {
		t.Fatal("nothing is scrubbed")
	}
	down.Set(true)
	h.mustWrite(1, 1)
	h.im.Destage(func(error) {})
	h.run(time.Second)
	before := reads
	if !h.im.Stats().StoreDown {
		t.Fatal("the store is not down")
	}
	h.run(500 * time.Millisecond)
	if reads != before {
		t.Errorf("%d reads while the store takes no objects", reads-before)
	}
	down.Set(false)
	h.run(time.Hour)
	if s := h.im.Stats().Scrub; s.Passes != 1 || s.Errors != 0 {
		t.Errorf("afterwards: %+v", s)
	}
}

// TestScrubBesideCleaner: objects that the cleaner deletes under the scrub are no
// errors, and a pass that an image's end cuts short leaves no share taken.
func TestScrubBesideCleaner(t *testing.T) {
	racetest.Slow(t)
	h := newScrubbed(t, mem.New())
	h.shared.Scrub.Set(64 << 20)
	rng := rand.New(rand.NewPCG(5, 5))
	for range 100 {
		h.scatterFirst(rng, 300, 2000)
		h.run(time.Duration(rng.IntN(200)) * time.Millisecond)
	}
	if s := h.im.Stats(); s.Scrub.Errors != 0 || s.Scrub.Bytes == 0 || s.Deleted == 0 {
		t.Errorf("%+v", s)
	}
	h.shared.Scrub.Set(1)
	h.im.scrub.timer.Reset(0)
	h.im.scrub.end()
	h.im.scrub.begin()
	h.run(0)
	if n := h.shared.Scrub.images.Load(); n != 1 {
		t.Fatalf("%d images are in a pass", n)
	}
	h.im.Abandon()
	if n := h.shared.Scrub.images.Load(); n != 0 {
		t.Errorf("%d images are in a pass after its end", n)
	}
	h.run(time.Minute)
}

// scatterFirst writes n of the first blocks.
func (h *host) scatterFirst(rng *rand.Rand, n int, blocks uint64) {
	h.t.Helper()
	for i := range n {
		h.mustWrite(rng.Uint64N(blocks), uint64(i)+1)
	}
}

// TestScrubShares: images that scrub at one time share the rate.
func TestScrubShares(t *testing.T) {
	var r ScrubRate
	r.Set(8 << 20)
	for n, want := range []time.Duration{time.Second, time.Second, 2 * time.Second, 3 * time.Second} {
		r.images.Store(int64(n))
		if got := r.pause(8 << 20); got != want {
			t.Errorf("%d images: %v, want %v", n, got, want)
		}
	}
}
