package rados

// #include "aio.h"
import "C"

import (
	"cmp"
	"math/bits"
	"sync"
	"time"
	"unsafe"
)

const (
	// minKept and maxKept are the smallest and largest buffers that are kept, in bytes:
	// less than that the C library keeps by itself, and more is rare.
	minKept = 128 << 10
	maxKept = 1 << 20
	// keptClasses: up to 128 KiB, 256, 512, 1 MiB.
	keptClasses = 4
	// maxKeptBytes bounds what is kept: as much as two long streams ask for at one time.
	maxKeptBytes = 48 << 20
	// keepFor is how long they are kept at least when nobody uses them; twice as long at
	// most.
	keepFor = 10 * time.Second
)

// buffers is C's memory for what operations read. Large ones are kept for the next
// operation: the C library would give each back to the system (see lsd_bound_malloc),
// which would have to find and clear its pages anew: a sixth of the time that large reads
// take where the processors are busy. Any goroutine may call its methods.
//
// The zero value keeps buffers for keepFor.
type buffers struct {
	mu    sync.Mutex
	free  [keptClasses][]unsafe.Pointer // guarded by mu, as all that follows
	kept  int                           // bytes of them
	used  bool                          // since the timer was set
	armed bool                          // the timer runs
	ended bool                          // nothing is kept any more
	after time.Duration                 // keepFor, but in tests
}

// bufferClass returns the class of buffers of n bytes, and the size of each in it; -1 if
// they are not kept.
func bufferClass(n int) (c, size int) {
	if n < minKept || n > maxKept {
		return -1, n
	}
	c = bits.Len(uint(n-1) / minKept)
	return c, minKept << c
}

// take returns a buffer of at least n bytes, which is the caller's until it gives it
// back; nil if there is no memory, or n is 0.
func (b *buffers) take(n int) unsafe.Pointer {
	if n == 0 {
		return nil
	}
	c, size := bufferClass(n)
	if c >= 0 {
		b.mu.Lock()
		b.used = true
		if l := len(b.free[c]); l > 0 {
			p := b.free[c][l-1]
			b.free[c] = b.free[c][:l-1]
			b.kept -= size
			b.mu.Unlock()
			return p
		}
		b.mu.Unlock()
	}
	return C.lsd_alloc(C.size_t(size))
}

// give takes back what take returned for n bytes. Nobody may use it any more.
func (b *buffers) give(p unsafe.Pointer, n int) {
	if p == nil {
		return
	}
	c, size := bufferClass(n)
	b.mu.Lock()
	defer b.mu.Unlock()
	for c >= 0 && b.kept+size > maxKeptBytes && b.freeOther(c) {
	}
	if c < 0 || b.ended || b.kept+size > maxKeptBytes {
		C.free(p)
		return
	}
	b.free[c] = append(b.free[c], p)
	b.kept += size
	b.used = true
	if !b.armed {
		b.armed = true
		time.AfterFunc(cmp.Or(b.after, keepFor), b.expire)
	}
}

// freeOther frees a buffer of another class than c, and reports whether there was one:
// what is kept follows what is asked for. The caller holds mu.
func (b *buffers) freeOther(c int) bool {
	for i := range b.free {
		if l := len(b.free[i]); i != c && l > 0 {
			C.free(b.free[i][l-1])
			b.free[i] = b.free[i][:l-1]
			b.kept -= minKept << i
			return true
		}
	}
	return false
}

// expire frees what is kept if nobody has used it since the timer was set.
func (b *buffers) expire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used && !b.ended {
		b.used = false
		time.AfterFunc(cmp.Or(b.after, keepFor), b.expire)
		return
	}
	b.armed = false
	b.freeAll()
}

// end frees what is kept, and what is given back from now on.
func (b *buffers) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.freeAll()
}

// freeAll frees what is kept. The caller holds mu.
func (b *buffers) freeAll() {
	for c := range b.free {
		for _, p := range b.free[c] {
			C.free(p)
		}
		b.free[c] = nil
	}
	b.kept = 0
}
