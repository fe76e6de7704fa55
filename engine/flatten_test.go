package engine

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// flatten flattens the image, which the host has open.
func (h *host) flatten() error {
	err := errors.New("not ended")
	h.im.Flatten(nil, func(e error) { err = e })
	h.run(time.Second)
	return err
}

func (h *host) mustFlatten() {
	h.t.Helper()
	if err := h.flatten(); err != nil {
		h.t.Fatalf("flatten: %v", err)
	}
}

// mustSeparate separates an image, of which these states are said to need its ancestors.
func mustSeparate(t *testing.T, st backend.Store, id, parent uuid.UUID, needs ...string) {
	t.Helper()
	s, err := Separate(context.Background(), st, id)
	if err != nil {
		t.Fatal(err)
	}
	if s.Parent != parent || !slices.Equal(s.Needs, needs) {
		t.Fatalf("separated: %+v, want parent %s, needs %q", s, parent, needs)
	}
	sb, _, err := loadSuperblock(context.Background(), st, id)
	if err != nil || sb.separated() != (len(needs) == 0) {
		t.Fatalf("%v, parent %s, origins %v", err, sb.Parent, sb.Origins)
	}
}

// mustNeedNothingOf makes sure that nothing is left of an image that has been removed.
func mustNeedNothingOf(t *testing.T, st backend.Store, id uuid.UUID) {
	t.Helper()
	_ = st.List(context.Background(), id.String(), func(key string) error {
		t.Errorf("left over: %s", key)
		return nil
	})
}

// TestFlatten: a clone of any depth that is flattened reads as before, and needs nothing of its
// ancestors any more: when these are removed nothing of them is left.
func TestFlatten(t *testing.T) {
	t.Parallel()
	for _, depth := range []int{1, 2, 5} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustFill(1000)
		h.mustDestage()
		h.mustFill(2000)
		chain := []uuid.UUID{id}
		for d := range depth {
			name := "c" + string(rune('0'+d))
			id = mustClone(t, st, id, "", name, h)
			chain = append(chain, id)
			h.mustClose()
			h = mustOpen(t, st, id, uint64(10+d))
			h.mustWrite(uint64(d), uint64(9000+d))
			if d%2 == 0 {
				h.mustDestage()
			}
		}
		h.mustFlatten()
		h.mustFlatten() // there is nothing to be done, which it finds
		mustSeparate(t, st, id, chain[depth-1])
		h.mustWrite(40, 9040)
		h.mustClose()
		mustSeparate(t, st, id, uuid.Nil)
		mustRemove(t, st, "disk")
		for d := range depth - 1 {
			mustRemove(t, st, "c"+string(rune('0'+d)))
		}
		for _, gone := range chain[:depth] {
			mustNeedNothingOf(t, st, gone)
		}
		name := "c" + string(rune('0'+depth-1))
		mustBeSound(t, st, name)
		h = mustOpen(t, st, id, 99)
		for n := range uint64(snapshotBlocks) {
			switch {
			case n < uint64(depth):
				h.mustRead(n, 9000+n)
			case n == 40:
				h.mustRead(n, 9040)
			default:
				h.mustRead(n, 2000+n)
			}
		}
		h.mustClose()
		mustRemove(t, st, name)
		mustBeEmpty(t, st)
	}
}

// TestFlattenLarge: of a clone of whose data nothing is in memory, with a map of many segments
// that were stored whole by its parent, and partly as deltas by itself, while it is written to.
func TestFlattenLarge(t *testing.T) {
	t.Parallel()
	st := mem.New()
	rng := rand.New(rand.NewPCG(1, 2))
	o := CreateOptions{Size: 1 << 30, ObjectSize: MinObjectSize}
	a, id := attached(t, st, o, nil)
	a.scatter(rng, 3000, 4000)
	a.mustCheckpoint()
	want := make(map[uint64]uint64)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	for n := range uint64(4000) {
		block := n%4*(segmentSectors/8) + n/4
		_, _, v := h.do(Read, block, 0, 0)
		want[block] = v
	}
	h.mustWrite(3, 77)
	want[3] = 77
	h.mustCheckpoint()
	h.mustReopen(clone)
	var told []uint64
	err := errors.New("not ended")
	h.im.Flatten(func(done, total uint64) {
		if n := len(told); done > total || n > 0 && done < told[n-1] {
			t.Errorf("progress from %d to %d of %d", told[n-1], done, total)
		}
		told = append(told, done)
	}, func(e error) { err = e })
	for n := range uint64(200) {
		block := n%4*(segmentSectors/8) + n*5%1000
		h.mustWrite(block, 5000+n)
		want[block] = 5000 + n
	}
	h.run(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if len(told) < 3 || told[len(told)-1] == 0 {
		t.Errorf("progress was %v", told)
	}
	mustSeparate(t, st, clone, id)
	mustRemove(t, st, "disk")
	mustNeedNothingOf(t, st, id)
	for range 2 {
		for block, v := range want {
			h.mustRead(block, v)
		}
		h.mustReopen(clone)
	}
	mustBeSound(t, st, "clone")
}

// TestFlattenKeeps: what a snapshot or a clone of a clone needs of the ancestors stays, until it
// is removed, and so does the claim on it.
func TestFlattenKeeps(t *testing.T) {
	t.Parallel()
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	h.mustWrite(1, 1)
	mustSnapshot(t, st, clone, "old", h)
	grand := mustClone(t, st, clone, "old", "grand", h)
	h.mustWrite(2, 2)
	mustSeparate(t, st, clone, id, "its present state", "snapshot old", "clone grand")
	h.mustFlatten()
	mustSnapshot(t, st, clone, "new", h)
	mustSeparate(t, st, clone, id, "snapshot old", "clone grand")
	h.mustClose()
	mustRemove(t, st, "disk")
	g := mustOpen(t, st, grand, 8)
	g.mustRead(1, 1)
	g.mustRead(3, 1003)
	if err := RemoveSnapshot(t.Context(), st, clone, "old"); err != nil {
		t.Fatal(err)
	}
	mustSeparate(t, st, clone, id, "clone grand")
	g.mustFlatten()
	mustSeparate(t, st, grand, clone)
	mustSeparate(t, st, clone, id)
	if _, err := Reclaim(t.Context(), st, id, nil); err != nil {
		t.Fatal(err)
	}
	mustNeedNothingOf(t, st, id)
	g.mustClose()
	mustBeSound(t, st, "clone", "grand")
	h = mustOpen(t, st, clone, 9)
	g = mustOpen(t, st, grand, 10)
	for n := uint64(3); n < snapshotBlocks; n++ {
		h.mustRead(n, 1000+n)
		g.mustRead(n, 1000+n)
	}
	h.mustRead(2, 2)
	g.mustRead(2, 1002)
}

// TestFlattenNothing: clones that have nothing of their parents, and images that are none.
func TestFlattenNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		fill func(*host)
	}{
		{"never written", func(h *host) {}},
		{"all discarded", func(h *host) {
			h.mustFill(1000)
			h.mustCheckpoint()
			h.mustDiscard(0, snapshotBlocks)
		}},
		{"no checkpoint", func(h *host) { h.mustDiscard(0, 1) }},
	} {
		st := mem.New()
		a, id := attached(t, st, smallImage(), nil)
		test.fill(a)
		a.mustFlatten()
		mustSeparate(t, st, id, uuid.Nil)
		clone := mustClone(t, st, id, "", "clone", a)
		a.mustClose()
		h := mustOpen(t, st, clone, 7)
		h.mustFlatten()
		mustSeparate(t, st, clone, id)
		mustRemove(t, st, "disk")
		mustNeedNothingOf(t, st, id)
		h.mustReopen(clone)
		h.mustRead(0, 0)
		mustBeSound(t, st, "clone")
	}
}

// TestFlattenPaused: what was moved stays moved, the next one goes on from there; and there is
// one at a time.
func TestFlattenPaused(t *testing.T) {
	t.Parallel()
	st := mem.New()
	a, id := attached(t, st, CreateOptions{Size: 1 << 30, ObjectSize: MinObjectSize}, nil)
	a.scatter(rand.New(rand.NewPCG(3, 4)), 3000, 4000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	var err error
	var last, total uint64
	h.im.Flatten(func(n, of uint64) {
		if last, total = n, of; n > 0 {
			h.im.env.Post(h.im.PauseFlatten)
		}
	}, func(e error) { err = e })
	if e := h.flatten(); e == nil || !strings.Contains(e.Error(), "already") {
		t.Errorf("flattened twice at a time: %v", e)
	}
	h.run(time.Minute)
	if !errors.Is(err, ErrPaused) || last == 0 || last >= total {
		t.Fatalf("%v after %d of %d bytes", err, last, total)
	}
	mustSeparate(t, st, clone, id, "its present state")
	first := uint64(0)
	h.im.Flatten(func(n, of uint64) { first = max(first, of) }, func(e error) { err = e })
	h.run(time.Minute)
	if err != nil || first > total-last {
		t.Errorf("%v; %d bytes were left of %d, of which %d had been moved", err, first, total, last)
	}
	mustSeparate(t, st, clone, id)
}

// TestFlattenDamaged: an ancestor's object that is not there ends it with its name, and once
// it is there again another one comes to its end.
func TestFlattenDamaged(t *testing.T) {
	t.Parallel()
	ctx, st := t.Context(), mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	key := ""
	_ = st.List(ctx, id.String()+"/d/", func(k string) error { key = k; return nil })
	is, err := st.Stat(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, is.Size)
	if _, err := st.Get(ctx, key, b, 0); err != nil {
		t.Fatal(err)
	}
	h := mustOpen(t, st, clone, 7)
	if err := st.Delete(ctx, key); err != nil {
		t.Fatal(err)
	}
	if err := h.flatten(); err == nil || !strings.Contains(err.Error(), key) {
		t.Fatalf("flattened without %s: %v", key, err)
	}
	mustSeparate(t, st, clone, id, "its present state")
	if err := st.Put(ctx, key, b); err != nil {
		t.Fatal(err)
	}
	h.mustFlatten()
	mustSeparate(t, st, clone, id)
	h.mustHave(1000)
}

// TestFlattenOutage: a store that does not answer for a while is not said to be damaged.
func TestFlattenOutage(t *testing.T) {
	t.Parallel()
	st := faultstore.New(mem.New())
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	down := true
	st.Inject(faultstore.If(func(op faultstore.Op) bool {
		return down && op.Method == faultstore.Get && strings.HasPrefix(op.Key, id.String())
	}, faultstore.Fault{Before: backend.ErrTemporary}))
	notEnded := errors.New("not ended")
	err := notEnded
	h.im.Flatten(nil, func(e error) { err = e })
	if h.run(time.Minute); err != notEnded {
		t.Fatalf("after a minute in which the store does not answer: %v", err)
	}
	if h.run(flattenPatience); err == nil || !strings.Contains(err.Error(), "when the store answers") {
		t.Fatalf("while the store does not answer: %v", err)
	}
	err = notEnded
	h.im.Flatten(nil, func(e error) { err = e })
	h.run(time.Minute)
	down = false
	if h.run(time.Minute); err != nil {
		t.Fatalf("when the store answers again: %v", err)
	}
	mustSeparate(t, st, clone, id)
}

// TestSeparateInterrupted: wherever a separation is interrupted the image is whole, and what the
// parent keeps goes with a repetition, or with GC.
func TestSeparateInterrupted(t *testing.T) {
	t.Parallel()
	for swaps := range 3 {
		for _, again := range []string{"repeated", "collected", "removed"} {
			st := mem.New()
			a, id := attached(t, st, smallImage(), nil)
			a.mustFill(1000)
			clone := mustClone(t, st, id, "", "clone", a)
			a.mustClose()
			h := mustOpen(t, st, clone, 7)
			h.mustFlatten()
			h.mustClose()
			gone, stop := context.WithCancel(t.Context())
			if _, err := Separate(gone, &swapLimit{Store: st, left: swaps, stop: stop}, clone); err == nil {
				t.Fatalf("separated with %d changes", swaps)
			}
			switch again {
			case "repeated":
				if _, err := Separate(t.Context(), st, clone); err != nil {
					t.Fatal(err)
				}
				sb, _, err := loadSuperblock(t.Context(), st, id)
				if err != nil || len(sb.Clones) > 0 {
					t.Errorf("%v, the parent keeps %+v", err, sb.Clones)
				}
			case "collected":
				if _, err := GC(t.Context(), st, GCOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			mustRemove(t, st, "disk")
			h = mustOpen(t, st, clone, 8)
			h.mustHave(1000)
			h.mustClose()
			mustBeSound(t, st, "clone")
			mustRemove(t, st, "clone")
			mustBeEmpty(t, st)
		}
	}
}

// halfSeparated returns the ids of a disk and of its clone, which has been flattened and which h
// has open: it was separated by whoever died after so many changes of superblocks.
func halfSeparated(t *testing.T, st backend.Store, swaps int) (id, clone uuid.UUID, h *host) {
	t.Helper()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone = mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h = mustOpen(t, st, clone, 7)
	h.mustFlatten()
	gone, stop := context.WithCancel(t.Context())
	if _, err := Separate(gone, &swapLimit{Store: st, left: swaps, stop: stop}, clone); err == nil {
		t.Fatalf("separated with %d changes", swaps)
	}
	return id, clone, h
}

// TestSeparateInterruptedRemoved: an image whose separation was interrupted, wherever that was,
// can be passed over when it has been removed.
func TestSeparateInterruptedRemoved(t *testing.T) {
	t.Parallel()
	for swaps := range 3 {
		st := mem.New()
		id, clone, h := halfSeparated(t, st, swaps)
		grand := mustClone(t, st, clone, "", "grand", h)
		h.mustClose()
		mustRemove(t, st, "clone")
		h = mustOpen(t, st, grand, 8)
		h.mustFlatten() // so nothing is needed of the clone any more
		h.mustClose()
		if _, err := Reclaim(t.Context(), st, clone, nil); err != nil {
			t.Fatalf("after %d changes: %v", swaps, err)
		}
		mustNeedNothingOf(t, st, clone)
		if _, err := GC(t.Context(), st, GCOptions{}); err != nil {
			t.Fatalf("after %d changes: %v", swaps, err)
		}
		mustRemove(t, st, "disk")
		mustBeSound(t, st, "grand")
		h = mustOpen(t, st, grand, 9)
		h.mustHave(1000)
		h.mustClose()
		mustSeparate(t, st, grand, parentOf(t, st, grand))
		mustNeedNothingOf(t, st, id)
		mustRemove(t, st, "grand")
		mustBeEmpty(t, st)
	}
}

// parentOf returns what an image is a clone of.
func parentOf(t *testing.T, st backend.Store, id uuid.UUID) uuid.UUID {
	t.Helper()
	sb, _, err := loadSuperblock(t.Context(), st, id)
	if err != nil {
		t.Fatal(err)
	}
	return sb.Parent
}

// TestSeparateCollected: a collection gives up what an image keeps for a clone of it whose
// separation was interrupted, once that says that it needs nothing of it.
func TestSeparateCollected(t *testing.T) {
	t.Parallel()
	for swaps := range 3 {
		st := mem.New()
		id, clone, h := halfSeparated(t, st, swaps)
		if _, err := GC(t.Context(), st, GCOptions{}); err != nil {
			t.Fatal(err)
		}
		sb, _, err := loadSuperblock(t.Context(), st, id)
		if err != nil || len(sb.Clones) > 0 != (swaps == 0) {
			t.Errorf("after %d changes: %v, the disk keeps %+v", swaps, err, sb.Clones)
		}
		h.mustHave(1000)
		mustSeparate(t, st, clone, parentOf(t, st, clone))
	}
}

// TestSeparateBusy: a checkpoint that is replaced while it is looked at.
func TestSeparateBusy(t *testing.T) {
	t.Parallel()
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	h.mustFlatten()
	times := 3
	s, err := Separate(t.Context(), &beforeGet{st, func() {
		if times--; times >= 0 {
			h.mustWrite(3, 7)
			h.mustCheckpoint()
			h.run(time.Minute) // the one before goes
		}
	}}, clone)
	if err != nil || len(s.Needs) > 0 || times >= 0 {
		t.Errorf("separated: %+v, %v", s, err)
	}
}

// beforeGet is a store in which something happens before each read.
type beforeGet struct {
	backend.Store
	fn func()
}

func (s *beforeGet) Get(ctx context.Context, key string, b []byte, off int64) (int, error) {
	s.fn()
	return s.Store.Get(ctx, key, b, off)
}

// TestFlattenEnds: a flattening of which nothing can come says why.
func TestFlattenEnds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		before, after func(*host)
		want          string
	}{
		{"numbers used up", func(h *host) { h.im.sealed.object = lastWritten }, func(*host) {}, "used up"},
		{"evicted", func(*host) {}, func(h *host) { h.im.evict("beta") }, "beta has asked for the image"},
		{"closed", func(*host) {}, func(h *host) { h.mustClose() }, "detached"},
	} {
		st := mem.New()
		a, id := attached(t, st, smallImage(), nil)
		a.mustFill(1000)
		clone := mustClone(t, st, id, "", "clone", a)
		a.mustClose()
		h := mustOpen(t, st, clone, 7)
		test.before(h)
		err := errors.New("not ended")
		h.im.Flatten(nil, func(e error) { err = e })
		test.after(h)
		h.run(time.Minute)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

// TestFlattenVictimsDied: that all victims which a search has found have died by its end does not
// mean that there are no others.
func TestFlattenVictimsDied(t *testing.T) {
	t.Parallel()
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	err, c := errors.New("not ended"), &h.im.clean
	h.im.flatten = &flattener{im: h.im, counted: true, moving: true, total: 1, progress: func(uint64, uint64) {}, fn: func(e error) { err = e }}
	c.search = c.newSearch()
	c.search.list.offer(&objectInfo{number: maxObjectSeq, live: 1}, 1) // which is not there any more
	c.search.next = maxObjectSeq
	c.choose()
	h.run(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	mustSeparate(t, st, clone, id)
}

// TestFlattenSpace: what was held of the ancestors while an image was a clone, the dead data in
// their objects above all, does not count as held once it is none: the image keeps its space.
func TestFlattenSpace(t *testing.T) {
	t.Parallel()
	const blocks = 8000
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	for n := range uint64(blocks) {
		a.mustWrite(n, 1000+n)
	}
	clone := mustClone(t, st, id, "", "clone", a)
	a.mustClose()
	h := mustOpen(t, st, clone, 7)
	h.im.cfg.SpaceRatio = MinSpaceRatio
	for n := range uint64(blocks) {
		if n%8 != 0 {
			h.mustWrite(n, 2000+n)
		}
	}
	churn := func() {
		for k := range uint64(40) {
			for n := range uint64(400) {
				h.mustWrite(1+(n*7919+k*31)%(blocks/8)*8, k*1000+n)
			}
			h.mustDestage()
		}
		h.run(time.Minute)
	}
	churn()
	c, table := &h.im.clean, &h.im.table
	if c.heldSpace < 2*c.heldLive {
		t.Fatalf("of %d sectors held %d live: this tests nothing", c.heldSpace, c.heldLive)
	}
	h.mustFlatten()
	churn()
	h.mustCheckpoint()
	if most := table.live*105/100 + 3*cleanSlack*h.im.object; table.space > most {
		t.Errorf("the objects have %d sectors, of which %d live: want no more than %d", table.space, table.live, most)
	}
}

// swapLimit is a store of whoever dies after so many changes of superblocks.
type swapLimit struct {
	backend.Store
	left int
	stop func()
}

func (s *swapLimit) Swap(ctx context.Context, key string, v backend.Version, b []byte) (backend.Version, error) {
	if s.left == 0 {
		s.stop()
		return "", ctx.Err()
	}
	s.left--
	return s.Store.Swap(ctx, key, v, b)
}
