package engine

import (
	"context"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestEmptyPartsLeaveNoGap: a checkpoint of very many segments that a discard has emptied
// puts nothing for these. If it does not come to its end, the next start finds its map
// objects all the same.
func TestEmptyPartsLeaveNoGap(t *testing.T) {
	const segments = 2 * checkpointPuts
	st := faultstore.New(mem.New())
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: segments * segmentSectors * SectorSize, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	last := uint64(segments - 1)
	for i := range uint64(segments) {
		h.mustWrite(i*segmentSectors/8, 1)
	}
	h.mustDestage()
	h.im.checkpoint.now(func(error) {})
	h.run(time.Second)
	for i := range last {
		if err, ended, _ := h.do(Discard, i*segmentSectors/8, 0, 0); err != 0 || !ended {
			t.Fatal(err, ended)
		}
	}
	h.mustWrite(last*segmentSectors/8, 2)
	h.mustDestage()
	parts := objectsOf(t, st, id, "m")

	st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key("*/c/*")), faultstore.Fault{Before: backend.ErrTemporary}))
	h.im.stint.left = segments * stintCopy
	h.im.checkpoint.begin(nil)
	r := h.im.checkpoint.running
	if len(r.copied) != segments {
		t.Fatalf("%d segments are copied, want %d", len(r.copied), segments)
	}
	for k := range r.copied { // as if there were so many that each was a map object's last
		r.size += mapObjectSize - r.copied[k].size
		r.copied[k].size = mapObjectSize
	}
	h.run(time.Second)
	if objectsOf(t, st, id, "m") != parts+1 {
		t.Fatal("the checkpoint has put none of the map, or more than one object of it: this tests nothing")
	}
	h.disk.Kill()
	h.im.Abandon()
	st.Inject()
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.run(2 * leftoverGrace)
	h.mustRead(last*segmentSectors/8, 2)
	h.mustClose()
	mustBeClean(t, st)
}

// TestStoredInStints: a map object may have many thousands of segments. When it is in the
// store, each turn says so of a few of them only.
func TestStoredInStints(t *testing.T) {
	const segments = 500
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: segments * segmentSectors * SectorSize})
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(segments) {
		h.mustWrite(i*segmentSectors/8, i+1)
	}
	h.mustDestage()
	ended, before := false, len(h.im.objs.changes)
	if before != segments {
		t.Fatalf("%d segments have changed: this tests nothing", before)
	}
	h.im.checkpoint.now(func(err error) { ended = err == nil })
	for !ended {
		h.im.EndTurn()
		if !h.env.runJob() && !h.env.tellDone() && !h.disk.Step() && !h.env.fire() {
			t.Fatal("the checkpoint does not end")
		}
		now := len(h.im.objs.changes)
		if before-now > stintBase {
			t.Errorf("a turn says of %d segments that they are stored", before-now)
		}
		before = now
	}
	if n := objectsOf(t, st, id, "m"); n != 1 || before != 0 {
		t.Errorf("%d map objects, %d segments are not stored", n, before)
	}
	h.disk.Kill()
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(segments) {
		h.mustRead(i*segmentSectors/8, i+1)
	}
	h.mustClose()
	mustBeClean(t, st)
}
