// Package aio names the two ideas that asynchronous I/O needs here, so that
// packages which do I/O need not know who performs it: in production an
// io_uring on a reactor, in a simulation a model of a disk.
package aio

// A Completer is told how an operation ended.
//
// Complete is called once for each operation, on the goroutine that owns the
// ring or device (for a reactor's ring: the reactor), never from within the
// call that queued the operation. res is the kernel's result: a byte count (or
// another value that is not negative) on success, -errno on failure. flags are
// the completion's flags (IORING_CQE_F_*, linux/io_uring.h); most callers
// ignore them.
//
// Complete may queue further operations. It must not block.
type Completer interface {
	Complete(res int32, flags uint32)
}

// A Device is a file or disk with asynchronous operations. Its methods are
// called on the goroutine that owns it and return at once.
//
// The buffer p belongs to the device until c has been called. It must lie
// outside the Go heap (see uring.Arena), because the kernel keeps its address.
type Device interface {
	// ReadAt reads len(p) bytes at byte offset off. A result smaller than
	// len(p) is a short read: the end of the file, or less than asked for.
	ReadAt(p []byte, off int64, c Completer)

	// WriteAt writes p at byte offset off. A result smaller than len(p) means
	// that only that many bytes were written. Written is not durable: see Sync.
	WriteAt(p []byte, off int64, c Completer)

	// Sync makes durable every write that completed before Sync was called
	// (fdatasync).
	Sync(c Completer)
}
