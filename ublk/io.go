package ublk

import (
	"encoding/binary"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Op is the kind of a request (UBLK_IO_OP_*, include/uapi/linux/ublk_cmd.h).
type Op uint8

// The operations that devices of this package get.
const (
	OpRead        Op = 0
	OpWrite       Op = 1
	OpFlush       Op = 2 // make durable what has completed before
	OpDiscard     Op = 3 // the contents of the range do not matter any more
	OpWriteZeroes Op = 5
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
	}
	return "op " + strconv.Itoa(int(op))
}

// Flags of a request (UBLK_IO_F_*, include/uapi/linux/ublk_cmd.h).
type Flags uint32

// The flags that matter to a log-structured disk.
const (
	FlagFUA     Flags = 1 << 13 // durable before it completes
	FlagNoUnmap Flags = 1 << 15 // write-zeroes: keep the space allocated
)

// A Handler serves a device's requests.
//
// Handle is called on the device's reactor for each request and must not block.
// It calls io.Complete at once or later, on the same goroutine. io and io.Buf
// are the handler's until then.
type Handler interface {
	Handle(io *IO)
}

// A LateHandler is a Handler that uses [IO.CompleteInTime]. Late is called for each
// request whose completion came too late: it is the handler's again, as it was
// before, and waits to be completed.
type LateHandler interface {
	Handler
	Late(io *IO)
}

// HandlerFunc makes a function a Handler.
type HandlerFunc func(io *IO)

// Handle implements [Handler].
func (f HandlerFunc) Handle(io *IO) { f(io) }

// An IO is one request of the kernel. The device has one IO for each tag of each
// queue and uses it again and again; only the handler of the current request may
// touch it, until it completes it. The fields are for reading.
type IO struct {
	Op      Op
	FUA     bool // the write must be durable before it completes
	Flags   Flags
	Sectors uint32 // length in units of 512 bytes
	Sector  uint64 // start in units of 512 bytes

	// Buf is the data of a read (to be filled) or a write: exactly
	// Sectors*512 bytes of page-aligned memory outside the Go heap, good for
	// O_DIRECT and for a ring. It is nil for other operations, and where
	// Params.NoData has had an effect.
	Buf []byte

	// Index is a dense number of this IO among the Slots of its device, from
	// 0: with it a handler finds its own state for the request in a slice.
	Index int

	Queue, Tag uint16

	t *tag
}

// Complete ends the request. res is the number of bytes read or written, 0 for
// the success of any other operation, or -errno. A read that reports more than
// it has put into Buf would show the reader what another request left there; a
// short count makes the kernel ask again for the rest.
//
// It is called once for each request, on the reactor's goroutine. The kernel
// learns of it with the reactor's next submission.
func (io *IO) Complete(res int32) { io.t.commit(res, false) }

// CompleteInTime is Complete, if the kernel comes to it before the deadline of the
// reactor's ring ([uring.Ring.SetDeadline]). If it does not, the kernel learns
// nothing, and the device's handler, which must be a [LateHandler], has the request
// again.
func (io *IO) CompleteInTime(res int32) { io.t.commit(res, true) }

// tag is one request slot of a queue. It is the reactor's.
type tag struct {
	d    *Device
	via  carrier
	desc []byte // its struct ublksrv_io_desc, which the kernel writes; see mapDescriptors
	buf  []byte
	io   IO
	addr uint64 // of buf, for the kernel
	busy bool   // the handler has it

	// The result on its way to the kernel.
	res    int32
	inTime bool // it may come too late
	next   *tag // of those that wait in a batchQueue
}

// init prepares a tag.
func (t *tag) init(d *Device, queue, number int, buf []byte) {
	t.d, t.buf = d, buf
	t.io = IO{Index: queue*d.info.Depth + number, Queue: uint16(queue), Tag: uint16(number), t: t}
	if len(buf) != 0 {
		// Unsafe: the kernel is given the address of arena memory, which stays
		// mapped until the queue has ended.
		t.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(buf))))
	}
}

// A carrier brings the requests of some tags from the kernel and takes the results to
// it. Its methods are called on the reactor. When the kernel does not use its tags any
// more it calls the device's ended, once.
type carrier interface {
	// offer hands the tags to the kernel for the first time.
	offer() error
	// commit sends the result of a tag's request and offers the tag again.
	commit(t *tag)
	// idle reports whether neither the handler has a request nor a result is under way
	// that has not been submitted.
	idle() bool
}

// commit ends the handler's turn, sends the result and offers the tag again; if inTime
// is set, only if that is not too late.
func (t *tag) commit(res int32, inTime bool) {
	if !t.busy {
		panic("ublk: request completed twice")
	}
	t.busy = false
	t.res, t.inTime = res, inTime
	t.via.commit(t)
}

// resOK is UBLK_IO_RES_OK, resAbort UBLK_IO_RES_ABORT.
const (
	resOK    = 0
	resAbort = -int32(unix.ENODEV)
)

// arrived gives the handler the request that the kernel has put into the tag.
func (t *tag) arrived() {
	t.busy = true
	if !t.load() {
		t.commit(-int32(unix.EIO), false)
		return
	}
	t.d.handler.Handle(&t.io)
}

// late gives the handler the request again, of which the kernel has not learned the
// result.
func (t *tag) late() {
	t.busy = true
	t.d.handler.(LateHandler).Late(&t.io)
}

// load reads the request's descriptor. It reports whether the request lies
// within the device and its buffer; the kernel has checked that, but memory
// safety does not depend on it.
func (t *tag) load() bool {
	opFlags := binary.NativeEndian.Uint32(t.desc[0:])
	io := &t.io
	io.Op = Op(opFlags)
	io.Flags = Flags(opFlags &^ 0xff)
	io.FUA = io.Flags&FlagFUA != 0
	io.Sectors = binary.NativeEndian.Uint32(t.desc[4:])
	io.Sector = binary.NativeEndian.Uint64(t.desc[8:])
	io.Buf = nil
	switch io.Op {
	case OpRead, OpWrite:
		n := uint64(io.Sectors) * sectorSize
		if n > uint64(t.d.info.MaxIOBytes) {
			return false
		}
		if len(t.buf) != 0 {
			io.Buf = t.buf[:n:n]
		}
	case OpFlush:
		return true // its range means nothing
	}
	size := t.d.sectors.Load()
	return io.Sector <= size && uint64(io.Sectors) <= size-io.Sector
}

// Null completes every request at once and keeps nothing: reads return
// whatever the buffers hold. It is for measuring what ublk itself costs, and for
// devices with Params.NoData.
type Null struct{}

// Handle implements [Handler].
func (Null) Handle(io *IO) {
	var n int32
	if io.Op == OpRead || io.Op == OpWrite {
		n = int32(io.Sectors * sectorSize)
	}
	io.Complete(n)
}
