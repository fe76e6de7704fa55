package uring

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Waker ends the wait of a ring from any goroutine. It is an eventfd with a
// read always pending on the ring.
type Waker struct {
	ring *Ring
	fd   int
	mem  *Arena
	one  []byte // the 8 bytes that Wake writes
	buf  []byte // the 8 bytes that the pending read fills
	err  error
	// woken is the ring's goroutine's.
	woken uint64
}

// NewWaker queues the waker's read on ring; it takes effect with the ring's
// next submission. It is called on the ring's goroutine.
func NewWaker(ring *Ring) (*Waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("uring: make an eventfd: %w", err)
	}
	mem, err := NewArena(16)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	w := &Waker{ring: ring, fd: fd, mem: mem, one: mem.Bytes()[:8], buf: mem.Bytes()[8:16]}
	binary.NativeEndian.PutUint64(w.one, 1)
	w.arm()
	return w, nil
}

func (w *Waker) arm() { w.ring.Read(w.fd, w.buf, 0, w) }

// Complete implements [Completer]: it takes the next wake-up.
func (w *Waker) Complete(res int32, _ uint32) {
	w.woken++
	if res < 0 && res != -int32(unix.EINTR) && res != -int32(unix.EAGAIN) {
		w.err = unix.Errno(-res)
		return
	}
	w.arm()
}

// Woken returns how often the pending read has completed: so many of what [Ring.Reap] counts. It
// is called on the ring's goroutine.
func (w *Waker) Woken() uint64 { return w.woken }

// Err returns the error that ended the pending read, nil while the waker works.
// It is called on the ring's goroutine.
func (w *Waker) Err() error { return w.err }

// Wake makes the ring's current or next wait return. It may be called from any
// goroutine, but not after Close. Several wakes may be seen as one.
func (w *Waker) Wake() {
	// A write to an eventfd blocks at 2^64-2 only; the raw call is safe.
	// Unsafe: w.one is arena memory, in use during the call only.
	unix.RawSyscall(unix.SYS_WRITE, uintptr(w.fd), uintptr(unsafe.Pointer(unsafe.SliceData(w.one))), 8)
}

// Close releases the waker after its ring has been closed.
func (w *Waker) Close() error {
	err := unix.Close(w.fd)
	if merr := w.mem.Close(); err == nil {
		err = merr
	}
	if err != nil {
		return fmt.Errorf("uring: close a waker: %w", err)
	}
	return nil
}
