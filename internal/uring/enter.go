package uring

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

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
	return err == nil && !r.Ready() && !r.overflowed(), err
}

// SubmitAndWait hands all queued operations to the kernel and waits until there
// is at least one completion besides those of [Ring.Prompt], for at most timeout: forever when it is negative;
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
			wait := 1 + r.prompt
			if wait != 1 && (timeout < 0 || timeout > promptTimeout) {
				timeout = promptTimeout
			}
			r.scratch.setTimeout(timeout)
			flags := giouring.EnterGetEvents | giouring.EnterExtArg
			err = r.enter(n, wait, flags, true)
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
	if submit != 0 {
		r.prompt = 0
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// Prompt says that the operation that was queued last completes as it is submitted, and
// that its completion is no news: a wait in the same system call goes on, though for
// promptTimeout at most, in case that it is news.
func (r *Ring) Prompt() { r.prompt++ }

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
	for r.next, r.taken = 0, n; r.next < n; {
		e := &r.batch[r.next]
		r.next++
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
