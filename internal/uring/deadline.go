package uring

import (
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/internal/boottime"
	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// A deadline is an IORING_OP_TIMEOUT that stays in flight until its time has come.
//
// A process that looks at a clock and then makes a system call can be stopped in
// between for any time. So the kernel looks: each command of CommandBefore is
// linked to an update of the timeout to the time that it has already, which fails
// when it has fired, and a failed link takes the command with it. That it fired is
// known when its interrupt has run, on whatever processor and whether the process
// runs or not.
type deadline struct {
	r    *Ring
	at   time.Duration
	data uint64 // the timeout's user_data, while it is armed
	on   bool   // it is in flight
}

// noData is user_data of nobody: no ring has so many slots.
const noData = 1<<64 - 1

// SetDeadline moves the deadline of [Ring.CommandBefore] to at, on the clock of
// package boottime. It only moves forward; before the first call it has passed.
func (r *Ring) SetDeadline(at time.Duration) {
	d := &r.deadline
	if at <= d.at {
		return
	}
	d.at = at
	r.scratch.deadline = timespec(at)
	if !d.on {
		d.arm()
		return
	}
	// If it fires before this is there, it is armed again as that is reaped.
	d.update(noData)
}

// arm puts the timeout in flight.
func (d *deadline) arm() {
	e := d.r.sqe()
	e.OpCode = giouring.OpTimeout
	e.Fd = -1
	e.Addr = d.r.scratch.deadlineAddr()
	e.Len = 1 // one timespec
	e.OpcodeFlags = giouring.TimeoutAbs | giouring.TimeoutBoottime
	d.data, d.on = d.r.hold(d, true), true
	e.UserData = d.data
}

// update queues an update of the timeout. There is a CQE, with the data given, if
// that fails only.
func (d *deadline) update(data uint64) *giouring.SubmissionQueueEntry {
	e := d.r.sqe()
	e.OpCode = giouring.OpTimeoutRemove
	e.Fd = -1
	e.Addr = noData
	if d.on {
		e.Addr = d.data
	}
	e.Off = d.r.scratch.deadlineAddr()
	e.OpcodeFlags = giouring.TimeoutUpdate | giouring.TimeoutAbs // its clock stays
	e.Flags = giouring.SqeCQESkipSuccess
	e.UserData = data
	return e
}

// Complete implements Completer: the timeout has fired, or the ring is drained.
func (d *deadline) Complete(res int32, _ uint32) {
	d.on = false
	if res == -int32(unix.ETIME) && boottime.Now() < d.at {
		d.arm()
	}
}

// CommandBefore is Command, but for one thing: if the ring's deadline has passed
// when the kernel comes to the command, it does nothing, and c gets a result that
// TooLate knows. How late the queue is submitted does not matter, nor whether the
// process is stopped before that.
func (r *Ring) CommandBefore(fd int, op uint32, cmd, buf []byte, c Completer) Queued {
	// A link does not reach over the end of a submission.
	if r.tail-atomic.LoadUint32(r.q.sqHead)+2 > r.q.sqSize {
		r.makeRoom()
	}
	// Only one of the two has a CQE: a link that fails, and would have none if it did
	// not, takes away that of what is linked to it (io_uring_enter(2),
	// IOSQE_CQE_SKIP_SUCCESS). So they share the slot.
	data := r.hold(c, true)
	r.deadline.update(data).Flags |= giouring.SqeIOLink
	return r.command(fd, op, cmd, buf, data)
}

// TooLate reports whether a command's result says that the deadline had passed.
func TooLate(res int32) bool {
	return res == -int32(unix.ENOENT) || res == -int32(unix.EALREADY)
}
