package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// imageID returns the id of an image of the world.
func (w *world) imageID(name string) uuid.UUID {
	w.t.Helper()
	info, err := engine.Describe(context.Background(), w.store, name)
	if err != nil {
		w.t.Fatal(err)
	}
	return info.ID
}

// snapshot makes a snapshot of vm1, which is the device id of the host.
func (h *host) snapshot(id int, name string) engine.Snapshot {
	h.w.t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	nudged := false
	s, err := engine.CreateSnapshot(ctx, h.w.store, h.w.imageID("vm1"), name, engine.SnapshotOptions{
		Nudge: func(ctx context.Context) error {
			nudged = true
			return h.find(id).refresh(ctx, func(api.Progress) {})
		},
	})
	if err != nil {
		h.w.t.Fatal(err)
	}
	if !nudged {
		h.w.t.Error("the owner was not asked")
	}
	return s
}

// askSnapshot has the superblock of an image ask for a snapshot, which nobody tells its owner,
// until the function that it returns is called.
func (w *world) askSnapshot(image, name string) (withdraw func()) {
	w.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	id, ended := w.imageID(image), make(chan struct{})
	go func() {
		_, _ = engine.CreateSnapshot(ctx, w.store, id, name, engine.SnapshotOptions{})
		close(ended)
	}()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		list, err := engine.Snapshots(context.Background(), w.store, id)
		if err != nil || time.Now().After(deadline) {
			w.t.Fatalf("nobody asks for the snapshot: %v", err)
		}
		if len(list) == 1 {
			break
		}
	}
	return func() {
		stop()
		<-ended
	}
}

// TestSnapshot: a snapshot is attached beside its image, twice, and stays as it is; also
// for the daemons that come later, under whatever name it has then.
func TestSnapshot(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	// The lease is renewed too rarely to be what makes the owner look.
	id := h.add(api.AttachRequest{ID: -1, Lease: time.Hour})
	w.kernel.write(t, id, 8, 1)
	snap := h.snapshot(id, "monday")
	w.kernel.write(t, id, 8, 2)
	q := api.AttachRequest{Image: "mem:vm1@monday", ID: -1, ReadOnly: true}
	first, second := h.add(q), h.add(q)
	check := func() {
		t.Helper()
		for _, n := range []int{first, second} {
			w.kernel.check(t, n, 8, 1)
			im := h.await(n, api.StateActive)
			if im.URL != "mem:vm1@monday" || im.Snapshot != snap.ID || im.ImageID != w.imageID("vm1") || !im.ReadOnly || im.Size != snap.Size || im.Log != "" {
				t.Errorf("status: %+v", im)
			}
		}
		w.kernel.check(t, id, 8, 2)
		if im := h.await(id, api.StateActive); im.Snapshot != uuid.Nil {
			t.Errorf("the image is the snapshot %v", im.Snapshot)
		}
	}
	check()
	if d, err := w.kernel.get(first); err != nil || !d.params.ReadOnly || d.params.SizeBytes != snap.Size {
		t.Errorf("device: %+v, %v", d.params, err)
	}
	if res := w.kernel.do(t, first, engine.Write, 8, make([]byte, 4096)); res >= 0 {
		t.Errorf("a write to a snapshot: %d", res)
	}
	h.crash()
	if err := engine.RenameSnapshot(context.Background(), w.store, w.imageID("vm1"), "monday", "tuesday"); err != nil {
		t.Fatal(err)
	}
	h.start()
	check()
	h.crash()
	w.kernel.devs = map[int]*fakeDevice{}
	h.boot = uuid.New()
	h.start()
	check()
	for _, n := range []int{first, id, second} {
		if done, err := h.del(n, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
			t.Errorf("detach: %v, %v", done, err)
		}
	}
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
}

// TestSnapshotGone: the snapshot, or its image, is removed while no daemon runs. The
// device's users get errors.
func TestSnapshotGone(t *testing.T) {
	for _, image := range []bool{false, true} {
		w := newWorld(t)
		h := w.newHost()
		ctx, vm1 := context.Background(), w.imageID("vm1")
		if _, err := engine.CreateSnapshot(ctx, w.store, vm1, "monday", engine.SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		id := h.add(api.AttachRequest{Image: "mem:vm1@monday", ID: -1, ReadOnly: true})
		h.crash()
		want := engine.ErrNoSnapshot
		err := engine.RemoveSnapshot(ctx, w.store, vm1, "monday")
		if image {
			want = errImageGone
			w.remove("vm1")
		}
		if err != nil {
			t.Fatal(err)
		}
		h.start()
		if im := h.await(id, api.StateFailed); !strings.Contains(im.Error, want.Error()) {
			t.Errorf("status: %+v", im)
		}
		if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
			t.Errorf("read: %d", res)
		}
		if done, err := h.del(id, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
			t.Errorf("detach: %v, %v", done, err)
		}
		if r, _ := h.files(); r != 0 {
			t.Errorf("%d records are left", r)
		}
		if _, err := w.kernel.get(id); !errors.Is(err, ublk.ErrNoDevice) {
			t.Errorf("the device is left: %v", err)
		}
	}
}

// TestSnapshotBadInput: each is refused, and leaves nothing behind.
func TestSnapshotBadInput(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	h.snapshot(id, "monday")
	other := h.add(api.AttachRequest{Image: "mem:vm2", ID: -1, Lease: time.Hour})
	withdraw := w.askSnapshot("vm2", "monday")
	for _, c := range []struct {
		image    string
		readOnly bool
		want     string
	}{
		{"mem:vm2@monday", true, "asked for"},
		{"mem:vm1@monday", false, "with --read-only alone"},
		{"mem:vm1@none", true, "no such snapshot: see lsdctl snap ls mem:vm1"},
		{"mem:none@monday", true, "mem:none: no such image"},
		{"mem:vm1@", true, "empty snapshot name"},
		{"mem:vm1@a@b", true, "bad snapshot name"},
	} {
		_, err := h.attachReq(api.AttachRequest{Image: c.image, ID: -1, ReadOnly: c.readOnly})
		if err == nil || !strings.Contains(api.OneLine(err), c.want) {
			t.Errorf("%s: %v does not say %q", c.image, err, c.want)
		}
	}
	withdraw()
	if r, l := h.files(); r != 2 || l != 2 || len(h.all()) != 2 {
		t.Errorf("%d records, %d logs, %d attached", r, l, len(h.all()))
	}
	// An image that is not open does nothing, and says so.
	w.outage.Set(true)
	h.crash()
	h.start()
	h.await(other, api.StateRecovering)
	if err := h.find(other).refresh(context.Background(), func(api.Progress) {}); err == nil || !strings.Contains(err.Error(), "is not open") {
		t.Errorf("refresh: %v", err)
	}
	w.outage.Set(false)
	h.await(other, api.StateActive)
}

// TestClash: a snapshot can be beside anything.
func TestClash(t *testing.T) {
	a, b, snap := uuid.New(), uuid.New(), uuid.New()
	rw, ro := record{ImageID: a, Log: "/a"}, record{ImageID: a, ReadOnly: true}
	s := record{ImageID: a, Snapshot: snap, ReadOnly: true}
	for _, c := range []struct {
		a, b record
		want bool
	}{
		{rw, rw, true}, {rw, ro, true}, {ro, ro, false}, {rw, s, false}, {ro, s, false}, {s, s, false},
		{rw, record{ImageID: b, Log: "/b"}, false}, {rw, record{ImageID: b, Log: "/a"}, true},
		{record{Null: true}, record{Null: true}, false},
	} {
		if got, back := c.a.clash(&c.b), c.b.clash(&c.a); got != c.want || back != c.want {
			t.Errorf("%+v beside %+v: %v, %v", c.a, c.b, got, back)
		}
	}
}

// TestSnapshotRecord: a daemon that knows no snapshots refuses the record of one, and one
// that is not as this daemon writes it is refused here.
func TestSnapshotRecord(t *testing.T) {
	rs := records{t.TempDir()}
	for id, r := range []record{{}, {Snapshot: uuid.New()}} {
		r.ID = id
		if err := rs.save(r); err != nil {
			t.Fatal(err)
		}
		got, err := readRecord(rs.path(id))
		if err != nil || got.Snapshot != r.Snapshot || got.Version != id+1 {
			t.Errorf("%+v, %v", got, err)
		}
		got.Version = 2 - id
		b, err := json.Marshal(got)
		if err == nil {
			err = os.WriteFile(rs.path(id), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readRecord(rs.path(id)); err == nil {
			t.Errorf("version %d was read: %s", got.Version, b)
		}
	}
}
