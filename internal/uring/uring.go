package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
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
	slots    []slot
	free     uint32 // index+1 of the first free slot, 0 when there is none
	inflight int    // slots in use
	cmds     int    // those of them that are commands

	batch   [reapBatch]cqe
	backlog []cqe // CQEs taken out of a full queue before they could be dispatched
	reaping bool

	deadline deadline

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

// Settle submits what is queued, as Submit does, and reports whether nothing
// happens on the ring from then on until its next system call: what completes does
// so inside of those only (IORING_SETUP_DEFER_TASKRUN), and there is nothing to
// reap. To look without submitting would not do: whoever is called through a Waker
// finds its next read in the queue.
func (r *Ring) Settle() (bool, error) {
	if !r.deferTW {
		return false, nil
	}
	err := r.Submit()
	return err == nil && !r.Ready(), err
}

// Inflight returns how many operations have been queued and not yet reaped.
func (r *Ring) Inflight() int { return r.inflight }

// sqe returns a zeroed SQE, after submitting when the queue is full.
//
// It cannot fail: with SUBMIT_ALL, and with the completion queue emptied into
// the backlog, the kernel always makes progress; that it does not would be a
// bug, and no error could be given to anybody who could use it.
func (r *Ring) sqe() *giouring.SubmissionQueueEntry {
	e := r.ring.GetSQE()
	for e == nil {
		r.makeRoom()
		e = r.ring.GetSQE()
	}
	// giouring's Prepare methods leave fields alone that the kernel looks at
	// (rw_flags, addr3): clear what the slot's last user left.
	*e = giouring.SubmissionQueueEntry{}
	r.tail++
	return e
}

// makeRoom empties the submission queue.
func (r *Ring) makeRoom() {
	if err := r.Submit(); err != nil {
		panic(fmt.Errorf("uring: submission queue stays full: %w", err))
	}
}

// Fixed returns a stand-in for a file descriptor that names entry index of the
// files given to [Ring.RegisterFiles]. All operations accept it.
func Fixed(index int) int { return ^index }

// target resolves an fd that may be Fixed.
func target(e *giouring.SubmissionQueueEntry, fd int) {
	if fd < 0 {
		e.Fd = int32(^fd)
		e.Flags |= giouring.SqeFixedFile
	}
}

// addr returns the address of p for the kernel.
//
// Unsafe: the integer is not seen by the collector, which is why p must not be
// on the Go heap.
func addr(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// Read queues a read of len(p) bytes at byte offset off of fd; an offset of -1
// means the file's position (for an eventfd or a pipe). p belongs to the kernel
// until c is called with the number of bytes read or -errno.
func (r *Ring) Read(fd int, p []byte, off int64, c Completer) {
	e := r.sqe()
	e.PrepareRead(fd, addr(p), uint32(len(p)), uint64(off))
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// Write queues a write of p at byte offset off of fd. p belongs to the kernel
// until c is called with the number of bytes written or -errno.
func (r *Ring) Write(fd int, p []byte, off int64, c Completer) {
	e := r.sqe()
	e.PrepareWrite(fd, addr(p), uint32(len(p)), uint64(off))
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// ReadFixed is Read into memory that lies in entry buf of the buffers given to
// [Ring.RegisterBuffers].
func (r *Ring) ReadFixed(fd int, p []byte, off int64, buf int, c Completer) {
	e := r.sqe()
	e.PrepareReadFixed(fd, addr(p), uint32(len(p)), uint64(off), buf)
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// WriteFixed is Write from memory that lies in entry buf of the buffers given
// to [Ring.RegisterBuffers].
func (r *Ring) WriteFixed(fd int, p []byte, off int64, buf int, c Completer) {
	e := r.sqe()
	e.PrepareWriteFixed(fd, addr(p), uint32(len(p)), uint64(off), buf)
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// Fsync queues an fsync of fd, or with dataOnly an fdatasync. It covers the
// writes that have completed, not those that are in flight.
func (r *Ring) Fsync(fd int, dataOnly bool, c Completer) {
	var flags uint32
	if dataOnly {
		flags = giouring.FsyncDatasync
	}
	e := r.sqe()
	e.PrepareFsync(fd, flags)
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// Nop queues an operation that does nothing.
func (r *Ring) Nop(c Completer) {
	e := r.sqe()
	e.PrepareNop()
	e.UserData = r.hold(c, false)
}

// cmdOffset is the offset of the command's payload in an SQE
// (struct io_uring_sqe: cmd follows splice_fd_in/file_index).
const cmdOffset = 48

// CmdSize is the greatest payload of [Ring.Command] in an SQE of 64 bytes,
// CmdSize128 in one of 128 bytes.
const (
	CmdSize    = 16
	CmdSize128 = 80
)

// Command queues an IORING_OP_URING_CMD: op is the command's number (cmd_op),
// cmd its payload of at most CmdSize bytes (CmdSize128 on a ring with SQE128),
// which is copied. What addresses in the payload point to is not: that memory
// must be mapped and outlive the command.
func (r *Ring) Command(fd int, op uint32, cmd []byte, c Completer) {
	r.command(fd, op, cmd, r.hold(c, true))
}

func (r *Ring) command(fd int, op uint32, cmd []byte, data uint64) {
	room := CmdSize
	if r.sqe128 {
		room = CmdSize128
	}
	if len(cmd) > room {
		panic(fmt.Sprintf("uring: command payload of %d bytes, room for %d", len(cmd), room))
	}
	e := r.sqe()
	e.OpCode = giouring.OpUringCmd
	e.Fd = int32(fd)
	e.Off = uint64(op) // cmd_op is the low half of the union with off
	target(e, fd)
	// Unsafe: the SQE is 64 bytes long, or 128 on a ring with SQE128 (giouring's
	// GetSQE strides accordingly), of which giouring's type covers the first 64.
	payload := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(e), cmdOffset)), room)
	clear(payload[copy(payload, cmd):])
	e.UserData = data
}

// unsubmitted returns how many prepared SQEs the kernel has not consumed, after
// making them visible to it.
func (r *Ring) unsubmitted() uint32 {
	atomic.StoreUint32(r.q.sqTail, r.tail)
	return r.tail - atomic.LoadUint32(r.q.sqHead)
}

// Submit hands all queued operations to the kernel. It does not wait, but an
// operation that the kernel can finish at once is finished.
func (r *Ring) Submit() error {
	for try := 0; ; try++ {
		n := r.unsubmitted()
		if n == 0 {
			return nil
		}
		err := r.enter(n, 0, r.pollFlags(), false)
		if err = r.retry(err, try); err != nil {
			return fmt.Errorf("uring: submit %d operations: %w", n, err)
		}
	}
}

// SubmitAndWait hands all queued operations to the kernel and waits until there
// is at least one completion, for at most timeout: forever when it is negative;
// not at all when it is 0, then it only collects what is there. It may return
// early. Nothing is dispatched: call Reap.
//
// Waiting gives up the goroutine's processor to others (as any blocking system
// call does); not waiting does not, and is cheaper.
func (r *Ring) SubmitAndWait(timeout time.Duration) error {
	if r.Ready() {
		timeout = 0
	}
	for try := 0; ; try++ {
		n := r.unsubmitted()
		var err error
		switch {
		case timeout != 0:
			r.scratch.setTimeout(timeout)
			flags := giouring.EnterGetEvents | giouring.EnterExtArg
			err = r.enter(n, 1, flags, true)
		case n == 0 && !r.deferTW && !r.overflowed():
			return nil
		default:
			err = r.enter(n, 0, r.pollFlags(), false)
		}
		if err == nil && r.unsubmitted() == 0 {
			return nil
		}
		if err == unix.ETIME {
			return nil
		}
		if err == unix.EINTR && n == 0 {
			return nil
		}
		if err = r.retry(err, try); err != nil {
			return fmt.Errorf("uring: submit %d operations and wait: %w", n, err)
		}
		if r.Ready() {
			timeout = 0
		}
	}
}

// setTimeout arms the wait's argument; forever when timeout is negative.
func (s *scratch) setTimeout(timeout time.Duration) {
	s.arg.ts = 0
	if timeout >= 0 {
		s.ts = timespec(timeout)
		s.arg.ts = uint64(uintptr(unsafe.Pointer(&s.ts)))
	}
}

// pollFlags are the flags of an enter that does not wait: with DEFER_TASKRUN,
// or when CQEs have overflowed, only GETEVENTS makes them appear.
func (r *Ring) pollFlags() uint32 {
	if r.deferTW || r.overflowed() {
		return giouring.EnterGetEvents
	}
	return 0
}

// overflowed reports whether the kernel holds CQEs that had no room in the
// queue (IORING_FEAT_NODROP).
func (r *Ring) overflowed() bool {
	return atomic.LoadUint32(r.q.sqFlags)&giouring.SQCQOverflow != 0
}

// enter is io_uring_enter(2). With block set it may sleep, so it goes through
// the scheduler-aware system call; else through the raw one, which saves the
// scheduler's bookkeeping and must not be used where the kernel can sleep long.
func (r *Ring) enter(submit, wait uint32, flags uint32, block bool) error {
	var argp, size uintptr
	if flags&giouring.EnterExtArg != 0 {
		// Unsafe: the address of arena memory; it does not move.
		argp, size = uintptr(unsafe.Pointer(&r.scratch.arg)), unsafe.Sizeof(r.scratch.arg)
	}
	var errno syscall.Errno
	if block {
		_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, r.fd, uintptr(submit), uintptr(wait), uintptr(flags), argp, size)
	} else {
		_, _, errno = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, r.fd, uintptr(submit), uintptr(wait), uintptr(flags), argp, size)
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// retry decides after an enter whether to try again (nil). EBUSY means that the
// completion queue is full and the overflow list too long: make room. EAGAIN
// means that the kernel is short of memory.
func (r *Ring) retry(err error, try int) error {
	switch err {
	case nil, unix.EINTR:
		return nil
	case unix.EBUSY, unix.EAGAIN:
		if try >= busyRetries {
			return err
		}
		if !r.stash() {
			runtime.Gosched()
			time.Sleep(time.Duration(min(try, 100)) * 10 * time.Microsecond)
		}
		return nil
	}
	return err
}

// stash moves the completion queue into the backlog, which makes room in it
// where nothing may be dispatched. It reports whether it moved anything. It
// leaves r.batch alone, which Reap may be in the middle of.
func (r *Ring) stash() bool {
	head := *r.q.cqHead
	tail := atomic.LoadUint32(r.q.cqTail)
	if head == tail {
		return false
	}
	for ; head != tail; head++ {
		e := &r.q.cqes[head&r.q.cqMask]
		r.backlog = append(r.backlog, cqe{e.UserData, e.Res, e.Flags})
	}
	atomic.StoreUint32(r.q.cqHead, head)
	return true
}

// take moves up to a batch of CQEs from the queue to r.batch.
func (r *Ring) take() int {
	head := *r.q.cqHead // ours: nobody else writes it
	n := min(atomic.LoadUint32(r.q.cqTail)-head, reapBatch)
	for i := range n {
		e := &r.q.cqes[(head+i)&r.q.cqMask]
		r.batch[i] = cqe{e.UserData, e.Res, e.Flags}
	}
	if n != 0 {
		atomic.StoreUint32(r.q.cqHead, head+n)
	}
	return int(n)
}

// Ready reports whether Reap would find a completion, without a system call.
func (r *Ring) Ready() bool {
	return len(r.backlog) != 0 || atomic.LoadUint32(r.q.cqTail) != *r.q.cqHead
}

// Reap calls the Completers of all completions that have arrived, in order of
// arrival, and returns their number. Completers may queue operations; they must
// not call Reap.
func (r *Ring) Reap() int {
	if r.reaping {
		panic("uring: Reap called from a Completer")
	}
	r.reaping = true
	var total int
	for {
		if len(r.backlog) != 0 {
			total += r.reapBacklog()
		}
		n := r.take()
		if n == 0 && len(r.backlog) == 0 {
			break
		}
		total += r.dispatch(n)
	}
	r.reaping = false
	return total
}

// dispatch calls the Completers of the first n entries of the batch.
func (r *Ring) dispatch(n int) int {
	var done int
	for i := range r.batch[:n] {
		e := &r.batch[i]
		if c := r.release(e.data, e.flags); c != nil {
			c.Complete(e.res, e.flags)
			done++
		}
	}
	return done
}

// reapBacklog dispatches what stash had put aside. Completers may add to it.
func (r *Ring) reapBacklog() int {
	var done int
	for i := 0; i < len(r.backlog); i++ {
		e := r.backlog[i]
		if c := r.release(e.data, e.flags); c != nil {
			c.Complete(e.res, e.flags)
			done++
		}
	}
	r.backlog = r.backlog[:0]
	return done
}

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

// discard drops the backlog without calling anybody.
func (r *Ring) discard() {
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
