package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// afterAll is when nothing can come any more for an image that is removed now, whoever had it.
func afterAll() time.Time { return time.Now().Add(MaxLease + 2*leftoverGrace) }

// mustCollectLater collects garbage when nothing can come any more for images that have been
// removed.
func mustCollectLater(t *testing.T, st backend.Store) {
	t.Helper()
	if _, err := GC(context.Background(), st, GCOptions{Now: afterAll}); err != nil {
		t.Fatal(err)
	}
}

// reclaimLater is Reclaim at that time.
func reclaimLater(st backend.Store, id uuid.UUID) (time.Duration, error) {
	r := reclamation{st, afterAll, reclaimBatch, nil}
	return r.image(context.Background(), id)
}

// keysOf returns the keys of an image's objects.
func keysOf(t *testing.T, st backend.Store, id uuid.UUID) (keys []string) {
	t.Helper()
	err := st.List(context.Background(), id.String()+"/", func(key string) error { keys = append(keys, key); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// removedUnderOwner returns a store with an image that has been removed while its owner goes on
// to put objects, and was reclaimed before these came, if that is wanted.
func removedUnderOwner(t *testing.T, reclaimed, volatile bool) (*mem.Store, uuid.UUID) {
	t.Helper()
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	a.volatile = volatile
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustFill(1000)
	a.mustCheckpoint()
	a.mustWrite(1, 1)
	if _, err := Remove(ctx, st, "disk", RemoveOptions{URL: "mem:/disk", Force: true}); err != nil {
		t.Fatal(err)
	}
	if reclaimed {
		late, err := Reclaim(ctx, st, id, nil)
		if err != nil || late <= leftoverGrace || late > MaxLease+leftoverGrace {
			t.Errorf("its owner may go on for %v, %v", late, err)
		}
		if got := keysOf(t, st, id); !slices.Equal(got, []string{SuperblockKey(id)}) {
			t.Errorf("left for what comes late: %q", got)
		}
	}
	before := len(keysOf(t, st, id))
	a.im.Destage(func(error) {})
	a.run(time.Minute)
	if a.im.state != Fenced {
		t.Errorf("its owner is %v", a.im.state)
	}
	if len(keysOf(t, st, id)) == before {
		t.Fatal("its owner has put nothing")
	}
	return st, id
}

// TestRemovedUnderOwner: objects that the owner of a removed image puts before it finds that out
// go with what the image was made of, by whatever sees to that, and the superblock not before the
// last of them can have come.
func TestRemovedUnderOwner(t *testing.T) {
	gc := func(st backend.Store, now func() time.Time) ([]Garbage, []string, error) {
		var late []string
		found, err := GC(context.Background(), st, GCOptions{Now: now, Late: func(name string, left time.Duration) {
			if left > leftoverGrace {
				late = append(late, name)
			}
		}})
		return found, late, err
	}
	for _, reclaimed := range []bool{false, true} {
		for _, volatile := range []bool{false, true} {
			for name, end := range map[string]func(t *testing.T, st backend.Store, id uuid.UUID){
				"reclaim": func(t *testing.T, st backend.Store, id uuid.UUID) {
					if late, err := reclaimLater(st, id); late != 0 || err != nil {
						t.Error(late, err)
					}
				},
				"gc": func(t *testing.T, st backend.Store, id uuid.UUID) {
					n := len(keysOf(t, st, id))
					if found, late, err := gc(st, afterAll); len(found) != 1 || found[0].Objects != n || len(late) != 0 || err != nil {
						t.Errorf("gc finds %+v of %d objects, waits for %q, %v", found, n, late, err)
					}
				},
				"gc, before that as well": func(t *testing.T, st backend.Store, id uuid.UUID) {
					n := len(keysOf(t, st, id)) - 1
					for _, want := range []int{1, 0} {
						found, late, err := gc(st, time.Now)
						if len(found) != want || want > 0 && found[0].Objects != n || !slices.Equal(late, []string{"disk"}) || err != nil {
							t.Errorf("gc finds %+v, waits for %q, %v", found, late, err)
						}
					}
					if dry, err := GC(context.Background(), st, GCOptions{DryRun: true}); err != nil || len(dry) != 0 {
						t.Errorf("gc would remove %+v, %v", dry, err)
					}
					if got := keysOf(t, st, id); !slices.Equal(got, []string{SuperblockKey(id)}) {
						t.Errorf("left for what comes late: %q", got)
					}
					rep, err := CheckStore(context.Background(), st, "mem:", false)
					if err != nil || len(rep.Errors) != 0 || !slices.ContainsFunc(rep.Notes, func(n string) bool { return strings.Contains(n, "may come for") }) {
						t.Errorf("check: %+v, %v", rep, err)
					}
					if u, err := MeasureStore(context.Background(), st, UsageOptions{}); err != nil || len(u.Images) != 1 || u.Images[0].Error != "" {
						t.Errorf("usage: %+v, %v", u, err)
					}
					if found, _, err := gc(st, afterAll); len(found) != 1 || found[0].Objects != 1 || err != nil {
						t.Errorf("gc finds %+v, %v", found, err)
					}
				},
			} {
				t.Run(name, func(t *testing.T) {
					st, id := removedUnderOwner(t, reclaimed, volatile)
					end(t, st, id)
					mustBeEmpty(t, st)
				})
			}
		}
	}
}

// TestRemovedUnderOwnerOfClones: what a clone needs of an image that was removed under its owner
// stays, and what came late goes, with the image's superblock when the clone has gone.
func TestRemovedUnderOwnerOfClones(t *testing.T) {
	for _, early := range []bool{false, true} { // the clone goes while something may come still
		ctx, st := context.Background(), mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustFill(1000)
		h.mustDestage()
		clone := mustClone(t, st, id, "", "copy", h)
		h.mustFill(2000)
		if err := removeWhole(st, "disk", RemoveOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		needed := len(keysOf(t, st, id))
		if early {
			mustRemove(t, st, "copy")
			if got := keysOf(t, st, id); !slices.Equal(got, []string{SuperblockKey(id)}) {
				t.Errorf("left for what comes late: %q", got)
			}
		}
		before := len(keysOf(t, st, id))
		h.im.Destage(func(error) {})
		h.run(time.Minute)
		if n := len(keysOf(t, st, id)); n == before {
			t.Fatal("its owner has put nothing")
		}
		if late, err := reclaimLater(st, id); late != 0 || err != nil {
			t.Error(late, err)
		}
		if !early {
			if n := len(keysOf(t, st, id)); n != needed {
				t.Errorf("the clone needs %d objects, and %d are there", needed, n)
			}
			mustBeSound(t, st, "copy")
			c := mustOpen(t, st, clone, 2)
			c.mustHave(1000)
			c.mustClose()
			mustRemove(t, st, "copy")
			mustCollectLater(t, st)
		}
		mustBeEmpty(t, st)
		if _, err := backend.Names(ctx, st); err != nil {
			t.Error(err)
		}
	}
}

// TestRemovedAfterTakeOver: what the host may still put from which an image was taken with force
// before it was removed is waited for, also where nobody had it any more.
func TestRemovedAfterTakeOver(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	a.mustDestage()
	a.mustWrite(1, 1)
	b := newHost(t, "beta", st, 2)
	b.env.now = a.env.now
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.mustClose()
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil || len(sb.Stale) == 0 {
		t.Fatalf("nothing is known of what the first host may have put: %+v, %v", sb, err)
	}
	if _, err := Remove(ctx, st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if late, err := Reclaim(ctx, st, id, nil); late <= 0 || late > leftoverGrace+time.Second || err != nil {
		t.Errorf("it waits for %v, %v", late, err)
	}
	if err := st.Put(ctx, dataKey(id, sb.Stale[0].Object, sb.Stale[0].Epoch), []byte("late")); err != nil {
		t.Fatal(err)
	}
	mustCollectLater(t, st)
	mustBeEmpty(t, st)
}

// TestMayArrive: how long the superblock of a removed image stays follows from who had it, and
// had it before; of one that nobody had it goes at once.
func TestMayArrive(t *testing.T) {
	owned := &owner{Host: "alpha", Log: uuid.New(), Lease: time.Minute}
	for name, x := range map[string]struct {
		sb    superblock
		ended bool
		want  time.Duration
	}{
		"nobody's":             {},
		"owned":                {sb: superblock{Owner: owned}, want: time.Minute + leftoverGrace},
		"owned, ended":         {sb: superblock{Owner: owned, Intent: &checkpointRef{1, 1}}, ended: true},
		"after a take-over":    {sb: superblock{Stale: []staleObjects{{Epoch: 1, Object: 5}}}, want: leftoverGrace},
		"ended after one":      {sb: superblock{Owner: owned, Stale: []staleObjects{{Epoch: 1, Object: 5}}}, ended: true, want: leftoverGrace},
		"in one":               {sb: superblock{Points: []cutOff{{Epoch: 1}}}, want: leftoverGrace},
		"a settled point":      {sb: superblock{Points: []cutOff{{Epoch: 1, point: point{Settled: true}}}}},
		"given up":             {sb: superblock{Loose: true}, want: leftoverGrace},
		"a repair that died":   {sb: superblock{Intent: &checkpointRef{1, 1}}, want: leftoverGrace},
		"asked for by another": {sb: superblock{Owner: owned, Evict: &eviction{By: "beta"}}, want: time.Minute + leftoverGrace},
	} {
		before := time.Now()
		if err := x.sb.remove(&RemoveOptions{Force: true, ended: x.ended}); err != nil {
			t.Fatal(err)
		}
		if x.want == 0 {
			if !x.sb.Late.IsZero() || x.sb.lateFor(before) != 0 {
				t.Errorf("%s: waits until %v", name, x.sb.Late)
			}
			continue
		}
		if d := x.sb.lateFor(before); d < x.want || d > x.want+time.Minute {
			t.Errorf("%s: waits for %v, want %v", name, d, x.want)
		}
		for _, now := range []time.Time{x.sb.Late, x.sb.Late.Add(time.Hour), before.Add(-time.Hour * 24 * 365)} {
			if d := x.sb.lateFor(now); d != 0 {
				t.Errorf("%s: at %v waits for %v", name, now, d)
			}
		}
	}
}

// TestPartialUnderOwner: a partial image whose owner has died goes but for its superblock, which
// stays until nothing of that owner can come; one that its own process gives up goes at once.
func TestPartialUnderOwner(t *testing.T) {
	st := mem.New()
	id := newPartial(t, st, true)
	alter(t, st, id, func(sb *superblock) { sb.Created = sb.Created.Add(-2 * time.Hour) })
	put := func(n uint64) {
		t.Helper()
		if err := st.Put(t.Context(), dataKey(id, n, 1), []byte("data")); err != nil {
			t.Fatal(err)
		}
	}
	put(1)
	if found, err := GC(t.Context(), st, GCOptions{Clock: &stepClock{}}); err != nil || len(found) != 1 || found[0].Objects != 1 {
		t.Errorf("gc finds %+v, %v", found, err)
	}
	put(2)
	if err := Finish(t.Context(), st, "new", id, 0); !errors.Is(err, ErrCollected) {
		t.Errorf("finished after it was removed: %v", err)
	}
	mustCollectLater(t, st)
	mustBeEmpty(t, st)

	id = newPartial(t, st, true)
	put(1)
	if err := Abort(t.Context(), st, id, nil); err != nil {
		t.Error(err)
	}
	mustBeEmpty(t, st)
}
