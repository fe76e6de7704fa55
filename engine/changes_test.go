package engine

import (
	"slices"
	"testing"
	"time"

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

// TestDeadBeforeRecovery: an object that an owner before has deleted, for an object after
// the last checkpoint had taken the last of it, lives by the table of the next one until
// the map has been told so. Neither the scrub nor the cleaner takes it for one that is lost.
func TestDeadBeforeRecovery(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	write := func(n uint64) {
		for b := range uint64(100) {
			h.mustWrite(b, n)
		}
		h.mustDestage()
	}
	write(1)
	h.im.checkpoint.now(func(error) {})
	h.run(time.Second)
	write(2)
	h.run(time.Second)
	if n := objectsOf(t, st, id, "d"); n != 1 || h.im.checkpoint.last == nil {
		t.Fatalf("%d data objects are left: this tests nothing", n)
	}
	h.disk.Kill()
	h.again()
	h.shared = NewShared(Limits{})
	h.shared.Scrub.Set(1 << 20)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	gone := h.im.table.find(1)
	if gone == nil || gone.live == 0 {
		t.Fatalf("the table knows already: %+v", h.im.table.list)
	}
	h.im.clean.begin([]objectInfo{*gone})
	h.run(time.Hour)
	if s := h.im.Stats().Scrub; s.Errors != 0 || s.Passes != 1 {
		t.Errorf("%+v, of an image that is whole", s)
	}
	if len(h.im.clean.bad) > 0 {
		t.Errorf("the cleaner takes %v for damaged", h.im.clean.bad)
	}
	h.mustRead(1, 2)
	h.run(time.Second)
	if o := h.im.table.find(1); o != nil {
		t.Errorf("its entry stays: %+v", *o)
	}
	// What is lost now is found.
	o := h.im.table.list[len(h.im.table.list)-1]
	if err := st.Delete(t.Context(), dataKey(id, uint64(o.number), uint64(o.epoch))); err != nil {
		t.Fatal(err)
	}
	h.run(25 * time.Hour)
	if s := h.im.Stats().Scrub; s.Errors != 1 {
		t.Errorf("%+v, of an image of which an object is lost", s)
	}
}
