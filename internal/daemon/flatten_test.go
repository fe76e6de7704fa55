package daemon

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// attachClone attaches vm1, has something written to it and destaged, and attaches a clone of
// it: the device that it returns.
func (h *host) attachClone() (clone int) {
	h.w.t.Helper()
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	for n := range uint64(64) {
		h.w.kernel.write(h.w.t, id, n*64, byte(n+1))
	}
	h.clone(id, "copy")
	return h.add(api.AttachRequest{Image: "mem:copy", ID: -1, Lease: time.Hour})
}

// flattening is a flattening of a device that was begun.
type flattening struct {
	told  chan api.Progress
	ended chan error
	moved uint64 // valid after ended
}

// flatten begins to flatten the image of a device.
func (h *host) flatten(ctx context.Context, id int) *flattening {
	f := &flattening{told: make(chan api.Progress, 100), ended: make(chan error, 1)}
	a := h.find(id)
	go func() {
		done, err := a.flatten(ctx, func(p api.Progress) {
			select {
			case f.told <- p:
			default:
			}
		})
		f.moved = done.Moved
		f.ended <- err
	}()
	return f
}

// heldUp begins to flatten the image of a device, and holds it up where it reads.
func (h *host) heldUp(ctx context.Context, id int) *flattening {
	h.w.t.Helper()
	h.w.hang.Shut()
	f := h.flatten(ctx, id)
	if err := h.w.awaitRead(); err != nil {
		h.w.hang.Open()
		h.w.t.Fatalf("it does not read: %v (%v)", err, f.wait(h.w.t))
	}
	return f
}

// awaitRead returns when something waits for what it reads.
func (w *world) awaitRead() error {
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	return w.hang.AwaitWaiting(ctx, 1)
}

// wait returns how the flattening has ended.
func (f *flattening) wait(t testing.TB) error {
	t.Helper()
	select {
	case err := <-f.ended:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
		return nil
	}
}

// needs returns what of an image needs something of its parent.
func (w *world) needs(name string) []string {
	w.t.Helper()
	s, err := engine.Separate(context.Background(), w.store, w.imageID(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return s.Needs
}

// TestFlatten: an attached clone is flattened while it is being written to; then its parent can
// go, and nothing is left of it.
func TestFlatten(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	clone := h.attachClone()
	f := h.heldUp(context.Background(), clone)
	w.kernel.write(t, clone, 5*64, 100) // what is to be moved, too
	w.kernel.write(t, clone, 8, 101)
	if err := h.flatten(context.Background(), clone).wait(t); err == nil || errors.Is(err, engine.ErrPaused) {
		t.Errorf("flattened twice at the same time: %v", err)
	}
	w.hang.Open()
	if err := f.wait(t); err != nil || f.moved == 0 {
		t.Fatalf("moved %d bytes: %v", f.moved, err)
	}
	select {
	case p := <-f.told:
		if p.What != "moving what it has of its ancestors" || p.Total == 0 || p.Done > p.Total {
			t.Errorf("progress: %+v", p)
		}
	default:
		t.Error("no progress")
	}
	if got := w.needs("copy"); len(got) > 0 {
		t.Errorf("these need something: %q", got)
	}
	if _, err := h.del(0, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	parent := w.imageID("vm1")
	w.remove("vm1")
	if n := w.objectsOf(parent); n != 0 {
		t.Errorf("%d objects of the parent are left", n)
	}
	for range 2 {
		for n := range uint64(64) {
			want := byte(n + 1)
			if n == 5 {
				want = 100
			}
			w.kernel.check(t, clone, n*64, want)
		}
		w.kernel.check(t, clone, 8, 101)
		h.crash()
		h.start()
	}
}

// TestFlattenPaused: a flattening is paused when who asked for it goes, and another one goes on.
func TestFlattenPaused(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	clone := h.attachClone()
	ctx, stop := context.WithCancel(context.Background())
	f := h.heldUp(ctx, clone)
	stop()
	time.Sleep(200 * time.Millisecond) // in which it would go on if it were not told
	w.hang.Open()
	if err := f.wait(t); !errors.Is(err, engine.ErrPaused) || !strings.Contains(err.Error(), "goes on from there") {
		t.Errorf("flattened for one who has gone: %v", err)
	}
	time.Sleep(100 * time.Millisecond)
	if got := w.needs("copy"); len(got) != 1 {
		t.Errorf("while it is paused these need something: %q", got)
	}
	// What it had begun to move when it was paused has been moved since.
	if err := h.flatten(context.Background(), clone).wait(t); err != nil {
		t.Error(err)
	}
	if got := w.needs("copy"); len(got) > 0 {
		t.Errorf("these need something: %q", got)
	}
}

// TestFlattenClientGone: over the socket, too, it is paused when the client goes.
func TestFlattenClientGone(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	clone := h.attachClone()
	ln, err := listen(h.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := h.server()
	go func() {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	defer srv.Close()
	c := api.NewClient(h.cfg.Socket)
	if _, err := c.Flatten(t.Context(), 99, nil); err == nil || !strings.Contains(err.Error(), "not attached") {
		t.Errorf("flatten device 99: %v", err)
	}
	w.hang.Shut()
	ctx, stop := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := c.Flatten(ctx, clone, nil)
		gone <- err
	}()
	if err := w.awaitRead(); err != nil {
		t.Errorf("it does not read: %v", err)
	}
	stop()
	if err := <-gone; err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("the client is told: %v", err)
	}
	time.Sleep(200 * time.Millisecond)
	w.hang.Open()
	time.Sleep(200 * time.Millisecond)
	if got := w.needs("copy"); len(got) != 1 {
		t.Errorf("after the client has gone these need something: %q", got)
	}
	var seen int
	if _, err := c.Flatten(t.Context(), clone, func(api.Progress) { seen++ }); err != nil || seen == 0 {
		t.Errorf("told %d times: %v", seen, err)
	}
	if got := w.needs("copy"); len(got) > 0 {
		t.Errorf("these need something: %q", got)
	}
}

// TestDetachWhileFlattening: an image that is being flattened can be detached, which ends that.
func TestDetachWhileFlattening(t *testing.T) {
	for _, q := range []api.DetachRequest{{}, {Force: true, Timeout: time.Second}} {
		w := newWorld(t)
		h := w.newHost()
		clone := h.attachClone()
		w.kernel.hold(clone, "somebody")
		f := h.heldUp(context.Background(), clone)
		if !q.Force {
			if _, err := h.del(clone, q); err == nil {
				t.Error("detached while somebody has it")
			}
			select {
			case err := <-f.ended:
				t.Errorf("a detach that is refused has ended it: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
		}
		w.kernel.hold(clone)
		open := func() { time.AfterFunc(100*time.Millisecond, w.hang.Open) }
		w.kernel.stops.Store(&open)
		if _, err := h.del(clone, q); err != nil {
			t.Fatal(err)
		}
		if err := f.wait(t); !errors.Is(err, engine.ErrPaused) {
			t.Errorf("flattened while it was detached: %v", err)
		}
		if h.find(clone) != nil {
			t.Error("it is attached still")
		}
		if got := w.needs("copy"); len(got) != 1 {
			t.Errorf("these need something: %q", got)
		}
	}
}

// TestDaemonEndsWhileFlattening: the end of the daemon ends a flattening; with the next one it
// goes on, when that is asked for.
func TestDaemonEndsWhileFlattening(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	clone := h.attachClone()
	f := h.heldUp(context.Background(), clone)
	ctx, stop := context.WithTimeout(context.Background(), 5*time.Second)
	defer stop()
	time.AfterFunc(200*time.Millisecond, w.hang.Open)
	if remarks := h.find(clone).leaveForNext(ctx, func(api.Progress) {}); len(remarks) > 0 {
		t.Errorf("it is left with %q", remarks)
	}
	if err := f.wait(t); !errors.Is(err, engine.ErrPaused) {
		t.Errorf("flattened while the daemon ended: %v", err)
	}
	h.crash()
	h.start()
	h.await(clone, api.StateActive)
	if err := h.flatten(context.Background(), clone).wait(t); err != nil {
		t.Error(err)
	}
	w.kernel.check(t, clone, 64, 2)
}

// TestFlattenRefused: what cannot be flattened is told so in a line.
func TestFlattenRefused(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	null := h.add(api.AttachRequest{ID: -1, Null: true, Size: 64 << 20})
	readOnly := h.add(api.AttachRequest{ID: -1, Image: "mem:vm2", ReadOnly: true})
	for _, id := range []int{null, readOnly} {
		if err := h.flatten(context.Background(), id).wait(t); err == nil || err.Error() != h.find(id).name()+" is not an image that can be written to" {
			t.Errorf("flattened device %d: %v", id, err)
		}
	}
	id := h.add(api.AttachRequest{ID: -1})
	a := h.find(id)
	a.op <- struct{}{}
	if err := h.flatten(context.Background(), id).wait(t); err == nil || !strings.Contains(err.Error(), "wait for that") {
		t.Errorf("flattened while somebody is at it: %v", err)
	}
	<-a.op
	gone, stop := context.WithCancel(context.Background())
	stop()
	if err := h.flatten(gone, id).wait(t); err == nil {
		t.Error("flattened for one who has gone")
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	id, _ = h.detachLater(t)
	if err := h.flatten(context.Background(), id).wait(t); err == nil || !strings.Contains(err.Error(), "is being detached") {
		t.Errorf("flattened while it is detached: %v", err)
	}
}
