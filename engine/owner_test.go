package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/file"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// host is one host of a test: a disk, an environment, and an image on it.
type host struct {
	t    testing.TB
	name string
	st   backend.Store
	env  *simEnv
	disk *simdisk.Disk
	im   *Image
	// memory is the log's own, and pool lends it more; may be nil.
	memory []byte
	pool   writelog.Pool
	// shared is what its image shares with others; may be nil.
	shared   *Shared
	volatile bool // its log is as one in memory
	// others run while this host waits in Open.
	others []*host
	// opening guards env.now in Now and Sleep, and the others' running: Open reads with
	// several goroutines.
	opening sync.Mutex
}

func newHost(t testing.TB, name string, st backend.Store, seed uint64) *host {
	rng := rand.New(rand.NewPCG(seed, 3))
	d := simdisk.New(writelog.MinSize, rng)
	return &host{t: t, name: name, st: st, disk: d, env: &simEnv{rng: rng, disk: d}}
}

// Now and Sleep let a host wait in Open while the others go on.
func (h *host) Now() time.Duration {
	h.opening.Lock()
	defer h.opening.Unlock()
	return h.env.now
}

func (h *host) Sleep(_ context.Context, d time.Duration) error {
	h.opening.Lock()
	defer h.opening.Unlock()
	h.env.now += d
	for _, o := range h.others {
		o.run(d)
	}
	return nil
}

// again gives the host another process.
func (h *host) again() {
	h.env = &simEnv{rng: h.env.rng, disk: h.disk, now: h.env.now}
}

// attached returns a host that has opened a new image, and the image's id. What it shares
// with other images may be nil.
func attached(t *testing.T, st backend.Store, o CreateOptions, shared *Shared) (*host, uuid.UUID) {
	t.Helper()
	return attachedAs(t, st, "alpha", "disk", 1, o, shared)
}

// attachedAs is attached with names of host and image, and a seed.
func attachedAs(t *testing.T, st backend.Store, name, image string, seed uint64, o CreateOptions, shared *Shared) (*host, uuid.UUID) {
	t.Helper()
	id, err := Create(t.Context(), st, image, o)
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, name, st, seed)
	h.shared = shared
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	return h, id
}

// mustReopen closes the image and opens it again in another process.
func (h *host) mustReopen(id uuid.UUID) {
	h.t.Helper()
	h.mustClose()
	h.again()
	if err := h.open(id, false); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) open(id uuid.UUID, force bool) error {
	im, err := Open(context.Background(), h.st, id, OpenOptions{
		Log: h.disk, URL: "mem:/disk", Host: h.name, Force: force, Volatile: h.volatile, Clock: h, Lease: 10 * time.Second,
		Config: Config{CheckpointEvery: 8, BatchAge: time.Hour, Logger: quiet, Shared: h.shared, LogPool: h.pool},
	})
	if err == nil {
		h.im = im
		h.memory = make([]byte, 2*writelog.SegmentSize)
		im.Start(h.env, h.disk.Device(), h.memory)
		h.run(0)
	}
	return err
}

// run lets the host do what it can in d of its time.
func (h *host) run(d time.Duration) {
	end := h.env.now + d
	for {
		h.im.EndTurn()
		if h.disk.Step() || h.env.runJob() || h.env.tellDone() {
			continue
		}
		if t := h.env.next(); t == nil || t.at > end {
			break
		}
		h.env.fire()
	}
	h.env.now = max(h.env.now, end)
}

// do runs one request to its end, or for as long as limit.
func (h *host) do(op Op, block uint64, n uint64, limit time.Duration) (errno syscall.Errno, ended bool, value uint64) {
	r := &Request{Op: op, Sector: block * 8, Sectors: 8, Buf: make([]byte, 4096)}
	if op == Write {
		fill(r.Buf, n, block*8)
	}
	if op == Flush {
		r.Sectors, r.Buf = 0, nil
	}
	r.Done = doneFunc(func(*Request) { ended = true })
	h.im.Submit(r)
	h.run(limit)
	if ended && op == Read && r.Err == 0 {
		var err error
		if value, err = stamp(r.Buf, block*8); err != nil {
			h.t.Fatal(err)
		}
	}
	return r.Err, ended, value
}

func (h *host) mustWrite(block, n uint64) {
	h.t.Helper()
	if err, ended, _ := h.do(Write, block, n, 0); err != 0 || !ended {
		h.t.Fatalf("%s: write %d: %v, ended %v", h.name, n, err, ended)
	}
}

func (h *host) mustRead(block, n uint64) {
	h.t.Helper()
	if err, ended, v := h.do(Read, block, 0, 0); err != 0 || !ended || v != n {
		h.t.Fatalf("%s: block %d reads as %d (%v, ended %v), want %d", h.name, block, v, err, ended, n)
	}
}

// awaitFenced runs the host until it knows that another one owns the image. A
// real store may take real time for its answers.
func (h *host) awaitFenced() {
	h.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		h.run(time.Minute)
		if h.im.state == Fenced {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s is %v, want fenced", h.name, h.im.state)
		}
	}
}

// mustBeAsked leaves the mark by which another host asks for the image.
func (h *host) mustBeAsked() {
	h.t.Helper()
	if _, _, err := changeSuperblock(context.Background(), h.st, h.im.id, func(sb *superblock) error {
		sb.Evict = &eviction{Epoch: sb.Epoch, By: "beta"}
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
}

// mustBeClean checks the image, of which nothing may be damaged or left behind.
func mustBeClean(t *testing.T, st backend.Store) {
	t.Helper()
	rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{Deep: true})
	if err != nil || !rep.Clean() || len(rep.Stale) > 0 {
		t.Errorf("check: %v, %+v", err, rep)
	}
}

// objectsOf returns how many objects of a kind, "d", "m" or "c", the store has of an image.
func objectsOf(t *testing.T, st backend.Store, id uuid.UUID, kind string) (n int) {
	t.Helper()
	if err := st.List(context.Background(), id.String()+"/"+kind+"/", func(string) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

// smallImage is an image of one segment of the map, with the smallest objects.
func smallImage() CreateOptions { return CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize} }

func newImageIn(t *testing.T, st backend.Store) uuid.UUID {
	t.Helper()
	id, err := Create(context.Background(), st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestSecondHostIsRefused(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	var owned *OwnedError
	if err := b.open(id, false); !errors.As(err, &owned) || owned.Host != "alpha" || !strings.Contains(err.Error(), "--force") {
		t.Fatalf("second attach: %v, want a refusal that names alpha and --force", err)
	}
	a.mustWrite(1, 7) // the first one does not notice
	a.mustRead(1, 7)
}

func TestForceEvictsLiveOwner(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 50; n++ {
		a.mustWrite(n, n)
	}
	b.others = []*host{a}
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 50; n++ {
		b.mustRead(n, n) // all that was acknowledged had been destaged
	}
	if s := a.im.Stats(); s.State != "released" || !strings.Contains(s.Why, "beta") {
		t.Errorf("the first host is %s because %q; want released because of beta", s.State, s.Why)
	}
	if err, ended, _ := a.do(Write, 1, 99, 0); !ended || err != syscall.EIO {
		t.Errorf("a write on the evicted host: %v, ended %v", err, ended)
	}
}

// storeKinds makes a new, empty store of each kind that needs nothing but this
// machine, and returns a function that opens it once more.
var storeKinds = map[string]func(t *testing.T) func() backend.Store{
	"mem": func(*testing.T) func() backend.Store {
		st := mem.New()
		return func() backend.Store { return st.Handle() }
	},
	"file": func(t *testing.T) func() backend.Store {
		dir := t.TempDir()
		return func() backend.Store {
			st, err := file.Create(context.Background(), dir)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { st.Close() })
			return st
		}
	},
}

// TestPausedHostIsFenced: a host that does not run while its lease passes, and
// then does, must not acknowledge what the new owner does not have, and must not
// put anything that the new owner takes for its own.
func TestPausedHostIsFenced(t *testing.T) {
	for kind, make := range storeKinds {
		t.Run(kind, func(t *testing.T) { pausedHostIsFenced(t, make(t)) })
	}
}

// pausedHostIsFenced is the test on one store, which open opens for each host.
func pausedHostIsFenced(t *testing.T, open func() backend.Store) {
	st := open()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", open(), 1), newHost(t, "beta", open(), 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	destaged := false
	a.im.Destage(func(error) { destaged = true })
	a.run(0)
	if !destaged {
		t.Fatal("not destaged")
	}
	a.mustWrite(2, 2)                        // acknowledged, never destaged: lost with the host
	if err := b.open(id, true); err != nil { // alpha is paused meanwhile
		t.Fatal(err)
	}
	b.mustRead(1, 1)
	b.mustRead(2, 0)
	b.mustWrite(3, 30)
	b.im.Destage(func(error) {})
	b.run(0)

	// Alpha wakes up: by its clock its lease is over as well.
	a.env.now += 11 * time.Second
	if _, ended, _ := a.do(Write, 4, 4, time.Minute); ended && a.im.state != Fenced {
		t.Error("alpha acknowledged a write after its lease had run out")
	}
	a.im.Destage(func(err error) {
		if err == nil {
			t.Error("alpha believes that it has destaged")
		}
	})
	a.awaitFenced()
	// Whatever alpha put, beta's image opens elsewhere without it.
	closed := false
	b.im.Close(func(err error) { closed = err == nil })
	b.run(time.Minute)
	if !closed {
		t.Fatal("beta cannot close")
	}
	c := newHost(t, "gamma", st, 3)
	if err := c.open(id, false); err != nil {
		t.Fatal(err)
	}
	for block, want := range map[uint64]uint64{1: 1, 2: 0, 3: 30, 4: 0} {
		c.mustRead(block, want)
	}
	// Alpha's log holds write 2: it is refused, not thrown away.
	var stale *StaleLogError
	c.im.Close(func(error) {})
	c.run(time.Minute)
	a2 := &host{t: t, name: "alpha", st: st, disk: a.disk, env: &simEnv{rng: a.env.rng, disk: a.disk}}
	if err := a2.open(id, false); !errors.As(err, &stale) || stale.Records == 0 {
		t.Errorf("alpha's old log: %v, want it refused as stale", err)
	}
	// And what it holds can be had.
	saved, err := Salvage(context.Background(), a.disk, st, id, st, "saved", nil)
	if err != nil {
		t.Fatal(err)
	}
	d := newHost(t, "delta", st, 4)
	if err := d.open(saved, false); err != nil {
		t.Fatal(err)
	}
	for block, want := range map[uint64]uint64{1: 1, 2: 2, 3: 0} {
		d.mustRead(block, want)
	}
}

// TestLeaseRunsOutDuringOutage: while the store is away and the lease over,
// nothing is acknowledged; when it returns, everything is, and nothing is lost.
func TestLeaseRunsOutDuringOutage(t *testing.T) {
	outage := faultstore.NewSwitch()
	st := faultstore.New(mem.New(), faultstore.If(outage.On, faultstore.Fault{Before: backend.ErrTemporary}))
	h := newHost(t, "alpha", st, 5)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	outage.Set(true)
	h.mustWrite(2, 2) // within the lease
	h.run(11 * time.Second)
	r := &Request{Op: Write, Sector: 24, Sectors: 8, Buf: make([]byte, 4096)}
	fill(r.Buf, 3, 24)
	ended := false
	r.Done = doneFunc(func(*Request) { ended = true })
	h.im.Submit(r)
	h.run(30 * time.Second)
	if ended {
		t.Fatal("a write was acknowledged although the lease had run out")
	}
	h.mustRead(2, 2) // reads of what is local go on
	outage.Set(false)
	h.run(30 * time.Second)
	if !ended || r.Err != 0 {
		t.Fatalf("the write after the outage: ended %v, %v", ended, r.Err)
	}
	for n := uint64(1); n <= 3; n++ {
		h.mustRead(n, n)
	}
}

// TestOwnerThatCannotDestageLetsGo: an owner that is asked for the image, and
// whose store takes renewals but no objects, does not keep it for ever, and
// acknowledges nothing once it has given up.
func TestOwnerThatCannotDestageLetsGo(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	full := faultstore.NewSwitch()
	noObjects := faultstore.All(full.On, faultstore.Method(faultstore.Put))
	a := newHost(t, "alpha", faultstore.New(inner, faultstore.If(noObjects, faultstore.Fault{Before: backend.ErrTemporary})), 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.im.Destage(func(error) {})
	a.run(0)
	full.Set(true)
	a.mustWrite(2, 2)
	b := newHost(t, "beta", inner, 2)
	b.others = []*host{a}
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	if b.env.now > time.Minute {
		t.Errorf("the taker waited for %v", b.env.now)
	}
	if a.im.state != Released {
		t.Errorf("the first host is %v, want released", a.im.state)
	}
	b.mustRead(1, 1)
	b.mustRead(2, 0)
	var stale *StaleLogError
	a2 := &host{t: t, name: "alpha", st: inner, disk: a.disk, env: &simEnv{rng: a.env.rng, disk: a.disk}}
	if err := a2.open(id, false); !errors.As(err, &stale) {
		t.Errorf("alpha's log, which has what no store has: %v, want it refused as stale", err)
	}
}

// TestDamagedAnswerDoesNotFence: an object of ours that is there already, and
// whose header comes back damaged, is not another writer's.
func TestDamagedAnswerDoesNotFence(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	st := faultstore.New(inner)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	object := faultstore.Key("*/d/*")
	st.Inject(
		faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), object, faultstore.First(1)), faultstore.Fault{After: backend.ErrTemporary}),
		faultstore.If(faultstore.All(faultstore.Method(faultstore.Get), object, faultstore.First(1)), faultstore.Fault{Corrupt: faultstore.FlipBit(300)}),
	)
	a.mustWrite(1, 1)
	destaged := false
	a.im.Destage(func(err error) { destaged = err == nil })
	a.run(time.Minute)
	if !destaged || a.im.state != Active {
		t.Errorf("destaged %v, the image is %v because %v", destaged, a.im.state, a.im.why)
	}
}

// TestEvictedWhileClosing: an owner that is closing, and can renew but not destage, gives
// the image up to one with --force as one that is active does, and says so.
func TestEvictedWhileClosing(t *testing.T) {
	st := faultstore.New(mem.New())
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key("*/d/*")), faultstore.Fault{Before: backend.ErrTemporary}))
	var told []error
	a.im.Close(func(err error) { told = append(told, err) })
	a.run(time.Minute)
	if a.im.state != Closing || len(told) > 0 {
		t.Fatalf("the image is %v: this tests nothing", a.im.state)
	}
	b := newHost(t, "beta", st, 2)
	b.others = []*host{a}
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	if a.im.state != Released || len(told) != 1 || told[0] == nil {
		t.Errorf("the image is %v, who closed it was told %v", a.im.state, told)
	}
	if b.env.now > time.Minute {
		t.Errorf("beta waited for %v", b.env.now)
	}
}

// TestEvictedWithAllStored: an evicted owner that has everything in the store, but whose
// checkpoint does not get there, or whose garbage does not go, lets go without the word
// that something is lost.
func TestEvictedWithAllStored(t *testing.T) {
	for _, what := range []struct{ method, key string }{{faultstore.Put, "*/c/*"}, {faultstore.Delete, "*"}} {
		st := faultstore.New(mem.New())
		id := newImageIn(t, st)
		a := newHost(t, "alpha", st, 1)
		if err := a.open(id, false); err != nil {
			t.Fatal(err)
		}
		gate := faultstore.NewSwitch()
		gate.Set(true)
		st.Inject(faultstore.If(faultstore.All(gate.On, faultstore.Method(what.method), faultstore.Key(what.key)), faultstore.Fault{Before: backend.ErrTemporary}))
		for n := range uint64(4) {
			a.mustWrite(1, n)
			a.mustDestage()
		}
		told := errors.New("not told")
		if what.method == faultstore.Put {
			a.im.Close(func(err error) { told = err })
		}
		b := newHost(t, "beta", st, 2)
		b.others = []*host{a}
		if err := b.open(id, true); err != nil {
			t.Fatal(err)
		}
		gate.Set(false)
		if n := len(b.im.super.sb.Points); a.im.state != Released || a.im.super.gaveUp || n > 0 {
			t.Errorf("%s of %s fails: alpha is %v, gave up %v, %d points", what.method, what.key, a.im.state, a.im.super.gaveUp, n)
		}
		if what.method == faultstore.Put && told != nil {
			t.Errorf("who had closed it was told %v", told)
		}
		b.mustRead(1, 3)
		b.run(5 * time.Minute)
		b.mustClose()
		mustBeClean(t, st)
	}
}

// TestFullStoreStaysDown: a store that takes changes of the superblock and no objects is
// down until it takes objects again.
func TestFullStoreStaysDown(t *testing.T) {
	for _, key := range []string{"*/d/*", "*/c/*"} {
		inner := mem.New()
		id := newImageIn(t, inner)
		full := faultstore.NewSwitch()
		a := newHost(t, "alpha", faultstore.New(inner, faultstore.If(faultstore.All(full.On, faultstore.Method(faultstore.Put), faultstore.Key(key)), faultstore.Fault{Before: backend.ErrTemporary})), 1)
		if err := a.open(id, false); err != nil {
			t.Fatal(err)
		}
		full.Set(true)
		a.mustWrite(1, 1)
		a.im.Destage(func(error) {})
		a.run(time.Second)
		a.im.checkpoint.now(func(error) {})
		before := a.im.super.sb.Owner.Renewal
		for range 60 {
			a.run(time.Second)
			if !a.im.stats.storeDown {
				t.Fatalf("%s: the store is said to work", key)
			}
		}
		if a.im.super.sb.Owner.Renewal < before+10 {
			t.Errorf("%s: the lease is not renewed: this tests nothing", key)
		}
		full.Set(false)
		a.run(time.Minute)
		a.mustWrite(1, 2)
		a.mustDestage()
		if a.im.stats.storeDown {
			t.Errorf("%s: the store is said to be down", key)
		}
	}
}

// TestReleaseWithCheckpoint: an owner that gives the image up may do so with the
// same change of the superblock that publishes a checkpoint, and ends there. Seed
// 234469 of the simulation found it.
func TestReleaseWithCheckpoint(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	st := faultstore.New(inner)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	refuse := func(method, key string) faultstore.Injector {
		return faultstore.If(faultstore.All(faultstore.Method(method), faultstore.Key(key)), faultstore.Fault{Before: backend.ErrTemporary})
	}
	a.mustWrite(1, 1)
	a.mustDestage()
	st.Inject(refuse(faultstore.Put, "*/c/*"))
	a.im.checkpoint.now(func(error) {})
	for n := range a.im.checkpoint.most() { // so that the next one is due
		a.mustWrite(1, n)
		a.mustDestage()
	}
	a.mustWrite(1, 100) // in the log only
	st.Inject(refuse(faultstore.Put, "*/d/*"), refuse(faultstore.Swap, "*/super"))
	a.run(time.Second)
	if r := a.im.checkpoint.running; r == nil || !r.final || len(a.im.super.changes) == 0 {
		t.Fatal("no checkpoint is about to be published: this tests nothing")
	}
	a.im.evict("beta")
	a.im.giveUp()
	st.Inject(refuse(faultstore.Put, "*/d/*"))
	a.run(time.Minute)
	if a.im.state != Released {
		t.Fatalf("the image is %v", a.im.state)
	}
	b := newHost(t, "beta", inner, 2)
	if err := b.open(id, false); err != nil {
		t.Fatal(err)
	}
	if b.im.checkpoint.last == nil {
		t.Error("the checkpoint was not published")
	}
	b.mustRead(1, a.im.checkpoint.most()-1)
}

func TestRemovedImageFences(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	var owned *OwnedError
	if _, err := Remove(context.Background(), st, "disk", RemoveOptions{URL: "mem:/disk"}); !errors.As(err, &owned) {
		t.Fatalf("rm of an attached image: %v", err)
	}
	a.mustWrite(1, 1)
	if err := removeWhole(st, "disk", RemoveOptions{URL: "mem:/disk", Force: true}); err != nil {
		t.Fatal(err)
	}
	a.run(time.Minute)
	if a.im.state != Fenced {
		t.Errorf("the owner of a removed image is %v", a.im.state)
	}
	mustCollectLater(t, st)
	left := 0
	st.List(context.Background(), id.String(), func(string) error { left++; return nil })
	if left != 0 {
		t.Errorf("%d objects are left of a removed image", left)
	}
}

func TestDamage(t *testing.T) {
	const objects = 3
	tests := []struct {
		name, key string
		damage    func(b []byte) []byte
		want      string
	}{
		{"superblock, one bit", "/super", func(b []byte) []byte { b[40] ^= 1; return b }, "superblock"},
		{"superblock, cut", "/super", func(b []byte) []byte { return b[:10] }, "superblock"},
		{"object's header, one bit", "/d/00000002.1", func(b []byte) []byte { b[50] ^= 1; return b }, "/d/00000002.1"},
		{"object, cut", "/d/00000002.1", func(b []byte) []byte { return b[:len(b)-512] }, "/d/00000002.1"},
		{"object, cut in its header", "/d/00000002.1", func(b []byte) []byte { return b[:100] }, "/d/00000002.1"},
		{"object, empty", "/d/00000002.1", func(b []byte) []byte { return nil }, "/d/00000002.1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := mem.New()
			id := newImageIn(t, st)
			a := newHost(t, "alpha", st, 1)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			for n := uint64(1); n <= objects; n++ {
				a.mustWrite(n, n)
				a.im.Destage(func(error) {})
				a.run(0)
			}
			rewrite(t, st, id.String()+tt.key, tt.damage)
			b := newHost(t, "beta", st, 2)
			b.others = []*host{}
			err := b.open(id, true)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("open: %v; want one line that names %q", err, tt.want)
			}
		})
	}
}

// TestDamagedDataIsNotServed: a flipped bit in data is an error with the
// object's name, never wrong data.
func TestDamagedDataIsNotServed(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustWrite(5, 5)
	a.im.Close(func(error) {})
	a.run(0)
	// Another host does not have it in memory.
	a = newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	key := fmt.Sprintf("%s/d/00000001.1", id)
	rewrite(t, st, key, func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	a.mustRead(1, 1)
	if err, ended, _ := a.do(Read, 5, 0, 0); !ended || err != syscall.EIO {
		t.Errorf("damaged block: %v, ended %v; want EIO", err, ended)
	}
	if err := st.Delete(context.Background(), key); err != nil {
		t.Fatal(err)
	}
	if err, ended, _ := a.do(Read, 1, 0, 0); !ended || err != syscall.EIO {
		t.Errorf("object gone: %v, ended %v; want EIO", err, ended)
	}
}

// rewrite replaces an object of either kind.
func rewrite(t *testing.T, st backend.Store, key string, change func([]byte) []byte) {
	t.Helper()
	ctx := context.Background()
	if b, v, err := st.Load(ctx, key); err == nil {
		if _, err := st.Swap(ctx, key, v, change(b)); err != nil {
			t.Fatal(err)
		}
		return
	}
	b, err := readWhole(ctx, st, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Delete(ctx, key); err != nil {
		t.Fatal(err)
	}
	if err := st.Put(ctx, key, change(b)); err != nil {
		t.Fatal(err)
	}
}

func TestForeignLog(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	other, err := Create(context.Background(), st, "other", CreateOptions{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	b := &host{t: t, name: "alpha", st: st, disk: a.disk, env: &simEnv{rng: a.env.rng, disk: a.disk}}
	if err := b.open(other, false); !errors.Is(err, ErrForeignLog) {
		t.Errorf("log of another image: %v", err)
	}
	if i, err := Describe(context.Background(), st, "other"); err != nil || i.Owner != nil {
		t.Errorf("a refused attach left an owner: %+v, %v", i.Owner, err)
	}
}

func TestReadOnly(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.im.Destage(func(error) {})
	a.run(0)
	im, err := Open(context.Background(), st, id, OpenOptions{ReadOnly: true, Config: Config{Logger: quiet}})
	if err != nil {
		t.Fatal(err)
	}
	b := newHost(t, "beta", st, 2)
	b.im = im
	im.Start(b.env, nil, nil)
	b.mustRead(1, 1)
	if err, ended, _ := b.do(Write, 1, 2, 0); !ended || err != syscall.EROFS {
		t.Errorf("write to a read-only image: %v, ended %v", err, ended)
	}
	if err, ended, _ := b.do(Flush, 0, 0, 0); !ended || err != 0 {
		t.Errorf("flush of a read-only image: %v, ended %v", err, ended)
	}
	a.mustWrite(2, 2) // the owner is not disturbed
}

// TestDetachLeavesNoOldCheckpoints: what a checkpoint replaces is gone from the
// store by the time the image has been detached.
func TestDetachLeavesNoOldCheckpoints(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	for n := uint64(1); n <= 4; n++ {
		h := newHost(t, "alpha", st, n)
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.mustWrite(n, n)
		closed := false
		h.im.Close(func(err error) { closed = err == nil })
		h.run(time.Minute)
		if !closed || !h.im.Quiet() {
			t.Fatalf("closed %v, quiet %v", closed, h.im.Quiet())
		}
		for _, kind := range []string{"/c/", "/m/"} {
			count := 0
			st.List(context.Background(), id.String()+kind, func(string) error { count++; return nil })
			if count != 1 {
				t.Fatalf("after detach %d: %d objects of kind %s, want 1", n, count, kind)
			}
		}
	}
}

// TestVolatileOwner: an owner whose log is in memory keeps the image as long as it lives.
// Once its lease is over nobody needs force to have it, and nothing is kept for its log.
func TestVolatileOwner(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	h, next := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	h.volatile = true
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.mustDestage()
	h.mustWrite(2, 2)
	next.others = []*host{h}
	var owned *OwnedError
	if err := next.open(id, false); !errors.As(err, &owned) || !owned.Command || owned.Host != "alpha" {
		t.Fatalf("opened beside one that lives: %v", err)
	}
	began := next.env.now
	h.im.Abandon()
	next.others = nil
	if err := next.open(id, false); err != nil {
		t.Fatal(err)
	}
	if waited := next.env.now - began; waited < 10*time.Second || waited > 15*time.Second {
		t.Errorf("waited %v for a lease of 10s", waited)
	}
	if sb := next.im.super.sb; len(sb.Points) != 0 || sb.Owner.Volatile {
		t.Errorf("the superblock is %+v", sb)
	}
	next.mustRead(1, 1)
	next.mustRead(2, 0)
	next.mustWrite(2, 3)
	next.mustClose()
	mustBeClean(t, st)
}

// TestVolatileOwnerGivesUp: what an owner whose log is in memory has put beyond what it could
// bring into the store, before it let another host have the image, is removed.
func TestVolatileOwnerGivesUp(t *testing.T) {
	fails := faultstore.NewSwitch()
	inner := mem.New()
	st := faultstore.New(inner, faultstore.If(faultstore.All(fails.On, faultstore.Method(faultstore.Put), faultstore.Key("*/d/00000001.*")), faultstore.Fault{Before: backend.ErrTemporary}))
	id := newImageIn(t, inner)
	h, next := newHost(t, "alpha", st, 1), newHost(t, "beta", inner, 2)
	h.volatile = true
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	fails.Set(true)
	for n := uint64(1); n <= 2; n++ {
		h.mustWrite(n, n)
		h.im.Destage(func(error) {})
		h.run(0)
	}
	if n := objectsOf(t, inner, id, "d"); n != 1 {
		t.Fatalf("the store has %d data objects, want the second one alone", n)
	}
	next.others = []*host{h}
	if err := next.open(id, true); err != nil {
		t.Fatal(err)
	}
	if h.im.state != Released {
		t.Fatalf("the owner is %v", h.im.state)
	}
	next.run(2 * leftoverGrace)
	next.mustRead(1, 0)
	next.mustRead(2, 0)
	next.mustClose()
	mustBeClean(t, inner)
}

// TestLogBesideVolatileOwner: a host comes back with a log from which the store has everything
// while an owner whose log was in memory has died before it said where the one before ended.
func TestLogBesideVolatileOwner(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.mustClose() // and the process dies before it has removed the log
	if _, _, err := changeSuperblock(t.Context(), st, id, func(sb *superblock) error {
		sb.Epoch++
		sb.Owner = &owner{Host: "gamma", Log: uuid.New(), Lease: 10 * time.Second, Volatile: true, Reads: superVersion}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	h.mustAttach(id)
	h.mustRead(1, 1)
	h.mustClose()
	mustBeClean(t, st)
}

// TestCommandDied: of an image that a command had that has died, whoever needs it to be nobody's
// has that after the lease; beside one that lives it is refused, or made by that.
func TestCommandDied(t *testing.T) {
	ctx := t.Context()
	for _, tt := range []struct {
		name    string
		do      func(st backend.Store, id uuid.UUID, clock Clock) error
		refused bool // beside one that lives
	}{
		{"roll back", func(st backend.Store, id uuid.UUID, clock Clock) error {
			return Rollback(ctx, st, id, "first", RollbackOptions{Clock: clock})
		}, true},
		{"snapshot", func(st backend.Store, id uuid.UUID, clock Clock) error {
			_, err := CreateSnapshot(ctx, st, id, "second", SnapshotOptions{Clock: clock})
			return err
		}, false},
		{"clone", func(st backend.Store, id uuid.UUID, clock Clock) error {
			_, err := Clone(ctx, st, id, "clone", CloneOptions{SnapshotOptions: SnapshotOptions{Clock: clock}})
			return err
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, lives := range []bool{true, false} {
				st := mem.New()
				id := newImageIn(t, st)
				mustSnapshot(t, st, id, "first", nil)
				h, clock := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
				h.volatile = true
				if err := h.open(id, false); err != nil {
					t.Fatal(err)
				}
				h.mustWrite(1, 1)
				if lives {
					clock.others = []*host{h}
				} else {
					h.im.Abandon()
				}
				err := tt.do(st, id, clock)
				var owned *OwnedError
				if refused := errors.As(err, &owned); lives && tt.refused && !refused || !(lives && tt.refused) && err != nil {
					t.Errorf("beside one that lives, %v: %v", lives, err)
				}
				if info, err := Describe(ctx, st, "disk"); err != nil || (info.Owner != nil) != lives {
					t.Errorf("%+v, %v", info, err)
				}
				if !lives && clock.env.now > 15*time.Second {
					t.Errorf("it took %v", clock.env.now)
				}
				if !lives {
					mustBeClean(t, st)
				}
			}
		})
	}
}

// TestRemoveAfterCommand: an image that a command had that has died is removed without force.
func TestRemoveAfterCommand(t *testing.T) {
	t.Parallel()
	st := mem.New()
	id := newImageIn(t, st)
	if _, _, err := changeSuperblock(t.Context(), st, id, func(sb *superblock) error {
		sb.Epoch++
		sb.Owner = &owner{Host: "gamma", Log: uuid.New(), Lease: MinLease, Volatile: true, Reads: superVersion}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	mustRemove(t, st, "disk")
	mustCollectLater(t, st)
	mustBeEmpty(t, st)
}
