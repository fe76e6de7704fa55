package bench

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
)

var (
	dir      = flag.String("bench.dir", "", "directory on the disk to measure (default: the temporary directory)")
	rounds   = flag.Int("bench.rounds", 5, "turns that each side takes")
	seconds  = flag.Int("bench.seconds", 3, "length of a turn")
	out      = flag.String("bench.out", "", "write the figures to this file, as JSON")
	logDepth = flag.Int("bench.logdepth", 0, "records of the log in flight (0: the default)")
)

// sink is a store that takes data objects and forgets them: what is measured is
// the engine, destaging included, and the disk under its log.
type sink struct{ *mem.Store }

func (s sink) Put(ctx context.Context, key string, data []byte) error {
	if strings.Contains(key, "/d/") {
		return ctx.Err()
	}
	return s.Store.Put(ctx, key, data)
}

// environment joins a reactor to the engine.
type environment struct{ *reactor.Reactor }

func (e environment) AfterFunc(d time.Duration, fn func()) engine.Timer {
	return e.Reactor.AfterFunc(d, fn)
}

func (environment) LeaseUntil(time.Duration) {}

const imageSize = 8 << 30

// load keeps a number of random 4 KiB writes in flight, on the reactor.
type load struct {
	im   *engine.Image
	rng  *rand.Rand
	n    uint64
	stop bool
	live int
	idle chan struct{}
	errs int
}

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
	r.Sector = l.rng.Uint64N(imageSize/4096) * 8
	l.im.Submit(r)
}

// ours returns the writes per second that the engine acknowledges.
func ours(b *testing.B, path string, depth int) float64 {
	b.Helper()
	ctx := context.Background()
	f, err := writelog.OpenFile(ctx, path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(f.Buffer(8192), 0); err != nil { // fio was here
		b.Fatal(err)
	}
	st := sink{mem.New()}
	id, err := engine.Create(ctx, st, "bench", engine.CreateOptions{Size: imageSize})
	if err != nil {
		b.Fatal(err)
	}
	im, err := engine.Open(ctx, st, id, engine.OpenOptions{Log: f, URL: "mem:/bench", Host: "bench", Config: engine.Config{
		LogDepth: *logDepth, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}})
	if err != nil {
		b.Fatal(err)
	}
	r := newReactor(b)
	logMem, err := uring.NewArena(32 << 20)
	if err != nil {
		b.Fatal(err)
	}
	defer logMem.Close()
	bufs, err := uring.NewArena(depth * 4096)
	if err != nil {
		b.Fatal(err)
	}
	defer bufs.Close()
	random := rand.NewChaCha8([32]byte{1})
	random.Read(bufs.Bytes())

	l := &load{im: im, rng: rand.New(rand.NewPCG(1, 2)), idle: make(chan struct{})}
	call(b, r, func() {
		im.Start(environment{r}, r.File(f.Fd()), logMem.Bytes())
		r.OnTurn(im.EndTurn)
	})
	time.Sleep(100 * time.Millisecond)
	var n0, n1 uint64
	began := time.Now()
	call(b, r, func() {
		n0 = l.n
		for i := range depth {
			l.submit(&engine.Request{Op: engine.Write, Sectors: 8, Buf: bufs.Bytes()[i*4096:][:4096], Done: l})
		}
	})
	time.Sleep(time.Duration(*seconds) * time.Second)
	var took time.Duration
	call(b, r, func() { n1, took, l.stop = l.n, time.Since(began), true })
	<-l.idle
	if l.errs > 0 {
		b.Fatalf("%d writes failed", l.errs)
	}
	quiet := false
	for deadline := time.Now().Add(30 * time.Second); !quiet && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		call(b, r, func() {
			im.Abandon()
			quiet = im.Quiet()
		})
	}
	r.Stop()
	<-r.Done()
	return float64(n1-n0) / took.Seconds()
}

// What is measured runs as the daemon does.
func init() { daemon.SpareProcessors() }

func newReactor(b *testing.B) *reactor.Reactor {
	b.Helper()
	r, err := reactor.New(reactor.Config{Name: "bench", Nice: daemon.ReactorNice, Spin: daemon.ReactorSpin()})
	if err != nil {
		b.Fatal(err)
	}
	return r
}

func call(b *testing.B, r *reactor.Reactor, fn func()) {
	b.Helper()
	if err := r.Call(fn); err != nil {
		b.Fatal(err)
	}
}

// fio returns the writes per second that fio does on the same file.
func fio(b *testing.B, path string, depth int) float64 {
	b.Helper()
	cmd := exec.Command("fio", "--name=peer", "--filename="+path, "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bs=4k",
		fmt.Sprintf("--iodepth=%d", depth), "--time_based", fmt.Sprintf("--runtime=%d", *seconds), "--randrepeat=0", "--norandommap", "--output-format=json")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("fio: %v", err)
	}
	var res struct {
		Jobs []struct {
			Write struct{ IOPS float64 }
		}
	}
	if err := json.Unmarshal(out, &res); err != nil || len(res.Jobs) != 1 {
		b.Fatalf("fio said %q: %v", out, err)
	}
	return res.Jobs[0].Write.IOPS
}

// BenchmarkWriteBesideFio writes random 4 KiB blocks through the engine, the
// write log on the disk included, and with fio on the same file, taking turns.
func BenchmarkWriteBesideFio(b *testing.B) {
	d := *dir
	if d == "" {
		d = b.TempDir()
	}
	path := filepath.Join(d, "lsd-bench.log")
	os.Remove(path)
	if err := writelog.MakeFile(context.Background(), path, 1<<30, nil); err != nil {
		b.Fatal(err)
	}
	defer os.Remove(path)
	res := Results{
		Title: "4 KiB random writes: lsd's engine beside fio on the same file", Unit: "IOPS", Ours: "lsd", Peer: "fio io_uring, O_DIRECT",
		Command: fmt.Sprintf("make bench-engine (%d turns of %d s each, medians)", *rounds, *seconds),
	}
	for _, depth := range []int{1, 32, 128} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			var a, p []float64
			var before, after syscall.Rusage
			var cpu time.Duration
			for range *rounds {
				p = append(p, fio(b, path, depth))
				syscall.Getrusage(syscall.RUSAGE_SELF, &before)
				a = append(a, ours(b, path, depth))
				syscall.Getrusage(syscall.RUSAGE_SELF, &after)
				cpu += time.Duration(after.Utime.Nano() - before.Utime.Nano() + after.Stime.Nano() - before.Stime.Nano())
			}
			b.ReportMetric(Median(a), "lsd-iops")
			b.ReportMetric(Median(p), "fio-iops")
			b.ReportMetric(Median(a)/Median(p), "ratio")
			b.ReportMetric(cpu.Seconds()/float64(*rounds**seconds), "lsd-cpus")
			b.ReportMetric(0, "ns/op")
			b.Logf("lsd %.0f, fio %.0f", a, p)
			res.Rows = append(res.Rows, Row{Name: fmt.Sprintf("depth %d", depth), Ours: a, Peer: p})
		})
	}
	if *out != "" {
		if err := res.Write(*out); err != nil {
			b.Fatal(err)
		}
	}
}
