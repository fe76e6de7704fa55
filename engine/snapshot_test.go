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
	"github.com/lsd-ceph/lsd/internal/frame"
)

// snapshotBlocks are those that tests of snapshots write.
const snapshotBlocks = 64

// mustFill writes all blocks, so that the block n has the number from+n.
func (h *host) mustFill(from uint64) {
	h.t.Helper()
	for n := range uint64(snapshotBlocks) {
		h.mustWrite(n, from+n)
	}
}

// mustHave reads what mustFill has written.
func (h *host) mustHave(from uint64) {
	h.t.Helper()
	for n := range uint64(snapshotBlocks) {
		h.mustRead(n, from+n)
	}
}

// nudge lets the host look at the superblock.
func (h *host) nudge(context.Context) error {
	err := errors.New("not ended")
	h.im.Refresh(func(e error) { err = e })
	h.run(0)
	return err
}

// mustSnapshot makes a snapshot of the image, which the host has open if it is not nil.
func mustSnapshot(t *testing.T, st backend.Store, id uuid.UUID, name string, h *host) Snapshot {
	t.Helper()
	s := mustSnap(t, st, id, name, h)
	if s.Name != name || s.Pending || s.ID == uuid.Nil || s.Size != smallImage().Size {
		t.Errorf("made %+v", s)
	}
	return s
}

// mustSnap is mustSnapshot for an image of any size.
func mustSnap(t *testing.T, st backend.Store, id uuid.UUID, name string, h *host) Snapshot {
	t.Helper()
	o := SnapshotOptions{}
	if h != nil {
		o.Nudge = h.nudge
	}
	s, err := CreateSnapshot(context.Background(), st, id, name, o)
	if err != nil {
		t.Fatal(err)
	}
	if s.Name != name || s.Pending || s.ID == uuid.Nil || s.Size == 0 {
		t.Errorf("made %+v", s)
	}
	return s
}

// openSnapshot opens a snapshot read-only on a host of its own.
func openSnapshot(t *testing.T, st backend.Store, id, snapshot uuid.UUID) (*host, error) {
	t.Helper()
	h := newHost(t, "reader", st, 77)
	im, err := Open(context.Background(), st, id, OpenOptions{ReadOnly: true, Snapshot: snapshot, URL: "mem:/disk", Config: Config{Logger: quiet}})
	if err == nil {
		h.im = im
		im.Start(h.env, nil, nil)
	}
	return h, err
}

// mustShow reads a snapshot that has what mustFill has written.
func mustShow(t *testing.T, st backend.Store, id uuid.UUID, s Snapshot, from uint64) {
	t.Helper()
	h, err := openSnapshot(t, st, id, s.ID)
	if err != nil {
		t.Fatalf("open snapshot %s: %v", s.Name, err)
	}
	h.mustHave(from)
	if err, _, _ := h.do(Write, 1, 1, 0); err == 0 {
		t.Error("a snapshot was written to")
	}
}

// TestSnapshot: a snapshot has what had been written before it, and nothing else, whatever
// is written later, and costs nothing when it is gone.
func TestSnapshot(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	var made []Snapshot
	const rounds = 5
	for round := range uint64(rounds) {
		h.mustFill(1000 * (round + 1)) // in the log alone
		made = append(made, mustSnapshot(t, st, id, fmt.Sprint("s", round), h))
		for range round {
			h.mustFill(77777)
			h.mustDestage() // there is a checkpoint now and then
		}
	}
	h.run(time.Minute)
	for i, s := range made {
		mustShow(t, st, id, s, 1000*uint64(i+1))
	}
	mustBeClean(t, st)
	if list, err := Snapshots(ctx, st, id); err != nil || len(list) != rounds || list[1] != made[1] {
		t.Errorf("%+v, %v", list, err)
	}
	held := objectsOf(t, st, id, "d")
	for i, k := range []int{2, 0, 4, 1, 3} {
		if err := RemoveSnapshot(ctx, st, id, made[k].Name); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			mustShow(t, st, id, made[1], 2000)
			mustShow(t, st, id, made[3], 4000)
		}
	}
	if _, err := openSnapshot(t, st, id, made[0].ID); !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("a snapshot that is gone is opened: %v", err)
	}
	h.run(3 * leftoverGrace)
	h.mustFill(9000)
	h.mustCheckpoint()
	h.run(time.Minute)
	if now := objectsOf(t, st, id, "d"); now > 2 || held < 2*rounds-2 {
		t.Errorf("%d data objects with snapshots, %d without", held, now)
	}
	h.mustHave(9000)
	h.mustClose()
	mustBeClean(t, st)
}

// TestSnapshotOfDetached: a snapshot of an image that nobody has is there at once; so is one
// of an image that is empty.
func TestSnapshotOfDetached(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	empty := mustSnapshot(t, st, id, "empty", nil)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustFill(1000)
	h.mustClose()
	full := mustSnapshot(t, st, id, "full", nil)
	again := mustSnapshot(t, st, id, "again", nil)
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		h.mustFill(2000)
		h.mustDestage()
	}
	h.mustClose()
	mustShow(t, st, id, full, 1000)
	mustShow(t, st, id, again, 1000)
	r, err := openSnapshot(t, st, id, empty.ID)
	if err != nil {
		t.Fatal(err)
	}
	r.mustRead(3, 0)
	mustBeClean(t, st)
}

// TestSnapshotElsewhere: an owner that nobody can tell of it makes a snapshot when it looks at
// the superblock next.
func TestSnapshotElsewhere(t *testing.T) {
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	b := newHost(t, "beta", st, 2)
	b.others = []*host{a}
	a.mustFill(1000)
	waited := ""
	s, err := CreateSnapshot(context.Background(), st, id, "monday", SnapshotOptions{Clock: b, Progress: func(p string) { waited = p }})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(waited, "alpha") {
		t.Errorf("progress is %q", waited)
	}
	a.mustFill(2000)
	a.mustDestage()
	mustShow(t, st, id, s, 1000)
}

// impatient is a clock on which somebody waits no longer than a few times.
type impatient struct {
	*host
	left int
}

func (c *impatient) Sleep(ctx context.Context, d time.Duration) error {
	if c.left--; c.left < 0 {
		return context.DeadlineExceeded
	}
	return c.host.Sleep(ctx, d)
}

// TestSnapshotIsWithdrawn: a snapshot that an owner does not make in time is not made later.
func TestSnapshotIsWithdrawn(t *testing.T) {
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil) // and stopped from here on
	b := newHost(t, "beta", st, 2)
	_, err := CreateSnapshot(context.Background(), st, id, "monday", SnapshotOptions{Clock: &impatient{b, 5}})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "alpha") || strings.Contains(err.Error(), "\n") {
		t.Errorf("the owner is stopped: %v", err)
	}
	if list, err := Snapshots(context.Background(), st, id); len(list) > 0 || err != nil {
		t.Errorf("%+v, %v", list, err)
	}
	a.mustFill(1000)
	a.run(time.Minute)
	a.mustClose()
	mustBeClean(t, st)
}

// TestPendingSnapshotIsRemoved: who waits for a snapshot that somebody removes is told so, and
// it is not made.
func TestPendingSnapshotIsRemoved(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	a, id := attached(t, st, smallImage(), nil) // and stopped from here on
	looks := 0
	_, err := CreateSnapshot(ctx, st, id, "monday", SnapshotOptions{Nudge: func(context.Context) error {
		if looks++; looks == 1 {
			return RemoveSnapshot(ctx, st, id, "monday")
		}
		return errors.New("nobody answers")
	}})
	if err == nil || !strings.Contains(err.Error(), "withdrawn") || looks != 1 {
		t.Errorf("%v, after %d looks", err, looks)
	}
	a.run(time.Minute)
	if list, err := Snapshots(ctx, st, id); len(list) > 0 || err != nil {
		t.Errorf("%+v, %v", list, err)
	}
}

// askFor makes the superblock ask for a snapshot.
func askFor(t *testing.T, st backend.Store, id uuid.UUID, name string) {
	t.Helper()
	_, _, err := changeSuperblock(context.Background(), st, id, func(sb *superblock) error {
		sb.Snapshots = append(sb.Snapshots, snapshot{ID: uuid.New(), Name: name, Since: time.Now().UTC(), Sectors: sb.Sectors})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotIsTakenByTheNextOwner: what has been asked for is not forgotten when the owner
// dies, and has all that was acknowledged.
func TestSnapshotIsTakenByTheNextOwner(t *testing.T) {
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	a.mustDestage()
	a.mustFill(2000)
	askFor(t, st, id, "monday")
	a.im.Abandon()
	list, err := Snapshots(context.Background(), st, id)
	if err != nil || len(list) != 1 || !list[0].Pending {
		t.Fatalf("%+v, %v", list, err)
	}
	if _, err := openSnapshot(t, st, id, list[0].ID); err == nil || !strings.Contains(err.Error(), "not been taken") {
		t.Errorf("a snapshot that has not been taken is opened: %v", err)
	}
	rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{})
	if err != nil || !rep.Clean() || rep.Snapshots != 1 {
		t.Errorf("check: %+v, %v", rep, err)
	}
	a.again()
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustFill(3000)
	a.mustDestage()
	mustShow(t, st, id, list[0], 2000)
}

// TestSnapshotWhileClosing: a snapshot that is asked for while the owner lets go is made.
func TestSnapshotWhileClosing(t *testing.T) {
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustFill(1000)
	a.im.Close(func(error) {})
	askFor(t, st, id, "monday")
	a.run(time.Minute)
	list, err := Snapshots(context.Background(), st, id)
	if err != nil || len(list) != 1 || list[0].Pending || a.im.state != Released {
		t.Fatalf("%+v, %v; the owner is %v", list, err, a.im.state)
	}
	mustShow(t, st, id, list[0], 1000)
	mustBeClean(t, st)
}

// TestSnapshotNames: a name is there once, and such as names are.
func TestSnapshotNames(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	id := newImageIn(t, st)
	mustSnapshot(t, st, id, "monday", nil)
	mustSnapshot(t, st, id, "tuesday", nil)
	oneLine := func(err error, want error, part string) {
		t.Helper()
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want %v with %q", err, want, part)
		}
	}
	_, err := CreateSnapshot(ctx, st, id, "monday", SnapshotOptions{})
	oneLine(err, ErrSnapshotExists, "monday")
	_, err = CreateSnapshot(ctx, st, id, "a@b", SnapshotOptions{})
	oneLine(err, nil, "snapshot name")
	_, err = CreateSnapshot(ctx, st, id, "", SnapshotOptions{})
	oneLine(err, nil, "snapshot name")
	_, err = CreateSnapshot(ctx, st, uuid.New(), "x", SnapshotOptions{})
	oneLine(err, backend.ErrNotFound, "")
	oneLine(RemoveSnapshot(ctx, st, id, "friday"), ErrNoSnapshot, "friday")
	oneLine(RenameSnapshot(ctx, st, id, "friday", "x"), ErrNoSnapshot, "friday")
	oneLine(RenameSnapshot(ctx, st, id, "monday", "tuesday"), ErrSnapshotExists, "tuesday")
	oneLine(RenameSnapshot(ctx, st, id, "monday", "no/such"), nil, "snapshot name")
	if err := RenameSnapshot(ctx, st, id, "monday", "sunday"); err != nil {
		t.Error(err)
	}
	var some *SnapshotsError
	if _, err := Remove(ctx, st, "disk", RemoveOptions{URL: "mem:/disk"}); !errors.As(err, &some) || some.Count != 2 {
		t.Errorf("an image with snapshots is removed: %v", err)
	}
	if err := Rename(ctx, st, "disk", "other"); err != nil {
		t.Error(err)
	}
	info, err := Describe(ctx, st, "other")
	if err != nil || info.ID != id || len(info.Snapshots) != 2 || info.Snapshots[0].Name != "sunday" {
		t.Errorf("%+v, %v", info, err)
	}
	if sb, _, err := loadSuperblock(ctx, st, id); err != nil || sb.Name != "other" {
		t.Errorf("the superblock has the name %q, %v", sb.Name, err)
	}
	if err := removeWhole(st, "other", RemoveOptions{URL: "mem:/other", Snapshots: true}); err != nil {
		t.Error(err)
	}
}

// TestSnapshotLimit: there are as many snapshots as there can be, and no more.
func TestSnapshotLimit(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	_, _, err := changeSuperblock(context.Background(), st, id, func(sb *superblock) error {
		for i := range MaxSnapshots {
			sb.Snapshots = append(sb.Snapshots, snapshot{point: point{Settled: true}, ID: uuid.New(), Name: fmt.Sprint("s", i), Sectors: sb.Sectors})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CreateSnapshot(context.Background(), st, id, "more", SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("one more snapshot: %v", err)
	}
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustFill(1000)
	h.mustClose()
}

// TestOldSuperblock: an image that the version before this one has written is opened, and is
// of this version then.
func TestOldSuperblock(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustClose()
	sb, v, err := loadSuperblock(ctx, st, id)
	if err != nil {
		t.Fatal(err)
	}
	sb.Seq = 0 // which that did not know
	payload, err := frame.Decode(superMagic, sb.encode(), superOld)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Swap(ctx, SuperblockKey(id), v, frame.Encode(superMagic, superOld, payload)); err != nil {
		t.Fatal(err)
	}
	if b, _, err := st.Load(ctx, SuperblockKey(id)); err != nil || !isOld(b) {
		t.Error("an image without anything new is not one that the version before reads")
	}
	s := mustSnapshot(t, st, id, "monday", nil)
	b, _, err := st.Load(ctx, SuperblockKey(id))
	if err != nil {
		t.Fatal(err)
	}
	if isOld(b) {
		t.Error("an image with a snapshot is one that the version before reads, and would forget")
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustHave(1000)
	h.mustFill(2000)
	h.mustClose()
	if err := Rollback(ctx, st, id, "monday", RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	mustShow(t, st, id, s, 1000)
}

// TestOldOwner: an owner that could not read a superblock with snapshots is not given one.
func TestOldOwner(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	a, id := attached(t, st, smallImage(), nil)
	if _, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error { sb.Owner.Reads = 0; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateSnapshot(ctx, st, id, "monday", SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), "alpha") || !strings.Contains(err.Error(), "earlier lsd") {
		t.Errorf("a snapshot is asked of an owner that does not know of such: %v", err)
	}
	if _, err := Clone(ctx, st, id, "clone", CloneOptions{}); err == nil || !strings.Contains(err.Error(), "earlier lsd") {
		t.Errorf("a clone is asked of an owner that does not know of such: %v", err)
	}
	a.run(time.Minute)
	a.mustWrite(1, 1)
	a.mustReopen(id)
	mustSnapshot(t, st, id, "monday", a)
}

func isOld(b []byte) bool {
	_, err := frame.Decode(superMagic, b, superOld)
	return err == nil
}
