// Package faultstore wraps any store in one that fails on demand, for tests.
//
// What fails, when and how are values that compose:
//
//	outage := faultstore.NewSwitch()
//	s := faultstore.New(inner,
//		// The store goes away while the switch is on.
//		faultstore.If(outage.On, faultstore.Fault{Before: backend.ErrTemporary}),
//		// Every third put or so takes effect, but nobody hears of it.
//		faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), faultstore.Chance(seed, 0.3)),
//			faultstore.Fault{After: backend.ErrTemporary}),
//		// The first read of one object has a flipped bit.
//		faultstore.If(faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key("*/data/7"), faultstore.First(1)),
//			faultstore.Fault{Corrupt: faultstore.FlipBit(1000)}),
//	)
//
// Faults are decided when a call begins, in the order of the calls: with one
// caller at a time, or callers ordered by the test, they depend on the seed
// alone.
package faultstore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// The names of the methods of a Store, as an Op has them.
const (
	Put    = "put"
	Get    = "get"
	Stat   = "stat"
	Delete = "delete"
	List   = "list"
	Load   = "load"
	Swap   = "swap"
)

// An Op is one call of a method of the store.
type Op struct {
	Method string // one of the constants above
	Key    string // for List the prefix
	Off    int64  // for Get; of the first range
	Len    int    // of the data for Put and Swap, or of the buffers for Get

	data *[]byte // of Put and Swap
}

// A Fault says what happens to one call. The zero Fault is none. Its parts
// happen in the order of the fields.
type Fault struct {
	// Delay is how long the call waits at first.
	Delay time.Duration
	// Gate, if not nil, holds the call while it is shut.
	Gate *Gate
	// Before, if not nil, fails the call, which has no effect.
	Before error
	// Late, if not nil, gets what a Put, Delete or Swap would have done, to do it
	// whenever it likes, or never; the call fails with ErrTemporary at once.
	Late func(effect func())
	// After, if not nil, fails the call after it took effect, if it did.
	After error
	// Corrupt, if not nil, changes what Get or Load read, in place, and returns
	// how many bytes of it are left.
	Corrupt func(data []byte) int
}

// An Injector decides which fault, if any, happens to a call. It may be called
// from any goroutine, one at a time for each Store.
type Injector func(Op) Fault

// A Cond says whether a call is one that something happens to. It may be
// called from any goroutine, one at a time for each Store.
type Cond func(Op) bool

// If returns an Injector that gives every call for which cond is true the
// fault f.
func If(cond Cond, f Fault) Injector {
	return func(op Op) Fault {
		if cond(op) {
			return f
		}
		return Fault{}
	}
}

// Method is true for calls of any of the methods.
func Method(methods ...string) Cond {
	return func(op Op) bool { return slices.Contains(methods, op.Method) }
}

// Writes is true for calls that change something.
func Writes(op Op) bool {
	return op.Method == Put || op.Method == Delete || op.Method == Swap
}

// Any is true for all calls.
func Any(Op) bool { return true }

// Key is true for calls for a key that path.Match matches with pattern. It
// panics if the pattern is malformed.
func Key(pattern string) Cond {
	if _, err := path.Match(pattern, ""); err != nil {
		panic("faultstore: bad pattern " + pattern)
	}
	return func(op Op) bool {
		ok, _ := path.Match(pattern, op.Key)
		return ok
	}
}

// All is true when all conds are. It asks them in order, up to the first that
// is false: so First counts only the calls that those before it let through.
func All(conds ...Cond) Cond {
	return func(op Op) bool {
		for _, c := range conds {
			if !c(op) {
				return false
			}
		}
		return true
	}
}

// Not is true when cond is not.
func Not(cond Cond) Cond {
	return func(op Op) bool { return !cond(op) }
}

// First is true for the first n calls that it is asked for.
func First(n int) Cond {
	return func(Op) bool { n--; return n >= 0 }
}

// AfterFirst is true for all but the first n calls that it is asked for.
func AfterFirst(n int) Cond {
	return Not(First(n))
}

// Chance is true with probability p, from a generator of its own.
func Chance(seed uint64, p float64) Cond {
	rng := rand.New(rand.NewPCG(seed, 0))
	return func(Op) bool { return rng.Float64() < p }
}

// FlipBit returns a Corrupt function that flips one bit; it counts bits from
// the start, and over again if there are not as many.
func FlipBit(bit int) func([]byte) int {
	return func(p []byte) int {
		if len(p) > 0 {
			p[bit/8%len(p)] ^= 1 << (bit % 8)
		}
		return len(p)
	}
}

// Truncate returns a Corrupt function that leaves at most n bytes.
func Truncate(n int) func([]byte) int {
	return func(p []byte) int { return min(n, len(p)) }
}

// A Switch is off until it is turned on; its methods may be called from any
// goroutine.
type Switch struct{ on atomic.Bool }

// NewSwitch returns a switch that is off.
func NewSwitch() *Switch { return new(Switch) }

// Set turns the switch on or off.
func (s *Switch) Set(on bool) { s.on.Store(on) }

// On is a Cond.
func (s *Switch) On(Op) bool { return s.on.Load() }

// A Gate holds up calls while it is shut. Its methods may be called from any
// goroutine.
type Gate struct {
	mu      sync.Mutex
	open    chan struct{} // guarded by mu; closed when the gate is open
	waiting int           // guarded by mu
	changed chan struct{} // guarded by mu; closed when waiting changes
}

// NewGate returns a gate that is shut.
func NewGate() *Gate {
	return &Gate{open: make(chan struct{}), changed: make(chan struct{})}
}

// Open lets through all calls that wait and all to come.
func (g *Gate) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.open:
	default:
		close(g.open)
	}
}

// Shut holds up calls from now on.
func (g *Gate) Shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.open:
		g.open = make(chan struct{})
	default:
	}
}

// AwaitWaiting returns when at least n calls wait at the gate, or ctx ends.
func (g *Gate) AwaitWaiting(ctx context.Context, n int) error {
	for {
		g.mu.Lock()
		waiting, changed := g.waiting, g.changed
		g.mu.Unlock()
		if waiting >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *Gate) pass(ctx context.Context) error {
	open := g.arrive(1)
	defer g.arrive(-1)
	select {
	case <-open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *Gate) arrive(n int) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting += n
	close(g.changed)
	g.changed = make(chan struct{})
	return g.open
}

// A Store passes calls on to another store, with faults.
type Store struct {
	store backend.Store

	mu        sync.Mutex
	injectors []Injector // guarded by mu
}

var (
	_ backend.Store       = (*Store)(nil)
	_ backend.RangeGetter = (*Store)(nil)
)

// New returns a store that passes calls on to s. When several injectors have a
// fault for a call, the delays add up, and of the other parts the first that
// is set counts. Closing it closes s.
func New(s backend.Store, injectors ...Injector) *Store {
	return &Store{store: s, injectors: injectors}
}

// Inject replaces the injectors, for calls that begin from now on.
func (s *Store) Inject(injectors ...Injector) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.injectors = injectors
}

func (s *Store) fault(op Op) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	var f Fault
	for _, inject := range s.injectors {
		g := inject(op)
		f.Delay += g.Delay
		if f.Gate == nil {
			f.Gate = g.Gate
		}
		if f.Before == nil {
			f.Before = g.Before
		}
		if f.Late == nil {
			f.Late = g.Late
		}
		if f.After == nil {
			f.After = g.After
		}
		if f.Corrupt == nil {
			f.Corrupt = g.Corrupt
		}
	}
	return f
}

// run calls call, which returns the bytes that it read if that is what it is
// for, with what faults op has, and returns how many of the bytes are left.
func (s *Store) run(ctx context.Context, op Op, call func(context.Context) ([]byte, error)) (int, error) {
	f := s.fault(op)
	if err := f.hold(ctx); err != nil {
		return 0, fmt.Errorf("%s %s: %w", op.Method, op.Key, err)
	}
	if f.Before != nil {
		return 0, op.fail(f.Before)
	}
	if f.Late != nil && Writes(op) {
		ctx := context.WithoutCancel(ctx)
		if op.data != nil {
			*op.data = slices.Clone(*op.data) // the caller's is good only until this returns
		}
		f.Late(func() { _, _ = call(ctx) })
		return 0, op.fail(backend.ErrTemporary)
	}
	p, err := call(ctx)
	if err != nil {
		return 0, err
	}
	if f.After != nil {
		return 0, op.fail(f.After)
	}
	if f.Corrupt != nil {
		return f.Corrupt(p), nil
	}
	return len(p), nil
}

// hold waits as long as f says.
func (f *Fault) hold(ctx context.Context) error {
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if f.Gate != nil {
		return f.Gate.pass(ctx)
	}
	return nil
}

func (op Op) fail(err error) error {
	return fmt.Errorf("%s %s: injected: %w", op.Method, op.Key, err)
}

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, data []byte) error {
	_, err := s.run(ctx, Op{Method: Put, Key: key, Len: len(data), data: &data}, func(ctx context.Context) ([]byte, error) {
		return nil, s.store.Put(ctx, key, data)
	})
	return err
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	return s.run(ctx, Op{Method: Get, Key: key, Off: off, Len: len(p)}, func(ctx context.Context) ([]byte, error) {
		n, err := s.store.Get(ctx, key, p, off)
		return p[:n], err
	})
}

// GetRanges implements backend.RangeGetter. It is one Get, of the bytes of all ranges one after
// the other.
func (s *Store) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	if err := backend.CheckRanges(key, ranges); err != nil {
		return &backend.Error{Op: Get, Class: backend.ErrPermanent, Cause: err}
	}
	op := Op{Method: Get, Key: key, Off: ranges[0].Off, Len: backend.SizeOf(ranges)}
	var all []byte
	n, err := s.run(ctx, op, func(ctx context.Context) ([]byte, error) {
		if err := backend.GetOnce(ctx, s.store, key, ranges); err != nil {
			return nil, err
		}
		for _, r := range ranges {
			all = append(all, r.P[:r.N]...)
		}
		return all, nil
	})
	if err != nil {
		return err
	}
	left := all[:n]
	for i := range ranges {
		r := &ranges[i]
		r.N = copy(r.P[:r.N], left)
		left = left[r.N:]
	}
	return nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	_, err = s.run(ctx, Op{Method: Stat, Key: key}, func(ctx context.Context) ([]byte, error) {
		var err error
		info, err = s.store.Stat(ctx, key)
		return nil, err
	})
	return info, err
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	_, err := s.run(ctx, Op{Method: Delete, Key: key}, func(ctx context.Context) ([]byte, error) {
		return nil, s.store.Delete(ctx, key)
	})
	return err
}

// List implements backend.Store.
func (s *Store) List(ctx context.Context, prefix string, fn func(key string) error) error {
	_, err := s.run(ctx, Op{Method: List, Key: prefix}, func(ctx context.Context) ([]byte, error) {
		return nil, s.store.List(ctx, prefix, fn)
	})
	return err
}

// Load implements backend.Store.
func (s *Store) Load(ctx context.Context, key string) (data []byte, v backend.Version, err error) {
	n, err := s.run(ctx, Op{Method: Load, Key: key}, func(ctx context.Context) ([]byte, error) {
		var err error
		data, v, err = s.store.Load(ctx, key)
		return data, err
	})
	if err != nil {
		return nil, backend.NoVersion, err
	}
	return data[:n], v, nil
}

// Swap implements backend.Store.
func (s *Store) Swap(ctx context.Context, key string, old backend.Version, data []byte) (v backend.Version, err error) {
	_, err = s.run(ctx, Op{Method: Swap, Key: key, Len: len(data), data: &data}, func(ctx context.Context) ([]byte, error) {
		var err error
		v, err = s.store.Swap(ctx, key, old, data)
		return nil, err
	})
	if err != nil {
		return backend.NoVersion, err
	}
	return v, nil
}

// Close implements backend.Store. It has no faults.
func (s *Store) Close() error { return s.store.Close() }
