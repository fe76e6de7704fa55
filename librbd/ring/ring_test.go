package ring

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

func newReactor(t testing.TB) *reactor.Reactor {
	t.Helper()
	r, err := reactor.New(reactor.Config{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, r) })
	return r
}

func stop(t testing.TB, r *reactor.Reactor) {
	t.Helper()
	r.Stop()
	await(t, r.Done(), "the reactor's end")
}

func await(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited for %s in vain", what)
	}
}

func call(t testing.TB, r *reactor.Reactor, fn func()) {
	t.Helper()
	if err := r.Call(fn); err != nil {
		t.Fatal(err)
	}
}

func newMemory(t testing.TB, entries uint32, data uint64) *Memory {
	t.Helper()
	return newMemoryOf(t, Version, entries, data)
}

func newMemoryOf(t testing.TB, version, entries uint32, data uint64) *Memory {
	t.Helper()
	m, err := NewMemory(version, entries, data)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func newClient(t testing.TB, m *Memory) *ringtest.Client {
	t.Helper()
	c, err := ringtest.New(m.Files())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// A rig is a ring, its client, and a reactor that serves it.
type rig struct {
	t      testing.TB
	r      *reactor.Reactor
	g      *Group
	c      *Conn
	client *ringtest.Client
	broken chan error
}

func newRig(t testing.TB, entries uint32, h Handler) *rig {
	t.Helper()
	return newRigOf(t, Version, entries, h)
}

// newRigOf is newRig of a version of the ring.
func newRigOf(t testing.TB, version, entries uint32, h Handler) *rig {
	t.Helper()
	m := newMemoryOf(t, version, entries, MinData)
	k := &rig{t: t, broken: make(chan error, 8), client: newClient(t, m)}
	k.c = NewConn(m, func(err error) { k.broken <- err })
	k.serve(h)
	// Before the memory and the reactor go.
	t.Cleanup(func() {
		gone := make(chan struct{})
		if k.r.Call(func() { k.g.Unhook(k.c, func() { close(gone) }) }) == nil {
			await(t, gone, "the end of the session")
		}
	})
	return k
}

// serve makes another reactor, which begins to serve the ring.
func (k *rig) serve(h Handler) {
	k.t.Helper()
	k.r = newReactor(k.t)
	call(k.t, k.r, func() {
		k.g = NewGroup(k.r)
		k.g.Hook(Hooking{k.c, h})
	})
}

func (k *rig) wait() ringtest.Completion {
	k.t.Helper()
	done, err := k.client.Wait(patience)
	if err != nil {
		k.t.Fatal(err)
	}
	return done
}

// handler is a Handler of functions.
type handler struct{ handle, takeBack func(*IO) }

func (h handler) Handle(io *IO)   { h.handle(io) }
func (h handler) TakeBack(io *IO) { h.takeBack(io) }

// disk is a Handler: an image in memory.
type disk struct{ mem []byte }

func (d *disk) Handle(io *IO) {
	if io.Offset+io.Length > uint64(len(d.mem)) {
		io.Complete(syscall.EINVAL)
		return
	}
	at := d.mem[io.Offset:][:io.Length]
	switch io.Op {
	case OpRead:
		copy(io.Buf, d.mem[io.Sector*sectorSize:])
	case OpWrite:
		copy(at, io.Data())
	case OpDiscard, OpWriteZeroes:
		clear(at)
	}
	io.Complete(0)
}

func (d *disk) TakeBack(io *IO) { io.Complete(0) }

func TestWriteAndRead(t *testing.T) {
	k := newRig(t, 8, &disk{mem: make([]byte, 1<<20)})
	k.c.Memory().SetSize(1 << 20)
	if n := k.client.Size(); n != 1<<20 {
		t.Errorf("size %d", n)
	}
	text := []byte("not of whole sectors")
	copy(k.client.Data[4096+1000%512:], text)
	n := uint64(len(text))
	k.client.Submit(ringtest.Request{Op: ringtest.Write, Flags: ringtest.FUA, Tag: 3, Offset: 1000, Length: n, Data: 4096 + 1000%512})
	if done := k.wait(); done != (ringtest.Completion{Tag: 3}) {
		t.Fatalf("%+v", done)
	}
	k.client.Submit(
		ringtest.Request{Op: ringtest.Read, Tag: 3, Offset: 1000, Length: n, Data: 8192 + 1000%512},
		ringtest.Request{Op: ringtest.Flush, Tag: 7},
		ringtest.Request{Op: ringtest.Discard, Tag: 0, Offset: 1 << 20, Length: 512},
	)
	for _, want := range []ringtest.Completion{{Tag: 3}, {Tag: 7}, {Res: -int64(syscall.EINVAL)}} {
		if done := k.wait(); done != want {
			t.Errorf("%+v, want %+v", done, want)
		}
	}
	if got := k.client.Data[8192+1000%512:][:n]; !bytes.Equal(got, text) {
		t.Errorf("read %q", got)
	}
}

func TestMemoryLimits(t *testing.T) {
	for _, version := range []uint32{MinVersion - 1, Version + 1} {
		if m, err := NewMemory(version, 8, MinData); !errors.Is(err, ErrLimits) {
			t.Errorf("version %d: %v, %v", version, m, err)
		}
	}
	for _, tt := range []struct {
		entries uint32
		data    uint64
	}{
		{0, MinData}, {4, MinData}, {9, MinData}, {2048, MinData}, {8, 0}, {8, MinData - 4096},
		{8, MinData + 512}, {8, MaxData + 4096}, {1 << 31, 1 << 63}, {8, 1<<64 - 4096},
	} {
		if m, err := NewMemory(Version, tt.entries, tt.data); !errors.Is(err, ErrLimits) {
			t.Errorf("NewMemory(%d, %d) = %v, %v", tt.entries, tt.data, m, err)
		}
	}
}

// TestSealed: who has the descriptor cannot change the memory's size, nor what it is
// sealed against.
func TestSealed(t *testing.T) {
	m := newMemory(t, MaxEntries, MaxData)
	c := newClient(t, m)
	fd := c.Files()[0]
	for _, size := range []int64{0, 4096, 1 << 30} {
		if err := unix.Ftruncate(fd, size); err != unix.EPERM {
			t.Errorf("ftruncate to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != unix.EPERM {
		t.Errorf("another seal: %v", err)
	}
}
