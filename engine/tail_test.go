package engine

import (
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
)

// TestRecentIsReadFromMemory: what has been destaged a moment ago is read from the log's
// memory, as long as it is there, and from the store when that has gone on.
func TestRecentIsReadFromMemory(t *testing.T) {
	gets := 0
	st := faultstore.New(mem.New(), func(op faultstore.Op) faultstore.Fault {
		if op.Method == faultstore.Get && strings.Contains(op.Key, "/d/") {
			gets++
		}
		return faultstore.Fault{}
	})
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.im.cfg.SpaceRatio = MaxSpaceRatio // or the cleaner would read, too
	const blocks = 500
	fetched := func(first uint64) int {
		t.Helper()
		gets = 0
		for n := range uint64(blocks) {
			h.im.streams = streams{} // nothing is read ahead
			h.mustRead(first+n, first+n+1)
		}
		return gets
	}
	write := func(first uint64) {
		t.Helper()
		for n := range uint64(blocks) {
			h.mustWrite(first+n, first+n+1)
		}
		h.mustDestage()
		if s := h.im.Stats(); s.Dirty != 0 {
			t.Fatalf("%d bytes are not destaged: this tests nothing", s.Dirty)
		}
		if n := fetched(first); n > 0 {
			t.Errorf("%d reads of the store for what has just been written", n)
		}
	}
	write(0)
	first := uint64(blocks)
	for ; h.im.log.Head() < 3*writelog.SegmentSize; first += blocks {
		write(first)
	}
	if fetched(0) == 0 {
		t.Error("what was written long ago is not read from the store: memory has no bound")
	}
	if n := len(h.im.tail.objects); n > int(h.im.accepted.object)*3/4 {
		t.Errorf("%d objects are remembered after %d", n, h.im.accepted.object)
	}
}
