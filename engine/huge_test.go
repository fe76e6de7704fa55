package engine

import (
	"context"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// hugeStore holds an image over all of which 4 KiB blocks have been written at
// random, 4 GiB of them for each 256 GiB. The superblock is real; manifest, map
// segments and data objects are computed when they are read. It is for one
// goroutine.
type hugeStore struct {
	*mem.Store
	id          uuid.UUID
	sectors     uint64
	objects     uint32 // data objects
	stride      uint32 // between their numbers: however few, the numbers are far apart
	manifest    []byte
	sums        []uint32 // of a data object's blocks
	sizes       sync.Map // of the data objects whose headers have been read
	since       uint32   // data objects after the checkpoint
	segmentSize uint32   // bytes of a segment
	part        uint32   // segments in a map object
	block       []byte
	mapGets     int
	others      int
}

const (
	hugeExtents = 256  // of a segment
	hugeBlocks  = 2048 // of a data object
)

func newHugeStore(tb testing.TB, size uint64) *hugeStore {
	ctx := context.Background()
	st := &hugeStore{Store: mem.New(), block: make([]byte, objectBlock), sectors: size / SectorSize}
	var err error
	if st.id, err = Create(ctx, st, "huge", CreateOptions{Size: size}); err != nil {
		tb.Fatal(err)
	}
	segments := segmentsOf(size / SectorSize)
	st.objects = max(segments*hugeExtents/hugeBlocks, 16)
	st.stride = max(1<<17/st.objects, 1)
	ref := checkpointRef{Object: st.last(), Epoch: 1}
	m := &manifest{image: st.id, epoch: 1, at: position{ref.Object, ref.Object, 0}, log: uuid.New()}
	st.sums = slices.Repeat([]uint32{crc32.Checksum(st.block, castagnoli)}, hugeBlocks)
	header := st.header(1).header / objectAlign
	for n := uint32(1); n <= st.objects; n++ {
		m.objects = append(m.objects, objectInfo{number: n * st.stride, epoch: 1, born: n, header: uint16(header), sectors: hugeBlocks * 8, live: hugeBlocks * 8})
	}
	st.segmentSize = uint32(len(st.segment(0)))
	st.part = mapObjectSize / st.segmentSize
	for i := range segments {
		if i%st.part == 0 {
			m.maps = append(m.maps, mapObject{at: ref, part: i / st.part})
		}
		o := &m.maps[i/st.part]
		m.set(kindWhole, i, storedSegment{object: i / st.part, offset: o.size, size: st.segmentSize})
		o.size, o.live = o.size+st.segmentSize, o.live+st.segmentSize
	}
	st.manifest = m.encode()
	_, _, err = changeSuperblock(ctx, st, st.id, func(sb *superblock) error {
		sb.Epoch, sb.Checkpoint, sb.Seq, sb.Epochs = 1, &ref, ref.Object, []epochStart{{Epoch: 1, Object: 1, Seq: 1}}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return st
}

// last returns the number of the checkpoint's last object.
func (s *hugeStore) last() uint64 { return uint64(s.objects * s.stride) }

// header returns the header of a data object. Those after the checkpoint have extents
// anywhere in the image.
func (s *hugeStore) header(number uint64) *objectHeader {
	h := &objectHeader{image: s.id, epoch: 1, seq: number, firstSeq: number, lastSeq: number, data: hugeBlocks * objectBlock, sums: s.sums}
	step := uint64(segmentsOf(s.sectors)) * segmentSectors / hugeBlocks / 8
	rng := rand.New(rand.NewPCG(9, number))
	for i := range uint64(hugeBlocks) {
		e := objectExtentInfo{sector: i * 16, n: 8}
		if number > s.last() {
			e.sector = (i*step + rng.Uint64N(step)) * 8
		}
		h.extents = append(h.extents, e)
	}
	h.pack()
	return h
}

// segment returns segment i. All segments take the same number of bytes: among extents that
// are packed together two have the least and the most of each number.
func (s *hugeStore) segment(i uint32) []byte {
	rng := rand.New(rand.NewPCG(7, uint64(i)))
	span := extmap.NewSpan(segmentStart(i), segmentPages)
	at := segmentStart(i)
	for k := range uint64(hugeExtents) {
		number := func(n uint64) uint64 { // below n
			switch k % columnExtents {
			case 0:
				return 0
			case 1:
				return n - 1
			}
			return rng.Uint64N(n)
		}
		at += 8 * (1 + number(62))
		ref := refOfSeq(uint64(s.stride) * (1 + number(uint64(s.objects))))
		span.Insert(at, 8, ref.loc(int(number(hugeBlocks))*8))
		at += 8
	}
	return encodeSegment(nil, s.id, segmentHead{segmentPart: segmentPart{index: i}}, extentsOf(span, segmentStart(i)))
}

// Get implements backend.Store.
func (s *hugeStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	_, name, _ := strings.Cut(key, "/")
	var kind, object, epoch string
	if parts := strings.FieldsFunc(name, func(r rune) bool { return r == '/' || r == '.' }); len(parts) >= 3 {
		kind, object, epoch = parts[0], parts[1], parts[2]
	}
	number, err := strconv.ParseUint(object, 16, 32)
	if err != nil || epoch != "1" || number > s.last()+uint64(s.since) {
		return s.Store.Get(ctx, key, p, off)
	}
	switch kind {
	case "c":
		s.others++
		return copy(p, s.manifest[min(off, int64(len(s.manifest))):]), nil
	case "m":
		s.mapGets++
		part, err := strconv.ParseUint(key[strings.LastIndexByte(key, '.')+1:], 16, 32)
		size := int64(s.segmentSize)
		if err != nil || off%size != 0 || len(p) != int(size) {
			return 0, fmt.Errorf("get %s at %d: %w", key, off, backend.ErrPermanent)
		}
		return copy(p, s.segment(uint32(part)*s.part+uint32(off/size))), nil
	}
	s.others++
	return s.data(number, p, off), nil
}

// Put implements backend.Store. It is an outage.
func (s *hugeStore) Put(_ context.Context, key string, _ []byte) error {
	return fmt.Errorf("put %s: %w", key, backend.ErrTemporary)
}

// data reads from a data object.
func (s *hugeStore) data(number uint64, p []byte, off int64) (n int) {
	h := s.header(number)
	s.sizes.Store(number, int64(h.header+h.data))
	if off < int64(h.header) {
		b := make([]byte, h.header)
		h.put(b)
		n = copy(p, b[off:])
	}
	end := int64(h.header + h.data)
	for n < len(p) && off+int64(n) < end {
		n += copy(p[n:min(int64(len(p)), end-off)], s.block)
	}
	return n
}

// Stat implements backend.Store.
func (s *hugeStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	if _, name, ok := strings.Cut(key, "/d/"); ok {
		number, err := strconv.ParseUint(name[:8], 16, 32)
		if err != nil {
			return backend.Info{}, fmt.Errorf("stat %s: %w", key, backend.ErrNotFound)
		}
		if size, ok := s.sizes.Load(number); ok {
			return backend.Info{Size: size.(int64)}, nil
		}
		h := s.header(number)
		return backend.Info{Size: int64(h.header + h.data)}, nil
	}
	if strings.Contains(key, "/c/") {
		return backend.Info{Size: int64(len(s.manifest))}, nil
	}
	return s.Store.Stat(ctx, key)
}

// rss returns a field of this process's memory, in bytes.
func rss(tb testing.TB, field string) int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		tb.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "\n"+field+":")
	n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if !ok || err != nil {
		tb.Fatalf("%s: %v", field, err)
	}
	return n << 10
}

// opened is what opening an image took.
type opened struct {
	im   *Image
	env  *simEnv
	took time.Duration
	peak int64 // resident memory beyond that before, at its highest
	heap int64 // what stays of the heap
}

func openHuge(tb testing.TB, st *hugeStore, mapMemory int64) opened {
	return openHugeWith(tb, st, mapMemory, simdisk.New(writelog.MinSize, rand.New(rand.NewPCG(1, 2))))
}

func openHugeWith(tb testing.TB, st *hugeStore, mapMemory int64, disk *simdisk.Disk) opened {
	return openHugeIn(tb, st, NewShared(Limits{Map: mapMemory}), disk)
}

func openHugeIn(tb testing.TB, st *hugeStore, shared *Shared, disk *simdisk.Disk) opened {
	ring := make([]byte, 32<<20)
	debug.FreeOSMemory()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	// Resets the peak of the resident memory.
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		tb.Fatal(err)
	}
	base, began := rss(tb, "VmRSS"), time.Now()
	im, err := Open(context.Background(), st, st.id, OpenOptions{Log: disk, Parallel: 1, Config: Config{Logger: quiet, Shared: shared, PaceFrom: 1}})
	o := opened{im: im, took: time.Since(began)}
	if err != nil {
		tb.Fatal(err)
	}
	o.peak = rss(tb, "VmHWM") - base
	runtime.GC()
	runtime.ReadMemStats(&after)
	o.heap = int64(after.HeapAlloc) - int64(before.HeapAlloc)
	o.env = &simEnv{rng: rand.New(rand.NewPCG(3, 4)), disk: disk}
	im.Start(o.env, disk.Device(), ring)
	return o
}

// readAll reads n random blocks that have been written, or some beside them, one
// after the other.
func (o *opened) readAll(tb testing.TB, n int, each func()) {
	rng := rand.New(rand.NewPCG(5, 6))
	o.read(tb, n, func(int) uint64 { return rng.Uint64N(o.im.sectors/8) * 8 }, each)
}

// read reads n blocks, one after the other, and calls each after each.
func (o *opened) read(tb testing.TB, n int, sector func(i int) uint64, each func()) {
	var done countDone
	r := &Request{Op: Read, Sectors: 8, Buf: make([]byte, 4096), Done: &done}
	for i := range n {
		r.Sector = sector(i)
		o.im.Submit(r)
		o.im.EndTurn()
		for int(done) == i && (o.env.step() || o.env.fire()) {
			o.im.EndTurn()
		}
		if int(done) != i+1 || r.Err != 0 {
			tb.Fatalf("read %d of sector %d: %d done, error %v", i, r.Sector, done, r.Err)
		}
		each()
	}
}

// TestHugeImage opens 64 TiB that hold 1 TiB of random 4 KiB writes. What is
// asserted is memory and loads; the time is told.
func TestHugeImage(t *testing.T) {
	racetest.Slow(t)
	if racetest.Enabled {
		t.Log("under the race detector memory says nothing: only loads are counted")
	}
	st := newHugeStore(t, MaxSize)
	const budget = 16 << 20
	o := openHuge(t, st, budget)
	t.Logf("64 TiB, %d data objects, %d map segments, a manifest of %.1f MiB: open took %v, %.1f MiB at its peak, %.1f MiB stay",
		st.objects, segmentsOf(o.im.sectors), mib(len(st.manifest)), o.took.Round(time.Millisecond), mib(o.peak), mib(o.heap))
	if st.mapGets != 0 {
		t.Errorf("opening loaded %d map segments", st.mapGets)
	}
	if !racetest.Enabled && (o.peak >= 64<<20 || o.heap >= 64<<20) {
		t.Errorf("opening took %.1f MiB, of which %.1f stay: more than 64", mib(o.peak), mib(o.heap))
	}
	loads, highest := 0, int64(0)
	o.readAll(t, 8000, func() {
		if got := st.mapGets - loads; got > 1 {
			t.Fatalf("a read loaded %d map segments", got)
		}
		loads = st.mapGets
		highest = max(highest, o.im.objs.charged)
	})
	t.Logf("8000 random reads: %d map loads, %d evictions; the map took %.1f MiB at most of %d", st.mapGets, o.im.objs.evictions, mib(highest), budget>>20)
	if o.im.objs.evictions == 0 || highest > budget+1<<20 {
		t.Errorf("%d evictions; the map took %.1f MiB where %d are allowed", o.im.objs.evictions, mib(highest), budget>>20)
	}
	// A place that was just read costs no load.
	o.readAll(t, 1, func() {})
	loads = st.mapGets
	o.readAll(t, 1, func() {})
	if st.mapGets != loads {
		t.Error("the same place read again loads its segment again")
	}
	o.im.Abandon()
}

func mib[T int | int64](n T) float64 { return float64(n) / (1 << 20) }

// report says what opening took.
func (o *opened) report(b *testing.B) {
	b.ReportMetric(mib(o.peak), "peak-MiB")
	b.ReportMetric(mib(o.heap), "heap-MiB")
	b.ReportMetric(float64(o.took.Microseconds())/1000, "open-ms")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkOpen opens images of several sizes, full of random writes.
func BenchmarkOpen(b *testing.B) {
	for _, size := range []uint64{1 << 30, 64 << 30, 1 << 40, 16 << 40, MaxSize} {
		b.Run(fmt.Sprintf("GiB=%d", size>>30), func(b *testing.B) {
			o := openHuge(b, newHugeStore(b, size), 0)
			o.im.Abandon()
			o.report(b)
		})
	}
}

// BenchmarkReplay opens images with random writes in data objects after the last
// checkpoint: more of them, and larger images.
func BenchmarkReplay(b *testing.B) {
	for _, c := range []struct {
		size  uint64
		since uint32
	}{
		{64 << 30, 0}, {64 << 30, 16}, {64 << 30, 64}, {64 << 30, 256}, {64 << 30, 512}, {64 << 30, 1024}, {64 << 30, 2048},
		{1 << 30, 16}, {1 << 40, 16}, {16 << 40, 16}, {MaxSize, 16},
	} {
		b.Run(fmt.Sprintf("GiB=%d/objects=%d", c.size>>30, c.since), func(b *testing.B) {
			st, since := newHugeStore(b, c.size), c.since
			st.since = since
			o := openHuge(b, st, 0)
			if got := o.im.accepted.object; got != st.last()+uint64(since) {
				b.Fatalf("recovered up to object %d", got)
			}
			o.im.Abandon()
			o.report(b)
			b.ReportMetric(float64(st.mapGets), "map-loads")
		})
	}
}

// BenchmarkDirtyLog opens an image of 64 GiB with random 4 KiB writes in its log
// that have not been destaged.
func BenchmarkDirtyLog(b *testing.B) {
	for _, size := range []int{0, 64, 256} {
		b.Run(fmt.Sprintf("MiB=%d", size), func(b *testing.B) {
			st := newHugeStore(b, 64<<30)
			disk := simdisk.New(2*writelog.MinSize+int64(size)<<20*5/4, rand.New(rand.NewPCG(1, 2)))
			o := openHugeWith(b, st, 0, disk)
			o.fillLog(b, size<<20/4096)
			used := o.im.log.Used()
			o.im.Abandon()
			o = openHugeWith(b, st, 0, disk)
			if o.im.log.Used() != used {
				b.Fatalf("%d of %d bytes of the log were recovered", o.im.log.Used(), used)
			}
			o.im.Abandon()
			o.report(b)
			b.ReportMetric(mib(int64(used)), "log-MiB")
		})
	}
}

// fillLog writes n random blocks, 32 at a time, which stay in the log: the store
// takes no objects.
func (o *opened) fillLog(tb testing.TB, n int) {
	var done countDone
	for o.env.step() {
	}
	rng := rand.New(rand.NewPCG(5, 6))
	requests := make([]Request, 32)
	for i := 0; i < n; i += len(requests) {
		for k := range requests {
			requests[k] = Request{Op: Write, Sectors: 8, Sector: rng.Uint64N(o.im.sectors/8) * 8, Buf: make([]byte, 4096), Done: &done}
			o.im.Submit(&requests[k])
		}
		o.im.EndTurn()
		for o.env.step() {
		}
		o.im.EndTurn()
		if int(done) != i+len(requests) {
			tb.Fatalf("%d of %d writes ended", done, i+len(requests))
		}
	}
}

// BenchmarkRandomReadsOfHugeImage reads all over 64 TiB with the default memory
// for the map.
func BenchmarkRandomReadsOfHugeImage(b *testing.B) {
	o := openHuge(b, newHugeStore(b, MaxSize), DefaultMapMemory)
	highest := int64(0)
	o.readAll(b, 100000, func() { highest = max(highest, o.im.objs.charged) })
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	b.ReportMetric(mib(highest), "map-MiB")
	b.ReportMetric(mib(int64(m.HeapAlloc)), "heap-MiB")
	b.ReportMetric(float64(o.im.objs.loaded), "loads")
	b.ReportMetric(float64(o.im.objs.evictions), "evictions")
	b.ReportMetric(float64(highest)/float64(o.im.objs.loaded-o.im.objs.evictions)/hugeExtents, "bytes/extent")
}

// discardedStore is a hugeStore of which an object after the checkpoint discards all.
type discardedStore struct {
	*hugeStore
	key  string
	im   *Image
	most int // segments that were read and not yet emptied
}

func (s *discardedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	if key == s.key {
		return s.Store.Stat(ctx, key)
	}
	return s.hugeStore.Stat(ctx, key)
}

func (s *discardedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := s.hugeStore.Get(ctx, key, p, off)
	if strings.Contains(key, "/m/") {
		s.most = max(s.most, s.mapGets-int(segmentOf(s.im.apply.done)))
	}
	return n, err
}

// TestRecoveryOfDiscard: recovery enters a discard of all of an image as it reads the
// map, of which it does not keep more in memory than it must.
func TestRecoveryOfDiscard(t *testing.T) {
	const size = 64 << 30
	ctx := context.Background()
	st := &discardedStore{hugeStore: newHugeStore(t, size)}
	h := objectHeader{image: st.id, epoch: 1, seq: st.last() + 1, firstSeq: st.last() + 1, lastSeq: st.last() + 1}
	h.extents = []objectExtentInfo{{0, size / SectorSize, true}}
	h.pack()
	b := make([]byte, h.header)
	h.encode(b)
	st.key = dataKey(st.id, h.seq, 1)
	if err := st.Store.Put(ctx, st.key, b); err != nil {
		t.Fatal(err)
	}
	sb, _, err := loadSuperblock(ctx, st, st.id)
	if err != nil {
		t.Fatal(err)
	}
	st.im = newImage(ctx, st, sb, &OpenOptions{Parallel: 1, Config: Config{Logger: quiet}})
	defer st.im.dropUnopened()
	if err := st.im.loadCheckpoint(ctx, sb.Checkpoint); err != nil {
		t.Fatal(err)
	}
	st.im.objs.Replaced = nil // the table of the image counts nothing
	if _, err := st.im.replay(ctx, sb, maxObjectSeq); err != nil {
		t.Fatal(err)
	}
	if st.im.accepted.object != h.seq {
		t.Fatalf("recovered up to object %d: this tests nothing", st.im.accepted.object)
	}
	if st.mapGets > 0 {
		t.Errorf("%d segments were read", st.mapGets)
	}
	for _, i := range []uint32{0, segmentsOf(size/SectorSize) - 1} {
		if err := st.im.loadSegmentNow(ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	if e, ok := st.im.objs.Next(0, size/SectorSize); ok || st.mapGets != 2 {
		t.Errorf("%d segments were read, and %+v is left", st.mapGets, e)
	}
}

// loadSegmentNow brings segment i into memory of an image that is not started.
func (im *Image) loadSegmentNow(ctx context.Context, i uint32) error {
	if im.ready(i) {
		return nil
	}
	span, err := readSegment(ctx, im.store, im.line, im.objs.places(i), i, im.sectors)
	if err == nil {
		im.enterSegment(i, span)
	}
	return err
}
