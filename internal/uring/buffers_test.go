package uring

import (
	"bytes"
	"testing"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// taker is a Completer that keeps the flags, too.
type taker struct {
	result
	flags uint32
}

func (c *taker) Complete(res int32, flags uint32) {
	c.result.Complete(res, flags)
	c.flags = flags
}

// take reads from fd into a buffer of the kernel's choice.
func take(t *testing.T, r *Ring, b *Buffers, fd int) (res int32, flags uint32) {
	t.Helper()
	var c taker
	e := r.sqe()
	e.PrepareRead(fd, 0, uint32(b.size), 0)
	e.Flags |= giouring.SqeBufferSelect
	e.BufIG = b.group
	e.UserData = r.hold(&c, false)
	return wait(t, r, &c.result, 1), c.flags
}

// TestBuffers has the kernel take buffers until there is none, gives one back at a time
// and goes on.
func TestBuffers(t *testing.T) {
	r := newRing(t, Options{})
	const n, size = 4, 16
	b, err := r.NewBuffers(newArena(t, BuffersSize(n, size)), n, size)
	if err != nil {
		t.Fatal(err)
	}
	want := []byte("0123456789abcdef")
	fd := tempFile(t)
	if _, err := unix.Pwrite(fd, want, 0); err != nil {
		t.Fatal(err)
	}
	var taken []uint32
	for range n {
		res, flags := take(t, r, b, fd)
		if res != size || !bytes.Equal(b.Get(flags), want) {
			t.Fatalf("read = %d, the buffer has %q", res, b.Get(flags))
		}
		taken = append(taken, flags)
	}
	res, flags := take(t, r, b, fd)
	if res != -int32(unix.ENOBUFS) || b.Get(flags) != nil {
		t.Fatalf("read without a buffer = %d, %v", res, b.Get(flags))
	}
	b.Put(flags) // there was none: nothing happens
	for i := range 3 * n {
		b.Put(taken[i%n])
		if res, flags := take(t, r, b, fd); res != size || flags != taken[i%n] {
			t.Fatalf("round %d: read = %d, flags %#x, want %#x", i, res, flags, taken[i%n])
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err == nil {
		t.Error("buffers were closed twice")
	}
}

func TestBadBuffers(t *testing.T) {
	r := newRing(t, Options{})
	mem := newArena(t, 1<<16)
	for _, c := range []struct{ n, size int }{{0, 16}, {3, 16}, {4, 0}, {1 << 16, 1}, {4, 1 << 20}} {
		if _, err := r.NewBuffers(mem, c.n, c.size); err == nil {
			t.Errorf("%d buffers of %d bytes were made", c.n, c.size)
		}
	}
	if b, err := r.NewBuffers(mem, 4, 16); err != nil {
		t.Error(err)
	} else if got := b.Get(4<<giouring.CQEBufferShift | giouring.CQEFBuffer); got != nil {
		t.Error("there is a buffer 4 of 4")
	}
}
