package engine

import (
	"context"
	"testing"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestChargedWhatReadsBring: what reads bring into memory of segments of which nothing is
// stored is charged, and goes when it is too much.
func TestChargedWhatReadsBring(t *testing.T) {
	const segments, apart = 200, 4 << 30 / 4096 // blocks
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: segments * apart * 4096})
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, "alpha", st, 1)
	h.shared = NewShared(Limits{Map: 128 << 10})
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.im.cfg.CheckpointEvery = 1 << 20
	for i := range uint64(segments) {
		h.mustWrite(i*apart, 1)
	}
	h.mustDestage()
	h.run(0)
	most := int64(0)
	for i := range uint64(segments) {
		h.mustRead(i*apart, 1)
		most = max(most, int64(h.im.objs.Bytes())+h.im.objs.changeBytes)
	}
	if limit := h.shared.Map.Limit(); most > limit+limit/4 {
		t.Errorf("the map takes %d bytes where %d are allowed", most, limit)
	}
	if now := int64(h.im.objs.Bytes()) + h.im.objs.changeBytes; now != h.shared.Map.Used() {
		t.Errorf("the map takes %d bytes, %d are charged", now, h.shared.Map.Used())
	}
	for i := range uint64(segments) {
		h.mustRead(i*apart, 1)
	}
}
