package engine

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestPointNeeds: which objects a state needs follows from three numbers.
func TestPointNeeds(t *testing.T) {
	p := point{Object: 20, Checkpoint: &checkpointRef{Object: 10, Epoch: 1}, Settled: true}
	for _, tt := range []struct {
		number, died uint64
		want         bool
	}{
		{5, 0, true}, {5, 25, true}, {5, 20, false}, {5, 15, false}, // before the checkpoint
		{15, 0, true}, {15, 18, true}, {15, 30, true}, // to be replayed
		{20, 21, true}, {21, 0, false}, {21, 25, false}, // its last one, and after it
	} {
		if got := p.needsObject(tt.number, tt.died); got != tt.want {
			t.Errorf("object %d, died with %d: needed %v, want %v", tt.number, tt.died, got, tt.want)
		}
	}
	for _, tt := range []struct {
		written, died uint64
		want          bool
	}{{10, 12, true}, {4, 12, true}, {4, 10, false}, {12, 14, false}} {
		if got := p.needsMap(tt.written, tt.died); got != tt.want {
			t.Errorf("map object of %d, replaced with %d: needed %v, want %v", tt.written, tt.died, got, tt.want)
		}
	}
}

// TestCutOffLogStaysSalvageable: what a take-over has cut off is there after the
// image has been overwritten and cleaned many times, until it is forgotten; then
// its space goes.
func TestCutOffLogStaysSalvageable(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	const blocks = 200
	write := func(h *host, from uint64) {
		for i := range uint64(blocks) {
			h.mustWrite(i, from+i)
		}
		h.im.Destage(func(error) {})
		h.run(0)
	}
	write(a, 1000)
	a.mustWrite(7, 7777) // in alpha's log only
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	for round := range uint64(30) {
		write(b, 10000*(round+1))
	}
	if n := b.im.reaper.deleted; n == 0 {
		t.Fatal("nothing was deleted: this tests nothing")
	}
	salvaged, err := Salvage(ctx, a.disk, st, id, st, "saved", nil)
	if err != nil {
		t.Fatalf("salvage: %v", err)
	}
	c := newHost(t, "gamma", st, 3)
	if err := c.open(salvaged, false); err != nil {
		t.Fatal(err)
	}
	c.mustRead(7, 7777)
	c.mustRead(8, 1008)
	b.mustRead(8, 300008)

	var held []uint32
	for _, n := range b.im.table.dead {
		if uint64(n) <= b.im.super.sb.Points[0].Object {
			held = append(held, n)
		}
	}
	if len(held) == 0 {
		t.Fatal("nothing is held: this tests nothing")
	}
	if n, err := ForgetLogs(ctx, st, id, uuid.New()); n != 0 || err != nil {
		t.Errorf("another log: %d forgotten, %v", n, err)
	}
	if n, err := ForgetLogs(ctx, st, id, uuid.Nil); n != 1 || err != nil {
		t.Fatalf("%d forgotten, %v", n, err)
	}
	b.run(3 * leftoverGrace)
	write(b, 900000)
	b.run(time.Minute)
	for _, n := range held {
		if o := b.im.table.find(uint64(n)); o != nil {
			t.Errorf("an object that only the point needed is left: %+v", o)
		}
	}
	if data := objectsOf(t, st, id, "d"); data > 8 {
		t.Errorf("%d data objects for %d blocks", data, blocks)
	}
	if _, err := Salvage(ctx, a.disk, st, id, st, "late", nil); err == nil || !strings.Contains(err.Error(), "does not keep its state for this log any more") {
		t.Errorf("salvage of a log that was forgotten: %v", err)
	}
}

// TestForgottenBesideLeftovers: a point is given up while its owner removes what others
// have left, and the manifest that the point held cannot be deleted just then. It is not
// forgotten.
func TestForgottenBesideLeftovers(t *testing.T) {
	ctx := context.Background()
	st := faultstore.New(mem.New())
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustOverwrite(8)
	held := *a.im.checkpoint.last
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	for range 20 { // until the checkpoint is replaced
		b.mustWrite(1, 1)
		b.mustDestage()
		if slices.Contains(b.im.super.sb.Prev, held) {
			break
		}
	}
	if !slices.Contains(b.im.super.sb.Prev, held) {
		t.Fatal("the point's checkpoint has not been replaced: this tests nothing")
	}
	b.disk.Kill()
	b.again()
	if err := b.open(id, false); err != nil {
		t.Fatal(err)
	}
	b.run(time.Minute)
	key := manifestKey(id, held, 0)
	st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
		if op.Method == faultstore.Delete && op.Key == key {
			f.Before = backend.ErrTemporary
		}
		return f
	})
	if n, err := ForgetLogs(ctx, st, id, uuid.Nil); n != 1 || err != nil {
		t.Fatalf("%d forgotten, %v", n, err)
	}
	b.run(leftoverGrace)
	b.mustClose()
	st.Inject()
	b.again()
	if err := b.open(id, false); err != nil {
		t.Fatal(err)
	}
	b.run(3 * leftoverGrace)
	b.mustClose()
	mustBeClean(t, st)
}
