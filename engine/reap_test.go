package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// mustOverwrite writes, destages and checkpoints one block of the first segment,
// so that each time the map object of the time before dies.
func (h *host) mustOverwrite(times uint64) {
	h.t.Helper()
	for n := range times {
		h.mustWrite(1, n+1)
		h.mustDestage()
		err := errors.New("not ended")
		h.im.checkpoint.now(func(e error) { err = e })
		h.run(0)
		if err != nil {
			h.t.Fatal(err)
		}
	}
}

// leftOver returns what of an image that nobody has attached is not needed.
func leftOver(t *testing.T, st backend.Store, id uuid.UUID) []string {
	t.Helper()
	rep, err := checkImage(context.Background(), st, id, "mem:", CheckOptions{Deep: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range rep.Errors {
		t.Error(f)
	}
	return append(rep.Dead, rep.Pending...)
}

// TestDeadMapObjectGoesAfterCrash: a process that dies between publishing a
// checkpoint and removing the map objects that it has replaced leaves these to the
// next start, although nothing is written any more and so no checkpoint follows.
// Seed 229406 of the simulation found it.
func TestDeadMapObjectGoesAfterCrash(t *testing.T) {
	inner := mem.New()
	st := faultstore.New(inner)
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustOverwrite(2)
	removal := faultstore.All(faultstore.Method(faultstore.Delete), faultstore.Key("*/m/*"))
	st.Inject(faultstore.If(removal, faultstore.Fault{Before: backend.ErrTemporary}))
	h.mustWrite(1, 9)
	h.mustCheckpoint()
	if !h.im.checkpoint.removing {
		t.Fatal("nothing is being removed: this tests nothing")
	}
	h.im.Abandon()
	h.run(0)
	st.Inject()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	before := h.im.checkpoint.last
	h.mustClose()
	if h.im.checkpoint.last != before {
		t.Fatal("there was another checkpoint: this tests nothing")
	}
	if left := leftOver(t, inner, id); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestGarbageKeepsNobody: something dead that cannot be deleted, all else can, keeps the
// image neither from writes nor from being closed; it is known as dead, and the next
// start removes it.
func TestGarbageKeepsNobody(t *testing.T) {
	for _, kind := range []string{"/c/", "/d/", "/m/"} {
		t.Run(kind, func(t *testing.T) {
			inner := mem.New()
			id := newImageIn(t, inner)
			st := faultstore.New(inner.Handle())
			h := newHost(t, "alpha", st, 1)
			if err := h.open(id, false); err != nil {
				t.Fatal(err)
			}
			stuck := ""
			st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
				if op.Method == faultstore.Delete && strings.Contains(op.Key, kind) && (stuck == "" || stuck == op.Key) {
					stuck, f.Before = op.Key, backend.ErrTemporary
				}
				return f
			})
			for n := range uint64(100) {
				h.mustWrite(n%4, n+1)
				err := errors.New("not ended")
				h.im.Destage(func(e error) { err = e })
				if h.run(time.Minute); err != nil {
					t.Fatalf("write %d is not destaged: %v, %s", n, err, h.im.Stats().LastStoreError)
				}
			}
			err := errors.New("not ended")
			h.im.Close(func(e error) { err = e })
			if h.run(time.Minute); err != nil {
				t.Fatalf("close: %v; the image is %v", err, h.im.state)
			}
			rep, err := checkImage(context.Background(), inner, id, "mem:", CheckOptions{Deep: true})
			if err != nil {
				t.Fatal(err)
			}
			if garbage := slices.Concat(rep.Dead, rep.Stale); len(rep.Errors) > 0 || !slices.Contains(garbage, stuck) || len(garbage) > 2 {
				t.Errorf("%s is stuck; garbage %v, errors %v", stuck, garbage, rep.Errors)
			}
			st.Inject()
			if err := h.open(id, false); err != nil {
				t.Fatal(err)
			}
			h.run(3 * leftoverGrace)
			h.mustClose()
			if rep, err = checkImage(context.Background(), inner, id, "mem:", CheckOptions{Deep: true}); err != nil {
				t.Fatal(err)
			}
			if left := slices.Concat(rep.Dead, rep.Stale, rep.Pending); len(rep.Errors)+len(left) > 0 {
				t.Errorf("left over: %v, errors %v", left, rep.Errors)
			}
		})
	}
}

// TestDamagedSegmentStays: a segment of the map that is damaged in the store, and that
// nobody reads or writes, keeps no checkpoint from its end when what else is in its map
// object has been written anew: it stays there, and the others are moved. From memory,
// where it is as it was, it is moved as well.
func TestDamagedSegmentStays(t *testing.T) {
	for _, inMemory := range []bool{false, true} {
		t.Run(fmt.Sprintf("in memory %v", inMemory), func(t *testing.T) { damagedSegmentStays(t, inMemory) })
	}
}

func damagedSegmentStays(t *testing.T, inMemory bool) {
	ctx := context.Background()
	st := mem.New()
	id, err := Create(ctx, st, "disk", CreateOptions{Size: 1 << 30, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	const segment = segmentSectors / 8 // blocks
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(8) {
		for n := range uint64(20) {
			h.mustWrite(i*segment+2*n, i+1)
		}
	}
	h.mustCheckpoint()
	if !inMemory {
		h.mustClose()
	}
	if len(h.im.objs.maps) != 1 || h.im.checkpoint.since() > 0 {
		t.Fatal("not one map object: this tests nothing")
	}
	m := h.im.objs.maps[0]
	key := mapKey(id, m.at, m.part)
	if err := damage(ctx, st, key, flipLast); err != nil { // of segment 7
		t.Fatal(err)
	}
	if !inMemory {
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
	}
	for n := range uint64(50) {
		for i := range uint64(6) {
			h.mustWrite(i*segment+1+2*(n%20), n+1)
		}
		h.mustDestage()
	}
	h.mustRead(6*segment, 7)
	h.mustClose()
	moved := func(i uint32) bool {
		o := h.im.objs.place(kindWhole, i).object
		return o.at != m.at || o.part != m.part
	}
	if !moved(6) || moved(7) != inMemory {
		t.Errorf("moved: segment 6 %v, the damaged one %v", moved(6), moved(7))
	}
	rep, err := checkImage(ctx, st, id, "mem:", CheckOptions{Deep: true})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(rep.Errors); !inMemory && (n != 1 || rep.Errors[0].Object != key) || inMemory && n > 0 {
		t.Errorf("check finds %v", rep.Errors)
	}
}

// TestPartsGoAfterInterruption: the parts of a checkpoint that was never published, of
// which a few may be missing, all go, wherever the removal was interrupted.
func TestPartsGoAfterInterruption(t *testing.T) {
	ctx := context.Background()
	const parts = 12
	for deletes := range parts {
		st := faultstore.New(mem.New())
		key := func(part int) string { return mapKey(uuid.UUID{1}, checkpointRef{1, 1}, uint32(part)) }
		for part := range parts {
			if part%checkpointPuts == 0 || part%checkpointPuts == 3 {
				if err := st.Put(ctx, key(part), []byte("part")); err != nil {
					t.Fatal(err)
				}
			}
		}
		st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Delete), faultstore.AfterFirst(deletes)), faultstore.Fault{Before: backend.ErrTemporary}))
		if err := deleteParts(ctx, st, key, checkpointPuts); !errors.Is(err, backend.ErrTemporary) {
			t.Fatalf("interrupted after %d deletes: %v", deletes, err)
		}
		st.Inject()
		if err := deleteParts(ctx, st, key, checkpointPuts); err != nil {
			t.Fatal(err)
		}
		if err := st.List(ctx, "", func(key string) error { return errors.New(key) }); err != nil {
			t.Errorf("interrupted after %d deletes: left over: %v", deletes, err)
		}
	}
}

// TestPartsEnd: what the store refuses to tell of may be there, and so may any number of
// others where that is as many in a row as the search is to go over.
func TestPartsEnd(t *testing.T) {
	for parts, want := range map[string]int{ // + is there, ? refused; -1: it cannot be told
		"":             0,
		"+":            1,
		"---+":         4,
		"----+":        0,
		"?":            1,
		"???":          3,
		"???+":         4,
		"?---?---+":    9,
		"???-???":      7,
		"????":         -1,
		"+-+????+":     -1,
		"+++----????+": 3,
	} {
		st := faultstore.New(mem.New(), func(op faultstore.Op) (f faultstore.Fault) {
			if k := parseKey(uuid.UUID{1}, op.Key); op.Method == faultstore.Stat && k.part < uint64(len(parts)) && parts[k.part] == '?' {
				f.Before = backend.ErrPermanent
			}
			return f
		})
		key := func(part int) string { return mapKey(uuid.UUID{1}, checkpointRef{1, 1}, uint32(part)) }
		for part, x := range parts {
			if x == '+' {
				if err := st.Put(t.Context(), key(part), []byte("part")); err != nil {
					t.Fatal(err)
				}
			}
		}
		end, err := partsEnd(t.Context(), st, key, checkpointPuts)
		switch {
		case want < 0 && (err == nil || errors.Is(err, backend.ErrPermanent)):
			t.Errorf("%q: %d, %v, want an error that is not for good", parts, end, err)
		case want >= 0 && (end != want || err != nil):
			t.Errorf("%q: %d, %v, want %d", parts, end, err, want)
		}
	}
}

// TestForgottenPointsMapObjectsGo: map objects that only a point needed go when the
// log that it stands for is forgotten, also while the image is idle.
func TestForgottenPointsMapObjectsGo(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustOverwrite(1)
	a.mustWrite(7, 7) // in alpha's log only
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.mustOverwrite(2)
	if n := objectsOf(t, st, id, "m"); n != 2 {
		t.Fatalf("%d map objects, not the last one and the point's: this tests nothing", n)
	}
	if n, err := ForgetLogs(context.Background(), st, id, uuid.Nil); n != 1 || err != nil {
		t.Fatalf("%d forgotten, %v", n, err)
	}
	b.run(3 * leftoverGrace)
	if n := objectsOf(t, st, id, "m"); n != 1 {
		t.Errorf("%d map objects of an image of one block", n)
	}
	b.mustClose()
	if left := leftOver(t, st, id); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestReapLooksNoFurther: of very many dead objects the reaper looks at those that it is
// about to delete.
func TestReapLooksNoFurther(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustOverwrite(8)
	const last = 1000
	dead := &a.im.table.dead
	first := uint32(a.im.accepted.object) + 1
	for n := first; n < first+last; n++ {
		a.im.table.add(objectInfo{number: n, epoch: 1, sectors: 8, header: 1, died: n})
	}
	*dead = append(*dead, first+last) // whoever looks at it finds it gone
	a.im.checkpoint.last.Object = uint64(first + last)
	a.im.reap()
	if !slices.Contains(*dead, first+last) {
		t.Errorf("the reaper has looked at all of %d dead objects to delete %d", last, reapBatch*reapJobs)
	}
	a.run(time.Second)
	a.im.reap()
	if n := len(*dead); n > 0 || a.im.reaper.deleted < last {
		t.Errorf("%d dead objects are left, %d were deleted", n, a.im.reaper.deleted)
	}
}
