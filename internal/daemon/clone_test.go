package daemon

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// clone makes a clone of vm1 as it is now, which is the device id of the host.
func (h *host) clone(id int, name string) uuid.UUID {
	h.w.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	nudged := false
	made, err := engine.Clone(ctx, h.w.store, h.w.imageID("vm1"), name, engine.CloneOptions{SnapshotOptions: engine.SnapshotOptions{
		Nudge: func(ctx context.Context) error {
			nudged = true
			return h.find(id).refresh(ctx, func(api.Progress) {})
		},
	}})
	if err != nil {
		h.w.t.Fatal(err)
	}
	if !nudged {
		h.w.t.Error("the owner was not asked")
	}
	return made
}

// remove removes an image, and then what it was made of.
func (w *world) remove(name string) {
	w.t.Helper()
	ctx := context.Background()
	id, err := engine.Remove(ctx, w.store, name, engine.RemoveOptions{})
	if err == nil {
		_, err = engine.Reclaim(ctx, w.store, id, nil)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// TestClone: an image that is attached is cloned, and the clone attached beside it, which
// goes on when the image has been removed, with the daemons that come later, too.
func TestClone(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	// The lease is renewed too rarely to be what makes the owner look.
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	w.kernel.write(t, id, 8, 1)
	made := h.clone(id, "copy")
	w.kernel.write(t, id, 8, 2)
	clone := h.add(api.AttachRequest{Image: "mem:copy", ID: -1})
	w.kernel.check(t, clone, 8, 1)
	w.kernel.write(t, clone, 16, 3)
	w.kernel.check(t, id, 8, 2)
	w.kernel.check(t, id, 16, 0)
	if im := h.await(clone, api.StateActive); im.ImageID != made || im.ReadOnly || im.Log == "" {
		t.Errorf("status: %+v", im)
	}
	if done, err := h.del(id, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
		t.Errorf("detach: %v, %v", done, err)
	}
	w.remove("vm1")
	h.crash()
	h.start()
	w.kernel.check(t, clone, 8, 1)
	w.kernel.check(t, clone, 16, 3)
	if done, err := h.del(clone, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
		t.Errorf("detach: %v, %v", done, err)
	}
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	w.remove("copy")
	if list, err := engine.GC(context.Background(), w.store, engine.GCOptions{DryRun: true, Age: 1}); err != nil || len(list) != 0 {
		t.Errorf("left behind: %+v, %v", list, err)
	}
}
