// Package uring is a thin layer over io_uring (linux/io_uring.h) and the only
// package that imports giouring.
//
// giouring creates and maps the ring and prepares submission entries (SQEs).
// This package adds what a server needs around that: completions (CQEs) that
// reach an object instead of a number, no allocation per operation, one
// io_uring_enter that both submits and waits, system calls that cooperate with
// the Go scheduler, and recovery from completion-queue overflow.
//
// # Threads
//
// A [Ring] is not safe for concurrent use and belongs to the OS thread that
// called [New]: the kernel refuses every other one with EEXIST. So the caller is
// a goroutine locked to its thread. In return the kernel runs completion work
// only inside the ring's own enter calls (IORING_SETUP_DEFER_TASKRUN), which
// batches completions and interrupts nobody. [Waker.Wake] is the one method for
// other goroutines.
//
// # Memory
//
// The kernel keeps the address of a buffer while an operation is in flight.
// Buffers therefore come from an [Arena] or another mapping, never from the Go
// heap, and stay the kernel's until the operation's [Completer] has been called.
//
// # Linking
//
// giouring v0.0.0-20230826085535-69588b89acb9 reaches into syscall.munmap by a
// linkname, which linkers since Go 1.23 refuse: everything that links this
// package needs -ldflags=-checklinkname=0.
package uring
