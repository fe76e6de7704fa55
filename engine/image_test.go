package engine

import (
	"testing"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestDiscardsShareAnObject: discards have no data, so that many fit one object, however
// large they are.
func TestDiscardsShareAnObject(t *testing.T) {
	st := mem.New()
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.mustDestage()
	before := h.im.accepted.object
	const n = 2 * MinObjectSize / SectorSize
	for i := range uint64(10) {
		var err error
		h.im.Submit(&Request{Op: Discard, Sector: i * n, Sectors: n, Done: doneFunc(func(r *Request) {
			if r.Err != 0 {
				err = r.Err
			}
		})})
		if h.run(0); err != nil {
			t.Fatal(err)
		}
	}
	h.mustDestage()
	if k := h.im.accepted.object - before; k != 1 {
		t.Errorf("ten discards are %d objects", k)
	}
	h.mustRead(1, 0)
}
