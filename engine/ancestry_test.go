package engine

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// mustDescend makes sure of the descendants of an image, or of its snapshot of.
func mustDescend(t *testing.T, st backend.Store, id, of uuid.UUID, deep bool, want ...Descendant) {
	t.Helper()
	got, err := Descendants(context.Background(), st, id, of, deep)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("descendants: %v, %v, want %v", got, err, want)
	}
}

// TestAncestry: a clone knows the snapshot that it was made of, also beside another that is the
// same state, whatever that is called later, and when it is gone; and the snapshot knows the clone.
func TestAncestry(t *testing.T) {
	t.Parallel()
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	one, two := mustSnapshot(t, st, id, "one", h), mustSnapshot(t, st, id, "two", h)
	clone := mustClone(t, st, id, "two", "clone", h)
	now := mustClone(t, st, clone, "", "below", nil)
	size := h.im.Sectors() * SectorSize
	h.mustClose()
	must := func(id uuid.UUID, want Ancestry) {
		t.Helper()
		if got, err := AncestryOf(ctx, st, id, uuid.Nil); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	want := Ancestry{Parent: id, Name: "disk", State: two.ID, Snapshot: "two", Overlap: size}
	must(clone, want)
	must(now, Ancestry{Parent: clone, Name: "clone", State: now, Overlap: size})
	a, b := Descendant{ID: clone, Name: "clone"}, Descendant{ID: now, Name: "below"}
	mustDescend(t, st, id, uuid.Nil, false, a)
	mustDescend(t, st, id, uuid.Nil, true, a, b)
	mustDescend(t, st, id, one.ID, true)
	mustDescend(t, st, id, two.ID, true, a, b)
	if err := RenameSnapshot(ctx, st, id, "two", "three"); err != nil {
		t.Fatal(err)
	}
	want.Snapshot = "three"
	must(clone, want)
	if err := RemoveSnapshot(ctx, st, id, "three"); err != nil {
		t.Fatal(err)
	}
	want.Snapshot = ""
	must(clone, want)
	mustDescend(t, st, id, uuid.Nil, false, a)
	if err := RemoveSnapshot(ctx, st, id, "one"); err != nil {
		t.Fatal(err)
	}
	if _, err := Remove(ctx, st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	want.Removed = true
	must(clone, want)
	if _, err := Remove(ctx, st, "clone", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	a.Removed = true
	mustDescend(t, st, id, uuid.Nil, false, a)
	if _, err := Remove(ctx, st, "below", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	mustDescend(t, st, id, uuid.Nil, true)
}

// TestAncestryFlattened: what has been flattened has no parent, though a snapshot of it has one.
func TestAncestryFlattened(t *testing.T) {
	t.Parallel()
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", h)
	h.mustClose()
	h = mustOpen(t, st, clone, 5)
	snap := mustSnapshot(t, st, clone, "snap", h)
	h.mustFlatten()
	h.mustClose()
	mustSeparate(t, st, clone, id, "snapshot snap")
	if a, err := AncestryOf(ctx, st, clone, uuid.Nil); !errors.Is(err, ErrNoParent) {
		t.Errorf("the present state: %+v, %v", a, err)
	}
	if a, err := AncestryOf(ctx, st, clone, snap.ID); err != nil || a.Parent != id {
		t.Errorf("the snapshot: %+v, %v", a, err)
	}
	if a, err := AncestryOf(ctx, st, id, uuid.Nil); !errors.Is(err, ErrNoParent) {
		t.Errorf("no clone: %+v, %v", a, err)
	}
}
