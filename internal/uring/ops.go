package uring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

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

// PollIn calls c when there is something to read from fd, and again each time that
// more has come, without anybody reading it: for an eventfd, after each write to it, of
// which several may be seen as one. It ends, as the kernel sees fit or by CancelFile,
// with a call whose flags do not have More. Unlike a pending read it does not depend on
// the file's O_NONBLOCK, which anybody who has the same open file may change.
func (r *Ring) PollIn(fd int, c Completer) {
	e := r.sqe()
	e.PreparePollMultishot(fd, unix.POLLIN)
	target(e, fd)
	e.UserData = r.hold(c, false)
}

// More reports whether there will be further calls of the Completer that got flags.
func More(flags uint32) bool { return flags&giouring.CQEFMore != 0 }

// CancelFile asks the kernel to cancel what has been queued for fd, which is not
// Fixed, and has not ended. What can be cancelled completes with -ECANCELED or -EINTR;
// what cannot goes on. An fd may be closed when all of its operations have completed.
func (r *Ring) CancelFile(fd int) {
	e := r.sqe()
	e.PrepareCancelFd(fd, giouring.AsyncCancelAll)
	e.Flags |= giouring.SqeCQESkipSuccess
	e.UserData = noData // that there was nothing to cancel interests nobody
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
// which is copied. buf is what the command's addr points to, nil for none. It and
// what addresses in the payload point to is not copied: that memory must be mapped and
// outlive the command.
func (r *Ring) Command(fd int, op uint32, cmd, buf []byte, c Completer) Queued {
	return r.command(fd, op, cmd, buf, r.hold(c, true))
}

func (r *Ring) command(fd int, op uint32, cmd, buf []byte, data uint64) Queued {
	r.checkPayload(cmd)
	e := r.sqe()
	e.OpCode = giouring.OpUringCmd
	e.Fd = int32(fd)
	e.Off = uint64(op) // cmd_op is the low half of the union with off
	if buf != nil {
		e.Addr = uint64(addr(buf))
	}
	target(e, fd)
	r.setPayload(e, cmd)
	e.UserData = data
	return Queued(r.tail)
}

// payloadRoom returns the greatest size of a command's payload.
func (r *Ring) payloadRoom() int {
	if r.sqe128 {
		return CmdSize128
	}
	return CmdSize
}

func (r *Ring) checkPayload(cmd []byte) {
	if room := r.payloadRoom(); len(cmd) > room {
		panic(fmt.Sprintf("uring: command payload of %d bytes, room for %d", len(cmd), room))
	}
}

// setPayload copies a command's payload, which has been checked, into its SQE.
func (r *Ring) setPayload(e *giouring.SubmissionQueueEntry, cmd []byte) {
	// Unsafe: the SQE is 64 bytes long, or 128 on a ring with SQE128 (giouring's
	// GetSQE strides accordingly), of which giouring's type covers the first 64.
	payload := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(e), cmdOffset)), r.payloadRoom())
	clear(payload[copy(payload, cmd):])
}

// uringCmdMultishot is IORING_URING_CMD_MULTISHOT (linux/io_uring.h, since 6.18): the
// command completes again and again.
const uringCmdMultishot = 1 << 1

// CommandMultishot is Command for one that completes again and again until the flags
// that c gets do not have [More]. Each time the kernel takes a buffer of b for its
// answer, which [Buffers.Get] finds by the flags.
func (r *Ring) CommandMultishot(fd int, op uint32, cmd []byte, b *Buffers, c Completer) {
	e := r.entry(r.command(fd, op, cmd, nil, r.hold(c, true)))
	e.OpcodeFlags = uringCmdMultishot
	e.Flags |= giouring.SqeBufferSelect
	e.BufIG = b.group
}

// Queued names an operation that has been queued, by the ring's tail after it.
type Queued uint32

// Amend replaces the payload of a command that has not been submitted yet, and reports
// whether it could. q is not older than 2^31 operations.
func (r *Ring) Amend(q Queued, cmd []byte) bool {
	// Only our own enter calls move the head: nothing is submitted meanwhile.
	if int32(uint32(q)-atomic.LoadUint32(r.q.sqHead)) <= 0 {
		return false
	}
	r.checkPayload(cmd)
	r.setPayload(r.entry(q), cmd)
	return true
}

// entry returns the SQE of an operation that has not been submitted.
func (r *Ring) entry(q Queued) *giouring.SubmissionQueueEntry {
	size := unsafe.Sizeof(giouring.SubmissionQueueEntry{})
	if r.sqe128 {
		size *= 2
	}
	i := uintptr((uint32(q) - 1) & (r.q.sqSize - 1))
	// Unsafe: sqSize SQEs of that size are mapped there, a power of two of them.
	return (*giouring.SubmissionQueueEntry)(unsafe.Add(r.q.sqes, i*size))
}
