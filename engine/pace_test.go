package engine

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
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

// overload floods an image for half a minute with eight writes at a time and a store that
// takes about 5 MB/s.
func overload(t *testing.T, paceFrom float64) *flood {
	st := mem.New()
	id := newImageIn(t, st)
	rng := rand.New(rand.NewPCG(1, 2))
	disk := simdisk.New(writelog.MinSize, rng)
	env := &simEnv{rng: rng, disk: disk}
	im, err := Open(context.Background(), st, id, OpenOptions{Log: disk, Config: Config{PaceFrom: paceFrom, SpaceRatio: MaxSpaceRatio, Logger: quiet}})
	if err != nil {
		t.Fatal(err)
	}
	env.delay = func() time.Duration { return 400 * time.Millisecond } // until it is run, and until it is told
	f := &flood{im: im, env: env, rng: rng, began: map[*Request]time.Duration{}}
	im.Start(env, disk.Device(), make([]byte, 2*writelog.SegmentSize))
	for range 8 {
		f.submit(&Request{Op: Write, Sectors: floodSectors, Buf: make([]byte, floodSectors*SectorSize), Done: f})
	}
	f.run(30 * time.Second)
	im.Abandon()
	return f
}

// TestBackPressure: where writes come faster than the store takes them for ever,
// the log does not become full, and no write waits for long; without back-pressure
// it does, and they do.
func TestBackPressure(t *testing.T) {
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

// filled returns how much of the log was in use at most.
func (f *flood) filled() float64 { return float64(f.fullest) / float64(f.im.log.Size()) }
