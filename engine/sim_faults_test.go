package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// simPlan says what one seed's world is like. Every kind of fault is there in
// some worlds and not in others, so that none hides behind another.
type simPlan struct {
	cell       uint64 // sectors in a block of the image
	large      float64
	trims      float64
	config     Config
	lease      time.Duration
	memory     int // bytes of the log's memory
	stormy     bool
	before     float64 // chance that an operation on the store fails and does nothing,
	after      float64 // that it takes effect and its answer is lost,
	late       float64 // that it takes effect after its answer was given up,
	corrupt    float64 // that a bit of what it reads is flipped, or the end missing
	slow       float64 // that a job of a worker waits, and its result again
	ssdRead    float64 // that a read of the SSD fails
	ssdFlip    float64 // that a bit of what is read of it is flipped
	openIO     float64 // that an I/O of the SSD fails while an image is being opened
	dieOpen    float64 // that a process dies while it opens the image
	skew       int64   // greatest rate error of a host's clock, in parts of 1024
	spaceRatio float64
	mapMemory  int64
	copiesPart int64 // of it, for copies of a checkpoint: in half of the worlds only one
	deltaFrom  int   // in two of three worlds there are deltas of any segment
	// destageMemory is Limits.Destage, readMemory Limits.Reads.
	destageMemory, readMemory int64
	cache                     simCachePlan

	phases   int
	steps    int
	reissues bool
	// quick: all writes have one size, so that records of before a crash lie where
	// those of after it will; crashes follow one another, or come when all is in the
	// store; the image comes to rest.
	quick bool
	// extras are troubles that only some worlds have.
	extras simExtras
}

// newPlan draws a plan.
func newPlan(rng *rand.Rand) simPlan {
	some := func(odds int, p float64) float64 {
		if rng.IntN(odds) > 0 {
			return 0
		}
		return p * (0.2 + 0.8*rng.Float64())
	}
	p := simPlan{
		cell: 8, lease: 20 * time.Second, memory: (1 + rng.IntN(2)) * writelog.SegmentSize,
		before: some(2, 0.1), after: some(2, 0.1), late: some(3, 0.05), corrupt: some(4, 0.02), slow: some(2, 0.2),
		ssdRead: some(4, 0.05), ssdFlip: some(4, 0.1), openIO: some(4, 0.02), dieOpen: some(2, 0.7), skew: 30,
		trims: 0.02 + some(3, 0.3), large: some(6, 0.1), phases: 2 + rng.IntN(4), steps: 150 + rng.IntN(500), reissues: rng.IntN(2) == 0,
	}
	if rng.IntN(2) == 0 {
		p.cell = 1
	}
	if rng.IntN(12) == 0 {
		p.stormy, p.phases, p.steps = true, 2, min(p.steps, 250) // enough data to fill the log and to go around it
	}
	p.spaceRatio = []float64{1.05, 1.3, 2}[rng.IntN(3)]
	p.mapMemory = []int64{1 << 10, 64 << 10, 1 << 20}[rng.IntN(3)]
	p.deltaFrom = []int{1, 1, deltaFrom}[p.steps%3]
	p.copiesPart = []int64{copiesPart, 1 << 40}[p.steps%2]
	p.destageMemory = []int64{1, 4 * MinObjectSize, 0}[p.steps%3]
	p.readMemory = []int64{1, 64 << 10, 0}[p.steps/3%3]
	p.config = Config{
		BatchAge: time.Duration(1+rng.IntN(5)) * time.Second, CheckpointEvery: 1 + rng.IntN(12), SpaceRatio: p.spaceRatio, LogDepth: 1 + rng.IntN(8),
		StoreTimeout: time.Hour, // of the real clock: the simulation loses answers by itself
		Logger:       quiet,
	}
	if p.stormy || rng.IntN(2) == 0 {
		p.config.PaceFrom = 1 // so that the log does become full
	}
	p.cache = simCachePlan{
		on: rng.IntN(3) > 0, ring: rng.IntN(4) > 0, blocks: 4 + rng.IntN(32),
		fail: some(3, 0.1), flip: some(3, 0.1), damage: some(3, 0.5), die: some(3, 0.02),
	}
	if *simLog {
		p.config.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	if rng.IntN(3) == 0 {
		p.config.ReadTimeout = time.Duration(1+rng.IntN(20)) * time.Second
	}
	return p
}

// simFaults are the faults of one host. The zero value has none.
type simFaults struct {
	on      bool   // those of the plan
	outage  bool   // the store does not answer
	full    bool   // the store takes no data objects
	refused string // the store refuses for good what keys with this in them are for
	stuck   *simStuck
	// The next write or sync of the SSD fails.
	failWrite, failSync bool
	cache               bool // the disk of the read cache fails
}

// inject decides what happens to an operation of h on the store.
func (h *simHost) inject(op faultstore.Op) faultstore.Fault {
	x, p, w := &h.faults, &h.w.plan, h.w
	read := op.Method == faultstore.Get || op.Method == faultstore.Load
	fail := func(f faultstore.Fault) faultstore.Fault {
		h.injected++
		if read && p.config.ReadTimeout > 0 {
			h.badReads = true
		}
		return f
	}
	switch {
	case h.taking && strings.HasSuffix(op.Key, "/super"): // it is not to find that it has been asked to let go
		return faultstore.Fault{Before: backend.ErrTemporary}
	case x.outage, x.full && op.Method == faultstore.Put && strings.Contains(op.Key, "/d/"):
		return fail(faultstore.Fault{Before: backend.ErrTemporary})
	case x.refused != "" && strings.Contains(op.Key, x.refused):
		if op.Method == faultstore.Delete {
			w.strays[op.Key] = true
		}
		h.badReads = h.badReads || read
		return fail(faultstore.Fault{Before: backend.ErrPermanent})
	case x.stuck.hits(op.Method, op.Key) && x.stuck.lost != nil && strings.Contains(op.Key, "/m/"):
		h.badReads = h.badReads || read
		return fail(faultstore.Fault{Before: x.stuck.lost})
	case x.stuck.hits(op.Method, op.Key):
		return fail(faultstore.Fault{Before: backend.ErrTemporary})
	case !x.on:
		return faultstore.Fault{}
	}
	r, corrupt := w.rng.Float64(), p.corrupt
	damage := w.corrupt
	if h.opening && strings.Contains(op.Key, "/d/") {
		corrupt, damage = 20*corrupt, w.corruptHeader // few reads matter more than these
	}
	for _, f := range []struct {
		chance float64
		ok     bool
		fault  func() faultstore.Fault
	}{
		{p.before, true, func() faultstore.Fault { return faultstore.Fault{Before: backend.ErrTemporary} }},
		{p.after, true, func() faultstore.Fault { return faultstore.Fault{After: backend.ErrTemporary} }},
		{p.late, faultstore.Writes(op), func() faultstore.Fault {
			return faultstore.Fault{Late: func(effect func()) { w.late = append(w.late, effect) }}
		}},
		{corrupt, read, func() faultstore.Fault {
			w.count(countCorrupt, true)
			h.badReads = true
			return faultstore.Fault{Corrupt: damage}
		}},
	} {
		if r < f.chance && f.ok {
			return fail(f.fault())
		}
		r -= f.chance
	}
	if p.extras.hang > 0 && w.rng.Float64() < p.extras.hang {
		return fail(h.hang(op))
	}
	return faultstore.Fault{}
}

// hang is an operation that is not answered until its context ends. A change may take
// effect all the same, at once or later.
func (h *simHost) hang(op faultstore.Op) faultstore.Fault {
	w := h.w
	w.count(countHangs, true)
	h.hung = w.plan.extras.timeout
	switch k := w.rng.IntN(3); {
	case k == 0 && faultstore.Writes(op):
		return faultstore.Fault{Late: func(effect func()) { w.late = append(w.late, effect) }}
	case k == 1:
		return faultstore.Fault{After: context.DeadlineExceeded}
	}
	return faultstore.Fault{Before: context.DeadlineExceeded}
}

// corruptHeader damages the beginning of what an operation of the store has read.
func (w *world) corruptHeader(b []byte) int {
	faultstore.FlipBit(w.rng.IntN(8 * 256))(b)
	return len(b)
}

// corrupt damages what an operation of the store has read.
func (w *world) corrupt(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	if w.rng.IntN(4) == 0 {
		return w.rng.IntN(len(b))
	}
	n := len(b)
	if w.rng.IntN(2) == 0 {
		n = min(n, 512) // where the headers are
	}
	return faultstore.FlipBit(w.rng.IntN(8 * n))(b)
}

// ssdFails says which operations of the SSD of h fail.
func (h *simHost) ssdFails(op simdisk.Op) bool {
	x, p, rng := &h.faults, &h.w.plan, h.w.rng
	h.w.note("ssd", uint64(op.Kind), uint64(op.Off), uint64(op.Len))
	fails := false
	switch {
	case h.opening:
		fails = x.on && rng.Float64() < p.openIO
	case op.Kind == simdisk.Read:
		fails = x.on && rng.Float64() < p.ssdRead
		h.badReads = h.badReads || fails
	case op.Kind == simdisk.Write && x.failWrite, op.Kind == simdisk.Sync && x.failSync:
		x.failWrite, x.failSync = false, false
		h.broken, fails = true, true
	}
	if fails {
		h.injected++
	}
	return fails
}

// ssdFlips flips bits of what h reads of its SSD. While an image is being opened it
// does not: a record that does not read is the end of the log then.
func (h *simHost) ssdFlips(_ simdisk.Op, p []byte) {
	if w := h.w; h.faults.on && !h.opening && w.rng.Float64() < w.plan.ssdFlip {
		w.count(countFlips, true)
		h.badReads = true
		faultstore.FlipBit(w.rng.IntN(8 * len(p)))(p)
	}
}

// simCrash is what a process of a host dies of.
type simCrash struct{ h *simHost }

// io is called before and after each I/O of a process that may die at any.
func (h *simHost) io() {
	if h.ioLeft > 0 {
		if h.ioLeft--; h.ioLeft == 0 {
			panic(simCrash{h})
		}
	}
}

// guarded runs fn and reports whether the process of h has died in it.
func (h *simHost) guarded(fn func()) (died bool) {
	defer func() {
		if p := recover(); p != nil {
			if c, ok := p.(simCrash); !ok || c.h != h {
				panic(p)
			}
			died = true
		}
	}()
	fn()
	return false
}

// simFile is the blocking view of a host's SSD.
type simFile struct {
	*simdisk.Disk
	h *simHost
}

func (f simFile) ReadAt(p []byte, off int64) (n int, err error) {
	f.h.io()
	n, err = f.Disk.ReadAt(p, off)
	f.h.io()
	return n, err
}

func (f simFile) WriteAt(p []byte, off int64) (n int, err error) {
	f.h.io()
	n, err = f.Disk.WriteAt(p, off)
	f.h.io()
	return n, err
}

func (f simFile) Sync() error {
	f.h.io()
	err := f.Disk.Sync()
	f.h.io()
	return err
}

// Buffer returns memory for blocking I/O. The whole segments that recovery reads
// all get the same memory: nothing keeps it, and clearing it takes longer than
// all else.
func (f simFile) Buffer(n int) []byte {
	if n != writelog.SegmentSize {
		return make([]byte, n)
	}
	m := f.h.w.memory
	if m.scratch == nil {
		m.scratch = make([]byte, n)
	}
	return m.scratch
}

// simStore is the store as a process of a host sees it: a process may die before
// or after each operation, and others run meanwhile.
type simStore struct {
	backend.Store // with the host's faults
	h             *simHost
}

func (s *simStore) run(method, key string, n int, call func() error) error {
	h, w := s.h, s.h.w
	h.io()
	w.elsewhere(h)
	err := call()
	if h.hung > 0 {
		err = fmt.Errorf("%s %s: %w", method, key, context.DeadlineExceeded)
		if h.opening {
			h.Sleep(context.Background(), h.takeHung())
		}
	}
	name := key[min(len(key), len(uuid.Nil.String())):]
	if *simLog {
		fmt.Fprintln(os.Stderr, h.name, method, name, n, err)
	}
	w.note(method, hashString(name), uint64(n), class(err))
	h.io()
	if h.yield != nil && h.opening {
		w.stopRival(h)
	}
	return err
}

// class returns a number for the class of a store's error.
func class(err error) uint64 {
	for i, c := range []error{nil, backend.ErrNotFound, backend.ErrExists, backend.ErrConflict, backend.ErrTemporary, backend.ErrPermanent} {
		if errors.Is(err, c) {
			return uint64(i)
		}
	}
	return 99
}

func (s *simStore) Put(ctx context.Context, key string, data []byte) error {
	return s.run("put", key, len(data), func() error { return s.Store.Put(ctx, key, data) })
}

func (s *simStore) Get(ctx context.Context, key string, p []byte, off int64) (n int, err error) {
	err = s.run("get", key, len(p), func() error { n, err = s.Store.Get(ctx, key, p, off); return err })
	return n, err
}

func (s *simStore) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	return s.run("get", key, backend.SizeOf(ranges), func() error { return backend.GetOnce(ctx, s.Store, key, ranges) })
}

func (s *simStore) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	err = s.run("stat", key, 0, func() error { info, err = s.Store.Stat(ctx, key); return err })
	return info, err
}

func (s *simStore) Delete(ctx context.Context, key string) error {
	return s.run("delete", key, 0, func() error { return s.Store.Delete(ctx, key) })
}

func (s *simStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	return s.run("list", prefix, 0, func() error { return s.Store.List(ctx, prefix, fn) })
}

func (s *simStore) Load(ctx context.Context, key string) (b []byte, v backend.Version, err error) {
	err = s.run("load", key, 0, func() error { b, v, err = s.Store.Load(ctx, key); return err })
	return b, v, err
}

func (s *simStore) Swap(ctx context.Context, key string, old backend.Version, data []byte) (v backend.Version, err error) {
	err = s.run("swap", key, len(data), func() error { v, err = s.Store.Swap(ctx, key, old, data); return err })
	return v, err
}

// witness sees what really happens to the store.
type witness struct {
	*mem.Store
	h *simHost
}

// Put notes the objects that arrive when nobody waits for them any more.
func (s witness) Put(ctx context.Context, key string, data []byte) error {
	err := s.Store.Put(ctx, key, data)
	if err == nil && s.h.w.effectIsLate {
		s.h.w.strays[key] = true
	}
	return err
}

// Swap notes when an image gets another owner.
func (s witness) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	v, err := s.Store.Swap(ctx, key, old, data)
	if w := s.h.w; err == nil && key == SuperblockKey(w.id) {
		sb, err := decodeSuperblock(data, w.id)
		if err != nil {
			w.fail("a superblock was written that does not decode: %v", err)
		}
		if sb.Epoch > w.epoch {
			w.epoch = sb.Epoch
			for _, o := range w.hosts {
				if o != s.h && o.m != nil {
					o.m.lost = true
				}
			}
		}
	}
	return v, err
}
