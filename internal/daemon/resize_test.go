package daemon

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"golang.org/x/sys/unix"
)

// resize gives the device id of the host, and its image, another size.
func (h *host) resize(id int, size uint64, shrink bool) (api.Image, error) {
	return h.find(id).resize(context.Background(), api.ResizeRequest{Size: size, Shrink: shrink}, func(api.Progress) {})
}

// awaitSize waits until the device, and its image, have a size.
func (h *host) awaitSize(id int, device, image uint64) api.Image {
	h.w.t.Helper()
	var im api.Image
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		im = h.await(id, api.StateActive)
		d, err := h.w.kernel.get(id)
		if err == nil && im.Size == device && d.Params().SizeBytes == device && im.Stats.Size == image {
			return im
		}
	}
	h.w.t.Fatalf("device %d has %d bytes, its image %d; want %d and %d", id, im.Size, im.Stats.Size, device, image)
	return im
}

// TestResize: an image and its device become larger and smaller while they are attached, and
// the next daemon knows it.
func TestResize(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	const old = 64 << 20
	w.kernel.write(t, id, 8, 1)
	if res := w.kernel.do(t, id, engine.Write, old/512, make([]byte, 4096)); res >= 0 {
		t.Fatalf("a write beyond the end: %d", res)
	}
	for _, size := range []uint64{2 * old, old / 2, 3 * old} {
		im, err := h.resize(id, size, true)
		if err != nil || im.Size != size || im.Stats.Size != size || len(im.Advice) > 0 {
			t.Fatalf("resize to %d: %+v, %v", size, im, err)
		}
		h.awaitSize(id, size, size)
		w.kernel.check(t, id, 8, 1)
		last := size/512 - 8
		w.kernel.check(t, id, last, 0)
		w.kernel.write(t, id, last, 7)
	}
	w.kernel.check(t, id, old/512-8, 0) // gone when it was made smaller
	h.crash()
	h.start()
	h.awaitSize(id, 3*old, 3*old)
	w.kernel.check(t, id, 3*old/512-8, 7)

	// Another host makes it larger, and nobody tells this one.
	if err := engine.Grow(context.Background(), w.store, w.imageID("vm1"), 4*old); err != nil {
		t.Fatal(err)
	}
	h.awaitSize(id, 4*old, 4*old)
	// And once more while no daemon is there.
	h.crash()
	if err := engine.Grow(context.Background(), w.store, w.imageID("vm1"), 5*old); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.awaitSize(id, 5*old, 5*old)
	w.kernel.check(t, id, 3*old/512-8, 7)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	if im, err := h.attachReq(api.AttachRequest{ID: -1}); err != nil || im.Size != 5*old {
		t.Errorf("attached anew: %+v, %v", im, err)
	}
}

// TestResizeRigid: where the kernel cannot change a device's size an image grows all the same,
// and its device has that the next time; it does not become smaller.
func TestResizeRigid(t *testing.T) {
	w := newWorld(t)
	w.kernel.rigid.Store(true)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	const old = 64 << 20
	im, err := h.resize(id, 2*old, false)
	if err != nil || im.Size != old || im.Stats.Size != 2*old || len(im.Advice) != 1 || !strings.Contains(im.Advice[0], "lsdctl del, then add") {
		t.Fatalf("%+v, %v", im, err)
	}
	if _, err := h.resize(id, old/2, true); err == nil || !strings.Contains(err.Error(), "lsdctl del it first") {
		t.Errorf("made smaller: %v", err)
	}
	h.awaitSize(id, old, 2*old)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	if im, err := h.attachReq(api.AttachRequest{ID: -1}); err != nil || im.Size != 2*old {
		t.Errorf("attached anew: %+v, %v", im, err)
	}
}

// TestResizeRefused: what is refused changes nothing.
func TestResizeRefused(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	const old = 64 << 20
	id := h.add(api.AttachRequest{ID: -1})
	if _, err := h.resize(id, old/2, false); !errors.Is(err, engine.ErrShrinks) {
		t.Errorf("made smaller without leave: %v", err)
	}
	for _, size := range []uint64{0, 4095, old + 512, engine.MaxSize + 4096} {
		if _, err := h.resize(id, size, true); err == nil {
			t.Errorf("resized to %d", size)
		}
	}
	h.awaitSize(id, old, old)
	null := h.add(api.AttachRequest{ID: -1, Null: true, Size: old})
	if _, err := h.resize(null, 2*old, false); err == nil {
		t.Error("a null device was resized")
	}
	a := h.find(id)
	a.op <- struct{}{}
	if _, err := h.resize(id, 2*old, false); err == nil || !strings.Contains(err.Error(), "wait for that") {
		t.Errorf("resized while somebody is at it: %v", err)
	}
	<-a.op
}

// TestShrinkFails: if an image cannot be made smaller its device has its old size.
func TestShrinkFails(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	w.kernel.write(t, id, 8, 1)
	ended := make(chan error)
	w.outage.Set(true)
	go func() {
		_, err := h.resize(id, 32<<20, true)
		ended <- err
	}()
	for h.await(id, api.StateActive).Stats.Size != 32<<20 {
		time.Sleep(time.Millisecond)
	}
	if d, err := w.kernel.get(id); err != nil || d.Params().SizeBytes != 32<<20 {
		t.Errorf("the device has %d bytes while it is made smaller: %v", d.Params().SizeBytes, err)
	}
	h.find(id).getDisk().refuse() // as the end of the image's service
	if err := <-ended; err == nil {
		t.Error("made smaller")
	}
	w.outage.Set(false)
	h.crash()
	h.start()
	h.awaitSize(id, 64<<20, 64<<20)
	w.kernel.check(t, id, 8, 1)
}

// TestResizeFailed: an image that cannot be taken up is not resized, and its users go on
// getting errors.
func TestResizeFailed(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if err := h.find(id).flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	h.crash()
	w.damage.Store(1 << 30)
	h.start()
	h.await(id, api.StateFailed)
	dk := h.find(id).getDisk()
	if _, err := h.resize(id, 128<<20, false); err == nil || !strings.Contains(err.Error(), "its image is not open") {
		t.Errorf("resized: %v", err)
	}
	h.find(id).follow()
	if dk.dead() {
		t.Error("the reactor has died")
	}
	if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("read: %d", res)
	}
}

// TestResizeWhileShrinking: while an image is being made smaller for somebody who has gone, it
// is not said to have its old size for good.
func TestResizeWhileShrinking(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	w.kernel.write(t, id, 64<<20/512-8, 1)
	w.outage.Set(true)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		_, err := h.find(id).resize(ctx, api.ResizeRequest{Size: 32 << 20, Shrink: true}, func(api.Progress) {})
		ended <- err
	}()
	for h.await(id, api.StateActive).Stats.Size != 32<<20 {
		time.Sleep(time.Millisecond)
	}
	stop()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "goes on without you") {
		t.Errorf("it has not gone on: %v", err)
	}
	for _, size := range []uint64{16 << 20, 32 << 20, 64 << 20, 128 << 20} {
		if _, err := h.resize(id, size, true); err == nil || !strings.Contains(err.Error(), "is being made smaller") {
			t.Errorf("resized to %d meanwhile: %v", size, err)
		}
	}
	w.outage.Set(false)
	h.awaitSize(id, 32<<20, 32<<20)
	for {
		if _, err := h.resize(id, 64<<20, false); err == nil {
			break
		} else if !strings.Contains(err.Error(), "is being made smaller") {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.awaitSize(id, 64<<20, 64<<20)
	w.kernel.check(t, id, 64<<20/512-8, 0)
}

// TestResizeWhileTakenUp: an image becomes larger once more while its device gets the size that
// it had when it was taken up.
func TestResizeWhileTakenUp(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	h.crash()
	const old = 64 << 20
	if err := engine.Grow(context.Background(), w.store, w.imageID("vm1"), 2*old); err != nil {
		t.Fatal(err)
	}
	ended, over := make(chan error, 1), make(chan struct{})
	meanwhile := func() {
		defer close(over)
		go func() {
			_, err := h.resize(id, 3*old, false)
			ended <- err
		}()
		for h.await(id, api.StateActive).Stats.Size != 3*old {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond) // in which it would end if it did not wait
	}
	w.kernel.resizes.Store(&meanwhile)
	h.start()
	<-over
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	h.awaitSize(id, 3*old, 3*old)
}

// TestResizeDetaching: an image whose device has gone is not resized while it is being closed.
func TestResizeDetaching(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id, _ := h.detachLater(t)
	for _, size := range []uint64{32 << 20, 128 << 20} {
		if _, err := h.resize(id, size, true); err == nil || !strings.Contains(err.Error(), "is being detached") {
			t.Errorf("resized to %d: %v", size, err)
		}
	}
}

// TestDetachWhileShrinking: an image that is being made smaller, and whose store does not
// answer, can be detached by force; then it has its old size.
func TestDetachWhileShrinking(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	w.kernel.write(t, id, 8, 1)
	ended := make(chan error, 1)
	w.outage.Set(true)
	go func() {
		_, err := h.resize(id, 32<<20, true)
		ended <- err
	}()
	for h.await(id, api.StateActive).Stats.Size != 32<<20 {
		time.Sleep(time.Millisecond)
	}
	if _, err := h.del(id, api.DetachRequest{Force: true, Timeout: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("made smaller")
	}
	w.outage.Set(false)
	again := h.add(api.AttachRequest{ID: -1})
	h.awaitSize(again, 64<<20, 64<<20)
	w.kernel.check(t, again, 8, 1)
}
