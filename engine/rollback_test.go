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
	"github.com/lsd-ceph/lsd/backend/mem"
)

// mustRollBack rolls the image back, which nobody has open, and opens it on h.
func (h *host) mustRollBack(id uuid.UUID, name string) {
	h.t.Helper()
	if err := Rollback(context.Background(), h.st, id, name, RollbackOptions{URL: "mem:/disk"}); err != nil {
		h.t.Fatal(err)
	}
	h.again()
	if err := h.open(id, false); err != nil {
		h.t.Fatal(err)
	}
}

// TestRollback: the image becomes what it was, and goes on from there; snapshots stay, later
// ones too; what nobody needs goes.
func TestRollback(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	var made []Snapshot
	write := func(from uint64) {
		t.Helper()
		for range 12 { // there are checkpoints in between
			h.mustFill(from)
			h.mustDestage()
		}
	}
	for i, name := range []string{"a", "b", "c"} {
		write(1000 * uint64(i+1))
		made = append(made, mustSnapshot(t, st, id, name, h))
	}
	write(9000)
	var owned *OwnedError
	if err := Rollback(ctx, st, id, "b", RollbackOptions{URL: "mem:/disk"}); !errors.As(err, &owned) {
		t.Errorf("an image that is attached is rolled back: %v", err)
	}
	h.mustClose()
	if err := Rollback(ctx, st, id, "d", RollbackOptions{}); !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("to no snapshot: %v", err)
	}
	show := func() {
		t.Helper()
		for i, s := range made {
			if s.ID != uuid.Nil {
				mustShow(t, st, id, s, 1000*uint64(i+1))
			}
		}
	}
	last := uint64(0)
	for i, to := range []int{1, 2, 0, 0, 2, 1} {
		h.mustRollBack(id, made[to].Name)
		h.mustHave(1000 * uint64(to+1))
		if h.im.accepted.object <= last {
			t.Fatalf("it goes on after object %d, there has been object %d", h.im.accepted.object, last)
		}
		show()
		if i%2 == 0 {
			write(10000 * uint64(i+1))
			h.mustHave(10000 * uint64(i+1))
		}
		last = h.im.accepted.object
		h.run(3 * leftoverGrace)
		if n := len(h.im.super.sb.Forgotten); n > 0 {
			t.Errorf("%d states are not forgotten", n)
		}
		h.mustClose()
		show()
		mustBeClean(t, st)
	}
	for _, k := range []int{1, 0, 2} {
		if err := RemoveSnapshot(ctx, st, id, made[k].Name); err != nil {
			t.Fatal(err)
		}
		made[k].ID = uuid.Nil
		show()
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustHave(2000)
	write(70000)
	h.run(3 * leftoverGrace)
	if data := objectsOf(t, st, id, "d"); data > 12 {
		t.Errorf("%d data objects are left of what nobody needs", data)
	}
	if n := len(h.im.super.sb.Rollbacks); n > 0 {
		t.Errorf("%d rollbacks are remembered that nobody needs", n)
	}
	h.mustClose()
	mustBeClean(t, st)
}

// TestRollbackToNow: an answer that is lost does not roll back twice, and to the state that
// the image has there is nothing lost.
func TestRollbackToNow(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	mustSnapshot(t, st, id, "now", h)
	h.mustClose()
	for range 3 {
		h.mustRollBack(id, "now")
		h.mustHave(1000)
		h.mustClose()
		mustBeClean(t, st)
	}
	mustSnapshot(t, st, id, "again", nil) // right after a rollback
	h.mustRollBack(id, "again")
	h.mustHave(1000)
}

// TestRollbackEndsOwnerships: what an owner that gave the image up, with objects under way,
// puts after a rollback is not the image's, and goes.
func TestRollbackEndsOwnerships(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	mustSnapshot(t, st, id, "monday", h)
	h.mustFill(2000)
	h.mustDestage()
	end := h.im.accepted
	h.mustClose()
	sb, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error { sb.Loose = true; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := Rollback(ctx, st, id, "monday", RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	late := objectHeader{image: id, epoch: sb.Epoch, seq: end.object + 1, firstSeq: end.seq + 1, lastSeq: end.seq + 1, data: 4096, extents: []objectExtentInfo{{sector: 8, n: 8}}}
	late.pack()
	b := make([]byte, late.header+late.data)
	fill(b[late.header:], 666, 8)
	late.encode(b)
	if err := st.Put(ctx, dataKey(id, late.seq, late.epoch), b); err != nil {
		t.Fatal(err)
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustHave(1000)
	h.run(3 * leftoverGrace)
	h.mustClose()
	if _, err := st.Stat(ctx, dataKey(id, late.seq, late.epoch)); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("what came late is there: %v", err)
	}
	mustBeClean(t, st)
}

// TestForgettingWaits: while what a state was made of cannot be told, or be removed, it is not
// forgotten.
func TestForgettingWaits(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	mustSnapshot(t, st, id, "monday", h)
	for range 20 {
		h.mustFill(2000)
		h.mustDestage()
	}
	h.mustClose()
	if err := Rollback(ctx, st, id, "monday", RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		t.Fatal(err)
	}
	key := manifestKey(id, *sb.Forgotten[0].Checkpoint, 0)
	whole, err := readWhole(ctx, st, key)
	if err != nil {
		t.Fatal(err)
	}
	whole = slices.Clone(whole)
	if err := damage(ctx, st, key, func(b []byte) int { b[100] ^= 1; return len(b) }); err != nil {
		t.Fatal(err)
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.run(time.Minute)
	h.mustHave(1000)
	if len(h.im.super.sb.Forgotten) != 1 {
		t.Fatal("a state is forgotten of which it is not known what it was made of")
	}
	if err := replaceObject(ctx, st, key, whole); err != nil {
		t.Fatal(err)
	}
	h.run(3 * leftoverGrace)
	if len(h.im.super.sb.Forgotten) > 0 {
		t.Error("it is not forgotten when that is known again")
	}
	h.mustClose()
	mustBeClean(t, st)
}

// TestPath: which objects a state is made of.
func TestPath(t *testing.T) {
	sb := &superblock{Rollbacks: []rollback{{Object: 101, From: 50}, {Object: 151, From: 70}, {Object: 160, From: 155}}}
	for _, tt := range []struct {
		last uint64
		want path
	}{
		{40, path{{0, 40}}},
		{70, path{{0, 70}}},
		{101, path{{0, 50}, {101, 101}}},
		{120, path{{0, 50}, {101, 120}}},
		{156, path{{0, 70}, {151, 156}}},
		{maxObjectSeq, path{{0, 70}, {151, 155}, {160, maxObjectSeq}}},
	} {
		if got := sb.pathTo(tt.last); !slices.Equal(got, tt.want) {
			t.Errorf("path to %d is %v, want %v", tt.last, got, tt.want)
		}
	}
	head := sb.pathTo(maxObjectSeq)
	for last, want := range map[uint64]uint64{40: 40, 70: 70, 90: 70, 120: 50, 155: 155, 157: 155, 160: 160, 170: 170} {
		if got := head.common(sb.pathTo(last)); got != want {
			t.Errorf("the path to %d has %d in common with that to the end, want %d", last, got, want)
		}
		if got := sb.pathTo(last).common(head); got != want {
			t.Errorf("the other way round it is %d, want %d", got, want)
		}
	}
	if got, want := sb.pathTo(156).after(60), []run64{{60, 70}, {151, 156}}; !slices.Equal(got, want) {
		t.Errorf("after 60: %v, want %v", got, want)
	}
}

// TestPruneRollbacks: to forget rollbacks changes nothing of what states are replayed from,
// nor where their paths part.
func TestPruneRollbacks(t *testing.T) {
	pruned := 0
	for seed := range uint64(20000) {
		rng := rand.New(rand.NewPCG(seed, 9))
		sb := randomTree(rng)
		if !sb.validPaths() {
			t.Fatalf("seed %d: the tree makes no sense: %+v", seed, sb)
		}
		after := sb.clone()
		after.pruneRollbacks()
		pruned += len(sb.Rollbacks) - len(after.Rollbacks)
		if !after.validPaths() {
			t.Fatalf("seed %d: %+v is pruned to %v", seed, sb, after.Rollbacks)
		}
		states := []point{{Object: maxObjectSeq, Checkpoint: sb.Checkpoint}}
		for p := range sb.states() {
			states = append(states, *p)
		}
		head, headAfter := sb.pathTo(maxObjectSeq), after.pathTo(maxObjectSeq)
		for _, p := range states {
			x, y := sb.pathTo(p.Object), after.pathTo(p.Object)
			if !slices.Equal(x.after(p.base()), y.after(p.base())) {
				t.Fatalf("seed %d: %+v, pruned to %v: %d is replayed from other objects", seed, sb, after.Rollbacks, p.Object)
			}
			for _, q := range states {
				if a, b := x.common(sb.pathTo(q.Object)), y.common(after.pathTo(q.Object)); head.has(p.Object) != headAfter.has(p.Object) || a != b {
					t.Fatalf("seed %d: %+v, pruned to %v: the paths to %d and %d part at %d, and at %d", seed, sb, after.Rollbacks, p.Object, q.Object, a, b)
				}
			}
		}
	}
	if pruned < 100 {
		t.Errorf("%d rollbacks are pruned: this tests nothing", pruned)
	}
}

// randomTree returns a superblock with rollbacks and snapshots, as a history makes them in
// which rollbacks are forgotten now and then.
func randomTree(rng *rand.Rand) *superblock {
	sb := &superblock{Epoch: 1}
	end := uint64(0)
	for range rng.IntN(40) {
		switch k := rng.IntN(7); {
		case k < 2 || end == 0:
			end += 1 + rng.Uint64N(4)
			if rng.IntN(2) == 0 {
				sb.Checkpoint = &checkpointRef{Object: end}
			}
			if rng.IntN(2) == 0 {
				sb.pruneRollbacks()
			}
		case k < 4:
			sb.Snapshots = append(sb.Snapshots, snapshot{ID: uuid.New(), point: point{Object: end, Settled: true, Checkpoint: sb.Checkpoint}})
		case len(sb.Snapshots) == 0:
		case k == 4:
			p := sb.Snapshots[rng.IntN(len(sb.Snapshots))]
			end++
			sb.Rollbacks = append(sb.Rollbacks, rollback{Object: end, From: p.Object})
			sb.Checkpoint = p.Checkpoint
		default:
			i := rng.IntN(len(sb.Snapshots))
			sb.Snapshots = slices.Delete(sb.Snapshots, i, i+1)
		}
	}
	return sb
}

// TestBadRollbacks: a superblock whose rollbacks make no sense is refused.
func TestBadRollbacks(t *testing.T) {
	for what, change := range map[string]func(*superblock){
		"goes forward": func(sb *superblock) { sb.Rollbacks = []rollback{{Object: 5, From: 5}} },
		"out of order": func(sb *superblock) { sb.Rollbacks = []rollback{{Object: 9, From: 2}, {Object: 8, From: 1}} },
		"beyond all":   func(sb *superblock) { sb.Rollbacks = []rollback{{Object: maxObjectSeq + 1, From: 2}} },
		"skips a base": func(sb *superblock) {
			sb.Rollbacks, sb.Checkpoint = []rollback{{Object: 9, From: 2}}, &checkpointRef{Object: 5}
		},
		"a forgotten state": func(sb *superblock) { sb.Forgotten = []point{{Object: 3, Checkpoint: &checkpointRef{Object: 5}}} },
		"a snapshot twice": func(sb *superblock) {
			s := snapshot{ID: uuid.New(), Name: "a", Sectors: 8, point: point{Settled: true}}
			sb.Snapshots = []snapshot{s, s}
		},
		"a snapshot without a name": func(sb *superblock) { sb.Snapshots = []snapshot{{ID: uuid.New(), Sectors: 8}} },
	} {
		st := mem.New()
		id := newImageIn(t, st)
		sb, _, err := loadSuperblock(context.Background(), st, id)
		if err != nil {
			t.Fatal(err)
		}
		change(sb)
		if _, err := decodeSuperblock(sb.encode(), id); err == nil || !strings.Contains(err.Error(), "out of range") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
