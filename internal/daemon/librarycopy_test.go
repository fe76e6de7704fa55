package daemon

import (
	"fmt"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// cloned opens an image with data, and a clone of it.
func (h *host) cloned() (parent, clone *libraryClient) {
	h.w.t.Helper()
	h.makeLog("vm1")
	parent = h.handle(wire.OpenRequest{})
	parent.write(1000, 5000, 7)
	parent.snapshot("monday")
	h.client().mustClone("monday", "clone")
	h.makeLog("clone")
	return parent, h.handle(wire.OpenRequest{Image: "clone"})
}

// TestLibraryFlatten: a clone that is flattened has no parent any more, and reads as before, also
// while others have it open.
func TestLibraryFlatten(t *testing.T) {
	h := newWorld(t).newHost()
	c, clone := h.cloned()
	errnoIs(t, c.call(wire.Flatten, nil, nil), unix.EINVAL)
	other := h.handle(wire.OpenRequest{Image: "clone", Flags: wire.OpenReadOnly})
	errnoIs(t, other.call(wire.Flatten, nil, nil), unix.EROFS)
	clone.write(0, 512, 8)
	if err := clone.call(wire.Flatten, nil, nil); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, clone.call(wire.Parent, nil, nil), unix.ENOENT)
	errnoIs(t, clone.call(wire.Flatten, nil, nil), unix.EINVAL)
	c.mustHaveChildren(wire.ChildrenDeep)
	for _, x := range []*libraryClient{clone, other} {
		x.check(0, 512, 8)
		x.check(1000, 5000, 7)
	}
}

// TestLibraryFlattenForSnapshot: a snapshot that needs the parent still keeps the image a clone until
// it is gone and the image is flattened again, though the image itself needs nothing of it.
func TestLibraryFlattenForSnapshot(t *testing.T) {
	w := newWorld(t)
	_, clone := w.newHost().cloned()
	clone.snapshot("tuesday")
	isClone := func(want bool) {
		t.Helper()
		info, err := engine.Describe(t.Context(), w.store, "clone")
		if err != nil || info.Parent != uuid.Nil != want {
			t.Errorf("%+v, %v: want a clone: %v", info, err, want)
		}
	}
	for range 2 {
		if err := clone.call(wire.Flatten, nil, nil); err != nil {
			t.Fatal(err)
		}
		errnoIs(t, clone.call(wire.Parent, nil, nil), unix.ENOENT)
		isClone(true)
	}
	if err := clone.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "tuesday"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := clone.call(wire.Flatten, nil, nil); err != nil {
		t.Fatal(err)
	}
	isClone(false)
	errnoIs(t, clone.call(wire.Flatten, nil, nil), unix.EINVAL)
	clone.check(1000, 5000, 7)
}

// TestLibraryCopy: a copy is what the handle has open, with its snapshots if these are wanted, and
// nothing is left in the source.
func TestLibraryCopy(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	c.write(1000, 5000, 1)
	c.snapshot("monday")
	c.write(1000, 5000, 2)
	c.snapshot("tuesday")
	c.write(1000, 5000, 3)
	reader := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	monday := h.handle(wire.OpenRequest{Snapshot: "monday"})
	tuesday := h.handle(wire.OpenRequest{Snapshot: "tuesday"})
	for _, tt := range []struct {
		from  *libraryClient
		name  string
		flags uint32
		want  byte
		snaps int
	}{
		{c, "head", 0, 3, 0}, {reader, "deep", wire.CopyDeep, 3, 2}, {monday, "first", 0, 1, 0}, {tuesday, "second", wire.CopyDeep, 2, 1},
	} {
		var made wire.CreateResult
		q := &wire.CopyRequest{Store: libraryURL, Image: tt.name, Flags: tt.flags}
		if err := tt.from.call(wire.Copy, q, &made); err != nil || made.ID == uuid.Nil {
			t.Fatalf("%s: %+v, %v", tt.name, made, err)
		}
		errnoIs(t, tt.from.call(wire.Copy, q, nil), unix.EEXIST)
		h.makeLog(tt.name)
		x := h.handle(wire.OpenRequest{Image: tt.name})
		x.check(1000, 5000, tt.want)
		x.check(0, 1000, 0)
		var list wire.SnapshotList
		if err := x.call(wire.ListSnapshots, nil, &list); err != nil || len(list.Snapshots) != tt.snaps {
			t.Errorf("%s: %+v, %v", tt.name, list, err)
		}
	}
	errnoIs(t, c.call(wire.Copy, &wire.CopyRequest{Store: libraryURL, Image: "a/b"}, nil), unix.EINVAL)
	info, err := engine.Describe(t.Context(), w.store, "vm1")
	if err != nil || len(info.Snapshots) != 2 {
		t.Errorf("snapshots of the source: %+v, %v", info.Snapshots, err)
	}
}

// TestLibraryFlattenTwice: who wants an image flattened that is being flattened is told that it is
// busy.
func TestLibraryFlattenTwice(t *testing.T) {
	if got := errnoOf(fmt.Errorf("flatten: %w", engine.ErrFlattening)); got != unix.EBUSY {
		t.Errorf("errno %v", got)
	}
}
