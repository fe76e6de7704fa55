package uring

import "unsafe"

// AlignedBuffer returns n zeroed bytes of the Go heap that begin at a multiple
// of 4096, as direct I/O asks for. They are for blocking system calls, which
// keep them alive and in place; what a ring is given comes from an Arena.
func AlignedBuffer(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	// The address is needed only as a number; objects of the Go heap do not move.
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (align - 1)
	return b[skip : skip+n : skip+n]
}
