package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// fakeKernel is a kernel without a ublk driver: its devices have the states of
// real ones, and requests are put in by the test.
type fakeKernel struct {
	mu      sync.Mutex
	devs    map[int]*fakeDevice    // guarded by mu
	holders map[int][]string       // guarded by mu
	addErr  error                  // guarded by mu: of the next Add
	slots   int                    // of each device
	rigid   atomic.Bool            // it cannot change the size of a device
	resizes atomic.Pointer[func()] // is called once, before it does
	stops   atomic.Pointer[func()] // is called once, when it has stopped a device
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{devs: map[int]*fakeDevice{}, holders: map[int][]string{}, slots: 8}
}

// fakeDevice is one device, and the hold of one server on it.
type fakeDevice struct {
	k   *fakeKernel
	pid int

	mu      sync.Mutex
	params  ublk.Params      // guarded by mu; but for its size it does not change
	state   ublk.State       // guarded by mu
	handler ublk.Handler     // guarded by mu
	reactor *reactor.Reactor // guarded by mu
	stopped chan struct{}
	done    chan struct{}
	err     error
}

func (k *fakeKernel) get(id int) (*fakeDevice, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.devs[id]
	if d == nil {
		return nil, fmt.Errorf("device %d: %w", id, ublk.ErrNoDevice)
	}
	return d, nil
}

func (k *fakeKernel) put(p ublk.Params, state ublk.State, pid int) *fakeDevice {
	d := &fakeDevice{k: k, params: p, state: state, pid: pid, stopped: make(chan struct{}), done: make(chan struct{})}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devs[p.ID] = d
	return d
}

func (k *fakeKernel) Add(_ context.Context, p ublk.Params) (device, error) {
	if _, err := k.get(p.ID); err == nil {
		return nil, unix.EEXIST
	}
	k.mu.Lock()
	err := k.addErr
	k.addErr = nil
	k.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return k.put(p, ublk.StateDead, syscall.Getpid()), nil
}

func (k *fakeKernel) Recover(_ context.Context, id int) (device, error) {
	d, err := k.get(id)
	if err != nil {
		return nil, err
	}
	if d.getState() != ublk.StateQuiesced {
		return nil, ublk.ErrNotRecoverable
	}
	return k.put(d.params, ublk.StateQuiesced, syscall.Getpid()), nil
}

func (k *fakeKernel) Info(_ context.Context, id int) (ublk.Info, error) {
	d, err := k.get(id)
	if err != nil {
		return ublk.Info{}, err
	}
	return ublk.Info{ID: id, State: d.getState(), ServerPID: d.pid}, nil
}

func (k *fakeKernel) List(ctx context.Context) ([]ublk.Info, error) {
	k.mu.Lock()
	ids := slices.Sorted(maps.Keys(k.devs))
	k.mu.Unlock()
	var list []ublk.Info
	for _, id := range ids {
		i, _ := k.Info(ctx, id)
		list = append(list, i)
	}
	return list, nil
}

func (k *fakeKernel) Holders(id int) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.holders[id]
}

func (k *fakeKernel) hold(id int, by ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.holders[id] = by
}

func (k *fakeKernel) Stop(_ context.Context, id int, force bool) error {
	d, err := k.get(id)
	if err != nil {
		return err
	}
	if h := k.Holders(id); len(h) > 0 && !force {
		return &ublk.BusyError{ID: id, Holders: h}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != ublk.StateDead {
		d.state = ublk.StateDead
		close(d.stopped)
	}
	if fn := k.stops.Swap(nil); fn != nil {
		(*fn)()
	}
	return nil
}

func (k *fakeKernel) Delete(ctx context.Context, id int) error {
	if err := k.Stop(ctx, id, true); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.devs, id)
	return nil
}

func (k *fakeKernel) Features() (ublk.Features, error) {
	return ublk.FeatureRecovery | ublk.FeatureReissue, nil
}

func (d *fakeDevice) getState() ublk.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

func (d *fakeDevice) Slots() int { return d.k.slots }

func (d *fakeDevice) Start(_ context.Context, r *reactor.Reactor, h ublk.Handler) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state, d.reactor, d.handler = ublk.StateLive, r, h
	go func() {
		select {
		case <-d.stopped:
		case <-r.Done():
			time.Sleep(5 * time.Millisecond) // the kernel takes its time to let go of a server
			d.mu.Lock()
			d.state = ublk.StateQuiesced
			d.err = errors.Join(errors.New("the reactor ended"), r.Err())
			d.mu.Unlock()
		}
		close(d.done)
	}()
	return nil
}

func (d *fakeDevice) Stop(ctx context.Context, force bool) error {
	return d.k.Stop(ctx, d.params.ID, force)
}

func (d *fakeDevice) Delete(ctx context.Context, _ bool) error {
	return d.k.Delete(ctx, d.params.ID)
}

// Params implements device.
func (d *fakeDevice) Params() ublk.Params {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.params
}

// Resize implements device.
func (d *fakeDevice) Resize(_ context.Context, size uint64) error {
	if d.k.rigid.Load() {
		return fmt.Errorf("fake: %w", unix.EOPNOTSUPP)
	}
	if fn := d.k.resizes.Swap(nil); fn != nil {
		(*fn)()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.params.SizeBytes = size
	return nil
}

// Rest asks of the reactor what a real device does.
func (d *fakeDevice) Rest() (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.reactor.Ring().Settle()
}

// Close fails as that of a real device does.
func (d *fakeDevice) Close() error {
	d.mu.Lock()
	served := d.reactor != nil
	d.mu.Unlock()
	if served {
		select {
		case <-d.done:
		default:
			return fmt.Errorf("device %d is being served", d.params.ID)
		}
	}
	return nil
}

func (d *fakeDevice) Done() <-chan struct{} { return d.done }
func (d *fakeDevice) Err() error            { return d.err }

// fakeIO takes the end of a request.
type fakeIO chan int32

func (c fakeIO) Complete(res int32)       { c <- res }
func (c fakeIO) CompleteInTime(res int32) { c <- res }

// do runs one request through the device's handler and returns its result. It
// fails the test when it gets none; a device that is being recovered may take a
// moment.
func (k *fakeKernel) do(t testing.TB, id int, op engine.Op, sector uint64, data []byte) int32 {
	t.Helper()
	a, err := uring.NewArena(max(len(data), 1))
	if err != nil {
		t.Fatal(err)
	}
	// Not freed: a request that got lost may still use it.
	buf := a.Bytes()[:len(data)]
	copy(buf, data)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		d, err := k.get(id)
		if err != nil || d.getState() != ublk.StateLive {
			continue
		}
		io := make(fakeIO, 1)
		d.reactor.Post(func() {
			f := d.handler.(*front)
			s := &f.slots[0]
			s.io = io
			s.req.Op, s.req.Sector, s.req.Sectors, s.req.Buf = op, sector, uint32(len(data)/512), buf
			if op == engine.Flush {
				s.req.Sectors = 0
			}
			f.submit(s)
		})
		select {
		case res := <-io:
			copy(data, buf)
			return res
		case <-d.reactor.Done(): // again, with the next one
		case <-time.After(10 * time.Second):
			t.Fatalf("request %d at %d is not answered", op, sector)
		}
	}
	t.Fatalf("device %d does not serve", id)
	return 0
}

func (k *fakeKernel) write(t testing.TB, id int, sector uint64, b byte) {
	t.Helper()
	if res := k.do(t, id, engine.Write, sector, bytes.Repeat([]byte{b}, 4096)); res != 4096 {
		t.Fatalf("write at %d: %d", sector, res)
	}
}

func (k *fakeKernel) check(t testing.TB, id int, sector uint64, b byte) {
	t.Helper()
	got := make([]byte, 4096)
	if res := k.do(t, id, engine.Read, sector, got); res != 4096 {
		t.Fatalf("read at %d: %d", sector, res)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{b}, 4096)) {
		t.Fatalf("sector %d holds %d, want %d", sector, got[0], b)
	}
}

// world is a kernel, a store, and the hosts that use them.
type world struct {
	t      testing.TB
	kernel *fakeKernel
	store  *mem.Store
	outage *faultstore.Switch
	hang   *faultstore.Gate // of reads of objects
	damage atomic.Int32     // how many of the next reads of the first data object give something else
	lost   atomic.Int32     // how many of the next changes of a superblock fail
	bad    atomic.Value     // id, a string, of an image that who changes its superblock dies of
	scrub  int64            // bytes a second
	late   int32            // how many of a daemon's first recoveries of devices fail
	log    syncBuffer
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, kernel: newFakeKernel(), store: mem.New(), outage: faultstore.NewSwitch(), hang: faultstore.NewGate()}
	w.hang.Open()
	t.Cleanup(func() {
		if strings.Contains(w.log.String(), "close the device") {
			t.Error("a device was closed while it was served: its buffers stay")
		}
		if t.Failed() {
			t.Log(w.log.String())
		}
	})
	for _, name := range []string{"vm1", "vm2"} {
		if _, err := engine.Create(context.Background(), w.store, name, engine.CreateOptions{Size: 64 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

var lastHost atomic.Int32

// host is one state directory and the daemon on it, if any.
type host struct {
	*Daemon
	w    *world
	dir  string
	boot uuid.UUID
}

func (w *world) newHost() *host {
	h := &host{w: w, dir: w.t.TempDir(), boot: uuid.New()}
	h.start()
	w.t.Cleanup(func() { h.crash() })
	return h
}

// start starts a daemon as Run does, without its socket.
func (h *host) start() {
	h.w.t.Helper()
	d, err := newDaemon(Config{
		Socket: filepath.Join(h.dir, "sock"), StateDir: h.dir, Host: fmt.Sprintf("host%d", lastHost.Add(1)),
		ExitTimeout: 5 * time.Second, ScrubRate: h.w.scrub, BurstMemory: 4 * writelog.SegmentSize,
		Logger: slog.New(slog.NewTextHandler(&h.w.log, nil)),
	})
	if err != nil {
		h.w.t.Fatal(err)
	}
	d.env.boot = h.boot
	d.recRetry = 10 * time.Millisecond
	d.openKernel = func() (kernel, error) {
		k := &lateKernel{fakeKernel: h.w.kernel}
		k.busy.Store(h.w.late)
		return k, nil
	}
	d.openSt = func(context.Context, backend.URL) (backend.Store, error) {
		if h.w.outage.On(faultstore.Op{}) {
			return nil, &backend.Error{Op: "open", Class: backend.ErrTemporary}
		}
		return faultstore.New(h.w.store.Handle(),
			faultstore.If(h.w.outage.On, faultstore.Fault{Before: backend.ErrTemporary}),
			faultstore.If(faultstore.Method(faultstore.Get), faultstore.Fault{Gate: h.w.hang}),
			faultstore.If(faultstore.All(faultstore.Method(faultstore.Swap), h.w.losing), faultstore.Fault{Before: backend.ErrTemporary}),
			faultstore.If(faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key("*/d/00000001.*"), h.w.damaged), faultstore.Fault{Corrupt: faultstore.FlipBit(777)})), nil
	}
	h.Daemon = d
	if err := d.takeUp(); err != nil {
		h.w.t.Fatal(err)
	}
}

// losing is a faultstore.Cond.
func (w *world) losing(o faultstore.Op) bool {
	if id, _ := w.bad.Load().(string); id != "" && strings.HasPrefix(o.Key, id) {
		panic("test")
	}
	return w.lost.Add(-1) >= 0
}

// damaged is a faultstore.Cond.
func (w *world) damaged(faultstore.Op) bool { return w.damage.Add(-1) >= 0 }

// crash ends the daemon as kill -9 would, as far as one process can.
func (h *host) crash() {
	if h.Daemon == nil {
		return
	}
	h.cancel()
	for _, a := range h.all() {
		select {
		case a.op <- struct{}{}:
		default: // it has left
		}
		a.stopKeeper()
		if dk := a.getDisk(); dk != nil {
			_ = dk.abandon(context.Background())
			dk.release()
			if dk.dev != nil {
				<-dk.dev.Done()
			}
		}
	}
	h.lock.Close()
	h.Daemon = nil
}

func (h *host) attachReq(q api.AttachRequest) (api.Image, error) {
	setDefault(&q.LogSize, 66<<20)
	setDefault(&q.LogMemory, 16<<20)
	if q.Lease == 0 && !q.Null {
		q.Lease = time.Second // a host that has crashed is soon given up
	}
	if q.Image == "" && !q.Null {
		q.Image = "mem:vm1"
	}
	return h.attach(context.Background(), q, func(api.Progress) {})
}

// add attaches vm1 and returns its device's number.
func (h *host) add(q api.AttachRequest) int {
	h.w.t.Helper()
	im, err := h.attachReq(q)
	if err != nil {
		h.w.t.Fatal(err)
	}
	return im.ID
}

func (h *host) del(id int, q api.DetachRequest) (api.Done, error) {
	a := h.find(id)
	if a == nil {
		return api.Done{}, fmt.Errorf("device %d is not attached", id)
	}
	return a.detach(context.Background(), q, func(api.Progress) {})
}

// await waits until the device is in the state.
func (h *host) await(id int, state string) api.Image {
	h.w.t.Helper()
	var im api.Image
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if a := h.find(id); a == nil {
			im = api.Image{State: "absent"}
		} else {
			im = a.describe(context.Background())
		}
		if im.State == state {
			return im
		}
	}
	h.w.t.Fatalf("device %d is %s (%s), want %s", id, im.State, im.Error, state)
	return im
}

// files returns how many records and logs a host has.
func (h *host) files() (records, logs int) {
	r, err1 := filepath.Glob(h.dir + "/attachments/*")
	l, err2 := filepath.Glob(h.dir + "/cache/*")
	if err := errors.Join(err1, err2); err != nil {
		h.w.t.Fatal(err)
	}
	return len(r), len(l)
}
