package engine

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// needsObject is the rule of holds.object for one point.
func (p *point) needsObject(number, died uint64) bool {
	return !p.Settled || number <= p.Object && (died == 0 || died > p.Object || number > p.base())
}

// needsMap is the rule of holds.mapObject for one point.
func (p *point) needsMap(written, died uint64) bool {
	return written <= p.base() && died > p.base()
}

// TestPointNeeds: which objects a state needs follows from three numbers.
func TestPointNeeds(t *testing.T) {
	p := point{Object: 20, Checkpoint: &checkpointRef{Object: 10, Epoch: 1}, Settled: true}
	sb := &superblock{Snapshots: []snapshot{{point: p}}}
	for _, tt := range []struct {
		number, died uint64
		want         bool
	}{
		{5, 0, true}, {5, 25, true}, {5, 20, false}, {5, 15, false}, // before the checkpoint
		{15, 0, true}, {15, 18, true}, {15, 30, true}, // to be replayed
		{20, 21, true}, {21, 0, false}, {21, 25, false}, // its last one, and after it
	} {
		if got := sb.holds().object(tt.number, tt.died); got != tt.want || p.needsObject(tt.number, tt.died) != tt.want {
			t.Errorf("object %d, died with %d: needed %v, want %v", tt.number, tt.died, got, tt.want)
		}
	}
	for _, tt := range []struct {
		written, died uint64
		want          bool
	}{{10, 12, true}, {4, 12, true}, {4, 10, false}, {12, 14, false}} {
		if got := sb.holds().mapObject(tt.written, tt.died); got != tt.want || p.needsMap(tt.written, tt.died) != tt.want {
			t.Errorf("map object of %d, replaced with %d: needed %v, want %v", tt.written, tt.died, got, tt.want)
		}
	}
}

// TestHolds: what many points keep is what each of them keeps.
func TestHolds(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 7))
		sb := new(superblock)
		for range rng.IntN(6) {
			p := point{Settled: true, Object: rng.Uint64N(40)}
			if base := rng.Uint64N(p.Object + 1); base > 0 {
				p.Checkpoint = &checkpointRef{Object: base}
			}
			if rng.IntN(2) == 0 {
				sb.Points = append(sb.Points, cutOff{point: p})
			} else {
				sb.Snapshots = append(sb.Snapshots, snapshot{point: p})
			}
		}
		if rng.IntN(16) == 0 {
			sb.Snapshots = append(sb.Snapshots, snapshot{})
		}
		h := sb.holds()
		for number := uint64(1); number < 42; number++ {
			for _, died := range []uint64{0, number, number + 1 + rng.Uint64N(10), number + rng.Uint64N(40)} {
				object, mapObject := false, false
				for p := range sb.states() {
					object = object || p.needsObject(number, died)
					mapObject = mapObject || died > 0 && p.needsMap(number, died)
				}
				if got := h.object(number, died); got != object {
					t.Fatalf("seed %d: object %d, died with %d: needed %v, want %v; %+v", seed, number, died, got, object, sb)
				}
				if got := h.mapObject(number, died); died > 0 && got != mapObject {
					t.Fatalf("seed %d: map object of %d, replaced with %d: needed %v, want %v; %+v", seed, number, died, got, mapObject, sb)
				}
			}
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
	for _, n := range append(slices.Clone(b.im.table.dead), b.im.table.kept...) {
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
