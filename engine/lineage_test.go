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

// TestPrunedRollbackOnAPath: a rollback is remembered as long as a later one has gone back to
// what was written after it, for a state on the way there would not be on the path any more.
func TestPrunedRollbackOnAPath(t *testing.T) {
	at := func(object uint64) snapshot {
		return snapshot{point: point{Object: object, Settled: true, Checkpoint: &checkpointRef{object, 1}}}
	}
	sb := &superblock{
		Checkpoint: &checkpointRef{21, 1},
		Rollbacks:  []rollback{{Object: 15, From: 4}, {Object: 16, From: 5}, {Object: 19, From: 15}},
		Snapshots:  []snapshot{at(5), at(17)},
	}
	after := sb.clone()
	after.pruneRollbacks()
	for _, last := range []uint64{17, maxObjectSeq} {
		if was, is := sb.pathTo(last), after.pathTo(last); was.has(5) != is.has(5) {
			t.Errorf("pruned from %v to %v, the path to %d was %v and is %v", sb.Rollbacks, after.Rollbacks, last, was, is)
		}
	}
}

// TestSharedMapObjects: a state that is forgotten leaves a snapshot the map objects that only
// the two of them know of, because the image has gone back to an older checkpoint.
func TestSharedMapObjects(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustCheckpoint()
	h.mustWrite(0, 1500)
	h.mustDestage()
	mustSnapshot(t, st, id, "older", h) // goes back to the checkpoint before
	h.mustClose()                       // which makes one of the same state
	mustSnapshot(t, st, id, "newer", nil)
	h.mustAttach(id)
	h.mustFill(2000)
	h.mustDestage()
	mustSnapshot(t, st, id, "forgotten", h)
	h.mustClose()
	h.mustRollBack(id, "newer")
	h.mustWrite(1, 3000)
	h.mustDestage()
	kept := mustSnapshot(t, st, id, "kept", h)
	h.run(3 * leftoverGrace)
	h.mustClose()
	mustDropSnapshot(t, st, id, "newer")
	h.mustRollBack(id, "older")
	h.run(3 * leftoverGrace)
	mustDropSnapshot(t, st, id, "forgotten")
	h.run(3 * leftoverGrace)
	r, err := openSnapshot(t, st, id, kept.ID)
	if err != nil {
		t.Fatal(err)
	}
	r.mustRead(0, 1500)
	r.mustRead(1, 3000)
	r.mustRead(2, 1002)
	h.mustClose()
	mustBeClean(t, st)
}

// rolledBack is an image that was rolled back to its first snapshot, monday. What is to be
// forgotten has a checkpoint of its own, and objects after that.
func rolledBack(t *testing.T, st backend.Store) (h *host, id uuid.UUID) {
	t.Helper()
	h, id = attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	mustSnapshot(t, st, id, "monday", h)
	for range 20 {
		h.mustFill(2000)
		h.mustDestage()
	}
	h.mustClose()
	if err := Rollback(context.Background(), st, id, "monday", RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	return h, id
}

// TestForgettingPauses: what cannot be forgotten is tried again less and less often, not as
// often as anything changes.
func TestForgettingPauses(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := rolledBack(t, st)
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		t.Fatal(err)
	}
	if err := damage(ctx, st, manifestKey(id, *sb.Forgotten[0].Checkpoint, 0), func(b []byte) int { b[100] ^= 1; return len(b) }); err != nil {
		t.Fatal(err)
	}
	h.mustAttach(id)
	h.run(5 * time.Minute)
	first := h.im.stats.storeErrors
	if first > 50 {
		t.Fatalf("%d tries in the first minutes", first)
	}
	h.run(time.Hour)
	if n := h.im.stats.storeErrors - first; n < 1 || n > uint64(time.Hour/leftoverGrace)+1 {
		t.Errorf("%d tries in the first minutes, %d in the hour after that", first, n)
	}
}

// TestRepairLeavesTheForgotten: a repair leaves what tells of a state that is to be forgotten
// what it was made of, so that the next owner can forget it.
func TestRepairLeavesTheForgotten(t *testing.T) {
	st := mem.New()
	h, id := rolledBack(t, st)
	rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{Repair: true})
	if err != nil || !rep.Clean() {
		t.Errorf("repair: %v, %+v", err, rep)
	}
	h.mustAttach(id)
	h.run(3 * leftoverGrace)
	if n := len(h.im.super.sb.Forgotten); n > 0 || h.im.stats.storeErrors > 0 {
		t.Errorf("%d states are not forgotten: %v", n, h.im.stats.lastStoreErr)
	}
	h.mustHave(1000)
	h.mustClose()
	mustBeClean(t, st)
}

// TestExchangedCheckpoint: when a repair puts another checkpoint in the place of one, so it
// does for states that are to be forgotten and go back to that one, which goes then.
func TestExchangedCheckpoint(t *testing.T) {
	old, ref := checkpointRef{10, 1}, checkpointRef{10, 3}
	sb := &superblock{
		Epoch: 3, Checkpoint: &old, Rollbacks: []rollback{{Object: 30, From: 12}},
		Snapshots: []snapshot{{point: point{Object: 12, Settled: true, Checkpoint: &old}}},
		Forgotten: []point{{Object: 20, Settled: true, Checkpoint: &old}},
	}
	sb.exchangeCheckpoint(ref)
	for what, c := range map[string]*checkpointRef{"image": sb.Checkpoint, "snapshot": sb.Snapshots[0].Checkpoint, "forgotten state": sb.Forgotten[0].Checkpoint} {
		if !sameRef(c, &ref) {
			t.Errorf("the %s goes back to %v", what, *c)
		}
	}
	if sb.heldManifest(old) || !slices.Contains(sb.Prev, old) {
		t.Errorf("what was exchanged stays: %+v", sb)
	}
}

// TestGapBeforeRollback: an object that is missing before a rollback is not the end of the
// image: nothing goes on after it, or makes a snapshot of what is before it.
func TestGapBeforeRollback(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	for i := range uint64(3) {
		if h.mustFill(1000 * i); i == 2 {
			mustSnapshot(t, st, id, "monday", h)
			h.mustFill(3000)
		}
		h.mustDestage()
	}
	h.mustClose()
	if err := Rollback(ctx, st, id, "monday", RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	before, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		t.Fatal(err)
	}
	key := dataKey(id, before.Rollbacks[0].From, before.epochOf(before.Rollbacks[0].From))
	if err := st.Delete(ctx, key); err != nil {
		t.Fatal(err)
	}
	h.again()
	_, ofSnapshot := CreateSnapshot(ctx, st, id, "tuesday", SnapshotOptions{})
	for what, err := range map[string]error{
		"open":     h.open(id, false),
		"snapshot": ofSnapshot,
		"rollback": Rollback(ctx, st, id, "monday", RollbackOptions{}),
	} {
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", what, err)
		}
	}
	after, _, err := loadSuperblock(ctx, st, id)
	if err != nil || len(after.Rollbacks) != 1 || len(after.Snapshots) != 1 || after.Rollbacks[0] != before.Rollbacks[0] {
		t.Errorf("%+v, %v", after, err)
	}
}

// lostAnswer is a store of which the answer to one swap is lost; meanwhile is what others do
// until that is repeated.
type lostAnswer struct {
	backend.Store
	meanwhile func()
}

func (s *lostAnswer) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	v, err := s.Store.Swap(ctx, key, old, b)
	meanwhile := s.meanwhile
	if err != nil || meanwhile == nil {
		return v, err
	}
	s.meanwhile = nil
	meanwhile()
	return "", &backend.Error{Op: "swap", Key: key, Class: backend.ErrTemporary, Cause: errors.New("the answer is lost")}
}

// TestLostAnswerOfRollback: what is written after a rollback of which the answer was lost is
// not rolled back, nor what somebody else has rolled the image back to.
func TestLostAnswerOfRollback(t *testing.T) {
	for _, another := range []bool{false, true} {
		t.Run(fmt.Sprint(another), func(t *testing.T) {
			st := mem.New()
			h, id := attached(t, st, smallImage(), nil)
			h.mustFill(1000)
			mustSnapshot(t, st, id, "monday", h)
			h.mustFill(2000)
			mustSnapshot(t, st, id, "tuesday", h)
			h.mustClose()
			l := &lostAnswer{st, func() {
				h.mustAttach(id)
				h.run(5 * time.Minute)
				h.mustFill(3000)
				h.mustClose()
				if another {
					h.mustRollBack(id, "tuesday")
					h.mustFill(4000)
					h.mustClose()
				}
			}}
			err := Rollback(context.Background(), l, id, "monday", RollbackOptions{})
			if another != (err != nil) || l.meanwhile != nil {
				t.Errorf("%v", err)
			}
			h.mustAttach(id)
			want := uint64(3000)
			if another {
				want = 4000
			}
			h.mustHave(want)
		})
	}
}

// TestLostAnswerOfSnapshotChange: a change of a snapshot of which the answer was lost is not
// made to another snapshot that has got its name since.
func TestLostAnswerOfSnapshotChange(t *testing.T) {
	ctx := context.Background()
	for what, change := range map[string]func(backend.Store, uuid.UUID) error{
		"remove": func(st backend.Store, id uuid.UUID) error { return RemoveSnapshot(ctx, st, id, "daily") },
		"rename": func(st backend.Store, id uuid.UUID) error { return RenameSnapshot(ctx, st, id, "daily", "old") },
	} {
		st := mem.New()
		id := newImageIn(t, st)
		mustSnapshot(t, st, id, "daily", nil)
		var made Snapshot
		if err := change(&lostAnswer{st, func() { made = mustSnapshot(t, st, id, "daily", nil) }}, id); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		list, err := Snapshots(ctx, st, id)
		if err != nil || !slices.Contains(list, made) {
			t.Errorf("%s: %v, and of %+v there is %+v", what, err, made, list)
		}
	}
}

// TestPendingSnapshotInFullStore: where there is room for a few objects only, what died before
// a snapshot was asked for is removed also while that is not taken, so that it is.
func TestPendingSnapshotInFullStore(t *testing.T) {
	room := 100
	inner := mem.New()
	var id uuid.UUID
	st := faultstore.New(inner, func(op faultstore.Op) faultstore.Fault {
		if op.Method == faultstore.Put && strings.Contains(op.Key, "/d/") && objectsOf(t, inner, id, "d") >= room {
			return faultstore.Fault{Before: &backend.Error{Op: "put", Key: op.Key, Class: backend.ErrTemporary, Cause: errors.New("it is full")}}
		}
		return faultstore.Fault{}
	})
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustDestage()
	room = 0
	for i := range uint64(60) {
		h.mustFill(1000 * i)
	}
	h.run(time.Minute)
	askFor(t, inner, id, "monday")
	room = 10
	h.run(time.Hour)
	list, err := Snapshots(context.Background(), inner, id)
	if err != nil || len(list) != 1 || list[0].Pending || h.im.accepted.object != h.im.sealed.object {
		t.Errorf("%+v, %v; %d of %d objects are in the store", list, err, h.im.accepted.object, h.im.sealed.object)
	}
}

// TestSnapshotOfDamaged: a snapshot of an image that nobody has, and whose end cannot be
// found, fails at once and says why, and is not there then.
func TestSnapshotOfDamaged(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustDestage()
	sb, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error { sb.Owner = nil; return nil })
	if err != nil {
		t.Fatal(err)
	}
	key := dataKey(id, h.im.accepted.object, sb.Epoch)
	if err := damage(ctx, st, key, func(b []byte) int { b[100] ^= 1; return len(b) }); err != nil {
		t.Fatal(err)
	}
	_, err = CreateSnapshot(ctx, st, id, "monday", SnapshotOptions{Clock: &impatient{h, 0}})
	if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), key) {
		t.Errorf("%v", err)
	}
	if list, err := Snapshots(ctx, st, id); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestCloneOfEmpty: an image of which nothing has been written is cloned like any other, and
// may be removed before its clones.
func TestCloneOfEmpty(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	clone := mustClone(t, st, id, "", "c", nil)
	h := mustOpen(t, st, clone, 1)
	h.mustFill(1000)
	h.mustClose()
	again := mustClone(t, st, clone, "", "again", nil)
	mustRemove(t, st, "disk")
	mustBeSound(t, st, "c", "again")
	mustRemove(t, st, "c")
	h = mustOpen(t, st, again, 2)
	h.mustHave(1000)
	h.mustClose()
	mustBeSound(t, st, "again")
	mustRemove(t, st, "again")
	mustBeEmpty(t, st)
}

// endingStore is a store of a process whose n-th change is the last one: its answer is lost,
// or with dies set it is not made, and nothing works from there on.
type endingStore struct {
	backend.Store
	n    int
	dies bool
}

func (s *endingStore) change(op, key string, do func() error) error {
	s.n--
	if s.dies && s.n <= 0 {
		return &backend.Error{Op: op, Key: key, Class: backend.ErrPermanent, Cause: context.Canceled}
	}
	err := do()
	if s.n == 0 && err == nil {
		err = &backend.Error{Op: op, Key: key, Class: backend.ErrTemporary, Cause: errors.New("the answer is lost")}
	}
	return err
}

func (s *endingStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (v backend.Version, err error) {
	err = s.change("swap", key, func() error { v, err = s.Store.Swap(ctx, key, old, b); return err })
	return v, err
}

func (s *endingStore) Delete(ctx context.Context, key string) error {
	return s.change("delete", key, func() error { return s.Store.Delete(ctx, key) })
}

// TestCloningEnds: wherever the making of clones, or the removal of an image between two
// others, ends or loses an answer, what is there is whole, and the rest can be removed.
func TestCloningEnds(t *testing.T) {
	racetest.Slow(t)
	for _, dies := range []bool{false, true} {
		more := true
		for n := 1; more; n++ {
			t.Run(fmt.Sprintf("%d dies %v", n, dies), func(t *testing.T) { more = cloningEnds(t, n, dies) })
		}
	}
}

// cloningEnds ends at the n-th change, and reports whether there were so many.
func cloningEnds(t *testing.T, n int, dies bool) bool {
	ctx, inner := context.Background(), mem.New()
	h, id := attached(t, inner, smallImage(), nil)
	h.mustFill(1000)
	h.mustClose()
	st := &endingStore{inner, n, dies}
	err := cloneTwice(st, id, func(last uuid.UUID) {
		h := mustOpen(t, inner, last, 2)
		h.mustWrite(1, 5)
		h.mustClose()
	})
	_, unmade := backend.Lookup(ctx, inner, "last")
	if !dies && unmade != nil || dies && (st.n <= 0) != (err != nil) {
		t.Errorf("%v, %d changes are left", err, st.n)
	}
	if _, err := backend.Lookup(ctx, inner, "middle"); err == nil && unmade == nil {
		mustRemove(t, inner, "middle") // that has not ended
	}
	if _, err := GC(ctx, inner, GCOptions{Age: time.Nanosecond}); err != nil {
		t.Error(err)
	}
	names, err := backend.Names(ctx, inner)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		mustBeSound(t, inner, name.Name)
		h := mustOpen(t, inner, name.ID, uint64(10+i))
		h.mustRead(0, 1000)
		h.mustClose()
	}
	for _, name := range names {
		mustRemove(t, inner, name.Name)
	}
	mustBeEmpty(t, inner)
	return st.n <= 0
}

// cloneTwice clones an image, and the clone, which is removed then.
func cloneTwice(st backend.Store, id uuid.UUID, between func(last uuid.UUID)) error {
	ctx := context.Background()
	middle, err := Clone(ctx, st, id, "middle", CloneOptions{})
	if err != nil {
		return err
	}
	last, err := Clone(ctx, st, middle, "last", CloneOptions{})
	if err != nil {
		return err
	}
	between(last)
	return removeWhole(st, "middle", RemoveOptions{})
}
