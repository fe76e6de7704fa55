package engine

import (
	"slices"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// dropSegment takes a segment out of memory.
func (h *host) dropSegment(i uint32) {
	h.t.Helper()
	m := h.im.objs
	k := slices.Index(m.ring, i)
	if k < 0 {
		h.t.Fatalf("segment %d is not in memory", i)
	}
	m.drop(k)
	if h.im.objs.here(i) {
		h.t.Fatalf("segment %d is in memory still", i)
	}
}

// storeScattered writes 100 blocks, each of them an extent of its own, and has the map
// stored.
func (h *host) storeScattered() {
	h.t.Helper()
	for b := range uint64(100) {
		h.mustWrite(2*b, b)
	}
	h.mustCheckpoint()
}

// TestChangesComeBack: a segment that has changed since the last checkpoint can be dropped
// at any time, and is had again as it was, also if nothing of it was ever stored; the
// table is told once what its changes take from other objects, and after a recovery as
// soon as the segment is in memory.
func TestChangesComeBack(t *testing.T) {
	for _, stored := range []bool{false, true} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustWrite(1, 1)
		h.mustWrite(2, 2)
		h.mustDestage()
		if stored {
			h.im.checkpoint.now(func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
			h.run(0)
			if h.im.objs.segment(kindWhole, 0).size == 0 {
				t.Fatal("nothing is stored")
			}
		}
		h.mustWrite(1, 3)
		h.mustDestage()
		h.mustWrite(3, 4)
		h.mustDestage()
		table := slices.Clone(h.im.table.list)
		same := func(what string) {
			t.Helper()
			h.mustRead(1, 3)
			h.mustRead(2, 2)
			h.mustRead(3, 4)
			if !slices.Equal(h.im.table.list, table) {
				t.Errorf("stored %v: %s the table is %+v, want %+v", stored, what, h.im.table.list, table)
			}
		}
		for range 3 {
			h.dropSegment(0)
			same("after it was dropped")
		}
		h.disk.Kill()
		h.again()
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		same("after a recovery")
		h.mustClose()
		mustBeClean(t, st)
	}
}

// TestDeadBeforeRecovery: an object that an owner before has deleted, for an object after
// the last checkpoint had taken the last of it, lives by the table of the next one until
// the map has been told so. Neither the scrub nor the cleaner takes it for one that is lost.
func TestDeadBeforeRecovery(t *testing.T) {
	racetest.Slow(t)
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	write := func(n uint64) {
		for b := range uint64(100) {
			h.mustWrite(b, n)
		}
		h.mustDestage()
	}
	write(1)
	h.im.checkpoint.now(func(error) {})
	h.run(time.Second)
	write(2)
	h.run(time.Second)
	if n := objectsOf(t, st, id, "d"); n != 1 || h.im.checkpoint.last == nil {
		t.Fatalf("%d data objects are left: this tests nothing", n)
	}
	h.disk.Kill()
	h.again()
	h.shared = NewShared(Limits{})
	h.shared.Scrub.Set(1 << 20)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	gone := h.im.table.find(1)
	if gone == nil || gone.live == 0 {
		t.Fatalf("the table knows already: %+v", h.im.table.list)
	}
	h.im.clean.begin([]objectInfo{*gone}, cleanSpace)
	h.run(time.Hour)
	if s := h.im.Stats().Scrub; s.Errors != 0 || s.Passes != 1 {
		t.Errorf("%+v, of an image that is whole", s)
	}
	if len(h.im.clean.bad) > 0 {
		t.Errorf("the cleaner takes %v for damaged", h.im.clean.bad)
	}
	h.mustRead(1, 2)
	h.run(time.Second)
	if o := h.im.table.find(1); o != nil {
		t.Errorf("its entry stays: %+v", *o)
	}
	// What is lost now is found.
	o := h.im.table.list[len(h.im.table.list)-1]
	if err := st.Delete(t.Context(), dataKey(id, uint64(o.number), uint64(o.epoch))); err != nil {
		t.Fatal(err)
	}
	h.run(25 * time.Hour)
	if s := h.im.Stats().Scrub; s.Errors != 1 {
		t.Errorf("%+v, of an image of which an object is lost", s)
	}
}

// TestCopiesAreBounded: while the store takes no part of the map, but is read and takes
// data, copies for the checkpoint take no more than their part of the memory; what has no
// copy is loaded again when the store takes it, and the checkpoint is the map as it was.
func TestCopiesAreBounded(t *testing.T) {
	const segments, segment = 64, segmentSectors / 8
	st := faultstore.New(mem.New())
	h, id := attached(t, st, CreateOptions{Size: segments * segment * 4096}, NewShared(Limits{Map: 24 << 10}))
	round := func(n uint64, blocks ...uint64) {
		t.Helper()
		for i := range uint64(segments) {
			for _, b := range blocks {
				h.mustWrite(i*segment+2*b, n*segments+i)
			}
		}
		h.mustDestage()
	}
	for b := range uint64(16) {
		round(1, b)
		h.im.checkpoint.now(func(error) {})
		h.run(time.Second)
	}
	if h.im.checkpoint.last == nil || h.im.objs.segment(kindWhole, segments-1).size == 0 {
		t.Fatal("nothing is stored")
	}

	refused := faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key("*/m/*"))
	st.Inject(faultstore.If(refused, faultstore.Fault{Before: backend.ErrTemporary}))
	round(2, 1, 2)
	h.im.checkpoint.now(func(error) {})
	h.run(time.Second)
	last := h.im.checkpoint.last
	round(3, 2, 3)
	most, late := int64(0), 0
	for range 2 {
		for i := range uint64(segments) {
			h.mustRead(i*segment, segments+i)
			h.mustRead(i*segment+4, 3*segments+i)
			most = max(most, h.im.objs.copyBytes)
			if r := h.im.checkpoint.running; r == nil || h.im.checkpoint.last != last {
				t.Fatal("no checkpoint is running: this tests nothing")
			} else if k := uint32(i); r.pending.has(k) && h.im.objs.resident.has(k) && h.im.checkpoint.late(k) {
				late++
			}
		}
	}
	if limit := h.shared.Map.Limit()/copiesPart + 1024; most == 0 || most > limit || late == 0 {
		t.Errorf("copies take up to %d bytes, of at most %d; %d times a segment in memory was late", most, limit, late)
	}

	st.Inject()
	h.run(time.Minute)
	if r := h.im.checkpoint.running; r != nil || h.im.checkpoint.last == last || h.im.objs.copyBytes != 0 {
		t.Fatalf("the checkpoint does not end; copies take %d bytes", h.im.objs.copyBytes)
	}
	same := func() {
		t.Helper()
		for i := range uint64(segments) {
			for b, n := range []uint64{1, 2, 3, 3, 1, 1} {
				h.mustRead(i*segment+2*uint64(b), n*segments+i)
			}
		}
	}
	same()
	h.disk.Kill()
	h.im.Abandon()
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	same()
	h.mustClose()
	mustBeClean(t, st)
}

// TestEnteredInStints: a segment with very many changes comes into memory over many turns,
// and is right, also when a checkpoint stores it anew meanwhile.
func TestEnteredInStints(t *testing.T) {
	const writes, blocks = 3000, 100
	st := mem.New()
	h, _ := attached(t, st, smallImage(), nil)
	h.im.cfg.CheckpointEvery = 1 << 20
	for n := range uint64(writes) {
		h.mustWrite(n*7%blocks, n)
		if n%8 == 7 {
			h.mustDestage()
		}
	}
	c := h.im.objs.changes[0]
	if c == nil || len(c.list) < writes {
		t.Fatal("the changes are not there: this tests nothing")
	}
	// enters has the segment loaded, and calls also in the midst of it.
	enters := func(least int, also func()) {
		t.Helper()
		h.dropSegment(0)
		ended, turns := false, 0
		h.im.withSegment(0, func(err error) { ended = err == nil })
		for ; !ended && turns < writes; turns++ {
			before := c.entered
			h.im.stint.renew()
			h.env.fire()
			if n := c.entered - before; n > stintBase {
				t.Errorf("%d changes are entered in a turn, want %d at most", n, stintBase)
			}
			if turns == writes/stintBase/2 {
				also()
			}
		}
		if turns < least {
			t.Errorf("the segment came in %d turns", turns)
		}
		if !ended {
			t.Error("the segment does not come")
		}
	}
	same := func() {
		t.Helper()
		for n := uint64(writes - blocks); n < writes; n++ {
			h.mustRead(n*7%blocks, n)
		}
	}
	enters(writes/stintBase, func() {})
	same()
	enters(0, func() {
		h.im.checkpoint.now(func(error) {})
		h.run(0)
	})
	same()
	h.mustClose()
	mustBeClean(t, st)
}

// TestCleanerGoesOnWithoutMemory: each segment that the cleaner has had loaded goes again
// at once, and entering its changes is all that a turn has time for. It comes to its end
// nevertheless.
func TestCleanerGoesOnWithoutMemory(t *testing.T) {
	st := mem.New()
	h, _ := attached(t, st, smallImage(), NewShared(Limits{}))
	h.im.cfg.CheckpointEvery = 1 << 20
	h.storeScattered()
	for n := range uint64(3) {
		for b := range uint64(2 * stintBase) {
			h.mustWrite(2*(3*b+n), 1000+n)
		}
		h.mustDestage()
	}
	h.im.checkpoint.running = &runningCheckpoint{final: true, pending: newBitset(1)} // there is no other one
	h.shared.Map.limit = 1
	h.im.objs.evict()
	victim := h.im.table.find(1)
	if victim == nil || victim.live == 0 || h.im.objs.resident.has(0) || len(h.im.objs.changes[0].list) != 6*stintBase {
		t.Fatalf("victim %+v, changes %+v: this tests nothing", victim, h.im.objs.changes[0])
	}
	h.im.clean.begin([]objectInfo{*victim}, cleanSpace)
	loaded := h.im.objs.loaded
	r := h.im.clean.running
	for turns := 0; len(r.ahead) > 0 || r.looking != nil; turns++ {
		if turns == 10000 {
			t.Fatalf("after %d turns and %d loads the cleaner looks at %+v", turns, h.im.objs.loaded-loaded, r.looking)
		}
		if !h.disk.Step() && !h.env.runJob() && !h.env.tellDone() {
			h.env.fire()
		}
		h.im.EndTurn()
	}
	if r.fetching != 1 || h.im.objs.loaded == loaded {
		t.Errorf("after %d loads the victim has not been looked through", h.im.objs.loaded-loaded)
	}
	h.im.checkpoint.running = nil
	for b := range uint64(6 * stintBase) {
		h.mustRead(2*b, 1000+b%3)
	}
}

// TestObjectsAreAcceptedBesideLoads: clients read where the map is not in memory, and what
// is entered for them takes all that a turn has time for, turn after turn. An object is
// accepted nevertheless.
func TestObjectsAreAcceptedBesideLoads(t *testing.T) {
	const segments, segment, changes, writes = 64, segmentSectors / 8, stintBase, 300
	st := faultstore.New(mem.New())
	h, _ := attached(t, st, CreateOptions{Size: segments * segment * 4096}, nil)
	h.im.cfg.CheckpointEvery = 1 << 20
	for i := range uint64(segments) {
		h.mustWrite(i*segment, 1)
	}
	h.mustCheckpoint()
	for n := range uint64(segments * changes) {
		h.mustWrite(n%segments*segment+2*(n/segments), 2)
	}
	h.mustDestage()

	reading, next := 0, uint64(0)
	turn := func() {
		for i := range uint32(segments) {
			if h.im.objs.resident.has(i) {
				h.dropSegment(i) // others need the memory
			}
		}
		for ; reading < segments; reading++ {
			next++
			r := &Request{Op: Read, Sector: next % segments * segmentSectors, Sectors: 8, Buf: make([]byte, 4096)}
			r.Done = doneFunc(func(*Request) { reading-- })
			h.im.Submit(r)
		}
		for h.disk.Step() || h.env.runJob() {
		}
		for n := len(h.env.done); n > 0; n-- {
			h.env.tellDone()
		}
		for n := len(h.env.timers); n > 0 && h.env.fireDue(); n-- {
		}
		h.im.EndTurn()
		h.env.now += time.Millisecond
	}
	refused := faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key("*/d/*"))
	st.Inject(faultstore.If(refused, faultstore.Fault{Before: backend.ErrTemporary}))
	for n := range uint64(writes) {
		r := &Request{Op: Write, Sector: (n%segments*segment + 2*(changes+n/segments)) * 8, Sectors: 8, Buf: make([]byte, 4096)}
		r.Done = doneFunc(func(*Request) {})
		fill(r.Buf, 3, r.Sector)
		h.im.Submit(r)
	}
	accepted := false
	h.im.Destage(func(error) { accepted = true })
	for range 100 {
		turn()
	}
	st.Inject()
	turns := 0
	for ; !accepted && turns < 10000; turns++ {
		turn()
	}
	if turns > 100 { // some of them until it is put
		t.Errorf("an object of %d extents is accepted in %d turns", writes, turns)
	}
}
