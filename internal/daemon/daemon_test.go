package daemon

import (
	"cmp"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

func TestAttachDetach(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 7)
	if res := w.kernel.do(t, id, engine.Flush, 0, nil); res != 0 {
		t.Errorf("flush: %d", res)
	}
	if res := w.kernel.do(t, id, engine.Read, 64<<20/512, make([]byte, 512)); res != -int32(unix.EINVAL) {
		t.Errorf("read beyond the end: %d", res)
	}
	if im := h.await(id, api.StateActive); im.Stats.Writes != 1 || im.Size != 64<<20 || im.BlockSize != 4096 {
		t.Errorf("status: %+v", im)
	}
	if _, err := h.attachReq(api.AttachRequest{ID: -1}); err == nil || !strings.Contains(err.Error(), "attached here already") {
		t.Errorf("second attach: %v", err)
	}
	if other := h.add(api.AttachRequest{ID: -1, Image: "mem:vm2"}); other == id {
		t.Errorf("two images are device %d", id)
	}
	w.kernel.hold(id, "mount /mnt")
	var busy *ublk.BusyError
	if _, err := h.del(id, api.DetachRequest{}); !errors.As(err, &busy) {
		t.Errorf("detach while mounted: %v", err)
	}
	w.kernel.hold(id)
	w.kernel.check(t, id, 8, 7)
	if done, err := h.del(id, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
		t.Errorf("detach: %v, %v", done, err)
	}
	if r, l := h.files(); r != 1 || l != 1 {
		t.Errorf("%d records and %d logs are left, want those of vm2", r, l)
	}
	if id = h.add(api.AttachRequest{ID: 5}); id != 5 {
		t.Errorf("device %d, want 5", id)
	}
	w.kernel.check(t, id, 8, 7)
}

// TestTakeUp: a daemon that follows a dead one recovers the devices; after a boot
// it makes them again.
func TestTakeUp(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: 3})
	null := h.add(api.AttachRequest{ID: -1, Null: true})
	for i := range 5 {
		w.kernel.write(t, id, 8, byte(i))
		h.crash()
		if d, err := w.kernel.get(id); err != nil || d.getState() != ublk.StateQuiesced {
			t.Fatalf("the device is gone with its daemon: %v", err)
		}
		h.start()
		w.kernel.check(t, id, 8, byte(i))
	}
	h.await(null, api.StateActive)
	w.kernel.write(t, id, 8, 99)
	h.crash()
	w.kernel.devs = map[int]*fakeDevice{}
	h.boot = uuid.New()
	h.start()
	w.kernel.check(t, id, 8, 99)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Error(err)
	}
}

// TestHalfMade: a daemon died while it attached.
func TestHalfMade(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	a := h.find(id)
	rewrite := func() {
		if err := a.save(func(r *record) { r.Phase = phaseAttaching }); err != nil {
			t.Fatal(err)
		}
	}
	for name, spoil := range map[string]func(){
		"no device yet":   func() { _ = w.kernel.Delete(context.Background(), id) },
		"not started yet": func() { _ = w.kernel.Stop(context.Background(), id, true) },
		"just started":    func() {},
	} {
		rewrite()
		h.crash()
		spoil()
		h.start()
		h.await(id, api.StateActive)
		w.kernel.write(t, id, 8, 1)
		w.kernel.check(t, id, 8, 1)
		if a = h.find(id); a.record().Phase != phaseAttached {
			t.Errorf("%s: phase %s", name, a.record().Phase)
		}
	}

	// Another host has the image by now, so it will never be: nothing is left.
	rewrite()
	h.crash()
	_ = w.kernel.Delete(context.Background(), id)
	other := w.newHost()
	theirs := other.add(api.AttachRequest{ID: -1, Force: true})
	h.start()
	if theirs != id {
		t.Fatalf("device %d, want %d", theirs, id)
	}
	// The number is the other host's now: its device must stay.
	h.await(id, api.StateRecovering)
	w.kernel.write(t, theirs, 8, 2)
	if _, err := other.del(theirs, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
}

func TestHalfMadeForGood(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: 7})
	if err := h.find(id).save(func(r *record) { r.Phase = phaseAttaching }); err != nil {
		t.Fatal(err)
	}
	h.crash()
	_ = w.kernel.Stop(context.Background(), id, true)
	other := w.newHost()
	other.add(api.AttachRequest{ID: 8, Force: true})
	h.start()
	h.await(id, "absent")
	if r, _ := h.files(); r != 0 {
		t.Errorf("%d records are left", r)
	}
	if _, err := w.kernel.get(id); !errors.Is(err, ublk.ErrNoDevice) {
		t.Errorf("the device is left: %v", err)
	}
}

// TestHalfMadeLog: a daemon died before it had made the write log of what it attached.
func TestHalfMadeLog(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: 7})
	rec := h.find(id).record()
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	rec.Phase = phaseAttaching
	if err := h.records.save(rec); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.start()
	h.await(id, "absent")
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	h.add(api.AttachRequest{ID: 7})
}

// TestTakenUnwritten: while a host's daemon was dead, another had the image, and has
// let go of it. Its users get errors although their log, which held nothing, is as good
// as any, also when the take-up that finds it out fails, and by every later daemon.
func TestTakenUnwritten(t *testing.T) {
	for _, fails := range []int32{0, 1} {
		w := newWorld(t)
		a, b := w.newHost(), w.newHost()
		id := a.add(api.AttachRequest{ID: -1})
		a.crash()
		theirs := b.add(api.AttachRequest{ID: -1, Force: true})
		w.kernel.write(t, theirs, 8, 2)
		if _, err := b.del(theirs, api.DetachRequest{}); err != nil {
			t.Fatal(err)
		}
		w.lost.Store(fails)
		for range 3 {
			a.start()
			if im := a.await(id, api.StateFailed); !strings.Contains(im.Error, errTaken.Error()) {
				t.Errorf("status: %+v", im)
			}
			if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
				t.Errorf("read: %d", res)
			}
			a.crash()
		}
		a.start()
		a.await(id, api.StateFailed)
		if _, err := a.del(id, api.DetachRequest{}); err != nil {
			t.Error(err)
		}
		id = a.add(api.AttachRequest{ID: -1})
		w.kernel.check(t, id, 8, 2)
	}
}

// TestWrongLog: in place of the log there is something else, until that is put right.
func TestWrongLog(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	log := h.find(id).record().Log
	h.crash()
	right, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, make([]byte, len(right)), 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	if im := h.await(id, api.StateFailed); !strings.Contains(im.Error, "is attached by") {
		t.Errorf("status: %+v", im)
	}
	h.crash()
	if err := os.WriteFile(log, right, 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.await(id, api.StateActive)
	w.kernel.check(t, id, 8, 1)
}

// TestPanic: a reactor dies under an image, and another takes its place.
func TestPanic(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id, other := h.add(api.AttachRequest{ID: -1}), h.add(api.AttachRequest{ID: -1, Image: "mem:vm2"})
	for i := range 3 {
		w.kernel.write(t, id, 16, byte(i))
		d, err := w.kernel.get(id)
		if err != nil {
			t.Fatal(err)
		}
		d.reactor.Post(func() { panic("test") })
		<-d.reactor.Done()
		w.kernel.write(t, other, 8, byte(i))
		w.kernel.check(t, id, 16, byte(i))
	}
	if im := h.await(id, api.StateActive); im.Restarts != 3 {
		t.Errorf("%d restarts, want 3", im.Restarts)
	}
	if im := h.await(other, api.StateActive); im.Restarts != 0 {
		t.Errorf("%d restarts of the other image", im.Restarts)
	}
}

// TestStoreDown: a detach waits, gives up, and with force leaves the rest in the
// log, from which the next attach goes on.
func TestStoreDown(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, StoreTimeout: time.Second})
	w.kernel.write(t, id, 8, 1)
	w.outage.Set(true)
	_, err := h.del(id, api.DetachRequest{Timeout: 300 * time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "not in the store yet") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("detach: %v", err)
	}
	w.kernel.write(t, id, 16, 2) // it still serves
	im := h.await(id, api.StateActive)
	if !im.Stats.StoreDown || len(im.Advice) == 0 {
		t.Errorf("status does not tell: %+v", im)
	}

	// A daemon that starts now has to wait; the device waits with it.
	h.crash()
	h.start()
	im = h.await(id, api.StateRecovering)
	if d, err := w.kernel.get(id); err != nil || d.getState() != ublk.StateQuiesced {
		t.Errorf("the device does not wait: %v", err)
	}
	if _, err := h.del(id, api.DetachRequest{}); err == nil {
		t.Error("an image that is not open was detached")
	}
	w.outage.Set(false)
	w.kernel.check(t, id, 16, 2)
	h.await(id, api.StateActive)

	w.outage.Set(true)
	w.kernel.write(t, id, 24, 3)
	done, err := h.del(id, api.DetachRequest{Timeout: 200 * time.Millisecond, Force: true})
	if err != nil || len(done.Remarks) != 1 || !strings.Contains(done.Remarks[0], ".log is kept") {
		t.Errorf("detach by force: %v, %v", done, err)
	}
	if r, l := h.files(); r != 0 || l != 1 {
		t.Errorf("%d records and %d logs are left, want one log", r, l)
	}
	w.outage.Set(false)
	id = h.add(api.AttachRequest{ID: -1})
	for i := range 3 {
		w.kernel.check(t, id, uint64(8+8*i), byte(1+i))
	}
}

// TestStoreHangs: a store that takes calls and does not answer shows in the status of
// what is being taken up, which goes on by itself when it answers.
func TestStoreHangs(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, StoreTimeout: 50 * time.Millisecond})
	w.kernel.write(t, id, 8, 1)
	h.crash()
	w.hang.Shut()
	h.start()
	for im := h.await(id, api.StateRecovering); !strings.Contains(im.Error, "no answer within"); time.Sleep(5 * time.Millisecond) {
		im = h.await(id, api.StateRecovering)
	}
	w.hang.Open()
	w.kernel.check(t, id, 8, 1)
	h.await(id, api.StateActive)
}

// TestDamagedAnswers: damage that a take-up meets in the store counts when it is there
// again and again.
func TestDamagedAnswers(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if err := h.find(id).flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	h.crash()
	w.damage.Store(damagedTries - 1) // each ends an attempt
	h.start()
	w.kernel.check(t, id, 8, 1)
	h.await(id, api.StateActive)
	if left := w.damage.Load(); left > 0 {
		t.Errorf("%d answers fewer were damaged than were to be", left)
	}
	h.crash()
	w.damage.Store(1 << 30)
	h.start()
	if im := h.await(id, api.StateFailed); !strings.Contains(im.Error, "corrupt") {
		t.Errorf("status: %+v", im)
	}
	if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("read: %d", res)
	}
}

// TestPanicInOpen: an image that nobody can open without a panic is damaged, and the
// others never notice.
func TestPanicInOpen(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	other := h.add(api.AttachRequest{ID: -1, Image: "mem:vm2"})
	w.kernel.write(t, id, 8, 1)
	w.kernel.write(t, other, 8, 2)
	bad := h.find(id).record().ImageID.String()
	h.crash()
	w.bad.Store(bad)
	h.start()
	h.await(id, api.StateFailed)
	if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("read: %d", res)
	}
	w.kernel.check(t, other, 8, 2)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := h.attachReq(api.AttachRequest{ID: -1}); err == nil || !strings.Contains(err.Error(), "panic") {
		t.Errorf("attach: %v", err)
	}
	if h.find(id) != nil {
		t.Error("it is attached")
	}
	w.bad.Store("") // the store or the daemon has been mended
	w.kernel.check(t, h.add(api.AttachRequest{ID: -1}), 8, 1)
}

// TestDetachGoesOn: the store goes away between the destage and the close.
func TestDetachGoesOn(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	a := h.find(id)
	if err := a.flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	w.outage.Set(true)
	ctx, stop := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer stop()
	_, err := a.detach(ctx, api.DetachRequest{}, func(api.Progress) {})
	if err == nil || !strings.Contains(err.Error(), "goes on") {
		t.Fatalf("detach: %v", err)
	}
	h.await(id, api.StateDetaching)
	// The next daemon knows that it is to be detached.
	h.crash()
	h.start()
	w.outage.Set(false)
	h.await(id, "absent")
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	id = h.add(api.AttachRequest{ID: -1})
	w.kernel.check(t, id, 8, 1)
}

// TestTwoHosts: an image is refused, taken by force, and errors tell its users.
func TestTwoHosts(t *testing.T) {
	w := newWorld(t)
	a, b := w.newHost(), w.newHost()
	id := a.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	_, err := b.attachReq(api.AttachRequest{ID: -1})
	var owned *engine.OwnedError
	if !errors.As(err, &owned) || owned.Host != a.cfg.Host {
		t.Errorf("second host: %v", err)
	}
	if r, l := b.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	theirs := b.add(api.AttachRequest{ID: -1, Force: true})
	w.kernel.check(t, theirs, 8, 1)
	if im := a.await(id, engine.Released.String()); !strings.Contains(im.Error, b.cfg.Host) {
		t.Errorf("status: %+v", im)
	}
	if res := w.kernel.do(t, id, engine.Write, 0, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("write on the first host: %d", res)
	}
	if done, err := a.del(id, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
		t.Errorf("detach: %v, %v", done, err)
	}
	if r, l := a.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
}

// TestTakenMeanwhile: while a host's daemon was dead, another had the image. Its
// users get errors, whether or not the other has let go.
func TestTakenMeanwhile(t *testing.T) {
	for _, released := range []bool{false, true} {
		for _, dirty := range []bool{false, true} {
			w := newWorld(t)
			a, b := w.newHost(), w.newHost()
			id := a.add(api.AttachRequest{ID: -1})
			w.kernel.write(t, id, 8, 1)
			if err := a.find(id).flush(context.Background(), func(api.Progress) {}); err != nil {
				t.Fatal(err)
			}
			if dirty {
				w.kernel.write(t, id, 16, 1)
			}
			a.crash()
			theirs := b.add(api.AttachRequest{ID: -1, Force: true})
			w.kernel.write(t, theirs, 8, 2)
			if released {
				if _, err := b.del(theirs, api.DetachRequest{}); err != nil {
					t.Fatal(err)
				}
			}
			a.start()
			a.await(id, api.StateFailed)
			if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
				t.Errorf("read: %d", res)
			}
			if _, err := a.del(id, api.DetachRequest{}); err != nil {
				t.Errorf("detach: %v", err)
			}
			if r, l := a.files(); r != 0 || l != 1 {
				t.Errorf("%d records and %d logs are left, want the log", r, l)
			}
			_, err := a.attachReq(api.AttachRequest{ID: -1})
			var stale *engine.StaleLogError
			switch {
			case dirty && !errors.As(err, &stale), dirty && !strings.Contains(err.Error(), "salvage"):
				t.Errorf("attach with a log that holds more: %v", err)
			case !dirty && released && err != nil:
				t.Errorf("attach: %v", err)
			}
		}
	}
}

// TestLogGone: the log's file system is not mounted yet.
func TestLogGone(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	h.crash()
	cache := filepath.Join(h.dir, "cache")
	if err := os.Rename(cache, cache+"2"); err != nil {
		t.Fatal(err)
	}
	h.start()
	var im api.Image
	for !strings.Contains(im.Error, "write log is not there") {
		im = h.await(id, api.StateRecovering)
	}
	if err := os.Rename(cache+"2", cache); err != nil {
		t.Fatal(err)
	}
	w.kernel.check(t, id, 8, 1)

	h.crash()
	if err := os.RemoveAll(cache); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.await(id, api.StateRecovering)
	if _, err := h.del(id, api.DetachRequest{Force: true}); err != nil {
		t.Error(err)
	}
	h.add(api.AttachRequest{ID: -1, Force: true})
}

// TestAddFails: the kernel refuses the device; then everything is as before.
func TestAddFails(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	w.kernel.addErr = unix.ENOMEM
	if _, err := h.attachReq(api.AttachRequest{ID: -1}); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("attach: %v", err)
	}
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	info, err := engine.Describe(context.Background(), w.store, "vm1")
	if err != nil || info.Owner != nil {
		t.Errorf("the image is owned: %+v, %v", info.Owner, err)
	}
	if len(h.all()) != 0 {
		t.Error("something is attached")
	}
	// Another program takes the number between the look and the Add.
	w.kernel.addErr = unix.EEXIST
	if im, err := h.attachReq(api.AttachRequest{ID: -1}); err != nil || im.ID != 1 {
		t.Errorf("attach: device %d, %v", im.ID, err)
	}
}

// TestAttachCancelled: the user gives up while the log is being made, or later.
func TestAttachCancelled(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for _, step := range []string{"making the write log", "recovering"} {
		ctx, stop := context.WithCancel(context.Background())
		_, err := h.attach(ctx, api.AttachRequest{Image: "mem:vm1", ID: -1, LogSize: 66 << 20, LogMemory: 16 << 20}, func(p api.Progress) {
			if strings.HasPrefix(p.What, step) {
				stop()
			}
		})
		stop()
		if err == nil {
			t.Errorf("%s: attached", step)
		}
		info, derr := engine.Describe(context.Background(), w.store, "vm1")
		if derr != nil {
			t.Fatal(derr)
		}
		// An ownership that could not be given back keeps its log.
		logs := 0
		if info.Owner != nil {
			logs = 1
		}
		if r, l := h.files(); r != 0 || l != logs || len(h.all()) != 0 {
			t.Errorf("%s: %d records and %d logs are left, want 0 and %d: %v", step, r, l, logs, err)
		}
	}
	id := h.add(api.AttachRequest{ID: -1}) // whatever is left is no hindrance
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Error(err)
	}
}

// TestNotify: systemd is told, where it asks to be.
func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("systemd was told %q, %v", b[:n], err)
	}
}

func TestAttachBadInput(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(t.TempDir(), "cache")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := engine.Describe(context.Background(), w.store, "vm2")
	if err != nil {
		t.Fatal(err)
	}
	this, err := engine.Describe(context.Background(), w.store, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	id := h.add(api.AttachRequest{ID: -1, Image: "mem:vm2", Cache: foreign})
	w.outage.Set(true)
	w.kernel.write(t, id, 8, 1)
	if _, err := h.del(id, api.DetachRequest{Force: true, Timeout: 10 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	w.outage.Set(false)
	if err := os.Rename(filepath.Join(foreign, other.ID.String()+".log"), filepath.Join(foreign, this.ID.String()+".log")); err != nil {
		t.Fatal(err)
	}
	r0, l0 := h.files()
	for _, c := range []struct {
		q    api.AttachRequest
		want string
	}{
		{api.AttachRequest{Image: "mem:none"}, "no such image"},
		{api.AttachRequest{Image: "none"}, "not a URL"},
		{api.AttachRequest{Cache: "/none/at/all"}, "is not there"},
		{api.AttachRequest{Cache: "relative"}, "absolute"},
		{api.AttachRequest{Cache: file}, "neither"},
		{api.AttachRequest{Cache: "/proc"}, "log"},
		{api.AttachRequest{Cache: foreign}, "another image"},
		{api.AttachRequest{LogSize: 1 << 20}, "write log of"},
		{api.AttachRequest{LogSize: 1 << 50}, "write log of"},
		{api.AttachRequest{LogMemory: 1 << 20}, "memory"},
		{api.AttachRequest{Queues: -1}, "queues"},
		{api.AttachRequest{Depth: 5000}, "depth"},
		{api.AttachRequest{Lease: time.Millisecond}, "lease"},
		{api.AttachRequest{Size: 5}, "null"},
		{api.AttachRequest{Null: true, Size: 5}, "multiple"},
		{api.AttachRequest{ID: 1 << 20}, "device number 1048576"},
		{api.AttachRequest{ID: 1 << 32}, "device number 4294967296"},
		{api.AttachRequest{ID: -2}, "device number -2"},
	} {
		c.q.ID = cmp.Or(c.q.ID, -1)
		_, err := h.attachReq(c.q)
		if err == nil {
			t.Errorf("%+v: no error", c.q)
		} else if s := api.OneLine(err); !strings.Contains(s, c.want) {
			t.Errorf("%+v: %q does not say %q", c.q, s, c.want)
		}
	}
	if r, l := h.files(); r != r0 || l != l0 || len(h.all()) != 0 {
		t.Errorf("%d records, %d logs, %d attached", r, l, len(h.all()))
	}
	if info, err := engine.Describe(context.Background(), w.store, "vm1"); err != nil || info.Owner != nil {
		t.Errorf("the image is owned: %+v, %v", info, err)
	}
}

// TestLeave: the daemon is told to end.
func TestLeave(t *testing.T) {
	for _, detach := range []bool{false, true} {
		w := newWorld(t)
		h := w.newHost()
		id, busy := h.add(api.AttachRequest{ID: -1}), h.add(api.AttachRequest{ID: -1, Image: "mem:vm2"})
		w.kernel.write(t, id, 8, 1)
		w.kernel.hold(busy, "mount /mnt")
		remarks := h.leave(exitRequest{detach: detach, timeout: 5 * time.Second, progress: func(api.Progress) {}})
		if want := map[bool]int{true: 1}[detach]; len(remarks) != want {
			t.Errorf("remarks: %v", remarks)
		}
		if _, err := h.attachReq(api.AttachRequest{ID: -1, Null: true}); !errors.Is(err, errEnding) {
			t.Errorf("attach while the daemon ends: %v", err)
		}
		r, _ := h.files()
		if want := map[bool]int{false: 2, true: 1}[detach]; r != want {
			t.Errorf("detach %v: %d records are left, want %d", detach, r, want)
		}
		info, err := engine.Describe(context.Background(), w.store, "vm1")
		if err != nil || (info.Owner == nil) != detach {
			t.Errorf("detach %v: owner %+v, %v", detach, info.Owner, err)
		}
	}
}

// TestRecords: what a crash can leave does not keep the rest from being read.
func TestRecords(t *testing.T) {
	rs := records{filepath.Join(t.TempDir(), "attachments")}
	if list, err := rs.load(nil); err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	for id := range 3 {
		if err := rs.save(record{ID: id, URL: "mem:x", Phase: phaseAttached}); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"1.json.new": `{"version":1,"id":1,"im`, "4.json": "{", "5.json": `{"version":99,"id":5}`, "6.json": `{"version":1,"id":7}`, "README": "",
	} {
		if err := os.WriteFile(filepath.Join(rs.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var bad []string
	list, err := rs.load(func(path string, err error) { bad = append(bad, filepath.Base(path)) })
	if err != nil || len(list) != 3 || strings.Join(bad, " ") != "4.json 5.json 6.json" {
		t.Errorf("%d records, bad: %v, %v", len(list), bad, err)
	}
	if _, err := os.Stat(filepath.Join(rs.dir, "1.json.new")); !os.IsNotExist(err) {
		t.Errorf("the half-written file is left: %v", err)
	}
	if err := errors.Join(rs.remove(1), rs.remove(1)); err != nil {
		t.Error(err)
	}
}

// TestSecondDaemon: the second daemon on a state directory says who has it.
func TestSecondDaemon(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	_, err := newDaemon(Config{StateDir: h.dir, Socket: "/x"})
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "process") {
		t.Errorf("second daemon: %v", err)
	}
}

// TestSocketPlace: what a dead daemon has left at the socket's place is removed, and
// nothing else.
func TestSocketPlace(t *testing.T) {
	dir := t.TempDir()
	d := &Daemon{cfg: Config{Socket: filepath.Join(dir, "s")}}
	for range 2 { // the second finds the socket of the first
		ln, err := listen(d.cfg.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := listen(d.cfg.Socket); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "another lsdd listens") {
			t.Errorf("beside another: %v", err)
		}
		ln.Close()
	}
	file, empty := filepath.Join(dir, "file"), filepath.Join(dir, "empty")
	if err := errors.Join(os.WriteFile(file, []byte("x"), 0o600), os.Mkdir(empty, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, empty} {
		d.cfg.Socket = path
		if _, err := listen(d.cfg.Socket); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "not a socket") {
			t.Errorf("%s: %v", path, err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode()&os.ModeSocket != 0 {
			t.Errorf("%s is gone: %v", path, err)
		}
	}
}

// TestFrontAllocs: nothing is allocated for a read or a write on their way from
// the device to the engine and back.
func TestFrontAllocs(t *testing.T) {
	frontAllocs(t, api.AttachRequest{ID: -1}, func(s *slot, buf []byte) int32 {
		s.req.Op, s.req.Sector, s.req.Sectors, s.req.Buf = engine.Read, 8, 8, buf
		return 4096 // from memory: it ends at once
	})
}

// frontAllocs ends that nothing is allocated for a request of a device that is attached so, which ask
// makes of a slot. It ends at once, with the result that ask returns.
func frontAllocs(t *testing.T, q api.AttachRequest, ask func(s *slot, buf []byte) int32) {
	t.Helper()
	w := newWorld(t)
	h := w.newHost()
	id := h.add(q)
	w.kernel.write(t, id, 8, 1)
	d, err := w.kernel.get(id)
	if err != nil {
		t.Fatal(err)
	}
	arena, err := uring.NewArena(4096)
	if err != nil {
		t.Fatal(err)
	}
	io := make(fakeIO, 1)
	allocs := 1.0
	if err := d.reactor.Call(func() {
		s := &d.handler.(*front).slots[1]
		allocs = testing.AllocsPerRun(100, func() {
			s.io = io
			want := ask(s, arena.Bytes())
			s.front.submit(s)
			if res := <-io; res != want {
				t.Errorf("%d, want %d", res, want)
			}
		})
	}); err != nil {
		t.Fatal(err)
	}
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// lateKernel is a kernel that does not let go of the old server for some attempts to
// recover a device.
type lateKernel struct {
	*fakeKernel
	busy atomic.Int32 // attempts, of any device
}

func (k *lateKernel) Recover(ctx context.Context, id int) (device, error) {
	if k.busy.Add(-1) >= 0 {
		return nil, unix.EBUSY
	}
	return k.fakeKernel.Recover(ctx, id)
}

// TestFailsLater: an image cannot be taken up for good, and its device can be recovered
// only a while later. Its users get errors then.
func TestFailsLater(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if err := h.find(id).flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	h.crash()
	w.damage.Store(1 << 30)
	w.late = 2
	h.start()
	h.await(id, api.StateFailed)
	if res := w.kernel.do(t, id, engine.Read, 8, make([]byte, 4096)); res != -int32(unix.EIO) {
		t.Errorf("read: %d", res)
	}
}

// TestUnreadableRecord: the number of a record that this daemon cannot read, as of a newer
// one, is not given to another attachment.
func TestUnreadableRecord(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	path, text := h.records.path(0), `{"version":99,"id":0}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if id := h.add(api.AttachRequest{ID: -1}); id != 1 {
		t.Errorf("device %d", id)
	}
	if _, err := h.attachReq(api.AttachRequest{ID: 0, Image: "mem:vm2"}); err == nil || !strings.Contains(err.Error(), "in the records") {
		t.Errorf("asked for by its number: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != text {
		t.Errorf("the record: %q, %v", b, err)
	}
}

// lateContext calls fn when its user has begun to wait for the nth time.
type lateContext struct {
	context.Context
	n  atomic.Int32
	fn func()
}

func (c *lateContext) Done() <-chan struct{} {
	if c.n.Add(-1) == 0 {
		c.fn()
	}
	return nil
}

// TestHungReactors: a list names those that do not answer, beside the others; all of them
// are asked before one is waited for.
func TestHungReactors(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	release := make(chan struct{})
	var ids []int
	for _, name := range []string{"mem:vm1", "mem:vm2"} {
		ids = append(ids, h.add(api.AttachRequest{ID: -1, Image: name}))
	}
	ids = append(ids, h.add(api.AttachRequest{ID: -1, Null: true}))
	for _, id := range ids {
		h.find(id).getDisk().reactor.Post(func() { <-release })
	}
	all := &lateContext{Context: context.Background(), fn: func() { close(release) }}
	all.n.Store(int32(len(ids)))
	for _, im := range h.describeAll(all) {
		if im.State != api.StateActive {
			t.Errorf("%s is %s (%s): its reactor was not asked beside the others", im.URL, im.State, im.Error)
		}
	}
	later := make(chan struct{})
	h.find(ids[0]).getDisk().reactor.Post(func() { <-later })
	list := h.describeAll(context.Background())
	if len(list) != 3 || list[0].State != api.StateHung || list[1].State != api.StateActive || list[1].Stats == nil || list[2].State != api.StateActive {
		t.Errorf("the list is %+v", list)
	}
	close(later)
	for _, id := range ids {
		h.await(id, api.StateActive)
	}
}
