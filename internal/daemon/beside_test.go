package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

var (
	sharedVM1  = api.AttachRequest{ID: -1, Image: libraryURL + "/vm1", Shared: true}
	openShared = wire.OpenRequest{Flags: wire.OpenShared}
)

// begin submits a request of a device in one of its slots, and returns where it ends.
func (k *fakeKernel) begin(t testing.TB, id, slot int, op engine.Op, sector uint64, data []byte) fakeIO {
	t.Helper()
	d, err := k.get(id)
	if err != nil {
		t.Fatal(err)
	}
	arena, err := uring.NewArena(len(data))
	if err != nil {
		t.Fatal(err)
	}
	copy(arena.Bytes(), data)
	io := make(fakeIO, 1)
	d.reactor.Post(func() {
		f := d.handler.(*front)
		s := &f.slots[slot]
		s.io = io
		s.req.Op, s.req.Sector, s.req.Sectors, s.req.Buf = op, sector, uint32(len(data)/512), arena.Bytes()[:len(data)]
		f.submit(s)
	})
	return io
}

// ends fails the test unless a request has ended well.
func (c fakeIO) ends(t testing.TB) {
	t.Helper()
	select {
	case res := <-c:
		if res < 0 {
			t.Fatalf("a request of the device: %v", syscall.Errno(-res))
		}
	case <-time.After(clientTimeout):
		t.Fatal("a request of the device does not end")
	}
}

// TestSharedDevice: library clients write beside a block device if both ask for it.
func TestSharedDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(sharedVM1)
	if rec := h.alone(id); !rec.Shared || !h.await(id, api.StateActive).Shared {
		t.Errorf("the record: %+v", rec)
	}
	w.kernel.write(t, id, 8, 5)
	a, b, r := h.handle(openShared), h.handle(openShared), h.reader()
	for i := range byte(10) {
		a.write(4096+1000, 100, 2*i)
		b.check(4096+1000, 100, 2*i)
		w.kernel.write(t, id, 8, 2*i+1)
		for _, c := range []*libraryClient{a, b, r} {
			c.check(4096, 4096, 2*i+1)
		}
	}
	a.write(4096, 4096, 77)
	w.kernel.check(t, id, 8, 77)
	if err := a.do(ringtest.Flush, 0, nil); err != 0 {
		t.Error(err)
	}
	if res := w.kernel.do(t, id, engine.Flush, 0, nil); res != 0 {
		t.Error(res)
	}
	if err := r.do(ringtest.Write, 0, make([]byte, 512)); err != unix.EROFS {
		t.Errorf("write through a read-only handle: %v", err)
	}
	var watchers wire.WatcherList
	if err := a.call(wire.Watchers, nil, &watchers); err != nil || len(watchers.Watchers) != 3 || !watchers.Owned {
		t.Errorf("watchers: %+v, %v", watchers, err)
	}
	if err := a.call(wire.Resize, &wire.ResizeRequest{Size: 65 << 20}, &wire.SizeResult{}); err != nil || b.Size() != 65<<20 || w.kernel.devs[id].Params().SizeBytes != 65<<20 {
		t.Errorf("resized: %v", err)
	}
	if _, err := h.find(id).resize(context.Background(), api.ResizeRequest{Size: 64 << 20, Shrink: true}, func(api.Progress) {}); err != nil || a.Size() != 64<<20 {
		t.Errorf("resized: %v", err)
	}
	var busy *ublk.BusyError
	if _, err := h.del(id, api.DetachRequest{}); !errors.As(err, &busy) || len(busy.Holders) != 3 {
		t.Errorf("detached under its clients: %v", err)
	}
	for _, c := range []*libraryClient{a, b, r} {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Error(err)
	}
	h.unowned()
}

// TestSharedRefused: who does not share is refused, and told who has the image and what to do.
func TestSharedRefused(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for _, c := range []struct {
		name  string
		q     api.AttachRequest
		flags uint32
		want  string // of the advice
	}{
		{"neither", vm1, 0, "lsdctl add and lsdctl run"},
		{"client alone", vm1, wire.OpenShared, "lsdctl add --shared"},
		{"device alone", sharedVM1, 0, "lsdctl run --shared"},
		{"read-only", api.AttachRequest{ID: -1, Image: vm1.Image, ReadOnly: true}, wire.OpenShared, "lsdctl del it first"},
	} {
		id := h.add(c.q)
		err := h.client().open(wire.OpenRequest{Flags: c.flags})
		errnoIs(t, err, unix.EBUSY)
		if !strings.Contains(err.Error(), "/dev/ublkb0") || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", c.name, err)
		}
		if _, err := h.del(id, api.DetachRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range []api.AttachRequest{
		{ID: -1, Image: vm1.Image, Shared: true, ReadOnly: true},
		{ID: -1, Shared: true, Null: true},
		{ID: -1, Image: vm1.Image, Shared: true, Library: true},
	} {
		if _, err := h.attachReq(q); err == nil || !strings.Contains(err.Error(), "can be shared") {
			t.Errorf("%+v: %v", q, err)
		}
	}
	if len(h.all()) > 0 {
		t.Error("something is attached")
	}
}

// TestSharedJoinsClients: a block device is made beside library clients that write, and share the
// image; they do not notice. Where that cannot be done everything is as before.
func TestSharedJoinsClients(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	a, r := h.handle(openShared), h.reader()
	var n atomic.Int32
	var all sync.WaitGroup
	over := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
				a.write(100, 1000, byte(n.Add(1)))
			}
		}
	})
	stays := func(what string, q api.AttachRequest, want string) {
		t.Helper()
		before := n.Load()
		if _, err := h.attachReq(q); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
		r.check(8192, 512, 0)
		if rec := h.alone(firstDoor); rec.ReadOnly || rec.Shared || rec.Phase != phaseAttached {
			t.Errorf("%s: the record: %+v", what, rec)
		}
		for end := time.Now().Add(clientTimeout); n.Load() < before+5; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: a client does not go on", what)
			}
		}
		h.await(firstDoor, api.StateActive)
	}
	stays("not shared", vm1, "attached with --shared")
	b := h.handle(wire.OpenRequest{})
	stays("a client that does not share", sharedVM1, "lsdctl run --shared")
	stays("neither", vm1, "which write")
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	q := sharedVM1
	q.Cache = t.TempDir()
	stays("another log", q, "cannot be changed")
	q = sharedVM1
	q.Lease = 7 * time.Second
	stays("another lease", q, "cannot be changed")
	w.kernel.addErr = errors.New("no memory")
	stays("no device", sharedVM1, "no memory")

	writes := h.door().getDisk()
	id := h.add(sharedVM1)
	if rec := h.alone(id); !rec.Shared || rec.LogID != writes.logID {
		t.Errorf("the record: %+v", rec)
	}
	w.kernel.write(t, id, 16, 9)
	r.check(8192, 4096, 9)
	close(over)
	all.Wait()
	last := byte(n.Load())
	a.check(100, 1000, last)
	r.check(100, 1000, last)
	if im := h.await(id, api.StateActive); im.Restarts != 0 || len(im.Clients) != 2 || im.Stats.Size != 64<<20 {
		t.Errorf("it is %+v", im)
	}
	if err := a.call(wire.Resize, &wire.ResizeRequest{Size: 65 << 20}, &wire.SizeResult{}); err != nil || r.Size() != 65<<20 || w.kernel.devs[id].Params().SizeBytes != 65<<20 {
		t.Errorf("resized: %v", err)
	}
	if err := a.call(wire.Snapshot, &wire.SnapshotRequest{Name: "monday"}, nil); err != nil {
		t.Error(err)
	}
	a.write(100, 1000, last+1)
	errnoIs(t, a.call(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}, &wire.SizeResult{}), unix.EBUSY)
	if err := r.close(); err != nil {
		t.Error(err)
	}
	w.kernel.hold(id, "process 7 (mount)")
	errnoIs(t, a.call(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}, &wire.SizeResult{}), unix.EBUSY)
	w.kernel.hold(id)
	if err := a.call(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}, &wire.SizeResult{}); err != nil {
		t.Error(err)
	}
	a.check(100, 1000, last)
	w.kernel.write(t, id, 0, 3)
	a.check(0, 4096, 3)
	w.kernel.devs[id].reactor.Post(func() { panic("test") })
	a.write(50, 100, 4)
	h.finish(a, id)
	h.unowned()
}

// TestDeviceBesideWhatOnlyReads: an image that was opened to be written to, of which only those that
// read are left, can have a device that shares with nobody.
func TestDeviceBesideWhatOnlyReads(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c, r := h.handle(wire.OpenRequest{}), h.reader()
	c.write(0, 4096, 1)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	id := h.add(vm1)
	w.kernel.check(t, id, 0, 1)
	w.kernel.write(t, id, 0, 2)
	r.check(0, 4096, 2)
	errnoIs(t, h.client().open(openShared), unix.EBUSY)
	h.alone(id)
}

// TestSharedEdges: while a library client's write waits for the sector of which it changes a part,
// or compares it, what the block device writes there waits, and what it writes elsewhere does not;
// and the other way round.
func TestSharedEdges(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(sharedVM1)
	for sector := range uint64(16) {
		w.kernel.write(t, id, sector*8, 1)
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	id = h.add(sharedVM1)
	c := h.handle(openShared)
	w.hang.Shut()
	block := func(b byte) []byte { return bytes.Repeat([]byte{b}, 4096) }
	put := func(tag uint32, off uint64, n int, v byte) {
		at := uint64(tag)*8192 + off%512
		copy(c.Data[at:], bytes.Repeat([]byte{v}, n))
		c.Submit(ringtest.Request{Op: ringtest.Write, Tag: tag, Offset: off, Length: uint64(n), Data: at})
	}
	// turns waits until the reactor has taken what was submitted so far.
	turns := func() {
		for range 2 {
			done := make(chan struct{})
			w.kernel.devs[id].reactor.Post(func() { close(done) })
			<-done
		}
	}
	put(1, 100, 100, 2) // of sector 0, which has to be read
	c.write(32<<10, 4096, 3)
	over := w.kernel.begin(t, id, 1, engine.Write, 0, block(4)) // all of it: after that
	turns()
	put(2, 300, 100, 5) // and this after both
	c.putCompare(0, 20480+1000, bytes.Repeat([]byte{1}, 1000), bytes.Repeat([]byte{8}, 1000))
	turns()
	zeroes := w.kernel.begin(t, id, 4, engine.WriteZeroes, 40, block(0)) // of what is compared
	gone := w.kernel.begin(t, id, 2, engine.Discard, 16, block(0))
	gone.ends(t) // nobody is at this one
	w.kernel.begin(t, id, 3, engine.Write, 64, block(6)).ends(t)
	turns()
	select {
	case res := <-over:
		t.Fatalf("a sector is written that is being changed: %d", res)
	case res := <-zeroes:
		t.Fatalf("a sector is written that is being compared: %d", res)
	default:
	}
	w.hang.Open()
	over.ends(t)
	zeroes.ends(t)
	for range 3 {
		if done := c.await(); done.Res != 0 {
			t.Errorf("%+v", done)
		}
	}
	c.check(0, 300, 4)
	c.check(300, 100, 5)
	c.check(400, 4096-400, 4)
	c.check(8192, 4096, 0)
	c.check(20480, 4096, 0)
}

// TestGoneWriterBesideDevice: a client that has gone has a write under way yet when a device comes that
// shares with nobody: what the device writes there is behind it.
func TestGoneWriterBesideDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c := h.handle(wire.OpenRequest{})
	c.write(0, 4096, 1)
	h.finish(c, firstDoor) // now it is in the store alone
	h.share()
	c, r := h.handle(wire.OpenRequest{}), h.reader()
	w.hang.Shut()
	t.Cleanup(w.hang.Open)
	copy(c.Data[100:], bytes.Repeat([]byte{2}, 100))
	c.Submit(ringtest.Request{Op: ringtest.Write, Tag: 1, Offset: 100, Length: 100, Data: 100})
	if err := w.hang.AwaitWaiting(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	c.leave()
	for len(h.door().clients()) > 1 {
		time.Sleep(time.Millisecond)
	}
	id := h.add(vm1)
	over := w.kernel.begin(t, id, 1, engine.Write, 0, bytes.Repeat([]byte{3}, 4096))
	select {
	case res := <-over:
		t.Errorf("a sector is written that is being changed: %d", res)
	case <-time.After(50 * time.Millisecond):
	}
	w.hang.Open()
	over.ends(t)
	w.kernel.check(t, id, 0, 3)
	r.check(0, 4096, 3)
}

// TestMovedMeanwhile: what a client asks of its image while it moves to a device is done.
func TestMovedMeanwhile(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for i := range uint64(10) {
		h.share()
		c := h.handle(openShared)
		door := h.door()
		door.op <- struct{}{} // both have to wait
		var asked sync.WaitGroup
		asked.Go(func() {
			if err := c.call(wire.Resize, &wire.ResizeRequest{Size: (65 + i) << 20}, &wire.SizeResult{}); err != nil {
				t.Errorf("round %d: resize: %v", i, err)
			}
		})
		asked.Go(func() {
			if _, err := h.attachReq(sharedVM1); err != nil {
				t.Errorf("round %d: add: %v", i, err)
			}
		})
		time.Sleep(10 * time.Millisecond)
		<-door.op
		asked.Wait()
		if c.Size() != (65+i)<<20 {
			t.Errorf("round %d: %d bytes", i, c.Size())
		}
		h.finish(c, h.all()[0].id)
	}
}

// TestSharedTogether: a library client changes a part of a sector, and the block device all of it,
// while reactors die; neither loses what the other one has written beside its own.
func TestSharedTogether(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(sharedVM1)
	const from, to, rounds = 1000, 1100, 150
	var all sync.WaitGroup
	over := make(chan struct{})
	defer all.Wait()
	defer close(over)
	for i, c := range []*libraryClient{h.handle(openShared), h.handle(openShared)} {
		all.Go(func() {
			for v := byte(0); ; v++ {
				select {
				case <-over:
					return
				default:
				}
				if i == 0 {
					c.write(from, to-from, v)
					continue
				}
				// It counts beside that, and begins anew whenever the device has been faster.
				var old [8]byte
				if err := c.do(ringtest.Read, to, old[:]); err != 0 {
					t.Errorf("read: %v", err)
					return
				}
				next := binary.LittleEndian.AppendUint64(nil, binary.LittleEndian.Uint64(old[:])+1)
				if err, _ := c.compare(0, to, old[:], next); err != 0 && err != unix.EILSEQ {
					t.Errorf("compare and write: %v", err)
					return
				}
			}
		})
	}
	for i := range rounds {
		b := byte(i + 1)
		w.kernel.write(t, id, 0, b)
		got := make([]byte, 4096)
		if res := w.kernel.do(t, id, engine.Read, 0, got); res != 4096 {
			t.Fatalf("read: %d", res)
		}
		if rest := append(got[:from:from], got[to+8:]...); !bytes.Equal(rest, bytes.Repeat([]byte{b}, len(rest))) {
			t.Fatalf("round %d: what was written is not there: %d", i, rest[from-1])
		}
		if n := binary.LittleEndian.Uint64(got[to:]); n-uint64(b)*0x0101010101010101 > 1<<20 {
			t.Fatalf("round %d: it was counted to %x, from another beginning", i, n)
		}
		if i%50 == 25 {
			w.kernel.devs[id].reactor.Post(func() { panic("test") })
		}
	}
}

// TestSharedDeath: the next daemon goes on with a device and the clients that share it, at whatever
// step of its making the daemon died.
func TestSharedDeath(t *testing.T) {
	for _, c := range []struct {
		name   string
		device phase // that it has written down of the device
		door   bool  // and whether it still has the record of what the clients had
		id     int   // of what there is then
	}{
		{"device not ready", phaseAttaching, true, firstDoor},
		{"device ready", phaseAttached, true, 0},
		{"device alone", phaseAttached, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			h := w.newHost()
			h.share()
			a := h.handle(openShared)
			a.write(100, 100, 1)
			door := h.door().record()
			device := h.find(h.add(sharedVM1)).record()
			w.kernel.write(t, 0, 8, 2)
			device.Phase = c.device
			if c.door {
				h.died(door, device)
			} else {
				h.died(device)
			}
			a = h.again(a.opened, wire.OpenShared)
			a.check(100, 100, 1)
			a.check(4096, 4096, 2)
			a.write(4096, 4096, 3)
			h.alone(c.id)
			if c.id > 0 {
				if _, err := w.kernel.get(0); !errors.Is(err, ublk.ErrNoDevice) {
					t.Errorf("the device: %v", err)
				}
				h.add(sharedVM1)
			}
			w.kernel.check(t, 0, 8, 3)
			w.kernel.write(t, 0, 8, 4)
			a.check(4096, 4096, 4)
			errnoIs(t, h.client().open(wire.OpenRequest{}), unix.EBUSY)
		})
	}
}

// TestSharedFrontAllocs: nothing is allocated for what a device changes that is shared.
func TestSharedFrontAllocs(t *testing.T) {
	frontAllocs(t, sharedVM1, func(s *slot, buf []byte) int32 {
		s.req.Op, s.req.Sector, s.req.Sectors, s.req.Buf = engine.Write, 1<<40, 8, buf
		return -int32(unix.EINVAL) // beyond the end: it ends at once
	})
}

// TestSharedRights: to share an image takes what to write takes, and clients do not move to the device
// of an image elsewhere that has the same id.
func TestSharedRights(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.allow("allow user:7 "+libraryURL+" vm1 read", "allow user:8 "+libraryURL+" vm1 read,write")
	h.share()
	errnoIs(t, h.clientOf(7).open(openShared), unix.EPERM)
	c := h.clientOf(8)
	if err := c.open(openShared); err != nil {
		t.Fatal(err)
	}
	q := sharedVM1
	q.Image = "file:///srv/other/vm1"
	var busy *ublk.BusyError
	if _, err := h.attachReq(q); !errors.As(err, &busy) {
		t.Errorf("moved to another store: %v", err)
	}
	id := h.add(sharedVM1)
	c.write(0, 4096, 1)
	w.kernel.check(t, id, 0, 1)
	errnoIs(t, h.clientOf(7).open(openShared), unix.EPERM)
}
