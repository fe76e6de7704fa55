package engine

import (
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestCleanerWrongMap: where the map looks for data in another place of an object than
// has it, the cleaner leaves the object alone.
func TestCleanerWrongMap(t *testing.T) {
	for _, by := range []uint64{8, 16, 1 << 10} {
		st := mem.New()
		id := newImageIn(t, st)
		h := newHost(t, "alpha", st, 1)
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
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
		h.im.clean.begin([]objectInfo{*h.im.table.find(1)})
		h.run(time.Minute)
		if im := h.im; im.clean.running != nil || im.accepted.object != 1 || !im.clean.bad[1] {
			t.Errorf("by %d: the cleaner has moved it: %+v", by, im.Stats())
		}
		h.mustRead(2, 2)
		h.mustRead(4, 3)
	}
}
