package uring

import (
	"fmt"
	"reflect"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// queues holds the addresses of the parts of a ring that are shared with the
// kernel (struct io_rings; mapped by giouring, so not on the Go heap).
type queues struct {
	sqTail  *uint32 // written by us: SQEs before it are ready
	sqHead  *uint32 // written by the kernel: SQEs before it are consumed
	sqFlags *uint32 // written by the kernel: IORING_SQ_*
	cqHead  *uint32 // written by us: CQEs before it are consumed
	cqTail  *uint32 // written by the kernel: CQEs before it are valid
	cqes    []giouring.CompletionQueueEvent
	cqMask  uint32
	sqSize  uint32
	sqes    unsafe.Pointer // first SQE
}

// setupFlags lists the sets of set-up flags that setup tries, best first; a
// kernel that does not know one of a set's flags answers EINVAL.
//
//   - SINGLE_ISSUER (6.0), DEFER_TASKRUN (6.1): see the package comment.
//   - COOP_TASKRUN (5.19): completion work does not interrupt the thread.
//   - SUBMIT_ALL (5.18): a bad SQE does not stop the ones after it.
func setupFlags(o Options) []uint32 {
	const (
		all  = giouring.SetupSubmitAll
		coop = all | giouring.SetupCoopTaskrun
		own  = coop | giouring.SetupSingleIssuer | giouring.SetupDeferTaskrun
	)
	sets := []uint32{own, coop, all, 0}
	for i := range sets {
		sets[i] |= giouring.SetupCQSize
		if o.SQE128 {
			sets[i] |= giouring.SetupSQE128
		}
	}
	return sets
}

// setup creates a ring with the best flags that the kernel has, and returns
// the flags it got.
func setup(o Options) (*giouring.Ring, uint32, error) {
	var err error
	for _, flags := range setupFlags(o) {
		var p giouring.Params
		if err := setParams(&p, flags, o.CQEntries); err != nil {
			return nil, 0, err
		}
		ring := giouring.NewRing()
		err = ring.QueueInitParams(o.Entries, &p)
		if err == nil {
			return ring, flags, nil
		}
		if err != unix.EINVAL {
			break
		}
	}
	switch err {
	case unix.ENOSYS:
		err = fmt.Errorf("uring: this kernel has no io_uring: %w", err)
	case unix.EPERM:
		err = fmt.Errorf("uring: io_uring is not permitted here (sysctl kernel.io_uring_disabled, or a container's seccomp profile): %w", err)
	case unix.ENOMEM:
		err = fmt.Errorf("uring: set up a ring of %d entries (ulimit -l?): %w", o.Entries, err)
	default:
		err = fmt.Errorf("uring: set up a ring of %d entries: %w", o.Entries, err)
	}
	return nil, 0, err
}

// field returns the address of the named field of *p. giouring keeps the
// fields that are needed here to itself; looking them up by name, once for each
// ring, turns any change in it into an error instead of a stray pointer.
func field(p reflect.Value, name string, kind reflect.Kind) (unsafe.Pointer, error) {
	f := p.Elem().FieldByName(name)
	if !f.IsValid() || f.Kind() != kind {
		return nil, fmt.Errorf("uring: giouring's %s has no field %s of kind %s", p.Elem().Type(), name, kind)
	}
	return f.Addr().UnsafePointer(), nil
}

// setParams stores flags and the number of completion entries in p (struct
// io_uring_params), for which giouring has no setters.
func setParams(p *giouring.Params, flags, cqEntries uint32) error {
	v := reflect.ValueOf(p)
	for name, value := range map[string]uint32{"flags": flags, "cqEntries": cqEntries} {
		f, err := field(v, name, reflect.Uint32)
		if err != nil {
			return err
		}
		// Unsafe: f is the address of a uint32 field of *p, checked above.
		*(*uint32)(f) = value
	}
	return nil
}

// mapQueues finds the shared parts of ring.
func mapQueues(ring *giouring.Ring) (queues, error) {
	var q queues
	rv := reflect.ValueOf(ring)
	sq, err := field(rv, "sqRing", reflect.Pointer)
	if err != nil {
		return q, err
	}
	cq, err := field(rv, "cqRing", reflect.Pointer)
	if err != nil {
		return q, err
	}
	// Unsafe: both fields hold pointers to the types named here (they do not
	// compile into anything else: the struct's type is giouring's own).
	sqv := reflect.ValueOf(*(**giouring.SubmissionQueue)(sq))
	cqv := reflect.ValueOf(*(**giouring.CompletionQueue)(cq))

	var cqes, sqes, cqMask, sqSize unsafe.Pointer
	for _, f := range []struct {
		of   reflect.Value
		name string
		to   *unsafe.Pointer
	}{
		{sqv, "tail", (*unsafe.Pointer)(unsafe.Pointer(&q.sqTail))},
		{sqv, "head", (*unsafe.Pointer)(unsafe.Pointer(&q.sqHead))},
		{sqv, "flags", (*unsafe.Pointer)(unsafe.Pointer(&q.sqFlags))},
		{sqv, "ringEntries", &sqSize},
		{sqv, "sqes", &sqes},
		{cqv, "head", (*unsafe.Pointer)(unsafe.Pointer(&q.cqHead))},
		{cqv, "tail", (*unsafe.Pointer)(unsafe.Pointer(&q.cqTail))},
		{cqv, "ringMask", &cqMask},
		{cqv, "cqes", &cqes},
	} {
		p, err := field(f.of, f.name, reflect.Pointer)
		if err != nil {
			return q, err
		}
		// Unsafe: the field is a pointer into the mapped ring, its element
		// type fixed by the kernel's ABI; copying it keeps it a pointer.
		*f.to = *(*unsafe.Pointer)(p)
	}
	q.cqMask = *(*uint32)(cqMask)
	q.sqSize = *(*uint32)(sqSize)
	q.sqes = sqes
	// Unsafe: the kernel maps ring_mask+1 CQEs (16 bytes each, no CQE32) there.
	q.cqes = unsafe.Slice((*giouring.CompletionQueueEvent)(cqes), q.cqMask+1)
	return q, nil
}
