package engine

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

func TestWorkMemory(t *testing.T) {
	m := workMemory{limit: 10}
	own := map[string]int64{}
	for i, step := range []struct {
		image string
		n     int64 // taken, or given back
		ok    bool
	}{
		{"a", 4, true}, {"a", 4, true}, {"a", 4, false},
		{"b", 4, true},                   // its first
		{"b", 1, false},                  // all is used
		{"a", -4, true}, {"a", 4, false}, // half is b's
		{"b", 1, true}, {"b", 1, false},
		{"a", -4, true}, {"a", 4, true}, {"a", 1, true}, {"a", 1, false},
		{"b", -4, true}, {"b", -1, true}, {"a", 5, true},
		{"c", 99, true}, {"c", -99, true}, {"a", -10, true},
	} {
		if step.n < 0 {
			m.give(own[step.image], -step.n)
		} else if ok := m.take(own[step.image], step.n); ok != step.ok {
			t.Fatalf("step %d: %s has %d and takes %d: %t", i, step.image, own[step.image], step.n, ok)
		}
		if step.ok {
			own[step.image] += step.n
		}
	}
	if m.used != 0 || m.images != 0 {
		t.Errorf("%d bytes of %d images are left", m.used, m.images)
	}
}

// TestObjectsShareMemory: while the store is away, images keep as many objects at
// hand as their memory allows, one at least; all of it is free again at the end,
// also that of an image that ends with its objects unsent.
func TestObjectsShareMemory(t *testing.T) {
	down := faultstore.NewSwitch()
	st := faultstore.New(mem.New(), faultstore.If(faultstore.All(down.On, faultstore.Method(faultstore.Put)), faultstore.Fault{Before: backend.ErrTemporary}))
	shared := NewShared(Limits{Destage: 4 * (MinObjectSize + 128<<10)})
	var hosts []*host
	for i, name := range []string{"alpha", "beta", "gamma"} {
		h, _ := attachedAs(t, st, name, name, uint64(i), smallImage(), shared)
		hosts = append(hosts, h)
	}
	down.Set(true)
	for i, want := range []int{4, 1, 1} {
		h := hosts[i]
		for n := uint64(0); n < 6*MinObjectSize/4096; n++ {
			h.mustWrite(n, n+1)
		}
		h.run(2 * burstPause) // or they are held back
		built := 0
		for _, b := range h.im.queue {
			if b.buf != nil {
				built++
			}
		}
		if built != want || len(h.im.queue) < 5 {
			t.Errorf("%s: %d objects of %d are at hand, want %d", h.name, built, len(h.im.queue), want)
		}
	}
	hosts[2].im.Abandon()
	down.Set(false)
	for _, h := range hosts[:2] {
		h.run(time.Minute)
		h.mustDestage()
		h.mustRead(5, 6)
	}
	if m := &shared.destage; m.used != 0 || m.images != 0 {
		t.Errorf("%d bytes of %d images are left", m.used, m.images)
	}
}

// TestReadsShareMemory: while a store hangs, images have as many reads of it under way as
// their memory allows, one at least, and the others wait; all of them end when it is back,
// and the memory is free then, also that of an image which ended meanwhile.
func TestReadsShareMemory(t *testing.T) {
	const block, reads = 4096, 12
	const each = block + headerMemory*objectAlign // none of the checksums is at hand
	st := mem.New()
	shared := NewShared(Limits{Reads: 4 * each})
	var hosts []*host
	for i, name := range []string{"alpha", "beta", "gamma"} {
		h, id := attachedAs(t, st, name, name, uint64(i), smallImage(), shared)
		for n := range uint64(reads) {
			h.mustWrite(n, n+1)
		}
		h.mustReopen(id)
		h.mustRead(100, 0) // the map is there
		hosts = append(hosts, h)
	}
	told := make([]int, len(hosts))
	for i, want := range []int{4, 1, 1} {
		im := hosts[i].im
		for n := range uint64(reads) {
			im.streams = streams{} // what is read ahead has memory of its own
			im.Submit(&Request{Op: Read, Sector: n * 8, Sectors: 8, Buf: make([]byte, block), Done: doneFunc(func(r *Request) {
				if got, err := stamp(r.Buf, r.Sector); i < 2 && (r.Err != 0 || err != nil || got != n+1) {
					t.Errorf("%s: block %d is %d, %v, %v", hosts[i].name, n, got, err, r.Err)
				}
				told[i]++
			})})
		}
		if n := len(im.slow[slowStore].waiting); im.reading != want || im.readMemory != int64(want)*each || n != reads-want {
			t.Errorf("%s: %d reads under way have %d bytes, %d wait; want %d", hosts[i].name, im.reading, im.readMemory, n, want)
		}
	}
	hosts[2].im.Abandon()
	if shared.reads.used != 5*each {
		t.Errorf("%d bytes are in use after an image has ended", shared.reads.used)
	}
	for i, h := range hosts {
		if h.run(0); told[i] != reads {
			t.Errorf("%s: %d of %d reads have ended", h.name, told[i], reads)
		}
	}
	if m := &shared.reads; m.used != 0 || m.images != 0 {
		t.Errorf("%d bytes of %d images are left", m.used, m.images)
	}
}

// TestBudgetHand: the hand asks one member at a time, passes over those that have
// nothing, and stops when the budget is kept, when nobody has anything to give, or
// when the one that it waits for has left.
func TestBudgetHand(t *testing.T) {
	b := &Budget{limit: 10}
	a, c, d := &member{}, &member{}, &member{}
	for _, m := range []*member{a, c, d} {
		b.join(m)
	}
	a.held.Store(1)
	d.held.Store(1)
	b.used.Store(10)
	if m := b.take(); m != nil {
		t.Error("asked although the budget is kept")
	}
	b.used.Store(11)
	if m := b.take(); m != a {
		t.Error("did not ask the first")
	}
	if m := b.take(); m != nil {
		t.Error("asked two members at a time")
	}
	if m := b.gave(true); m != d {
		t.Error("did not pass over the one that has nothing")
	}
	b.used.Store(10)
	if m := b.gave(false); m != nil {
		t.Error("went on although the budget is kept")
	}
	b.used.Store(11)
	if m := b.take(); m != d {
		t.Error("did not go on where it had stopped")
	}
	b.leave(d)
	if m := b.take(); m != a {
		t.Error("waits for one that has left")
	}
	for asked := 1; b.gave(true) != nil; asked++ {
		if asked > 4 {
			t.Fatal("goes round for ever where nobody gives")
		}
	}
	a.held.Store(0)
	if m := b.take(); m != nil {
		t.Error("asked a member that has nothing")
	}
	b.leave(c)
	b.leave(a)
}

// TestImagesShareMapMemory: what an idle image holds of its map goes when another
// one needs memory, and what is in use stays.
func TestImagesShareMapMemory(t *testing.T) {
	racetest.Slow(t)
	const limit = 8 << 20
	shared := NewShared(Limits{Map: limit})
	var images [3]opened
	var stores [3]*hugeStore
	for i := range images {
		stores[i] = newHugeStore(t, 1<<40)
		images[i] = openHugeIn(t, stores[i], shared, simdisk.New(writelog.MinSize, rand.New(rand.NewPCG(1, 2))))
	}
	idle, small, large := &images[0], &images[1], &images[2]
	turns := func() { // of those that are not being read
		for i := range images {
			for images[i].env.step() {
				images[i].im.EndTurn()
			}
		}
	}
	some := func(i int) uint64 { return uint64(i%8)*segmentSectors + 64 }
	idle.readAll(t, 6000, func() {})
	held := idle.im.objs.charged
	if held < limit*9/10 {
		t.Fatalf("the first image holds %d of %d bytes: this tests nothing", held, limit)
	}
	small.read(t, 400, some, turns)
	if n := stores[1].mapGets; n > 8 {
		t.Errorf("%d map loads for 400 reads of 8 segments beside an idle image", n)
	}
	highest := int64(0)
	large.readAll(t, 6000, func() {
		highest = max(highest, shared.Map.Used())
		turns()
		small.read(t, 1, some, turns)
	})
	if highest > limit+limit/budgetSlack+1<<20 {
		t.Errorf("maps took %d bytes of %d", highest, limit)
	}
	if now := idle.im.objs.charged; now > held/10 {
		t.Errorf("the idle image still holds %d bytes of %d", now, held)
	}
	if n := stores[1].mapGets; n > 24 {
		t.Errorf("%d map loads for reads of 8 segments over and over beside one that reads everywhere", n)
	}
	for i := range images {
		images[i].im.Abandon()
	}
	if used := shared.Map.Used(); used != 0 {
		t.Errorf("%d bytes are still charged at the end", used)
	}
}

// TestReadOnlyImageLeavesTheBudget: an image that was attached read-only gives back what
// its map has when it is closed, and is not asked for anything any more.
func TestReadOnlyImageLeavesTheBudget(t *testing.T) {
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 1 << 30, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	const segment = segmentSectors / 8 // blocks
	for i := range uint64(16) {
		a.mustWrite(i*segment, i+1)
	}
	a.mustClose()
	shared := NewShared(Limits{Map: 1 << 20})
	b := newHost(t, "beta", st, 2)
	b.im, err = Open(context.Background(), st, id, OpenOptions{ReadOnly: true, Config: Config{Logger: quiet, Shared: shared}})
	if err != nil {
		t.Fatal(err)
	}
	b.im.Start(b.env, nil, nil)
	for i := range uint64(16) {
		b.mustRead(i*segment, i+1)
	}
	if shared.Map.Used() == 0 {
		t.Fatal("the map takes no memory: this tests nothing")
	}
	b.mustClose()
	b.im.Abandon() // as the daemon does at its end
	if used, members := shared.Map.Used(), len(shared.Map.members); used != 0 || members != 0 {
		t.Errorf("%d bytes and %d members are left", used, members)
	}
}

// TestChargedWhatReadsBring: what reads bring into memory of segments of which nothing is
// stored is charged, and goes when it is too much.
func TestChargedWhatReadsBring(t *testing.T) {
	const segments, apart = 200, 4 << 30 / 4096 // blocks
	st := mem.New()
	h, _ := attached(t, st, CreateOptions{Size: segments * apart * 4096}, NewShared(Limits{Map: 128 << 10}))
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

// TestCleaningPlaces: who has waited longest is told of a place, and no other takes it.
func TestCleaningPlaces(t *testing.T) {
	p := cleaningPlaces{free: 2}
	told := ""
	turn := func(name string) *cleaningTurn { return &cleaningTurn{come: func() { told += name }} }
	a, b, c, d, e := turn("a"), turn("b"), turn("c"), turn("d"), turn("e")
	for i, step := range []struct {
		do   func() bool
		ok   bool
		told string // in all
	}{
		{func() bool { return p.take(a) }, true, ""},
		{func() bool { return p.take(b) }, true, ""},
		{func() bool { return p.take(c) }, false, ""},
		{func() bool { return p.take(d) }, false, ""},
		{func() bool { return p.take(e) }, false, ""},
		{func() bool { p.give(); return p.take(a) }, false, "c"},
		{func() bool { return p.take(d) }, false, "c"},
		{func() bool { p.leave(c); return p.take(e) }, false, "cd"},
		{func() bool { p.give(); return p.take(e) }, true, "cde"},
		{func() bool { p.leave(b); return p.take(d) }, true, "cde"},
		{func() bool { p.leave(a); p.give(); p.give(); return p.free == 2 && len(p.waiting) == 0 }, true, "cde"},
	} {
		if ok := step.do(); ok != step.ok || told != step.told {
			t.Fatalf("step %d: %t, told %q; want %t, %q", i, ok, told, step.ok, step.told)
		}
	}
}
