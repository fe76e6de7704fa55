// Package readcache is the read cache on the local SSD: blocks of immutable
// objects, shared by all images of a daemon.
//
// Blocks are of 4096 bytes and named by image, object number, epoch and place in
// the object, so a block that is found is never stale. The cache's file is
// written in segments of 1 MiB, one after another, each with a header that lists
// its blocks and their checksums: a start needs nothing but these headers, and
// the SSD sees only large writes. Eviction is S3-FIFO (Yang et al., "FIFO queues
// are all you need for cache eviction", SOSP 2023): its queues are queues of
// segments here.
//
// Everything that is read back is verified against a checksum that covers the
// block's key and data, whatever the index says. So look-ups take no lock and
// need no order with those that fill and evict: what was overwritten meanwhile,
// torn by a power cut or flipped by the SSD shows as a miss. Nothing but the
// file's header is ever synced.
//
// The cache has no goroutine of its own and no clock: it works in its callers.
// On a reactor are called: Next, Copy, Offset, Verify, Wants, and to read ahead
// Claim, which takes a lock for a moment. The rest may block.
//
// A Cache without a file keeps nothing, but its users still share fetches and
// read-ahead.
package readcache

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A File is the place of the cache on the SSD. Its methods may be called from
// any goroutine. Offsets, lengths and memory of all operations are multiples of
// BlockSize.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes durable what was written: the cache asks for it when it is made.
	Sync() error
	// Size returns the bytes that the cache may use.
	Size() int64
	// Buffer returns n bytes of memory that suit the file.
	Buffer(n int) []byte
}

// Options tunes a cache. The zero value of a field means its default.
type Options struct {
	// AheadMemory bounds the memory for what is read ahead and not asked for
	// yet. Default 32 MiB.
	AheadMemory int
	// Seed makes hashes repeatable, for simulations. Default: random.
	Seed uint64
	// SegmentBlocks is how many blocks a segment holds, for simulations, whose caches
	// are to be full soon. Default: as many as its header can list, which is the most.
	SegmentBlocks int
	// Readers is how many headers Load reads at one time. Default 1.
	Readers int
	// Memory bounds the memory for segments that are read much, in bytes. Default: none.
	Memory int64
	// WarmBlocks is how many blocks of a segment have been asked for when it is taken into memory, for
	// simulations, whose segments do not last long. Default: warmReads for each that it holds.
	WarmBlocks int
	// Allocate returns n bytes for one of them that suit the file, and what frees them. Default: memory
	// outside of the Go heap, of which the collector would else keep as much again.
	Allocate func(n int) ([]byte, func() error, error)
	// Logger gets what an operator should know. Default: slog.Default().
	Logger *slog.Logger
}

// DefaultAheadMemory is the default of Options.AheadMemory.
const DefaultAheadMemory = 64 << 20

const (
	maxBuffers  = 8 // segments in memory, being filled or written
	keptBuffers = 2 // of these, for what is evicted from one queue into the other
	lowSegments = 4 // so many free ones are there before they are needed
	maxFailures = 16
)

// Cache is a read cache.
type Cache struct {
	file     File // nil: there is none
	id       uuid.UUID
	opt      Options
	logger   *slog.Logger
	hash     hasher
	index    index
	segments []segment
	flights  flights
	warm     warmth

	off                 atomic.Bool  // the SSD has failed, or the cache is closed: nothing is found or kept
	badReads, badWrites atomic.Int32 // errors of the SSD in a row
	wants               atomic.Bool  // Maintain has something to do
	errs                struct{ mismatches, failed, memory atomic.Uint64 }

	maintain sync.Mutex // held by the one who writes and reclaims segments
	scratch  []byte     // a segment that is reclaimed; guarded by maintain

	mu     sync.Mutex
	loaded bool            // guarded by mu, as all that follows: blocks may be kept
	closed bool            // nothing more is kept
	seq    uint64          // of the last segment that was begun
	open   [queues]*buffer // being filled
	full   []*buffer       // to be written, oldest first
	spare  []*buffer
	made   int // buffers there are
	free   []uint32
	fifo   [queues]segmentQueue // written segments, oldest first
	ghost  ghost
	counts fillCounts
	users  map[*Client]struct{}
	gone   clientCounts // of clients that were closed
}

// segment is what is known of a segment of the file.
type segment struct {
	buf     atomic.Pointer[buffer] // while it is in memory
	heat    atomic.Uint32          // see warmth
	next    atomic.Uint32          // the heat from which on it is proposed, once it was refused
	seq     uint64                 // guarded by Cache.mu
	written bool                   // it is in a queue; guarded by Cache.mu
}

// buffer is a segment in memory.
type buffer struct {
	mem  []byte
	pins atomic.Int32 // readers that copy from it
	h    segmentHeader

	// Of a segment that is warm; guarded by Cache.maintain.
	free func() error // frees mem
	seen uint32       // its heat at the last Rest
	idle int          // Rests since it was read
}

// segmentBytes is how much of a segment is used.
func (c *Cache) segmentBytes() int { return (headerBlocks + c.opt.SegmentBlocks) * BlockSize }

// fillCounts count blocks and bytes that went to the SSD.
type fillCounts struct {
	written                                    uint64 // bytes
	filled, moved, evicted, forgotten, dropped uint64 // blocks
	writeErrors                                uint64
}

// None returns a cache without a file.
func None(o Options) *Cache {
	c, _ := newCache(nil, o)
	c.off.Store(true)
	return c
}

// Open opens the cache in a file, which it formats if there is none in it. Blocks
// are kept, and those of before found, once Load has been called.
func Open(f File, o Options) (*Cache, error) {
	if err := CheckSize(f.Size()); err != nil {
		return nil, err
	}
	c, r := newCache(f, o)
	if err := c.openFile(r); err != nil {
		return nil, err
	}
	n := int((f.Size() - dataOffset) / SegmentSize)
	c.segments = make([]segment, n)
	c.index.init(n)
	c.ghost.init(n)
	c.warm.most = min(int(c.opt.Memory/int64(c.segmentBytes())), n)
	return c, nil
}

func newCache(f File, o Options) (*Cache, *rand.Rand) {
	if o.AheadMemory == 0 {
		o.AheadMemory = DefaultAheadMemory
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	if o.SegmentBlocks <= 0 || o.SegmentBlocks > maxEntries {
		o.SegmentBlocks = maxEntries
	}
	o.Readers = max(o.Readers, 1)
	if o.WarmBlocks <= 0 {
		o.WarmBlocks = warmReads * o.SegmentBlocks
	}
	if o.Allocate == nil {
		o.Allocate = mapped
	}
	c := &Cache{file: f, opt: o, logger: o.Logger, users: map[*Client]struct{}{}}
	r := rand.New(rand.NewPCG(o.Seed, 0x726361636865))
	c.hash = hasher{r.Uint64(), r.Uint64()}
	c.flights.init(o.AheadMemory)
	c.warm.allocate = o.Allocate
	return c, r
}

// openFile reads the file's header, or writes a new one.
func (c *Cache) openFile(r *rand.Rand) error {
	b := c.file.Buffer(BlockSize)
	if _, err := c.file.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the read cache's header: %w", err)
	}
	id, err := decodeFileHeader(b)
	if err != nil {
		// A cache holds nothing that is not elsewhere: what is not known is
		// begun anew, under an id that nothing in the file has.
		for i := range id {
			id[i] = byte(r.Uint32())
		}
		encodeFileHeader(b, id)
		if _, err := c.file.WriteAt(b, 0); err != nil {
			return fmt.Errorf("write the read cache's header: %w", err)
		}
		if err := c.file.Sync(); err != nil {
			return fmt.Errorf("write the read cache's header: %w", err)
		}
	}
	c.id = id
	return nil
}

// A Key names an object for look-ups. It is made once for each use.
type Key struct {
	Object
	// Size is where the object's data ends, in bytes.
	Size uint64
	hash uint64
	sum  uint32 // CRC32C of the object's part of the blocks' keys
}

// Key returns the key of an object whose data ends at the byte size.
func (c *Cache) Key(o Object, size uint64) Key {
	if mutate.On(mutate.CacheImageIgnored) {
		o.Image = uuid.Nil
	}
	k := Key{Object: o, Size: size, hash: c.hash.object(&o)}
	for _, b := range o.Image {
		k.sum = sumByte(k.sum, b)
	}
	k.sum = sumWord(sumWord(k.sum, o.Number, 8), o.Epoch, 8)
	return k
}

// sumByte is crc32.Update for one byte, which needs no memory on the heap.
func sumByte(crc uint32, b byte) uint32 {
	crc = ^crc
	return ^(castagnoli[byte(crc)^b] ^ crc>>8)
}

func sumWord(crc uint32, v uint64, n int) uint32 {
	for range n {
		crc, v = sumByte(crc, byte(v)), v>>8
	}
	return crc
}

// blockSum is the checksum of a block: of its key and of its data.
func (k *Key) blockSum(block uint32, data []byte) uint32 {
	return sumWord(k.sum, uint64(block), 4) ^ crc32.Checksum(data, castagnoli)
}

// A Run is what Next found.
type Run struct {
	N      uint32 // blocks
	Cached bool
	// Memory says that the blocks are in memory, on the SSD or not: Copy gets them.
	Memory bool
	place  place
}

// Next looks up the blocks from first on, at most count, and returns the run that
// they begin with: all of it cached, one after another, or all of it not. use says
// that the blocks are asked for by a client, which counts for their eviction.
func (c *Cache) Next(k *Key, first, count uint32, use bool) Run {
	if c.off.Load() {
		return Run{N: count}
	}
	var r Run
	for r.N < count {
		w, at := c.index.find(c.hash.block(k.hash, first+r.N))
		p := placeIn(w)
		if r.N == 0 {
			r.Cached, r.place = at >= 0, p
			r.Memory = r.Cached && c.segments[p.segment()].buf.Load() != nil
		} else if r.Cached != (at >= 0) || r.Cached && (p != r.place+place(r.N) || p.segment() != r.place.segment()) {
			break
		}
		if use && at >= 0 {
			c.index.used(w, at)
		}
		r.N++
	}
	if use && r.Cached {
		c.heat(r)
	}
	return r
}

// Copy copies the blocks of a run that is in memory from the byte skip on into
// dst. It reports false if they are there no more: look again.
func (c *Cache) Copy(k *Key, first uint32, r Run, skip int, dst []byte) bool {
	s := &c.segments[r.place.segment()]
	b := s.buf.Load()
	if b == nil {
		return false
	}
	// Whoever takes the buffer away waits until nobody has it pinned.
	b.pins.Add(1)
	defer b.pins.Add(-1)
	if s.buf.Load() != b {
		return false
	}
	from := r.place.block() * BlockSize
	for i := range r.N {
		// What the index says now was put there before it said so.
		if _, at := c.index.at(c.hash.block(k.hash, first+i), r.place+place(i)); at < 0 {
			return false
		}
		if !c.good(k, first+i, b.mem[from+int(i)*BlockSize:][:BlockSize], r.place+place(i)) {
			c.drop(k, first+i, r.place+place(i))
			return false
		}
	}
	copy(dst, b.mem[from+skip:from+int(r.N)*BlockSize])
	return true
}

// Offset returns where in the file a run is.
func (c *Cache) Offset(r Run) int64 { return c.offset(r.place) }

func (c *Cache) offset(p place) int64 { return dataOffset + int64(p)*BlockSize }

// good reports whether data is what the index has at a place.
func (c *Cache) good(k *Key, block uint32, data []byte, p place) bool {
	return c.index.sums[p].Load() == k.blockSum(block, data) || mutate.On(mutate.CacheUnverified)
}

// Verify reports whether data, read from where the run r was found, is that of
// the blocks from first on. If it is not, they are not found there again: look
// again.
func (c *Cache) Verify(k *Key, first uint32, r Run, data []byte) bool {
	worked(&c.badReads)
	ok := true
	for i := range r.N {
		if !c.good(k, first+i, data[int(i)*BlockSize:][:BlockSize], r.place+place(i)) {
			c.drop(k, first+i, r.place+place(i))
			ok = false
		}
	}
	return ok
}

// drop makes a block that failed its verification a miss. One that the index has
// elsewhere by now, or not at all, was only evicted meanwhile.
func (c *Cache) drop(k *Key, block uint32, p place) {
	c.mu.Lock()
	_, was := c.index.remove(c.hash.block(k.hash, block), p)
	c.mu.Unlock()
	if was {
		c.seldom(c.errs.mismatches.Add(1), "a block of the read cache failed its checksum: it comes from the store", "object", k.Number, "block", block)
	}
}

// Failed tells that reading from the file failed.
func (c *Cache) Failed(err error) { c.failed(&c.badReads, fmt.Errorf("read: %w", err)) }

func (c *Cache) failed(row *atomic.Int32, err error) {
	c.seldom(c.errs.failed.Add(1), "the read cache's file fails: reads go to the store", "err", err)
	if row.Add(1) >= maxFailures && !c.off.Swap(true) {
		c.logger.Error("the read cache is off until the daemon is started anew: its file keeps failing", "err", err)
	}
}

// worked ends a row of failures.
func worked(row *atomic.Int32) {
	if row.Load() != 0 {
		row.Store(0)
	}
}

// readAt reads from the file, and takes note of how that went.
func (c *Cache) readAt(b []byte, p place) error {
	if _, err := c.file.ReadAt(b, c.offset(p)); err != nil {
		c.Failed(err)
		return err
	}
	worked(&c.badReads)
	return nil
}

// seldom logs the first time and whenever the number of times has doubled.
func (c *Cache) seldom(n uint64, msg string, args ...any) {
	if bits.OnesCount64(n) == 1 {
		c.logger.Warn(msg, append(args, "times", n)...)
	}
}

// detach takes a buffer away from readers. The caller does not hold mu.
func (c *Cache) detach(b *buffer) {
	c.segments[b.h.index].buf.Store(nil)
	for b.pins.Load() != 0 {
		runtime.Gosched() // a reader copies: microseconds
	}
}

// recycle makes a buffer a spare one. The caller does not hold mu.
func (c *Cache) recycle(b *buffer) {
	c.detach(b)
	c.mu.Lock()
	c.spare = append(c.spare, b)
	c.mu.Unlock()
}

// segmentQueue is a queue of segments.
type segmentQueue struct {
	list []uint32
	head int
}

func (q *segmentQueue) len() int { return len(q.list) - q.head }

func (q *segmentQueue) push(s uint32) {
	if q.head > 64 && q.head > len(q.list)/2 {
		q.list = append(q.list[:0], q.list[q.head:]...)
		q.head = 0
	}
	q.list = append(q.list, s)
}

func (q *segmentQueue) pop() uint32 {
	s := q.list[q.head]
	q.head++
	return s
}
