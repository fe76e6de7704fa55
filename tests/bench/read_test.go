package bench

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/file"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

const readSize = 1 << 30

// requests keeps a number of requests in flight until there are no more, on the
// reactor.
type requests struct {
	im   *engine.Image
	next func() (sector uint64, ok bool)
	live int
	errs int
	idle chan struct{}
}

func (l *requests) RequestDone(r *engine.Request) {
	if r.Err != 0 {
		l.errs++
	}
	l.live--
	l.submit(r)
}

func (l *requests) submit(r *engine.Request) {
	s, ok := l.next()
	if !ok {
		if l.live == 0 {
			close(l.idle)
		}
		return
	}
	l.live++
	r.Sector = s
	l.im.Submit(r)
}

// disk is an image on a reactor.
type disk struct {
	b    *testing.B
	im   *engine.Image
	r    *reactor.Reactor
	bufs *uring.Arena
}

// run does one operation of size bytes at each sector that next says.
func (d *disk) run(op engine.Op, depth, size int, next func() (uint64, bool)) time.Duration {
	l := &requests{im: d.im, next: next, idle: make(chan struct{})}
	began := time.Now()
	call(d.b, d.r, func() {
		for i := range depth {
			l.submit(&engine.Request{Op: op, Sectors: uint32(size / 512), Buf: d.bufs.Bytes()[i*size:][:size], Done: l})
		}
	})
	<-l.idle
	if l.errs > 0 {
		d.b.Fatalf("%d requests failed", l.errs)
	}
	return time.Since(began)
}

func (d *disk) close() {
	for quiet := false; !quiet; time.Sleep(time.Millisecond) {
		call(d.b, d.r, func() { quiet = d.im.Quiet() })
	}
	call(d.b, d.r, func() { d.im.Close(func(error) {}) })
	d.r.Stop()
	<-d.r.Done()
	if err := d.bufs.Close(); err != nil {
		d.b.Fatal(err)
	}
}

func newDisk(b *testing.B, st backend.Store, id uuid.UUID, o engine.OpenOptions, cache *readcache.OSFile) *disk {
	b.Helper()
	r := newReactor(b)
	if cache != nil {
		o.Config.ReadCacheDevice = r.File(cache.Fd())
	}
	o.Config.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	im, err := engine.Open(context.Background(), st, id, o)
	if err != nil {
		b.Fatal(err)
	}
	bufs, err := uring.NewArena(32 << 20)
	if err != nil {
		b.Fatal(err)
	}
	return &disk{b, im, r, bufs}
}

// fill writes the whole image in order.
func fill(b *testing.B, st backend.Store, dir string) uuid.UUID {
	b.Helper()
	ctx := context.Background()
	id, err := engine.Create(ctx, st, "bench", engine.CreateOptions{Size: readSize})
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	if err := writelog.MakeFile(ctx, path, 256<<20, nil); err != nil {
		b.Fatal(err)
	}
	f, err := writelog.OpenFile(ctx, path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	mem, err := uring.NewArena(32 << 20)
	if err != nil {
		b.Fatal(err)
	}
	defer mem.Close()
	d := newDisk(b, st, id, engine.OpenOptions{Log: f, Host: "bench"}, nil)
	rand.NewChaCha8([32]byte{1}).Read(d.bufs.Bytes())
	call(b, d.r, func() {
		d.im.Start(environment{d.r}, d.r.File(f.Fd()), mem.Bytes())
		d.r.OnTurn(d.im.EndTurn)
	})
	d.run(engine.Write, 16, 1<<20, inOrder(1<<20))
	closed := make(chan error, 1)
	call(b, d.r, func() { d.im.Close(func(err error) { closed <- err }) })
	if err := <-closed; err != nil {
		b.Fatal(err)
	}
	d.close()
	return id
}

func inOrder(size int) func() (uint64, bool) {
	at := uint64(0)
	return func() (uint64, bool) {
		s := at
		at += uint64(size / 512)
		return s, s < readSize/512
	}
}

func random(n int) func() (uint64, bool) {
	rng := rand.New(rand.NewPCG(1, 2))
	return func() (uint64, bool) {
		n--
		return rng.Uint64N(readSize/4096) * 8, n >= 0
	}
}

// counting counts what is read of data objects.
type counting struct {
	backend.Store
	bytes atomic.Int64
}

func (s *counting) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	if strings.Contains(key, "/d/") {
		s.bytes.Add(int64(n))
	}
	return n, err
}

// raw reads all data objects of an image, eight pieces of 1 MiB at a time, and
// returns the bytes per second.
func raw(b *testing.B, st backend.Store, id uuid.UUID) float64 {
	b.Helper()
	var keys []string
	if err := st.List(context.Background(), id.String()+"/d/", func(k string) error { keys = append(keys, k); return nil }); err != nil {
		b.Fatal(err)
	}
	work := make(chan string)
	var bytes atomic.Int64
	var readers sync.WaitGroup
	began := time.Now()
	for range 8 {
		readers.Go(func() {
			p := make([]byte, 1<<20)
			for k := range work {
				for off := int64(0); ; off += int64(len(p)) {
					n, err := st.Get(context.Background(), k, p, off)
					if err != nil {
						b.Error(err)
						return
					}
					if bytes.Add(int64(n)); n < len(p) {
						break
					}
				}
			}
		})
	}
	for _, k := range keys {
		work <- k
	}
	close(work)
	readers.Wait()
	return float64(bytes.Load()) / time.Since(began).Seconds()
}

// chill takes the files below dir out of the page cache: so the disk is measured.
func chill(b *testing.B, dir string) {
	b.Helper()
	unix.Sync()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkReadPath reads an image in a file store through the engine and its read
// cache, which is on the same disk: in order beside the store alone, taking turns,
// and at random.
func BenchmarkReadPath(b *testing.B) {
	work := workDir(b)
	st, err := file.Create(context.Background(), filepath.Join(work, "store"))
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	readPath(b, work, st)
}

// workDir returns a new directory on the disk to measure.
func workDir(b *testing.B) string {
	b.Helper()
	base := *dir
	if base == "" {
		base = b.TempDir()
	}
	work, err := os.MkdirTemp(base, "lsd-read")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(work) })
	return work
}

// readPath reads an image in a store, with the read cache below work: as fast as the
// store can, and over a link that is far slower than it and the processor.
func readPath(b *testing.B, work string, inner backend.Store) {
	st := &counting{Store: inner}
	id := fill(b, st, work)
	b.Run("sequential", func(b *testing.B) { sequentialReads(b, work, inner, id) })
	b.Run("sequential-200MB", func(b *testing.B) { sequentialReads(b, work, &linked{Store: inner, rate: 200e6}, id) })
	b.Run("random-4k", func(b *testing.B) { randomReads(b, work, st, id) })
}

// linked is a store whose data comes over a link of so many bytes a second.
type linked struct {
	backend.Store
	rate float64
	mu   sync.Mutex
	free time.Time // guarded by mu: when the link has brought all that it was given
}

func (s *linked) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	s.mu.Lock()
	if now := time.Now(); s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(float64(n) / s.rate * 1e9))
	wait := time.Until(s.free)
	s.mu.Unlock()
	time.Sleep(wait)
	return n, err
}

// sequentialReads reads the image in order, beside the store alone, taking turns.
func sequentialReads(b *testing.B, work string, st backend.Store, id uuid.UUID) {
	for _, c := range []struct {
		depth, size int
	}{{1, 128 << 10}, {8, 128 << 10}, {8, 1 << 20}} {
		b.Run(fmt.Sprintf("depth=%d/size=%d", c.depth, c.size), func(b *testing.B) {
			var a, p []float64
			for i := range *rounds {
				chill(b, work)
				p = append(p, raw(b, st, id)/1e6)
				chill(b, work)
				withCache(b, work, fmt.Sprint(c.depth, c.size, i), st, id, func(d *disk, _ *readcache.Cache) {
					a = append(a, readSize/1e6/d.run(engine.Read, c.depth, c.size, inOrder(c.size)).Seconds())
				})
			}
			b.ReportMetric(Median(a), "lsd-MB/s")
			b.ReportMetric(Median(p), "store-MB/s")
			b.ReportMetric(Median(a)/Median(p), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// randomReads reads random blocks, most of which the cache does not have, and then
// the same ones again.
func randomReads(b *testing.B, work string, st *counting, id uuid.UUID) {
	const n = 100_000
	withCache(b, work, "random", st, id, func(d *disk, c *readcache.Cache) {
		before := st.bytes.Load()
		cold := d.run(engine.Read, 32, 4096, random(n))
		s := c.Stats()
		b.ReportMetric(float64(st.bytes.Load()-before)/float64(s.MissBytes), "fetched/missed")
		warm := d.run(engine.Read, 32, 4096, random(n))
		after := c.Stats()
		b.ReportMetric(n/cold.Seconds(), "cold-iops")
		b.ReportMetric(n/warm.Seconds(), "warm-iops")
		b.ReportMetric(float64(after.HitBytes-s.HitBytes)/(n*4096), "warm-hits")
		b.ReportMetric(float64(after.Written)/float64(after.Filled), "written/kept")
		b.ReportMetric(0, "ns/op")
	})
}

// withCache opens the image with a new cache of 1 GiB.
func withCache(b *testing.B, work, name string, st backend.Store, id uuid.UUID, fn func(*disk, *readcache.Cache)) {
	b.Helper()
	path := filepath.Join(work, "cache-"+name)
	f, err := readcache.OpenFile(context.Background(), path, 1<<30)
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(path)
	defer f.Close()
	c, err := readcache.Open(f, readcache.Options{})
	if err == nil {
		err = c.Load(context.Background())
	}
	if err != nil {
		b.Fatal(err)
	}
	d := newDisk(b, st, id, engine.OpenOptions{ReadOnly: true, Config: engine.Config{ReadCache: c}}, f)
	call(b, d.r, func() {
		d.im.Start(environment{d.r}, nil, nil)
		d.r.OnTurn(d.im.EndTurn)
	})
	fn(d, c)
	d.close()
	c.Close()
}
