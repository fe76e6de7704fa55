package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// TestRemoveStops: wherever a removal ends or loses an answer, it can be repeated, or be left to
// a collection; until then the image is whole, or it is one that has been removed.
func TestRemoveStops(t *testing.T) {
	racetest.Slow(t)
	for _, dies := range []bool{false, true} {
		for _, byGC := range []bool{false, true} {
			more := true
			for n := 1; more; n++ {
				t.Run(fmt.Sprintf("%d dies %v gc %v", n, dies, byGC), func(t *testing.T) { more = removeStops(t, n, dies, byGC) })
			}
		}
	}
}

// removeStops ends at the n-th change, and reports whether there were so many.
func removeStops(t *testing.T, n int, dies, byGC bool) bool {
	ctx, inner := context.Background(), mem.New()
	h, id := attached(t, inner, smallImage(), nil)
	h.mustFill(1000)
	h.mustClose()
	mustSetMetadata(t, inner, id, "k", "v")
	st := &endingStore{inner, n, dies}
	err := removeWhole(st, "disk", RemoveOptions{})
	if dies && (st.n <= 0) != (err != nil) {
		t.Errorf("%v, %d changes are left", err, st.n)
	}
	sb, _, serr := loadSuperblock(ctx, inner, id)
	_, nerr := backend.Lookup(ctx, inner, "disk")
	switch {
	case serr != nil && nerr == nil:
		t.Errorf("there is a name without a superblock: %v", serr)
	case serr == nil && !sb.Removed && nerr != nil:
		t.Errorf("the image has lost its name: %v", nerr)
	case serr == nil && !sb.Removed:
		h := mustOpen(t, inner, id, 2)
		h.mustHave(1000)
		h.mustClose()
		mustRemove(t, inner, "disk")
	case serr == nil && nerr == nil && !byGC:
		mustRemove(t, inner, "disk")
	}
	found, err := GC(ctx, inner, GCOptions{})
	if err != nil || byGC && serr == nil && sb.Removed && len(found) == 0 {
		t.Errorf("gc finds %+v, %v", found, err)
	}
	mustBeEmpty(t, inner)
	if names, err := backend.Names(ctx, inner); err != nil || len(names) > 0 {
		t.Errorf("names: %v, %v", names, err)
	}
	return st.n <= 0
}

// halfRemoved returns a store with an image that has been removed but for its name, which its
// superblock does not have.
func halfRemoved(t *testing.T) (*mem.Store, uuid.UUID) {
	t.Helper()
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustClose()
	if err := backend.Rename(ctx, st, "disk", "renamed"); err != nil {
		t.Fatal(err)
	}
	if _, err := Remove(ctx, &endingStore{st, 2, true}, "renamed", RemoveOptions{}); err == nil {
		t.Fatal("it has lost its name")
	}
	return st, id
}

// TestHalfRemoved: an image that has been removed but for its name is nobody's, and whatever
// comes next takes the name away, or says what it is.
func TestHalfRemoved(t *testing.T) {
	ctx := context.Background()
	free := func(st backend.Store, name string) error {
		if id, err := backend.Lookup(ctx, st, name); !errors.Is(err, backend.ErrNotFound) {
			return fmt.Errorf("%s is %v, %v", name, id, err)
		}
		return nil
	}
	gone := func(err error) error {
		if !errors.Is(err, ErrRemoved) {
			return fmt.Errorf("want that it has been removed: %w", err)
		}
		return nil
	}
	for _, tt := range []struct {
		name string
		do   func(st backend.Store, id uuid.UUID) error
	}{
		{"rm", func(st backend.Store, id uuid.UUID) error {
			got, err := Remove(ctx, st, "renamed", RemoveOptions{})
			if err == nil && got != id {
				err = fmt.Errorf("removed %v, not %v", got, id)
			}
			return errors.Join(err, free(st, "renamed"))
		}},
		{"reclaim", func(st backend.Store, id uuid.UUID) error {
			_, err := Reclaim(ctx, st, id, nil)
			return errors.Join(err, free(st, "renamed"))
		}},
		{"gc", func(st backend.Store, id uuid.UUID) error {
			dry, err := GC(ctx, st, GCOptions{DryRun: true})
			if err != nil || len(dry) != 1 || dry[0].Image != id || !strings.Contains(dry[0].What, "but for its name") || dry[0].Objects < 3 {
				return fmt.Errorf("gc would collect %+v, %w", dry, err)
			}
			found, err := GC(ctx, st, GCOptions{})
			if err != nil || len(found) != 1 || found[0] != dry[0] {
				return fmt.Errorf("gc collects %+v, %w", found, err)
			}
			return free(st, "renamed")
		}},
		{"create", func(st backend.Store, id uuid.UUID) error {
			made, err := Create(ctx, st, "renamed", CreateOptions{Size: 1 << 20})
			if err == nil {
				h := mustOpen(t, st, made, 2)
				h.mustRead(1, 0)
				h.mustClose()
				mustRemove(t, st, "renamed")
			}
			return err
		}},
		{"rename to it", func(st backend.Store, id uuid.UUID) error {
			if _, err := Create(ctx, st, "other", CreateOptions{Size: 1 << 20}); err != nil {
				return err
			}
			err := Rename(ctx, st, "other", "renamed")
			mustRemove(t, st, "renamed")
			return err
		}},
		{"rename", func(st backend.Store, id uuid.UUID) error { return gone(Rename(ctx, st, "renamed", "again")) }},
		{"attach", func(st backend.Store, id uuid.UUID) error {
			return gone(newHost(t, "alpha", st, 3).open(id, false))
		}},
		{"check", func(st backend.Store, id uuid.UUID) error {
			_, err := Check(ctx, st, "renamed", "mem:/renamed", CheckOptions{})
			return gone(err)
		}},
		{"clone", func(st backend.Store, id uuid.UUID) error {
			_, err := Clone(ctx, st, id, "copy", CloneOptions{})
			return gone(err)
		}},
		{"snapshot", func(st backend.Store, id uuid.UUID) error {
			_, err := CreateSnapshot(ctx, st, id, "monday", SnapshotOptions{})
			return gone(err)
		}},
		{"info", func(st backend.Store, id uuid.UUID) error {
			info, err := Describe(ctx, st, "renamed")
			if err == nil && (info.ID != id || !info.Removed) {
				err = fmt.Errorf("%+v", info)
			}
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st, id := halfRemoved(t)
			if err := tt.do(st, id); err != nil {
				t.Error(err)
			}
			if _, err := GC(ctx, st, GCOptions{Age: time.Nanosecond}); err != nil {
				t.Error(err)
			}
			mustBeEmpty(t, st)
		})
	}
}

// TestReclaimStops: a reclamation that is interrupted after any number of objects is gone on
// with by the next one, and tells how far it is.
func TestReclaimStops(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	for range 5 {
		h.mustFill(1000)
		h.mustDestage()
	}
	h.mustClose()
	if _, err := Reclaim(context.Background(), st, id, nil); err != nil {
		t.Fatal(err)
	}
	mustBeSound(t, st, "disk") // it has not been removed
	if _, err := Remove(context.Background(), st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	before := 1 << 30
	for {
		ctx, stop := context.WithCancel(context.Background())
		left := 0
		_, err := Reclaim(ctx, st, id, func(done, total int) {
			left = total - done
			if done == 1 && total > 1 {
				stop()
			}
		})
		stop()
		if err == nil {
			break
		}
		if left == 0 || left >= before {
			t.Fatalf("%d objects are left, of %d: %v", left, before, err)
		}
		before = left
	}
	mustBeEmpty(t, st)
}

// TestReclaimAncestors: wherever the reclamation of the last clone of an image that has been
// removed stops, the next one goes on with it, up to the image.
func TestReclaimAncestors(t *testing.T) {
	for n, more := 1, true; more; n++ {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustFill(1000)
		h.mustClose()
		mustSetMetadata(t, st, id, "k", "v")
		middle := mustClone(t, st, id, "", "middle", nil)
		last := mustClone(t, st, middle, "", "last", nil)
		for _, name := range []string{"disk", "middle"} {
			mustRemove(t, st, name)
		}
		if _, err := Remove(context.Background(), st, "last", RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		ending := &endingStore{st, n, true}
		_, err := Reclaim(context.Background(), ending, last, nil)
		more = err != nil
		if more != (ending.n <= 0) {
			t.Errorf("%v, %d changes are left", err, ending.n)
		}
		if _, err := Reclaim(context.Background(), st, last, nil); err != nil {
			t.Error(err)
		}
		mustBeEmpty(t, st)
	}
}

// TestReclaimBatches: an image of more objects than are listed at one time goes whole.
func TestReclaimBatches(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	const objects, batch = 8, 3
	for n := range uint64(objects) {
		if err := st.Put(ctx, dataKey(id, n+1, 1), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Remove(ctx, st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if found, err := GC(ctx, st, GCOptions{DryRun: true}); err != nil || len(found) != 1 || found[0].Objects != objects+1 {
		t.Errorf("gc finds %+v, %v", found, err)
	}
	gone, most := 0, 0
	r := reclamation{st, time.Now, batch, func(_, total int) { gone++; most = max(most, total) }}
	if _, err := r.image(ctx, id); err != nil {
		t.Fatal(err)
	}
	if gone != objects || most != batch {
		t.Errorf("%d objects are gone, in batches of %d", gone, most)
	}
	mustBeEmpty(t, st)
}

// goingStore calls then before it first lists the objects of an image.
type goingStore struct {
	backend.Store
	prefix string // of their keys
	then   func()
}

// List implements backend.Store.
func (s *goingStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	if prefix == s.prefix && s.then != nil {
		then := s.then
		s.then = nil
		then()
	}
	return s.Store.List(ctx, prefix, fn)
}

// TestGCBesideReclaim: what somebody else reclaims while a collection looks at it does not
// end that.
func TestGCBesideReclaim(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	if _, err := Create(ctx, st, "other", CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"disk", "other"} {
		if _, err := Remove(ctx, st, name, RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	going := &goingStore{st, id.String() + "/", func() {
		if _, err := Reclaim(ctx, st, id, nil); err != nil {
			t.Error(err)
		}
	}}
	if found, err := GC(ctx, going, GCOptions{}); err != nil || len(found) != 1 || found[0].Name != "other" {
		t.Errorf("gc finds %+v, %v", found, err)
	}
	mustBeEmpty(t, st)
}

// TestPassOverTwice: who comes late to pass an image over that another one has passed over
// looks at it anew.
func TestPassOverTwice(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(100)
	h.mustClose()
	middle := mustClone(t, st, id, "", "middle", nil)
	last := mustClone(t, st, middle, "", "last", nil)
	for _, name := range []string{"disk", "middle"} {
		if _, err := Remove(ctx, st, name, RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	late, _, err := loadSuperblock(ctx, st, middle)
	if err != nil {
		t.Fatal(err)
	}
	// As far as the other one comes, while the last clone goes as well.
	if passed, err := passOver(ctx, st, late); !passed || err != nil {
		t.Fatal(passed, err)
	}
	if _, err := Remove(ctx, st, "last", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, clone := range []uuid.UUID{last, middle} {
		if err := releaseClone(ctx, st, id, clone); err != nil {
			t.Fatal(err)
		}
	}
	if passed, err := passOver(ctx, st, late); !passed || err != nil {
		t.Errorf("passed over again: %v, %v", passed, err)
	}
	if _, err := GC(ctx, st, GCOptions{}); err != nil {
		t.Error(err)
	}
	mustBeEmpty(t, st)
}

// TestForceRefused: force removes an image that cannot be read, but not one that is refused for
// another reason.
func TestForceRefused(t *testing.T) {
	ctx := context.Background()
	refuses := func(op faultstore.Op) faultstore.Fault {
		if op.Method != faultstore.Swap {
			return faultstore.Fault{}
		}
		return faultstore.Fault{Before: backend.ErrPermanent}
	}
	for name, x := range map[string]struct {
		snapshots bool
		fault     faultstore.Injector
		want      func(error) bool
	}{
		"it has snapshots":  {false, func(faultstore.Op) faultstore.Fault { return faultstore.Fault{} }, func(err error) bool { return errors.As(err, new(*SnapshotsError)) }},
		"the store refuses": {true, refuses, func(err error) bool { return errors.Is(err, backend.ErrPermanent) }},
	} {
		t.Run(name, func(t *testing.T) {
			st := mem.New()
			h, id := attached(t, st, smallImage(), nil)
			h.mustFill(1000)
			mustSnapshot(t, st, id, "monday", h)
			h.mustClose()
			before := keysOf(t, st, id)
			if _, err := Remove(ctx, faultstore.New(st, x.fault), "disk", RemoveOptions{Force: true, Snapshots: x.snapshots}); !x.want(err) {
				t.Errorf("rm --force: %v", err)
			}
			if got := keysOf(t, st, id); !slices.Equal(got, before) {
				t.Errorf("left of %q: %q", before, got)
			}
			mustBeSound(t, st, "disk")
		})
	}
}

// TestForceDamagedAnswer: one damaged answer does not have an image removed without its superblock,
// which tells that its owner goes on.
func TestForceDamagedAnswer(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustDestage()
	damaged := faultstore.If(faultstore.All(faultstore.Method(faultstore.Load), faultstore.Key("*/super"), faultstore.First(1)), faultstore.Fault{Corrupt: faultstore.FlipBit(800)})
	if _, err := Remove(t.Context(), faultstore.New(st, damaged), "disk", RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if sb, _, err := loadSuperblock(t.Context(), st, id); err != nil || !sb.Removed || sb.lateFor(time.Now()) == 0 {
		t.Errorf("%+v, %v", sb, err)
	}
}
