package uring

import (
	"fmt"
	"math/bits"
	"runtime"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
)

// maxBuffers is the most entries of a buffer ring (io_register_pbuf_ring,
// io_uring/kbuf.c).
const maxBuffers = 1 << 15

// Buffers is memory in pieces that the kernel takes, one for each completion, for what it
// has to say: a ring of provided buffers (io_uring_register_buf_ring(3)). It belongs to
// its ring's goroutine.
type Buffers struct {
	r     *Ring
	group uint16
	size  int
	ring  []giouring.BufAndRing // struct io_uring_buf, in mem; the first one's Tail is the ring's
	data  []byte                // the buffers, in mem
}

// bufsOffset returns how much of the memory the entries of n buffers take.
func bufsOffset(n int) int { return n * int(unsafe.Sizeof(giouring.BufAndRing{})) }

// BuffersSize returns how much memory n buffers of size bytes need in all.
func BuffersSize(n, size int) int { return bufsOffset(n) + n*size }

// NewBuffers makes n buffers, a power of two, of size bytes in mem: page-aligned memory
// of an [Arena], of BuffersSize bytes, which must stay mapped until Close or until the
// ring is closed. The kernel must be Linux 5.19 or newer.
func (r *Ring) NewBuffers(mem []byte, n, size int) (*Buffers, error) {
	if n <= 0 || n > maxBuffers || bits.OnesCount(uint(n)) != 1 || size <= 0 || len(mem) < BuffersSize(n, size) {
		return nil, fmt.Errorf("uring: %d buffers of %d bytes in %d bytes of memory", n, size, len(mem))
	}
	b := &Buffers{r: r, group: r.groups, size: size, data: mem[bufsOffset(n):BuffersSize(n, size)]}
	// Unsafe: gives the arena's first bytes a type. They are page aligned and
	// giouring's BufAndRing, struct io_uring_buf, holds integers only.
	b.ring = unsafe.Slice((*giouring.BufAndRing)(unsafe.Pointer(unsafe.SliceData(mem))), n)
	b.ring[0].Tail = 0
	reg := giouring.BufReg{RingAddr: uint64(addr(mem)), RingEntries: uint32(n), Bgid: b.group}
	if err := b.register(giouring.RegisterPbufRing, &reg); err != nil {
		return nil, fmt.Errorf("uring: register %d buffers: %w", n, err)
	}
	r.groups++
	for i := range n {
		b.add(uint16(i))
	}
	return b, nil
}

func (b *Buffers) register(op uint32, reg *giouring.BufReg) error {
	// Unsafe: reg is used by the kernel during the call only.
	_, errno := b.r.ring.Register(int(b.r.fd), op, unsafe.Pointer(reg), 1)
	runtime.KeepAlive(reg)
	if errno != 0 {
		return errno
	}
	return nil
}

// add gives a buffer to the kernel.
//
// Plain stores are enough: with DEFER_TASKRUN the kernel looks at the ring inside enter
// only, on this thread, and without it in task work of this thread.
func (b *Buffers) add(id uint16) {
	tail := &b.ring[0].Tail // struct io_uring_buf_ring has it in the first entry's resv
	e := &b.ring[int(*tail)&(len(b.ring)-1)]
	e.Addr = uint64(addr(b.data[int(id)*b.size:]))
	e.Len = uint32(b.size)
	e.Bid = id
	*tail++
}

// id returns the number of the buffer that a completion's flags name.
func (b *Buffers) id(flags uint32) (int, bool) {
	id := int(flags >> giouring.CQEBufferShift)
	return id, flags&giouring.CQEFBuffer != 0 && id < len(b.ring)
}

// Get returns the buffer that was taken for the completion with these flags, nil if
// there was none. It is the caller's until Put.
func (b *Buffers) Get(flags uint32) []byte {
	id, ok := b.id(flags)
	if !ok {
		return nil
	}
	return b.data[id*b.size : (id+1)*b.size]
}

// Put gives back the buffer that Get has returned for these flags, once.
func (b *Buffers) Put(flags uint32) {
	if id, ok := b.id(flags); ok {
		b.add(uint16(id))
	}
}

// Close takes the buffers from the kernel, when no operation uses them any more. They
// need not be closed when the ring has been.
func (b *Buffers) Close() error {
	if err := b.register(giouring.UnregisterPbufRing, &giouring.BufReg{Bgid: b.group}); err != nil {
		return fmt.Errorf("uring: unregister buffers: %w", err)
	}
	return nil
}
