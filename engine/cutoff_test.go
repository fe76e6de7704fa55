package engine

import (
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestCutOffRecordsStayAway: a record that a recovery has cut off, because the one
// before it was lost, does not come back in a later one that begins right in front of it,
// over what was written, flushed and destaged since.
func TestCutOffRecordsStayAway(t *testing.T) {
	racetest.Slow(t)
	tested := 0
	for seed := range uint64(40) {
		for _, power := range []bool{false, true} {
			if cutOffAndRestart(t, seed, power) {
				tested++
			}
		}
	}
	t.Logf("of 80 ends of the process %d have cut a record off", tested)
	if tested == 0 {
		t.Error("no record was cut off: this tests nothing")
	}
}

// cutOffAndRestart has a host die while two writes are under way, and reports whether
// both are gone.
func cutOffAndRestart(t *testing.T, seed uint64, power bool) bool {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, seed)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.mustDestage()
	for n := uint64(2); n <= 3; n++ { // a record each
		var done countDone
		r := &Request{Op: Write, Sector: n * 8, Sectors: 8, Buf: make([]byte, 4096), Done: &done}
		fill(r.Buf, n, r.Sector)
		h.im.Submit(r)
		h.im.EndTurn()
	}
	if power {
		h.run(0) // acknowledged, but not flushed
		h.disk.CutPower()
	} else {
		h.disk.Kill()
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	_, _, two := h.do(Read, 2, 0, 0)
	_, _, three := h.do(Read, 3, 0, 0)
	if two != 0 || three != 0 {
		return false
	}
	h.mustWrite(3, 5)
	if errno, ended, _ := h.do(Flush, 0, 0, 0); errno != 0 || !ended {
		t.Fatalf("flush: %v, ended: %t", errno, ended)
	}
	h.mustDestage()
	h.im.Abandon() // everything is in the store
	h.run(time.Second)
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	if _, _, n := h.do(Read, 3, 0, 0); n != 5 {
		t.Errorf("seed %d, power cut: %t: a block that was written, flushed and destaged as 5 reads as %d after a restart", seed, power, n)
	}
	return true
}
