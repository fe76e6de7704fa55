package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// filledIn returns an image of the name disk that has a snapshot, and is not attached.
func filledIn(t *testing.T, st backend.Store) uuid.UUID {
	t.Helper()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	if _, err := CreateSnapshot(t.Context(), st, id, "s", SnapshotOptions{Nudge: h.nudge}); err != nil {
		t.Fatal(err)
	}
	h.mustClose()
	return id
}

// mustHold checks that an image is whole.
func mustHold(t *testing.T, st backend.Store, id uuid.UUID) {
	t.Helper()
	h := mustOpen(t, st, id, 7)
	h.mustHave(1000)
	h.mustClose()
}

func mustTrash(t *testing.T, st backend.Store, name string, keep time.Duration) {
	t.Helper()
	if _, err := MoveToTrash(t.Context(), st, name, TrashOptions{Keep: keep}); err != nil {
		t.Fatal(err)
	}
}

// namesOf returns the names that an image has.
func namesOf(t *testing.T, st backend.Store, id uuid.UUID) (list []string) {
	t.Helper()
	names, err := backend.Names(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range names {
		if e.ID == id {
			list = append(list, e.Name)
		}
	}
	return list
}

// TestTrash: an image in the trash has no name, is whole, and comes back with any name that is
// free.
func TestTrash(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := filledIn(t, st)
	clone := mustClone(t, st, id, "s", "clone", nil)
	before := time.Now().Truncate(time.Second)
	if got, err := MoveToTrash(ctx, st, "disk", TrashOptions{Keep: time.Hour}); err != nil || got != id {
		t.Fatalf("moved %v, %v", got, err)
	}
	if _, err := backend.Lookup(ctx, st, "disk"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it has its name: %v", err)
	}
	if _, err := MoveToTrash(ctx, st, "disk", TrashOptions{}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("moved twice: %v", err)
	}
	list, err := Trash(ctx, st)
	if err != nil || len(list) != 1 {
		t.Fatalf("trash: %+v, %v", list, err)
	}
	x := list[0]
	if x.ID != id || x.Name != "disk" || x.Size != 64<<20 || x.Error != "" || x.Since.Before(before) || x.Until.Sub(x.Since) != time.Hour {
		t.Errorf("trash: %+v", x)
	}
	if one, err := InTrash(ctx, st, id); err != nil || one != x {
		t.Errorf("%+v, %v; want %+v", one, err, x)
	}
	if _, err := InTrash(ctx, st, clone); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("the clone: %v", err)
	}
	mustHold(t, st, id)
	mustHold(t, st, clone)
	if found, err := GC(ctx, st, GCOptions{Age: time.Nanosecond}); err != nil || len(found) > 0 {
		t.Errorf("gc finds %+v, %v", found, err)
	}
	u, err := MeasureStore(ctx, st, UsageOptions{})
	if err != nil || len(u.Images) != 2 || !u.Images[1].Trash || u.Images[1].Name != "disk" || u.Images[0].Trash {
		t.Errorf("usage %+v, %v", u, err)
	}
	if rep, err := CheckStore(ctx, st, "mem:", false); err != nil || !rep.Clean() || !strings.HasPrefix(rep.Notes[0], "1 image, and 1 in the trash; ") {
		t.Errorf("check: %+v, %v", rep, err)
	}

	other, err := Create(ctx, st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "disk", "clone"} {
		if got, err := RestoreFromTrash(ctx, st, id, name); !errors.Is(err, backend.ErrExists) {
			t.Errorf("restored as %q: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"a/b", backend.TrashName(id), backend.TrashName(other)} {
		if _, err := RestoreFromTrash(ctx, st, id, name); err == nil {
			t.Errorf("restored as %q", name)
		}
	}
	if _, err := RestoreFromTrash(ctx, st, other, "x"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("restored what is not in the trash: %v", err)
	}
	if got, err := RestoreFromTrash(ctx, st, id, "back"); err != nil || got != "back" {
		t.Errorf("restored as %q, %v", got, err)
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil || sb.Trash != nil || sb.Name != "back" || sb.version() != superSnapshots {
		t.Errorf("%+v, %v", sb, err)
	}
	mustHold(t, st, id)
	mustTrash(t, st, "back", 0)
	if got, err := RestoreFromTrash(ctx, st, id, ""); err != nil || got != "back" {
		t.Errorf("restored as %q, %v", got, err)
	}
	mustBeSound(t, st, "back", "clone")
}

// TestRemoveFromTrash: an image is removed from the trash when it need not be kept any more, or
// with force, and its snapshots and an owner count as they do for others.
func TestRemoveFromTrash(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := filledIn(t, st)
	mustTrash(t, st, "disk", time.Hour)
	var deferred *DeferredError
	var snapshots *SnapshotsError
	var owner *OwnedError
	remove := func(o RemoveTrashedOptions) error { return RemoveFromTrash(ctx, st, id, o) }
	if err := remove(RemoveTrashedOptions{Snapshots: true}); !errors.As(err, &deferred) || deferred.Until.IsZero() {
		t.Errorf("removed early: %v", err)
	}
	if err := remove(RemoveTrashedOptions{Snapshots: true, At: time.Now().Add(59 * time.Minute)}); !errors.As(err, &deferred) {
		t.Errorf("removed early: %v", err)
	}
	if err := remove(RemoveTrashedOptions{Force: true}); !errors.As(err, &snapshots) {
		t.Errorf("removed with snapshots: %v", err)
	}
	h := mustOpen(t, st, id, 3)
	if err := remove(RemoveTrashedOptions{Force: true, Snapshots: true}); !errors.As(err, &owner) {
		t.Errorf("removed from its owner: %v", err)
	}
	if list, err := Trash(ctx, st); err != nil || len(list) != 1 || list[0].Owner == "" {
		t.Errorf("trash: %+v, %v", list, err)
	}
	h.mustHave(1000)
	h.mustClose()
	for at, want := range map[time.Duration]int{0: 0, 2 * time.Hour: 1} {
		if due, err := DueInTrash(ctx, st, time.Now().Add(at)); err != nil || len(due) != want {
			t.Errorf("due in %v: %+v, %v", at, due, err)
		}
	}
	if err := remove(RemoveTrashedOptions{Snapshots: true, At: time.Now().Add(61 * time.Minute)}); err != nil {
		t.Errorf("not removed: %v", err)
	}
	if err := remove(RemoveTrashedOptions{Force: true}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := Reclaim(ctx, st, id, nil); err != nil {
		t.Error(err)
	}
	mustBeEmpty(t, st)
	if _, err := MoveToTrash(ctx, st, "disk", TrashOptions{Keep: MaxDeferment + 1}); err == nil || errors.Is(err, backend.ErrNotFound) {
		t.Errorf("kept for ever: %v", err)
	}
}

// TestTrashOfOwner: what has an owner is moved where that is asked for, and its owner goes on.
func TestTrashOfOwner(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	var owner *OwnedError
	if _, err := MoveToTrash(ctx, st, "disk", TrashOptions{}); !errors.As(err, &owner) {
		t.Errorf("moved: %v", err)
	}
	if _, err := MoveToTrash(ctx, st, "disk", TrashOptions{Attached: true}); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 5)
	h.run(10 * time.Minute)
	if err := RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{}); !errors.As(err, &owner) {
		t.Errorf("removed: %v", err)
	}
	if _, err := RestoreFromTrash(ctx, st, id, ""); err != nil {
		t.Error(err)
	}
	h.mustRead(1, 5)
	h.mustClose()
	mustBeSound(t, st, "disk")
}

// TestTrashUnreadable: what cannot be read is in the trash still, and is removed with force, or
// gets a name.
func TestTrashUnreadable(t *testing.T) {
	for _, lost := range []bool{false, true} {
		ctx, st := t.Context(), mem.New()
		id := filledIn(t, st)
		mustTrash(t, st, "disk", 0)
		if err := st.Delete(ctx, SuperblockKey(id)); err != nil {
			t.Fatal(err)
		}
		if !lost {
			if _, err := st.Swap(ctx, SuperblockKey(id), backend.NoVersion, []byte("nonsense")); err != nil {
				t.Fatal(err)
			}
		}
		if list, err := Trash(ctx, st); err != nil || len(list) != 1 || list[0].ID != id || list[0].Error == "" {
			t.Errorf("trash: %+v, %v", list, err)
		}
		if due, err := DueInTrash(ctx, st, time.Now()); err != nil || len(due) > 0 {
			t.Errorf("due: %+v, %v", due, err)
		}
		if _, err := RestoreFromTrash(ctx, st, id, ""); err == nil {
			t.Error("it had a name")
		}
		var deferred *DeferredError
		if err := RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{}); !errors.As(err, &deferred) {
			t.Errorf("removed: %v", err)
		}
		if err := RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{Force: true}); err != nil {
			t.Error(err)
		}
		mustBeEmpty(t, st)
	}
}

// TestTrashStops: wherever a move, a restoration or a removal ends or loses an answer, the image
// has one place, and what was begun can be repeated.
func TestTrashStops(t *testing.T) {
	racetest.Slow(t)
	for _, op := range []string{"move", "restore", "remove", "rename"} {
		for _, dies := range []bool{false, true} {
			more := true
			for n := 1; more; n++ {
				t.Run(fmt.Sprintf("%s %d dies %v", op, n, dies), func(t *testing.T) { more = trashStops(t, op, n, dies) })
			}
		}
	}
}

// trashStops ends at the n-th change, and reports whether there were so many.
func trashStops(t *testing.T, op string, n int, dies bool) bool {
	ctx, inner := t.Context(), mem.New()
	id := filledIn(t, inner)
	switch op {
	case "restore", "remove":
		mustTrash(t, inner, "disk", 0)
	case "rename": // of what was on its way to the trash
		if _, err := MoveToTrash(ctx, &endingStore{inner, 2, true}, "disk", TrashOptions{}); err == nil {
			t.Fatal("moved")
		}
	}
	do := func(st backend.Store) (err error) {
		switch op {
		case "move":
			_, err = MoveToTrash(ctx, st, "disk", TrashOptions{Keep: time.Hour})
		case "restore":
			_, err = RestoreFromTrash(ctx, st, id, "disk")
		case "rename":
			err = Rename(ctx, st, "disk", "other")
		case "remove":
			err = RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{Snapshots: true})
		}
		return err
	}
	st := &endingStore{inner, n, dies}
	err := do(st)
	if dies && (st.n <= 0) != (err != nil) {
		t.Errorf("%v, %d changes are left", err, st.n)
	}
	sb, _, serr := loadSuperblock(ctx, inner, id)
	if serr != nil {
		t.Fatal(serr)
	}
	at := namesOf(t, inner, id)
	if len(at) != 1 && !sb.Removed {
		t.Fatalf("it has the names %q", at)
	}
	if len(at) == 1 && backend.InTrash(at[0]) && sb.Trash == nil {
		t.Error("it is in the trash, and its superblock does not say so")
	}
	if !sb.Removed {
		mustHold(t, inner, id)
	}
	if rep, err := CheckStore(ctx, inner, "mem:", false); err != nil || !sb.Removed && !rep.Clean() {
		t.Errorf("check: %+v, %v", rep, err)
	}
	if err := do(inner); err != nil && !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("again: %v", err)
	}
	want := map[string]string{"move": backend.TrashName(id), "restore": "disk", "rename": "other", "remove": ""}[op]
	if got := strings.Join(namesOf(t, inner, id), " "); got != want {
		t.Errorf("it has the names %q in the end, not %q", got, want)
	}
	sb, _, err = loadSuperblock(ctx, inner, id)
	if err != nil || (op == "restore") && sb.Trash != nil || op == "move" && (sb.Trash == nil || sb.Trash.Until.Before(time.Now().Add(59*time.Minute))) {
		t.Errorf("its superblock says %+v, %v", sb, err)
	}
	return st.n <= 0
}

// betweenStore has something else happen before its n-th change.
type betweenStore struct {
	backend.Store
	n  int
	do func()
}

func (s *betweenStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	if s.n--; s.n == 0 {
		s.do()
	}
	return s.Store.Swap(ctx, key, old, b)
}

// TestTrashRaces: whatever two hosts do with one image at one time, it has one place or is
// removed; its data is there as long as it is not; what nobody has the right to remove stays; and
// of a removal that was refused, or a restoration that was not, the image is there in the end.
func TestTrashRaces(t *testing.T) {
	racetest.Slow(t)
	ops := []string{"move", "move for long", "restore", "restore other", "remove", "remove early", "rename", "rm", "restore and move for long"}
	for _, trash := range []bool{false, true} {
		for _, a := range ops {
			for _, b := range ops {
				more := true
				for n := 1; more; n++ {
					t.Run(fmt.Sprintf("%s %d %s, in the trash %v", a, n, b, trash), func(t *testing.T) { more = trashRaces(t, trash, a, n, b) })
				}
			}
		}
	}
}

// trashOp does something with the image id, whose name is disk if it has one.
func trashOp(ctx context.Context, st backend.Store, id uuid.UUID, op string) (err error) {
	switch op {
	case "move":
		_, err = MoveToTrash(ctx, st, "disk", TrashOptions{})
	case "move for long":
		_, err = MoveToTrash(ctx, st, "disk", TrashOptions{Keep: time.Hour})
	case "restore":
		_, err = RestoreFromTrash(ctx, st, id, "")
	case "restore other":
		_, err = RestoreFromTrash(ctx, st, id, "other")
	case "restore and move for long":
		if _, err = RestoreFromTrash(ctx, st, id, "disk"); err == nil {
			_, err = MoveToTrash(ctx, st, "disk", TrashOptions{Keep: time.Hour})
		}
	case "remove":
		err = RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{})
	case "remove early":
		err = RemoveFromTrash(ctx, st, id, RemoveTrashedOptions{Force: true})
	case "rename":
		err = Rename(ctx, st, "disk", "other")
	case "rm":
		_, err = Remove(ctx, st, "disk", RemoveOptions{})
	}
	return err
}

// trashRaces has b happen before the n-th change of a, and reports whether there were so many.
func trashRaces(t *testing.T, trash bool, a string, n int, b string) bool {
	ctx, inner := t.Context(), mem.New()
	h, id := attached(t, inner, smallImage(), nil)
	h.mustWrite(1, 1)
	h.mustClose()
	if trash {
		mustTrash(t, inner, "disk", 0)
	}
	var berr error
	st := &betweenStore{inner, n, func() { berr = trashOp(ctx, inner, id, b) }}
	aerr := trashOp(ctx, st, id, a)
	if st.n > 0 {
		return false
	}
	sb, _, err := loadSuperblock(ctx, inner, id)
	if err != nil {
		t.Fatal(err)
	}
	at := namesOf(t, inner, id)
	if sb.Removed {
		if len(at) > 0 && aerr == nil && berr == nil {
			t.Errorf("it is removed, and has the names %q", at)
		}
		if removes := map[string]bool{"remove": true, "remove early": true, "rm": true}; !removes[a] && !removes[b] {
			t.Errorf("nobody has removed it: %v, %v", aerr, berr)
		}
		if b == "remove" && a == "move for long" && aerr == nil || a == "remove" && strings.HasSuffix(b, "for long") && berr == nil {
			t.Error("it was to be kept")
		}
		return true
	}
	if len(at) != 1 {
		t.Fatalf("it has the names %q (%v, %v)", at, aerr, berr)
	}
	if backend.InTrash(at[0]) {
		if sb.Trash == nil {
			t.Errorf("its place is in the trash, and its superblock does not say so (%v, %v)", aerr, berr)
		}
		if long := a == "move for long" && aerr == nil || strings.HasSuffix(b, "for long") && berr == nil; long && sb.Trash.Until.Before(time.Now().Add(59*time.Minute)) {
			t.Errorf("it is kept until %v", sb.Trash.Until)
		}
	}
	h = mustOpen(t, inner, id, 3)
	h.mustRead(1, 1)
	h.mustClose()
	return true
}

// TestTrashRebuilt: a directory that is made anew has in the trash what was there, but for what
// has been attached since, and what has been restored has its name.
func TestTrashRebuilt(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	ids := map[string]uuid.UUID{}
	for _, name := range []string{"kept", "restored", "used", "same"} {
		id, err := Create(ctx, st, name, smallImage())
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = id
		mustTrash(t, st, name, time.Hour)
	}
	again, err := Create(ctx, st, "same", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := RestoreFromTrash(ctx, st, ids["restored"], ""); err != nil {
		t.Fatal(err)
	}
	mustOpen(t, st, ids["used"], 3).mustClose()
	if err := st.Delete(ctx, backend.DirectoryKey); err != nil {
		t.Fatal(err)
	}
	rep, err := CheckStore(ctx, st, "mem:", true)
	if err != nil || len(rep.Repairs) != 5 {
		t.Fatalf("%+v, %v", rep, err)
	}
	names, err := backend.Names(ctx, st)
	if err != nil || len(names) != 5 {
		t.Fatalf("%v, %v", names, err)
	}
	for _, e := range names {
		switch {
		case backend.InTrash(e.Name) && (e.ID == ids["kept"] || e.ID == ids["same"]):
		case e.Name == "restored" && e.ID == ids["restored"], e.Name == "used" && e.ID == ids["used"], e.Name == "same" && e.ID == again:
		default:
			t.Errorf("%s is %v", e.Name, e.ID)
		}
	}
	if list, err := Trash(ctx, st); err != nil || len(list) != 2 || list[0].Until.IsZero() || list[1].Until.IsZero() {
		t.Errorf("%+v, %v", list, err)
	}
}
