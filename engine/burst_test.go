package engine

import (
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// A bursting is an image of which a test writes in bursts, with a store that takes no time: what
// is not in it is held back.
type bursting struct {
	*host
	wrote uint64 // bytes
	most  int    // batches that have waited at one time
	held  time.Duration
	buf   []byte
}

const burstObject = 1 << 20

func newBursting(t *testing.T) *bursting {
	t.Helper()
	return newLentBursting(t, 0)
}

// newLentBursting is newBursting with so many segments to be lent to the log.
func newLentBursting(t *testing.T, segments int) *bursting {
	t.Helper()
	st := mem.New()
	id, err := Create(t.Context(), st, "disk", CreateOptions{Size: 512 << 20, ObjectSize: burstObject})
	if err != nil {
		t.Fatal(err)
	}
	b := &bursting{host: openLargeLog(t, st, id, &lender{most: segments}), buf: make([]byte, 64<<10)}
	b.im.cfg.BatchAge = 2 * time.Second
	b.run(10 * time.Second)
	return b
}

// write writes at a speed, in bytes a second, for so long.
func (b *bursting) write(speed uint64, d time.Duration) {
	b.t.Helper()
	pause := time.Duration(uint64(len(b.buf)) * uint64(time.Second) / speed)
	for end := b.env.now + d; b.env.now < end; {
		ended := false
		b.im.Submit(&Request{
			Op: Write, Sector: b.wrote / SectorSize % (b.im.sectors - 128), Sectors: 128, Buf: b.buf,
			Done: doneFunc(func(r *Request) { ended = r.Err == 0 }),
		})
		b.wrote += uint64(len(b.buf))
		b.run(pause)
		if !ended {
			b.t.Fatal("a write has not ended")
		}
		b.most = max(b.most, len(b.im.queue))
		if len(b.im.queue) > 0 {
			b.held = max(b.held, b.env.now-b.im.queue[0].began)
		}
	}
}

// stored returns how much is in the store.
func (b *bursting) stored() uint64 { return b.im.stats.objectBytes }

// TestBurst: what is written in a burst is held back, but for burstRate, and goes on its way when
// no more comes.
func TestBurst(t *testing.T) {
	racetest.Slow(t)
	b := newBursting(t)
	for n := range 2 { // the second time after a calm
		before := b.stored()
		b.write(128<<20, 400*time.Millisecond)
		if got, most := b.stored()-before, uint64(burstRate*4/10+2*burstObject); got > most || got < most/2 {
			t.Errorf("burst %d: %d bytes are in the store after 0.4 s, want about %d", n, got, most)
		}
		if len(b.im.queue) < 30 {
			t.Errorf("burst %d: %d batches wait", n, len(b.im.queue))
		}
		b.run(2 * burstPause)
		if len(b.im.queue) > 0 {
			t.Errorf("burst %d: %d batches wait still in the pause after it", n, len(b.im.queue))
		}
		b.run(2*burstCalm + b.im.cfg.BatchAge)
	}
}

// TestBurstEnds: what ends a burst at once lets all that is held back go, and nothing is held back
// until there has been a calm.
func TestBurstEnds(t *testing.T) {
	racetest.Slow(t)
	for _, x := range []struct {
		name string
		end  func(b *bursting)
	}{
		{"a snapshot waits", func(b *bursting) {
			done := false
			b.im.Destage(func(err error) { done = err == nil })
			b.run(time.Millisecond)
			if !done {
				t.Error("it is not told")
			}
		}},
		{"less may be held back than is in memory", func(b *bursting) { b.im.cfg.Burst = 4 << 20; b.write(128<<20, 20*time.Millisecond) }},
		{"nothing may be", func(b *bursting) { b.im.cfg.Burst = -1; b.write(128<<20, 20*time.Millisecond) }},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := newBursting(t)
			b.write(128<<20, 100*time.Millisecond)
			if len(b.im.queue) == 0 {
				t.Fatal("nothing is held back: this tests nothing")
			}
			x.end(b)
			if most := b.im.log.Size()/4 + 2*burstObject; b.im.log.Used() > most {
				t.Errorf("%d bytes of the log are used, want %d at most", b.im.log.Used(), most)
			}
			b.most = 0
			b.write(128<<20, time.Second)
			if b.most > 1 {
				t.Errorf("%d batches are held back after the burst", b.most)
			}
			b.run(burstCalm * 5 / 2) // and after a calm, as before
			if b.im.burst.over && b.im.cfg.Burst >= 0 {
				t.Error("there is no calm")
			}
		})
	}
}

// gather writes until a burst is over, and more than is in memory has gathered.
func (b *bursting) gather() {
	b.t.Helper()
	for !b.im.burst.over {
		b.write(256<<20, time.Millisecond)
	}
	if b.im.paidBack() {
		b.t.Fatal("nothing is to be paid back: this tests nothing")
	}
	if most := b.im.log.Size()/4 + 2*burstObject; b.im.log.Used() > most {
		b.t.Errorf("%d bytes of the log are used at the end of the burst, want %d at most", b.im.log.Used(), most)
	}
}

// TestBurstPaysBack: after a burst, what has gathered gets into the store while more is written, a
// little faster than that, until it is in memory; from then on nothing is held back.
func TestBurstPaysBack(t *testing.T) {
	racetest.Slow(t)
	t.Run("from the SSD", func(t *testing.T) { newBursting(t).paysBack() })
	// More than there is at all times is as much of a load to the store where it is in memory.
	t.Run("from memory", func(t *testing.T) { newLentBursting(t, 32).paysBack() })
}

func (b *bursting) paysBack() {
	t := b.t
	b.gather()
	for part := range 3 {
		wrote, stored, used := b.wrote, b.stored(), b.im.log.Used()
		b.write(64<<20, time.Second)
		got, want := float64(b.stored()-stored), burstPayback*float64(b.wrote-wrote)
		if got < want-4*burstObject || got > want*1.02+4*burstObject { // records have headers, objects too
			t.Errorf("part %d: %.0f bytes were stored, want about %.0f", part, got, want)
		}
		if b.im.log.Used() >= used {
			t.Errorf("part %d: what has gathered does not shrink: %d bytes, then %d", part, used, b.im.log.Used())
		}
	}
	b.im.cfg.BatchAge = time.Hour // so that it is not age that ends it
	for end := b.env.now + 20*time.Second; !b.im.paidBack(); {
		if b.env.now > end {
			t.Fatalf("%d bytes of the log are used still", b.im.log.Used())
		}
		b.write(64<<20, 100*time.Millisecond)
	}
	b.write(64<<20, time.Second)
	b.most = 0
	b.write(64<<20, time.Second)
	if b.most > 1 {
		t.Errorf("%d batches are held back when all is paid back", b.most)
	}
}

// TestBurstPayback: what is to be paid back does not wait for writes when there are none, when it is
// twice Config.BatchAge old, nor when the log is so full that writes are slowed down.
func TestBurstPayback(t *testing.T) {
	racetest.Slow(t)
	const slow = 4 << 20 // so slow that writes alone would take long, but not with pauses
	t.Run("a pause", func(t *testing.T) {
		b := newBursting(t)
		b.gather()
		b.run(2 * burstPause)
		if len(b.im.queue) > 0 {
			t.Errorf("%d batches wait", len(b.im.queue))
		}
	})
	t.Run("age", func(t *testing.T) {
		b := newBursting(t)
		b.gather()
		b.held = 0
		b.write(slow, 3*b.im.cfg.BatchAge)
		if limit := 2*b.im.cfg.BatchAge + 2*burstPause; b.held > limit || b.held < 2*b.im.cfg.BatchAge-2*burstPause {
			t.Errorf("the oldest write has waited for %v, want %v at most", b.held, limit)
		}
	})
	t.Run("a full log", func(t *testing.T) {
		b := newBursting(t)
		b.gather()
		b.im.cfg.PaceFrom = 0.2
		b.write(slow, 4*burstPause)
		if most := uint64(float64(b.im.log.Size())*0.2) + 2*burstObject; b.im.log.Used() > most {
			t.Errorf("%d bytes of the log are used, want %d at most", b.im.log.Used(), most)
		}
	})
}

// TestBurstAge: in a burst that does not fill the log no write waits longer for its place in the
// store than Config.BatchAge, and those that come slowly do not wait at all.
func TestBurstAge(t *testing.T) {
	racetest.Slow(t)
	b := newBursting(t)
	b.write(20<<20, 3*time.Second)
	if b.most > 1 {
		t.Errorf("%d batches of a slow writer are held back", b.most)
	}
	b.run(5 * time.Second)
	b.im.cfg.BatchAge = time.Second
	b.write(48<<20, 6*time.Second) // a third more than goes on its way: age ends it, not its size
	if limit := b.im.cfg.BatchAge + 2*burstPause; b.held > limit || b.held < b.im.cfg.BatchAge/2 {
		t.Errorf("the oldest write has waited for %v, want %v at most", b.held, limit)
	}
}
