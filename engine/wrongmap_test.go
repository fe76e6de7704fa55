package engine

import (
	"errors"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/invariants"
)

// TestCleanerWrongMap: where the map looks for data in another place of an object than
// has it, the cleaner leaves the object alone.
func TestCleanerWrongMap(t *testing.T) {
	for _, by := range []uint64{8, 16, 1 << 10} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		for b := range uint64(3) {
			h.mustWrite(2*b, b+1)
		}
		h.mustDestage()
		h.mustClose()
		c := &checkedImage{t, st, id}
		c.remap(func(loc uint64) uint64 { return loc + by })
		h.again()
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.im.clean.begin([]objectInfo{*h.im.table.find(1)}, cleanSpace)
		h.run(time.Minute)
		if im := h.im; im.clean.running != nil || im.accepted.object != 1 || !im.clean.bad[1] {
			t.Errorf("by %d: the cleaner has moved it: %+v", by, im.Stats())
		}
		h.mustRead(2, 2)
		h.mustRead(4, 3)
	}
}

// TestWrongMapCounts: a map whose stored part refers to an object after its checkpoint is
// wrong. It does not make the counts such that the next manifest cannot be read.
func TestWrongMapCounts(t *testing.T) {
	if invariants.Enabled {
		t.Skip("a wrong map is a panic")
	}
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustWrite(0, 1)
	h.mustWrite(2, 1)
	h.mustCheckpoint()
	// Object 3 moves what object 2 has overwritten meanwhile.
	h.mustWrite(0, 2)
	h.mustWrite(2, 2)
	h.mustDestage()
	h.im.sealCleaned([]movedPiece{{sector: 0, n: 8, born: 1, data: make([]byte, 4096)}, {sector: 16, n: 8, born: 1, data: make([]byte, 4096)}}, 1)
	h.im.pumpNow()
	h.run(0)
	if h.im.accepted.object != 3 || h.im.checkpoint.last.Object != 1 {
		t.Fatal("the objects are not there: this tests nothing")
	}
	h.disk.Kill()
	h.im.Abandon()
	(&checkedImage{t, st, id}).remap(func(loc uint64) uint64 { return refOfSeq(3).loc(offsetOf(loc)) })
	for range 2 {
		h.again()
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.mustRead(0, 2)
		h.mustRead(2, 2)
		if n := h.im.table.live; n > h.im.sectors {
			t.Errorf("%d sectors live, of an image of %d", n, h.im.sectors)
		}
		h.mustClose()
	}
}

// TestWrongMapLive: a manifest whose count of what is current in a map object is wrong is
// refused: the map object would be removed while parts of the map are in it, or never.
func TestWrongMapLive(t *testing.T) {
	for _, by := range []int{-1, 1, -segmentFixed} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustWrite(0, 1)
		h.mustClose()
		(&checkedImage{t, st, id}).rewrite(func(m *manifest) {
			o := &m.maps[0]
			o.size += segmentFixed
			o.live = uint32(int(o.live) + by)
		})
		h.again()
		if err := h.open(id, false); !errors.Is(err, ErrCorrupt) {
			t.Errorf("by %d: %v, want a manifest that is corrupt", by, err)
		}
	}
}
