package daemon

import (
	"syscall"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/ublk"
)

// A front joins a block device to an image: it is the device's Handler. Each
// request slot of the device has its engine request, so that nothing is
// allocated for an I/O. The reactor owns it.
type front struct {
	image *engine.Image // nil: everything fails
	slots []slot
	// changes has what is written here in one order with what library clients write; nil where
	// these may not write beside the device.
	changes *changes
	// deaf is set when another server is to take over: what the kernel has asked
	// stays unanswered, so that it asks that one.
	deaf bool
}

// A slot is one request slot of the device.
type slot struct {
	change
	front    *front
	io       completer
	changing bool // it is among the changes
}

// A completer is a *ublk.IO, as far as it is told the end of a request.
type completer interface {
	Complete(res int32)
	CompleteInTime(res int32)
}

func newFront(im *engine.Image, slots int, c *changes) *front {
	f := &front{image: im, slots: make([]slot, slots), changes: c}
	for i := range f.slots {
		f.slots[i].front = f
		f.slots[i].req.Done = &f.slots[i]
	}
	return f
}

// Handle implements ublk.Handler.
func (f *front) Handle(io *ublk.IO) {
	s := &f.slots[io.Index]
	s.io = io
	r := &s.req
	r.FUA, r.Sector, r.Sectors, r.Buf = io.FUA, io.Sector, io.Sectors, io.Buf
	switch io.Op {
	case ublk.OpRead:
		r.Op = engine.Read
	case ublk.OpWrite:
		r.Op = engine.Write
	case ublk.OpFlush:
		r.Op, r.Sector, r.Sectors = engine.Flush, 0, 0
	case ublk.OpDiscard:
		r.Op = engine.Discard
	case ublk.OpWriteZeroes:
		r.Op = engine.WriteZeroes
	default:
		r.Err = syscall.EOPNOTSUPP
		s.RequestDone(r)
		return
	}
	f.submit(s)
}

func (f *front) submit(s *slot) {
	switch {
	case f.deaf:
	case f.image == nil:
		s.req.Err = syscall.EIO
		s.RequestDone(&s.req)
	case f.changes != nil && s.req.Op != engine.Read && s.req.Op != engine.Flush:
		s.changing = true
		f.changes.begin(&s.change)
	default:
		f.image.Submit(&s.req)
	}
}

// RequestDone implements engine.Completer.
func (s *slot) RequestDone(r *engine.Request) {
	if s.front.deaf {
		return
	}
	if s.changing {
		s.changing = false
		s.front.changes.end(&s.change)
	}
	switch {
	case r.Err != 0:
		s.io.Complete(-int32(r.Err))
	case r.Leased:
		s.io.CompleteInTime(int32(len(r.Buf)))
	default:
		// All of Buf, or nothing: the engine knows no short reads. It is nil for
		// what has no data.
		s.io.Complete(int32(len(r.Buf)))
	}
}

// Late implements ublk.LateHandler.
func (f *front) Late(io *ublk.IO) {
	if !f.deaf {
		f.image.TakeBack(&f.slots[io.Index].req)
	}
}
