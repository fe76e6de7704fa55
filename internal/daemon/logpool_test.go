package daemon

import (
	"slices"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

const segment = int64(writelog.SegmentSize)

// holds fails unless the pool has so many segments, and has lent so many of them.
func (p *logPool) holds(t *testing.T, what string, all, lent int64) {
	t.Helper()
	if a, l := p.bytes(); a != all*segment || l != lent*segment {
		t.Errorf("%s: %d segments, %d are lent; want %d and %d", what, a/segment, l/segment, all, lent)
	}
}

// TestLogPool: memory is made that was asked for in vain, slowly while it is asked for and fast
// afterwards, up to the bound; what nobody asks for goes, and not what is lent.
func TestLogPool(t *testing.T) {
	w := newWorld(t)
	p := newLogPool(5*segment+segment/2, w.newHost().logger)
	lend := func(n int) (lent [][]byte) {
		for range n {
			if b := p.lend(); b != nil {
				lent = append(lent, b)
			}
		}
		return lent
	}
	in := func(d time.Duration) time.Time { return p.asked.Add(d) } // since it was asked last
	p.tend(in(0))
	p.holds(t, "nobody has asked", 0, 0)
	if len(lend(4)) > 0 {
		t.Fatal("it lends what it does not have")
	}
	p.tend(in(0))
	p.holds(t, "a moment later", poolBusyStep, 0)
	p.tend(in(poolPause))
	p.holds(t, "after a pause", 4, 0)
	p.tend(in(poolPause))
	p.holds(t, "nobody has asked again", 4, 0)
	lent := lend(9)
	if len(lent) != 4 || slices.ContainsFunc(lent, func(b []byte) bool { return len(b) != writelog.SegmentSize || b[0] != 0 }) {
		t.Fatalf("%d segments are lent", len(lent))
	}
	p.tend(in(poolPause))
	p.holds(t, "as much as there may be", 5, 4)
	p.takeBack(lent[0])
	p.tend(in(poolKept - time.Second))
	p.holds(t, "some have come back", 5, 3)
	p.tend(in(poolKept))
	p.holds(t, "nobody has asked for a long time", 3, 3)
	for _, b := range lent[1:] {
		b[0] = 1 // it is there
		p.takeBack(b)
	}
	p.tend(in(poolKept))
	p.holds(t, "and they have come back", 0, 0)
	lend(1)
	p.tend(in(poolKept))
	p.holds(t, "what was asked for a long time ago", 0, 0)

	none := newLogPool(-1, nil)
	if none.lend() != nil {
		t.Error("there is none, and it is lent")
	}
	none.tend(none.asked.Add(poolPause))
	none.holds(t, "there is to be none", 0, 0)
}

// TestBorrower: a log gives back what it was lent, once; the rest is given back for it.
func TestBorrower(t *testing.T) {
	p := newLogPool(3*segment, nil)
	for range 3 {
		p.lend()
	}
	p.tend(time.Now().Add(poolPause))
	b := borrower{p, map[*byte][]byte{}}
	first, _, _ := b.Lend(), b.Lend(), b.Lend()
	p.holds(t, "all", 3, 3)
	b.Return(first)
	p.holds(t, "one is back", 3, 2)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("it has been returned twice")
			}
		}()
		b.Return(first)
	}()
	b.giveBack()
	p.holds(t, "the rest", 3, 0)
	b.giveBack()
	p.holds(t, "once", 3, 0)
}

// TestLentMemory: a log whose image is written to faster than the store takes it is lent memory, and
// gives it back when that is in the store, and when its reactor or its daemon dies.
func TestLentMemory(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	h.shared.logMemory.total = 2 * segment
	c := h.handle(wire.OpenRequest{})
	p := h.shared.logPool
	w.outage.Set(true)
	next := 0
	write := func(mib int) {
		for range mib {
			c.write(uint64(next)<<20, 1<<20, byte(1+next))
			next++
		}
	}
	write(30) // with 16 MiB of its own: it asks in vain for more
	p.tend(time.Now().Add(poolPause))
	write(10)
	if _, lent := p.bytes(); lent == 0 {
		t.Fatal("nothing is lent: this tests nothing")
	}
	h.door().getDisk().reactor.Post(func() { panic("test") })
	w.until("the memory of the dead", func() bool { _, lent := p.bytes(); return lent == 0 })
	w.outage.Set(false)
	w.until("all to be in the store", func() bool {
		im := h.door().describe(t.Context())
		return im.State == api.StateActive && im.Stats != nil && im.Stats.Dirty == 0
	})
	next = 0
	for i := range 40 {
		c.check(uint64(i)<<20, 1<<20, byte(1+i))
	}
	write(40)
	w.until("what is in the store to be back", func() bool {
		_, lent := p.bytes()
		im := h.door().describe(t.Context())
		return im.Stats != nil && im.Stats.Dirty == 0 && lent <= 2*segment // in place of its own
	})
	w.outage.Set(true)
	write(24)
	if _, lent := p.bytes(); lent == 0 {
		t.Fatal("nothing is lent: this tests nothing")
	}
	h.crash()
	if _, lent := p.bytes(); lent != 0 {
		t.Errorf("the daemon is dead, and %d segments are lent", lent/segment)
	}
	w.outage.Set(false)
}
