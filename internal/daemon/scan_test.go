package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/ublk"
)

// scanKernel is a kernel that reads the partition table of a device before it has
// started it, and until then neither stops nor deletes it, as the real one.
type scanKernel struct {
	*fakeKernel
	scanning func() // is called before the read
}

func (k *scanKernel) Add(ctx context.Context, p ublk.Params) (device, error) {
	d, err := k.fakeKernel.Add(ctx, p)
	if err != nil {
		return nil, err
	}
	return &scanDevice{fakeDevice: d.(*fakeDevice), k: k, started: make(chan struct{})}, nil
}

type scanDevice struct {
	*fakeDevice
	k       *scanKernel
	started chan struct{}
}

func (d *scanDevice) Start(ctx context.Context, r *reactor.Reactor, h ublk.Handler) error {
	if err := d.fakeDevice.Start(ctx, r, h); err != nil {
		return err
	}
	d.k.scanning()
	mem, err := uring.NewArena(4096)
	if err != nil {
		return err
	}
	io := make(fakeIO, 1)
	r.Post(func() {
		s := &h.(*front).slots[0]
		s.io, s.req.Op, s.req.Sectors, s.req.Buf = io, engine.Read, 8, mem.Bytes()
		s.front.submit(s)
	})
	go func() {
		<-io
		close(d.started)
	}()
	return d.await(ctx)
}

func (d *scanDevice) await(ctx context.Context) error {
	select {
	case <-d.started:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *scanDevice) Delete(ctx context.Context, force bool) error {
	if err := d.await(ctx); err != nil {
		return err
	}
	return d.fakeDevice.Delete(ctx, force)
}

// scanWorld returns a host on which the store ceases to answer as soon as the kernel
// reads the partition table of vm1.
func scanWorld(t *testing.T) (h *host, scanning <-chan struct{}) {
	w := newWorld(t)
	first := w.newHost()
	id := first.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 0, 1)
	if _, err := first.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	h = w.newHost()
	began := make(chan struct{})
	h.kern = &scanKernel{w.kernel, func() { w.hang.Shut(); close(began) }}
	t.Cleanup(w.hang.Open)
	return h, began
}

// checkNotAttached checks that an attach that failed has left neither a device nor a
// record.
func checkNotAttached(t *testing.T, h *host) {
	t.Helper()
	list, err := h.w.kernel.List(context.Background())
	if err != nil || len(list) != 0 {
		t.Errorf("the kernel has the devices %v (%v)", list, err)
	}
	if r, _ := h.files(); r != 0 {
		t.Errorf("%d records are left", r)
	}
}

// TestCancelledInScan: who attaches gives up when the store does not answer what the
// kernel reads of the new device. The kernel has to get an answer, or nobody would ever
// be rid of the device.
func TestCancelledInScan(t *testing.T) {
	h, scanning := scanWorld(t)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		<-scanning
		stop()
	}()
	_, err := h.attach(ctx, api.AttachRequest{Image: "mem:vm1", ID: -1, LogSize: 66 << 20, LogMemory: 16 << 20}, func(api.Progress) {})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("attach: %v", err)
	}
	checkNotAttached(t, h)
	h.w.hang.Open()
	h.kern = h.w.kernel
	h.w.kernel.check(t, h.add(api.AttachRequest{ID: -1}), 0, 1)
}

// TestEndInScan: the daemon is told to end while the kernel starts a device: it does not
// leave before that has come to an end.
func TestEndInScan(t *testing.T) {
	h, scanning := scanWorld(t)
	ended := make(chan error)
	go func() {
		_, err := h.attachReq(api.AttachRequest{ID: -1})
		ended <- err
	}()
	<-scanning
	h.leave(exitRequest{timeout: 10 * time.Second, progress: func(api.Progress) {}})
	checkNotAttached(t, h)
	if err := <-ended; !errors.Is(err, errEnding) {
		t.Errorf("attach: %v", err)
	}
}
