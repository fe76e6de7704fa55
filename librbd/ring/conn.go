package ring

import (
	"fmt"
	"math/bits"
	"strconv"
	"sync/atomic"
)

// An Op is what a request asks for, as the submission queue's entries have it.
type Op uint8

// The operations that handlers get.
const (
	OpRead        Op = 1
	OpWrite       Op = 2
	OpFlush       Op = 3 // make durable what has completed before
	OpDiscard     Op = 4 // the contents of the range do not matter any more
	OpWriteZeroes Op = 5
	// OpCompareAndWrite writes if the range has the contents that the client says.
	OpCompareAndWrite Op = 7

	opTooLate Op = 6
)

// String returns the operation's name.
func (op Op) String() string {
	switch op {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case OpWriteZeroes:
		return "write-zeroes"
	case OpCompareAndWrite:
		return "compare and write"
	case opTooLate:
		return "too late"
	}
	return "operation " + strconv.Itoa(int(op))
}

const (
	flagFUA     = 1 // of a request
	flagDecided = 2 // of a request: see IO.Decided
	flagTime    = 1 // of a completion

	sectorSize  = 512
	sectorShift = 9
	maxTransfer = 1 << 20      // bytes of a read or a write
	maxTrim     = 1 << 30      // bytes of a discard or of zeroes
	maxCompare  = 1<<20 - 4096 // bytes of the whole sectors of a compare and write
)

// A Conn is the daemon's knowledge of one client's ring. It is served by at most one
// Group at a time, whose reactor owns it. In between it belongs to whoever hooks it.
type Conn struct {
	m        *Memory
	onBroken func(error)
	err      atomic.Pointer[error]

	session *session // of the Group that serves it, or whose reactor died when it did; nil

	head  uint32 // of the submission queue
	tail  uint32 // of the completion queue
	seq   uint64 // counts the requests
	busy  int    // tags that are under way
	slots []slot
}

// A phase is what a tag is in.
type phase uint8

const (
	idle  phase = iota
	taken       // its request is under way
	late        // it is so again, after a completion that was not told in time
	timed       // its completion had a time, and may yet turn out to be late
)

// A slot is what is known of a tag: its request, of which the client's memory may say
// something else by now.
type slot struct {
	phase phase
	op    Op
	fua   bool
	// decided says of a compare and write that the comparison has come out well.
	decided bool
	tag     uint32
	seq     uint64 // its place in the order of submission
	offset  uint64
	length  uint64
	data    uint64 // where the first sector lies in the data area
}

// NewConn returns what serves the client that has m. onBroken, which may be nil, is
// called once, on the reactor, when the client has broken the rules; it must not block.
func NewConn(m *Memory, onBroken func(error)) *Conn {
	return &Conn{m: m, onBroken: onBroken, slots: make([]slot, m.entries)}
}

// Memory returns the ring's memory.
func (c *Conn) Memory() *Memory { return c.m }

// Err says how the client broke the rules, or nil. Nothing more is taken from the ring
// of a client that did; what was under way goes on. Any goroutine may call Err.
func (c *Conn) Err() error {
	if err := c.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Busy returns how many requests are under way. It is called on the reactor that
// serves c, or when that has ended.
func (c *Conn) Busy() int { return c.busy }

// Close ends c and closes its Memory. Nobody may be serving it, as for Hook; what its
// handlers still say is ignored.
func (c *Conn) Close() error {
	if c.session != nil {
		c.session.ended.Store(true)
		c.session = nil
	}
	return c.m.Close()
}

// broken ends what is taken from the ring.
func (c *Conn) broken(err error) {
	err = fmt.Errorf("the client breaks the ring's rules: %w", err)
	if c.err.CompareAndSwap(nil, &err) && c.onBroken != nil {
		c.onBroken(err)
	}
}

// waiting returns how many entries of the submission queue are there to be taken, and
// reports whether there can be so many.
func (c *Conn) waiting() (uint32, bool) {
	n := atomic.LoadUint32(c.m.sqTail) - c.head
	return n, n <= c.m.entries
}

// take takes the next entry, which is there, from the submission queue, and returns the
// tag that it is of, now under way.
func (c *Conn) take() (*slot, error) {
	e := &c.m.sq[c.head&(c.m.entries-1)]
	var w [sqeWords]uint64
	for i := range w {
		w[i] = atomic.LoadUint64(&e[i])
	}
	c.head++
	op, flags, tag := Op(w[0]), uint8(w[0]>>8), uint32(w[0]>>32)
	switch {
	case uint16(w[0]>>16) != 0 || w[4]|w[5]|w[6]|w[7] != 0:
		return nil, fmt.Errorf("%v: bytes that must be zero are not", op)
	case flags&^flagFUA != 0 && (op != OpCompareAndWrite || flags&^(flagFUA|flagDecided) != 0):
		return nil, fmt.Errorf("%v: unknown flags %#x", op, flags)
	case tag >= c.m.entries:
		return nil, fmt.Errorf("%v: tag %d of %d", op, tag, c.m.entries)
	}
	s := &c.slots[tag]
	if s.phase == taken || s.phase == late {
		return nil, fmt.Errorf("%v: tag %d is under way", op, tag)
	}
	if op == opTooLate {
		if s.phase != timed {
			return nil, fmt.Errorf("tag %d is too late, which had no time", tag)
		}
		if flags != 0 || w[1]|w[2]|w[3] != 0 {
			return nil, fmt.Errorf("%v: bytes that must be zero are not", op)
		}
		s.phase = late
		c.busy++
		return s, nil
	}
	if op == OpCompareAndWrite && c.m.version < 2 {
		return nil, fmt.Errorf("%v: %w", op, errOp)
	}
	data, err := place(op, w[1], w[2], w[3], uint64(len(c.m.data)))
	if err != nil {
		return nil, fmt.Errorf("%v of %d bytes at %d, data at %d: %w", op, w[2], w[1], w[3], err)
	}
	c.seq++
	*s = slot{phase: taken, op: op, fua: flags&flagFUA != 0, decided: flags&flagDecided != 0, tag: tag, seq: c.seq, offset: w[1], length: w[2], data: data}
	c.busy++
	return s, nil
}

// place checks the range of a request, and its place in a data area of area bytes. It
// returns where its first sector lies there.
func place(op Op, offset, length, data, area uint64) (uint64, error) {
	end, carry := bits.Add64(offset, length, 0)
	if carry != 0 || end > 1<<63 {
		return 0, errEnd
	}
	switch op {
	case OpRead, OpWrite, OpCompareAndWrite:
		if length == 0 || length > maxTransfer {
			return 0, errLength
		}
		if data%align != offset%sectorSize {
			return 0, errAligned
		}
		first := data - offset%sectorSize
		size := (end+sectorSize-1)>>sectorShift<<sectorShift - offset>>sectorShift<<sectorShift
		if op == OpCompareAndWrite {
			if size > maxCompare {
				return 0, errLength
			}
			size += compareAt(size)
		}
		if first >= area || size > area-first {
			return 0, errArea
		}
		return first, nil
	case OpDiscard, OpWriteZeroes:
		if length == 0 || length > maxTrim {
			return 0, errLength
		}
		if (offset|length)%sectorSize != 0 {
			return 0, errSectors
		}
	case OpFlush:
		if offset|length != 0 {
			return 0, errRange
		}
	default:
		return 0, errOp
	}
	if data != 0 {
		return 0, errData
	}
	return 0, nil
}

// compareAt returns how far behind the beginning of the data of a compare and write, of so many
// bytes of whole sectors, what is to be compared begins.
func compareAt(size uint64) uint64 { return (size + align - 1) &^ (align - 1) }

// A rule is what a request breaks.
type rule string

func (r rule) Error() string { return string(r) }

const (
	errOp      rule = "there is no such operation"
	errEnd     rule = "it ends beyond what there can be"
	errLength  rule = "it is too long, or empty"
	errAligned rule = "its data does not lie as it does in the image"
	errArea    rule = "its sectors are not in the data area"
	errSectors rule = "it is not of whole sectors"
	errRange   rule = "it has no range"
	errData    rule = "it has no data"
)
