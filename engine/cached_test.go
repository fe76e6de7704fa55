package engine_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/memfile"
)

var silent = slog.New(slog.NewTextHandler(io.Discard, nil))

// loop is a reactor without a ring, which works on a simulated clock too.
type loop struct {
	posted chan func()
	began  time.Time
	hook   func() // ends a turn; the loop's own
}

func newLoop() *loop {
	l := &loop{posted: make(chan func(), 1<<16), began: time.Now(), hook: func() {}}
	go func() {
		for fn := range l.posted {
			fn()
			l.hook()
		}
	}()
	return l
}

func (l *loop) Now() time.Duration { return time.Since(l.began) }

func (l *loop) Spawn(work, done func()) {
	go func() {
		work()
		l.posted <- done
	}()
}

func (l *loop) Post(fn func()) { l.posted <- fn }

func (*loop) LeaseUntil(time.Duration) {}

func (l *loop) AfterFunc(d time.Duration, fn func()) engine.Timer {
	return timer{time.AfterFunc(d, func() { l.posted <- fn })}
}

type timer struct{ *time.Timer }

func (t timer) Reset(d time.Duration) { t.Timer.Reset(d) }

func (l *loop) call(fn func()) {
	ran := make(chan struct{})
	l.posted <- func() { fn(); close(ran) }
	<-ran
}

// file is a file in memory: for the write log, and for the read cache.
type file struct {
	*memfile.File
	mu    sync.Mutex
	reads int // guarded by mu
}

func newFile(size int64) *file { return &file{File: memfile.New(size)} }

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	return f.File.ReadAt(p, off)
}

func (f *file) readsSoFar() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reads
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.File.WriteAt(p, off)
}

// device is a file on a loop's ring.
type device struct {
	f     *file
	l     *loop
	reads int
}

func (d *device) ReadAt(p []byte, off int64, c aio.Completer) {
	d.reads++
	n, _ := d.f.ReadAt(p, off)
	d.l.posted <- func() { c.Complete(int32(n), 0) }
}

func (d *device) WriteAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.f.WriteAt(p, off)
	d.l.posted <- func() { c.Complete(int32(n), 0) }
}

func (d *device) Sync(c aio.Completer) { d.l.posted <- func() { c.Complete(0, 0) } }

// farStore is a store with a latency, and a bandwidth that all its users share.
// It counts what is read of data objects.
type farStore struct {
	backend.Store
	latency   time.Duration
	bandwidth float64 // bytes per second; 0: no limit
	bytes     atomic.Int64
	gets      atomic.Int64

	mu   sync.Mutex
	free time.Time // guarded by mu: when the line is free
}

func (s *farStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.Store.Get(ctx, key, p, off)
	if !strings.Contains(key, "/d/") {
		return n, err
	}
	s.gets.Add(1)
	s.bytes.Add(int64(n))
	// The line carries what was asked for in that order.
	s.mu.Lock()
	now := time.Now()
	end := now.Add(s.latency)
	if s.bandwidth > 0 {
		if s.free.After(end) {
			end = s.free
		}
		end = end.Add(time.Duration(float64(n) / s.bandwidth * float64(time.Second)))
		s.free = end
	}
	s.mu.Unlock()
	time.Sleep(end.Sub(now))
	return n, err
}

const (
	imageSize   = 96 << 20
	imageBlocks = imageSize / 4096
)

// stampSectors writes into each sector where it is.
func stampSectors(p []byte, sector uint64) {
	for ; len(p) > 0; p, sector = p[512:], sector+1 {
		binary.LittleEndian.PutUint64(p, sector+1)
		binary.LittleEndian.PutUint64(p[504:], ^sector)
	}
}

func checkSectors(t *testing.T, p []byte, sector uint64) {
	for ; len(p) > 0; p, sector = p[512:], sector+1 {
		if binary.LittleEndian.Uint64(p) != sector+1 || binary.LittleEndian.Uint64(p[504:]) != ^sector {
			t.Errorf("sector %d reads wrong", sector)
			return
		}
	}
}

// client keeps a number of requests in flight until it has none left to ask for.
type client struct {
	t    *testing.T
	l    *loop
	im   *engine.Image
	next func() (sector uint64, sectors uint32, ok bool)
	op   engine.Op
	live int
	done chan struct{}
}

func (c *client) RequestDone(r *engine.Request) {
	if r.Err != 0 {
		c.t.Errorf("request at %d: %v", r.Sector, r.Err)
	}
	if c.op == engine.Read {
		checkSectors(c.t, r.Buf, r.Sector)
	}
	c.live--
	c.l.posted <- func() { c.submit(r) }
}

func (c *client) submit(r *engine.Request) {
	sector, n, ok := c.next()
	if !ok {
		if c.live == 0 && c.done != nil {
			close(c.done)
			c.done = nil
		}
		return
	}
	c.live++
	r.Sector, r.Sectors = sector, n
	r.Buf = r.Buf[:n*512]
	if c.op == engine.Write {
		stampSectors(r.Buf, sector)
	} else {
		clear(r.Buf)
	}
	c.im.Submit(r)
}

// drive runs requests of up to size bytes, depth at a time, and returns how long
// they took.
func drive(t *testing.T, l *loop, im *engine.Image, op engine.Op, depth, size int, next func() (uint64, uint32, bool)) time.Duration {
	c := &client{t: t, l: l, im: im, op: op, next: next, done: make(chan struct{})}
	done := c.done
	began := time.Now()
	for range depth {
		l.posted <- func() { c.submit(&engine.Request{Op: op, Buf: make([]byte, size), Done: c}) }
	}
	<-done
	return time.Since(began)
}

// inOrder asks for the whole image.
func inOrder(size int) func() (uint64, uint32, bool) {
	at := uint64(0)
	return func() (uint64, uint32, bool) {
		s := at
		at += uint64(size / 512)
		return s, uint32(size / 512), s < imageSize/512
	}
}

// shuffled asks for every block of the image once.
func shuffled() func() (uint64, uint32, bool) {
	perm, i := rand.New(rand.NewPCG(5, 5)).Perm(imageBlocks), 0
	return func() (uint64, uint32, bool) {
		if i == len(perm) {
			return 0, 0, false
		}
		i++
		return uint64(perm[i-1]) * 8, 8, true
	}
}

// uniform asks for n random blocks.
func uniform(n int) func() (uint64, uint32, bool) {
	rng := rand.New(rand.NewPCG(6, 6))
	return func() (uint64, uint32, bool) {
		n--
		return rng.Uint64N(imageBlocks) * 8, 8, n >= 0
	}
}

// written returns an image that has been written all over, in order or not.
func written(t *testing.T, st backend.Store, scattered bool) uuid.UUID {
	t.Helper()
	return writtenInObjects(t, st, engine.DefaultObjectSize, scattered)
}

// writtenInObjects is written with objects of some size.
func writtenInObjects(t *testing.T, st backend.Store, object uint32, scattered bool) uuid.UUID {
	t.Helper()
	id, err := engine.Create(context.Background(), st, "disk", engine.CreateOptions{Size: imageSize, ObjectSize: object})
	if err != nil {
		t.Fatal(err)
	}
	l := newLoop()
	im := openWriter(t, st, id, l, engine.Config{Logger: silent})
	if scattered {
		drive(t, l, im, engine.Write, 32, 4096, shuffled())
	} else {
		drive(t, l, im, engine.Write, 8, 1<<20, inOrder(1<<20))
	}
	closeWriter(t, l, im)
	return id
}

// openWriter opens an image that is to be written, with a new log.
func openWriter(t *testing.T, st backend.Store, id uuid.UUID, l *loop, c engine.Config) *engine.Image {
	t.Helper()
	f := newFile(2 * writelog.MinSize)
	im, err := engine.Open(context.Background(), st, id, engine.OpenOptions{Log: f, Host: "test", Config: c})
	if err != nil {
		t.Fatal(err)
	}
	l.call(func() {
		im.Start(l, &device{f: f, l: l}, make([]byte, 4*writelog.SegmentSize))
		l.hook = im.EndTurn
	})
	return im
}

// closeWriter brings all into the store, and waits until nobody is at it any more.
func closeWriter(t *testing.T, l *loop, im *engine.Image) {
	t.Helper()
	defer close(l.posted)
	closed := make(chan error, 1)
	l.call(func() { im.Close(func(err error) { closed <- err }) })
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
}

// reader is an image that is read through a cache.
type reader struct {
	t   *testing.T
	l   *loop
	im  *engine.Image
	dev *device
}

func openReader(t *testing.T, st backend.Store, id uuid.UUID, cache *readcache.Cache, f *file) *reader {
	t.Helper()
	r := &reader{t: t, l: newLoop()}
	c := engine.Config{Logger: silent, ReadCache: cache}
	if f != nil {
		r.dev = &device{f: f, l: r.l}
		c.ReadCacheDevice = r.dev
	}
	var err error
	if r.im, err = engine.Open(context.Background(), st, id, engine.OpenOptions{ReadOnly: true, Config: c}); err != nil {
		t.Fatal(err)
	}
	r.l.call(func() { r.im.Start(r.l, nil, nil) })
	return r
}

func (r *reader) close() {
	for quiet := false; !quiet; time.Sleep(time.Second) {
		r.l.call(func() { quiet = r.im.Quiet() })
	}
	r.l.call(func() { r.im.Close(func(error) {}) })
	close(r.l.posted)
}

func openCache(t *testing.T, f *file) *readcache.Cache {
	t.Helper()
	return openCacheWith(t, f, readcache.Options{})
}

func openCacheWith(t *testing.T, f *file, o readcache.Options) *readcache.Cache {
	t.Helper()
	o.Logger = silent
	c, err := readcache.Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRandomReadsFetchLittle: random reads of 4 KiB fetch at most half as much
// again as they ask for, headers included, with a small cache and without one.
func TestRandomReadsFetchLittle(t *testing.T) {
	for name, c := range map[string]struct{ scattered, cached bool }{
		"written in order":      {false, true},
		"written at random":     {true, true},
		"without a cache's SSD": {true, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &farStore{Store: mem.New(), latency: time.Millisecond}
				id := written(t, st, c.scattered)
				st.bytes.Store(0)
				cache, f := readcache.None(readcache.Options{}), (*file)(nil)
				if c.cached {
					f = newFile(readcache.MinSize)
					cache = openCache(t, f)
				}
				r := openReader(t, st, id, cache, f)
				const reads = 30_000
				drive(t, r.l, r.im, engine.Read, 32, 4096, uniform(reads))
				s := cache.Stats()
				r.close()
				asked := float64(s.MissBytes)
				t.Logf("%.0f MiB read, %.0f MiB of it missed, %.3f times that fetched", float64(reads*4096)/(1<<20), asked/(1<<20), float64(st.bytes.Load())/asked)
				if got := float64(st.bytes.Load()); got > 1.5*asked || got != float64(s.Fetched) {
					t.Errorf("%.0f bytes fetched for %.0f that were missed; %d were counted", got, asked, s.Fetched)
				}
				if c.cached && s.HitBytes == 0 {
					t.Error("nothing was found")
				}
			})
		})
	}
}

// TestSequentialReadsUseTheStore: one sequential reader gets nine tenths of what
// the store can give, at any depth and size of requests.
func TestSequentialReadsUseTheStore(t *testing.T) {
	for name, c := range map[string]struct {
		depth, size int
		latency     time.Duration
		cached      bool
	}{
		"128 KiB":                 {1, 128 << 10, 2 * time.Millisecond, false},
		"128 KiB, cached":         {1, 128 << 10, 2 * time.Millisecond, true},
		"4 KiB":                   {1, 4 << 10, 2 * time.Millisecond, true},
		"4 KiB, depth 32":         {32, 4 << 10, 2 * time.Millisecond, false},
		"1 MiB, depth 8":          {8, 1 << 20, 2 * time.Millisecond, true},
		"128 KiB, higher latency": {4, 128 << 10, 5 * time.Millisecond, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const bandwidth = 400e6
				st := &farStore{Store: mem.New()}
				id := written(t, st, false)
				st.latency, st.bandwidth = c.latency, bandwidth
				cache, f := readcache.None(readcache.Options{}), (*file)(nil)
				if c.cached {
					f = newFile(readcache.MinSize)
					cache = openCache(t, f)
				}
				st.bytes.Store(0)
				r := openReader(t, st, id, cache, f)
				took := drive(t, r.l, r.im, engine.Read, c.depth, c.size, inOrder(c.size))
				r.close()
				got := imageSize / took.Seconds() / bandwidth
				t.Logf("%.3f of the store's bandwidth, %.3f times the image fetched", got, float64(st.bytes.Load())/imageSize)
				if got < 0.9 {
					t.Errorf("%.3f of the store's bandwidth", got)
				}
				if n := st.bytes.Load(); n > imageSize*102/100 {
					t.Errorf("%d bytes fetched for an image of %d", n, imageSize)
				}
			})
		})
	}
}

// TestScatteredReadsAreGathered: what was written block by block in another order is read from
// the store in much larger pieces by who reads it in order, each of them once.
func TestScatteredReadsAreGathered(t *testing.T) {
	for name, c := range map[string]struct {
		depth, size int
		object      uint32
		pieces      int64 // blocks that are read at one time, at least, on average
	}{
		"1 MiB, depth 8": {8, 1 << 20, engine.DefaultObjectSize, 20},
		"128 KiB":        {1, 128 << 10, engine.DefaultObjectSize, 80},
		"4 KiB":          {1, 4 << 10, engine.DefaultObjectSize, 80},
		"small objects":  {1, 128 << 10, engine.MinObjectSize, 16}, // more than fetches at one time
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &farStore{Store: mem.New(), latency: time.Millisecond}
				id := writtenInObjects(t, st, c.object, true)
				cache := readcache.None(readcache.Options{})
				r := openReader(t, st, id, cache, nil)
				st.gets.Store(0)
				st.bytes.Store(0)
				drive(t, r.l, r.im, engine.Read, c.depth, c.size, inOrder(c.size))
				r.close()
				gets, bytes, left := st.gets.Load(), st.bytes.Load(), cache.Stats().Memory
				t.Logf("%d operations for %d blocks, %.3f times the image fetched, %d bytes left", gets, imageBlocks, float64(bytes)/imageSize, left)
				if gets > imageBlocks/c.pieces || bytes > imageSize*102/100 {
					t.Errorf("%d operations of the store for %d blocks, %d bytes for %d", gets, imageBlocks, bytes, imageSize)
				}
				if left > 1<<20 {
					t.Errorf("%d bytes that were read ahead are still there", left)
				}
			})
		})
	}
}

// TestScatteredReadsOfTheSSD: the same of what the read cache has.
func TestScatteredReadsOfTheSSD(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &farStore{Store: mem.New(), latency: time.Millisecond}
		id := written(t, st, true)
		f := newFile(160 << 20)
		cache := openCache(t, f)
		r := openReader(t, st, id, cache, f)
		round := func() (fetched uint64, reads int) {
			before, was := cache.Stats().Fetched, f.readsSoFar()
			drive(t, r.l, r.im, engine.Read, 1, 128<<10, inOrder(128<<10))
			return cache.Stats().Fetched - before, f.readsSoFar() - was
		}
		fetched, reads := round()
		for i := 0; i < 10 && fetched > imageSize/10; i++ { // the cache does not take all at once
			fetched, reads = round()
		}
		t.Logf("at last %d bytes from the store, %d reads of the SSD for %d blocks", fetched, reads, imageBlocks)
		// What the cache had no room for at first, in buffers that are being written, came to it later
		// and lies elsewhere: how much that is depends on when workers run.
		// And the ghost, by which it knows what it has seen, loses some.
		if fetched > imageSize/10 || reads > imageBlocks/4 {
			t.Errorf("%d bytes come from the store, and %d reads of the SSD for %d blocks", fetched, reads, imageBlocks)
		}
		s := cache.Stats()
		if s.HitBytes < imageSize*9/10 || s.Mismatches != 0 {
			t.Errorf("stats: %+v", s)
		}
		r.close()
	})
}

// TestSharedCache: two images with the same objects, as clones are, fetch each
// place once, whether they read at the same time or one after the other.
func TestSharedCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &farStore{Store: mem.New(), latency: time.Millisecond}
		id := written(t, st, true)
		st.bytes.Store(0)
		f := newFile(160 << 20)
		cache := openCache(t, f)
		a, b := openReader(t, st, id, cache, f), openReader(t, st, id, cache, f)
		var both sync.WaitGroup
		for _, r := range []*reader{a, b} {
			both.Go(func() { drive(t, r.l, r.im, engine.Read, 16, 4096, shuffled()) })
		}
		both.Wait()
		if n := st.bytes.Load(); n > imageSize*101/100 {
			t.Errorf("%d bytes fetched for an image of %d", n, imageSize)
		}
		if s := cache.Stats(); s.Joined == 0 {
			t.Error("no read waited for another's fetch")
		}
		a.close()
		b.close()

		cache.Close()
		cache = openCache(t, f)
		st.bytes.Store(0)
		c := openReader(t, st, id, cache, f)
		drive(t, c.l, c.im, engine.Read, 16, 4096, shuffled())
		c.close()
		if n := st.bytes.Load(); n != 0 {
			t.Errorf("%d bytes fetched after a restart of the cache", n)
		}
		if c.dev.reads == 0 {
			t.Error("nothing was read through the ring")
		}
	})
}

// TestHotReads: what is read again and again comes from memory in the end, as far as there is some.
func TestHotReads(t *testing.T) {
	for _, part := range []int64{1, 4} { // of the image for which there is memory
		t.Run(fmt.Sprint("1/", part), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				st := &farStore{Store: mem.New(), latency: time.Millisecond}
				id := written(t, st, false)
				f := newFile(160 << 20)
				cache := openCacheWith(t, f, readcache.Options{Memory: imageSize/part + 8<<20})
				r := openReader(t, st, id, cache, f)
				round := func() int {
					before := r.dev.reads
					drive(t, r.l, r.im, engine.Read, 16, 4096, shuffled())
					return r.dev.reads - before
				}
				round()
				first := round()
				last, most := first, first-first/int(part)
				for i := 0; i < 20 && last > most; i++ { // workers take their time
					last = round()
				}
				if first < imageSize/4096/2 || last > most {
					t.Errorf("%d blocks were read from the SSD in the second round and %d in the last, of %d; at most %d were to be", first, last, imageSize/4096, most)
				}
				if s := cache.Stats(); s.Warm > imageSize/uint64(part)+8<<20 || s.Mismatches != 0 {
					t.Errorf("stats: %+v", s)
				}
				r.close()
				cache.Close()
			})
		})
	}
}

// TestDeletedObjectsLeaveTheCache: what the read cache has of objects that are deleted, since all of them
// has been overwritten, is not in it any more.
func TestDeletedObjectsLeaveTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &farStore{Store: mem.New(), latency: time.Millisecond}
		id := written(t, st, false)
		f, l := newFile(160<<20), newLoop()
		cache := openCache(t, f)
		im := openWriter(t, st, id, l, engine.Config{Logger: silent, ReadCache: cache, ReadCacheDevice: &device{f: f, l: l}})
		drive(t, l, im, engine.Read, 16, 4096, shuffled())
		before := cache.Stats()
		drive(t, l, im, engine.Write, 8, 1<<20, inOrder(1<<20))
		closeWriter(t, l, im)
		after := cache.Stats()
		if before.Used < imageSize*9/10 || after.Used > imageSize/10 || after.Forgotten != before.Used-after.Used {
			t.Errorf("%d bytes were cached, and %d when all of it had been overwritten; %d were forgotten", before.Used, after.Used, after.Forgotten)
		}
		r := openReader(t, st, id, cache, f)
		drive(t, r.l, r.im, engine.Read, 16, 4096, shuffled())
		r.close()
		if s := cache.Stats(); s.Used < imageSize*9/10 || s.Mismatches != 0 {
			t.Errorf("stats when it had been read again: %+v", s)
		}
		cache.Close()
	})
}

// TestClonesShareTheCache: ten clones of an image, each read once, fetch it from the store once.
func TestClonesShareTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &farStore{Store: mem.New(), latency: time.Millisecond}
		id := written(t, st, true)
		f := newFile(160 << 20)
		cache := openCache(t, f)
		st.bytes.Store(0)
		for i := range 10 {
			clone, err := engine.Clone(t.Context(), st, id, fmt.Sprint("clone", i), engine.CloneOptions{})
			if err != nil {
				t.Fatal(err)
			}
			r := openReader(t, st, clone, cache, f)
			drive(t, r.l, r.im, engine.Read, 16, 4096, shuffled())
			r.close()
		}
		if n := st.bytes.Load(); n > imageSize*102/100 || n < imageSize {
			t.Errorf("%d bytes fetched by ten clones of an image of %d", n, imageSize)
		}
	})
}

// TestDamagedCache: what the SSD gives back wrong comes from the store.
func TestDamagedCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &farStore{Store: mem.New()}
		id := written(t, st, false)
		f := newFile(160 << 20)
		cache := openCache(t, f)
		r := openReader(t, st, id, cache, f)
		drive(t, r.l, r.im, engine.Read, 4, 4096, shuffled())
		cache.Close()
		b := make([]byte, 1)
		for i := int64(5*4096 + 100); i < f.Size(); i += 64 << 10 {
			_, _ = f.ReadAt(b, i)
			b[0] ^= 1
			_, _ = f.WriteAt(b, i)
		}
		r.close()
		cache = openCache(t, f)
		r = openReader(t, st, id, cache, f)
		drive(t, r.l, r.im, engine.Read, 4, 64<<10, inOrder(64<<10))
		r.close()
		if s := cache.Stats(); s.Mismatches == 0 || s.HitBytes == 0 {
			t.Errorf("stats: %+v", s)
		}
	})
}

// instant is a device whose operations end when complete is called, and an
// environment that runs nothing.
type instant struct {
	f    *file
	c    []aio.Completer
	res  []int32
	last int      // workers that were asked for
	done []func() // of jobs that have run
}

func (d *instant) ReadAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.f.ReadAt(p, off)
	d.c, d.res = append(d.c, c), append(d.res, int32(n))
}
func (d *instant) WriteAt([]byte, int64, aio.Completer) {}
func (d *instant) Sync(aio.Completer)                   {}
func (d *instant) LeaseUntil(time.Duration)             {}
func (d *instant) Post(fn func())                       { d.done = append(d.done, fn) }
func (d *instant) Now() time.Duration                   { return 0 }
func (d *instant) Spawn(work, done func())              { d.last++; work(); d.done = append(d.done, done) }
func (d *instant) AfterFunc(time.Duration, func()) engine.Timer {
	return timer{time.NewTimer(time.Hour)}
}
func (d *instant) complete() {
	for len(d.c)+len(d.done) > 0 {
		for i := 0; i < len(d.c); i++ {
			d.c[i].Complete(d.res[i], 0)
		}
		d.c, d.res = d.c[:0], d.res[:0]
		done := d.done
		d.done = nil
		for _, fn := range done {
			fn()
		}
	}
}

type counted int

func (c *counted) RequestDone(r *engine.Request) {
	if r.Err == 0 {
		*c++
	}
}

// TestHitsDoNotAllocate: what the SSD has is read without a worker, a lock to wait
// for, or an allocation.
func TestHitsDoNotAllocate(t *testing.T) {
	st := &farStore{Store: mem.New(), latency: time.Millisecond}
	var id uuid.UUID
	f := newFile(160 << 20)
	synctest.Test(t, func(t *testing.T) {
		id = written(t, st, false)
		cache := openCache(t, f)
		r := openReader(t, st, id, cache, f)
		drive(t, r.l, r.im, engine.Read, 4, 4096, shuffled())
		r.close()
		cache.Close()
	})
	for _, c := range []struct {
		size   int
		memory int64
	}{{4096, 0}, {16 << 10, 0}, {4096, imageSize + 8<<20}} {
		size, d := c.size, &instant{f: f}
		im, err := engine.Open(context.Background(), st, id, engine.OpenOptions{ReadOnly: true, Config: engine.Config{
			Logger: silent, ReadCache: openCacheWith(t, f, readcache.Options{Memory: c.memory, WarmBlocks: 1}), ReadCacheDevice: d,
		}})
		if err != nil {
			t.Fatal(err)
		}
		im.Start(d, nil, nil)
		var done counted
		rng := rand.New(rand.NewPCG(1, 1))
		r := &engine.Request{Op: engine.Read, Sectors: uint32(size / 512), Buf: make([]byte, size), Done: &done}
		read := func() {
			r.Sector = rng.Uint64N(imageSize/uint64(size)) * uint64(size/512)
			im.Submit(r)
			d.complete()
		}
		for range 1000 {
			read()
		}
		loads := d.last // of the map, and of what is read most
		if n := testing.AllocsPerRun(2000, read); n != 0 {
			t.Errorf("%v allocations for each read of %d bytes", n, size)
		}
		checkSectors(t, r.Buf, r.Sector)
		if done != 3001 || d.last != loads || loads > 2+int(c.memory/readcache.SegmentSize) {
			t.Errorf("%d of 3001 reads ended; %d jobs on workers while the map was loaded, %d afterwards", done, loads, d.last-loads)
		}
	}
}
