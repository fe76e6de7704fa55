package daemon

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// stallWriter writes one block after the other, each when the one before is acknowledged, and
// notes what each has taken. The reactor owns it.
type stallWriter struct {
	slot  *slot
	now   func() time.Duration
	rng   *rand.Rand
	began time.Duration
	took  []time.Duration
	stop  bool
	ended chan struct{}
}

// Complete implements completer.
func (s *stallWriter) Complete(int32) {
	s.took = append(s.took, s.now()-s.began)
	if s.stop {
		close(s.ended)
		return
	}
	s.next()
}

// CompleteInTime implements completer.
func (s *stallWriter) CompleteInTime(res int32) { s.Complete(res) }

func (s *stallWriter) next() {
	s.slot.req.Sector = s.rng.Uint64N(8<<20/4096) * 8
	s.began = s.now()
	s.slot.front.submit(s.slot)
}

// BenchmarkSnapshotStall tells how long writes take while a snapshot is made, every so often,
// and while none is, in turns: the median and the longest of a turn, of all turns the median.
// The log is a real file, the store is in memory.
func BenchmarkSnapshotStall(b *testing.B) {
	w := newWorld(b)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	d, err := w.kernel.get(id)
	if err != nil {
		b.Fatal(err)
	}
	arena, err := uring.NewArena(4096)
	if err != nil {
		b.Fatal(err)
	}
	var with, without stalls
	for b.Loop() {
		without.add(w.writeFor(d, arena.Bytes(), func() {}))
		with.add(w.writeFor(d, arena.Bytes(), func() {
			_, err := engine.CreateSnapshot(context.Background(), w.store, w.imageID("vm1"), "snap", engine.SnapshotOptions{
				Nudge: func(ctx context.Context) error { return h.find(id).refresh(ctx, func(api.Progress) {}) },
			})
			if err == nil {
				err = engine.RemoveSnapshot(context.Background(), w.store, w.imageID("vm1"), "snap")
			}
			if err != nil {
				b.Error(err)
			}
		}))
	}
	with.report(b, "snapshot")
	without.report(b, "none")
}

const (
	stallTurn  = 250 * time.Millisecond
	stallEvery = 50 * time.Millisecond
)

// writeFor writes for a turn, in which it calls do every so often, and returns what the writes
// have taken.
func (w *world) writeFor(d *fakeDevice, buf []byte, do func()) []time.Duration {
	s := &stallWriter{now: d.reactor.Now, rng: rand.New(rand.NewPCG(1, 2)), ended: make(chan struct{})}
	d.reactor.Post(func() {
		f := d.handler.(*front)
		s.slot = &f.slots[1]
		s.slot.io = s
		r := &s.slot.req
		r.Op, r.Sectors, r.Buf = engine.Write, 8, buf
		s.next()
	})
	for end := time.Now().Add(stallTurn); time.Now().Before(end); time.Sleep(stallEvery) {
		do()
	}
	d.reactor.Post(func() { s.stop = true })
	<-s.ended
	return s.took
}

// stalls are what the writes of some turns have taken: median and longest of each.
type stalls struct{ median, longest []time.Duration }

func (x *stalls) add(took []time.Duration) {
	slices.Sort(took)
	x.median, x.longest = append(x.median, took[len(took)/2]), append(x.longest, took[len(took)-1])
}

func (x *stalls) report(b *testing.B, name string) {
	slices.Sort(x.median)
	slices.Sort(x.longest)
	n := len(x.median)
	b.ReportMetric(x.median[n/2].Seconds()*1000, name+"-median-ms")
	b.ReportMetric(x.longest[n/2].Seconds()*1000, name+"-longest-ms")
	b.ReportMetric(x.longest[n-1].Seconds()*1000, name+"-longest-of-all-ms")
}
