package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// stepClock is a clock of which the time passes in sleeps alone.
type stepClock struct {
	now   time.Duration
	sleep func() // is called in each; may be nil
}

func (c *stepClock) Now() time.Duration { return c.now }

func (c *stepClock) Sleep(_ context.Context, d time.Duration) error {
	c.now += d
	if c.sleep != nil {
		c.sleep()
	}
	return nil
}

// newPartial makes a partial image, which has an owner with a lease of 15 seconds if that is
// wanted.
func newPartial(t *testing.T, st backend.Store, taken bool) uuid.UUID {
	t.Helper()
	id, err := CreatePartial(t.Context(), st, "new", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	if taken {
		alter(t, st, id, func(sb *superblock) {
			sb.Epoch++
			sb.Owner = &owner{Host: "alpha", Log: uuid.New(), Lease: 15 * time.Second, Volatile: true}
		})
	}
	return id
}

func alter(t *testing.T, st backend.Store, id uuid.UUID, fn func(*superblock)) {
	t.Helper()
	_, _, err := changeSuperblock(t.Context(), st, id, func(sb *superblock) error { fn(sb); return nil })
	if err != nil {
		t.Fatal(err)
	}
}

// TestCollectPartial: a partial image is collected when it is old and nobody writes to it.
func TestCollectPartial(t *testing.T) {
	renew := func(t *testing.T, st backend.Store, id uuid.UUID) {
		alter(t, st, id, func(sb *superblock) { sb.Owner.Renewal++ })
	}
	for name, x := range map[string]struct {
		taken, young bool
		at           func(t *testing.T, st backend.Store, id uuid.UUID) // in each sleep
		want         int
	}{
		"nobody's":      {want: 1},
		"young":         {young: true},
		"young, taken":  {young: true, taken: true},
		"owner is gone": {taken: true, want: 1},
		"renewed":       {taken: true, at: renew},
		"finished": {taken: true, at: func(t *testing.T, st backend.Store, id uuid.UUID) {
			alter(t, st, id, func(sb *superblock) { sb.Owner = nil })
			if err := Finish(t.Context(), st, "new", id, 0); err != nil {
				t.Error(err)
			}
		}},
		"removed": {taken: true, at: func(t *testing.T, st backend.Store, id uuid.UUID) {
			if err := Abort(t.Context(), st, id, nil); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			st := mem.New()
			id := newPartial(t, st, x.taken)
			if err := st.Put(t.Context(), dataKey(id, 1, 1), []byte("data")); err != nil {
				t.Fatal(err)
			}
			if !x.young {
				alter(t, st, id, func(sb *superblock) { sb.Created = sb.Created.Add(-2 * time.Hour) })
			}
			clock := &stepClock{}
			if x.at != nil {
				clock.sleep = func() { x.at(t, st, id); clock.sleep = nil }
			}
			before := clock.now
			for _, dry := range []bool{true, false} {
				found, err := GC(t.Context(), st, GCOptions{DryRun: dry, Clock: clock})
				if err != nil || len(found) != x.want {
					t.Errorf("dry %v: found %+v, %v", dry, found, err)
				}
				if x.at != nil {
					break
				}
			}
			if x.want > 0 && x.taken && clock.now-before <= 15*time.Second {
				t.Errorf("its owner had %v", clock.now-before)
			}
			if _, err := st.Stat(t.Context(), dataKey(id, 1, 1)); errors.Is(err, backend.ErrNotFound) != (x.want > 0 || name == "removed") {
				t.Errorf("its data: %v", err)
			}
			if x.want == 0 {
				return
			}
			if err := Finish(t.Context(), st, "new", id, 0); !errors.Is(err, ErrCollected) {
				t.Errorf("finished after it was removed: %v", err)
			}
			if err := touch(t.Context(), st, id); !errors.Is(err, ErrCollected) {
				t.Errorf("touched after it was removed: %v", err)
			}
		})
	}
}

// TestCollectRace: one that becomes whole after it was looked at is not removed.
func TestCollectRace(t *testing.T) {
	st := mem.New()
	id := newPartial(t, st, false)
	alter(t, st, id, func(sb *superblock) { sb.Created = sb.Created.Add(-2 * time.Hour) })
	g := &collector{st: patient{st, Real{}}, o: GCOptions{Age: time.Hour}, now: time.Now()}
	sb, _, err := loadSuperblock(t.Context(), st, id)
	if err != nil || !g.leftPartial(sb) {
		t.Fatal(err)
	}
	// The first of the steps of Finish has been made.
	alter(t, st, id, func(sb *superblock) { sb.Created = time.Now() })
	if err := g.removePartial(t.Context(), sb); err == nil {
		t.Error("it was removed")
	}
}

// TestFinish: an image has its name when it is whole, and is not partial then, if not before
// somebody attaches it.
func TestFinish(t *testing.T) {
	st := mem.New()
	id := newPartial(t, st, false)
	lost, err := LostDirectory(t.Context(), st)
	if err != nil || lost {
		t.Errorf("the store has lost its names: %v, %v", lost, err)
	}
	if err := Finish(t.Context(), st, "new", id, 32<<20); err != nil {
		t.Fatal(err)
	}
	if info, err := Describe(t.Context(), st, "new"); err != nil || info.ID != id || info.Size != 32<<20 {
		t.Errorf("%+v, %v", info, err)
	}
	partial := func() bool {
		sb, _, err := loadSuperblock(t.Context(), st, id)
		if err != nil {
			t.Fatal(err)
		}
		return sb.Partial
	}
	if partial() {
		t.Error("it is partial")
	}
	alter(t, st, id, func(sb *superblock) { sb.Partial = true; sb.Created = sb.Created.Add(-2 * time.Hour) })
	if found, err := GC(t.Context(), st, GCOptions{}); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	if partial() {
		t.Error("it is partial")
	}
	other, err := CreatePartial(t.Context(), st, "other", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	if err := Finish(t.Context(), st, "new", other, 0); !errors.Is(err, backend.ErrExists) {
		t.Errorf("two of one name: %v", err)
	}
	why := errors.New("why")
	if err := Abort(t.Context(), st, other, why); err != why {
		t.Error(err)
	}
	if now, err := backend.Lookup(t.Context(), st, "new"); err != nil || now != id {
		t.Errorf("%v, %v", now, err)
	}
}

func TestLargestSize(t *testing.T) {
	for object, want := range map[uint32]uint64{0: MaxSize, 1 << 20: 8 << 40, 2 << 20: 16 << 40, 32 << 20: MaxSize} {
		if got := LargestSize(object); got != want {
			t.Errorf("LargestSize(%d) = %d, want %d", object, got, want)
		}
		o := CreateOptions{Size: want, ObjectSize: object}
		if err := o.check(); err != nil {
			t.Error(err)
		}
	}
}

// TestPartialNoMore: an image that is whole is not what a process that comes late takes it for.
func TestPartialNoMore(t *testing.T) {
	st := mem.New()
	id := newPartial(t, st, false)
	if err := Finish(t.Context(), st, "new", id, 0); err != nil {
		t.Fatal(err)
	}
	if err := Rename(t.Context(), st, "new", "other"); err != nil {
		t.Fatal(err)
	}
	if err := Finish(t.Context(), st, "new", id, 0); !errors.Is(err, errWhole) {
		t.Errorf("finished twice: %v", err)
	}
	if err := NoteCopy(t.Context(), st, id, CopyState{Source: uuid.New()}); !errors.Is(err, errWhole) {
		t.Errorf("noted how far it is: %v", err)
	}
	why := errors.New("why")
	if err := Abort(t.Context(), st, id, why); err != why {
		t.Error(err)
	}
	names, err := backend.Names(t.Context(), st)
	if err != nil || len(names) != 1 || names[0].Name != "other" {
		t.Errorf("%v, %v", names, err)
	}
	if sb, _, err := loadSuperblock(t.Context(), st, id); err != nil || sb.Removed || sb.Copy != nil || sb.Name != "other" {
		t.Errorf("%+v, %v", sb, err)
	}
}

// TestFinishedCollected: an image that has gone just when it got its name is not said to be there.
func TestFinishedCollected(t *testing.T) {
	st := mem.New()
	id := newPartial(t, st, false)
	removed := false
	late := faultstore.New(st, func(op faultstore.Op) faultstore.Fault {
		if !removed && op.Key == backend.DirectoryKey {
			removed = true
			alter(t, st, id, func(sb *superblock) {
				if err := sb.remove(&RemoveOptions{Force: true}); err != nil {
					t.Error(err)
				}
			})
		}
		return faultstore.Fault{}
	})
	if err := Finish(t.Context(), late, "new", id, 0); !removed || !errors.Is(err, ErrCollected) {
		t.Errorf("%v, removed %v", err, removed)
	}
}
