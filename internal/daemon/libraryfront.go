package daemon

import (
	"syscall"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/ring"
)

// A libraryFront joins the ring of a library's handle to an image: it is the ring's Handler.
// Each tag has its engine request, so that nothing is allocated for an I/O. The reactor owns
// it.
type libraryFront struct {
	disk     *disk
	readOnly bool
	slots    []librarySlot
}

// A librarySlot is one tag of a ring.
type librarySlot struct {
	change
	front    *libraryFront
	io       *ring.IO
	changing bool // it is among the disk's changes

	// Of a write that does not begin or end with a sector: memory for the first and the last
	// one (edges), the reads of these, and how many of them are under way.
	// A compare and write has them whatever its range, and compares piece by piece with them.
	reads   [2]edgeRead
	pending int
	compare comparison
}

// An edgeRead reads a sector of which a write changes a part.
type edgeRead struct {
	slot *librarySlot
	req  engine.Request
}

func newLibraryFront(d *disk, entries int, readOnly bool) *libraryFront {
	f := &libraryFront{disk: d, readOnly: readOnly, slots: make([]librarySlot, entries)}
	for i := range f.slots {
		s := &f.slots[i]
		s.front, s.slot, s.req.Done = f, s, s
		for j := range s.reads {
			s.reads[j].slot, s.reads[j].req.Done = s, &s.reads[j]
		}
	}
	return f
}

// Handle implements ring.Handler.
func (f *libraryFront) Handle(io *ring.IO) {
	s := &f.slots[io.Tag]
	s.io, s.changing, s.compare = io, false, comparison{}
	r := &s.req
	r.Err, r.Leased = 0, false
	r.FUA, r.Sector, r.Sectors, r.Buf = io.FUA, io.Sector, io.Sectors, io.Buf
	switch io.Op {
	case ring.OpRead:
		r.Op = engine.Read
	case ring.OpFlush:
		r.Op = engine.Flush
	case ring.OpWrite:
		r.Op, s.changing = engine.Write, true
	case ring.OpCompareAndWrite:
		r.Op, s.changing, s.compare.wanted = engine.Write, true, true
	case ring.OpDiscard:
		r.Op, s.changing = engine.Discard, true
	case ring.OpWriteZeroes:
		r.Op, s.changing = engine.WriteZeroes, true
	default:
		s.fail(syscall.EOPNOTSUPP)
		return
	}
	switch {
	case f.disk.deaf:
	case f.disk.image == nil:
		s.fail(syscall.EIO)
	case !s.changing:
		f.disk.image.Submit(r)
	case f.readOnly:
		s.fail(syscall.EROFS)
	default:
		f.disk.changes.begin(&s.change)
	}
}

// fail ends a request that has not begun.
func (s *librarySlot) fail(err syscall.Errno) {
	s.changing = false
	s.io.Complete(err)
}

// TakeBack implements ring.Handler.
func (f *libraryFront) TakeBack(io *ring.IO) {
	s := &f.slots[io.Tag]
	s.io, s.changing = io, false
	switch {
	case f.disk.deaf:
	case f.disk.image == nil:
		s.fail(syscall.EIO)
	default:
		f.disk.image.TakeBack(&s.req)
	}
}

// RequestDone implements engine.Completer.
func (s *librarySlot) RequestDone(r *engine.Request) {
	d := s.front.disk
	if d.deaf {
		return
	}
	io, err, leased := s.io, r.Err, r.Leased
	if s.changing {
		s.changing = false
		d.changes.end(&s.change)
	}
	switch {
	case err == syscall.EILSEQ:
		io.Mismatch(s.compare.at)
	case err == 0 && leased:
		io.CompleteUntil(0, d.env.lease)
	default:
		io.Complete(err)
	}
}

// edged reports whether a write needs the sectors that it changes: it changes a part of one, or
// compares.
func (s *librarySlot) edged() bool {
	return s.compare.wanted || s.req.Op == engine.Write && (s.io.Offset|s.io.Length)%engine.SectorSize != 0
}

// readEdges reads the sectors of which a write changes a part; then it is submitted.
func (s *librarySlot) readEdges() {
	first, last := s.req.Sector, s.req.Sector+uint64(s.req.Sectors)-1
	s.pending = 1 // held until all reads are submitted
	if s.io.Offset%engine.SectorSize != 0 || first == last {
		s.readEdge(0, first)
	}
	if (s.io.Offset+s.io.Length)%engine.SectorSize != 0 && first != last {
		s.readEdge(1, last)
	}
	s.edgeDone()
}

func (s *librarySlot) readEdge(i int, sector uint64) {
	s.pending++
	r := &s.reads[i].req
	r.Op, r.Sector, r.Sectors, r.Buf = engine.Read, sector, 1, s.edge(i)
	s.front.disk.image.Submit(r)
}

// edge returns the memory for the first or the last sector.
func (s *librarySlot) edge(i int) []byte { return s.edges[i*edgeSize:][:engine.SectorSize] }

// RequestDone implements engine.Completer.
func (e *edgeRead) RequestDone(r *engine.Request) {
	if e.slot.front.disk.deaf {
		return
	}
	if r.Err != 0 {
		e.slot.req.Err = r.Err
	}
	if e.slot.compare.wanted {
		e.slot.compared(r)
		return
	}
	e.slot.edgeDone()
}

// edgeDone submits the write once its edges are read.
func (s *librarySlot) edgeDone() {
	if s.pending--; s.pending > 0 {
		return
	}
	if s.req.Err != 0 {
		s.RequestDone(&s.req)
		return
	}
	head := s.io.Offset % engine.SectorSize
	tail := int(head + s.io.Length)
	copy(s.req.Buf[:head], s.edge(0))
	if rest := tail % engine.SectorSize; rest != 0 {
		from := s.edge(0)
		if s.req.Sectors > 1 {
			from = s.edge(1)
		}
		copy(s.req.Buf[tail:], from[rest:])
	}
	s.front.disk.image.Submit(&s.req)
}
