package daemon

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

var vm1 = api.AttachRequest{ID: -1, Image: libraryURL + "/vm1"}

// reader returns a client that has vm1 open read-only.
func (h *host) reader() *libraryClient {
	h.w.t.Helper()
	return h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
}

// alone makes sure that there is one attachment, of that number, and returns its record.
func (h *host) alone(id int) record {
	h.w.t.Helper()
	all := h.all()
	if len(all) != 1 || all[0].id != id {
		h.w.t.Fatalf("there are %d attachments, the first is %v", len(all), all)
	}
	if n, _ := h.files(); n != 1 {
		h.w.t.Errorf("%d records of one attachment", n)
	}
	return all[0].record()
}

// unowned makes sure that nobody owns vm1, and that this host has no log of it.
func (h *host) unowned() {
	h.w.t.Helper()
	info, err := engine.Describe(context.Background(), h.w.store, "vm1")
	if _, logs := h.files(); err != nil || info.Owner != nil || logs != 0 {
		h.w.t.Errorf("owned by %v, with %d logs: %v", info.Owner, logs, err)
	}
}

// finish closes the last client of what is attached as id, and detaches it.
func (h *host) finish(c *libraryClient, id int) {
	h.w.t.Helper()
	if err := c.close(); err != nil {
		h.w.t.Fatal(err)
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		h.w.t.Fatal(err)
	}
}

// reading reads without end, beside what the test does, until it is told to stop, and fails the
// test if a read fails or has anything but one byte, which never becomes smaller.
func (c *libraryClient) reading(off uint64) (stop func()) {
	ctx, end := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		var last byte
		got := make([]byte, 3000)
		for ctx.Err() == nil {
			if err := c.do(ringtest.Read, off, got); err != 0 {
				c.t.Errorf("read: %v", err)
				return
			}
			if got[0] != got[2999] || got[0] < last {
				c.t.Errorf("read: %d to %d, %d before", got[0], got[2999], last)
			}
			last = got[0]
		}
	})
	return func() { end(); done.Wait() }
}

// TestReadersLetWriterIn: handles that read do not keep away one that writes, and see what it
// writes; they stay read-only.
func TestReadersLetWriterIn(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	readers := []*libraryClient{h.reader(), h.reader()}
	var stops []func()
	for _, r := range readers {
		stops = append(stops, r.reading(4000))
	}
	c := h.handle(wire.OpenRequest{})
	other := h.handle(wire.OpenRequest{})
	for i := range byte(20) {
		c.write(4000, 3000, i+1)
	}
	for _, stop := range stops {
		stop()
	}
	other.write(100, 100, 77)
	for _, r := range readers {
		r.check(4000, 3000, 20)
		r.check(100, 100, 77)
		if err := r.do(ringtest.Write, 0, make([]byte, 512)); err != unix.EROFS {
			t.Errorf("write through a read-only handle: %v", err)
		}
		if r.call(wire.Stat, nil, &wire.StatResult{}) != nil || r.Size() != 64<<20 {
			t.Errorf("%d bytes", r.Size())
		}
	}
	if rec := h.alone(firstDoor); rec.ReadOnly || rec.Log == "" || rec.LogID == uuid.Nil {
		t.Errorf("the record: %+v", rec)
	}
	if im := h.await(firstDoor, api.StateActive); im.ReadOnly || len(im.Clients) != 4 || im.Restarts != 0 {
		t.Errorf("it is %+v", im)
	}
	for _, c := range append(readers, c, other) {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.del(firstDoor, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	h.unowned()
}

// TestReadersStay: where a writer cannot be let in, everything is as before.
func TestReadersStay(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.cfg.LibraryLogSize = 66 << 20
	r := h.reader()
	stays := func(err error, want syscall.Errno) {
		t.Helper()
		errnoIs(t, err, want)
		r.check(0, 512, 0)
		if rec := h.alone(firstDoor); !rec.ReadOnly || rec.Log != "" || rec.Phase != phaseAttached {
			t.Errorf("the record: %+v", rec)
		}
		h.await(firstDoor, api.StateActive)
	}
	other := w.newHost()
	other.share()
	owner := other.handle(wire.OpenRequest{})
	stays(h.client().open(wire.OpenRequest{}), unix.EBUSY)
	other.finish(owner, firstDoor)
	h.unowned()
	// The client finds the image, and the store fails when it is opened.
	a, ctx := h.door(), context.Background()
	w.outage.Set(true)
	if err := a.turnWritable(ctx); err == nil {
		t.Error("it can be written to without a store")
	}
	w.outage.Set(false)
	h.unowned()

	cache := filepath.Join(h.dir, "cache")
	if err := os.RemoveAll(cache); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cache, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stays(h.client().open(wire.OpenRequest{}), unix.EEXIST)
	if err := os.Remove(cache); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(h.records.dir, h.records.dir+"-away"); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.ENOENT)
	if err := os.Rename(h.records.dir+"-away", h.records.dir); err != nil {
		t.Fatal(err)
	}
	stays(&wire.Error{}, 0)
	h.unowned()

	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 512, 1)
	r.check(0, 512, 1)
}

// TestReadersOfDevice: a read-only device cannot be made to be written to under its users; who wants
// to write is told who has it.
func TestReadersOfDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	q := vm1
	q.ReadOnly = true
	id := h.add(q)
	r := h.reader()
	err := h.client().open(wire.OpenRequest{})
	errnoIs(t, err, unix.EBUSY)
	if !strings.Contains(err.Error(), "/dev/ublkb0") {
		t.Errorf("who has it: %v", err)
	}
	if _, err := h.attachReq(vm1); !errors.Is(err, errAttached) || !strings.Contains(err.Error(), "/dev/ublkb0") {
		t.Errorf("attached beside a read-only device: %v", err)
	}
	r.check(0, 512, 0)
	if rec := h.alone(id); !rec.ReadOnly || rec.Log != "" {
		t.Errorf("the record: %+v", rec)
	}
}

// TestReadersMoveToDevice: handles that read move to a device that is attached, and see what is
// written to it.
func TestReadersMoveToDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	r := h.reader()
	stop := r.reading(4096)
	id := h.add(vm1)
	for i := range byte(20) {
		w.kernel.write(t, id, 8, i+1)
	}
	stop()
	r.check(4096, 4096, 20)
	if rec := h.alone(id); rec.ReadOnly {
		t.Errorf("the record: %+v", rec)
	}
	if err := r.call(wire.Stat, nil, &wire.StatResult{}); err != nil {
		t.Error(err)
	}
	if err := r.call(wire.ListSnapshots, nil, &wire.SnapshotList{}); err != nil {
		t.Error(err)
	}
	if _, err := h.find(id).resize(context.Background(), api.ResizeRequest{Size: 65 << 20}, func(api.Progress) {}); err != nil || r.Size() != 65<<20 {
		t.Errorf("resized: %v; the handle has %d bytes", err, r.Size())
	}
	var busy *ublk.BusyError
	if _, err := h.del(id, api.DetachRequest{}); !errors.As(err, &busy) {
		t.Errorf("detached under a client: %v", err)
	}
	w.kernel.write(t, id, 8, 21)
	w.kernel.devs[id].reactor.Post(func() { panic("test") })
	r.check(4096, 4096, 21)
	h.finish(r, id)
	h.unowned()
}

// TestReadersNotMoved: where the device cannot be made, everything is as before.
func TestReadersNotMoved(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	r := h.reader()
	stays := func(what string, q api.AttachRequest) {
		t.Helper()
		if _, err := h.attachReq(q); err == nil {
			t.Errorf("%s: it is attached", what)
		}
		r.check(0, 512, 0)
		if rec := h.alone(firstDoor); !rec.ReadOnly || rec.Log != "" || rec.LogSize != DefaultLogSize {
			t.Errorf("%s: the record: %+v", what, rec)
		}
		h.await(firstDoor, api.StateActive)
	}
	w.kernel.addErr = errors.New("no memory")
	stays("no device", vm1)
	h.unowned()
	w.kernel.put(ublk.Params{ID: 7}, ublk.StateDead, 1)
	q := vm1
	q.ID = 7
	stays("another's device", q)
	other := w.newHost()
	id := other.add(vm1)
	stays("another host's", vm1)
	if _, err := other.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	w.outage.Set(true)
	stays("no store", vm1)
	w.outage.Set(false)
	q = vm1
	q.Image = "file:///srv/other/vm1" // where somebody has given an image this one's id
	stays("another store", q)
	q = vm1
	q.Cache = filepath.Join(h.dir, "none")
	stays("no cache", q)
	h.unowned()
	w.kernel.write(t, h.add(vm1), 0, 1)
	r.check(0, 4096, 1)
}

// died makes a daemon die, with other records than it had, and starts another one.
func (h *host) died(recs ...record) {
	h.w.t.Helper()
	rs := h.records
	h.crash()
	old, err := filepath.Glob(rs.dir + "/*")
	for _, path := range old {
		err = errors.Join(err, os.Remove(path))
	}
	for _, r := range recs {
		err = errors.Join(err, rs.save(r))
	}
	if err != nil {
		h.w.t.Fatal(err)
	}
	h.start()
}

// again returns a client that comes back, to read or to write.
func (h *host) again(o wire.OpenResult, flags uint32) *libraryClient {
	h.w.t.Helper()
	return h.handle(wire.OpenRequest{Flags: wire.OpenAgain | flags, ID: o.ID})
}

// TestDeathWhenTurning: a daemon dies when it lets a writer in, at any step. Those that read come
// back, and what nobody needs goes.
func TestDeathWhenTurning(t *testing.T) {
	opening := func(before, after record) record {
		before.writeAs(&after)
		return before
	}
	for _, c := range []struct {
		name     string
		rec      func(before, after record) record
		owner    bool // it has the image when it dies
		log      bool // the log has been made
		readOnly bool
	}{
		{"before", func(before, _ record) record { return before }, false, false, true},
		{"before the log", opening, false, false, true},
		{"with a log", opening, false, true, true},
		{"with the image", opening, true, true, false},
		{"at the end", func(_, after record) record { return after }, true, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			h := w.newHost()
			r := h.reader()
			before := h.door().record()
			h.makeLog("vm1")
			wr := h.handle(wire.OpenRequest{})
			wr.write(100, 100, 1)
			after := h.door().record()
			if !c.owner {
				wr.close()
				r.leave()
				for h.door() != nil {
					_, _ = h.del(firstDoor, api.DetachRequest{})
				}
			}
			if c.log && !c.owner {
				h.makeLog("vm1")
			}
			h.died(c.rec(before, after))
			r = h.again(r.opened, wire.OpenReadOnly)
			r.check(100, 100, 1)
			rec := h.alone(firstDoor)
			if _, logs := h.files(); rec.ReadOnly != c.readOnly || rec.ReadOnly != (rec.Log == "") || (logs == 0) != c.readOnly {
				t.Errorf("%d logs, the record: %+v", logs, rec)
			}
			if c.readOnly {
				errnoIs(t, h.client().open(wire.OpenRequest{Flags: wire.OpenAgain, ID: r.opened.ID}), unix.ESTALE)
				h.makeLog("vm1")
			}
			wr = h.handle(wire.OpenRequest{})
			wr.write(100, 100, 2)
			r.check(100, 100, 2)
			r.close()
			wr.close()
			if _, err := h.del(firstDoor, api.DetachRequest{}); err != nil {
				t.Fatal(err)
			}
			h.unowned()
		})
	}
}

// TestDeathWhenMoving: a daemon dies when it moves those that read to a device, at any step. They come
// back to what there is then, and that is one attachment.
func TestDeathWhenMoving(t *testing.T) {
	for _, c := range []struct {
		name   string
		device phase // that it has written down of the device
		door   bool  // and whether it still has a record of what is read
		id     int   // of what there is then
	}{
		{"device not ready", phaseAttaching, true, firstDoor},
		{"device ready", phaseAttached, true, 0},
		{"device alone", phaseAttached, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			h := w.newHost()
			r := h.reader()
			door := h.door().record()
			device := h.find(h.add(vm1)).record()
			w.kernel.write(t, 0, 8, 1)
			device.Phase = c.device
			door.writeAs(&device)
			if c.door {
				h.died(door, device)
			} else {
				h.died(device)
			}
			r = h.again(r.opened, wire.OpenReadOnly)
			r.check(4096, 4096, 1)
			if rec := h.alone(c.id); rec.ReadOnly {
				t.Errorf("the record: %+v", rec)
			}
			if _, err := w.kernel.get(0); (err == nil) != (c.id == 0) {
				t.Errorf("the device: %v", err)
			}
			if c.id == 0 {
				w.kernel.write(t, 0, 8, 2)
			} else {
				h.handle(wire.OpenRequest{}).write(4096, 4096, 2)
			}
			r.check(4096, 4096, 2)
		})
	}
}

// TestDeathBesideReadOnlyDevice: where a device that is read-only and a door that is written to are
// recorded, however that has come, the door's clients find it, with what they have written.
func TestDeathBesideReadOnlyDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 4096, 1)
	door := h.door().record()
	device := door
	device.ID, device.ReadOnly, device.Log, device.LogID = 0, true, "", uuid.Nil
	h.died(door, device)
	c = h.again(c.opened, 0)
	c.check(0, 4096, 1)
	c.write(0, 4096, 2)
	c.check(0, 4096, 2)
}

// TestReadersComeAtOnce: clients that open an image at one time get one attachment, so that none of
// them stays on an old state when somebody writes.
func TestReadersComeAtOnce(t *testing.T) {
	for round := range 5 {
		w := newWorld(t)
		h := w.newHost()
		readers := make([]*libraryClient, 8)
		var come sync.WaitGroup
		for i := range readers {
			readers[i] = h.client()
			come.Go(func() {
				if err := readers[i].open(wire.OpenRequest{Flags: wire.OpenReadOnly}); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		come.Wait()
		// One that had looked before there was any.
		if _, err := h.attachReq(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1", ReadOnly: true, Library: true}); !errors.Is(err, errAttached) {
			t.Errorf("round %d: a second one: %v", round, err)
		}
		h.alone(firstDoor)
		c := h.handle(wire.OpenRequest{})
		c.write(0, 4096, 1)
		for _, r := range readers {
			r.check(0, 4096, 1)
		}
	}
}

// TestReadOnlyDeviceAndWriter: a device that is read-only does not come beside a door that is being
// opened to be written to, and such a device keeps a door from that.
func TestReadOnlyDeviceAndWriter(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	r := h.reader()
	opening := h.door().record()
	opening.Log = "/to/be"
	undo, err := h.door().intend(&opening)
	if err != nil {
		t.Fatal(err)
	}
	q := vm1
	q.ReadOnly = true
	var busy *ublk.BusyError
	if _, err := h.attachReq(q); !errors.As(err, &busy) {
		t.Errorf("a device beside a door that is being opened to be written to: %v", err)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	id := h.add(q)
	door := h.door()
	door.op <- struct{}{}
	err = door.turnWritable(t.Context())
	<-door.op
	if rec := door.record(); !errors.Is(err, unix.EBUSY) || !rec.reads() {
		t.Errorf("a door beside a device that is read-only: %v; the record: %+v", err, rec)
	}
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.EBUSY)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	c := h.handle(wire.OpenRequest{})
	c.write(0, 4096, 1)
	r.check(0, 4096, 1)
}

// TestMoveInTurn: writers, devices, and those that read come and go at once, some share, and some die. Each gets
// what it asks for or is told why not, and in the end nothing is left.
func TestMoveInTurn(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.cfg.LibraryLogSize = 66 << 20
	var all sync.WaitGroup
	until := time.Now().Add(3 * time.Second)
	for i := range uint64(6) {
		rng := rand.New(rand.NewPCG(i, 1))
		all.Go(func() {
			for time.Now().Before(until) {
				h.comeAndGo(rng, i)
			}
		})
	}
	all.Wait()
	for deadline := time.Now().Add(clientTimeout); len(h.all()) > 0; time.Sleep(10 * time.Millisecond) {
		for _, a := range h.all() {
			_, err := a.detach(context.Background(), api.DetachRequest{}, func(api.Progress) {})
			if err != nil && time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	h.unowned()
	if _, err := os.Stat(filepath.Join(h.dir, "attachments")); err != nil {
		t.Error(err)
	}
}

// comeAndGo is a client, or lsdctl add and del, for a moment.
func (h *host) comeAndGo(rng *rand.Rand, i uint64) {
	t := h.w.t
	pause := func() { time.Sleep(time.Duration(rng.IntN(5)) * time.Millisecond) }
	busy := func(err error) {
		var e *wire.Error
		var b *ublk.BusyError
		if err != nil && !errors.As(err, &b) && !errors.Is(err, errAttached) && !errors.Is(err, errAtIt) && (!errors.As(err, &e) || e.Errno != unix.EBUSY) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if i == 0 {
		// With the settings that an image has which library clients have opened.
		q := api.AttachRequest{ID: -1, Image: vm1.Image, LogSize: 66 << 20, Shared: rng.IntN(3) > 0}
		im, err := h.attach(context.Background(), q, func(api.Progress) {})
		if busy(err); err != nil {
			return
		}
		pause()
		h.w.kernel.write(t, im.ID, 800, 1)
		for deadline := time.Now().Add(clientTimeout); ; pause() {
			_, err := h.del(im.ID, api.DetachRequest{})
			if busy(err); err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Error("it is not detached")
				return
			}
		}
	}
	c := h.client()
	defer c.leave()
	q := wire.OpenRequest{Flags: wire.OpenReadOnly}
	if i <= 2 {
		q.Flags = wire.OpenShared * uint32(min(rng.IntN(4), 1))
	}
	if err := c.open(q); err != nil {
		busy(err)
		return
	}
	for range rng.IntN(4) {
		c.check(100, 100, 0)
		pause()
		if err := c.call(wire.Stat, nil, &wire.StatResult{}); err != nil && !errors.Is(err, io.EOF) {
			t.Errorf("%d: stat: %v", i, err)
		}
	}
	if i <= 2 {
		c.write(8192, 100, 1)
	}
	if rng.IntN(2) == 0 {
		if err := c.close(); err != nil {
			t.Errorf("%d: close: %v", i, err)
		}
	}
}
