package daemon

import (
	"bytes"
	"syscall"

	"github.com/lsd-ceph/lsd/engine"
)

// A comparison is what a compare and write knows of the sectors that it has read so far. It reads
// them one piece after the other into the memory for its edges; no other change of them goes on.
//
// That it has found what it was to find is noted before the write has any effect (ring.IO.Decide).
// From then until it has ended nobody else changes these sectors, so it need not be judged again
// by whoever does it anew, the next reactor or the next daemon, but for this: the write has taken
// effect or it has not, and so the range has what is to be written, or still what was compared. In
// both cases it is written, once more where it need not be. If the range has something else then
// somebody has been faster, with the next daemon. Nobody knows what was before that, which makes it
// an I/O error and neither success nor a mismatch.
//
// What had not been decided has had no effect, and is done as if for the first time.
type comparison struct {
	wanted  bool
	sectors uint32 // that have been compared
	other   bool   // the range is not as it was to be
	at      uint64 // where it is not, in bytes from its beginning
	unlike  bool   // the range does not have what is to be written, either
}

// compareOn reads what is compared next.
func (s *librarySlot) compareOn() {
	n := min(uint32(len(s.edges)/engine.SectorSize), s.req.Sectors-s.compare.sectors)
	r := &s.reads[0].req
	r.Op, r.Sector, r.Sectors = engine.Read, s.req.Sector+uint64(s.compare.sectors), n
	r.Buf = s.edges[:n*engine.SectorSize]
	s.front.disk.image.Submit(r)
}

// compared compares what has been read. At the end it writes, or says where it must not.
func (s *librarySlot) compared(r *engine.Request) {
	if s.req.Err == 0 {
		s.comparePiece(r.Buf)
		s.compare.sectors += r.Sectors
	}
	switch c := &s.compare; {
	case s.req.Err != 0:
		s.RequestDone(&s.req)
	case c.other && (!s.io.Decided || c.unlike):
		s.req.Err = syscall.EILSEQ
		if s.io.Decided {
			s.req.Err = syscall.EIO
		}
		s.RequestDone(&s.req)
	case c.sectors < s.req.Sectors:
		s.compareOn()
	default:
		s.io.Decide()
		s.front.disk.image.Submit(&s.req)
	}
}

// comparePiece compares the next sectors, have, and keeps of them what is not to be changed.
func (s *librarySlot) comparePiece(have []byte) {
	c, io := &s.compare, s.io
	at := uint64(c.sectors) * engine.SectorSize // of have in Buf
	start := io.Offset % engine.SectorSize      // of the range in Buf
	end := start + io.Length
	from, to := max(start, at), min(end, at+uint64(len(have)))
	copy(io.Buf[at:from], have)
	copy(io.Buf[to:at+uint64(len(have))], have[to-at:])
	have = have[from-at : to-at]
	if n := differs(have, io.Compare[from-start:to-start]); n < len(have) && !c.other {
		c.other, c.at = true, from-start+uint64(n)
	}
	c.unlike = c.unlike || !bytes.Equal(have, io.Buf[from:to])
}

// differs returns where the first byte is in which a and b, of the same length, differ; that
// length if they do not.
func differs(a, b []byte) int {
	if bytes.Equal(a, b) {
		return len(a)
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a) // the client has changed it meanwhile
}
