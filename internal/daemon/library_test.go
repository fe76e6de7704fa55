package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// libraryURL is the store as library clients name it: they are not told of those in memory.
const libraryURL = "file:///srv/lsd"

// clientTimeout is how long a library client waits for anything.
const clientTimeout = 20 * time.Second

// A libraryClient plays the C library: one connection, and the ring of its handle. One
// goroutine uses it.
type libraryClient struct {
	*ringtest.Client
	t      testing.TB
	conn   *net.UnixConn
	number uint64
	opened wire.OpenResult
}

// dial returns a client that has not said hello. The daemon serves it as one that has
// connected to its socket.
func (h *host) dial() *libraryClient {
	h.w.t.Helper()
	return h.dialAs(nil)
}

// dialAs is dial for a process of another user, or of this one.
func (h *host) dialAs(caller *policy.Caller) *libraryClient {
	h.w.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		h.w.t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		conn, err := net.FileConn(f)
		if err != nil {
			h.w.t.Fatal(err)
		}
		f.Close()
		ends[i] = conn.(*net.UnixConn)
	}
	served := make(chan struct{})
	d := h.Daemon
	p, err := libraryPeer(ends[0])
	if err != nil {
		h.w.t.Fatal(err)
	}
	if caller != nil {
		p.caller = *caller
	}
	go func() { d.serveSession(ends[0], p); close(served) }()
	c := &libraryClient{t: h.w.t, conn: ends[1]}
	h.w.t.Cleanup(func() {
		c.leave()
		select {
		case <-served:
		case <-d.ctx.Done():
		case <-time.After(clientTimeout):
			h.w.t.Error("the session of a client that is gone goes on")
		}
	})
	return c
}

// client returns a client that has said hello.
func (h *host) client() *libraryClient {
	h.w.t.Helper()
	c := h.dial()
	c.hello()
	return c
}

// hello begins the session.
func (c *libraryClient) hello() {
	c.t.Helper()
	var hello wire.HelloResult
	if err := c.call(wire.Hello, &wire.HelloRequest{Low: 1, High: 2, Program: "test"}, &hello); err != nil {
		c.t.Fatal(err)
	}
}

// send sends a request.
func (c *libraryClient) send(t wire.Type, q wire.Message) error {
	c.number++
	var payload []byte
	if q != nil {
		var err error
		if payload, err = wire.Append(nil, q); err != nil {
			return err
		}
	}
	return wire.NewWriter(c.conn).Write(wire.Frame{Type: t, Number: c.number, Payload: payload})
}

// call makes a request and takes its result into res.
func (c *libraryClient) call(t wire.Type, q, res wire.Message) error {
	if err := c.send(t, q); err != nil {
		return err
	}
	_, err := c.result(t, res)
	return err
}

// result takes the result of the last request, and the descriptors that come with it.
func (c *libraryClient) result(t wire.Type, res wire.Message) ([]int, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(clientTimeout)); err != nil {
		return nil, err
	}
	for {
		f, fds, err := wire.ReadWithFiles(c.conn)
		if err != nil {
			return nil, err
		}
		switch {
		case f.Number == c.number && f.Type == t.Progress():
		case f.Number == c.number && f.Type == t.Result():
			return fds, wire.ParseResult(f.Payload, res)
		default:
			c.t.Errorf("%v of request %d, want that of %v, %d", f.Type, f.Number, t, c.number)
		}
	}
}

// open opens what q says, in a ring of 16 entries if it says nothing else.
func (c *libraryClient) open(q wire.OpenRequest) error {
	setDefault(&q.Store, libraryURL)
	setDefault(&q.Image, "vm1")
	setDefault(&q.Entries, 16)
	setDefault(&q.Data, 4<<20)
	if err := c.send(wire.Open, &q); err != nil {
		return err
	}
	fds, err := c.result(wire.Open, &c.opened)
	if err != nil {
		return err
	}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if len(fds) != 3 {
		c.t.Fatalf("%d descriptors", len(fds))
	}
	c.Client, err = ringtest.New([3]int(fds))
	return err
}

// close closes the handle.
func (c *libraryClient) close() error {
	err := c.call(wire.Close, nil, nil)
	c.leave()
	return err
}

// leave ends the client as its death would.
func (c *libraryClient) leave() {
	c.conn.Close()
	if c.Client != nil {
		_ = c.Client.Close()
		c.Client = nil
	}
}

// ended waits until the daemon has ended the connection.
func (c *libraryClient) ended() {
	c.t.Helper()
	_ = c.conn.SetReadDeadline(time.Now().Add(clientTimeout))
	if n, err := c.conn.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("the connection goes on: %d, %v", n, err)
	}
}

// do makes one request of the ring, of which the data is at 0 but for its place in a sector.
func (c *libraryClient) do(op uint8, off uint64, data []byte) syscall.Errno {
	c.t.Helper()
	q := ringtest.Request{Op: op, Offset: off, Length: uint64(len(data))}
	if op == ringtest.Read || op == ringtest.Write {
		q.Data = off % 512
	}
	if op == ringtest.Write {
		copy(c.Data[q.Data:], data)
	}
	c.Submit(q)
	done := c.await()
	if op == ringtest.Read {
		copy(data, c.Data[q.Data:])
	}
	return syscall.Errno(-done.Res)
}

// await takes a completion.
func (c *libraryClient) await() ringtest.Completion {
	c.t.Helper()
	done, err := c.Wait(clientTimeout)
	if err != nil {
		c.t.Fatal(err)
	}
	return done
}

func (c *libraryClient) write(off uint64, n int, b byte) {
	c.t.Helper()
	if err := c.do(ringtest.Write, off, bytes.Repeat([]byte{b}, n)); err != 0 {
		c.t.Fatalf("write of %d bytes at %d: %v", n, off, err)
	}
}

func (c *libraryClient) check(off uint64, n int, b byte) {
	c.t.Helper()
	got := make([]byte, n)
	if err := c.do(ringtest.Read, off, got); err != 0 {
		c.t.Fatalf("read of %d bytes at %d: %v", n, off, err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{b}, n)) {
		c.t.Fatalf("%d bytes at %d begin with %d, want %d", n, off, got[0], b)
	}
}

// handle returns a client that has opened what q says.
func (h *host) handle(q wire.OpenRequest) *libraryClient {
	h.w.t.Helper()
	c := h.client()
	if err := c.open(q); err != nil {
		h.w.t.Fatal(err)
	}
	return c
}

// makeLog makes the log of an image, smaller than the daemon would.
func (h *host) makeLog(image string) {
	h.w.t.Helper()
	id, err := h.w.id(image)
	if err == nil {
		err = os.MkdirAll(filepath.Join(h.dir, "cache"), 0o700)
	}
	if err == nil {
		err = writelog.MakeFile(context.Background(), filepath.Join(h.dir, "cache", id.String()+".log"), 66<<20, nil)
	}
	if err != nil {
		h.w.t.Fatal(err)
	}
}

// share attaches vm1 for library clients, with a short lease, whoever has it.
func (h *host) share() {
	h.w.t.Helper()
	if _, err := h.attachReq(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1", Force: true, Library: true}); err != nil {
		h.w.t.Fatal(err)
	}
}

// id returns an image's id.
func (w *world) id(image string) (uuid.UUID, error) {
	info, err := engine.Describe(context.Background(), w.store, image)
	return info.ID, err
}

// door returns the only attachment without a block device, nil if there is none.
func (h *host) door() *attachment {
	h.w.t.Helper()
	var found *attachment
	for _, a := range h.all() {
		if a.id >= firstDoor {
			if found != nil {
				h.w.t.Errorf("there are %s and %s", found.name(), a.name())
			}
			found = a
		}
	}
	return found
}

// errnoIs fails the test unless err is a result with that errno.
func errnoIs(t testing.TB, err error, want syscall.Errno) {
	t.Helper()
	var e *wire.Error
	if !errors.As(err, &e) || e.Errno != want {
		t.Errorf("%v, want %v", err, want)
	}
}

// TestLibraryOpen: an image is attached by the first client that opens it, and what it has
// written is there for those that come after it, beside it or later.
func TestLibraryOpen(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	if o := c.opened; o.Size != 64<<20 || o.Name != "vm1" || o.Block != 4096 || o.Flags != 0 || c.Size() != 64<<20 {
		t.Errorf("opened: %+v, %d bytes", o, c.Size())
	}
	c.write(1000, 5000, 7)
	c.check(1000, 5000, 7)
	c.check(0, 1000, 0)
	if err := c.do(ringtest.Flush, 0, nil); err != 0 {
		t.Errorf("flush: %v", err)
	}
	id, _ := w.id("vm1")
	other := h.handle(wire.OpenRequest{Image: id.String(), Flags: wire.OpenByID | wire.OpenReadOnly})
	other.check(1000, 5000, 7)
	c.write(1000, 5000, 8)
	other.check(1000, 5000, 8)
	if err := other.do(ringtest.Write, 0, make([]byte, 512)); err != unix.EROFS {
		t.Errorf("write through a read-only handle: %v", err)
	}
	if im := h.await(firstDoor, api.StateActive); len(im.Clients) != 2 || im.Device != "lib0" {
		t.Errorf("%s is used by %q", im.Device, im.Clients)
	}
	if _, err := h.attachReq(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1"}); err == nil || !strings.Contains(err.Error(), "lib0 is in use by process") {
		t.Errorf("attached beside its clients: %v", err)
	}
	for _, c := range []*libraryClient{c, other} {
		if err := c.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	h.handle(wire.OpenRequest{}).check(1000, 5000, 8)
	h.door()
}

// TestLibraryUnused: an image that nobody uses is detached after a while, and not before; what
// was written is in its store.
func TestLibraryUnused(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(512, 512, 1)
	h.look(time.Now().Add(time.Hour), time.Time{})
	c.check(512, 512, 1)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	h.look(time.Now().Add(libraryLinger/2), time.Time{})
	time.Sleep(20 * time.Millisecond)
	if h.door() == nil {
		t.Error("it is detached at once")
	}
	h.look(time.Now().Add(2*libraryLinger), time.Time{})
	h.await(firstDoor, "absent")
	if records, logs := h.files(); records != 0 || logs != 0 {
		t.Errorf("%d records and %d logs are left", records, logs)
	}
	id := h.add(api.AttachRequest{ID: -1})
	got := make([]byte, 1024)
	if res := w.kernel.do(t, id, engine.Read, 0, got); res != 1024 || got[511] != 0 || got[512] != 1 {
		t.Errorf("read: %d, %d %d", res, got[511], got[512])
	}
}

// TestLibraryErrors: what cannot be opened is refused with what librbd's clients expect.
func TestLibraryErrors(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for _, c := range []struct {
		name string
		q    wire.OpenRequest
		want syscall.Errno
	}{
		{"no image", wire.OpenRequest{Image: "vm9"}, unix.ENOENT},
		{"no id", wire.OpenRequest{Image: uuid.NewString(), Flags: wire.OpenByID}, unix.ENOENT},
		{"not an id", wire.OpenRequest{Image: "vm1", Flags: wire.OpenByID}, unix.ENOENT},
		{"no snapshot", wire.OpenRequest{Snapshot: "monday"}, unix.ENOENT},
		{"no number", wire.OpenRequest{Number: 7}, unix.ENOENT},
		{"name", wire.OpenRequest{Image: "a/b"}, unix.EINVAL},
		{"store", wire.OpenRequest{Store: "what:///x"}, unix.EINVAL},
		{"store in memory", wire.OpenRequest{Store: "mem:"}, unix.EINVAL},
		{"entries", wire.OpenRequest{Entries: 7}, unix.EINVAL},
		{"data", wire.OpenRequest{Data: 1 << 40}, unix.EINVAL},
		{"nothing to come back to", wire.OpenRequest{Flags: wire.OpenAgain}, unix.ESTALE},
	} {
		t.Run(c.name, func(t *testing.T) { errnoIs(t, h.client().open(c.q), c.want) })
	}
	c := h.dial()
	errnoIs(t, c.call(wire.Hello, &wire.HelloRequest{Low: 3, High: 9}, nil), unix.EINVAL)
	if err := c.send(wire.Open, &wire.OpenRequest{}); err != nil {
		t.Fatal(err)
	}
	c.ended()
	c = h.client()
	errnoIs(t, c.call(wire.Open, nil, nil), unix.EINVAL)
	if err := c.send(wire.Stat, nil); err != nil {
		t.Fatal(err)
	}
	c.ended()
	w.outage.Set(true)
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.EIO)
	if h.door() != nil {
		t.Error("something is attached")
	}
}

// TestLibraryModel: two clients write bytes of the same sectors, each its own. What each reads is
// what it has written, and so it is for another client in the end.
func TestLibraryModel(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	for _, piece := range []uint64{100, 1700} {
		var all sync.WaitGroup
		var models [2]*model
		for i := range models {
			m := &model{libraryClient: h.handle(wire.OpenRequest{}), piece: piece, mine: uint64(i), want: make(map[uint64][]byte), rng: rand.New(rand.NewPCG(uint64(i), piece))}
			models[i] = m
			all.Go(m.run)
		}
		all.Wait()
		c := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
		for _, m := range models {
			for n, want := range m.want {
				got := make([]byte, piece)
				if err := c.do(ringtest.Read, n*piece, got); err != 0 || !bytes.Equal(got, want) {
					t.Errorf("piece %d of %d bytes is something else: %v", n, piece, err)
				}
			}
		}
		if err := models[0].do(ringtest.WriteZeroes, 0, make([]byte, modelSpan)); err != 0 {
			t.Error(err)
		}
	}
}

// modelSpan is the part of the image that the models write, in bytes.
const modelSpan = 64 << 10

// A model is a client that knows what its own pieces of the image hold: of those that have the
// same remainder by 2.
type model struct {
	*libraryClient
	piece, mine uint64
	want        map[uint64][]byte
	rng         *rand.Rand
}

// run writes some pieces at a time, and reads some of them.
func (m *model) run() {
	const tags = 8
	area := uint64(len(m.Data)) / tags
	for range 150 {
		used := make(map[uint64]bool)
		for tag := range uint32(tags) {
			n := m.rng.Uint64N(modelSpan/m.piece/2)*2 + m.mine
			if (n+1)*m.piece > modelSpan || used[n] {
				continue
			}
			used[n] = true
			if m.want[n] == nil {
				m.want[n] = make([]byte, m.piece)
			}
			from := m.rng.Uint64N(m.piece)
			size := 1 + m.rng.Uint64N(m.piece-from)
			off := n*m.piece + from
			at := uint64(tag)*area + off%512
			for i := range size {
				m.want[n][from+i] = byte(m.rng.Uint32())
			}
			copy(m.Data[at:], m.want[n][from:from+size])
			m.Queue(ringtest.Request{Op: ringtest.Write, Flags: uint8(m.rng.IntN(2)), Tag: tag, Offset: off, Length: size, Data: at})
		}
		m.Submit()
		for range used {
			if done, err := m.Wait(clientTimeout); err != nil || done.Res != 0 {
				m.t.Errorf("write: %+v, %v", done, err)
				return
			}
		}
		for n := range used {
			if m.rng.IntN(4) == 0 && !m.read(n) {
				return
			}
		}
	}
}

// read compares a piece.
func (m *model) read(n uint64) bool {
	off := n * m.piece
	m.Submit(ringtest.Request{Op: ringtest.Read, Offset: off, Length: m.piece, Data: off % 512})
	done, err := m.Wait(clientTimeout)
	if err != nil || done.Res != 0 || !bytes.Equal(m.Data[off%512:][:m.piece], m.want[n]) {
		m.t.Errorf("client %d: piece %d of %d bytes is something else: %+v, %v", m.mine, n, m.piece, done, err)
		return false
	}
	return true
}

// TestLibraryBesideDevice: what is attached with a block device can be read by library clients
// and not written.
func TestLibraryBesideDevice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1"})
	w.kernel.write(t, id, 8, 5)
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.EBUSY)
	c := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	c.check(4096, 4096, 5)
	w.kernel.write(t, id, 8, 6)
	c.check(4096, 4096, 6)
	var busy *ublk.BusyError
	if _, err := h.del(id, api.DetachRequest{}); err == nil || !errors.As(err, &busy) || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("detached under a client: %v", err)
	}
	h.finish(c, id)
}

// TestLibraryMakesWay: what library clients have left is not in the way of a device; what one has
// open is.
func TestLibraryMakesWay(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c := h.handle(wire.OpenRequest{})
	c.write(4096, 4096, 9)
	var busy *ublk.BusyError
	if _, err := h.attachReq(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1"}); !errors.As(err, &busy) || !strings.Contains(err.Error(), "lib0 is in use by process") {
		t.Errorf("attached beside a client: %v", err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	id := h.add(api.AttachRequest{ID: -1, Image: libraryURL + "/vm1"})
	w.kernel.check(t, id, 8, 9)
	if h.find(firstDoor) != nil {
		t.Error("it is attached for library clients as well")
	}
}

// TestLibraryPanic: handles survive the death of a reactor; what was under way is done again.
func TestLibraryPanic(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	other := h.handle(wire.OpenRequest{})
	for i := range byte(5) {
		dk := h.door().getDisk()
		dk.reactor.Post(func() { panic("test") })
		for n := range uint64(8) {
			at := n * 4096
			copy(c.Data[at+100:], bytes.Repeat([]byte{i, byte(n)}, 500))
			c.Submit(ringtest.Request{Op: ringtest.Write, Tag: uint32(n), Offset: n*512 + 100, Length: 1000, Data: at + 100})
		}
		for range 8 {
			if done := c.await(); done.Res != 0 {
				t.Fatalf("%+v", done)
			}
		}
		other.check(7*512+1100, 5, 0)
		got := make([]byte, 1000)
		if err := other.do(ringtest.Read, 7*512+100, got); err != 0 || !bytes.Equal(got, bytes.Repeat([]byte{i, 7}, 500)) {
			t.Fatalf("round %d: %v, % x", i, err, got[:4])
		}
	}
	if im := h.await(firstDoor, api.StateActive); im.Restarts != 5 {
		t.Errorf("%d restarts", im.Restarts)
	}
	if c.close() != nil || other.close() != nil {
		t.Error("close")
	}
}

// TestLibraryComesBack: a client of a daemon that has died goes on with the next one, and what it
// has written is there; if another host has had the image it is refused.
func TestLibraryComesBack(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c := h.handle(wire.OpenRequest{})
	again := wire.OpenRequest{Flags: wire.OpenAgain, ID: c.opened.ID}
	for i := range byte(3) {
		c.write(100, 1000, i+1)
		h.crash()
		h.start()
		c = h.handle(again)
		c.check(100, 1000, i+1)
	}
	if err := h.door().getDisk().destage(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	h.crash()
	other := w.newHost()
	other.share()
	o := other.handle(wire.OpenRequest{})
	o.write(100, 1000, 99)
	other.finish(o, firstDoor)
	h.start()
	errnoIs(t, h.client().open(again), unix.ESTALE)
	h.await(firstDoor, api.StateFailed)
	errnoIs(t, h.client().open(again), unix.ESTALE)
	h.crash()
	h.start()
	errnoIs(t, h.client().open(again), unix.ESTALE)
	h.handle(wire.OpenRequest{}).check(100, 1000, 99)
}

// TestLibraryAnew: a daemon that died amid a rollback has left an image that its clients do not
// know, and nothing says whether another host has had it.
func TestLibraryAnew(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c := h.handle(wire.OpenRequest{})
	if err := h.door().save(func(r *record) { r.Phase = phaseAttaching }); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.start()
	errnoIs(t, h.client().open(wire.OpenRequest{Flags: wire.OpenAgain, ID: c.opened.ID}), unix.ESTALE)
	h.handle(wire.OpenRequest{})
}

// TestLibraryLost: of an image that another host has taken, clients are told when they open it,
// and it is attached anew once nobody has it open any more.
func TestLibraryLost(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c := h.handle(wire.OpenRequest{})
	c.write(100, 1000, 1)
	other := w.newHost()
	other.share()
	other.handle(wire.OpenRequest{}).check(100, 1000, 1)
	h.await(firstDoor, engine.Released.String())
	if c.do(ringtest.Write, 0, make([]byte, 512)) == 0 {
		t.Error("it is written to")
	}
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.ESTALE)
	errnoIs(t, h.client().open(wire.OpenRequest{Flags: wire.OpenAgain, ID: c.opened.ID}), unix.ESTALE)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.EBUSY)
	if h.door() != nil {
		t.Error("what was lost is attached")
	}
}

// TestLibraryHookLost: the memory of a handle goes also if the reactor that was to serve it has
// died before it came to that.
func TestLibraryHookLost(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	dk, err := emptyDisk(record{ID: firstDoor}, h.logger)
	if err != nil {
		t.Fatal(err)
	}
	hd, err := newHandle("process 1", io.NopCloser(nil), false, false, 2, 8, 2<<20)
	if err != nil {
		t.Fatal(err)
	}
	hooked := make(chan struct{})
	dk.reactor.Post(func() { <-hooked; panic("test") })
	dk.hook(hd)
	close(hooked)
	<-dk.reactor.Done()
	dk.hook(hd) // in vain
	dk.release()
	if err := hd.put(); err != nil {
		t.Fatal(err)
	}
	if n := hd.refs.Load(); n != 0 || hd.mem.Files()[0] != -1 {
		t.Errorf("%d uses of the memory are left, descriptor %d", n, hd.mem.Files()[0])
	}
}

// TestLibraryDeafClient: a client that does not read what it is told does not hold up what it has
// asked for.
func TestLibraryDeafClient(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	f := os.NewFile(uintptr(fds[0]), "socket")
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	told := make(chan struct{})
	go func() {
		defer close(told)
		a := &answer{s: &session{d: h.Daemon, conn: conn.(*net.UnixConn)}}
		for range 1 << 16 {
			a.progress(api.Progress{Done: 1, Total: 2})
		}
	}()
	select {
	case <-told:
	case <-time.After(clientTimeout):
		t.Error("it is waited for")
		conn.Close()
	}
	c.write(0, 512, 1)
}

// TestLibraryCloseWhileDying: a handle is closed although the reactor dies.
func TestLibraryCloseWhileDying(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	for range 4 {
		c := h.handle(wire.OpenRequest{})
		h.door().getDisk().reactor.Post(func() { panic("test") })
		if err := c.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	h.handle(wire.OpenRequest{}).write(0, 512, 1)
}

// snapshot makes a snapshot through the handle.
func (c *libraryClient) snapshot(name string) {
	c.t.Helper()
	if err := c.call(wire.Snapshot, &wire.SnapshotRequest{Name: name}, nil); err != nil {
		c.t.Fatal(err)
	}
}

// TestLibraryRollBack: a handle rolls its image back while nobody else has it open, and goes on
// with what it had submitted meanwhile.
func TestLibraryRollBack(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(100, 1000, 1)
	c.snapshot("monday")
	c.write(100, 1000, 2)
	other := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	errnoIs(t, c.call(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}, nil), unix.EBUSY)
	errnoIs(t, other.call(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}, nil), unix.EROFS)
	c.check(100, 1000, 2)
	if err := other.close(); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, c.call(wire.RollBack, &wire.SnapshotRequest{Name: "sunday"}, nil), unix.ENOENT)
	var size wire.SizeResult
	if err := c.call(wire.Resize, &wire.ResizeRequest{Size: 128 << 20}, &size); err != nil || size.Size != 128<<20 || c.Size() != 128<<20 {
		t.Errorf("%d bytes, %d in the ring, %v", size.Size, c.Size(), err)
	}
	if err := c.send(wire.RollBack, &wire.SnapshotRequest{Name: "monday"}); err != nil {
		t.Fatal(err)
	}
	for range 20 { // before, while and after
		if err := c.do(ringtest.Read, 100, make([]byte, 512)); err != 0 {
			t.Errorf("read: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := c.result(wire.RollBack, &size); err != nil || size.Size != 64<<20 || c.Size() != 64<<20 {
		t.Errorf("%d bytes, %d in the ring, %v", size.Size, c.Size(), err)
	}
	c.check(100, 1000, 1)
	c.write(2000, 10, 3)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	c = h.handle(wire.OpenRequest{})
	c.check(100, 1000, 1)
	c.check(2000, 10, 3)
}

// TestLibrarySnapshots: snapshots are listed, opened by name and number, also after the daemon's
// end, and removed with what was attached of them; so is the image.
func TestLibrarySnapshots(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 512, 1)
	c.snapshot("monday")
	errnoIs(t, c.call(wire.Snapshot, &wire.SnapshotRequest{Name: "monday"}, nil), unix.EEXIST)
	c.write(0, 512, 2)
	var list wire.SnapshotList
	if err := c.call(wire.ListSnapshots, nil, &list); err != nil || len(list.Snapshots) != 1 || list.Snapshots[0].Size != 64<<20 {
		t.Fatalf("%+v, %v", list, err)
	}
	named := h.handle(wire.OpenRequest{Snapshot: "monday"})
	number := h.handle(wire.OpenRequest{Number: list.Snapshots[0].Number})
	for _, s := range []*libraryClient{named, number} {
		s.check(0, 512, 1)
		if s.opened.Flags != wire.OpenedReadOnly {
			t.Error("it can be written to")
		}
	}
	errnoIs(t, c.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "monday"}, nil), unix.EBUSY)
	h.crash()
	h.start()
	id := c.opened.ID
	c = h.handle(wire.OpenRequest{Flags: wire.OpenAgain, ID: id})
	named = h.handle(wire.OpenRequest{Snapshot: "monday", Flags: wire.OpenAgain, ID: id})
	number = h.handle(wire.OpenRequest{Number: list.Snapshots[0].Number, Flags: wire.OpenAgain, ID: id})
	c.check(0, 512, 2)
	for _, s := range []*libraryClient{named, number} {
		s.check(0, 512, 1)
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}
	if err := c.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "monday"}, nil); err != nil {
		t.Error(err)
	}
	errnoIs(t, c.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "monday"}, nil), unix.ENOENT)
	r := h.client()
	remove := &wire.RemoveRequest{Store: libraryURL, Image: "vm1"}
	errnoIs(t, r.call(wire.Remove, remove, nil), unix.EBUSY)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	if err := r.call(wire.Remove, remove, nil); err != nil {
		t.Error(err)
	}
	errnoIs(t, r.call(wire.Remove, remove, nil), unix.ENOENT)
}

// TestLibraryHostile: a client that breaks the ring's rules loses its handle, and nobody else does.
func TestLibraryHostile(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	other := h.handle(wire.OpenRequest{})
	c.Submit(ringtest.Request{Op: ringtest.Write, Tag: 99, Length: 512})
	c.ended()
	other.write(0, 512, 1)
	other.check(0, 512, 1)
	for end := time.Now().Add(clientTimeout); len(h.door().clients()) > 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its handle stays")
		}
	}
}

// TestLibraryDetach: what clients use is not detached without force; with it they find that it
// has ended, and cannot come back.
func TestLibraryDetach(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 512, 1)
	var busy *ublk.BusyError
	if _, err := h.del(firstDoor, api.DetachRequest{}); !errors.As(err, &busy) || !strings.HasPrefix(err.Error(), "lib0 is in use by process ") {
		t.Errorf("detached: %v", err)
	}
	c.write(512, 512, 2)
	if _, err := h.del(firstDoor, api.DetachRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	c.ended()
	errnoIs(t, h.client().open(wire.OpenRequest{Flags: wire.OpenAgain, ID: c.opened.ID}), unix.ESTALE)
	h.makeLog("vm1")
	c = h.handle(wire.OpenRequest{})
	c.check(0, 512, 1)
	c.check(512, 512, 2)
}

// TestLibraryEnding: a daemon that ends has clients come back to the next one.
func TestLibraryEnding(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 512, 1)
	id := c.opened.ID
	h.leave(exitRequest{detach: true, timeout: 5 * time.Second, progress: func(api.Progress) {}})
	h.crash()
	h.start()
	c = h.handle(wire.OpenRequest{Flags: wire.OpenAgain, ID: id})
	c.check(0, 512, 1)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	waits := h.client()
	h.door().op <- struct{}{} // as leave has it
	h.end()
	errnoIs(t, h.client().open(wire.OpenRequest{Image: "vm2"}), unix.EAGAIN)
	again := make(chan error, 1)
	go func() { again <- waits.open(wire.OpenRequest{Flags: wire.OpenAgain, ID: id}) }()
	select {
	case err := <-again:
		errnoIs(t, err, unix.EAGAIN)
	case <-time.After(clientTimeout):
		t.Fatal("it waits for a daemon that ends")
	}
}

// TestLibraryTogether: clients that open an image at one moment all get it, also while it is being
// detached because nobody had it.
func TestLibraryTogether(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for round := range 2 {
		if h.door() == nil {
			h.makeLog("vm1")
		}
		var all sync.WaitGroup
		for i := range 4 {
			c := h.client()
			all.Go(func() {
				if err := c.open(wire.OpenRequest{}); err != nil {
					t.Errorf("round %d: %v", round, err)
					return
				}
				if err := c.do(ringtest.Write, uint64(i)*512, bytes.Repeat([]byte{byte(round)}, 512)); err != 0 {
					t.Errorf("round %d: %v", round, err)
				}
				if err := c.close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
		}
		all.Wait()
		h.look(time.Now().Add(time.Hour), time.Time{})
	}
}

// TestLibraryCreate: an image is made, listed, renamed; sizes and names that cannot be are refused
// with EINVAL.
func TestLibraryCreate(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c := h.client()
	var made wire.CreateResult
	q := wire.CreateRequest{Store: libraryURL, Image: "new", Size: 4<<20 + 512, ObjectSize: 4 << 20}
	if err := c.call(wire.Create, &q, &made); err != nil {
		t.Fatal(err)
	}
	if id, err := w.id("new"); err != nil || id != made.ID {
		t.Errorf("%v, want %v: %v", id, made.ID, err)
	}
	errnoIs(t, c.call(wire.Create, &q, nil), unix.EEXIST)
	for _, q := range []wire.CreateRequest{
		{Image: "bad", Size: 1}, {Image: "bad", Size: 1 << 63}, {Image: "bad", Size: 1<<64 - 512},
		{Image: "bad", Size: 1 << 20, ObjectSize: 3<<20 + 7}, {Image: "a/b", Size: 1 << 20},
	} {
		q.Store = libraryURL
		errnoIs(t, c.call(wire.Create, &q, nil), unix.EINVAL)
	}
	errnoIs(t, c.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "new", Name: "vm1"}, nil), unix.EEXIST)
	if err := c.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "new", Name: "newer"}, nil); err != nil {
		t.Error(err)
	}
	var list wire.ListResult
	if err := c.call(wire.List, &wire.ListRequest{Store: libraryURL, After: "newe"}, &list); err != nil || list.More || len(list.Images) != 3 || list.Images[0].Name != "newer" {
		t.Errorf("%+v, %v", list, err)
	}
	h.makeLog("vm1")
	c = h.handle(wire.OpenRequest{})
	for _, size := range []uint64{0, 1000, 1 << 63, 1<<64 - 4096} {
		errnoIs(t, c.call(wire.Resize, &wire.ResizeRequest{Size: size, Shrink: true}, nil), unix.EINVAL)
	}
	errnoIs(t, c.call(wire.Resize, &wire.ResizeRequest{Size: 32 << 20}, nil), unix.EINVAL)
	if err := c.do(ringtest.Read, 64<<20, make([]byte, 512)); err != unix.EINVAL {
		t.Errorf("read beyond the end: %v", err)
	}
	c.write(40<<20, 512, 1)
	if err := c.call(wire.Resize, &wire.ResizeRequest{Size: 32 << 20, Shrink: true}, nil); err != nil || c.Size() != 32<<20 {
		t.Errorf("%d bytes, %v", c.Size(), err)
	}
	if err := c.do(ringtest.Write, 40<<20, make([]byte, 100)); err != unix.EINVAL {
		t.Errorf("write of a part of a sector beyond the end: %v", err)
	}
}

// rings counts the mappings of rings' memory, of both sides.
func rings(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "memfd:lsd-ring")
}

// TestLibraryLeaks: however a handle ends, nothing of it is left: neither its memory nor what
// serves it, also of clients that go with requests under way, which wait for the store.
func TestLibraryLeaks(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	before := rings(t)
	first := h.handle(wire.OpenRequest{})
	first.write(0, 4096, 1)
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	h.look(time.Now().Add(time.Hour), time.Time{})
	h.await(firstDoor, "absent")
	h.makeLog("vm1")
	goroutines := runtime.NumGoroutine()
	other := h.handle(wire.OpenRequest{})
	w.hang.Shut()
	for i := range 8 {
		c := h.handle(wire.OpenRequest{})
		c.Submit(ringtest.Request{Op: ringtest.Read, Tag: 1, Length: 4096})
		c.Submit(ringtest.Request{Op: ringtest.Write, Tag: 2, Offset: 100, Length: 100, Data: 4096 + 100})
		c.Submit(ringtest.Request{Op: ringtest.Discard, Tag: 3, Length: 4096})
		switch i % 4 {
		case 1: // its request is under way, and not answered, when it dies
			if err := c.send(wire.Close, nil); err != nil {
				t.Fatal(err)
			}
		case 2:
			if err := c.send(wire.Snapshot, &wire.SnapshotRequest{Name: "monday"}); err != nil {
				t.Fatal(err)
			}
		case 3:
			c.Submit(ringtest.Request{Op: 77})
			c.ended()
		}
		c.leave()
		errnoIs(t, h.client().open(wire.OpenRequest{Snapshot: "sunday"}), unix.ENOENT)
	}
	other.write(8192, 4096, 2) // it does not touch what waits
	w.hang.Open()
	other.check(8192, 4096, 2)
	if err := other.close(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(clientTimeout); rings(t) > before || len(h.door().clients()) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d rings are left, clients %q", rings(t)-before, h.door().clients())
		}
	}
	h.look(time.Now().Add(time.Hour), time.Time{})
	h.await(firstDoor, "absent")
	for end := time.Now().Add(clientTimeout); runtime.NumGoroutine() > goroutines+20; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, there were %d\n%s", runtime.NumGoroutine(), goroutines, b[:runtime.Stack(b, true)])
		}
	}
}

// TestLibraryEdges: while a write waits for the sector of which it changes a part, others of that
// sector wait, in order, and those of other sectors do not.
func TestLibraryEdges(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(0, 64<<10, 1)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	h.look(time.Now().Add(time.Hour), time.Time{})
	h.await(firstDoor, "absent")
	h.makeLog("vm1")
	a, b := h.handle(wire.OpenRequest{}), h.handle(wire.OpenRequest{})
	w.hang.Shut()
	put := func(c *libraryClient, tag uint32, off uint64, n int, v byte) {
		at := uint64(tag)*8192 + off%512
		copy(c.Data[at:], bytes.Repeat([]byte{v}, n))
		c.Submit(ringtest.Request{Op: ringtest.Write, Tag: tag, Offset: off, Length: uint64(n), Data: at})
	}
	put(a, 1, 100, 100, 2)   // of sector 0
	put(a, 2, 1000, 3000, 2) // of sectors 1 to 7
	a.write(32<<10, 4096, 2) // of others
	put(b, 1, 300, 100, 3)
	put(b, 2, 512, 512, 3) // all of sector 1, before which a's is
	put(b, 3, 3900, 200, 4)
	b.write(40<<10, 4096, 3)
	w.hang.Open()
	for range 2 {
		a.await()
	}
	for range 3 {
		b.await()
	}
	want := bytes.Repeat([]byte{1}, 4608)
	fill := func(from, to int, v byte) { copy(want[from:to], bytes.Repeat([]byte{v}, to-from)) }
	fill(100, 200, 2)
	fill(300, 400, 3)
	fill(1000, 4000, 2)
	fill(512, 1024, 3)
	fill(3900, 4100, 4)
	got := make([]byte, len(want))
	if err := a.do(ringtest.Read, 0, got); err != 0 {
		t.Fatal(err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %d, want %d", i, got[i], want[i])
		}
	}
}
