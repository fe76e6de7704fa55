package readcache

import (
	"errors"
	"testing"
)

// warmCache is a cache with memory for some segments, in which objects of a segment each are kept, on
// the SSD; and counts of what has been allocated and not freed.
type warmCache struct {
	*Cache
	u    *Client
	f    *memFile
	live int // segments of memory
}

func newWarmCache(t *testing.T, segments int64) *warmCache {
	t.Helper()
	w := &warmCache{f: newMemFile(MinSize)}
	allocate := func(n int) ([]byte, func() error, error) {
		w.live++
		return make([]byte, n), func() error { w.live--; return nil }, nil
	}
	w.Cache = mustOpenWarm(t, w.f, segments, 0)
	w.warm.allocate = allocate
	w.u = w.Client()
	return w
}

// keep reads the blocks of n whole segments of object after object, and has them written.
func (w *warmCache) keep(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		for b := range maxEntries {
			read(t, w.u, uint64(i), b*BlockSize, BlockSize, Keep)
		}
	}
	w.Maintain()
	for i := range w.segments {
		w.segments[i].heat.Store(0)
	}
}

// scan asks for all blocks of the segment of object n, so many times.
func (w *warmCache) scan(t *testing.T, n uint64, times int) {
	t.Helper()
	for range times {
		for b := range maxEntries {
			if read(t, w.u, n, b*BlockSize, BlockSize, Keep) {
				t.Fatalf("block %d of object %d is not in the cache", b, n)
			}
			w.u.Hit(BlockSize)
		}
	}
}

// isWarm reports whether the first block of object n is in memory.
func (w *warmCache) isWarm(n uint64) bool {
	k := key(w.Cache, n)
	return w.Next(&k, 0, 1, false).Memory
}

// TestWarm: what is asked for again and again is read from memory, what a scan asks for is not, and
// Rest lets go of what nobody has asked for in a while.
func TestWarm(t *testing.T) {
	w := newWarmCache(t, 4)
	w.keep(t, 3)
	w.scan(t, 1, 1)
	if w.isWarm(1) || w.Stats().Warm != 0 {
		t.Error("a scan has taken a segment into memory")
	}
	w.scan(t, 1, 2)
	if !w.isWarm(1) || w.isWarm(0) || w.isWarm(2) {
		t.Errorf("in memory: %v, %v and %v; only the second has been read much", w.isWarm(0), w.isWarm(1), w.isWarm(2))
	}
	before := w.f.reads.Load()
	w.scan(t, 1, 1)
	if n := w.f.reads.Load() - before; n != 0 {
		t.Errorf("%d bytes of what is in memory were read from the SSD", n)
	}
	if s := w.Stats(); s.Warm != SegmentSize || s.Mismatches+s.Errors != 0 {
		t.Errorf("stats: %+v", s)
	}
	for range coldRests {
		w.Rest()
	}
	if !w.isWarm(1) {
		t.Error("it has been let go of though it had been read since the first Rest")
	}
	w.Rest()
	if w.isWarm(1) || w.live != 0 || w.Stats().Warm != 0 {
		t.Errorf("what nobody reads is in memory still, or its memory is: %d segments", w.live)
	}
}

// TestWarmest: where there is no memory left, what is read much more takes the place of what is read
// least; what is read as much does not.
func TestWarmest(t *testing.T) {
	w := newWarmCache(t, 2)
	w.keep(t, 4)
	w.scan(t, 0, 3)
	w.scan(t, 1, 6)
	w.scan(t, 2, 3)
	if !w.isWarm(0) || !w.isWarm(1) || w.isWarm(2) {
		t.Errorf("in memory: %v, %v, %v; want the first two", w.isWarm(0), w.isWarm(1), w.isWarm(2))
	}
	w.scan(t, 2, 20)
	if w.isWarm(0) || !w.isWarm(1) || !w.isWarm(2) {
		t.Errorf("in memory: %v, %v, %v; want the last two", w.isWarm(0), w.isWarm(1), w.isWarm(2))
	}
	if w.live != 2 {
		t.Errorf("%d segments of memory, bound 2", w.live)
	}
	w.Close()
	if w.live != 0 {
		t.Errorf("%d segments of memory after Close", w.live)
	}
}

// TestWarmHalves: what was read much once does not keep out what is read now.
func TestWarmHalves(t *testing.T) {
	w := newWarmCache(t, 1)
	w.keep(t, 2)
	w.scan(t, 0, 40)
	w.scan(t, 1, 20) // its own heat is halved on the way
	if w.isWarm(0) || !w.isWarm(1) {
		t.Errorf("in memory: %v, %v; want the second", w.isWarm(0), w.isWarm(1))
	}
}

// TestWarmReclaimed: a warm segment that is reclaimed is one like others, and its memory goes.
func TestWarmReclaimed(t *testing.T) {
	w := newWarmCache(t, 2)
	w.keep(t, 2)
	w.scan(t, 0, 3)
	if !w.isWarm(0) {
		t.Fatal("it is not in memory")
	}
	for n := uint64(100); n < 200; n++ { // more than the cache holds
		read(t, w.u, n, 0, testSize, Keep)
	}
	if w.live != 0 || w.Stats().Warm != 0 {
		t.Errorf("%d segments of memory after their reclaim", w.live)
	}
	read(t, w.u, 0, 0, testSize, Keep)
	w.verifyWarm(t)
	w.verifyAccounts(t)
}

// TestHeatMoves: what is read much is so still when its segment has been reclaimed and it is in another
// one: it is in memory again when it is asked for.
func TestHeatMoves(t *testing.T) {
	w := newWarmCache(t, 4)
	w.keep(t, 2)
	w.scan(t, 0, 10)
	w.scan(t, 1, 1)                      // so that some of it fills the segment up that object 0 comes to
	for n := uint64(100); n < 200; n++ { // more than the cache holds
		read(t, w.u, n, 0, testSize, Keep)
	}
	w.Maintain()
	if moved := w.Stats().Moved; moved < maxEntries*BlockSize || w.isWarm(0) {
		t.Fatalf("%d bytes were moved; in memory: %v", moved, w.isWarm(0))
	}
	for b := range maxEntries / 2 {
		read(t, w.u, 0, b*BlockSize, BlockSize, Keep)
		w.Maintain()
	}
	if !w.isWarm(0) {
		t.Error("it is not in memory")
	}
	w.verifyWarm(t)
	w.verifyAccounts(t)
}

// TestNoMemory: where there is none the SSD serves, and it is tried again later.
func TestNoMemory(t *testing.T) {
	w := newWarmCache(t, 2)
	w.keep(t, 1)
	tries, allocate := 0, w.warm.allocate
	w.warm.allocate = func(int) ([]byte, func() error, error) { tries++; return nil, nil, errors.New("no memory") }
	w.scan(t, 0, 4)
	if tries == 0 || tries > 4 || w.isWarm(0) {
		t.Errorf("%d attempts; in memory: %v", tries, w.isWarm(0))
	}
	w.warm.allocate = allocate
	w.scan(t, 0, 2)
	if !w.isWarm(0) {
		t.Error("it is not in memory though there is some now")
	}
	w.f.failRead.Store(true)
	w.scan(t, 0, 1) // nothing of the SSD is needed
}

// verifyWarm checks that what is warm is on the SSD too, and is what is in its place.
func (c *Cache) verifyWarm(t *testing.T) {
	t.Helper()
	if len(c.warm.list) > c.warm.most || int(c.warm.count.Load()) != len(c.warm.list) {
		t.Errorf("%d segments are warm, %d counted, bound %d", len(c.warm.list), c.warm.count.Load(), c.warm.most)
	}
	for _, b := range c.warm.list {
		if s := &c.segments[b.h.index]; s.buf.Load() != b || !s.written || s.seq != b.h.seq || b.mem == nil {
			t.Errorf("segment %d is warm, and its buffer is not where it belongs", b.h.index)
		}
	}
}
