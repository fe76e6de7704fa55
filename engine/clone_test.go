package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// mustClone makes a clone of an image, which h has open if it is not nil.
func mustClone(t *testing.T, st backend.Store, id uuid.UUID, snapshot, name string, h *host) uuid.UUID {
	t.Helper()
	o := CloneOptions{Snapshot: snapshot}
	if h != nil {
		o.Nudge = h.nudge
	}
	clone, err := Clone(context.Background(), st, id, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return clone
}

// mustOpen opens an image on a host of its own.
func mustOpen(t *testing.T, st backend.Store, id uuid.UUID, seed uint64) *host {
	t.Helper()
	h := newHost(t, fmt.Sprint("host", seed), st, seed)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	return h
}

// mustBeSound checks images, and the store that they are in.
func mustBeSound(t *testing.T, st backend.Store, names ...string) {
	t.Helper()
	for _, name := range names {
		rep, err := Check(context.Background(), st, name, "mem:/"+name, CheckOptions{Deep: true})
		if err != nil || !rep.Clean() {
			t.Errorf("check of %s: %v, %+v", name, err, rep)
		}
	}
	rep, err := CheckStore(context.Background(), st, "mem:", false)
	if err != nil || !rep.Clean() {
		t.Errorf("check of the store: %v, %+v", err, rep)
	}
}

// mustBeEmpty lists a store that has nothing but an empty directory.
func mustBeEmpty(t *testing.T, st backend.Store) {
	t.Helper()
	_ = st.List(context.Background(), "", func(key string) error {
		if key != backend.DirectoryKey {
			t.Errorf("left over: %s", key)
		}
		return nil
	})
}

// removeWhole removes an image, and then what it was made of.
func removeWhole(st backend.Store, name string, o RemoveOptions) error {
	id, err := Remove(context.Background(), st, name, o)
	if err != nil {
		return err
	}
	_, err = Reclaim(context.Background(), st, id, nil)
	return err
}

func mustRemove(t *testing.T, st backend.Store, name string) {
	t.Helper()
	if err := removeWhole(st, name, RemoveOptions{URL: "mem:/" + name, Snapshots: true}); err != nil {
		t.Fatal(err)
	}
}

// TestClone: a clone begins as its parent was, and each goes on for itself; in whatever order
// they are removed, the other is whole, and nothing is left in the end.
func TestClone(t *testing.T) {
	t.Parallel()
	for _, order := range [][]string{{"disk", "c1", "c2"}, {"c2", "disk", "c1"}, {"c1", "c2", "disk"}, {"disk", "c2", "c1"}} {
		t.Run(strings.Join(order, " "), func(t *testing.T) {
			st := mem.New()
			a, id := attached(t, st, smallImage(), nil)
			for range 12 {
				a.mustFill(1000)
				a.mustDestage()
			}
			mustSnapshot(t, st, id, "monday", a)
			a.mustFill(2000)
			c1 := mustClone(t, st, id, "monday", "c1", nil)
			c2 := mustClone(t, st, id, "", "c2", a)
			h1, h2 := mustOpen(t, st, c1, 11), mustOpen(t, st, c2, 12)
			h1.mustHave(1000)
			h2.mustHave(2000)
			for range 12 {
				h1.mustWrite(7, 10007)
				h1.mustDestage()
			}
			for range 12 {
				h2.mustFill(20000)
				h2.mustDestage()
			}
			for range 12 {
				a.mustFill(3000)
				a.mustDestage()
			}
			h1.mustWrite(8, 10008)
			mustBeSound(t, st, "disk", "c1", "c2")
			for _, h := range []*host{h1, h2, a} {
				h.mustClose()
			}
			mustBeSound(t, st, "disk", "c1", "c2")
			gone := map[string]bool{}
			show := func() {
				t.Helper()
				if !gone["disk"] {
					a.again()
					if err := a.open(id, false); err != nil {
						t.Fatal(err)
					}
					a.mustHave(3000)
					a.mustClose()
					mustBeSound(t, st, "disk")
				}
				if !gone["c1"] {
					h := mustOpen(t, st, c1, 13)
					h.mustRead(7, 10007)
					h.mustRead(8, 10008)
					h.mustRead(9, 1009)
					h.mustRead(63, 1063)
					h.mustClose()
					mustBeSound(t, st, "c1")
				}
				if !gone["c2"] {
					h := mustOpen(t, st, c2, 14)
					h.mustHave(20000)
					h.mustClose()
					mustBeSound(t, st, "c2")
				}
			}
			show()
			for _, name := range order {
				mustRemove(t, st, name)
				gone[name] = true
				show()
			}
			mustBeEmpty(t, st)
		})
	}
}

// TestDeepClones: however deep a chain of clones is, the deepest one reads as the first did
// where nothing was written since, from the first one's objects, also when all between are
// gone.
func TestDeepClones(t *testing.T) {
	t.Parallel()
	depth := 1000
	if testing.Short() {
		depth = 50
	}
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	a.mustClose()
	name := "disk"
	for i := range depth {
		next := fmt.Sprint("c", i)
		clone := mustClone(t, st, id, "", next, nil)
		if i%100 == 7 {
			h := mustOpen(t, st, clone, uint64(i))
			h.mustWrite(uint64(i/100), uint64(5000+i))
			h.mustClose()
		}
		if i%2 == 0 {
			mustRemove(t, st, name)
		}
		id, name = clone, next
	}
	h := mustOpen(t, st, id, 5)
	for n := range uint64(snapshotBlocks) {
		want := 1000 + n
		if 100*n+7 < uint64(depth) {
			want = 5007 + 100*n
		}
		h.mustRead(n, want)
	}
	h.mustClose()
	mustBeSound(t, st, name)
	names, err := backend.Names(context.Background(), st)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		mustRemove(t, st, n.Name)
	}
	mustBeEmpty(t, st)
}

// deepAndFlat returns two images of the same contents, each open on a host that has read nothing
// of it so far: one whose blocks are each in an object of another one of its ancestors, of which it has
// so many, and one without ancestors, of as many objects. The store of each counts.
func deepAndFlat(t testing.TB, depth int) [2]*host {
	var hosts [2]*host
	for i, deep := range []bool{true, false} {
		st := &countedStore{Store: mem.New()}
		id, err := Create(context.Background(), st, "disk", smallImage())
		if err != nil {
			t.Fatal(err)
		}
		h := newHost(t, "alpha", st, 1)
		for d := range depth {
			if d == 0 || deep {
				h = newHost(t, "alpha", st, uint64(d+2))
				if d > 0 {
					id, err = Clone(context.Background(), st, id, fmt.Sprint("c", d), CloneOptions{})
				}
				if err = cmp.Or(err, h.open(id, false)); err != nil {
					t.Fatal(err)
				}
			}
			h.mustWrite(uint64(d%snapshotBlocks), uint64(d+1))
			h.mustDestage()
			if deep || d == depth-1 {
				h.mustClose()
			}
		}
		h = newHost(t, "beta", st, 1)
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		hosts[i] = h
	}
	return hosts
}

// TestDepthCostsNothing: what a clone reads costs as many calls of the store as it would if it
// were none, however many ancestors there are.
func TestDepthCostsNothing(t *testing.T) {
	t.Parallel()
	const depth = 100
	hosts := deepAndFlat(t, depth)
	if n := len(hosts[0].im.line.origins); n < snapshotBlocks {
		t.Fatalf("the clone has objects of %d ancestors: this tests too little", n)
	}
	var calls [2]int
	for i, h := range hosts {
		st := h.st.(*countedStore)
		st.calls = 0
		for n := range uint64(snapshotBlocks) {
			h.mustRead(n, uint64(depth-1-(depth-1-int(n))%snapshotBlocks+1))
		}
		calls[i] = st.calls
	}
	if calls[0] < snapshotBlocks || calls[0] != calls[1] {
		t.Errorf("%d calls of the store for a clone %d deep, %d without ancestors", calls[0], depth, calls[1])
	}
}

// BenchmarkDepth reads at random from a clone a thousand deep, and from an image without
// ancestors, in turns.
func BenchmarkDepth(b *testing.B) {
	hosts := deepAndFlat(b, 1000)
	rng := rand.New(rand.NewPCG(1, 2))
	var took [2][]time.Duration
	for b.Loop() {
		for i, h := range hosts {
			began := time.Now()
			for range 1000 {
				h.do(Read, rng.Uint64N(snapshotBlocks), 0, 0)
			}
			took[i] = append(took[i], time.Since(began)/1000)
		}
	}
	for i := range took {
		slices.Sort(took[i])
	}
	deep, flat := took[0][len(took[0])/2], took[1][len(took[1])/2]
	b.ReportMetric(float64(deep), "ns-deep/read")
	b.ReportMetric(float64(flat), "ns-flat/read")
	b.ReportMetric(float64(deep)/float64(flat), "ratio")
}

// TestCloneNames: what cannot be cloned is refused in one line, and nothing is left of it.
func TestCloneNames(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	mustSnapshot(t, st, id, "monday", nil)
	for _, tt := range []struct {
		of, name string
		want     error
	}{{"friday", "c", ErrNoSnapshot}, {"monday", "disk", backend.ErrExists}, {"monday", "a@b", nil}, {"", "", nil}} {
		if _, err := Clone(ctx, st, id, tt.name, CloneOptions{Snapshot: tt.of}); err == nil || tt.want != nil && !errors.Is(err, tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("clone %q as %q: %v, want %v", tt.of, tt.name, err, tt.want)
		}
	}
	if _, err := Clone(ctx, st, uuid.New(), "c", CloneOptions{}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("clone of what is not there: %v", err)
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil || len(sb.Clones) > 0 {
		t.Errorf("%+v, %v", sb.Clones, err)
	}
	mustRemove(t, st, "disk")
	mustBeEmpty(t, st)
}

// TestRevertsTakeConstantSpace: snapshot, clone of the snapshot, removal of the original, over
// and over, as XCP-ng reverts a disk: no round takes more space, or asks more of the store,
// than one of the first.
func TestRevertsTakeConstantSpace(t *testing.T) {
	t.Parallel()
	const early = 40
	rounds := 200
	if testing.Short() {
		rounds = early + 10
	}
	ctx := context.Background()
	st := &countedStore{Store: mem.New()}
	id := newImageIn(t, st)
	name := "disk"
	calls, objects := make([]int, rounds), make([]int, rounds)
	for i := range rounds {
		h := newHost(t, "alpha", st, uint64(i))
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		for n := range uint64(snapshotBlocks) {
			if i == 0 || (n*7+uint64(i))%16 < 4 { // a quarter
				h.mustWrite(n, 1000*uint64(i)+n)
			}
		}
		h.mustDestage()
		h.mustClose()
		st.calls = 0
		mustSnapshot(t, st, id, "s", nil)
		next := fmt.Sprint("disk", i)
		clone := mustClone(t, st, id, "s", next, nil)
		mustRemove(t, st, name)
		calls[i] = st.calls
		id, name = clone, next
		_ = st.List(ctx, "", func(string) error { objects[i]++; return nil })
	}
	most := slices.Max(calls[:early])
	if n := slices.Max(calls[early:]); n > most*3/2 {
		t.Errorf("a late round asks the store %d times, one of the first %d at most", n, most)
	}
	most = slices.Max(objects[:early])
	if n := slices.Max(objects[early:]); n > most*3/2 {
		t.Errorf("%d objects are in the store after a late round, %d at most after one of the first", n, most)
	}
	t.Logf("calls %d, %d, %d; objects %d, %d, %d", calls[1], calls[early], calls[rounds-1], objects[1], objects[early], objects[rounds-1])
	mustBeSound(t, st, name)
	h := mustOpen(t, st, id, 999)
	for n := range uint64(snapshotBlocks) {
		last := 0
		for i := range rounds {
			if i == 0 || (n*7+uint64(i))%16 < 4 {
				last = i
			}
		}
		h.mustRead(n, 1000*uint64(last)+n)
	}
	h.mustClose()
	mustRemove(t, st, name)
	mustBeEmpty(t, st)
}

// TestRemovalsAtOnce: images of one lineage that are removed at one time, beside a collection,
// leave what a clone needs.
func TestRemovalsAtOnce(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for n := range uint64(60) {
		st := mem.New()
		a, id := attached(t, st, smallImage(), nil)
		a.mustFill(1000)
		a.mustClose()
		p := mustClone(t, st, id, "", "p", nil)
		c := mustClone(t, st, p, "", "c", nil)
		leaf := mustClone(t, st, c, "", "leaf", nil)
		var all sync.WaitGroup
		for _, name := range []string{"disk", "p", "c"} {
			all.Go(func() { _ = removeWhole(st, name, RemoveOptions{}) }) // they may meet
		}
		all.Go(func() { _, _ = GC(ctx, st, GCOptions{}) })
		all.Wait()
		h := mustOpen(t, st, leaf, n)
		h.mustHave(1000)
		h.mustClose()
		for _, name := range []string{"disk", "p", "c"} {
			if err := removeWhole(st, name, RemoveOptions{}); err != nil && !errors.Is(err, backend.ErrNotFound) {
				t.Fatal(err)
			}
		}
		mustBeSound(t, st, "leaf")
		mustRemove(t, st, "leaf")
		if _, err := GC(ctx, st, GCOptions{}); err != nil {
			t.Fatal(err)
		}
		mustBeEmpty(t, st)
	}
}

// TestLostSuperblocks: where the superblock of a parent, or of a clone that has a name, is
// lost, nothing is removed that the other needs.
func TestLostSuperblocks(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	a.mustClose()
	clone := mustClone(t, st, id, "", "clone", nil)
	lose := func(id uuid.UUID) (back func()) {
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
	back := lose(id)
	if _, err := Remove(ctx, st, "disk", RemoveOptions{Force: true}); err == nil || !strings.Contains(err.Error(), "clone is a clone") {
		t.Errorf("a parent without a superblock is removed: %v", err)
	}
	back()
	back = lose(clone)
	if err := removeWhole(st, "disk", RemoveOptions{}); err == nil || !strings.Contains(err.Error(), "made as clone, is missing") {
		t.Errorf("what the parent of a clone without a superblock was made of is removed: %v", err)
	}
	if rep, err := CheckStore(ctx, st, "mem:", false); err != nil || len(rep.Errors) != 1 || !strings.Contains(fmt.Sprint(rep.Notes), "what clones of it need cannot be told") {
		t.Errorf("check of the store beside a clone without a superblock: %v, %+v", err, rep)
	}
	if found, err := GC(ctx, st, GCOptions{Age: 1}); err != nil || len(found) > 0 {
		t.Errorf("gc takes %+v for garbage beside a clone without a superblock, %v", found, err)
	}
	back()
	h := mustOpen(t, st, clone, 3)
	h.mustHave(1000)
	h.mustClose()
	if _, err := Reclaim(ctx, st, id, nil); err != nil {
		t.Error(err)
	}
	mustRemove(t, st, "clone")
	mustBeEmpty(t, st)
}
