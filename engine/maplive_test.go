package engine

import (
	"errors"
	"testing"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestWrongMapLive: a manifest whose count of what is current in a map object is wrong is
// refused: the map object would be removed while parts of the map are in it, or never.
func TestWrongMapLive(t *testing.T) {
	for _, by := range []int{-1, 1, -segmentFixed} {
		st := mem.New()
		id := newImageIn(t, st)
		h := newHost(t, "alpha", st, 1)
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
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
