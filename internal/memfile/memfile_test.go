package memfile

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

// TestFile compares with a plain piece of memory, also beyond the end.
func TestFile(t *testing.T) {
	const size = 3*chunk + 1000
	f, want := New(size), make([]byte, size)
	rng, data := rand.New(rand.NewPCG(1, 2)), rand.NewChaCha8([32]byte{1})
	for i := range 60 {
		off := rng.Int64N(size + 10)
		p := make([]byte, rng.IntN(chunk+chunk/2))
		_, _ = data.Read(p) // also where zeroes are to be read
		most := int(min(int64(len(p)), max(size-off, 0)))
		if i%3 == 0 {
			n, err := f.WriteAt(p, off)
			if n != most || (n < len(p)) != errors.Is(err, io.ErrShortWrite) {
				t.Fatalf("write %d at %d: %d, %v", len(p), off, n, err)
			}
			copy(want[min(off, size):], p)
			continue
		}
		n, err := f.ReadAt(p, off)
		if n != most || err != nil && err != io.EOF || n < len(p) && err != io.EOF {
			t.Fatalf("read %d at %d: %d, %v", len(p), off, n, err)
		}
		if !bytes.Equal(p[:n], want[min(off, size):][:n]) {
			t.Fatalf("read %d at %d: wrong data", len(p), off)
		}
	}
	for _, do := range []func([]byte, int64) (int, error){f.ReadAt, f.WriteAt} {
		if n, err := do(make([]byte, 10), -1); n != 0 || err == nil {
			t.Errorf("before the beginning: %d, %v", n, err)
		}
	}
}

// TestFileIsSparse: going through a large one takes no memory.
func TestFileIsSparse(t *testing.T) {
	f := New(1 << 40)
	p := bytes.Repeat([]byte{1}, 2*chunk)
	if _, err := f.WriteAt([]byte("abc"), 1<<39); err != nil {
		t.Fatal(err)
	}
	if allocs := testing.AllocsPerRun(10, func() { _, _ = f.ReadAt(p, 1<<39-chunk) }); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
	if !bytes.Equal(p[chunk:][:3], []byte("abc")) || len(bytes.Trim(p[:chunk], "\x00")) > 0 {
		t.Error("wrong data")
	}
	taken := 0
	for _, c := range f.chunks {
		if c != nil {
			taken++
		}
	}
	if taken != 1 {
		t.Errorf("it takes %d chunks", taken)
	}
}
