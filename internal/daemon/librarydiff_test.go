package daemon

import (
	"slices"
	"testing"

	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// diff asks for differences until all are known.
func (c *libraryClient) diff(q wire.DiffRequest) []wire.DiffRange {
	c.t.Helper()
	var list []wire.DiffRange
	for end := q.Offset + q.Length; q.Offset < end; {
		var res wire.DiffResult
		if err := c.call(wire.Diff, &q, &res); err != nil {
			c.t.Fatal(err)
		}
		if res.Next <= q.Offset || res.Next > end {
			c.t.Fatalf("from %d on up to %d, of %d", q.Offset, res.Next, end)
		}
		list = append(list, res.Ranges...)
		q.Offset, q.Length = res.Next, end-res.Next
	}
	return list
}

// TestLibraryDiff: what was acknowledged is told, however few ranges an answer may have, to whoever
// may read, and by the next daemon as well.
func TestLibraryDiff(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	all := wire.DiffRequest{Length: 64 << 20}
	if got := c.diff(all); len(got) > 0 {
		t.Errorf("an empty image: %+v", got)
	}
	var want []wire.DiffRange
	for i := range uint64(20) {
		c.write(i<<20, 512, 1)
		want = append(want, wire.DiffRange{Offset: i << 20, Length: 512, Exists: true})
	}
	must := func(c *libraryClient, q wire.DiffRequest, want ...wire.DiffRange) {
		t.Helper()
		if got := c.diff(q); !slices.Equal(got, want) {
			t.Errorf("%+v: %+v, want %+v", q, got, want)
		}
	}
	for _, most := range []uint32{0, 1, 2, 7, 20, 1 << 31} {
		q := all
		q.Most = most
		if got := c.diff(q); !slices.Equal(got, want) {
			t.Errorf("%d ranges at a time: %+v", most, got)
		}
	}
	c.snapshot("monday")
	c.write(1<<20, 512, 2)
	c.write(30<<20, 4096, 2)
	since := all
	since.From = "monday"
	changed := []wire.DiffRange{{Offset: 1 << 20, Length: 512, Exists: true}, {Offset: 30 << 20, Length: 4096, Exists: true}}
	must(c, since, changed...)
	must(c, wire.DiffRequest{Offset: 100, Length: 100}, wire.DiffRange{Offset: 100, Length: 100, Exists: true})
	must(c, wire.DiffRequest{Offset: 9 << 20, Length: 50 << 20, Flags: wire.DiffWhole, From: "monday"}, wire.DiffRange{Offset: 24 << 20, Length: 8 << 20, Exists: true})
	monday := h.handle(wire.OpenRequest{Snapshot: "monday"})
	must(monday, all, want...)
	must(monday, since)
	c.snapshot("tuesday")
	errnoIs(t, monday.call(wire.Diff, &wire.DiffRequest{From: "tuesday", Length: 1}, nil), unix.EINVAL)
	errnoIs(t, c.call(wire.Diff, &wire.DiffRequest{From: "sunday", Length: 1}, nil), unix.ENOENT)
	errnoIs(t, c.call(wire.Diff, &wire.DiffRequest{Offset: 1 << 63, Length: 1 << 63}, nil), unix.EINVAL)
	h.crash()
	h.start()
	c = h.handle(wire.OpenRequest{Flags: wire.OpenAgain, ID: c.opened.ID})
	must(c, since, changed...)
}
