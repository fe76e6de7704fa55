package daemon

import (
	"fmt"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// cloneRequest is one of vm1.
func cloneRequest(snapshot, name string) *wire.CloneRequest {
	return &wire.CloneRequest{Store: libraryURL, Image: "vm1", Snapshot: snapshot, Name: name}
}

// mustClone makes a clone of a snapshot of vm1, and returns its id.
func (c *libraryClient) mustClone(snapshot, name string) uuid.UUID {
	c.t.Helper()
	var made wire.CloneResult
	if err := c.call(wire.Clone, cloneRequest(snapshot, name), &made); err != nil || made.ID == uuid.Nil || made.ObjectSize == 0 {
		c.t.Fatalf("%+v, %v", made, err)
	}
	return made.ID
}

// mustHaveChildren makes sure which clones what the handle has open has.
func (c *libraryClient) mustHaveChildren(flags uint32, want ...uuid.UUID) {
	c.t.Helper()
	var after uuid.UUID
	got := map[uuid.UUID]bool{}
	for more := true; more; {
		var page wire.ChildrenResult
		if err := c.call(wire.Children, &wire.ChildrenRequest{After: after, Flags: flags}, &page); err != nil {
			c.t.Fatal(err)
		}
		for _, x := range page.Children {
			got[x.ID], after = true, x.ID
		}
		more = page.More
	}
	for _, id := range want {
		if !got[id] {
			c.t.Errorf("%v is missing: %v", id, got)
		}
	}
	if len(got) != len(want) {
		c.t.Errorf("%d children, want %d", len(got), len(want))
	}
}

// TestLibraryClone: what is cloned through the library reads as the snapshot, is told of its
// parent, and the parent of it, also by handles that are read-only and by those on snapshots.
func TestLibraryClone(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for _, name := range []string{"vm1", "vm2"} {
		h.makeLog(name)
	}
	c := h.handle(wire.OpenRequest{})
	c.write(1000, 5000, 7)
	c.snapshot("monday")
	c.snapshot("tuesday")
	c.write(1000, 5000, 8)
	var parent wire.ParentResult
	errnoIs(t, c.call(wire.Parent, nil, &parent), unix.ENOENT)
	o := h.client()
	for _, tt := range []struct {
		q    *wire.CloneRequest
		want unix.Errno
	}{
		{cloneRequest("monday", "vm2"), unix.EEXIST},
		{cloneRequest("sunday", "new"), unix.ENOENT},
		{cloneRequest("", "new"), unix.EINVAL},
		{cloneRequest("monday", "a/b"), unix.EINVAL},
		{&wire.CloneRequest{Store: libraryURL, Image: "none", Snapshot: "monday", Name: "new"}, unix.ENOENT},
		{&wire.CloneRequest{Store: libraryURL, Image: "vm1", Number: 12, Name: "new"}, unix.ENOENT},
	} {
		errnoIs(t, o.call(wire.Clone, tt.q, nil), tt.want)
	}
	first := o.mustClone("tuesday", "first")
	var snaps wire.SnapshotList
	if err := c.call(wire.ListSnapshots, nil, &snaps); err != nil || len(snaps.Snapshots) != 2 {
		t.Fatalf("%+v, %v", snaps, err)
	}
	q := cloneRequest("", "second")
	q.Number = snaps.Snapshots[0].Number
	var second wire.CloneResult
	if err := o.call(wire.Clone, q, &second); err != nil {
		t.Fatal(err)
	}
	clone := h.handle(wire.OpenRequest{Image: "first", Flags: wire.OpenReadOnly})
	clone.check(1000, 5000, 7)
	want := wire.ParentResult{ID: c.opened.ID, Name: "vm1", Snapshot: "tuesday", Number: snaps.Snapshots[1].Number, Overlap: 64 << 20}
	if err := clone.call(wire.Parent, nil, &parent); err != nil || parent != want {
		t.Errorf("%+v, %v, want %+v", parent, err, want)
	}
	c.mustHaveChildren(0, first, second.ID)
	h.handle(wire.OpenRequest{Snapshot: "monday"}).mustHaveChildren(wire.ChildrenDeep, second.ID)
	h.handle(wire.OpenRequest{Image: "vm2"}).mustHaveChildren(0)
	tuesday := h.handle(wire.OpenRequest{Snapshot: "tuesday"})
	tuesday.mustHaveChildren(0, first)
	if err := tuesday.close(); err != nil {
		t.Fatal(err)
	}
	if err := c.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "tuesday"}, nil); err != nil {
		t.Fatal(err)
	}
	parent = wire.ParentResult{}
	if err := clone.call(wire.Parent, nil, &parent); err != nil || parent.Flags != wire.ParentUnnamed || parent.Number != want.Number || uuid.Validate(parent.Snapshot) != nil {
		t.Errorf("of a snapshot that is gone: %+v, %v", parent, err)
	}
	c.mustHaveChildren(0, first, second.ID)
}

// TestLibraryManyChildren: clones are listed one by one, each once.
func TestLibraryManyChildren(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.snapshot("monday")
	var want []uuid.UUID
	for i := range 20 {
		want = append(want, h.client().mustClone("monday", fmt.Sprint("clone", i)))
	}
	c.mustHaveChildren(0, want...)
}
