package main

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestBootReads(t *testing.T) {
	const size, bytes = 256 << 20, 32 << 20
	boot := bootReads(rand.New(rand.NewPCG(1, 2)), size, bytes)
	if !slices.Equal(boot, bootReads(rand.New(rand.NewPCG(1, 2)), size, bytes)) {
		t.Error("the same seed gives other reads")
	}
	n, small := 0, 0
	for _, r := range boot {
		if r.offset < 0 || r.length <= 0 || r.offset+r.length > size || r.offset%4096 != 0 || r.length%4096 != 0 || r.length > 128<<10 {
			t.Fatalf("%+v", r)
		}
		if r.length <= 16<<10 {
			small++
		}
		n += r.length
	}
	if n < bytes || n > bytes+(256+4*16)<<10 {
		t.Errorf("%d bytes, want %d", n, bytes)
	}
	if part := float64(small) / float64(len(boot)); part < 0.6 || part > 0.8 {
		t.Errorf("%.2f of the reads are small", part)
	}
}

func TestFioLog(t *testing.T) {
	const want = "fio version 2 iolog\nimage add\nimage open\nimage read 8192 4096\nimage read 0 131072\nimage close\n"
	if got := fioLog([]bootRead{{8192, 4096}, {0, 131072}}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
