package bench

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// slowStore moves no more bytes in a second than its rate, both ways together.
type slowStore struct {
	*mem.Store
	mu   sync.Mutex
	rate float64   // guarded by mu; bytes a second, 0: no limit
	free time.Time // guarded by mu; when what has been asked for is done
}

func (s *slowStore) limit(rate float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rate, s.free = rate, time.Now()
}

func (s *slowStore) wait(n int) {
	s.mu.Lock()
	if now := time.Now(); s.free.Before(now) {
		s.free = now
	}
	if s.rate > 0 {
		s.free = s.free.Add(time.Duration(float64(n) / s.rate * float64(time.Second)))
	}
	until := s.free
	s.mu.Unlock()
	time.Sleep(time.Until(until))
}

// Put implements backend.Store.
func (s *slowStore) Put(ctx context.Context, key string, data []byte) error {
	s.wait(len(data))
	return s.Store.Put(ctx, key, data)
}

// Get implements backend.Store.
func (s *slowStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.wait(len(p))
	return s.Store.Get(ctx, key, p, off)
}

// GetRanges implements backend.RangeGetter.
func (s *slowStore) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	s.wait(backend.SizeOf(ranges))
	return backend.GetOnce(ctx, s.Store, key, ranges)
}

// writers write an image on its reactor, which owns them, and note how long each
// write takes.
type writers struct {
	im      *engine.Image
	rng     *rand.Rand
	blocks  uint64
	rate    float64 // writes a second; 0: as many as are acknowledged
	until   time.Time
	warm    uint64 // writes before that, as many as are acknowledged: all blocks once, in order, then at random
	begun   uint64 // of those
	credit  float64
	tick    time.Time
	live    int
	waiting []*timedWrite
	took    []time.Duration
	errs    int
	idle    chan struct{}
}

type timedWrite struct {
	engine.Request
	w     *writers
	began time.Time
}

// RequestDone implements engine.Completer.
func (x *timedWrite) RequestDone(*engine.Request) {
	w := x.w
	if x.Err != 0 {
		w.errs++
	}
	w.took = append(w.took, time.Since(x.began))
	w.live--
	w.waiting = append(w.waiting, x)
}

// turn submits what is due; it is called at the end of each turn.
func (w *writers) turn() {
	now := time.Now()
	if w.warmed() && now.After(w.until) {
		if w.live == 0 && w.idle != nil {
			close(w.idle)
			w.idle = nil
		}
		return
	}
	w.credit, w.tick = min(w.credit+now.Sub(w.tick).Seconds()*w.rate, 1000), now
	for len(w.waiting) > 0 && (!w.warmed() || w.rate == 0 || w.credit >= 1) {
		x := w.waiting[len(w.waiting)-1]
		w.waiting = w.waiting[:len(w.waiting)-1]
		x.Sector = w.rng.Uint64N(w.blocks) * 8
		if w.warmed() {
			w.credit--
		} else {
			if w.begun < w.blocks {
				x.Sector = w.begun * 8
			}
			w.begun++
		}
		x.began = now
		w.live++
		w.im.Submit(&x.Request)
	}
}

func (w *writers) warmed() bool { return w.begun == w.warm }

const latencyImage = 256 << 20

// latencies overwrites an image at random, after it has been filled and overwritten
// twice, and returns how long each write took, in order, the first third of the time
// left out.
func latencies(b *testing.B, c engine.Config, writeRate, storeRate float64, length time.Duration) []time.Duration {
	b.Helper()
	ctx := context.Background()
	path := filepath.Join(b.TempDir(), "log")
	if err := writelog.MakeFile(ctx, path, 256<<20, nil); err != nil {
		b.Fatal(err)
	}
	f, err := writelog.OpenFile(ctx, path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	st := &slowStore{Store: mem.New()}
	id, err := engine.Create(ctx, st, "bench", engine.CreateOptions{Size: latencyImage, ObjectSize: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	im, err := engine.Open(ctx, st, id, engine.OpenOptions{Log: f, URL: "mem:/bench", Host: "bench", Config: c})
	if err != nil {
		b.Fatal(err)
	}
	r := newReactor(b)
	arena, err := uring.NewArena(32<<20 + 64*4096)
	if err != nil {
		b.Fatal(err)
	}
	defer arena.Close()
	w := &writers{im: im, rng: rand.New(rand.NewPCG(1, 2)), blocks: latencyImage / 4096, warm: 3 * latencyImage / 4096, rate: writeRate, idle: make(chan struct{})}
	for i := range 64 {
		x := &timedWrite{w: w}
		x.Request = engine.Request{Op: engine.Write, Sectors: 8, Buf: arena.Bytes()[32<<20+i*4096:][:4096], Done: x}
		w.waiting = append(w.waiting, x)
	}
	env := environment{r}
	idle := w.idle
	call(b, r, func() {
		im.Start(env, r.File(f.Fd()), arena.Bytes()[:32<<20])
		r.OnTurn(w.turn)
		r.OnTurn(im.EndTurn)
		var tick engine.Timer
		tick = env.AfterFunc(0, func() { tick.Reset(time.Millisecond / 2) })
		w.tick, w.until = time.Now(), time.Now().Add(time.Hour)
	})
	for warmed := false; !warmed; time.Sleep(10 * time.Millisecond) {
		call(b, r, func() { warmed = w.warmed() })
	}
	st.limit(storeRate)
	call(b, r, func() { w.until = time.Now().Add(length) })
	time.Sleep(length / 3)
	call(b, r, func() { w.took = w.took[:0] })
	<-idle
	if w.errs > 0 {
		b.Fatalf("%d writes failed", w.errs)
	}
	st.limit(0)
	for quiet := false; !quiet; time.Sleep(10 * time.Millisecond) {
		call(b, r, func() { im.Abandon(); quiet = im.Quiet() })
	}
	r.Stop()
	<-r.Done()
	if want := writeRate * length.Seconds() * 2 / 3; float64(len(w.took)) < want/2 {
		b.Fatalf("%d writes, not %.0f", len(w.took), want)
	}
	slices.Sort(w.took)
	return w.took
}

func quantile(sorted []time.Duration, q float64) float64 {
	return float64(sorted[int(q*float64(len(sorted)-1))].Microseconds()) / 1000
}

// BenchmarkCleanerLatency: 8,000 random 4 KiB writes a second onto a full image,
// with the cleaner, and with so much space that it has nothing to do, in turns.
func BenchmarkCleanerLatency(b *testing.B) {
	var with, without []float64
	p99 := func(ratio float64) float64 {
		return quantile(latencies(b, engine.Config{SpaceRatio: ratio}, 8000, 300e6, 3*time.Duration(*seconds)*time.Second), 0.99)
	}
	for range *rounds {
		with = append(with, p99(engine.DefaultSpaceRatio))
		without = append(without, p99(engine.MaxSpaceRatio))
	}
	b.Logf("p99 ms with the cleaner %s, without %s", spread3(with), spread3(without))
	b.ReportMetric(Median(with), "p99-ms")
	b.ReportMetric(Median(without), "p99-ms-without")
	b.ReportMetric(Median(with)/Median(without), "ratio")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkOverload: 64 writers write as fast as they can onto a store that takes
// 40 MB/s, the cleaner's share included; with back-pressure, and without: then a full
// log stops everybody until some of it is free.
func BenchmarkOverload(b *testing.B) {
	quantiles := []float64{0.5, 0.99, 0.999, 1}
	var paced, stopped [4][]float64
	for range *rounds {
		for _, x := range []struct {
			from float64
			to   *[4][]float64
		}{{0, &paced}, {1, &stopped}} {
			t := latencies(b, engine.Config{PaceFrom: x.from}, 0, 40e6, 5*time.Duration(*seconds)*time.Second)
			for i, q := range quantiles {
				x.to[i] = append(x.to[i], quantile(t, q))
			}
		}
	}
	for i, q := range []string{"p50", "p99", "p99.9", "max"} {
		b.Logf("%s ms with back-pressure %s, without %s", q, spread3(paced[i]), spread3(stopped[i]))
		b.ReportMetric(Median(paced[i]), q+"-ms")
		b.ReportMetric(Median(stopped[i]), q+"-ms-without")
	}
	b.ReportMetric(0, "ns/op")
}

func spread3(x []float64) string {
	return fmt.Sprintf("%.2f (%.2f–%.2f)", Median(x), slices.Min(x), slices.Max(x))
}
