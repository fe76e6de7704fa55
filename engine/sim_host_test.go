package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// simHost is one host: an SSD, a clock, a process that has the image open or
// not, and a client of that.
type simHost struct {
	w      *world
	name   string
	boot   uuid.UUID
	disk   *simdisk.Disk
	memory []byte // of the log; a new process finds the old one's in it
	pool   simLogPool
	store  backend.Store
	env    *simEnv
	im     *Image // nil while no process has it open
	m      *model
	cache  simCache
	faults simFaults

	// Its clock: what it showed when the simulation began, and how many
	// parts in 1024 it is too fast.
	offset time.Duration
	skew   int64

	opening  bool
	yield    func(until time.Duration) // lets the world go on until then, for one of several hosts that open the image at once
	taking   bool                      // what it has recovered in a contest is being read
	logID    uuid.UUID                 // of its log, before a contest
	dead     bool                      // its process has died in the middle of something
	paused   time.Duration             // stopped until then, by the world's clock
	ioLeft   int                       // its process dies at that I/O from now; 0: at none
	injected int                       // faults so far
	hung     time.Duration             // how long the operation of the store that has just ended took
	broken   bool                      // its log was made to fail
	badReads bool                      // a read may fail
	out      []*simRequest             // in flight
	told     []*simRequest             // ended, Leased, and not yet handed to the kernel
	shared   *Shared                   // what its process's images share
	beside   *simHost                  // the process that it is an image of, if not one of its own
	readOnly bool
	snapshot uuid.UUID // that it opens
	left     *simLeave // its client has let go of the image, or nil
}

func (w *world) newHost() *simHost {
	h := &simHost{w: w, name: fmt.Sprintf("host%d", len(w.hosts)+w.gone), boot: w.uuid()}
	h.offset = time.Duration(w.rng.Int64N(int64(time.Hour)))
	h.skew = w.rng.Int64N(2*w.plan.skew+1) - w.plan.skew
	h.store = &simStore{faultstore.New(witness{w.inner.Handle(), h}, h.inject), h}
	h.newDisk()
	h.newCache()
	w.hosts = append(w.hosts, h)
	return h
}

// newDisk gives the host a new SSD.
func (h *simHost) newDisk() {
	h.disk = simdisk.New(writelog.MinSize, h.w.rng)
	h.disk.Aligned = true
	h.disk.Fail, h.disk.Corrupt = h.ssdFails, h.ssdFlips
}

// Now implements Clock for Open.
func (h *simHost) Now() time.Duration { return h.local(h.w.now) }

// Sleep implements Clock for Open: the other hosts go on meanwhile.
func (h *simHost) Sleep(_ context.Context, d time.Duration) error {
	h.w.passFor(h, h.world(h.Now()+d))
	return nil
}

// local returns what the host's clock shows at a time of the world.
func (h *simHost) local(t time.Duration) time.Duration {
	return h.offset + t + t*time.Duration(h.skew)/1024
}

// world returns the first time of the world at which the host's clock shows t.
func (h *simHost) world(t time.Duration) time.Duration {
	at := (t - h.offset) * 1024 / time.Duration(1024+h.skew)
	for h.local(at) < t {
		at++
	}
	return at
}

// runs reports whether the host has a process that can do something.
func (h *simHost) runs() bool {
	return h.im != nil && !h.dead && !h.opening && h.paused <= h.w.now
}

// step lets the host do one thing, if there is one, and ends its turn.
func (h *simHost) step() (did bool) {
	h.dead = h.guarded(func() {
		did = h.hand()
		if h.w.rng.IntN(4) == 0 {
			did = h.env.fireDue() || did
		}
		did = did || h.env.step() || h.env.fireDue()
		h.im.EndTurn()
		h.rest()
		if len(h.told) > 0 && h.w.rng.IntN(8) == 0 {
			h.stopBeforeCall()
		} else {
			h.hand()
		}
	})
	if h.dead {
		h.w.note("dies")
		return true
	}
	return did
}

// rest lets an idle image of a quick world come to rest, and takes its memory.
func (h *simHost) rest() {
	if h.w.plan.quick && h.w.rng.IntN(8) == 0 && h.im.Rest() {
		h.w.count(countRests, true)
		clear(h.memory[:h.w.plan.memory])
	}
}

// stopBeforeCall stops the process right before the system call that ends a turn,
// for a moment or longer than its lease.
func (h *simHost) stopBeforeCall() {
	w := h.w
	if w.rng.IntN(16) == 0 {
		h.paused = max(h.paused, w.now+time.Duration(w.rng.Int64N(int64(2*w.plan.lease))))
	}
}

// hand tells the kernel what has ended, which passes on what it gets in time. It
// reports whether there was something.
func (h *simHost) hand() bool {
	list := h.told
	h.told = nil
	for _, r := range list {
		if h.env.now < h.env.until {
			r.end()
		} else {
			h.w.note("too late", uint64(r.Op), r.Sector)
			h.im.TakeBack(&r.Request)
		}
	}
	return len(list) > 0
}

// open makes one attempt to open the image, as a new process does.
func (h *simHost) open(id uuid.UUID, force bool) (err error) {
	w := h.w
	if h.im != nil {
		w.fail("%s opens the image twice", h.name)
	}
	h.env = &simEnv{rng: w.rng, disk: h.disk, cache: h.cache.disk, now: h.Now(), delay: h.delay}
	h.hung = 0
	h.out, h.left, h.broken, h.badReads, h.dead, h.injected = nil, nil, false, false, false, 0
	h.opening = true
	if !h.readOnly {
		w.regrow(id)
	}
	config := w.plan.config
	if h.shared = h.beside.sharedOf(); h.shared == nil {
		h.shared = NewShared(Limits{Map: w.plan.mapMemory, Destage: w.plan.destageMemory, Reads: w.plan.readMemory})
	}
	config.Shared = h.shared
	h.pool.begin(h)
	config.LogPool = &h.pool
	var im *Image
	died := h.guarded(func() {
		h.openCache()
		h.cache.configure(w.plan.cache.ring, &config)
		im, err = Open(context.Background(), h.store, id, OpenOptions{
			Parallel: 1, ReadOnly: h.readOnly, Snapshot: h.snapshot,
			Log: simFile{h.disk, h}, URL: "mem:/disk", Host: h.name, Boot: h.boot, Force: force, Clock: h, Lease: w.plan.lease, Config: config,
		})
	})
	h.opening = false
	w.note("open", class(err))
	if died {
		return errDied
	}
	if err != nil {
		return err
	}
	h.im = im
	im.objs.copiesPart, im.objs.deltaFrom = w.plan.copiesPart, w.plan.deltaFrom
	h.env.now = h.Now()
	if h.readOnly {
		h.im.Start(h.env, nil, nil)
		return nil
	}
	if h.memory == nil {
		h.memory = w.memory.take(w.plan.memory)
	}
	h.im.Start(h.env, h.disk.Device(), h.memory)
	if h.cache.cache != nil && !h.cache.loaded {
		h.env.Spawn(h.loadCache, func() {})
	}
	return nil
}

var errDied = errors.New("the process died")

func (h *simHost) delay() time.Duration {
	w, hung := h.w, h.takeHung()
	if !h.faults.on || w.rng.Float64() >= w.plan.slow {
		return hung
	}
	// From a millisecond to half a minute, as often above 170 ms as below.
	return hung + time.Millisecond<<w.rng.IntN(16)
}

// takeHung returns how long operations of the store have taken since it was asked.
func (h *simHost) takeHung() time.Duration {
	d := h.hung
	h.hung = 0
	return d
}

// start opens the image, as often as it takes: the process dies, the store and
// the SSD fail meanwhile. It reports how the image was opened, or how it was
// refused for another reason, and whether the power was cut meanwhile.
func (w *world) start(h *simHost, force bool) (powerCut bool, err error) {
	for try := 0; ; try++ {
		if h.faults.on = true; try >= 6 {
			h.faults = simFaults{}
		}
		h.ioLeft = 0
		if h.faults.on && w.rng.Float64() < w.plan.dieOpen {
			h.ioLeft = 1 + w.rng.IntN(1<<w.rng.IntN(9))
		}
		err := h.open(w.id, force)
		h.ioLeft = 0
		switch {
		case err == nil:
			return powerCut, nil
		case errors.Is(err, errDied):
			w.count(countAttachDeaths, true)
			if w.rng.IntN(3) == 0 {
				h.cutPower()
				powerCut = true
			} else {
				h.kill()
			}
		case try < 12 && (h.injected > 0 || names(err, "try again")):
			h.kill()
			h.Sleep(context.Background(), time.Duration(w.rng.IntN(3000))*time.Millisecond)
		default:
			h.kill()
			return powerCut, err
		}
	}
}

// kill ends the process of h.
func (h *simHost) kill() {
	h.w.note("kill")
	h.w.count(countKills, true)
	h.disk.Kill()
	h.endCache(false)
	if h.cache.disk != nil {
		h.cache.disk.Kill()
	}
	h.im, h.dead, h.paused, h.told = nil, false, 0, nil
}

// cutPower ends everything on h.
func (h *simHost) cutPower() {
	h.w.note("power cut")
	h.w.count(countPowerCuts, true)
	h.disk.CutPower()
	h.endCache(false)
	if h.cache.disk != nil {
		h.cache.disk.CutPower()
	}
	h.boot = h.w.uuid()
	h.im, h.dead, h.paused, h.told = nil, false, 0, nil
}

// simRequest is a request of the client.
type simRequest struct {
	Request
	h           *simHost
	first, last int      // in history, of a write
	acked       int      // of a read or flush: writes that had completed when it was submitted
	cell        uint64   // first one
	want        []uint64 // of a read: the state when it was submitted
	ended       bool
}

func (h *simHost) submit(r *simRequest) {
	h.w.count(countRequests, true)
	r.h, r.Done = h, r
	r.acked = h.m.acked
	h.out = append(h.out, r)
	h.im.Submit(&r.Request)
}

// RequestDone implements Completer.
func (r *simRequest) RequestDone(*Request) {
	if r.Leased {
		r.h.told = append(r.h.told, r)
		return
	}
	r.end()
}

// end is the client's view of it.
func (r *simRequest) end() {
	h, w := r.h, r.h.w
	if r.ended {
		w.fail("a request completed twice")
	}
	r.ended = true
	i := slices.Index(h.out, r)
	h.out = slices.Delete(h.out, i, i+1)
	w.note("done", uint64(r.Op), r.Sector, uint64(r.Err))
	if r.Err != 0 {
		r.failed()
		return
	}
	if h.im != nil && h.im.log.Err() != nil && r.Op != Read {
		w.fail("%s: op %v was acknowledged although the log had failed", h.name, r.Op)
	}
	var err error
	switch r.Op {
	case Flush:
		h.m.durable = max(h.m.durable, r.acked)
		err = h.m.promised(r.acked, "a flush was acknowledged")
	case Read:
		err = r.verify()
	default:
		err = h.m.complete(r.first, r.last, r.FUA)
	}
	if err != nil {
		w.fail("%s: %v", h.name, err)
	}
}

// failed checks that a request had a reason to fail.
func (r *simRequest) failed() {
	h := r.h
	alone := !h.m.lost && !h.badReads
	switch {
	case r.Err != syscall.EIO:
		h.w.fail("%s: op %v: %v, want EIO or nothing", h.name, r.Op, r.Err)
	case h.im.state == Fenced && alone:
		h.w.fail("%s was fenced although nobody else has the image: %v", h.name, h.im.why)
	case r.Op == Read && alone && h.im.state != Released, r.Op != Read && !h.broken && h.im.state == Active:
		h.w.fail("%s: op %v failed without a reason", h.name, r.Op)
	}
}

// verify checks a read.
func (r *simRequest) verify() error {
	cell := r.h.w.plan.cell
	for i := range r.want {
		c := r.cell + uint64(i)
		got, err := stamp(r.Buf[uint64(i)*cell*SectorSize:][:cell*SectorSize], r.h.w.sectorOf(c))
		if err != nil {
			return err
		}
		if got != r.want[i] && !r.h.m.mayBe(c, got, r.acked) {
			return fmt.Errorf("cell %d reads as write %d, want %d or what was in flight", c, got, r.want[i])
		}
	}
	return nil
}

// write submits a write, a discard or write-zeroes. A large one is atomic only
// up to a record: the model has it as several.
func (h *simHost) write(cell, cells uint64, op Op, fua bool) {
	w := h.w
	r := &simRequest{first: len(h.m.history), cell: cell}
	r.Op, r.FUA, r.Sector, r.Sectors = op, fua, w.sectorOf(cell), uint32(cells*w.plan.cell)
	part := cells
	if op == Write {
		part = writelog.MaxData / SectorSize / w.plan.cell
		r.Buf = uring.AlignedBuffer(int(cells * w.plan.cell * SectorSize))
	}
	for at := uint64(0); at < cells; at += part {
		n := min(part, cells-at)
		r.last = h.m.add(modelWrite{n: w.nextWrite, cell: cell + at, cells: n, zero: op != Write})
		if op == Write {
			from, to := at*w.plan.cell*SectorSize, (at+n)*w.plan.cell*SectorSize
			fill(r.Buf[from:to], w.nextWrite, w.sectorOf(cell+at))
		}
		w.nextWrite++
	}
	h.submit(r)
}

// read submits a read.
func (h *simHost) read(cell, cells uint64) *simRequest {
	w := h.w
	r := &simRequest{cell: cell, want: slices.Clone(h.m.current[cell : cell+cells])}
	r.Op, r.Sector, r.Sectors = Read, w.sectorOf(cell), uint32(cells*w.plan.cell)
	r.Buf = uring.AlignedBuffer(int(cells * w.plan.cell * SectorSize))
	for i := 0; i < len(r.Buf); i += SectorSize {
		r.Buf[i] = 0xee // a sector that is not filled must show
	}
	h.submit(r)
	return r
}

func (h *simHost) flush() *simRequest {
	r := &simRequest{}
	r.Op = Flush
	h.submit(r)
	return r
}

// destage asks for everything to be put in the store.
func (h *simHost) destage() {
	m, n := h.m, h.m.acked
	if len(h.out) > 0 {
		return // what waits for room would not be in it
	}
	h.im.Destage(func(err error) {
		if err != nil {
			return // it is not promised then
		}
		m.stored = max(m.stored, n)
		if err := m.promised(n, "a destage was acknowledged"); err != nil {
			h.w.fail("%s: %v", h.name, err)
		}
	})
}

// unread is what readAll returns for what could not be read.
const unread = math.MaxUint64

// readAll reads the whole image and returns the content of each cell. The image
// must be quiet.
func (h *simHost) readAll(id string) []uint64 {
	w := h.w
	got := make([]uint64, w.cells())
	cell := w.plan.cell
	for c := uint64(0); c < w.cells(); {
		first := c
		n := w.cellsFrom(c, 2048/cell)
		c += n
		if w.sectorOf(first) >= h.im.Sectors() {
			continue // it is smaller: that is as if it read as zeroes
		}
		n = min(n, (h.im.Sectors()-w.sectorOf(first))/cell)
		ended := false
		r := &Request{Op: Read, Sector: w.sectorOf(first), Sectors: uint32(n * cell), Buf: uring.AlignedBuffer(int(n) * int(cell) * SectorSize)}
		r.Done = doneFunc(func(r *Request) {
			ended = true
			if r.Err == syscall.EIO && h.readOnly && h.snapshot == uuid.Nil {
				for i := range n {
					got[first+i] = unread
				}
				return
			}
			if r.Err != 0 {
				w.fail("%s: read after recovery of %s: %v", h.name, id, r.Err)
			}
			for i := range n {
				v, err := stamp(r.Buf[i*cell*SectorSize:][:cell*SectorSize], w.sectorOf(first+i))
				if err != nil {
					w.fail("%s: %s: %v", h.name, id, err)
				}
				got[first+i] = v
			}
		})
		h.im.Submit(r)
		w.until(h, func() bool { return ended }, "reads after recovery")
	}
	return got
}

type doneFunc func(*Request)

func (f doneFunc) RequestDone(r *Request) { f(r) }

// close detaches the image in an orderly way.
func (h *simHost) close() {
	w := h.w
	closed := false
	h.im.Close(func(err error) {
		if err != nil {
			w.fail("%s: close: %v", h.name, err)
		}
		closed = true
	})
	w.until(h, func() bool { return closed && h.im.Quiet() && h.env.idle() }, "detach")
	w.count(countLeftOut, h.im.checkpoint.leftOut != nil)
	r := &Request{Op: Write, Sectors: 8, Buf: uring.AlignedBuffer(4096)}
	r.Done = doneFunc(func(*Request) {})
	if h.im.Submit(r); r.Err != syscall.EIO {
		w.fail("a write after Close: %v, want EIO", r.Err)
	}
	h.im = nil
	if w.rng.IntN(2) == 0 { // else the same process may open the image again
		h.endCache(true)
	}
}

// names reports whether an error is one line that names what it is about.
func names(err error, what string) bool {
	return strings.Contains(err.Error(), what) && !strings.Contains(err.Error(), "\n")
}
