package engine

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestCheckpointsAreIncremental: a checkpoint writes the parts of the map that have
// changed since the one before, and that goes when it is replaced.
func TestCheckpointsAreIncremental(t *testing.T) {
	put := 0
	inner := mem.New()
	st := faultstore.New(inner, func(op faultstore.Op) faultstore.Fault {
		if op.Method == faultstore.Put && strings.Contains(op.Key, "/m/") {
			put += op.Len
		}
		return faultstore.Fault{}
	})
	const segments, segment = 64, segmentSectors / 8
	h, id := attached(t, st, CreateOptions{Size: segments * segment * 4096, ObjectSize: MinObjectSize}, nil)
	checkpoint := func() (bytes int) {
		t.Helper()
		h.mustDestage()
		before := put
		err := errors.New("not ended")
		h.im.checkpoint.now(func(e error) { err = e })
		h.run(time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if n := objectsOf(t, inner, id, "c"); n != 1 {
			t.Errorf("%d manifests", n)
		}
		return put - before
	}
	for i := range uint64(segments) {
		for n := range uint64(16) {
			h.mustWrite(i*segment+2*n, i+1)
		}
	}
	checkpoint()
	whole := put
	const rounds = 100
	for round := range uint64(rounds) {
		i := round % segments
		h.mustWrite(i*segment+1, round+1)
		// Now and then what is left of map objects that are mostly out of date is moved.
		if n := checkpoint(); n == 0 || n > whole/2 {
			t.Errorf("round %d: %d bytes of the map are written for one block, %d for all segments", round, n, whole)
		}
	}
	if n := put - whole; n > rounds*whole/10 {
		t.Errorf("%d bytes of the map in %d checkpoints of one block each, %d in one of all segments", n, rounds, whole)
	}
	if n := objectsOf(t, inner, id, "m"); n > segments+2 {
		t.Errorf("%d map objects of %d segments", n, segments)
	}
	h.mustClose()
	if left := leftOver(t, inner, id); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(segments) {
		h.mustRead(i*segment+2, i+1)
		want := i + 1
		if i+segments < rounds {
			want += segments
		}
		h.mustRead(i*segment+1, want)
	}
}

// TestRecoveryIsBounded: a recovery reads the headers of no more data objects than the
// configuration says, and those that were being put; also if no checkpoint got through
// for as long as anything was written.
func TestRecoveryIsBounded(t *testing.T) {
	for name, pattern := range map[string]string{"checkpoints go through": "", "no map": "*/m/*", "no manifest": "*/c/*"} {
		t.Run(name, func(t *testing.T) {
			inner := mem.New()
			st := faultstore.New(inner)
			h, id := attached(t, st, smallImage(), nil)
			if pattern != "" {
				refused := faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key(pattern))
				st.Inject(faultstore.If(refused, faultstore.Fault{Before: backend.ErrTemporary}))
			}
			const writes, blocks = 203, 50
			for n := range uint64(writes) {
				h.mustWrite(n%blocks, n+1)
				h.im.Destage(func(error) {})
				h.run(time.Second)
			}
			every, window := uint64(h.im.cfg.CheckpointEvery), uint64(h.im.window)
			if n := h.im.accepted.object; (n >= writes) != (pattern == "") {
				t.Fatalf("%d objects are accepted: this tests nothing", n)
			}
			h.disk.Kill()
			h.im.Abandon()
			st.Inject()
			h.again()
			if err := h.open(id, false); err != nil {
				t.Fatal(err)
			}
			limit := every
			if pattern != "" {
				limit += window
			}
			t.Logf("%d headers read", h.im.recovered)
			if n := h.im.recovered; n == 0 || n > limit {
				t.Errorf("%d objects were replayed, of at most %d", n, limit)
			}
			for n := uint64(writes - blocks); n < writes; n++ {
				h.mustRead(n%blocks, n+1)
			}
		})
	}
}

// TestCheckpointOfBusyMap: all that a checkpoint has to write is about to change as soon
// as it has begun, as one object with writes anywhere brings about. It does not all go into
// one map object.
func TestCheckpointOfBusyMap(t *testing.T) {
	racetest.Slow(t)
	const segments = 128
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: segments * segmentSectors * SectorSize}, nil)
	h.mustWrite(1, 1)
	h.mustDestage()
	m := h.im.objs
	m.Replaced = nil // the table counts nothing of this
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range uint32(segments) {
		m.hold(i)
		changes := m.note(i, change{object: uint32(h.im.accepted.object), n: 1})
		changes.counted = len(changes.list)
		for s := segmentStart(i); s < segmentStart(i+1); s += blockSectors {
			m.Insert(s, blockSectors, refOfSeq(1+rng.Uint64N(1<<20)).loc(8*int(rng.Uint64N(2048))))
		}
	}
	c := &h.im.checkpoint
	c.begin(nil)
	for i := range uint32(segments) {
		c.touch(i)
	}
	h.run(time.Minute)
	if c.running != nil {
		t.Fatalf("the checkpoint does not come to its end: %+v", h.im.Stats())
	}
	err := st.List(context.Background(), id.String()+"/m/", func(key string) error {
		if is, err := backend.Store(st).Stat(context.Background(), key); err != nil || is.Size > 2*mapObjectSize {
			t.Errorf("map object %s has %d bytes, %v", key, is.Size, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestEmptyPartsLeaveNoGap: a checkpoint of very many segments that a discard has emptied
// puts nothing for these. If it does not come to its end, the next start finds its map
// objects all the same.
func TestEmptyPartsLeaveNoGap(t *testing.T) {
	const segments = 2 * checkpointPuts
	st := faultstore.New(mem.New())
	h, id := attached(t, st, CreateOptions{Size: segments * segmentSectors * SectorSize, ObjectSize: MinObjectSize}, nil)
	last := uint64(segments - 1)
	for i := range uint64(segments) {
		h.mustWrite(i*segmentSectors/8, 1)
	}
	h.mustCheckpoint()
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
	h, id := attached(t, st, CreateOptions{Size: segments * segmentSectors * SectorSize}, nil)
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

// TestCheckpointInTime: however small CheckpointEvery is, a checkpoint begins so early that
// the group of objects which makes it due, and may be accepted before it runs, does not
// break the bound.
func TestCheckpointInTime(t *testing.T) {
	all := []int{math.MaxInt}
	for every := 1; every < 100; every++ {
		all = append(all, every)
	}
	for _, every := range all {
		c := &checkpointer{im: &Image{cfg: Config{CheckpointEvery: every}}}
		group := maxGroup
		if group > every { // nothing is split then
			group = 1
		}
		if n := int(c.most()); n < 1 || n-1+group > every || every >= 12 && n != every-every/4 {
			t.Errorf("of at most %d objects %d come before a checkpoint begins, in groups of up to %d", every, n, group)
		}
	}
}

// TestCheckpointForEmptied: what the cleaner has emptied, and only a checkpoint tells the
// table of, is worth one, also if hardly anything is written meanwhile.
func TestCheckpointForEmptied(t *testing.T) {
	c := &checkpointer{im: &Image{object: 10, cfg: Config{CheckpointEvery: 1 << 20}}, last: &checkpointRef{5, 1}}
	c.im.accepted.object = c.last.Object
	table := &c.im.table
	for n := range uint32(100) {
		table.add(objectInfo{number: n + 1, sectors: 100, live: 50})
	}
	c.added = table.added
	for n := range uint64(8) {
		table.empty(table.find(n + 1))
	}
	if c.due() {
		t.Errorf("a checkpoint is due for %d sectors of %d", table.emptied, table.space)
	}
	table.empty(table.find(9))
	if !c.due() || table.movedSpace != 900 || table.movedLive != 450 || table.movedAlive != 9 {
		t.Errorf("none is due for %d sectors of %d (%d live, of %d objects)", table.movedSpace, table.space, table.movedLive, table.movedAlive)
	}
	c.maybe() // which nothing has been accepted for
	if c.running != nil {
		t.Error("a checkpoint has begun after which nothing was accepted: it has the name of the last one")
	}
	c.emptied = table.emptied // one has begun
	if c.due() {
		t.Error("another one is due for the same")
	}
	table.release(table.find(9), 50, 200)
	if table.movedSpace != 800 || table.movedLive != 400 || table.movedAlive != 8 || table.space != 9900 {
		t.Errorf("%d sectors, %d live, of %d objects are left", table.movedSpace, table.movedLive, table.movedAlive)
	}
}
