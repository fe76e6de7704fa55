package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// mustDiff returns in which ranges two states differ; block 3 alone is "3+1", and "-" stands
// before what is zeroes.
func mustDiff(t *testing.T, from, to *View) string {
	t.Helper()
	var list []string
	last := Range{}
	err := Diff(t.Context(), from, to, func(r Range) error {
		if r.Length == 0 || r.Offset < last.Offset+last.Length || last.Length > 0 && r.Offset == last.Offset+last.Length && r.Zero == last.Zero || r.Offset+r.Length > to.Size() {
			t.Errorf("%+v after %+v", r, last)
		}
		last = r
		sign := ""
		if r.Zero {
			sign = "-"
		}
		list = append(list, fmt.Sprintf("%s%d+%d", sign, r.Offset/objectBlock, r.Length/objectBlock))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

// mustDiscard discards blocks.
func (h *host) mustDiscard(block, n uint64) {
	h.t.Helper()
	for k := range n {
		if err, ended, _ := h.do(Discard, block+k, 0, 0); err != 0 || !ended {
			h.t.Fatalf("discard: %v, ended %v", err, ended)
		}
	}
}

// TestDiff: what has changed is told exactly, and joined across segments of the map, between
// states in either direction, on any branch, and whether a checkpoint has it or not.
func TestDiff(t *testing.T) {
	const edge = 16384 // the first block of the second segment
	for _, checkpoints := range []bool{false, true} {
		st := mem.New()
		h, id := attached(t, st, CreateOptions{Size: 200 << 20, ObjectSize: MinObjectSize}, nil)
		state := map[string]*View{"": nil}
		value := uint64(0)
		write := func(first, n uint64) {
			for k := range n {
				value++
				h.mustWrite(first+k, value)
			}
		}
		take := func(name string) {
			t.Helper()
			s := mustSnap(t, st, id, name, h)
			state[name] = mustView(t, st, id, s.ID)
			if checkpoints {
				h.mustCheckpoint()
			}
		}
		take("empty")
		write(0, 10)
		write(edge-5, 10)
		take("a")
		write(3, 2)
		h.mustDiscard(edge-2, 4)
		write(100, 1)
		h.mustDiscard(200, 10) // there was nothing
		take("b")
		write(3, 1)
		write(edge-2, 4)
		h.mustDiscard(100, 1)
		take("c")
		h.mustClose()
		if err := Rollback(t.Context(), st, id, "a", RollbackOptions{}); err != nil {
			t.Fatal(err)
		}
		h.mustAttach(id)
		write(9, 2)
		take("d") // on another branch than b and c
		state["now"] = mustView(t, st, id, uuid.Nil)
		for _, x := range []struct{ from, to, want string }{
			{"", "empty", ""},
			{"", "a", "0+10 16379+10"},
			{"empty", "a", "0+10 16379+10"},
			{"a", "empty", "-0+10 -16379+10"},
			{"a", "a", ""},
			{"a", "b", "3+2 100+1 -16382+4"},
			{"b", "a", "3+2 -100+1 16382+4"},
			{"a", "c", "3+2 16382+4"},
			{"b", "c", "3+1 -100+1 16382+4"},
			{"a", "d", "9+2"},
			{"b", "d", "3+2 9+2 -100+1 16382+4"},
			{"d", "b", "3+2 9+1 -10+1 100+1 -16382+4"},
			{"d", "now", ""},
			{"", "b", "0+10 100+1 16379+3 16386+3"},
		} {
			if got := mustDiff(t, state[x.from], state[x.to]); got != x.want {
				t.Errorf("checkpoints %v: from %q to %q: %s, want %s", checkpoints, x.from, x.to, got, x.want)
			}
		}
	}
}

// TestDiffOfSizes: up to the end of the second state, and beyond the end of the first there is
// nothing in that, also where the two end inside a segment.
func TestDiffOfSizes(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	h, id := attached(t, st, CreateOptions{Size: 70 << 20, ObjectSize: MinObjectSize}, nil)
	const oldEnd, newEnd = 70 << 20 / objectBlock, 300 << 20 / objectBlock
	h.mustWrite(1, 1)
	h.mustWrite(oldEnd-2, 2)
	h.mustWrite(oldEnd-1, 3)
	h.mustCheckpoint()
	h.mustClose()
	small := mustView(t, st, id, mustSnap(t, st, id, "small", nil).ID)
	if _, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error { sb.Sectors = newEnd * blockSectors; return nil }); err != nil {
		t.Fatal(err)
	}
	grown := mustView(t, st, id, mustSnap(t, st, id, "grown", nil).ID)
	h.mustAttach(id)
	h.mustWrite(oldEnd-1, 4)
	h.mustWrite(oldEnd, 5)
	h.mustWrite(newEnd-1, 6)
	h.mustClose()
	now := mustView(t, st, id, uuid.Nil)
	if small.Size() != 70<<20 || grown.Size() != 300<<20 || now.Size() != 300<<20 {
		t.Fatalf("sizes %d, %d, %d", small.Size(), grown.Size(), now.Size())
	}
	for _, x := range []struct {
		from, to *View
		want     string
	}{
		{small, grown, ""},
		{small, now, "17919+2 76799+1"},
		{grown, now, "17919+2 76799+1"},
		{now, small, "17919+1"},
		{now, grown, "17919+1 -17920+1 -76799+1"},
		{nil, small, "1+1 17918+2"},
	} {
		if got := mustDiff(t, x.from, x.to); got != x.want {
			t.Errorf("%s, want %s", got, x.want)
		}
	}
}

// TestDiffBeyondTheEnd: what the map of the first state has beyond its end does not count.
func TestDiffBeyondTheEnd(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustCheckpoint()
	h.mustClose()
	cut, whole := mustView(t, st, id, uuid.Nil), mustView(t, st, id, uuid.Nil)
	mustReadView(t, cut, 0, 1000) // what is read later is checked
	cut.im.sectors = 10 * blockSectors
	if got, want := mustDiff(t, cut, whole), "10+54"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := mustDiff(t, whole, cut); got != "" {
		t.Errorf("%s, want nothing", got)
	}
}

// countedGets counts reads of a store.
type countedGets struct {
	backend.Store
	maps, data atomic.Int64
}

func (s *countedGets) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	switch {
	case strings.Contains(key, "/m/"):
		s.maps.Add(1)
	case strings.Contains(key, "/d/"):
		s.data.Add(1)
	}
	return s.Store.Get(ctx, key, p, off)
}

// TestDiffCostsWhatChanged: of two states that are near to each other only those segments of
// the map are read in which they differ, and no data.
func TestDiffCostsWhatChanged(t *testing.T) {
	const segments, changed = 500, 3
	inner := mem.New()
	h, id := attached(t, inner, CreateOptions{Size: segments * 64 << 20, ObjectSize: MinObjectSize}, nil)
	for i := range uint64(segments) {
		h.mustWrite(i*16384, i+1)
	}
	h.mustCheckpoint()
	snap := func(name string) uuid.UUID { return mustSnap(t, inner, id, name, h).ID }
	a := snap("a")
	h.mustCheckpoint()
	for i := range uint64(changed) {
		h.mustWrite(i*100*16384+7, 1000)
	}
	b := snap("b") // with the checkpoint that a has
	h.mustCheckpoint()
	c := snap("c") // with another
	for _, x := range []struct {
		from, to uuid.UUID
		want     string
		maps     int64 // reads of the map at most: what is stored of a segment, in each state
	}{
		{from: a, to: a},
		{from: a, to: b, want: "7+1 1638407+1 3276807+1", maps: 2 * changed},
		{from: a, to: c, want: "7+1 1638407+1 3276807+1", maps: 2 * changed},
		{from: b, to: c, maps: 2 * changed}, // that they are the same shows when they are read
		{from: c, to: a, want: "-7+1 -1638407+1 -3276807+1", maps: 2 * changed},
	} {
		st := &countedGets{Store: inner}
		from, to := mustView(t, st, id, x.from), mustView(t, st, id, x.to)
		st.data.Store(0) // headers of the objects after the checkpoint
		if got := mustDiff(t, from, to); got != x.want {
			t.Errorf("%s, want %s", got, x.want)
		}
		if n := st.maps.Load(); n > x.maps || n == 0 && x.want != "" {
			t.Errorf("%s: %d reads of the map, want %d at most", x.want, n, x.maps)
		}
		if n := st.data.Load(); n > 0 {
			t.Errorf("%d reads of data", n)
		}
	}
	h.mustClose()
}

// TestDiffOfTwoImages: states of different images are not compared.
func TestDiffOfTwoImages(t *testing.T) {
	st := mem.New()
	a := newImageIn(t, st)
	b, err := Create(t.Context(), st, "other", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	if err := Diff(t.Context(), mustView(t, st, a, uuid.Nil), mustView(t, st, b, uuid.Nil), nil); err == nil {
		t.Error("they were compared")
	}
}

// TestDiffDataEnds: an error of the store, or of who gets the data, ends all of it.
func TestDiffDataEnds(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	for n := range uint64(4 * PieceSize / objectBlock) {
		h.mustWrite(n, n+1)
	}
	h.mustDestage()
	h.mustClose()
	v := mustView(t, st, id, uuid.Nil)
	bad, calls := errors.New("the disk is full"), 0
	err := DiffData(t.Context(), nil, v, func(r Range, data []byte) error {
		if len(data) > PieceSize || uint64(len(data)) != r.Length {
			t.Errorf("%+v with %d bytes", r, len(data))
		}
		if calls++; calls == 2 {
			return bad
		}
		return nil
	})
	if err != bad || calls != 2 {
		t.Errorf("%v after %d calls", err, calls)
	}
	ctx, stop := context.WithCancel(t.Context())
	err = DiffData(ctx, nil, v, func(Range, []byte) error { stop(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("told to stop: %v", err)
	}
}

// branches is an image of several segments with states on several branches, for
// TestDiffRandom: what each block of each state has.
type branches struct {
	*host
	t      *testing.T
	rng    *rand.Rand
	id     uuid.UUID
	now    map[uint64]uint64 // what is in a block, by block
	value  uint64
	states map[string]map[uint64]uint64 // of snapshots, by name
	ids    map[string]uuid.UUID
	moved  uint64 // bytes, by the cleaner
}

// blockAt returns one of the blocks that are written: they lie around the ends of segments.
func (b *branches) blockAt() uint64 { return 16384*(1+b.rng.Uint64N(3)) - 150 + b.rng.Uint64N(300) }

func (b *branches) step() {
	switch k := b.rng.IntN(20); {
	case k < 9:
		first := b.blockAt()
		for n := first; n < first+1+b.rng.Uint64N(60); n++ {
			b.value++
			b.mustWrite(n, b.value)
			b.now[n] = b.value
		}
	case k < 11:
		first := b.blockAt()
		n := 1 + b.rng.Uint64N(60)
		b.mustDiscard(first, n)
		for k := range n {
			delete(b.now, first+k)
		}
	case k < 14:
		b.mustDestage()
	case k < 15:
		b.mustCheckpoint()
	case k < 16:
		for range 80 { // as many objects, which the cleaner puts together
			n := b.blockAt()
			b.value++
			b.mustWrite(n, b.value)
			b.now[n] = b.value
			b.mustDestage()
		}
		b.run(3 * leftoverGrace)
	case k < 18 && len(b.states) < 8:
		name := fmt.Sprint("s", b.value)
		if b.states[name] == nil {
			b.ids[name] = mustSnap(b.t, b.st, b.id, name, b.host).ID
			b.states[name] = maps.Clone(b.now)
		}
	case k < 19 && len(b.states) > 0:
		b.reopen(b.some())
	default:
		b.reopen("")
	}
}

// some returns the name of a snapshot.
func (b *branches) some() string {
	return slices.Sorted(maps.Keys(b.states))[b.rng.IntN(len(b.states))]
}

// reopen closes the image, rolls it back if a snapshot is given, and opens it again.
func (b *branches) reopen(to string) {
	b.moved += b.im.clean.moved
	b.mustClose()
	if to != "" {
		if err := Rollback(b.t.Context(), b.st, b.id, to, RollbackOptions{}); err != nil {
			b.t.Fatal(err)
		}
		b.now = maps.Clone(b.states[to])
	}
	b.mustAttach(b.id)
	b.settings()
}

// settings has the cleaner move what it can, and segments stored with deltas, small as they
// are.
func (b *branches) settings() { b.im.cfg.SpaceRatio, b.im.objs.deltaFrom = MinSpaceRatio, 0 }

// compare compares two states, and returns how many blocks were told to have changed that
// have not.
func (b *branches) compare(from, to *View, was, is map[uint64]uint64) (more int) {
	b.t.Helper()
	got, told := maps.Clone(was), 0
	if got == nil {
		got = map[uint64]uint64{}
	}
	err := DiffData(b.t.Context(), from, to, func(r Range, data []byte) error {
		told += int(r.Length / objectBlock)
		for k := r.Offset / objectBlock; k < (r.Offset+r.Length)/objectBlock; k++ {
			if was[k] == is[k] {
				more++
			}
			if delete(got, k); !r.Zero {
				n, err := stamp(data[:objectBlock], k*blockSectors)
				if err != nil || n == 0 {
					return fmt.Errorf("block %d: %d, %w", k, n, err)
				}
				got[k], data = n, data[objectBlock:]
			}
		}
		return nil
	})
	if err != nil || !maps.Equal(got, is) {
		b.t.Fatalf("what has changed, on top of the first state, is not the second: %v", err)
	}
	return more
}

// TestDiffRandom: what is told to have changed between any two states, on top of the first,
// gives the second; and it is not more, unless the cleaner has been at work.
func TestDiffRandom(t *testing.T) {
	racetest.Slow(t)
	seeds := 20
	if testing.Short() {
		seeds = 5
	}
	moved, more, pairs := uint64(0), 0, 0
	for seed := range uint64(seeds) {
		st := mem.New()
		h, id := attached(t, st, CreateOptions{Size: 300 << 20, ObjectSize: MinObjectSize}, nil)
		b := &branches{host: h, t: t, rng: rand.New(rand.NewPCG(seed, 9)), id: id, now: map[uint64]uint64{},
			states: map[string]map[uint64]uint64{}, ids: map[string]uuid.UUID{}}
		b.settings()
		for range 100 + b.rng.IntN(100) {
			b.step()
		}
		b.mustDestage()
		b.moved += b.im.clean.moved
		views := map[string]*View{"": nil, "now": mustView(t, st, id, uuid.Nil)}
		b.states["now"], b.states[""] = b.now, nil
		for name, id := range b.ids {
			views[name] = mustView(t, st, b.id, id)
		}
		again := 0
		for from, a := range views {
			for to, z := range views {
				if z != nil {
					again += b.compare(a, z, b.states[from], b.states[to])
					pairs++
				}
			}
		}
		if again > 0 && b.moved == 0 {
			t.Errorf("seed %d: %d blocks have not changed, and no cleaner was at work", seed, again)
		}
		moved, more = moved+b.moved, more+again
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if moved == 0 {
		t.Error("the cleaner has moved nothing: this tests too little")
	}
	t.Logf("%d pairs; the cleaner has moved %d blocks, for which %d were told to have changed", pairs, moved/objectBlock, more)
}
