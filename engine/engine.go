// Package engine is the image: a log-structured virtual disk over a write log on
// the local SSD and immutable objects in a store.
//
// An Image is a state machine owned by one reactor. Requests are submitted, and
// completed, on that reactor; slow work is handed to Env.Spawn, whose results
// come back to it. Nothing else touches an image's state, so there are no locks,
// and a simulation that implements Env, aio.Device, writelog.File and
// backend.Store can drive the real engine step by step.
package engine

import (
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/aio"
)

// Env is what an image needs from the reactor that owns it. All its methods are
// called on the reactor, and all functions given to it but work run there.
type Env interface {
	// Now returns the time, read at this moment, on a clock of this host that
	// is never set and goes on while the host is suspended: leases are counted
	// by it.
	Now() time.Duration
	// Post runs fn on the reactor, in a later turn. Any goroutine may call it. Once the
	// reactor has ended, fn is dropped.
	Post(fn func())
	// Spawn runs work where it may block, then done on the reactor.
	Spawn(work, done func())
	// AfterFunc runs fn on the reactor d from now.
	AfterFunc(d time.Duration, fn func()) Timer
	// LeaseUntil says that the lease was renewed: what it holds for (Request.Leased)
	// may be told until that time of Now's clock.
	LeaseUntil(time.Duration)
}

// A Timer is what Env.AfterFunc returns; the reactor owns it.
type Timer interface {
	// Stop keeps the timer from firing and reports whether it was going to.
	Stop() bool
	// Reset makes it fire once, d from now.
	Reset(d time.Duration)
}

// Limits of an image.
const (
	MaxSize           = 64 << 40 // bytes
	MinObjectSize     = 1 << 20  // bytes
	MaxObjectSize     = 32 << 20 // bytes
	DefaultObjectSize = 8 << 20  // bytes
	MinLease          = time.Second
	MaxLease          = time.Hour
	DefaultLease      = time.Minute

	DefaultSpaceRatio = 1.3
	MinSpaceRatio     = 1.05
	MaxSpaceRatio     = 10

	maxWindow     = 64
	maxPuts       = 8 // batches of an image that are being put
	defaultWindow = maxPuts * maxGroup
	// maxBuilds is how many batches of an image are being built at one time. One after the other
	// takes its memory, so that some are put while others are built: if as many as may be put
	// were built side by side, they would be put side by side, and the SSD have nothing to do
	// meanwhile and the store nothing the rest of the time.
	maxBuilds = 3
	// maxUnderWay is how many, from the oldest on, are being built, or wait to be put, or are being
	// put, or wait for those before them: a store that has answered finds the next one built.
	maxUnderWay = maxPuts + 4
	// maxBatchExtents bounds what one object changes in the map, and so the
	// memory that it takes to enter it: writes of 4 KiB fill the largest.
	maxBatchExtents = MaxObjectSize / 4096
)

// An Op is what a request asks for.
type Op uint8

const (
	// Read fills Buf.
	Read Op = iota
	// Write stores Buf; with FUA it completes once that is on stable media.
	Write
	// Flush completes once every write that completed before is on stable media.
	Flush
	// Discard makes the sectors read as zeroes.
	Discard
	// WriteZeroes makes the sectors read as zeroes, durably so with FUA.
	WriteZeroes
)

// A Request is one operation on an image. Its owner allocates it, once, and may
// use it again when it has completed. Everything but the exported fields is the
// image's.
type Request struct {
	Op      Op
	FUA     bool
	Sector  uint64 // first sector
	Sectors uint32 // 0 for Flush
	// Buf holds Sectors sectors for Read and Write. It lies outside the Go heap,
	// aligned to 4096 bytes, and belongs to the image until the request is done.
	Buf []byte
	// Done is told when the request has ended, on the reactor, possibly before
	// Submit returns.
	Done Completer
	// Err is how it ended: 0, or the errno for the client.
	Err syscall.Errno
	// Leased says that the end may be told as long as the lease lasts (see
	// Env.LeaseUntil) and not a moment longer: it is that of a change, or of a
	// flush. A frontend that can tell it under that condition does so, and gives the
	// request to Image.TakeBack if it came too late. For others the time from here to
	// where the client sees the end is one in which a host that is stopped, and has
	// lost the image when it goes on, tells of a write that the next owner does not
	// have.
	Leased bool

	next    *Request
	at      uint32 // sectors appended to the log so far
	seq     uint64 // record that must be complete, or durable, first
	pending int    // parts of a read that are under way
	stream  bool   // a read of which some may be on its way: it has been read ahead, or gathered
	how     readcache.How
}

// errEvicted is what writes get that come too late.
const errEvicted = syscall.EIO

// A Completer is told that a request has ended.
type Completer interface{ RequestDone(*Request) }

// fifo is a queue of requests, linked through them.
type fifo struct {
	head, tail *Request
	n          int
}

func (q *fifo) push(r *Request) {
	r.next = nil
	if q.tail == nil {
		q.head = r
	} else {
		q.tail.next = r
	}
	q.tail = r
	q.n++
}

func (q *fifo) pop() *Request {
	r := q.head
	q.head = r.next
	if q.head == nil {
		q.tail = nil
	}
	r.next = nil
	q.n--
	return r
}

// Config tunes an image. The zero value of a field means its default.
type Config struct {
	// BatchAge is the longest that a write waits in the log before its batch is put, when
	// the batch does not fill before, or is held back in a burst; after a burst, twice that.
	// Default 5 s.
	BatchAge time.Duration
	// Burst is how much of the log writes that come after a calm may fill, in bytes, but at most
	// a quarter of it, before destaging keeps up with them. Negative: nothing. Default 1 GiB.
	Burst int64
	// LogPool lends the log memory beyond its own for what is not in the store yet, so that it
	// need not be read back from the SSD. It is called on the reactor. nil: there is none.
	LogPool writelog.Pool
	// CheckpointEvery bounds the data objects that may be accepted since the last
	// checkpoint of the map: recovery reads the headers of these, and of those that
	// were being put; more where the image was let go of without a checkpoint. Default 2048.
	CheckpointEvery int
	// SpaceRatio is how much space the data objects may take in the store for what
	// lives of them, before the cleaner begins to reclaim it: 1.05 to 10. Default 1.3.
	SpaceRatio float64
	// PaceFrom is the share of the log from which on writes are slowed down, more
	// and more as it fills: above 0, up to 1, which means never. Default 0.5.
	PaceFrom float64
	// Shared is what the images of a daemon share. Default: it is the image's own.
	Shared *Shared
	// StoreTimeout bounds one attempt of an operation on the store; it is then
	// repeated. Default 20 s.
	StoreTimeout time.Duration
	// RetryMin and RetryMax bound the pause between attempts, which doubles.
	// Defaults 100 ms and 5 s.
	RetryMin, RetryMax time.Duration
	// ReadTimeout is how long a read from a failing store is repeated before the
	// client gets EIO; 0 means for ever.
	ReadTimeout time.Duration
	// LogDepth is the most records of the write log in flight, up to
	// writelog.MaxInFlight. Default 8.
	LogDepth int
	// ReadCache is the daemon's read cache. Default: one of the image's own that
	// keeps nothing on an SSD.
	ReadCache *readcache.Cache
	// ReadCacheDevice is the read cache's file on the ring of the image's reactor;
	// without it workers read it.
	ReadCacheDevice aio.Device
	// Resized, if not nil, is told on the reactor that the image has another size, in
	// sectors, than it was opened with, or than this was told before.
	Resized func(sectors uint64)
	// Logger gets what an operator should know. Default: slog.Default().
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.BatchAge, 5*time.Second)
	set(&c.StoreTimeout, 20*time.Second)
	set(&c.RetryMin, 100*time.Millisecond)
	set(&c.RetryMax, 5*time.Second)
	if c.CheckpointEvery == 0 {
		c.CheckpointEvery = 2048
	}
	if c.SpaceRatio == 0 {
		c.SpaceRatio = DefaultSpaceRatio
	}
	if c.PaceFrom == 0 {
		c.PaceFrom = 0.5
	}
	if c.Burst == 0 {
		c.Burst = 1 << 30
	}
	if c.Shared == nil {
		c.Shared = NewShared(Limits{})
	}
	if c.LogDepth == 0 {
		c.LogDepth = 8
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.ReadCache == nil {
		c.ReadCache = readcache.None(readcache.Options{Logger: c.Logger})
	}
	return c
}

// A State is what an image is doing.
type State int

const (
	// Active: it serves.
	Active State = iota
	// Evicting: another host wants it; what was acknowledged is being destaged.
	Evicting
	// Closing: its owner is letting go of it.
	Closing
	// Released: it has let go; every request fails.
	Released
	// Fenced: another host owns it; every request fails.
	Fenced
)

// String returns the state in lower case.
func (s State) String() string {
	switch s {
	case Active:
		return "active"
	case Evicting:
		return "evicting"
	case Closing:
		return "closing"
	case Released:
		return "released"
	case Fenced:
		return "fenced"
	}
	return fmt.Sprintf("state %d", int(s))
}
