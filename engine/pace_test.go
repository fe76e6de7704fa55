package engine

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// flood keeps writes in flight, as many as it is given, onto an image whose store is
// slower than that.
type flood struct {
	im      *Image
	env     *simEnv
	rng     *rand.Rand
	began   map[*Request]time.Duration
	longest time.Duration // that a write took
	ended   int
	fullest uint64 // bytes of log in use
}

const floodSectors = 32 // 16 KiB a write

func newFlood(t *testing.T, st backend.Store, id uuid.UUID, log int64, config Config) *flood {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	disk := simdisk.New(log, rng)
	env := &simEnv{rng: rng, disk: disk}
	im, err := Open(context.Background(), st, id, OpenOptions{Log: disk, Config: config})
	if err != nil {
		t.Fatal(err)
	}
	return &flood{im: im, env: env, rng: rng, began: map[*Request]time.Duration{}}
}

// begin attaches the image and submits the first writes, that many.
func (f *flood) begin(writes int) {
	f.im.Start(f.env, f.env.disk.Device(), make([]byte, 2*writelog.SegmentSize))
	for range writes {
		f.submit(&Request{Op: Write, Sectors: floodSectors, Buf: make([]byte, floodSectors*SectorSize), Done: f})
	}
}

func (f *flood) RequestDone(r *Request) {
	if f.began[r] > time.Second { // the first ones wait for the lease
		f.longest = max(f.longest, f.env.now-f.began[r])
	}
	f.ended++
	if r.Err == 0 {
		f.submit(r)
	}
}

func (f *flood) submit(r *Request) {
	r.Sector = f.rng.Uint64N(f.im.sectors/floodSectors) * floodSectors
	f.began[r] = f.env.now
	f.im.Submit(r)
}

// run lets d pass. An SSD takes no time here, and the store some for each object.
func (f *flood) run(d time.Duration) {
	for end := f.env.now + d; f.env.now < end; {
		f.im.EndTurn()
		f.fullest = max(f.fullest, f.im.log.Used())
		if f.env.step() {
			continue
		}
		next := end
		if t := f.env.next(); t != nil {
			next = min(next, t.at)
		}
		for _, j := range f.env.jobs {
			next = min(next, j.at)
		}
		for _, j := range f.env.done {
			next = min(next, j.at)
		}
		f.env.now = max(f.env.now, next)
		if t := f.env.next(); t != nil && t.at <= f.env.now {
			f.env.fire()
		}
	}
}

// slowPuts is a store that takes its time for what is put, and for nothing else.
type slowPuts struct {
	backend.Store
	rng *rand.Rand
	put bool // since it was asked last
}

func (s *slowPuts) Put(ctx context.Context, key string, data []byte) error {
	s.put = true
	return s.Store.Put(ctx, key, data)
}

// delay is that of a job which has been run: a put takes 1.6 s, a little more or less, so that eight
// of 1 MiB at a time make 5 MB/s.
func (s *slowPuts) delay() time.Duration {
	if !s.put {
		return 0
	}
	s.put = false
	return time.Duration(1200+s.rng.IntN(800)) * time.Millisecond
}

// overload floods an image for half a minute with eight writes at a time and a store that
// takes about 5 MB/s.
func overload(t *testing.T, paceFrom float64) *flood {
	inner := mem.New()
	st := &slowPuts{Store: inner, rng: rand.New(rand.NewPCG(5, 6))}
	f := newFlood(t, st, newImageIn(t, inner), writelog.MinSize, Config{PaceFrom: paceFrom, SpaceRatio: MaxSpaceRatio, Logger: quiet})
	f.env.delay = st.delay
	f.begin(8)
	f.run(30 * time.Second)
	f.im.Abandon()
	return f
}

// TestBackPressure: where writes come faster than the store takes them for ever,
// the log does not become full, and no write waits for long; without back-pressure
// it does, and they do.
func TestBackPressure(t *testing.T) {
	racetest.Slow(t)
	paced, free := overload(t, 0.5), overload(t, 1)
	for what, f := range map[string]*flood{"with back-pressure": paced, "without": free} {
		t.Logf("%s: %d writes in %v, the longest took %v, the log was filled up to %.2f", what, f.ended, f.env.now, f.longest, f.filled())
	}
	if paced.filled() > 0.95 || free.filled() < 0.97 {
		t.Errorf("the log was filled up to %.2f with back-pressure and %.2f without", paced.filled(), free.filled())
	}
	if 3*paced.longest > free.longest {
		t.Errorf("the longest write took %v with back-pressure and %v without", paced.longest, free.longest)
	}
	if math.Abs(float64(paced.ended)/float64(free.ended)-1) > 0.25 {
		t.Errorf("%d writes with back-pressure, %d without", paced.ended, free.ended)
	}
}

// sharedStore is a store with one bandwidth for all that is put and read, in the order in which it
// is asked, which says that something is put only every so often.
type sharedStore struct {
	backend.Store
	env   *simEnv
	lump  time.Duration // between two times
	until time.Duration // it is busy
	taken bool          // it was asked since delay was called last
	put   bool          // to put something
}

// sharedRate is in bytes a second.
const sharedRate = 10 << 20

func (s *sharedStore) take(n int) {
	s.until = max(s.until, s.env.now) + time.Duration(n)*time.Second/sharedRate
	s.taken = true
}

func (s *sharedStore) Put(ctx context.Context, key string, data []byte) error {
	s.take(len(data))
	s.put = true
	return s.Store.Put(ctx, key, data)
}

func (s *sharedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	s.take(n)
	return n, err
}

// delay is that of a job which has been run.
func (s *sharedStore) delay() time.Duration {
	if !s.taken {
		return 0
	}
	at := s.until
	if s.put && s.lump > 0 {
		at = (at + s.lump - 1) / s.lump * s.lump
	}
	s.taken, s.put = false, false
	return at - s.env.now
}

// TestEvenUnderOverload: where writes come faster than the store takes them for ever, those of each
// half second are nearly as many, though the store tells of puts in lumps and the cleaner wants to
// go first now and then.
func TestEvenUnderOverload(t *testing.T) {
	racetest.Slow(t)
	const object, steps = 2 << 20, 120
	for _, lump := range []time.Duration{0, 300 * time.Millisecond, 700 * time.Millisecond, 1500 * time.Millisecond} {
		t.Run(lump.String(), func(t *testing.T) {
			st := &sharedStore{Store: mem.New(), lump: lump}
			id, err := Create(context.Background(), st.Store, "disk", CreateOptions{Size: 4 * writelog.MinSize / object * object, ObjectSize: object})
			if err != nil {
				t.Fatal(err)
			}
			f := newFlood(t, st, id, writelog.MinSize, Config{Logger: quiet})
			st.env, f.env.delay = f.env, st.delay
			f.begin(32)
			f.run(time.Minute)
			began, moved := f.ended, f.im.clean.moved
			f.fullest = 0
			least := math.MaxInt
			for range steps {
				before := f.ended
				f.run(500 * time.Millisecond)
				least = min(least, f.ended-before)
			}
			f.im.Abandon()
			mean := float64(f.ended-began) / steps
			written := float64(f.ended-began) * floodSectors * SectorSize
			moved = f.im.clean.moved - moved
			t.Logf("%.0f writes in half a second, %d at least; %.2f moved for each that is written; the log was filled up to %.2f",
				mean, least, float64(moved)/written, f.filled())
			if float64(moved) < written/4 {
				t.Fatal("there is hardly any cleaning: this tests nothing")
			}
			if float64(least) < mean/2 || f.filled() > 0.97 {
				t.Errorf("%d writes in half a second, %.0f of them by the mean; the log was filled up to %.2f", least, mean, f.filled())
			}
		})
	}
}

// filled returns how much of the log was in use at most.
func (f *flood) filled() float64 { return float64(f.fullest) / float64(f.im.log.Size()) }

// TestSpaceUnderOverload: where writes come faster than the store takes them for ever, and
// the log is full of them, the image's objects take little more than they may, and writes go
// on; also if most of what lives in the store has been written again in the log, or most of
// the map is not in memory.
func TestSpaceUnderOverload(t *testing.T) {
	racetest.Slow(t)
	for _, x := range []struct {
		objects uint64 // of the image
		log     int64
		maps    int64   // memory for its map, in KiB
		most    float64 // space, for each byte that lives
	}{
		{256, writelog.MinSize, 256 << 10, 1.45},
		{64, 2 * writelog.MinSize, 256 << 10, 1.8},
		{256, writelog.MinSize, 300, 1.5}, // of 385
	} {
		t.Run(fmt.Sprintf("%d objects, log of %d MiB, map in %d KiB", x.objects, x.log>>20, x.maps), func(t *testing.T) {
			const object = 1 << 20
			st := mem.New()
			id, err := Create(context.Background(), st, "disk", CreateOptions{Size: x.objects * object, ObjectSize: object})
			if err != nil {
				t.Fatal(err)
			}
			f := newFlood(t, st, id, x.log, Config{Logger: quiet, Shared: NewShared(Limits{Map: x.maps << 10})})
			f.env.delay = func() time.Duration { return 20 * time.Millisecond } // until it is run, and until it is told
			f.begin(64)
			most, full, least, steps := 0.0, 0, math.MaxInt, 0
			for range 120 {
				before := f.ended
				f.run(500 * time.Millisecond)
				if m := &f.im.table; m.live > f.im.sectors*9/10 {
					steps++
					most = max(most, float64(m.space)/float64(m.live))
					least = min(least, f.ended-before)
					if f.im.log.Used() > f.im.log.Size()/2 {
						full++
					}
				}
			}
			f.im.Abandon()
			t.Logf("%d writes, %d in half a second at least; space %.3f at most", f.ended, least, most)
			if full < steps*9/10 || steps < 20 {
				t.Fatalf("the log was full in %d of %d steps: this tests nothing", full, steps)
			}
			if most > x.most || least < 100 {
				t.Errorf("space is %.3f at most, want %.2f; %d writes have ended in half a second", most, x.most, least)
			}
		})
	}
}

// TestDebtIsPaidBesideWrites: where far more is dead than may be, as after a point has gone,
// the space falls, and writes go on meanwhile.
func TestDebtIsPaidBesideWrites(t *testing.T) {
	racetest.Slow(t)
	const object = 1 << 20
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 128 * object, ObjectSize: object})
	if err != nil {
		t.Fatal(err)
	}
	f := newFlood(t, st, id, writelog.MinSize, Config{SpaceRatio: 4, Logger: quiet})
	f.env.delay = func() time.Duration { return 20 * time.Millisecond } // until it is run, and until it is told
	f.begin(64)
	f.run(20 * time.Second)
	space := func() float64 { return float64(f.im.table.space) / float64(f.im.table.live) }
	before := space()
	f.im.cfg.SpaceRatio = DefaultSpaceRatio
	least, paid := math.MaxInt, 0
	for range 40 {
		ended := f.ended
		f.run(time.Second)
		if f.im.clean.exceeds() {
			least, paid = min(least, f.ended-ended), paid+1
		}
	}
	f.im.Abandon()
	t.Logf("space %.3f before, %.3f after; %d writes in a second at least", before, space(), least)
	if before < 3 || paid < 10 {
		t.Fatal("little is dead: this tests nothing")
	}
	if least < 100 || space() > 1.6 {
		t.Errorf("space is %.3f in the end, and %d writes have ended in a second", space(), least)
	}
}

// TestCleaningsTakeTurns: images that are overloaded, and more of them than may be cleaned at
// one time, all keep their space, and all go on.
func TestCleaningsTakeTurns(t *testing.T) {
	racetest.Slow(t)
	const object, images = 1 << 20, maxCleanings + 2
	shared := NewShared(Limits{})
	var all []*flood
	for i := range images {
		st := mem.New()
		id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 64 * object, ObjectSize: object})
		if err != nil {
			t.Fatal(err)
		}
		f := newFlood(t, st, id, writelog.MinSize, Config{Logger: quiet, Shared: shared})
		f.env.delay = func() time.Duration { return 20 * time.Millisecond } // until it is run, and until it is told
		f.begin(60 + i)
		all = append(all, f)
	}
	run := func(d time.Duration) {
		for range d / (2 * time.Millisecond) {
			for _, f := range all {
				f.run(2 * time.Millisecond)
			}
		}
	}
	run(12 * time.Second)
	before := make([]int, images)
	for i, f := range all {
		before[i] = f.ended
	}
	run(2 * time.Second)
	for i, f := range all {
		space, writes := float64(f.im.table.space)/float64(f.im.table.live), f.ended-before[i]
		t.Logf("image %d: space %.3f, %d MiB moved, %d writes", i, space, f.im.clean.moved>>20, writes)
		if space > 2 || writes < 200 {
			t.Errorf("image %d: space is %.3f, %d writes have ended in 2 s", i, space, writes)
		}
	}
	for _, f := range all {
		f.im.Abandon()
	}
	if p := &shared.cleaning; p.free != maxCleanings || len(p.waiting) > 0 {
		t.Errorf("%d places are free and %d images wait when all have ended", p.free, len(p.waiting))
	}
}
