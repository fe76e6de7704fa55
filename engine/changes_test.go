package engine

import (
	"slices"
	"testing"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// dropSegment takes a segment out of memory.
func (h *host) dropSegment(i uint32) {
	h.t.Helper()
	m := h.im.objs
	m.hand = slices.Index(m.ring, i)
	if m.hand < 0 {
		h.t.Fatalf("segment %d is not in memory", i)
	}
	m.drop(i)
	m.hand = 0
	if h.im.objs.here(i) {
		h.t.Fatalf("segment %d is in memory still", i)
	}
}

// TestChangesComeBack: a segment that has changed since the last checkpoint can be dropped
// at any time, and is had again as it was, also if nothing of it was ever stored; the
// table is told once what its changes take from other objects, and after a recovery as
// soon as the segment is in memory.
func TestChangesComeBack(t *testing.T) {
	for _, stored := range []bool{false, true} {
		st := mem.New()
		id := newImageIn(t, st)
		h := newHost(t, "alpha", st, 1)
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.mustWrite(1, 1)
		h.mustWrite(2, 2)
		h.mustDestage()
		if stored {
			h.im.checkpoint.now(func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
			h.run(0)
			if h.im.objs.segment(0).size == 0 {
				t.Fatal("nothing is stored")
			}
		}
		h.mustWrite(1, 3)
		h.mustDestage()
		h.mustWrite(3, 4)
		h.mustDestage()
		table := slices.Clone(h.im.table.list)
		same := func(what string) {
			t.Helper()
			h.mustRead(1, 3)
			h.mustRead(2, 2)
			h.mustRead(3, 4)
			if !slices.Equal(h.im.table.list, table) {
				t.Errorf("stored %v: %s the table is %+v, want %+v", stored, what, h.im.table.list, table)
			}
		}
		for range 3 {
			h.dropSegment(0)
			same("after it was dropped")
		}
		h.disk.Kill()
		h.again()
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		same("after a recovery")
		h.mustClose()
		mustBeClean(t, st)
	}
}
