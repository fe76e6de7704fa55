package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sort"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

var (
	simSeeds = flag.Uint64("sim.seeds", defaultSeeds, "number of seeds of the crash simulation")
	simFirst = flag.Uint64("sim.first", 0, "first seed of the crash simulation")
)

// simEnv runs an image one step at a time, in an order that the seed chooses, on
// a clock that moves only when nothing else can.
type simEnv struct {
	rng    *rand.Rand
	now    time.Duration
	jobs   []simJob // not yet run
	done   []func() // run; the reactor has not been told
	timers []*simTimer
	disk   *simdisk.Disk
}

type simJob struct{ work, done func() }

type simTimer struct {
	env *simEnv
	at  time.Duration
	fn  func()
	set bool
}

func (t *simTimer) Stop() bool {
	was := t.set
	t.set = false
	return was
}

func (t *simTimer) Reset(d time.Duration) {
	t.at = t.env.now + max(d, 0)
	if !t.set {
		t.set = true
		if !slices.Contains(t.env.timers, t) {
			t.env.timers = append(t.env.timers, t)
		}
	}
}

func (e *simEnv) Now() time.Duration { return e.now }

func (e *simEnv) Spawn(work, done func()) { e.jobs = append(e.jobs, simJob{work, done}) }

func (e *simEnv) AfterFunc(d time.Duration, fn func()) Timer {
	t := &simTimer{env: e, fn: fn}
	t.Reset(d)
	return t
}

// step does one thing that can be done, and reports whether there was one.
func (e *simEnv) step() bool {
	kinds := []func() bool{e.disk.Step, e.runJob, e.tellDone}
	e.rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	if e.rng.IntN(50) == 0 {
		return e.fire()
	}
	for _, k := range kinds {
		if k() {
			return true
		}
	}
	return e.fire()
}

func (e *simEnv) runJob() bool {
	if len(e.jobs) == 0 {
		return false
	}
	i := e.rng.IntN(len(e.jobs))
	j := e.jobs[i]
	e.jobs = append(e.jobs[:i], e.jobs[i+1:]...)
	j.work()
	e.done = append(e.done, j.done)
	return true
}

func (e *simEnv) tellDone() bool {
	if len(e.done) == 0 {
		return false
	}
	fn := e.done[0]
	e.done = e.done[1:]
	fn()
	return true
}

// fire moves the clock to the next timer.
func (e *simEnv) fire() bool {
	set := e.timers[:0]
	for _, t := range e.timers {
		if t.set {
			set = append(set, t)
		}
	}
	e.timers = set
	if len(set) == 0 {
		return false
	}
	sort.SliceStable(set, func(i, j int) bool { return set[i].at < set[j].at })
	t := set[0]
	e.now = max(e.now, t.at)
	t.set = false
	t.fn()
	return true
}

// Sleep lets Open wait.
func (e *simEnv) Sleep(_ context.Context, d time.Duration) error {
	e.now += d
	return nil
}

// The image has four regions, each in a map segment of its own, so that
// checkpoints are written while their segments change.
const (
	simBlocks    = 1 << 14 // of 4 KiB: 64 MiB that are used, of an image of 1 GiB
	simRegion    = simBlocks / 4
	simBlockSize = 8 // sectors
	simSize      = 4 * segmentSectors * SectorSize
)

// sectorOf returns where a block is in the image.
func sectorOf(block uint64) uint64 {
	return block/simRegion*segmentSectors + block%simRegion*simBlockSize
}

// blockOf undoes sectorOf.
func blockOf(sector uint64) uint64 {
	return sector/segmentSectors*simRegion + sector%segmentSectors/simBlockSize
}

// within moves a run of n blocks so that it does not cross regions.
func within(block, n uint64) uint64 {
	return min(block, block/simRegion*simRegion+simRegion-n)
}

// world is the model and the real engine side by side.
type world struct {
	t      *testing.T
	rng    *rand.Rand
	inner  *mem.Store
	store  backend.Store
	outage *faultstore.Switch
	down   bool // outage is on
	id     uuid.UUID
	disk   *simdisk.Disk
	env    *simEnv
	im     *Image

	// The model: every write so far, in order, since the last crash was settled.
	base    []uint64 // content of each block before history: write number, 0 is zeroes
	history []modelWrite
	next    uint64 // number of the next write
	acked   int    // history[:acked] have completed, all of them
	durable int    // history[:durable] were covered by a flush that completed
	stored  int    // history[:stored] were in the store when Destage said so
	current []uint64
	pending map[uint64]int // block -> writes to it in flight
}

type modelWrite struct {
	n           uint64
	block       uint64
	blocks      uint64
	zero        bool
	fua, isDone bool
}

type simRequest struct {
	Request
	w       *world
	index   int // in history, of a write
	flushed int // of a flush: writes that had completed when it was submitted
	done    bool
	expect  [][]uint64
}

func (r *simRequest) RequestDone(req *Request) {
	w := r.w
	if r.done {
		w.t.Fatal("a request completed twice")
	}
	r.done = true
	if req.Err != 0 {
		w.t.Fatalf("request %+v failed: %v", req.Op, req.Err)
	}
	switch req.Op {
	case Flush:
		w.durable = max(w.durable, r.flushed)
	case Read:
		r.verify()
	default:
		h := &w.history[r.index]
		h.isDone = true
		for w.acked < len(w.history) && w.history[w.acked].isDone {
			w.acked++
		}
		if h.fua {
			w.durable = max(w.durable, r.index+1)
		}
		for b := h.block; b < h.block+h.blocks; b++ {
			w.pending[b]--
		}
	}
}

// verify checks a read: each block holds what it held when the read was
// submitted, or a write that was in flight then or has been submitted since.
func (r *simRequest) verify() {
	first := blockOf(r.Sector)
	for i := range uint64(r.Sectors) / simBlockSize {
		got := stamp(r.w.t, r.Buf[i*4096:][:4096])
		ok := got == r.w.current[first+i]
		for _, v := range r.expect[i] {
			ok = ok || got == v
		}
		for _, h := range r.w.history {
			ok = ok || h.block <= first+i && first+i < h.block+h.blocks && got == h.value() && !h.isDone
		}
		if !ok {
			r.w.t.Fatalf("block %d reads as write %d, want %d or %v", first+i, got, r.w.current[first+i], r.expect[i])
		}
	}
}

func (h *modelWrite) value() uint64 {
	if h.zero {
		return 0
	}
	return h.n
}

// fill stamps each sector of a block with a write's number.
func fill(p []byte, n, _ uint64) {
	copy(p, pattern[:])
	for i := 0; i < len(p); i += SectorSize {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
}

// pattern is what a stamped block holds beside the numbers.
var pattern = func() (p [4096]byte) {
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}()

// stamp returns the number of the write that a block holds.
func stamp(t *testing.T, p []byte) uint64 {
	t.Helper()
	n := binary.LittleEndian.Uint64(p)
	var want [4096]byte
	if n != 0 {
		fill(want[:], n, 0)
	}
	if !bytes.Equal(p, want[:]) {
		t.Fatalf("a block holds parts of different writes, the first is %d", n)
	}
	return n
}

func newWorld(t *testing.T, seed uint64) *world {
	rng := rand.New(rand.NewPCG(seed, 42))
	w := &world{t: t, rng: rng, inner: mem.New(), next: 1, base: make([]uint64, simBlocks), current: make([]uint64, simBlocks), pending: map[uint64]int{}}
	w.outage = faultstore.NewSwitch()
	p := 0.0
	if seed%3 > 0 {
		p = 0.05
	}
	w.store = faultstore.New(w.inner,
		faultstore.If(w.outage.On, faultstore.Fault{Before: backend.ErrTemporary}),
		faultstore.If(faultstore.All(faultstore.Writes, faultstore.Chance(seed, p)), faultstore.Fault{After: backend.ErrTemporary}),
		faultstore.If(faultstore.Chance(seed+1, p), faultstore.Fault{Before: backend.ErrTemporary}),
	)
	id, err := Create(context.Background(), w.inner, "disk", CreateOptions{Size: simSize, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	w.id = id
	w.newDisk()
	return w
}

func (w *world) newDisk() { w.disk = simdisk.New(writelog.MinSize, w.rng) }

// open opens the image as a new process does. Temporary errors of the store are
// tried again, as the daemon does.
func (w *world) open(force bool) {
	w.env = &simEnv{rng: w.rng, disk: w.disk}
	for try := 0; ; try++ {
		im, err := Open(context.Background(), w.store, w.id, OpenOptions{
			Log: w.disk, URL: "mem:/disk", Host: "sim", Force: force, Clock: w.env, Lease: 20 * time.Second, Parallel: 1,
			Config: Config{CheckpointEvery: 4, BatchAge: time.Second, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))},
		})
		if err == nil {
			w.im = im
			break
		}
		if !errors.Is(err, backend.ErrTemporary) || try > 100 {
			w.t.Fatalf("open: %v", err)
		}
	}
	w.im.Start(w.env, w.disk.Device(), make([]byte, 2*writelog.SegmentSize))
}

func (w *world) submit(r *simRequest) {
	r.w, r.Done = w, r
	w.im.Submit(&r.Request)
}

// doWrite submits a write, a discard or write-zeroes of up to 64 blocks.
func (w *world) doWrite() {
	h := modelWrite{n: w.next, blocks: 1 + w.rng.Uint64N(16), zero: w.rng.IntN(12) == 0, fua: w.rng.IntN(20) == 0}
	if w.rng.IntN(10) == 0 {
		h.blocks = 1 + w.rng.Uint64N(512) // up to 2 MiB: several records
	}
	h.block = w.rng.Uint64N(simBlocks - h.blocks)
	if w.rng.IntN(2) == 0 {
		h.block = w.rng.Uint64N(300) // hot
	}
	h.block = within(h.block, h.blocks)
	// A large write is atomic only up to a record: the model has it as several.
	for left := h.blocks; left > 0; {
		part := h
		part.blocks = min(left, writelog.MaxData/4096)
		part.block = h.block + h.blocks - left
		part.n = w.next
		w.next++
		left -= part.blocks
		w.write(part)
	}
}

func (w *world) write(h modelWrite) {
	r := &simRequest{index: len(w.history)}
	r.Sector, r.Sectors, r.FUA = sectorOf(h.block), uint32(h.blocks*simBlockSize), h.fua
	switch {
	case h.zero && h.fua:
		r.Op = WriteZeroes
	case h.zero:
		r.Op = Discard
	default:
		r.Op = Write
		r.Buf = make([]byte, h.blocks*4096)
		for i := range h.blocks {
			fill(r.Buf[i*4096:][:4096], h.n, h.block+i)
		}
	}
	w.history = append(w.history, h)
	for b := h.block; b < h.block+h.blocks; b++ {
		w.current[b] = h.value()
		w.pending[b]++
	}
	w.submit(r)
}

func (w *world) doRead() {
	n := 1 + w.rng.Uint64N(16)
	b := w.rng.Uint64N(simBlocks - n)
	if w.rng.IntN(2) == 0 {
		b = w.rng.Uint64N(300)
	}
	b = within(b, n)
	r := &simRequest{}
	r.Op, r.Sector, r.Sectors, r.Buf = Read, sectorOf(b), uint32(n*simBlockSize), make([]byte, n*4096)
	for i := range r.Buf {
		r.Buf[i] = 0xee // what is not filled must show
	}
	for i := range n {
		set := []uint64{w.current[b+i]}
		if w.pending[b+i] > 0 {
			set = append(set, w.candidates(b+i)...)
		}
		r.expect = append(r.expect, set)
	}
	w.submit(r)
}

// candidates are the values that a block may have while writes to it are in
// flight: that of any of them, and the one before.
func (w *world) candidates(b uint64) []uint64 {
	var set []uint64
	for i := len(w.history) - 1; i >= 0; i-- {
		h := &w.history[i]
		if h.block <= b && b < h.block+h.blocks {
			set = append(set, h.value())
			if h.isDone {
				return set
			}
		}
	}
	return append(set, w.base[b])
}

// run submits and steps for a while.
func (w *world) run(steps int) {
	for range steps {
		switch w.rng.IntN(12) {
		case 0, 1, 2:
			if w.im.blocked.n < 20 {
				w.doWrite()
			}
		case 3:
			w.doRead()
		case 4:
			if w.rng.IntN(8) == 0 {
				r := &simRequest{flushed: w.acked}
				r.Op = Flush
				w.submit(r)
			}
		case 5:
			if w.rng.IntN(100) == 0 {
				n := len(w.history)
				if w.im.blocked.n == 0 {
					w.im.Destage(func(err error) {
						if err != nil {
							w.t.Fatalf("destage: %v", err)
						}
						w.stored = max(w.stored, n)
					})
				}
			}
		case 6:
			if w.rng.IntN(200) == 0 {
				w.down = !w.down
				w.outage.Set(w.down)
			}
		}
		w.env.step()
		w.im.EndTurn()
	}
}

// settle runs until nothing is left to do but timers that only renew.
func (w *world) settle() {
	w.down = false
	w.outage.Set(false)
	for i := 0; ; i++ {
		busy := len(w.env.jobs)+len(w.env.done)+w.disk.InFlight() > 0 || w.im.acks.n+w.im.blocked.n+w.im.flushes.n > 0
		if !busy {
			return
		}
		if i > 1e5 {
			w.t.Fatalf("nothing moves: %s", fmt.Sprintf("%+v", w.im.Stats()))
		}
		w.env.step()
		w.im.EndTurn()
	}
}

// recovered reads the whole image after a crash and checks that it is the state
// after some number of writes, at least floor, in order; it becomes the base.
func (w *world) recovered(floor int, what string) {
	got := make([]uint64, simBlocks)
	const chunk = 256
	for b := uint64(0); b < simBlocks; b += chunk {
		buf := make([]byte, chunk*4096)
		ended := false
		r := &Request{Op: Read, Sector: sectorOf(b), Sectors: chunk * simBlockSize, Buf: buf}
		r.Done = doneFunc(func(r *Request) {
			if r.Err != 0 {
				w.t.Fatalf("%s: read after recovery: %v", what, r.Err)
			}
			ended = true
		})
		w.im.Submit(r)
		for !ended {
			w.env.step()
			w.im.EndTurn()
		}
		for i := range uint64(chunk) {
			got[b+i] = stamp(w.t, buf[i*4096:][:4096])
		}
	}
	want := append([]uint64(nil), w.base...)
	differ := 0
	for i := range want {
		if want[i] != got[i] {
			differ++
		}
	}
	best := -1
	if differ == 0 && floor == 0 {
		best = 0
	}
	for i := range w.history {
		h := &w.history[i]
		for b := h.block; b < h.block+h.blocks; b++ {
			if want[b] != got[b] {
				differ--
			}
			want[b] = h.value()
			if want[b] != got[b] {
				differ++
			}
		}
		if differ == 0 && i+1 >= floor {
			best = i + 1
		}
	}
	if best < 0 {
		w.t.Fatalf("%s: what was recovered is not the state after any %d or more of the %d writes (%d acknowledged, %d flushed, %d destaged)",
			what, floor, len(w.history), w.acked, w.durable, w.stored)
	}
	w.base, w.current = got, append([]uint64(nil), got...)
	w.history, w.acked, w.durable, w.stored = nil, 0, 0, 0
	w.pending = map[uint64]int{}
}

type doneFunc func(*Request)

func (f doneFunc) RequestDone(r *Request) { f(r) }

// crash ends the process in one of the ways of the failure table and opens the
// image again.
func (w *world) crash() {
	w.down = false
	w.outage.Set(false)
	kind := w.rng.IntN(4)
	if kind == 3 && w.stored == 0 {
		kind = 0 // what the last recovery found in the log may not be in the store
	}
	switch kind {
	case 0, 1:
		w.disk.Kill()
		w.open(false)
		w.recovered(w.acked, "daemon killed")
	case 2:
		w.disk.CutPower()
		w.open(false)
		w.recovered(w.durable, "power cut")
	default:
		w.newDisk()
		w.open(true)
		w.recovered(w.stored, "SSD lost")
	}
}

func TestSimulation(t *testing.T) {
	for seed := *simFirst; seed < *simFirst+*simSeeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, seed)
			w.open(false)
			for range 5 {
				w.run(300 + w.rng.IntN(2500))
				w.crash()
			}
			w.run(1000)
			w.detach()
		})
	}
}

// detach closes the image in an orderly way and opens it elsewhere.
func (w *world) detach() {
	w.settle()
	closed := false
	w.im.Close(func(err error) {
		if err != nil {
			w.t.Fatalf("close: %v", err)
		}
		closed = true
	})
	for i := 0; !closed; i++ {
		if i > 1e5 {
			w.t.Fatalf("it does not close: %s", fmt.Sprintf("%+v", w.im.Stats()))
		}
		w.env.step()
		w.im.EndTurn()
	}
	r := &Request{Op: Write, Sectors: 8, Buf: make([]byte, 4096)}
	r.Done = doneFunc(func(*Request) {})
	if w.im.Submit(r); r.Err != syscall.EIO {
		w.t.Fatalf("a write after Close: %v, want EIO", r.Err)
	}
	all := len(w.history)
	w.newDisk()
	w.open(false)
	w.recovered(all, "detached and attached elsewhere")
}
