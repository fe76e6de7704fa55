package rados

// #include <stdlib.h>
// #include "aio.h"
import "C"

import (
	"cmp"
	"sync"
	"time"
	"unsafe"
)

const (
	// largeOp is from how many bytes on an operation's memory is worth giving back.
	largeOp = 128 << 10
	// keepFor is how long memory that is free is kept at least while no large operation
	// comes; twice as long at most.
	keepFor = 10 * time.Second
)

// alloc returns n bytes of C's memory, or nil if there is none, or n is 0.
func alloc(n int) unsafe.Pointer {
	if n == 0 {
		return nil
	}
	return C.lsd_alloc(C.size_t(n))
}

// free frees what alloc has returned.
func free(p unsafe.Pointer) { C.free(p) }

// A trimmer gives memory that is free back to the system when there have been no large
// operations for a while. Any goroutine may call its methods. The zero value is ready.
type trimmer struct {
	mu    sync.Mutex
	used  bool          // since the timer was set; guarded by mu, as all that follows
	armed bool          // the timer runs
	ended bool          // nobody waits any more
	after time.Duration // keepFor, but in tests
}

// use notes an operation of n bytes.
func (t *trimmer) use(n int) {
	if n < largeOp {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.used = true
	if !t.armed && !t.ended {
		t.armed = true
		time.AfterFunc(cmp.Or(t.after, keepFor), t.expire)
	}
}

// expire gives memory back if there was no large operation since the timer was set.
func (t *trimmer) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.used && !t.ended {
		t.used = false
		time.AfterFunc(cmp.Or(t.after, keepFor), t.expire)
		return
	}
	t.armed = false
	C.lsd_trim()
}

// end has nothing be waited for any more: no operation will come.
func (t *trimmer) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	C.lsd_trim()
}
