package engine

import (
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestMovedWholeKeepsItsDelta: a segment that comes into memory after a checkpoint has
// begun to move what is stored whole is what it was, whether its delta can be read or not,
// and in whichever order the map objects get into the store.
func TestMovedWholeKeepsItsDelta(t *testing.T) {
	const segment = segmentSectors / 8
	st := faultstore.New(mem.New())
	h, id := attached(t, st, CreateOptions{Size: 4 * segment * 4096, ObjectSize: MinObjectSize}, NewShared(Limits{Map: 1 << 20}))
	h.im.objs.deltaFrom = 1
	write := func(i, n, value uint64) {
		for b := range n {
			h.mustWrite(i*segment+2*b, value)
		}
	}
	// The whole of segment 0 comes to be alone in its map object, and so does its delta.
	write(0, 300, 1)
	write(1, 700, 1)
	h.mustCheckpoint()
	h.mustWrite(0, 2)
	write(2, 100, 1)
	h.mustCheckpoint()
	write(1, 700, 2)
	write(2, 100, 2)
	h.mustCheckpoint()
	at := h.im.objs.places(0)
	for kind, p := range at {
		if o := h.im.objs.maps[h.im.objs.segment(segmentKind(kind), 0).object]; p.size == 0 || o.live != p.size || o.live >= o.size/2 {
			t.Fatalf("%v: %+v: this tests nothing", segmentKind(kind), o)
		}
	}
	if h.im.objs.resident.has(0) {
		h.dropSegment(0)
	}

	h.shared.Map.limit = 64 << 10 // so that the whole is enough for a map object
	h.mustWrite(3*segment, 1)
	h.mustDestage()
	h.run(time.Second)
	st.Inject(faultstore.If(faultstore.Method(faultstore.Swap), faultstore.Fault{Before: backend.ErrTemporary}))
	h.im.checkpoint.now(func(error) {})
	if r := h.im.checkpoint.running; r == nil || r.named || len(r.copied) < 2 {
		t.Fatalf("%+v: this tests nothing", r)
	}
	h.mustRead(0, 2)
	if !h.im.objs.resident.has(0) {
		t.Fatal("segment 0 is not in memory: this tests nothing")
	}
	delta := mapKey(id, at[kindDelta].object.at, at[kindDelta].object.part)
	first := mapKey(id, h.im.checkpoint.running.ref, 0)
	st.Inject(
		faultstore.If(faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key(delta)), faultstore.Fault{Before: backend.ErrTemporary}),
		faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key(first), faultstore.First(1)), faultstore.Fault{Before: backend.ErrTemporary}),
	)
	h.run(time.Minute)
	if h.im.checkpoint.running != nil {
		t.Fatal("the checkpoint does not end")
	}
	st.Inject()
	if h.im.objs.resident.has(0) {
		h.dropSegment(0)
	}
	h.mustRead(0, 2)
	h.mustRead(2, 1)
	h.mustClose()
	mustBeClean(t, st)
}

// TestDeltasKeepNoDeadMapObjects: segments that change a little before each checkpoint, and
// all over seldom and one at a time, do not keep a map object each.
func TestDeltasKeepNoDeadMapObjects(t *testing.T) {
	racetest.Slow(t)
	const segments, segment, blocks = 32, segmentSectors / 8, 100
	inner := mem.New()
	h, id := attached(t, inner, CreateOptions{Size: segments * segment * 4096, ObjectSize: MinObjectSize}, nil)
	h.im.objs.deltaFrom = 1
	write := func(i, n, value uint64) {
		for b := range n {
			h.mustWrite(i*segment+2*b, value)
		}
	}
	for i := range uint64(segments) {
		write(i, blocks, 1)
	}
	h.mustCheckpoint()
	for k := range uint64(segments) {
		for i := range uint64(segments) {
			write(i, 1, 2+k)
		}
		write(k, blocks, 2+k)
		h.mustCheckpoint()
	}
	live, size := 0, 0
	for _, o := range h.im.objs.maps {
		live += int(o.live)
		if o.live > 0 {
			size += int(o.size)
		}
	}
	if n := objectsOf(t, inner, id, "m"); size > 3*live {
		t.Errorf("%d map objects of %d bytes are kept for %d bytes of segments", n, size, live)
	}
	h.mustClose()
	mustBeClean(t, inner)
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(segments) {
		h.mustRead(i*segment, segments+1)
		h.mustRead(i*segment+2, 2+i)
	}
}

// TestCopiesCountTheirChanges: what a checkpoint has copied counts the changes that it keeps
// in memory when the list has gone on to another place.
func TestCopiesCountTheirChanges(t *testing.T) {
	const writes = 2000
	st := faultstore.New(mem.New())
	h, _ := attached(t, st, smallImage(), nil)
	h.im.cfg.CheckpointEvery = 1 << 20
	for n := range uint64(writes) {
		h.mustWrite(n*7%100, n)
		if n%8 == 7 {
			h.mustDestage()
		}
	}
	st.Inject(faultstore.If(faultstore.Method(faultstore.Swap), faultstore.Fault{Before: backend.ErrTemporary}))
	h.im.checkpoint.now(func(error) {})
	h.run(0)
	r, m := h.im.checkpoint.running, h.im.objs
	if r == nil || r.named || len(r.copied) != 1 || len(r.copied[0].changes) < 500 {
		t.Fatal("this tests nothing")
	}
	before, array := m.copyBytes, &m.changes[0].list[0]
	for n := 0; &m.changes[0].list[0] == array; n++ {
		h.mustWrite(uint64(n%100), 1)
		h.mustDestage()
	}
	if n := int64(len(r.copied[0].changes)) * changeBytes; m.copyBytes != before+n {
		t.Errorf("copies are said to take %d bytes more, and keep %d of changes that nothing else has", m.copyBytes-before, n)
	}
	copied := r.copied
	st.Inject()
	h.run(time.Minute)
	if copied[0].span != nil || copied[0].changes != nil {
		t.Error("what has been encoded is kept beside what has not")
	}
	if m.copyBytes != 0 || h.im.checkpoint.running != nil {
		t.Errorf("copies take %d bytes in the end", m.copyBytes)
	}
}

// TestManyDeltasInTime: the time that an operation on the store may take is not that of all
// which are read for a map object: these may be thousands.
func TestManyDeltasInTime(t *testing.T) {
	racetest.Slow(t)
	const segments, segment, timeout = 60, segmentSectors / 8, 500 * time.Millisecond
	st := faultstore.New(mem.New())
	h, _ := attached(t, st, CreateOptions{Size: segments * segment * 4096, ObjectSize: MinObjectSize}, nil)
	h.im.objs.deltaFrom, h.im.cfg.StoreTimeout, h.im.cfg.CheckpointEvery = 1, timeout, 1<<20
	for n := range uint64(200) {
		for i := range uint64(segments) {
			h.mustWrite(i*segment+2*(n*21%200), 1) // in no order, so that their places take some room
		}
	}
	h.mustCheckpoint()
	for n := range uint64(2) {
		for i := range uint64(segments) {
			h.mustWrite(i*segment, 2+n)
		}
		if n == 1 {
			slow := faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key("*/m/*"))
			st.Inject(faultstore.If(slow, faultstore.Fault{Delay: 2 * timeout / segments}))
		}
		h.mustCheckpoint()
	}
	for i := range uint32(segments) {
		if h.im.objs.segment(kindDelta, i).size == 0 {
			t.Fatalf("segment %d was written whole: its delta was not awaited", i)
		}
	}
}
