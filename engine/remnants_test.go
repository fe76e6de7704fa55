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
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// kept is what a collection of garbage has said of what it leaves.
type kept struct {
	late, needed []string
}

// collectAt collects garbage at a time from now.
func collectAt(t *testing.T, st backend.Store, in time.Duration, dry bool) (found []Garbage, k kept) {
	t.Helper()
	found, err := GC(context.Background(), st, GCOptions{
		DryRun: dry,
		Now:    func() time.Time { return time.Now().Add(in) },
		Late:   func(name string, _ time.Duration) { k.late = append(k.late, name) },
		Kept:   func(id uuid.UUID, why string) { k.needed = append(k.needed, id.String()+": "+why) },
	})
	if err != nil {
		t.Fatalf("gc: %v", err)
	}
	return found, k
}

// mustPut puts a data object of an image.
func mustPut(t *testing.T, st backend.Store, id uuid.UUID, number uint64) {
	t.Helper()
	if err := st.Put(context.Background(), dataKey(id, number, 1), []byte("data")); err != nil {
		t.Fatal(err)
	}
}

// TestRemnants: objects that come for an image when its superblock has gone as well are removed, an
// hour later.
func TestRemnants(t *testing.T) {
	st, id := removedUnderOwner(t, true, false)
	if _, err := reclaimLater(st, id); err != nil {
		t.Fatal(err)
	}
	mustBeEmpty(t, st)
	for n := range uint64(3) {
		mustPut(t, st, id, 100+n)
	}
	if rep, err := CheckStore(context.Background(), st, "mem:", false); err != nil || len(rep.Errors) != 1 || !strings.Contains(rep.Errors[0].Action, "lsdctl gc") {
		t.Errorf("check: %+v, %v", rep, err)
	}
	if found, k := collectAt(t, st, DefaultGCAge-time.Minute, false); len(found) != 0 || !slices.Equal(k.late, []string{id.String()}) {
		t.Errorf("young objects: %+v, %+v", found, k)
	}
	for _, dry := range []bool{true, false} {
		found, k := collectAt(t, st, DefaultGCAge, dry)
		if len(found) != 1 || found[0].Image != id || found[0].Objects != 3 || len(k.late)+len(k.needed) != 0 {
			t.Errorf("old objects: %+v, %+v", found, k)
		}
		if n := len(keysOf(t, st, id)); dry != (n == 3) || !dry && n > 0 {
			t.Errorf("%d objects are there, dry run %v", n, dry)
		}
	}
}

// TestRemnantOneYoung: one object that has come lately keeps all the others, wherever it is in the
// list.
func TestRemnantOneYoung(t *testing.T) {
	st, id := mem.New(), uuid.New()
	newImageIn(t, st)
	later := &laterStore{Store: st, key: dataKey(id, remnantBatch+1, 1), by: time.Minute}
	for n := range uint64(remnantBatch + 3) {
		mustPut(t, st, id, n)
	}
	if found, k := collectAt(t, later, DefaultGCAge+time.Second, false); len(found) != 0 || len(k.late) != 1 {
		t.Errorf("gc finds %+v, %+v", found, k)
	}
	if found, _ := collectAt(t, later, DefaultGCAge+2*time.Minute, false); len(found) != 1 || found[0].Objects != remnantBatch+3 {
		t.Errorf("gc finds %+v", found)
	}
	if n := len(keysOf(t, st, id)); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// laterStore has one object that is younger than it is.
type laterStore struct {
	backend.Store
	key string
	by  time.Duration
}

func (s *laterStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	is, err := s.Store.Stat(ctx, key)
	if key == s.key {
		is.Modified = is.Modified.Add(s.by)
	}
	return is, err
}

// TestLostSuperblock: what may be needed of an image whose superblock is lost stays, for ever: of
// one that has a name; of one that was removed, and of which there are clones; and of all as long
// as it cannot be told what an image needs.
func TestLostSuperblock(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustFill(1000)
	a.mustCheckpoint()
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	if err := removeWhole(st, "disk", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	stray := uuid.New()
	mustPut(t, st, stray, 7)
	lose := func(id uuid.UUID) (bring func()) {
		b, _, err := st.Load(ctx, SuperblockKey(id))
		if err == nil {
			err = st.Delete(ctx, SuperblockKey(id))
		}
		if err != nil {
			t.Fatal(err)
		}
		return func() {
			if _, err := st.Swap(ctx, SuperblockKey(id), backend.NoVersion, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := keysOf(t, st, id)
	if len(before) < 3 {
		t.Fatalf("the clone needs %q", before)
	}

	bring := lose(clone)
	found, k := collectAt(t, st, 10*DefaultGCAge, false)
	if len(found) != 0 || len(k.needed) != 1 || !strings.HasPrefix(k.needed[0], stray.String()) || !strings.Contains(k.needed[0], clone.String()) {
		t.Errorf("the clone's superblock is lost: %+v, %+v", found, k)
	}
	bring()
	bring = lose(id)
	found, k = collectAt(t, st, 10*DefaultGCAge, false)
	if len(found) != 1 || found[0].Image != stray || len(k.needed) != 1 || !strings.HasPrefix(k.needed[0], id.String()) {
		t.Errorf("the origin's superblock is lost: %+v, %+v", found, k)
	}
	bring()
	if !slices.Equal(keysOf(t, st, id), before) {
		t.Errorf("gc has left %q of %q", keysOf(t, st, id), before)
	}
	if rep, err := CheckStore(ctx, st, "mem:", false); err != nil || len(rep.Errors) != 0 {
		t.Errorf("check: %+v, %v", rep, err)
	}
	if err := removeWhole(st, "clone", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	mustCollectLater(t, st)
	mustBeEmpty(t, st)
}

// TestRemnantBroughtBack: a superblock that is brought back while garbage is being collected keeps
// what is there.
func TestRemnantBroughtBack(t *testing.T) {
	ctx, inner := context.Background(), mem.New()
	id := newImageIn(t, inner)
	a := newHost(t, "alpha", inner, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustFill(100)
	a.mustClose()
	before := keysOf(t, inner, id)
	super, _, err := inner.Load(ctx, SuperblockKey(id))
	if err == nil {
		err = errors.Join(inner.Delete(ctx, SuperblockKey(id)), backend.Unlink(ctx, inner, "disk", id))
	}
	if err != nil {
		t.Fatal(err)
	}
	stats := 0
	st := faultstore.New(inner, func(o faultstore.Op) faultstore.Fault {
		if o.Method == faultstore.Stat && o.Key == SuperblockKey(id) {
			if stats++; stats == 2 { // it is looked for twice
				_, _ = inner.Swap(ctx, o.Key, backend.NoVersion, super)
			}
		}
		return faultstore.Fault{}
	})
	collectAt(t, st, 2*DefaultGCAge, false)
	if got := keysOf(t, inner, id); stats < 2 || !slices.Equal(got, before) {
		t.Errorf("there are %q of %q after %d looks", got, before, stats)
	}
}
