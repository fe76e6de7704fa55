package readcache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// content is the store: an object's data is made from its name.
type content struct {
	object  Object
	fetches atomic.Int64
	blocks  atomic.Int64
	err     error
}

func testObject(n uint64) Object {
	return Object{Image: uuid.UUID{1, byte(n >> 3)}, Number: n, Epoch: 3}
}

func fillBlock(p []byte, o Object, block uint32) {
	v := (o.Number<<32|uint64(block))*0x9e3779b97f4a7c15 ^ (o.Epoch<<16|uint64(o.Image[0]))*0xff51afd7ed558ccd
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], v+uint64(i))
	}
}

// Fetch implements Source.
func (s *content) Fetch(_ context.Context, first uint32, p []byte) error {
	if s.err != nil {
		return s.err
	}
	s.fetches.Add(1)
	var whole [BlockSize]byte
	for ; len(p) > 0; first++ {
		s.blocks.Add(1)
		fillBlock(whole[:], s.object, first)
		p = p[copy(p, whole[:]):]
	}
	return nil
}

// memFile is a file in memory that any goroutine may use.
type memFile struct {
	mu        sync.RWMutex
	b         []byte
	failRead  atomic.Bool
	failWrite atomic.Bool
	writes    atomic.Int64
	reads     atomic.Int64
}

var errDisk = errors.New("input/output error")

func newMemFile(n int) *memFile { return &memFile{b: make([]byte, n)} }

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if f.failRead.Load() {
		return 0, errDisk
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	f.reads.Add(int64(len(p)))
	return copy(p, f.b[off:]), nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if f.failWrite.Load() {
		return 0, errDisk
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writes.Add(int64(len(p)))
	return copy(f.b[off:], p), nil
}

func (f *memFile) Sync() error         { return nil }
func (f *memFile) Size() int64         { return int64(len(f.b)) }
func (f *memFile) Buffer(n int) []byte { return make([]byte, n) }

func mustOpen(tb testing.TB, f File) *Cache {
	tb.Helper()
	return mustOpenWarm(tb, f, 0, 0)
}

// mustOpenWarm opens a cache with memory for so many segments, each of which is taken into it when so
// many of its blocks have been asked for.
func mustOpenWarm(tb testing.TB, f File, segments int64, blocks int) *Cache {
	tb.Helper()
	c, err := Open(f, Options{Seed: 7, Memory: segments * SegmentSize, WarmBlocks: blocks, Logger: quiet})
	if err != nil {
		tb.Fatal(err)
	}
	if err := c.Load(context.Background()); err != nil {
		tb.Fatal(err)
	}
	return c
}

const testBlocks = 512 // of each object in these tests

// testSize is not a multiple of the block size.
const testSize = testBlocks*BlockSize - 512

func key(c *Cache, n uint64) Key { return c.Key(testObject(n), testSize) }

// read reads n bytes through the cache, as the engine does, and checks them.
func read(tb testing.TB, u *Client, n uint64, off, size int, how How) (fetched bool) {
	tb.Helper()
	return readObject(tb, u, testObject(n), off, size, how)
}

func readObject(tb testing.TB, u *Client, o Object, off, size int, how How) (fetched bool) {
	tb.Helper()
	k := u.c.Key(o, testSize)
	first := uint32(off / BlockSize)
	u.c.Next(&k, first, uint32((off+size+BlockSize-1)/BlockSize)-first, true)
	dst := bytes.Repeat([]byte{0xee}, size)
	fetched, err := u.Read(context.Background(), &k, off, dst, &content{object: k.Object}, how)
	if err != nil {
		tb.Fatal(err)
	}
	check(tb, k.Object, off, dst)
	if u.c.Wants() {
		u.c.Maintain()
	}
	return fetched
}

func check(tb testing.TB, o Object, off int, got []byte) {
	tb.Helper()
	var want [BlockSize]byte
	for at := off; at < off+len(got); {
		fillBlock(want[:], o, uint32(at/BlockSize))
		n := min(BlockSize-at%BlockSize, off+len(got)-at)
		if !bytes.Equal(got[at-off:][:n], want[at%BlockSize:][:n]) {
			tb.Fatalf("object %d: wrong data at byte %d", o.Number, at)
		}
		at += n
	}
}

func TestReadThrough(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	for _, r := range []struct{ off, size int }{
		{0, BlockSize}, {BlockSize, BlockSize}, {512, 512}, {3*BlockSize - 512, 1024}, {2*BlockSize + 512, 5 * BlockSize},
		{testSize - 512, 512}, {testSize - BlockSize, BlockSize}, {0, testSize},
	} {
		t.Run(fmt.Sprint(r), func(t *testing.T) {
			read(t, u, 1, r.off, r.size, Keep)
			if read(t, u, 1, r.off, r.size, Keep) {
				t.Error("the second read went to the store")
			}
		})
	}
	c.Maintain()
	if read(t, u, 1, 0, testSize, Keep) {
		t.Error("what is on the SSD was read from the store")
	}
	if s := c.Stats(); s.Fetched > uint64(testSize+4096) || s.Mismatches+s.Errors != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestLookup: what is found and what has to be asked for come in turns, to the object's end.
func TestLookup(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	read(t, u, 1, 2*BlockSize, 3*BlockSize, Keep)
	read(t, u, 1, testSize-BlockSize, BlockSize, Keep) // the last two blocks, the end of one and a short one
	k := key(c, 1)
	type run struct {
		n     int
		found bool
	}
	last := testSize - (testBlocks-2)*BlockSize
	for _, tt := range []struct {
		off  int
		want []run
	}{
		{0, []run{{2 * BlockSize, false}, {3 * BlockSize, true}, {(testBlocks - 7) * BlockSize, false}, {last, true}}},
		{3*BlockSize + 512, []run{{2*BlockSize - 512, true}, {(testBlocks - 7) * BlockSize, false}, {last, true}}},
		{5*BlockSize + 512, []run{{(testBlocks-7)*BlockSize - 512, false}, {last, true}}},
		{testSize - 512, []run{{512, true}}},
	} {
		var got []run
		for off := tt.off; off < testSize; {
			dst := make([]byte, testSize-off)
			n, found := u.Lookup(&k, off, dst)
			if found {
				check(t, k.Object, off, dst[:n])
			}
			got, off = append(got, run{n, found}), off+n
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("from byte %d: %v, want %v", tt.off, got, tt.want)
		}
	}
}

// TestNames: what differs in a part of its name only is something else, before a
// restart and after it. That the epoch counts the simulation does not show: see
// docs/reliability.md.
func TestNames(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpen(t, f)
	o := testObject(1)
	image, number, epoch := o, o, o
	image.Image[0]++
	number.Number++
	epoch.Epoch++
	all := []Object{o, image, number, epoch}
	u := c.Client()
	for _, o := range all {
		if !readObject(t, u, o, 0, BlockSize, Keep) {
			t.Errorf("%v was there before it had been read", o)
		}
	}
	c.Close()
	u = mustOpen(t, f).Client()
	for _, o := range all {
		if readObject(t, u, o, 0, BlockSize, Keep) {
			t.Errorf("%v is not there any more", o)
		}
	}
}

// world is a cache on a simulated disk through crashes of all kinds.
type world struct {
	t    *testing.T
	rng  *rand.Rand
	disk *simdisk.Disk
	c    *Cache
	u    *Client
	want bool // mismatches are to be expected

	failing bool // the disk fails what is written
	warm    int64
	warmed  bool // some segment was
}

func (w *world) open() {
	w.failing = false
	w.disk.Fail = func(op simdisk.Op) bool { return w.failing && op.Kind == simdisk.Write }
	w.c = mustOpenWarm(w.t, w.disk, w.warm, 64)
	w.u = w.c.Client()
}

func (w *world) step() {
	w.warmed = w.warmed || w.c.Stats().Warm > 0
	switch n := w.rng.IntN(4000); {
	case n == 0: // a clean stop
		w.c.Close()
		w.open()
	case n == 1:
		w.disk.Kill()
		w.open()
	case n == 2:
		w.disk.CutPower()
		w.open()
		w.want = true
	case n < 12:
		w.disk.Damage(w.rng.Int64N(w.disk.Size()))
		w.want = true
	case n < 20:
		w.failing = !w.failing
	case n < 30:
		w.c.Rest()
	default:
		object := w.rng.Uint64N(4)
		if w.rng.IntN(3) == 0 {
			object = w.rng.Uint64N(64)
		}
		size := 512 * (1 + w.rng.IntN(16))
		if w.rng.IntN(4) == 0 {
			size = 512 * (1 + w.rng.IntN(512))
		}
		off := w.rng.IntN((testSize-size)/512+1) * 512
		read(w.t, w.u, object, off, size, How(w.rng.IntN(8)/6))
	}
}

// TestCrashes reads while the disk loses, tears, flips and refuses: every read is
// right, and the accounts stay in order.
func TestCrashes(t *testing.T) {
	var warmed atomic.Int32 // worlds in which some segment was
	t.Cleanup(func() {
		if warmed.Load() == 0 && !t.Failed() {
			t.Error("no segment was warm in any world")
		}
	})
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			if seed > 0 {
				racetest.Slow(t)
			}
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 1))
			w := &world{t: t, rng: rng, disk: simdisk.New(MinSize, rng), warm: int64(1-seed%2) * 3}
			w.open()
			for range 2500 {
				w.step()
				if t.Failed() {
					return
				}
			}
			w.failing = false
			w.c.verifyWarm(t)
			w.c.Close()
			w.open()
			w.c.verifyAccounts(t)
			if w.warmed {
				warmed.Add(1)
			}
			if s := w.c.Stats(); !w.want && s.Mismatches != 0 {
				t.Errorf("%d mismatches on a disk that lost nothing", s.Mismatches)
			}
		})
	}
}

// verifyAccounts checks that every segment is in one place, and every word points
// into a segment that is in use.
func (c *Cache) verifyAccounts(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	where := map[uint32]string{}
	put := func(s uint32, what string) {
		if was, ok := where[s]; ok {
			t.Errorf("segment %d is %s and %s", s, was, what)
		}
		where[s] = what
	}
	for _, s := range c.free {
		put(s, "free")
	}
	for q := range queues {
		for _, s := range c.fifo[q].list[c.fifo[q].head:] {
			put(s, "queued")
		}
		if b := c.open[q]; b != nil {
			put(b.h.index, "open")
		}
	}
	for _, b := range c.full {
		put(b.h.index, "full")
	}
	if len(where) != len(c.segments) {
		t.Errorf("%d of %d segments are accounted for", len(where), len(c.segments))
	}
	n, places := 0, map[place]bool{}
	for i := range c.index.words {
		if w := c.index.words[i].Load(); w != 0 {
			n++
			p := placeIn(w)
			if places[p] || where[p.segment()] == "free" || p.block() < headerBlocks {
				t.Errorf("place %d is in use twice, or free", p)
			}
			places[p] = true
		}
	}
	if n != c.index.count {
		t.Errorf("%d words in use, %d counted", n, c.index.count)
	}
}

// TestSegmentBlocks: a cache with small segments is soon full, and one with smaller
// ones passes over what it left.
func TestSegmentBlocks(t *testing.T) {
	f := newMemFile(MinSize)
	open := func(blocks int) (*Cache, *Client) {
		c, err := Open(f, Options{Seed: 7, SegmentBlocks: blocks, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Load(context.Background()); err != nil {
			t.Fatal(err)
		}
		return c, c.Client()
	}
	c, u := open(8)
	for block := range 2 * len(c.segments) * 8 {
		read(t, u, 1, block*BlockSize%testSize&^(BlockSize-1), BlockSize, Keep)
		read(t, u, 1, 0, BlockSize, Keep) // used, so moved
	}
	s := c.Stats()
	if s.Evicted == 0 || s.Moved == 0 || s.Used > uint64(len(c.segments)*8*BlockSize) {
		t.Errorf("evicted %d, moved %d, used %d", s.Evicted, s.Moved, s.Used)
	}
	c.verifyAccounts(t)
	c.Close()
	if c, _ = open(8); c.Stats().Used == 0 {
		t.Error("nothing is found at the next start")
	}
	c.Close()
	c, u = open(4)
	c.verifyAccounts(t)
	if used := c.Stats().Used; used > 2*4*BlockSize { // the two that Close wrote early may do
		t.Errorf("%d bytes used of segments that are too large", used)
	}
	read(t, u, 1, 0, testSize, Keep)
	c.Close()
}

func TestRestart(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpen(t, f)
	u := c.Client()
	for n := range uint64(8) {
		read(t, u, n, 0, testSize, Keep)
	}
	used := c.Stats().Used
	c.Close()

	c = mustOpen(t, f)
	u = c.Client()
	if s := c.Stats(); s.Used != used || used < 8*testSize {
		t.Errorf("%d bytes are found after a clean stop, want %d", s.Used, used)
	}
	for n := range uint64(8) {
		if read(t, u, n, 0, testSize, Keep) {
			t.Errorf("object %d comes from the store after a restart", n)
		}
	}

	// Killed: the segments that were being filled are gone, no more.
	c = mustOpen(t, f)
	if s := c.Stats(); s.Used != used {
		t.Errorf("%d bytes are found after a kill, want %d", s.Used, used)
	}
	c.verifyAccounts(t)
}

// TestStrangers: what is in the file of another cache, or of nobody, is not used.
func TestStrangers(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpen(t, f)
	read(t, c.Client(), 1, 0, testSize, Keep)
	c.Close()
	for name, spoil := range map[string]func(b []byte){
		"no header":   func(b []byte) { clear(b[:BlockSize]) },
		"bad header":  func(b []byte) { b[16]++ },
		"new version": func(b []byte) { b[8]++ },
	} {
		t.Run(name, func(t *testing.T) {
			g := newMemFile(MinSize)
			copy(g.b, f.b)
			spoil(g.b)
			c, err := Open(g, Options{Seed: 8, Logger: quiet})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Load(context.Background()); err != nil {
				t.Fatal(err)
			}
			if s := c.Stats(); s.Used != 0 {
				t.Errorf("%d bytes are found", s.Used)
			}
		})
	}
	t.Run("swapped segments", func(t *testing.T) {
		g := newMemFile(MinSize)
		copy(g.b, f.b)
		copy(g.b[dataOffset+SegmentSize:], f.b[dataOffset:dataOffset+SegmentSize])
		clear(g.b[dataOffset : dataOffset+SegmentSize])
		// What is left is in the third segment, which is where it was.
		if s := mustOpen(t, g).Stats(); s.Used != (testBlocks-2*maxEntries)*BlockSize {
			t.Errorf("%d bytes are found", s.Used)
		}
	})
}

// TestResize: a file that grew or shrank keeps what fits.
func TestResize(t *testing.T) {
	racetest.Slow(t)
	f := newMemFile(2 * MinSize)
	c := mustOpen(t, f)
	u := c.Client()
	for n := range uint64(24) {
		read(t, u, n, 0, testSize, Keep)
	}
	c.Close()
	for _, size := range []int{MinSize, 2 * MinSize, 3 * MinSize} {
		g := newMemFile(size)
		copy(g.b, f.b)
		c := mustOpen(t, g)
		c.verifyAccounts(t)
		if s := c.Stats(); s.Used < 15*testSize {
			t.Errorf("%d bytes are found in a file of %d", s.Used, size)
		}
		u := c.Client()
		for n := range uint64(40) {
			read(t, u, n, 0, testSize, Keep)
		}
		c.verifyAccounts(t)
	}
}

// TestBrokenDisk: a disk that fails never fails a read, and is given up.
func TestBrokenDisk(t *testing.T) {
	racetest.Slow(t)
	for _, what := range []string{"reads", "writes"} {
		t.Run(what, func(t *testing.T) {
			f := newMemFile(MinSize)
			c := mustOpen(t, f)
			u := c.Client()
			for n := range uint64(8) {
				read(t, u, n, 0, testSize, Keep)
			}
			f.failRead.Store(what == "reads")
			f.failWrite.Store(what == "writes")
			for n := range uint64(64) {
				read(t, u, n, 0, testSize, Keep)
			}
			if s := c.Stats(); s.State != "off" || s.Errors == 0 {
				t.Errorf("state %s after %d errors", s.State, s.Errors)
			}
			c.Close()
		})
	}
}

func TestSourceErrors(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	k := key(c, 1)
	broken := &content{object: k.Object, err: errDisk}
	dst := make([]byte, BlockSize)
	if _, err := u.Read(context.Background(), &k, 0, dst, broken, Keep); !errors.Is(err, errDisk) {
		t.Errorf("error: %v", err)
	}
	claim, n, ok := u.Claim(&k, Want{First: 8, N: 4, Asked: 4})
	if !ok || n != 4 {
		t.Fatalf("claimed %d blocks: %v", n, ok)
	}
	if err := u.Fly(context.Background(), claim, &k, broken, Keep); !errors.Is(err, errDisk) {
		t.Errorf("error of read-ahead: %v", err)
	}
	if held := c.flights.memory(); held != 0 {
		t.Errorf("%d bytes stay reserved", held)
	}
	read(t, u, 1, 0, BlockSize, Keep)
}

// TestRace reads, evicts, and fills from many goroutines.
func TestRace(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpenWarm(t, f, 2, 64)
	var all sync.WaitGroup
	for g := range uint64(8) {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(g, 2))
			u := c.Client()
			defer u.Close()
			for range 250 {
				size := 512 * (1 + rng.IntN(64))
				off := rng.IntN((testSize-size)/512+1) * 512
				n := rng.Uint64N(64)
				if rng.IntN(8) == 0 {
					size, off = BlockSize*64, BlockSize*64*rng.IntN(4)
				}
				k := key(c, n)
				if claim, _, ok := u.Claim(&k, Want{First: uint32(64 * rng.IntN(4)), N: 64, Asked: 64}); ok {
					if err := u.Fly(context.Background(), claim, &k, &content{object: k.Object}, Keep); err != nil {
						t.Error(err)
					}
				}
				read(t, u, n, off, size, How(rng.IntN(4)/2))
				if n < 2 {
					read(t, u, 1, 0, testSize, Keep) // which is warm most of the time
				}
				if rng.IntN(100) == 0 {
					c.Rest()
				}
			}
		})
	}
	all.Wait()
	c.Maintain()
	c.verifyAccounts(t)
	c.verifyWarm(t)
	if s := c.Stats(); s.Warm == 0 || s.Mismatches != 0 || s.Errors != 0 || s.Hits != 0 {
		t.Errorf("stats: %+v", s)
	}
	c.Close()
	c = mustOpen(t, f)
	c.verifyAccounts(t)
}

// TestForget: blocks that are forgotten are not found, nor kept for having been used when their segments
// are reclaimed; others are.
func TestForget(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	const blocks = testBlocks
	for range 3 {
		for n := range uint64(8) {
			read(t, u, n, 0, testSize, Keep)
		}
	}
	used := c.Stats().Used
	for n := range uint64(4) {
		c.Forget(testObject(n), 0, blocks)
		c.Forget(testObject(n), 0, blocks) // once is enough
	}
	c.Forget(testObject(4), blocks, 1000) // nothing of it is there
	s := c.Stats()
	if forgotten := uint64(4 * blocks * BlockSize); s.Forgotten != forgotten || s.Used != used-forgotten {
		t.Errorf("%d bytes forgotten of %d, %d used; want %d forgotten", s.Forgotten, used, s.Used, forgotten)
	}
	c.verifyAccounts(t)
	for n := range uint64(8) {
		k := key(c, n)
		if r := c.Next(&k, 0, blocks, false); r.Cached != (n >= 4) {
			t.Errorf("object %d is found: %v", n, r.Cached)
		}
	}
	for n := uint64(100); n < 200; n++ { // more than the cache holds
		read(t, u, n, 0, testSize, Keep)
	}
	if s := c.Stats(); s.Moved == 0 || s.Moved > 4*uint64(blocks)*BlockSize {
		t.Errorf("%d bytes were moved, of %d that were not forgotten", s.Moved, 4*blocks*BlockSize)
	}
	c.verifyAccounts(t)
	c.Close()
	None(Options{}).Forget(testObject(1), 0, blocks)
}

// TestWearIsCounted: what the statistics say was written to the SSD is what was, headers
// and what is kept by writing it again included.
func TestWearIsCounted(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpen(t, f)
	u := c.Client()
	before, counted := f.writes.Load(), c.Stats().Written
	rng := rand.New(rand.NewPCG(4, 4))
	for range 20000 {
		read(t, u, uint64(rng.IntN(30)*rng.IntN(2)), rng.IntN(testBlocks-1)*BlockSize, BlockSize, Keep)
	}
	c.Maintain()
	s := c.Stats()
	if s.Moved == 0 || s.Evicted == 0 {
		t.Fatalf("nothing is kept or evicted: this tests nothing: %+v", s)
	}
	if got, want := s.Written-counted, uint64(f.writes.Load()-before); got != want || got < s.Moved {
		t.Errorf("%d bytes were written, %d are counted, %d of them moved", want, got, s.Moved)
	}
}
