package engine

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

const (
	// maxSlowReads bounds the reads of an image, of each kind, that run on workers at one
	// time. So does Shared.reads those that the store has to answer.
	maxSlowReads = 64
	// headerMemory is about how many times its size a header takes for a moment when it is
	// read and decoded.
	headerMemory = 4
)

// slowKind says what a slow read waits for: those that wait for a store which hangs are not
// in the way of others.
type slowKind uint8

const (
	slowLocal slowKind = iota // what is on the SSD
	slowStore
	slowKinds
)

// slowReads are slow reads of a kind.
type slowReads struct {
	running int
	waiting []*slowRead // in order
}

// read splits r into runs and starts all of them at once.
func (im *Image) read(r *Request) {
	st := im.streams.note(r.Sector, r.Sectors)
	r.stream, r.how = st != nil, st.how()
	r.pending = 1 // held until all parts are started
	if st != nil && st.scattered {
		im.readAhead(st, r.Sector) // with what r asks for itself
	} else {
		im.gatherOwn(r, r.Sector, uint64(r.Sectors))
	}
	im.readRange(r, r.Sector, uint64(r.Sectors))
	if st != nil {
		im.readAhead(st, st.next)
	}
	im.partDone(r, 0)
}

// readRange starts the reads of n of r's sectors from s, as the maps are now.
func (im *Image) readRange(r *Request, s, n uint64) {
	for end := s + n; s < end; {
		e, ok := im.dirty.Next(s, end)
		stop := end
		if ok {
			stop = e.Sector
		}
		if s < stop {
			im.readObjects(r, s, stop)
		}
		if !ok {
			return
		}
		if e.Loc&extmap.Fixed != 0 {
			clear(r.part(e.Sector, e.N))
		} else {
			im.readLog(r, e.Sector, e.N, e.Loc)
		}
		s = e.End()
	}
}

// part returns r's buffer for n sectors from s.
func (r *Request) part(s uint64, n uint32) []byte {
	at := (s - r.Sector) * SectorSize
	return r.Buf[at : at+uint64(n)*SectorSize]
}

// direct reports whether the memory for what r reads from s on suits direct I/O on any
// disk: one with blocks of 4096 bytes may ask for memory that is aligned to these, as
// dm-crypt does.
func (r *Request) direct(s uint64) bool { return (s-r.Sector)%blockSectors == 0 }

// partDone ends one part of a read.
func (im *Image) partDone(r *Request, err syscall.Errno) {
	if err != 0 {
		r.Err = err
	}
	if r.pending--; r.pending == 0 {
		im.finish(r, 0)
	}
}

// readObjects reads from the object map, where nothing is dirty.
func (im *Image) readObjects(r *Request, s, end uint64) {
	for s < end {
		i := segmentOf(s)
		to := min(segmentStart(i+1), end)
		if im.ready(i) {
			im.readMapped(r, s, to)
		} else {
			im.readUnloaded(r, i, s, to)
		}
		s = to
	}
}

// readUnloaded reads [s, end), of which the map's segment i is not in memory, once
// it is.
func (im *Image) readUnloaded(r *Request, i uint32, s, end uint64) {
	r.pending++
	im.withSegment(i, func(err error) {
		if err == nil {
			im.gatherOwn(r, s, end-s)
			im.readRange(r, s, end-s) // of which some may be in the log by now
		}
		im.partDone(r, im.readErr(err))
	})
}

// readMapped reads [s, end), of which the map's segment is in memory.
func (im *Image) readMapped(r *Request, s, end uint64) {
	for s < end {
		e, ok := im.objs.Next(s, end)
		stop := end
		if ok {
			stop = e.Sector
		}
		if s < stop {
			clear(r.part(s, uint32(stop-s)))
		}
		if !ok {
			return
		}
		s = e.End()
		if im.tail.read(im.log, e.Loc, r.part(e.Sector, e.N)) {
			continue
		}
		info := im.table.find(refOf(e.Loc).seq())
		if info == nil || uint32(offsetOf(e.Loc))+e.N > info.sectors {
			im.mapWrong(e.Loc)
			r.Err = syscall.EIO
			continue
		}
		im.readFromObject(r, e.Sector, e.N, e.Loc, info)
	}
}

// readLog reads n of r's sectors from s on, which are at the log position pos: from
// memory, else the SSD.
func (im *Image) readLog(r *Request, s uint64, n uint32, pos uint64) {
	dst := r.part(s, n)
	if m := im.log.Memory(pos, n); m != nil {
		copy(dst, m)
		return
	}
	im.log.Hold(pos)
	if !im.log.Direct(pos, n) || !r.direct(s) {
		o := im.newSlowRead(r, 0, n, dst)
		o.kind, o.object, o.loc = slowLocal, false, pos
		im.startSlow(o)
		return
	}
	var o *logRead
	if k := len(im.readOps); k > 0 {
		o, im.readOps = im.readOps[k-1], im.readOps[:k-1]
	} else {
		o = &logRead{im: im}
	}
	o.r, o.dst, o.pos = r, dst, pos
	r.pending++
	im.log.Read(dst, pos, o)
}

// logRead is a read of whole blocks of the log, through the reactor's ring.
type logRead struct {
	im  *Image
	r   *Request
	dst []byte
	pos uint64
}

// Complete receives the device's result.
func (o *logRead) Complete(res int32, _ uint32) {
	im, r := o.im, o.r
	var err error
	switch {
	case res < 0:
		err = fmt.Errorf("read of the log: %w", syscall.Errno(-res))
	case int(res) != len(o.dst):
		err = fmt.Errorf("read of the log ended after %d of %d bytes", res, len(o.dst))
	default:
		err = im.log.Verify(o.dst, o.pos)
	}
	im.log.Release(o.pos)
	o.r, o.dst = nil, nil
	im.readOps = append(im.readOps, o)
	im.partDone(r, im.readErr(err))
}

// readErr counts and logs an error of a read, and returns the client's.
func (im *Image) readErr(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	im.stats.readErrors++
	if !errors.Is(err, context.Canceled) {
		im.logger.Error("read failed: the client gets an I/O error", "err", err)
	}
	return syscall.EIO
}

// slowRead is a part of a read that a worker does: from an object, or from the
// log where the position does not suit direct I/O.
type slowRead struct {
	im      *Image
	r       *Request
	kind    slowKind
	object  bool // else the log
	sector  uint64
	n       uint32
	dst     []byte
	loc     uint64 // in an object, or log position
	key     readcache.Key
	src     objectSource
	fetched bool // from the store, not the read cache
	err     error
	tries   int
	memory  int64 // bytes of Shared.reads that it has
	began   time.Duration
	scratch []byte
	// The functions for Env.Spawn, made once.
	work, done func()
}

func (im *Image) newSlowRead(r *Request, sector uint64, n uint32, dst []byte) *slowRead {
	var o *slowRead
	if k := len(im.slowOps); k > 0 {
		o, im.slowOps = im.slowOps[k-1], im.slowOps[:k-1]
	} else {
		o = &slowRead{im: im}
		o.work, o.done = o.run, o.finished
	}
	o.r, o.sector, o.n, o.dst, o.err, o.tries = r, sector, n, dst, nil, 0
	o.began = im.env.Now()
	r.pending++
	return o
}

// startSlow runs o on a worker, now or when some of its kind that are running have ended.
func (im *Image) startSlow(o *slowRead) {
	q := &im.slow[o.kind]
	q.waiting = append(q.waiting, o)
	im.runSlow(o.kind)
}

// runSlow runs as many of the reads that wait as may run.
func (im *Image) runSlow(kind slowKind) {
	q, n := &im.slow[kind], 0
	for n < len(q.waiting) && q.running < maxSlowReads && im.mayRead(q.waiting[n]) {
		o := q.waiting[n]
		n++
		q.running++
		im.reading++
		if kind == slowStore {
			im.fetchSums(&o.src.info)
		}
		im.env.Spawn(o.work, o.done)
	}
	if n > 0 {
		left := copy(q.waiting, q.waiting[n:])
		clear(q.waiting[left:])
		q.waiting = q.waiting[:left]
	}
}

// mayRead reports whether o may run beside those that do, and takes the memory for it.
func (im *Image) mayRead(o *slowRead) bool {
	if o.kind != slowStore || im.state == Fenced || im.state == Released {
		return true
	}
	n := int64(len(o.dst))
	if info := &o.src.info; im.sums.get(info.number) == nil {
		n += headerMemory * int64(info.headerBytes()) // which is read for its checksums
	}
	if !im.shared.reads.take(im.readMemory, n) {
		return false
	}
	im.readMemory, o.memory = im.readMemory+n, n
	return true
}

// giveRead gives back the memory of o, which has ended.
func (im *Image) giveRead(o *slowRead) {
	if o.memory > 0 && im.readMemory > 0 {
		im.shared.reads.give(im.readMemory, o.memory)
		im.readMemory -= o.memory
	}
	o.memory = 0
}

// freeReads gives back the memory of all reads under way when the image's service ends: if
// its reactor has died, nobody hears of their end.
func (im *Image) freeReads() {
	if im.readMemory > 0 {
		im.shared.reads.give(im.readMemory, im.readMemory)
	}
	im.readMemory = 0
}

// run reads, on a worker.
func (o *slowRead) run() {
	im := o.im
	if o.object {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
		defer stop()
		o.fetched, o.err = im.reads.Read(ctx, &o.key, offsetOf(o.loc)*SectorSize, o.dst, &o.src, o.r.how)
		return
	}
	if need := len(o.dst) + 2*writelog.BlockSize; cap(o.scratch) < need {
		o.scratch = im.log.Buffer(need)
	}
	o.err = im.log.ReadBlocking(o.dst, o.loc, o.scratch[:cap(o.scratch)])
}

// finished takes the result, on the reactor.
func (o *slowRead) finished() {
	im := o.im
	im.reading--
	im.slow[o.kind].running--
	im.giveRead(o)
	im.runSlow(o.kind)
	im.maintainCache()
	if o.object && (im.moved(o) || im.again(o)) {
		return
	}
	if !o.object {
		im.log.Release(o.loc)
	}
	r, err := o.r, o.err
	im.freeSlow(o)
	im.partDone(r, im.readErr(err))
}

// moved reads o again by the map, which refers to another object by now, if the
// cleaner has removed the one that it was being read from.
func (im *Image) moved(o *slowRead) bool {
	if !errors.Is(o.err, backend.ErrNotFound) || im.readOnly {
		return false
	}
	if x := im.table.find(refOf(o.loc).seq()); x != nil && x.live > 0 {
		return false
	}
	r := o.r
	im.readRange(r, o.sector, uint64(o.n))
	im.freeSlow(o)
	im.partDone(r, 0)
	return true
}

// freeSlow keeps o for another read.
func (im *Image) freeSlow(o *slowRead) {
	o.r, o.dst, o.err = nil, nil, nil
	if cap(o.scratch) > 128<<10 {
		o.scratch = nil
	}
	im.slowOps = append(im.slowOps, o)
}

// again arranges another attempt of a read from the store that failed for now.
func (im *Image) again(o *slowRead) bool {
	switch {
	case o.err == nil:
		if o.fetched {
			im.storeWorks(useOther)
		}
		return false
	case !retryable(o.err), im.state == Fenced, im.state == Released:
		return false
	case im.cfg.ReadTimeout > 0 && im.env.Now()-o.began > im.cfg.ReadTimeout:
		return false
	}
	im.storeFailed(useOther, o.err)
	wait := im.backoff(o.tries)
	o.tries++
	o.kind = slowStore // whatever it was begun as
	im.jobs++
	im.env.AfterFunc(wait, func() {
		im.jobs--
		im.startSlow(o)
	})
	return true
}

// readObject reads from an object's data at the offset in sectors into dst, for
// the engine's own use: it leaves nothing in the read cache. Workers call it.
func (im *Image) readObject(ctx context.Context, info objectInfo, off int, dst []byte) error {
	ctx, stop := context.WithTimeout(ctx, im.cfg.StoreTimeout)
	defer stop()
	k := im.key(&info)
	_, err := im.reads.Read(ctx, &k, off*SectorSize, dst, &objectSource{im, info}, readcache.Pass)
	return err
}
