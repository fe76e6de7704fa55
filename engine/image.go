package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// Image is an opened image. Open returns it; after Start its reactor owns it and
// alone may call its methods.
type Image struct {
	// Fixed once opened.
	id       uuid.UUID
	line     *lineage // of id
	store    backend.Store
	fencer   backend.Fencer // the store, if it can shut clients out, or nil
	log      *writelog.Log  // nil when read-only
	logID    uuid.UUID
	cfg      Config
	logger   *slog.Logger
	readOnly bool
	object   uint64 // size of a data object's data, in sectors
	parallel int    // reads from the store that recovery makes at one time
	window   int    // data objects beyond the last accepted one that may be put
	ctx      context.Context
	cancel   context.CancelFunc
	sums     sumCache // shared by the workers that read objects
	shared   *Shared
	cache    *readcache.Cache
	reads    *readcache.Client // of cache
	cacheDev aio.Device        // the cache's file; nil: it is read on workers

	// The reactor changes it; workers read it as well, to check what they decode.
	span atomic.Uint64 // the image's largest size, which its map and log may refer to, in sectors

	// The reactor owns all that follows.
	env     Env
	state   State
	why     error  // why it is not active any more
	sectors uint64 // the image's size
	shrink  *shrinker
	flatten *flattener

	dirty *extmap.Map // what is in the log and not in an accepted object: log positions in sectors
	objs  *pagedMap   // what is in accepted objects
	table objectTable
	apply applier
	// The change of the map that is being entered: its object, and whether the table is
	// told what it takes from others.
	entering uint32
	counting bool
	tail     tail
	pace     pacer
	burst    burst

	unreleased   bool        // the ownership before was not given up
	unused       uuid.UUID   // the id for a log made anew
	spent        uuid.UUID   // a log of this host from which the store has everything
	recoveredLog uuid.UUID   // whose positions the last recovered object gives
	recovered    uint64      // objects after the last checkpoint, when it was opened
	recoveredTo  uint64      // the last object accepted, then
	accepted     position    // of the last data object in the map
	sealed       position    // of the last batch that was sealed
	open         *batch      // the batch being filled
	hazards      hazards     // of data by its age: what becomes an object of its own
	queue        []*batch    // sealed batches, oldest first; those up to window are being put
	memory       int64       // bytes that the queue has of Shared.destage
	windows      keptBuffers // to read the log back with
	spare        []*batch    // done with; kept for their capacity

	blocked fifo // writes that the log had no room for, in order of arrival
	acks    fifo // writes in the log, in order of records
	flushes fifo // flushes and FUA writes, by the record that must be durable
	late    fifo // confirmed, but not told in time
	ackable bool // something of late, acks or flushes may have become due
	unblock bool // the log may have room again
	unread  bool // a batch waits for its last records to be on the SSD
	waiters []waiter
	readOps []*logRead // free
	slowOps []*slowRead
	reading int // slow reads running
	slow    [slowKinds]slowReads
	// readMemory is what those running have of Shared.reads, in bytes. None of it is counted
	// any more when the image's service has ended.
	readMemory int64
	cacheOps   []*cacheRead // free
	streams    streams
	own        gathered          // of the request that is being begun
	spanOf     map[objectRef]int // collect's, empty between its calls
	aheadOps   []*aheadRead      // free

	cacheReads  int  // reads of the read cache under way in the ring
	aheads      int  // read-ahead under way
	maintaining bool // a worker maintains the read cache

	ageTimer Timer
	pump     Timer

	taking     map[uuid.UUID]bool   // snapshots that are being taken
	pending    map[uuid.UUID]uint64 // those asked for, and the last object accepted when they were first seen
	refreshers []*refresher
	forgetter  forgetter

	jobs       int // workers running for this image
	stint      stint
	super      superWriter
	checkpoint checkpointer
	reaper     reaper
	clean      cleaner
	scrub      scrubber
	stats      counters
}

// position is a point in the order of writes at which an object ends.
type position struct {
	object uint64 // number of the object
	seq    uint64 // last record in it
	logEnd uint64 // log position after that record, in bytes
}

// waiter wants everything up to an object accepted.
type waiter struct {
	object uint64
	fn     func(error)
}

// counters are what an image counts; all since it was opened.
type counters struct {
	reads, writes, flushes, discards uint64
	readBytes, writeBytes            uint64
	objects, objectBytes             uint64 // put
	storeErrors, readErrors          uint64
	mapErrors                        uint64
	lastStoreErr                     error
	lastStoreErrAt                   time.Duration
	storeDown                        bool
	failing                          storeUse // the uses that have failed last
	usedUp                           bool     // the numbers of objects, and this was logged
	reads0, writes0                  uint64   // at the last rate sample
	readRate, writeRate              float64
	sampledAt                        time.Duration
	stalls                           uint64        // writes that had to wait for room in the log, or their turn
	stalledSince                     time.Duration // 0: nothing is waiting
}

// ID returns the image's id.
func (im *Image) ID() uuid.UUID { return im.id }

// Sectors returns the image's size.
func (im *Image) Sectors() uint64 { return im.sectors }

// ReadOnly reports whether it was opened read-only.
func (im *Image) ReadOnly() bool { return im.readOnly }

// Start hands the image to the reactor behind env, whose device dev is the write
// log's file and mem its memory: outside the Go heap, a multiple of
// writelog.SegmentSize, kept until the image is dropped. Both are nil for a
// read-only image. It is called on the reactor, which calls EndTurn from then on.
// Config.LogPool lends more memory.
func (im *Image) Start(env Env, dev aio.Device, mem []byte) {
	im.env = env
	im.stats.sampledAt = env.Now()
	im.sums.init()
	give := im.giveMap
	im.objs.join(func() { env.Post(give) })
	if im.readOnly {
		return
	}
	im.pending = nil
	im.takeSuper(im.super.sb, im.super.version) // now it is known what is accepted
	im.recovered, im.recoveredTo = im.checkpoint.since(), im.accepted.object
	im.log.Start(dev, im, mem, im.cfg.LogPool, im.cfg.LogDepth)
	im.ageTimer = env.AfterFunc(im.cfg.BatchAge, im.sealByAge)
	im.pump = env.AfterFunc(0, im.pumpNow)
	im.apply.timer = env.AfterFunc(0, im.advance)
	im.pace.timer = env.AfterFunc(0, func() { im.unblock = true })
	im.pace.since = env.Now()
	im.clean.timer = env.AfterFunc(0, im.clean.maybe)
	comes := im.clean.turnComes
	im.clean.turn.come = func() { env.Post(comes) }
	im.startScrub()
	im.startSuper()
	im.startLeftovers()
	im.checkpoint.parts = im.manifestParts()
	im.checkpoint.removeDead()
	im.reap()
	im.checkpoint.maybe()
}

// giveMap gives memory of the map back because another image needs it: what is clean
// now, and if there is much that is not, soon.
func (im *Image) giveMap() {
	im.objs.give()
	if !im.readOnly && im.state != Fenced && im.state != Released {
		im.checkpoint.maybe()
	}
}

// Destage makes everything that is in the log durable in the store; fn is told
// when it is, or why it will not be.
func (im *Image) Destage(fn func(error)) {
	switch {
	case im.readOnly:
		fn(nil)
		return
	case im.state == Fenced || im.state == Released:
		fn(im.why)
		return
	}
	im.log.Commit()
	if im.open != nil {
		im.seal()
	}
	last := im.sealed.object
	if last <= im.accepted.object {
		fn(nil)
		return
	}
	im.waiters = append(im.waiters, waiter{last, fn})
	im.pumpNow() // nothing is held back any more
}

// Close destages everything, checkpoints the map and gives up the ownership; fn
// is told once: when that is done, or why it cannot be. Requests must have ended;
// new ones fail. Where part of the map is damaged that may be without the checkpoint, which
// takes about as long as a lease, MapPatience at most: Stats.MapError says so.
func (im *Image) Close(fn func(error)) {
	if im.readOnly {
		im.fence(Released, errDetached)
		fn(nil)
		return
	}
	if im.state == Fenced || im.state == Released {
		fn(im.why)
		return
	}
	if im.state == Active {
		im.state = Closing
	}
	im.letGo(fn)
}

// errDetached is why an image that was closed is not active any more.
var errDetached = errors.New("the image was detached")

// letGo destages, checkpoints and releases.
func (im *Image) letGo(done func(error)) {
	fn := func(err error) {
		if im.super.sb.Owner == nil && !im.super.gaveUp {
			err = nil // the image went without a checkpoint, but with everything in the store
		}
		done(err)
	}
	im.clean.end()
	im.flatten.end(im.ended())
	im.Destage(func(err error) {
		if err != nil {
			fn(err)
			return
		}
		im.checkpoint.now(func(err error) {
			if err != nil {
				fn(err)
				return
			}
			im.cleanUp(fn)
		})
	})
}

// cleanUp removes what nothing needs, as far as that is possible now, and releases.
func (im *Image) cleanUp(fn func(error)) {
	im.checkpoint.afterRemoval(func(err error) {
		if err != nil {
			fn(err)
			return
		}
		im.reaper.later = nil
		im.afterReaping(func(err error) {
			if err != nil {
				fn(err)
				return
			}
			im.release(fn)
		})
	})
}

// Abandon ends the image's work where it stands, as a crash would: the log keeps
// what was acknowledged, and the superblock the ownership.
func (im *Image) Abandon() {
	im.fence(Released, errors.New("the image was closed"))
}

// spawn runs work on a worker and done on the reactor.
func (im *Image) spawn(work, done func()) {
	im.jobs++
	im.env.Spawn(work, func() {
		im.jobs--
		done()
	})
}

// askStore runs work, which is operations on the store, on a worker, with the time that one
// may take, and done on the reactor.
func (im *Image) askStore(work func(context.Context) error, done func(error)) {
	var err error
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
		defer stop()
		err = work(ctx)
	}, func() { done(err) })
}

// Quiet reports whether nothing of the image is running any more, so that its
// memory and files may go. An image that was closed, abandoned or fenced comes
// to this by itself.
func (im *Image) Quiet() bool {
	return im.jobs == 0 && im.reading == 0 && im.cacheReads == 0 && im.aheads == 0 && (im.readOnly || im.log.Quiet())
}

// fence ends the image's service.
func (im *Image) fence(s State, why error) {
	if im.state == Fenced || im.state == Released {
		return
	}
	im.state, im.why = s, why
	im.freeReads()
	for _, b := range im.queue {
		im.giveMemory(b) // also of those that a worker has: if the reactor has died, nobody hears of its end
	}
	im.cancel()
	im.failPending(syscall.EIO)
	for _, w := range im.waiters {
		w.fn(why)
	}
	im.waiters = nil
	im.checkpoint.fail(why)
	im.reaper.tell(why)
	im.endRefreshing(why)
	if im.shrink != nil {
		im.shrink.end(why)
	}
	im.flatten.end(why)
	if fn := im.super.release; fn != nil {
		im.super.release = nil
		fn(why)
	}
	im.clean.end()
	im.scrub.end()
	im.objs.leave()
	if im.super.timer != nil {
		im.super.timer.Stop()
	}
}

// fenced says that another host owns the image.
func (im *Image) fenced(why error) {
	im.logger.Error("the image is owned by another host now: every request fails from here on; what is in the log is kept", "err", why)
	im.fence(Fenced, fmt.Errorf("fenced: %w", why))
}
