package engine

import (
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestRest: an idle image loses its log's memory, and nothing else; one that is
// not idle keeps it.
func TestRest(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	n := uint64(0)
	for range 20 {
		for range 50 {
			n++
			h.mustWrite(n, n)
			if h.im.Rest() {
				t.Fatal("it rests while writes are in the log alone")
			}
		}
		h.im.Destage(func(error) {})
		h.run(0)
		if h.im.jobs > 0 || !h.im.Rest() {
			t.Fatalf("it does not rest: %+v", h.im.Stats())
		}
		for i := range h.memory {
			h.memory[i] = 0xcc // whoever reads this has taken it for data
		}
		for b := uint64(1); b <= n; b += 7 {
			h.mustRead(b, b)
		}
		h.mustWrite(1, 1)
		h.mustRead(1, 1)
		h.mustRead(n, n)
	}
	h.run(time.Minute)
	// And after a restart, from what the log's rest left on the disk.
	h.mustWrite(2, 2)
	h.disk.Kill()
	again := &host{t: t, name: "alpha", st: st, disk: h.disk, env: &simEnv{rng: h.env.rng, disk: h.disk}}
	if err := again.open(id, false); err != nil {
		t.Fatal(err)
	}
	for b := uint64(1); b <= n; b++ {
		again.mustRead(b, b)
	}
}

// TestRestReclaims: what has died since the last checkpoint does not stay in the
// store for as long as the image is idle, however few objects these are.
func TestRestReclaims(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	for round := range uint64(3) { // fewer than would make a checkpoint due
		for b := range uint64(100) {
			h.mustWrite(b, round)
		}
		h.mustDestage()
	}
	if h.im.checkpoint.last != nil {
		t.Fatal("there is a checkpoint already: this tests nothing")
	}
	for range 3 {
		h.im.Rest()
		h.run(time.Second)
	}
	if !h.im.Rest() {
		t.Error("it does not rest")
	}
	if left := objectsOf(t, st, id, "d"); left != 1 {
		t.Errorf("%d data objects are left, want the last one", left)
	}
	last := h.im.checkpoint.last
	h.mustWrite(200, 1) // nothing dies of that
	h.mustDestage()
	h.im.Rest()
	h.run(time.Second)
	if h.im.checkpoint.last != last {
		t.Error("it makes checkpoints that free nothing")
	}
}

// TestRestReclaimsUncounted: so it is where the map is not in memory, which does not say
// then what has died.
func TestRestReclaimsUncounted(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	write := func(n uint64) {
		for b := range uint64(200) {
			h.mustWrite(b, n)
		}
		h.mustDestage()
	}
	write(1)
	h.mustClose()
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	write(2)
	if h.im.objs.resident.has(0) {
		t.Fatal("the map is in memory: this tests nothing")
	}
	for range 3 {
		h.im.Rest()
		h.run(time.Second)
	}
	if left := objectsOf(t, st, id, "d"); left != 1 {
		t.Errorf("%d data objects are left, want the last one", left)
	}
}
