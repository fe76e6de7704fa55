package ring

import (
	"sync/atomic"
	"syscall"
	"time"
)

// A Handler serves a client's requests. Its methods are called on the reactor and must
// not block.
type Handler interface {
	// Handle starts a request. It ends with io.Complete or io.CompleteUntil, at once or
	// later, on the same goroutine. io and io.Buf are the handler's until then.
	Handle(io *IO)
	// TakeBack starts a request again that had ended without an error, until a time,
	// and of which the client could not tell its user before that. It has taken effect
	// already, and is not to do so once more; it is to be completed again. io is as it
	// was, but where the Conn has changed its Group since, this handler has not seen it
	// before.
	TakeBack(io *IO)
}

// An IO is one request of a client. There is one IO for each tag, which is used again
// and again; only the handler of the current request may touch it, until it completes
// it. The fields are for reading.
type IO struct {
	// Tag is below the ring's entries: with it a handler finds its own state for the
	// request in a slice.
	Tag uint32
	Op  Op
	FUA bool // the write must be durable before it completes

	// Offset and Length are the range in bytes. It need not lie inside the image: that
	// the handler checks. They are zero for a flush.
	Offset, Length uint64
	// Sector and Sectors are the whole sectors of 512 bytes that the range touches.
	Sector  uint64
	Sectors uint32

	// Buf is the place for the data of these sectors, of a read or any write: exactly
	// Sectors*512 bytes outside the Go heap that begin at a multiple of 4096, good for
	// O_DIRECT and for a ring. The client can change them at any time. Of a write the
	// handler fills in what lies outside of the range. It is nil for other operations.
	Buf []byte
	// Compare is, of a compare and write, what the range is to have: as long as Data, which
	// is written if it has. The client can change it, too, at any time.
	Compare []byte
	// Decided says of a compare and write that it is done again after Decide: the range may
	// have the contents that are to be written already.
	Decided bool

	s *session
}

// Complete ends the request: err is 0, or the errno for the client. It is called once
// for each request, on the reactor, and does nothing when the Conn has a new reactor, or
// none, since its own has died.
func (io *IO) Complete(err syscall.Errno) { io.s.complete(io.Tag, err, 0, 0) }

// CompleteUntil is Complete, but that the client tells its user before the time until,
// on the clock of package boottime, or has the Conn's handler take it back.
func (io *IO) CompleteUntil(err syscall.Errno, until time.Duration) {
	io.s.complete(io.Tag, err, flagTime, until)
}

// Mismatch ends a compare and write that has found another byte than the client says, at so many
// bytes behind Offset: the client gets EILSEQ, and as of a read without a time.
func (io *IO) Mismatch(at uint64) { io.s.completeAt(io.Tag, syscall.EILSEQ, 0, 0, at) }

// Decide notes that a compare and write has found what the client says, before it has any effect:
// whoever does it again, after the reactor's death or the daemon's, is told so by Decided.
func (io *IO) Decide() {
	s := io.s
	if s.ended.Load() {
		return
	}
	io.Decided = true
	s.c.slots[io.Tag].decided = true
	atomic.OrUint32(&s.c.m.decided[io.Tag/32], 1<<(io.Tag%32))
}

// Data returns the part of Buf that is the range itself, without the rest of its first
// and of its last sector.
func (io *IO) Data() []byte {
	if io.Buf == nil {
		return nil
	}
	at := io.Offset % sectorSize
	return io.Buf[at : at+io.Length]
}

// load makes io the request of the slot.
func (io *IO) load(s *slot, data []byte) {
	io.Op, io.FUA, io.Offset, io.Length = s.op, s.fua, s.offset, s.length
	io.Sector = s.offset >> sectorShift
	io.Sectors = uint32((s.offset+s.length+sectorSize-1)>>sectorShift - io.Sector)
	io.Buf, io.Compare, io.Decided = nil, nil, s.decided
	size := uint64(io.Sectors) * sectorSize
	switch s.op {
	case OpCompareAndWrite:
		from := s.data + compareAt(size) + s.offset%sectorSize
		io.Compare = data[from : from+s.length : from+s.length]
		fallthrough
	case OpRead, OpWrite:
		io.Buf = data[s.data : s.data+size : s.data+size]
	}
}

// complete puts a completion into the client's queue.
func (s *session) complete(tag uint32, err syscall.Errno, flags uint32, until time.Duration) {
	s.completeAt(tag, err, flags, until, 0)
}

// completeAt is complete that says where a comparison has found another byte.
func (s *session) completeAt(tag uint32, err syscall.Errno, flags uint32, until time.Duration, at uint64) {
	if s.ended.Load() {
		return
	}
	c := s.c
	t := &c.slots[tag]
	if t.phase != taken && t.phase != late {
		panic("ring: request completed twice")
	}
	t.phase = idle
	if flags&flagTime != 0 {
		t.phase = timed
	}
	c.busy--
	s.g.left = true
	// The client takes nothing before the tail says so. That it takes its tags' entries
	// before it uses these again is its own affair.
	c.m.cq[c.tail&(c.m.entries-1)] = [cqeWords]uint64{uint64(tag) | uint64(flags)<<32, uint64(-int64(err)), uint64(until), at}
	c.tail++
	atomic.StoreUint32(c.m.cqTail, c.tail)
	s.dirty = true
}
