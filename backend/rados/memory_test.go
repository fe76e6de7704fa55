package rados

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// resident returns the memory that the process has, in bytes.
func resident(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// useMemory takes and frees six times 8 MiB, as librados does where six objects are put.
func useMemory(t *testing.T) {
	t.Helper()
	var all []unsafe.Pointer
	for range 6 {
		p := alloc(8 << 20)
		if p == nil {
			t.Fatal("no memory")
		}
		for i := range unsafe.Slice((*byte)(p), 8<<20) {
			unsafe.Slice((*byte)(p), 8<<20)[i] = 0xa5
		}
		all = append(all, p)
	}
	for _, p := range all {
		free(p)
	}
}

// TestTrimmer: what is freed is kept while large operations come, and given back when none do.
func TestTrimmer(t *testing.T) {
	const most = 24 << 20 // of what is given back may remain
	began := resident(t)
	useMemory(t)
	if n := resident(t) - began; n < 40<<20 {
		t.Errorf("%d bytes of 48 MiB are kept: each object's pages must be found anew", n)
	}
	tr := &trimmer{after: 30 * time.Millisecond}
	tr.use(largeOp - 1)
	if tr.armed {
		t.Error("a small operation counts")
	}
	tr.use(largeOp)
	for end := time.Now().Add(10 * time.Second); resident(t)-began > most; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes more than at first", resident(t)-began)
		}
	}
	useMemory(t)
	tr.end()
	if n := resident(t) - began; n > most {
		t.Errorf("%d bytes more than at first when the connection has ended", n)
	}
	tr.use(largeOp)
	if tr.armed {
		t.Error("it waits after its end")
	}
}

// TestAlloc: what there is no memory for is no crash.
func TestAlloc(t *testing.T) {
	if alloc(0) != nil {
		t.Error("memory of nothing")
	}
	if alloc(1<<62) != nil {
		t.Error("memory that nobody has")
	}
}
