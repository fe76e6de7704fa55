package daemon

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

func (h *host) rollBack(id int, name string) (api.Image, error) {
	return h.find(id).rollBack(context.Background(), api.RollbackRequest{Snapshot: name}, nil, func(api.Progress) {})
}

// TestRollback: an image that is attached, and of which nobody has the device open, is rolled
// back, its size included, and goes on as the same device; also for the next daemon.
func TestRollback(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Lease: 10 * time.Second})
	w.kernel.write(t, id, 8, 1)
	h.snapshot(id, "monday")
	w.kernel.write(t, id, 8, 2)
	h.snapshot(id, "tuesday")
	if _, err := h.resize(id, 128<<20, false); err != nil {
		t.Fatal(err)
	}
	w.kernel.write(t, id, 8, 3)

	w.kernel.hold(id, "process 7 (mkfs)")
	var busy *ublk.BusyError
	if _, err := h.rollBack(id, "monday"); !errors.As(err, &busy) || !strings.Contains(err.Error(), "process 7 (mkfs)") {
		t.Errorf("rolled back under a user: %v", err)
	}
	w.kernel.hold(id)
	if _, err := h.rollBack(id, "sunday"); !errors.Is(err, engine.ErrNoSnapshot) {
		t.Errorf("rolled back to nothing: %v", err)
	}
	h.await(id, api.StateActive)
	w.kernel.check(t, id, 8, 3)

	im, err := h.rollBack(id, "monday")
	if err != nil || im.ID != id || im.State != api.StateActive || im.Size != 64<<20 {
		t.Fatalf("%+v, %v", im, err)
	}
	if d, err := w.kernel.get(id); err != nil || d.Params().SizeBytes != 64<<20 {
		t.Errorf("the device: %+v, %v", d.Params(), err)
	}
	w.kernel.check(t, id, 8, 1)
	w.kernel.write(t, id, 16, 4)
	h.crash()
	h.start()
	h.await(id, api.StateActive)
	w.kernel.check(t, id, 8, 1)
	w.kernel.check(t, id, 16, 4)
	if im, err := h.rollBack(id, "tuesday"); err != nil || im.State != api.StateActive {
		t.Fatalf("%+v, %v", im, err)
	}
	w.kernel.check(t, id, 8, 2)
	w.kernel.check(t, id, 16, 0)
	if records, logs := h.files(); records != 1 || logs != 1 {
		t.Errorf("%d records, %d files in the cache", records, logs)
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
}

// TestRollbackFails: an image that is not rolled back is attached as it was; one that cannot
// be attached again is not attached, and nothing is left of that.
func TestRollbackFails(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Lease: 10 * time.Second})
	w.kernel.write(t, id, 8, 1)
	h.snapshot(id, "monday")
	w.kernel.write(t, id, 8, 2)
	w.kernel.mu.Lock()
	w.kernel.addErr = errors.New("no more devices")
	w.kernel.mu.Unlock()
	_, err := h.rollBack(id, "monday")
	if err == nil || !strings.Contains(err.Error(), "is not attached any more: lsdctl add mem:vm1: ") || !strings.Contains(err.Error(), "no more devices") {
		t.Fatalf("rolled back: %v", err)
	}
	if h.find(id) != nil {
		t.Error("it is attached")
	}
	if records, _ := h.files(); records != 0 {
		t.Errorf("%d records", records)
	}
	again := h.add(api.AttachRequest{ID: -1})
	w.kernel.check(t, again, 8, 1)
	null := h.add(api.AttachRequest{ID: -1, Null: true, Size: 1 << 20})
	if _, err := h.rollBack(null, "monday"); err == nil {
		t.Error("a null device is rolled back")
	}
}

// TestRollbackIsLeft: once the device has been taken away a rollback comes to its end, whether
// or not somebody waits for it.
func TestRollbackIsLeft(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	h.snapshot(id, "monday")
	w.kernel.write(t, id, 8, 2)
	ctx, leave := context.WithCancel(context.Background())
	stops := func() { leave() }
	w.kernel.stops.Store(&stops)
	if _, err := h.find(id).rollBack(ctx, api.RollbackRequest{Snapshot: "monday"}, nil, func(api.Progress) {}); err != nil {
		t.Errorf("rolled back: %v", err)
	}
	if h.find(id) == nil {
		t.Fatal("it is not attached any more")
	}
	h.await(id, api.StateActive)
	w.kernel.check(t, id, 8, 1)
}

// TestRollbackFailed: an image that cannot be taken up is not rolled back by its daemon, and
// its users go on getting errors.
func TestRollbackFailed(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	h.snapshot(id, "monday")
	h.crash()
	w.damage.Store(1 << 30)
	h.start()
	h.await(id, api.StateFailed)
	if _, err := h.rollBack(id, "monday"); err == nil || !strings.Contains(err.Error(), "its image is not open") {
		t.Errorf("rolled back: %v", err)
	}
	if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("read: %d", res)
	}
}
