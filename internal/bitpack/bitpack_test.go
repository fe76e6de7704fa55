package bitpack

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	lists := [][]uint64{nil, {0}, {math.MaxUint64}, {5, 5, 5}, {0, 1<<MaxBits - 1}, {math.MaxUint64 - 7, math.MaxUint64}}
	for width := range MaxBits + 1 {
		for n := range 40 {
			v := make([]uint64, n)
			for i := range v {
				v[i] = 1<<40 + rng.Uint64()&(1<<width-1)
			}
			lists = append(lists, v)
		}
	}
	for _, v := range lists {
		b := Append([]byte("before"), v)
		if got := len(b) - len("before"); got != Size(v) {
			t.Errorf("%d numbers: %d bytes, Size says %d", len(v), got, Size(v))
		}
		got := make([]uint64, len(v))
		rest, ok := Read(append(b[len("before"):], "after"...), got)
		if !ok || string(rest) != "after" || !slices.Equal(got, v) {
			t.Errorf("%v became %v, and %q (%v)", v, got, rest, ok)
		}
	}
}

// TestLayout compares with the format as it is documented.
func TestLayout(t *testing.T) {
	want := []byte{0x80, 0x01, 3, 0b11_001_000, 0b0000_0_101}
	if got := Append(nil, []uint64{128, 129, 128 + 7, 128 + 2}); !bytes.Equal(got, want) {
		t.Errorf("%08b, want %08b", got, want)
	}
}

func TestTooFar(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("numbers that differ by 2^56 have been packed")
		}
	}()
	Append(nil, []uint64{0, 1 << MaxBits})
}

func TestBad(t *testing.T) {
	good := Append(nil, []uint64{1000, 2000, 3000})
	for n := range good {
		if _, ok := Read(good[:n], make([]uint64, 3)); ok {
			t.Errorf("%d of %d bytes have been read", n, len(good))
		}
	}
	if _, ok := Read(append([]byte{0, MaxBits + 1}, make([]byte, 100)...), make([]uint64, 1)); ok {
		t.Error("a number of 57 bits has been read")
	}
}

func FuzzRead(f *testing.F) {
	f.Add(Append(nil, []uint64{1, 2, 3}), 3)
	f.Add([]byte{0x80, 0x80}, 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		v := make([]uint64, min(max(n, 0), 300))
		rest, ok := Read(b, v)
		if !ok {
			return
		}
		if len(v) > 0 && slices.Max(v)-slices.Min(v) < 1<<MaxBits {
			again := make([]uint64, len(v))
			if _, ok := Read(Append(nil, v), again); !ok || !slices.Equal(v, again) {
				t.Errorf("%v, and after encoding it again %v (%v)", v, again, ok)
			}
		}
		if len(rest) > len(b) {
			t.Error("more follows than there was")
		}
	})
}

func BenchmarkRead(b *testing.B) {
	v := make([]uint64, 128)
	for i := range v {
		v[i] = uint64(i) * 977 % 2048
	}
	p := Append(nil, v)
	b.SetBytes(int64(binary.Size(v)))
	b.ReportAllocs()
	for b.Loop() {
		Read(p, v)
	}
}
