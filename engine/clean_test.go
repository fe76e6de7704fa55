package engine

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestVictimList compares the choice of victims with sorting all.
func TestVictimList(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		type victim struct {
			objectInfo
			score float64
		}
		var all []victim
		l := victimList{limit: 1 + rng.Uint64N(5000)}
		for n := range uint32(rng.IntN(2000)) {
			v := victim{objectInfo{number: n, live: 1 + rng.Uint32N(1000)}, rng.Float64()}
			if seed%4 == 0 {
				v.live = 1 // as many as there may be
			}
			all = append(all, v)
			l.offer(&v.objectInfo, v.score)
		}
		slices.SortFunc(all, func(a, b victim) int { return cmp.Compare(b.score, a.score) })
		var want []uint32
		total := uint64(0)
		for _, v := range all {
			if total += uint64(v.live); total > l.limit || len(want) == maxVictims {
				break
			}
			want = append(want, v.number)
		}
		var got []uint32
		for _, o := range l.victims() {
			got = append(got, o.number)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: victims %v, want %v", seed, got, want)
		}
	}
}

// TestVictimsAreAccepted: an object that is being entered into the map is in the table
// and no victim: what is moved out of it would be newer than what the cleaner's object
// may hold.
func TestVictimsAreAccepted(t *testing.T) {
	im, _ := newStill(t)
	im.table.add(objectInfo{number: 1, sectors: 100, live: 50})
	im.table.add(objectInfo{number: 2, sectors: 100, live: 10})
	im.accepted.object = 1
	s := im.clean.newSearch()
	im.stint.renew()
	if !im.clean.weighSome(s) {
		t.Fatal("two objects are too many for a turn")
	}
	if best := s.list.victims(); len(best) != 1 || best[0].number != 1 {
		t.Errorf("victims %+v, want object 1 alone", best)
	}
}

// TestCleaningRestoresOrder: what several writers have written side by side is in
// longer runs after it has been cleaned, so that it is read with fewer requests.
func TestCleaningRestoresOrder(t *testing.T) {
	racetest.Slow(t)
	st := mem.New()
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.im.cfg.SpaceRatio = MinSpaceRatio
	const streams, length = 8, 1024 // blocks, of which each object gets the same from each stream
	write := func(first int) {
		for i := range uint64(length) {
			for s := first; s < streams; s++ {
				h.mustWrite(uint64(s)*2*length+i, uint64(s)<<32|i+1)
			}
		}
		h.mustDestage()
	}
	runs := func() (n int) {
		for s := range uint64(streams / 2) {
			start := s * 2 * length * 8
			for at := start; at < start+length*8; n++ {
				e, ok := h.im.objs.Next(at, start+length*8)
				if !ok {
					t.Fatal("not all is mapped")
				}
				at = e.End()
			}
		}
		return n
	}
	write(0)
	before := runs()
	for range 3 {
		write(streams / 2) // half of each of the first objects dies
	}
	h.run(time.Minute)
	after := runs()
	t.Logf("%d runs before, %d after; %d blocks were moved", before, after, h.im.clean.moved/4096)
	if h.im.clean.moved < streams/2*length*4096/2 {
		t.Fatal("not even half was moved: this tests nothing")
	}
	if 3*after > 2*before {
		t.Errorf("%d runs before the cleaning, %d after it", before, after)
	}
	for s := range uint64(streams / 2) {
		for i := range uint64(length) {
			h.mustRead(s*2*length+i, s<<32|i+1)
		}
	}
}

// TestUnreadableVictims: objects that cannot be read, or of which it cannot be known what
// lives, while all else works, keep neither writes nor the cleaning of others waiting.
// They are cleaned when they can be read.
func TestUnreadableVictims(t *testing.T) {
	racetest.Slow(t)
	for _, tt := range []struct {
		name string
		key  func(imageKey) bool
		left int // objects of 16 that cannot be cleaned
	}{
		{"objects", func(k imageKey) bool { return k.kind == KindData && k.ref.Object <= 16 && k.ref.Object%2 == 1 }, 8},
		{"map", func(k imageKey) bool { return k.kind == KindMap }, 16},
	} {
		t.Run(tt.name, func(t *testing.T) { unreadableVictims(t, tt.key, tt.left) })
	}
}

func unreadableVictims(t *testing.T, unreadable func(imageKey) bool, want int) {
	st := faultstore.New(mem.New())
	h, id := attached(t, st, CreateOptions{Size: 256 << 20, ObjectSize: MinObjectSize}, nil)
	// Of each object an eighth is in another segment than the rest, and lives on.
	const objects, hot, cold, segment = 16, 224, 32, segmentSectors / 8
	n := uint64(0)
	for i := range uint64(objects) {
		for b := range uint64(hot) {
			n++
			h.mustWrite(i*hot+b, n)
		}
		for b := range uint64(cold) {
			n++
			h.mustWrite(3*segment+i*cold+b, n)
		}
	}
	h.mustClose()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustRead(0, 1) // so that this segment is in memory
	failed := 0
	st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
		if op.Method == faultstore.Get && unreadable(parseKey(id, op.Key)) {
			failed++
			f.Before = backend.ErrTemporary
		}
		return f
	})
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 20000 {
		n++
		r := &Request{Op: Write, Sector: rng.Uint64N(objects*hot) * 8, Sectors: 8, Buf: make([]byte, 4096)}
		ended := false
		r.Done = doneFunc(func(*Request) { ended = true })
		h.im.Submit(r)
		if h.run(0); !ended {
			h.run(time.Minute)
		}
		if !ended {
			t.Fatalf("write %d does not end: the log has %d bytes, the cleaner lags %v", i, h.im.log.Used(), h.im.clean.lags())
		}
		if i%128 == 0 {
			h.run(time.Second)
		}
	}
	left := func() (n int) {
		for i := range uint64(objects) {
			if o := h.im.table.find(i + 1); o != nil && o.live > 0 {
				n++
			}
		}
		return n
	}
	if k := left(); k != want || failed == 0 {
		t.Errorf("%d objects have not been cleaned, want %d; %d reads have failed", k, want, failed)
	}
	st.Inject()
	h.run(2 * cleanLater)
	if k := left(); k > 0 {
		t.Errorf("%d objects that can be read again have not been cleaned", k)
	}
}

// BenchmarkChoose is the search for victims among the objects of 1 TiB, in turns
// without requests.
func BenchmarkChoose(b *testing.B) {
	im, _ := newStill(b)
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range uint32(131072) {
		im.table.add(objectInfo{number: n + 1, sectors: 16384, live: 8000 + rng.Uint32N(8384)})
	}
	im.accepted.object = 131072
	turns := 0
	for b.Loop() {
		s := im.clean.newSearch()
		for im.stint.renew(); !im.clean.weighSome(s); im.stint.renew() {
			turns++
		}
		if len(im.clean.chosen(s)) == 0 {
			b.Fatal("no victims")
		}
		turns++
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(turns), "ns/turn")
}

// TestCleaningBesideDeadStore: images of a store that takes no objects keep those of
// another from nothing.
func TestCleaningBesideDeadStore(t *testing.T) {
	racetest.Slow(t)
	shared := NewShared(Limits{})
	down := false
	begin := func(name string, seed uint64, dies bool) (*host, func(int)) {
		st := faultstore.New(mem.New())
		id, err := Create(context.Background(), st, "disk", smallImage())
		if err != nil {
			t.Fatal(err)
		}
		h := newHost(t, name, st, seed)
		h.shared = shared
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
			r := h.im.clean.running
			if down = down || dies && r != nil && r.objects > 0; dies && down && op.Method == faultstore.Put {
				f.Before = backend.ErrTemporary
			}
			return f
		})
		rng := rand.New(rand.NewPCG(seed, 1))
		n := uint64(0)
		return h, func(writes int) {
			for range writes {
				n++
				r := &Request{Op: Write, Sector: rng.Uint64N(4000) * 8, Sectors: 8, Buf: make([]byte, 4096)}
				r.Done = doneFunc(func(*Request) {})
				h.im.Submit(r)
				h.run(0)
				if dies && down {
					break
				}
			}
		}
	}
	for i := range uint64(maxCleanings) {
		down = false
		h, write := begin("dead", 10+i, true)
		write(60000)
		h.run(time.Minute)
		if !down || h.im.clean.running == nil {
			t.Fatal("no cleaning is under way: this tests nothing")
		}
	}
	h, write := begin("alive", 1, false)
	write(60000)
	h.run(time.Hour)
	space, live := h.im.table.space, h.im.table.live
	t.Logf("space %d, live %d, moved %d", space, live, h.im.clean.moved)
	if h.im.clean.debt() > 0 {
		t.Errorf("nothing is cleaned: %.2f times what lives", float64(space)/float64(live))
	}
}

// TestCleaningBesideStuckReads: reads of one object that are never answered keep the
// cleaner from nothing else.
func TestCleaningBesideStuckReads(t *testing.T) {
	racetest.Slow(t)
	st := faultstore.New(mem.New())
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	for n := range uint64(256) {
		a.mustWrite(12000+n, n+1) // an object of its own
	}
	a.mustDestage()
	a.im.tail = tail{} // it is read from the store
	stuck := dataKey(id, 1, 1)
	st.Inject(faultstore.If(func(op faultstore.Op) bool { return op.Method == faultstore.Get && op.Key == stuck }, faultstore.Fault{Before: backend.ErrTemporary}))
	for n := range uint64(8) {
		a.im.Submit(&Request{Op: Read, Sector: (12000 + 30*n) * 8, Sectors: 8, Buf: make([]byte, 4096), Done: doneFunc(func(*Request) {})})
		a.run(700 * time.Millisecond)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		for range 100 {
			a.mustWrite(rng.Uint64N(4000), 1)
		}
		a.run(2 * time.Second)
	}
	if !a.im.stats.storeDown {
		t.Error("the reads are answered: this tests nothing")
	}
	if ratio := float64(a.im.table.space) / float64(a.im.table.live); ratio > 2 {
		t.Errorf("the objects take %.2f times what lives", ratio)
	}
}

// TestVictimWaitsWhileEntered: a part of the map that could not be read for a while, and
// that is being entered now, is waited for.
func TestVictimWaitsWhileEntered(t *testing.T) {
	st := faultstore.New(mem.New())
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.im.cfg.CheckpointEvery = 1 << 20
	h.storeScattered()
	for b := range uint64(4 * stintBase) {
		h.mustWrite(2*b, 1000)
	}
	h.mustDestage()
	h.dropSegment(0)

	failed := 0
	refused := faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key("*/m/*"))
	st.Inject(faultstore.If(func(op faultstore.Op) bool {
		fails := failed < cleanTries && refused(op)
		if fails {
			failed++
		}
		return fails
	}, faultstore.Fault{Before: backend.ErrTemporary}))
	victim := *h.im.table.find(1)
	h.im.clean.begin([]objectInfo{victim}, cleanSpace)
	for l := h.im.objs.loads[0]; l == nil || !l.entering; l = h.im.objs.loads[0] {
		if !h.disk.Step() && !h.env.runJob() && !h.env.tellDone() {
			h.env.fire()
		}
	}
	if failed != cleanTries || h.im.clean.running.looking.load == nil {
		t.Fatalf("%d reads have failed: this tests nothing", failed)
	}
	if h.im.clean.running.stuck() {
		t.Error("it is taken to be stuck")
	}
	h.im.clean.watch()
	if h.im.clean.later[victim.number] != 0 {
		t.Error("it is put off")
	}
	h.run(time.Second)
}

// TestVictimsAreFoundInBusyTurns: the search for victims comes to its end also if other
// things take all that each turn has time for.
func TestVictimsAreFoundInBusyTurns(t *testing.T) {
	im, _ := newStill(t)
	const objects = 1000
	for n := range uint32(objects) {
		im.table.add(objectInfo{number: n + 1, sectors: 16, live: 8})
	}
	im.accepted.object = objects
	im.stint.left = 0
	s := &search{list: victimList{limit: 1 << 20}}
	turns := 1
	for ; !im.clean.weighSome(s); turns++ {
		if turns > objects {
			t.Fatalf("in %d turns it has come to object %d", turns, s.next)
		}
	}
	if n := len(s.list.best); n != maxVictims {
		t.Errorf("%d victims after %d turns", n, turns)
	}
}

// TestDamageIsNotMoved: what lives of a damaged object is not moved with a new checksum
// that makes it look right: it stays where it is, and is an I/O error.
func TestDamageIsNotMoved(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	const blocks = 1000
	for n := range uint64(blocks) {
		h.mustWrite(n, n+1)
	}
	h.mustReopen(id)
	// The last block of an object is all that lives of it in the end.
	const bad = blocks / 2
	h.mustRead(bad, bad+1)
	e, ok := h.im.objs.Next(bad*8, bad*8+8)
	if !ok {
		t.Fatal("nothing is there")
	}
	o := h.im.table.find(refOf(e.Loc).seq())
	key := dataKey(id, uint64(o.number), uint64(o.epoch))
	off := o.headerBytes() + offsetOf(e.Loc)*SectorSize
	if err := damage(context.Background(), st, key, func(b []byte) int { b[off] ^= 1; return len(b) }); err != nil {
		t.Fatal(err)
	}
	for round := range uint64(3) {
		for n := range uint64(blocks) {
			if n%100 != 0 { // some of each object lives on
				h.mustWrite(n, (round+1)<<32|n+1)
			}
		}
		h.mustDestage()
	}
	h.run(time.Minute)
	switch o := h.im.table.find(uint64(o.number)); {
	case o == nil:
		t.Errorf("the cleaner has moved what is damaged")
	case h.im.clean.moved == 0 || o.live >= o.sectors/4:
		t.Fatalf("%d bytes were moved, the damaged object is %+v: this tests nothing", h.im.clean.moved, o)
	}
	if err, ended, v := h.do(Read, bad, 0, time.Second); !ended || err != syscall.EIO {
		t.Errorf("what is damaged reads as %d: %v, ended %v", v, err, ended)
	}
	for n := range uint64(blocks) {
		if n%100 != 0 {
			h.mustRead(n, 3<<32|n+1)
		} else if n != bad {
			h.mustRead(n, n+1)
		}
	}
	rep, err := checkImage(context.Background(), st, id, "mem:", CheckOptions{Deep: true})
	if err != nil || len(rep.Errors) != 1 || rep.Errors[0].Object != key {
		t.Errorf("check: %v, %+v", err, rep)
	}
}

// TestVictimIsReadAtOnce: what lives of an object, here and there, is read by one operation of
// the store beside that for its header, and verified, wherever it is. The memory for it is kept
// for the next one.
func TestVictimIsReadAtOnce(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		t.Run(fmt.Sprintf("damaged=%v", damaged), func(t *testing.T) { victimIsReadAtOnce(t, damaged) })
	}
}

func victimIsReadAtOnce(t *testing.T, damaged bool) {
	ctx := context.Background()
	inner := mem.New()
	st := faultstore.New(inner)
	h, id := attached(t, st, smallImage(), nil)
	// Of every period of blocks so many live, and more than cleanGap is dead.
	const blocks, period, living = MinObjectSize / 4096, 16, 10
	lives := func(n uint64) bool { return n%period < living }
	for n := range uint64(blocks) {
		h.mustWrite(n, n+1)
	}
	h.mustDestage()
	for n := range uint64(blocks) {
		if !lives(n) {
			h.mustWrite(n, 1<<32|n+1)
		}
	}
	h.mustDestage()
	h.im.tail = tail{}
	victim := *h.im.table.find(1)
	const alive = blocks / period * living
	if victim.live != alive*8 || h.im.clean.running != nil {
		t.Fatalf("%d blocks live of the victim, want %d: this tests nothing", victim.live/8, alive)
	}
	key := dataKey(id, 1, uint64(victim.epoch))
	const bad = blocks/2 + 1 // which lives
	if damaged {
		off := victim.headerBytes() + bad*4096
		if err := damage(ctx, inner, key, func(b []byte) int { b[off] ^= 1; return len(b) }); err != nil {
			t.Fatal(err)
		}
	}
	var read []int
	st.Inject(func(op faultstore.Op) faultstore.Fault {
		if op.Method == faultstore.Get && op.Key == key {
			read = append(read, op.Len)
		}
		return faultstore.Fault{}
	})
	h.im.clean.begin([]objectInfo{victim}, cleanSpace)
	h.run(time.Second)
	if want := []int{victim.headerBytes(), alive * 4096}; !slices.Equal(read, want) {
		t.Errorf("read %d bytes of the victim, want %d", read, want)
	}
	moved, buffers := uint64(alive*4096), 2 // what was read was in one, the new object in another
	if damaged {
		moved, buffers = 0, 1
	}
	if h.im.clean.moved != moved || h.im.clean.bad[1] != damaged {
		t.Errorf("%d bytes were moved, want %d; the victim is bad: %v", h.im.clean.moved, moved, h.im.clean.bad[1])
	}
	if free := h.im.shared.buffers.free; len(free) != buffers {
		t.Errorf("%d buffers are kept, want %d", len(free), buffers)
	}
	h.im.tail = tail{}
	for n := range uint64(blocks) {
		switch {
		case damaged && n == bad:
			if err, ended, v := h.do(Read, n, 0, time.Second); !ended || err != syscall.EIO {
				t.Errorf("what is damaged reads as %d: %v, ended %v", v, err, ended)
			}
		case lives(n):
			h.mustRead(n, n+1)
		default:
			h.mustRead(n, 1<<32|n+1)
		}
	}
}

// TestFadingVictimIsLeftAlone: a victim of which all that still lives is about to be replaced by
// what is in the log is no victim again until it has been, nor is anything else for its sake;
// unless so much is dead that what is in the log is moved as well.
func TestFadingVictimIsLeftAlone(t *testing.T) {
	h, _ := attached(t, mem.New(), smallImage(), nil)
	const blocks = MinObjectSize / 4096
	for n := range uint64(blocks) {
		h.mustWrite(n, n+1)
	}
	h.mustDestage()
	for n := range uint64(blocks / 2) {
		h.mustWrite(n, 1<<32|n+1)
	}
	h.mustDestage()
	h.im.tail = tail{}
	h.mustWrite(blocks-1, 2<<32) // stays in the log
	victim := *h.im.table.find(1)
	h.im.clean.begin([]objectInfo{victim}, cleanSpace)
	h.run(time.Second)
	if moved := h.im.clean.moved; moved != (blocks/2-1)*4096 || h.im.table.find(1).live != 8 {
		t.Fatalf("%d bytes were moved, %d sectors live of the victim: this tests nothing", moved, h.im.table.find(1).live)
	}
	look := func() (chosen bool, fading int64) {
		s := h.im.clean.newSearch()
		for i := range h.im.table.list {
			h.im.clean.weigh(s, &h.im.table.list[i])
		}
		return slices.ContainsFunc(s.list.victims(), func(o objectInfo) bool { return o.number == 1 }), s.fading
	}
	ratio := h.im.cfg.SpaceRatio
	if chosen, fading := look(); chosen || fading != blocks*8-int64(8*ratio) {
		t.Errorf("it is a victim again: %v; the debt is to fall by %d sectors", chosen, fading)
	}
	h.im.clean.bad[1] = true
	if chosen, fading := look(); chosen || fading != 0 {
		t.Errorf("what cannot be cleaned is a victim: %v; the debt, in which it is not, is to fall by %d sectors", chosen, fading)
	}
	h.im.clean.bad[1] = false
	h.im.table.space += 1 << 30 // now more is dead than may be
	if chosen, fading := look(); !chosen || fading != 0 {
		t.Errorf("although more is dead than may be it is a victim: %v; the debt is to fall by %d sectors", chosen, fading)
	}
	h.im.table.space -= 1 << 30
	h.mustDestage()
	if o := h.im.table.find(1); o != nil && o.live > 0 {
		t.Errorf("%d sectors live of what was replaced", o.live)
	}
	h.im.clean.search = h.im.clean.newSearch()
	h.im.clean.choose()
	if n := len(h.im.clean.fading); n != 0 {
		t.Errorf("%d objects are waited for that have been replaced", n)
	}
}
