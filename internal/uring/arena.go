package uring

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// An Arena is anonymous memory outside the Go heap: page aligned (so it suits
// O_DIRECT), never moved and never freed by the collector. Every buffer whose
// address the kernel keeps after a system call has returned must come from one.
//
// An Arena holds no Go pointers the collector would see: it is for bytes only.
type Arena struct {
	mem []byte
}

// NewArena maps an arena of at least size bytes, rounded up to whole pages and
// zeroed. The pages are populated on first touch.
func NewArena(size int) (*Arena, error) {
	if size <= 0 {
		return nil, fmt.Errorf("uring: arena of %d bytes", size)
	}
	page := os.Getpagesize()
	size = (size + page - 1) / page * page
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("uring: map an arena of %d bytes: %w", size, err)
	}
	return &Arena{mem: mem}, nil
}

// Bytes returns the whole arena. The slice and all parts of it are invalid
// after Close.
func (a *Arena) Bytes() []byte { return a.mem }

// PreferLarge has the kernel find large pages, where it can, for what has not been touched yet. It is
// for memory into which direct I/O reads much at one time: in pages of 4 KiB, which are anywhere, that
// becomes many pieces, and more requests, since a disk takes so many pieces in one at most.
func (a *Arena) PreferLarge() {
	// A kernel need not have them. Without, all takes longer; that is all.
	_ = unix.Madvise(a.mem, unix.MADV_HUGEPAGE)
}

// Populate has the kernel find and clear the arena's pages now, in large ones where it can: whoever
// touches them first does not wait for that. It is for an arena that nobody uses yet.
func (a *Arena) Populate() error {
	a.PreferLarge()
	err := unix.Madvise(a.mem, unix.MADV_POPULATE_WRITE)
	if err == unix.EINVAL { // it is there since Linux 5.14
		for i := 0; i < len(a.mem); i += os.Getpagesize() {
			a.mem[i] = 0
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("uring: populate an arena of %d bytes: %w", len(a.mem), err)
	}
	return nil
}

// Release gives the arena's pages back to the system: it reads as zeroes from
// then on, and takes memory again where it is touched. Nobody may be using it.
// Memory that is locked (mlockall) is given back too, where the kernel can
// (MADV_DONTNEED_LOCKED, since Linux 5.18).
func (a *Arena) Release() error {
	err := unix.Madvise(a.mem, unix.MADV_DONTNEED_LOCKED)
	if err == unix.EINVAL {
		err = unix.Madvise(a.mem, unix.MADV_DONTNEED)
	}
	if err != nil {
		return fmt.Errorf("uring: release an arena: %w", err)
	}
	return nil
}

// Close unmaps the arena. No operation that uses it may be in flight. A second
// Close does nothing.
func (a *Arena) Close() error {
	if a.mem == nil {
		return nil
	}
	mem := a.mem
	a.mem = nil
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("uring: unmap an arena: %w", err)
	}
	return nil
}
