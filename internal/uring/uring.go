package uring

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// A Completer is called on the ring's goroutine, from [Ring.Reap].
type Completer = aio.Completer

// Options of [New].
type Options struct {
	// Entries is the size of the submission queue; the kernel rounds it up to
	// a power of two and allows 32768. 0 means 256.
	Entries uint32

	// CQEntries is the size of the completion queue. It should be at least
	// the number of operations that are in flight at a time: more than that
	// is handled, but slowly. 0 means four times Entries.
	CQEntries uint32

	// SQE128 makes SQEs of 128 bytes, as control commands with 80 bytes of
	// payload need them.
	SQE128 bool
}

const (
	defaultEntries = 256
	maxEntries     = 32768 // IORING_MAX_ENTRIES, io_uring/io_uring.c
	cqFactor       = 4
	reapBatch      = 64
	busyRetries    = 1000
	drainTimeout   = 5 * time.Second
	promptTimeout  = 100 * time.Millisecond
	maxWorkers     = 8 // of each of the kernel's two kinds
)

// slot is one row of the table that user_data points into.
type slot struct {
	c    Completer
	gen  uint32 // counts the uses of the slot, so that a stale CQE is known
	next uint32 // index+1 of the next free slot, 0 at the end
	cmd  bool   // an IORING_OP_URING_CMD
}

type cqe struct {
	data  uint64
	res   int32
	flags uint32
}

// eventsArg is struct io_uring_getevents_arg (linux/io_uring.h).
type eventsArg struct {
	sigmask   uint64
	sigmaskSz uint32
	pad       uint32
	ts        uint64 // address of a struct __kernel_timespec, or 0
}

// kernelTimespec is struct __kernel_timespec (linux/time_types.h).
type kernelTimespec struct {
	sec, nsec int64
}

// timespec returns a time, or a length of time, as the kernel has it.
func timespec(d time.Duration) kernelTimespec {
	return kernelTimespec{sec: int64(d / time.Second), nsec: int64(d % time.Second)}
}

// scratch is the memory that a ring itself passes to the kernel by address.
type scratch struct {
	arg      eventsArg
	ts       kernelTimespec
	deadline kernelTimespec
}

// deadlineAddr returns the address of the deadline for the kernel.
//
// Unsafe: scratch is arena memory, mapped as long as the ring is there.
func (s *scratch) deadlineAddr() uint64 { return uint64(uintptr(unsafe.Pointer(&s.deadline))) }

// A Ring is one io_uring instance. See the package comment for who may use it.
type Ring struct {
	ring    *giouring.Ring
	q       queues
	fd      uintptr
	flags   uint32
	sqe128  bool
	deferTW bool // IORING_SETUP_DEFER_TASKRUN: CQEs appear inside enter only

	tail     uint32 // SQEs prepared so far
	prompt   uint32 // operations in the submission queue that end as they are submitted
	slots    []slot
	free     uint32 // index+1 of the first free slot, 0 when there is none
	inflight int    // slots in use
	cmds     int    // those of them that are commands

	batch   [reapBatch]cqe
	next    int   // entry of the batch that is to be dispatched
	taken   int   // entries of it
	backlog []cqe // CQEs taken out of a full queue before they could be dispatched
	reaping bool

	deadline deadline
	groups   uint16 // of buffers, made so far

	mem     *Arena
	scratch *scratch
	drained bool
	closed  bool
}

// New creates a ring.
//
// New returns an error that says why when the kernel has no io_uring or does
// not permit it.
func New(o Options) (*Ring, error) {
	if o.Entries == 0 {
		o.Entries = defaultEntries
	}
	if o.CQEntries == 0 {
		o.CQEntries = min(cqFactor*o.Entries, 2*maxEntries)
	}
	if o.Entries > maxEntries || o.CQEntries < o.Entries || o.CQEntries > 2*maxEntries {
		return nil, fmt.Errorf("uring: %d submission and %d completion entries are not in range", o.Entries, o.CQEntries)
	}
	mem, err := NewArena(int(unsafe.Sizeof(scratch{})))
	if err != nil {
		return nil, err
	}
	gr, flags, err := setup(o)
	if err != nil {
		mem.Close()
		return nil, err
	}
	r := &Ring{
		ring:    gr,
		fd:      uintptr(gr.RingFd()),
		flags:   flags,
		sqe128:  o.SQE128,
		deferTW: flags&giouring.SetupDeferTaskrun != 0,
		slots:   make([]slot, 0, o.CQEntries),
		mem:     mem,
		// Unsafe: gives the arena's first bytes a type. They are page aligned
		// and scratch holds integers only.
		scratch: (*scratch)(unsafe.Pointer(unsafe.SliceData(mem.Bytes()))),
	}
	r.deadline.r = r
	// scratch.ts is in the arena too: its address stays good for the ring's life.
	r.scratch.arg.ts = uint64(uintptr(unsafe.Pointer(&r.scratch.ts)))
	if r.q, err = mapQueues(gr); err != nil {
		gr.QueueExit()
		mem.Close()
		return nil, err
	}
	r.grow(cap(r.slots))
	if err := r.limitWorkers(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// limitWorkers bounds the threads that the kernel makes for the ring's blocking
// work: four for each processor otherwise, and as many as the process may have
// for what is no regular file.
func (r *Ring) limitWorkers() error {
	n := [2]uint32{maxWorkers, maxWorkers}
	// Unsafe: n is used by the kernel during the call only.
	_, errno := r.ring.Register(int(r.fd), giouring.RegisterIOWQMaxWorkers, unsafe.Pointer(&n[0]), uint32(len(n)))
	runtime.KeepAlive(&n)
	if errno != 0 && errno != unix.EINVAL { // it is as old as 5.15
		return fmt.Errorf("uring: bound the kernel's threads: %w", errno)
	}
	return nil
}

// grow extends the slot table to n slots and puts the new ones on the free list.
func (r *Ring) grow(n int) {
	old := len(r.slots)
	slots := make([]slot, n)
	copy(slots, r.slots)
	for i := n - 1; i >= old; i-- {
		slots[i].next = r.free
		r.free = uint32(i) + 1
	}
	r.slots = slots
}

// hold takes a slot for c and returns the user_data that names it.
func (r *Ring) hold(c Completer, cmd bool) uint64 {
	if r.free == 0 {
		r.grow(2 * len(r.slots))
	}
	i := r.free - 1
	s := &r.slots[i]
	r.free = s.next
	s.c, s.cmd = c, cmd
	r.inflight++
	if cmd {
		r.cmds++
	}
	return uint64(s.gen)<<32 | uint64(i)
}

// release ends the use of the slot that data names and returns its Completer,
// or nil when data is stale. A multishot operation keeps its slot while its
// CQEs carry IORING_CQE_F_MORE.
func (r *Ring) release(data uint64, flags uint32) Completer {
	i, gen := uint32(data), uint32(data>>32)
	if uint64(i) >= uint64(len(r.slots)) {
		return nil
	}
	s := &r.slots[i]
	if s.gen != gen || s.c == nil {
		return nil
	}
	c := s.c
	if flags&giouring.CQEFMore != 0 {
		return c
	}
	r.inflight--
	if s.cmd {
		r.cmds--
	}
	s.c = nil
	s.gen++
	s.next = r.free
	r.free = i + 1
	return c
}

// Inflight returns how many operations have been queued and not yet reaped.
func (r *Ring) Inflight() int { return r.inflight }

// RegisterFiles gives the ring its own references to fds, which saves looking
// them up for each operation: see [Fixed]. A -1 leaves an entry empty. It may be
// called once; the files are let go by Close.
func (r *Ring) RegisterFiles(fds []int) error {
	if len(fds) == 0 {
		return errors.New("uring: no files to register")
	}
	// giouring's own RegisterFiles passes []int, where the kernel reads __s32.
	list := make([]int32, len(fds))
	for i, fd := range fds {
		list[i] = int32(fd)
	}
	// Unsafe: list is used by the kernel during the call only.
	_, errno := r.ring.Register(int(r.fd), giouring.RegisterFiles, unsafe.Pointer(&list[0]), uint32(len(list)))
	runtime.KeepAlive(list)
	if errno != 0 {
		return fmt.Errorf("uring: register %d files: %w", len(fds), errno)
	}
	return nil
}

// RegisterBuffers pins bufs (arena memory), which saves mapping them for each
// operation: see ReadFixed. It may be called once; the memory is let go by
// Close. Pinned memory counts against RLIMIT_MEMLOCK without CAP_IPC_LOCK.
func (r *Ring) RegisterBuffers(bufs [][]byte) error {
	if len(bufs) == 0 {
		return errors.New("uring: no buffers to register")
	}
	iov := make([]syscall.Iovec, len(bufs))
	for i, b := range bufs {
		iov[i].Base = unsafe.SliceData(b)
		iov[i].SetLen(len(b))
	}
	if _, err := r.ring.RegisterBuffers(iov); err != nil {
		return fmt.Errorf("uring: register %d buffers: %w", len(bufs), err)
	}
	return nil
}

// CancelAll asks the kernel to cancel everything that is in flight. What can be
// cancelled completes with -ECANCELED or -EINTR; what cannot goes on.
func (r *Ring) CancelAll() {
	e := r.sqe()
	e.PrepareCancel64(0, int(giouring.AsyncCancelAny|giouring.AsyncCancelAll))
	e.UserData = r.hold(nop{}, true) // like a command: Close does not wait for it
}

// Drain cancels what is in flight and waits until the kernel has let go of its
// buffers. No Completer is called any more, and the ring takes no more
// operations. Commands cannot be cancelled in general and are left alone: the
// kernel ends them with the ring, or with its thread. A second Drain does
// nothing.
//
// Drain returns an error when operations are still in flight after some seconds
// (a disk that does not answer); their buffers must then stay mapped.
func (r *Ring) Drain() error {
	if r.drained {
		return nil
	}
	r.drained = true
	r.stash()
	r.discard()
	if r.inflight == r.cmds {
		return nil
	}
	deadline := time.Now().Add(drainTimeout)
	r.CancelAll()
	for r.inflight > r.cmds {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("uring: %d operations do not end", r.inflight-r.cmds)
		}
		if err := r.SubmitAndWait(left); err != nil {
			return err
		}
		r.stash()
		r.discard()
	}
	return nil
}

// Close drains the ring, if that has not been done, and frees it. After a Drain
// it may be called on any thread. A second Close does nothing. Its error is
// Drain's; the ring is gone nevertheless.
func (r *Ring) Close() error {
	if r.closed {
		return nil
	}
	err := r.Drain()
	r.closed = true
	r.ring.QueueExit()
	r.unmapRest()
	if err == nil {
		err = r.mem.Close()
	}
	return err
}

// discard drops the backlog, and what a panic has left of a batch, without calling
// anybody.
func (r *Ring) discard() {
	for ; r.next < r.taken; r.next++ {
		r.release(r.batch[r.next].data, r.batch[r.next].flags)
	}
	for _, e := range r.backlog {
		r.release(e.data, e.flags)
	}
	r.backlog = r.backlog[:0]
}

type nop struct{}

func (nop) Complete(int32, uint32) {}

// unmapRest unmaps the half of the SQE array that giouring's QueueExit leaves
// behind on a ring with SQE128: it counts 64 bytes for each entry.
func (r *Ring) unmapRest() {
	if !r.sqe128 {
		return
	}
	const sqeSize = unsafe.Sizeof(giouring.SubmissionQueueEntry{})
	page := uintptr(unix.Getpagesize())
	half := (sqeSize*uintptr(r.q.sqSize) + page - 1) &^ (page - 1)
	all := (2*sqeSize*uintptr(r.q.sqSize) + page - 1) &^ (page - 1)
	if all > half {
		// Unsafe: the range was mapped by giouring for this ring, and nothing
		// points into it once the ring is closed.
		unix.Syscall(unix.SYS_MUNMAP, uintptr(r.q.sqes)+half, all-half, 0)
	}
}
