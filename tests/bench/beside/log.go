package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// writeLog has the engine write 4 KiB blocks at random through its write log, on its reactor and
// without a device, and fio on the same file: what the disk gives. The log has room for all that is
// written in a turn: what comes beyond is measured as overload. It is lent memory as by a daemon that
// has been running for a while.
func writeLog() comparison {
	return comparison{name: "log", title: "the engine's writes through its log, beside fio on the same file", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		daemon.SpareProcessors() // as the daemon does
		path := filepath.Join(h.Dir, "log")
		if err := writelog.MakeFile(ctx, path, int64(lab.Pick(h.Effort, 2, 6))<<30, nil); err != nil {
			return nil, err
		}
		burst, err := uring.NewArena(int(daemon.DefaultBurstMemory()))
		if err != nil {
			return nil, err
		}
		defer burst.Close()
		if err := burst.Populate(); err != nil {
			return nil, err
		}
		var cases []lab.Case[int]
		for _, depth := range []int{1, 32, 128} {
			cases = append(cases, lab.Case[int]{Name: fmt.Sprintf("randwrite 4k, depth %d", depth), Do: depth})
		}
		length := time.Duration(h.Seconds) * time.Second
		m, err := lab.Turns(ctx, h, cases, []lab.Side[int]{
			{Name: "lsd", Turn: func(ctx context.Context, depth int) (lab.Figures, error) {
				return writeThroughLog(ctx, path, newLender(burst.Bytes()), depth, length)
			}},
			{Name: "fio io_uring, O_DIRECT", Turn: func(ctx context.Context, depth int) (lab.Figures, error) {
				args := append(lab.Random("randwrite", depth, h.Seconds), "--ioengine=io_uring", "--direct=1", "--filename="+path)
				f, err := h.Fio(ctx, args...)
				return lab.Figures{"writes/s": f.Rate, "µs CPU": f.CPU.Seconds() * 1e6 / f.Ops}, err
			}},
		})
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("writes/s", bench.Table{Name: "rate", Title: "4 KiB random writes: lsd's engine beside fio on the same file", Unit: "writes a second", Plot: true}),
			m.Table("µs CPU", bench.Table{Name: "cpu", Title: "CPU of a write, destaging included", Unit: "µs", Less: true}),
		}, nil
	}}
}

// sink is a store that takes data objects and forgets them: what is measured is the engine,
// destaging included, and the disk under its log.
type sink struct{ *mem.Store }

// Put implements backend.Store.
func (s sink) Put(ctx context.Context, key string, data []byte) error {
	if strings.Contains(key, "/d/") {
		return ctx.Err()
	}
	return s.Store.Put(ctx, key, data)
}

// lender lends a log memory whose pages are there, as a daemon does. The reactor owns it.
type lender struct{ free [][]byte }

// newLender returns one that lends mem, of which nobody uses anything any more.
func newLender(mem []byte) *lender {
	l := &lender{}
	for b := range slices.Chunk(mem, writelog.SegmentSize) {
		if len(b) == writelog.SegmentSize {
			l.free = append(l.free, b)
		}
	}
	return l
}

// Lend implements writelog.Pool.
func (l *lender) Lend() []byte {
	n := len(l.free) - 1
	if n < 0 {
		return nil
	}
	b := l.free[n]
	l.free = l.free[:n]
	return b
}

// Return implements writelog.Pool.
func (l *lender) Return(b []byte) { l.free = append(l.free, b) }

// environment joins a reactor to the engine.
type environment struct{ *reactor.Reactor }

// AfterFunc implements engine.Env.
func (e environment) AfterFunc(d time.Duration, fn func()) engine.Timer {
	return e.Reactor.AfterFunc(d, fn)
}

// LeaseUntil implements engine.Env.
func (environment) LeaseUntil(time.Duration) {}

// load keeps a number of random 4 KiB writes in flight. The reactor owns it.
type load struct {
	im     *engine.Image
	rng    *rand.Rand
	blocks uint64 // of the image
	n      uint64 // writes that have completed
	stop   bool
	live   int
	idle   chan struct{} // closed when all have ended
	errs   int
}

// RequestDone implements engine.Completer.
func (l *load) RequestDone(r *engine.Request) {
	if r.Err != 0 {
		l.errs++
	}
	l.live--
	l.n++
	l.submit(r)
}

func (l *load) submit(r *engine.Request) {
	if l.stop {
		if l.live == 0 {
			close(l.idle)
		}
		return
	}
	l.live++
	r.Sector = l.rng.Uint64N(l.blocks) * 8
	l.im.Submit(r)
}

// writeThroughLog opens a new image with the log in a file, and writes to it for some time.
func writeThroughLog(ctx context.Context, path string, pool *lender, depth int, length time.Duration) (lab.Figures, error) {
	const size = 8 << 30
	f, err := writelog.OpenFile(ctx, path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.WriteAt(f.Buffer(writelog.DataOffset), 0); err != nil { // fio was here
		return nil, err
	}
	st := sink{mem.New()}
	id, err := engine.Create(ctx, st, "bench", engine.CreateOptions{Size: size})
	if err != nil {
		return nil, err
	}
	im, err := engine.Open(ctx, st, id, engine.OpenOptions{Log: f, URL: "mem:/bench", Host: "bench", Config: engine.Config{LogPool: pool, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}})
	if err != nil {
		return nil, err
	}
	r, err := reactor.New(reactor.Config{Name: "bench", Nice: daemon.ReactorNice, Spin: daemon.ReactorSpin()})
	if err != nil {
		return nil, err
	}
	defer func() { r.Stop(); <-r.Done() }()
	arena, err := uring.NewArena(32<<20 + depth*4096)
	if err != nil {
		return nil, err
	}
	defer arena.Close()
	logMemory, buffers := arena.Bytes()[:32<<20], arena.Bytes()[32<<20:]
	random := rand.NewChaCha8([32]byte{1})
	if _, err := random.Read(buffers); err != nil {
		return nil, err
	}
	l := &load{im: im, rng: rand.New(rand.NewPCG(1, 2)), blocks: size / 4096, idle: make(chan struct{})}
	if err := r.Call(func() {
		im.Start(environment{r}, r.File(f.Fd()), logMemory)
		r.OnTurn(im.EndTurn)
	}); err != nil {
		return nil, err
	}
	defer abandon(r, im)
	time.Sleep(100 * time.Millisecond)
	return l.measure(r, buffers, depth, length)
}

// measure starts the writes, and ends them after some time.
func (l *load) measure(r *reactor.Reactor, buffers []byte, depth int, length time.Duration) (lab.Figures, error) {
	var before, after syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := r.Call(func() {
		for i := range depth {
			l.submit(&engine.Request{Op: engine.Write, Sectors: 8, Buf: buffers[i*4096:][:4096], Done: l})
		}
	}); err != nil {
		return nil, err
	}
	time.Sleep(length)
	var n uint64
	var took time.Duration
	if err := r.Call(func() { n, took, l.stop = l.n, time.Since(began), true }); err != nil {
		return nil, err
	}
	<-l.idle
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
		return nil, err
	}
	if l.errs > 0 {
		return nil, fmt.Errorf("%d writes failed", l.errs)
	}
	cpu := after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano()
	return lab.Figures{"writes/s": float64(n) / took.Seconds(), "µs CPU": float64(cpu) / 1e3 / float64(n)}, nil
}

// abandon ends the work of an image.
func abandon(r *reactor.Reactor, im *engine.Image) {
	quiet := false
	for end := time.Now().Add(30 * time.Second); !quiet && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if r.Call(func() { im.Abandon(); quiet = im.Quiet() }) != nil {
			return
		}
	}
}
