package rados

import (
	"testing"
	"time"
	"unsafe"
)

// keptBytes returns how much memory b keeps.
func keptBytes(b *buffers) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kept
}

func TestBufferClass(t *testing.T) {
	for _, k := range []struct{ n, class, size int }{
		{1, -1, 1},
		{minKept - 1, -1, minKept - 1},
		{minKept, 0, minKept},
		{minKept + 1, 1, 2 * minKept},
		{2 * minKept, 1, 2 * minKept},
		{1 << 20, 3, 1 << 20},
		{1<<20 - 4096, 3, 1 << 20},
		{1<<20 + 1, -1, 1<<20 + 1},
	} {
		if c, size := bufferClass(k.n); c != k.class || size != k.size {
			t.Errorf("%d bytes are of class %d, %d bytes; want %d, %d", k.n, c, size, k.class, k.size)
		}
	}
}

// TestBuffers: what is given back is taken again, up to a bound, and until nobody has
// used it for a while.
func TestBuffers(t *testing.T) {
	b := &buffers{after: time.Hour}
	defer b.end()
	fill := func(p unsafe.Pointer, n int) {
		for i := range unsafe.Slice((*byte)(p), n) {
			unsafe.Slice((*byte)(p), n)[i] = 0xa5
		}
	}
	for _, n := range []int{1, 4096, minKept, 3 * minKept, maxKept, maxKept + 1} {
		p := b.take(n)
		fill(p, n)
		b.give(p, n)
		again := b.take(n)
		if c, _ := bufferClass(n); c >= 0 && again != p {
			t.Errorf("another buffer for the same %d bytes", n)
		}
		if got := keptBytes(b); n < minKept && got != 0 {
			t.Errorf("%d bytes kept for %d", got, n)
		}
		b.give(again, n)
	}
	if b.take(0) != nil {
		t.Error("a buffer of nothing")
	}
	if b.take(1<<62) != nil {
		t.Error("a buffer for which there is no memory")
	}
	b.give(nil, 0)

	var all []unsafe.Pointer
	for range maxKeptBytes/maxKept + 5 {
		all = append(all, b.take(maxKept))
	}
	for _, p := range all {
		b.give(p, maxKept)
	}
	if got := keptBytes(b); got > maxKeptBytes || got < maxKeptBytes-maxKept {
		t.Errorf("%d bytes are kept of more than %d", got, maxKeptBytes)
	}
	small := b.take(minKept) // of which there is none: large ones make room for it
	b.give(small, minKept)
	if got := b.take(minKept); got != small {
		t.Error("what is full of large buffers keeps no small one")
	} else {
		b.give(got, minKept)
	}
	if got := keptBytes(b); got > maxKeptBytes || got < maxKeptBytes-2*maxKept {
		t.Errorf("%d bytes are kept of more than %d, of two classes", got, maxKeptBytes)
	}
	b.end()
	if got := keptBytes(b); got != 0 {
		t.Errorf("%d bytes are kept after the end", got)
	}
	b.give(b.take(maxKept), maxKept)
	if got := keptBytes(b); got != 0 {
		t.Errorf("%d bytes are kept that came after the end", got)
	}
}

// TestBuffersExpire: they go when nobody uses them, and not before.
func TestBuffersExpire(t *testing.T) {
	b := &buffers{after: 20 * time.Millisecond}
	p := b.take(maxKept)
	b.give(p, maxKept)
	b.expire() // as the timer does: used since
	if keptBytes(b) == 0 {
		t.Error("a buffer goes that has just been used")
	}
	for deadline := time.Now().Add(10 * time.Second); keptBytes(b) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a buffer stays that nobody uses")
		}
	}
	b.give(b.take(maxKept), maxKept)
	if keptBytes(b) == 0 {
		t.Error("nothing is kept after that")
	}
	b.end()
}
