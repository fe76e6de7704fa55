package engine

import (
	"bytes"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestDiffDataFrom: from some byte on there is what there is in all of it, and nothing else.
func TestDiffDataFrom(t *testing.T) {
	racetest.Slow(t)
	const size = 192 << 20 // three segments
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: size, ObjectSize: MinObjectSize}, nil)
	for n := range uint64(300) {
		h.mustWrite(n*n%(size/objectBlock), n+1)
		h.mustWrite(size/objectBlock/2+n, n+1)
	}
	h.mustDestage()
	h.mustClose()
	v := mustView(t, st, id, uuid.Nil)
	read := func(start uint64) []byte {
		disk := make([]byte, size)
		err := DiffDataFrom(t.Context(), nil, v, start, func(r Range, data []byte) error {
			if r.Offset < start {
				t.Errorf("from %d on: %+v", start, r)
			}
			copy(disk[r.Offset:], data)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return disk
	}
	all := read(0)
	if len(bytes.Trim(all, "\x00")) == 0 {
		t.Fatal("there is nothing: this tests nothing")
	}
	for _, start := range []uint64{SectorSize, objectBlock, 3*objectBlock + SectorSize, 64 << 20, size/2 + objectBlock, size - objectBlock, size} {
		got := read(start)
		if len(bytes.Trim(got[:start], "\x00")) > 0 || !bytes.Equal(got[start:], all[start:]) {
			t.Errorf("from %d on: wrong data", start)
		}
	}
}
