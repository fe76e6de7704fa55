package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
)

// simSnapshot is a snapshot that somebody has asked for.
type simSnapshot struct {
	name  string
	id    uuid.UUID // uuid.Nil: it is not known whether there is one
	state []uint64  // what it must be, once it has been read
}

// simCaller is a host on which somebody makes snapshots. It waits no longer than until
// deadline, nor for an owner that has died.
type simCaller struct {
	*simHost
	deadline time.Duration
}

// Sleep implements Clock.
func (c simCaller) Sleep(ctx context.Context, d time.Duration) error {
	w := c.w
	if w.now >= c.deadline || !w.serving() {
		return context.DeadlineExceeded
	}
	return c.simHost.Sleep(ctx, d)
}

// caller returns a new host that has nothing but the store.
func (w *world) caller() *simHost {
	c := w.newHost()
	c.leaveCache() // by which its process may die
	return c
}

// snapshots does something with snapshots while the owner goes on, which may die at that.
func (w *world) snapshots() {
	switch k := w.rng.IntN(6); {
	case len(w.snaps) > 0 && w.owner.im == nil && w.rng.IntN(2) == 0:
		w.rollBack(w.snaps[w.rng.IntN(len(w.snaps))])
	case k < 3 || len(w.snaps) == 0:
		w.snapshot()
	case k == 3:
		w.removeSnapshot(w.rng.IntN(len(w.snaps)))
	case k == 4:
		w.renameSnapshot(w.rng.IntN(len(w.snaps)))
	default:
		w.readSnapshot(w.snaps[w.rng.IntN(len(w.snaps))])
	}
}

// snapshot makes a snapshot while clients write, or of an image that nobody has. It is the
// state after some number of writes: all that had completed when it was asked for at least.
func (w *world) snapshot() {
	w.count(countSnapshots, true)
	m := w.owner.m
	floor := w.floor()
	if w.rng.IntN(2) == 0 {
		w.owner.faults = simFaults{on: w.owner.faults.on}
	}
	s := &simSnapshot{name: fmt.Sprintf("snap%d", w.nextSnap)}
	w.nextSnap++
	c := w.caller()
	caller := simCaller{c, w.now + time.Duration(w.rng.Int64N(int64(8*w.plan.lease)))}
	o := SnapshotOptions{Clock: caller, Parallel: 1}
	if w.rng.IntN(2) == 0 {
		o.Nudge = func(context.Context) error { return w.nudge(caller) }
	}
	var made Snapshot
	var err error
	died := w.call(c, func() { made, err = CreateSnapshot(context.Background(), c.store, w.id, s.name, o) })
	ceiling := len(m.history)
	switch {
	case died || err != nil:
		if c.injected == 0 && !died && !errors.Is(err, context.DeadlineExceeded) {
			w.fail("create a snapshot: %v", err)
		}
		w.maybe = append(w.maybe, s.name)
	default:
		w.count(countSnapshotsMade, true)
		s.id = made.ID
		w.snaps = append(w.snaps, s)
		w.readSnapshot(s)
		if m.matchWithin(s.state, floor, ceiling) < 0 {
			w.fail("a snapshot is not the state after %d to %d writes: %s", floor, ceiling, m.describe(s.state))
		}
	}
	w.drop(c)
}

// serving reports whether the owner has the image open, and all is well.
func (w *world) serving() bool { return w.owner.im != nil && w.active() }

// call runs a command on c, which has nothing open, while the others go on. It reports
// whether its process has died.
func (w *world) call(c *simHost, fn func()) (died bool) {
	if c.faults.on = true; w.rng.IntN(8) == 0 {
		c.ioLeft = 1 + w.rng.IntN(8)
	}
	acting := w.acting
	w.acting = w.serving()
	c.opening, c.injected = true, 0
	died = c.guarded(fn)
	c.opening, c.ioLeft, c.faults = false, 0, simFaults{}
	w.acting = acting
	return died
}

// nudge asks the owner to look at the superblock, and waits until it has done what that
// asks for.
func (w *world) nudge(c simCaller) error {
	h := w.owner
	if !w.serving() {
		return errors.New("nobody answers")
	}
	done := false
	var failed error
	h.im.Refresh(func(err error) { done, failed = true, err })
	for !done {
		if err := c.Sleep(context.Background(), time.Millisecond); err != nil {
			return err
		}
		w.step(w.now)
	}
	w.count(countNudges, failed == nil)
	return failed
}

// readSnapshot opens a snapshot on another host, and reads all of it: it is what it was
// before.
func (w *world) readSnapshot(s *simSnapshot) {
	c := w.caller()
	c.readOnly, c.snapshot = true, s.id
	acting := w.acting
	w.acting = w.serving()
	if err := c.open(w.id, false); err != nil {
		w.fail("open snapshot %s: %v", s.name, err)
	}
	if w.serving() {
		w.amid(w.rng.IntN(100))
	}
	got := c.readAll("snapshot " + s.name)
	w.acting = acting
	switch {
	case s.state == nil:
		s.state = got
	case !slices.Equal(got, s.state):
		w.fail("snapshot %s is not what it was: %s", s.name, newModel(s.state).describe(got))
	}
	c.im.Close(func(error) {})
	w.until(c, func() bool { return c.im.Quiet() && c.env.idle() }, "close a snapshot")
	c.kill()
	w.drop(c)
}

// removeSnapshot removes a snapshot.
func (w *world) removeSnapshot(i int) {
	w.count(countSnapshotsGone, true)
	s := w.snaps[i]
	w.snaps = slices.Delete(w.snaps, i, i+1)
	c := w.caller()
	var err error
	if w.call(c, func() { err = RemoveSnapshot(context.Background(), c.store, w.id, s.name) }) || err != nil && c.injected > 0 {
		w.maybe = append(w.maybe, s.name)
	} else if err != nil {
		w.fail("remove a snapshot: %v", err)
	}
	w.drop(c)
	if w.serving() {
		w.amid(w.rng.IntN(100))
	}
}

// rollBack makes the image, which nobody has open, what it was at a snapshot.
func (w *world) rollBack(s *simSnapshot) {
	w.count(countRollbacks, true)
	before := w.superblock().Epoch
	c := w.caller()
	var err error
	died := w.call(c, func() {
		err = Rollback(context.Background(), c.store, w.id, s.name, RollbackOptions{URL: "mem:/disk", Clock: c, Parallel: 1})
	})
	if err != nil && c.injected == 0 {
		w.fail("roll back: %v", err)
	}
	w.drop(c)
	w.flushLate()
	sb := w.superblock()
	if sb.Epoch == before && err == nil && !died {
		w.fail("roll back: nothing has happened")
	}
	if sb.Epoch > before {
		w.count(countRolledBack, true)
		w.owner.m = newModel(s.state)
	}
}

// superblock returns the image's superblock.
func (w *world) superblock() *superblock {
	sb, _, err := loadSuperblock(context.Background(), w.inner, w.id)
	if err != nil {
		w.fail("%v", err)
	}
	return sb
}

// renameSnapshot gives a snapshot another name.
func (w *world) renameSnapshot(i int) {
	s := w.snaps[i]
	to := fmt.Sprintf("snap%d", w.nextSnap)
	w.nextSnap++
	c := w.caller()
	var err error
	died := w.call(c, func() { err = RenameSnapshot(context.Background(), c.store, w.id, s.name, to) })
	if err != nil && c.injected == 0 {
		w.fail("rename a snapshot: %v", err)
	}
	w.drop(c)
	w.flushLate()
	list := w.listSnapshots()
	k := slices.IndexFunc(list, func(x Snapshot) bool { return x.ID == s.id })
	if k < 0 || list[k].Name != to && (list[k].Name != s.name || !died && err == nil) {
		w.fail("a snapshot that was to be renamed from %s to %s: %+v", s.name, to, list)
	}
	s.name = list[k].Name
}

// listSnapshots returns what the store says.
func (w *world) listSnapshots() []Snapshot {
	list, err := Snapshots(context.Background(), w.inner, w.id)
	if err != nil {
		w.fail("list snapshots: %v", err)
	}
	return list
}

// settleSnapshots makes sure that there are the snapshots that there must be, of which no
// name is there twice, and reads all of them. It is called when nobody has the image.
func (w *world) settleSnapshots() {
	names := map[string]bool{}
	for _, x := range w.listSnapshots() {
		if names[x.Name] {
			w.fail("there are two snapshots %s", x.Name)
		}
		names[x.Name] = true
		if x.Pending {
			w.fail("snapshot %s has been asked for, and nobody has taken it", x.Name)
		}
		if slices.ContainsFunc(w.snaps, func(s *simSnapshot) bool { return s.id == x.ID }) {
			continue
		}
		if !slices.Contains(w.maybe, x.Name) {
			w.fail("there is a snapshot %s, which nobody has made", x.Name)
		}
		w.snaps = append(w.snaps, &simSnapshot{name: x.Name, id: x.ID})
	}
	for _, s := range w.snaps {
		if !names[s.name] {
			w.fail("snapshot %s is not there", s.name)
		}
		w.readSnapshot(s)
	}
}

// awaitForgotten waits until what only states were made of that are forgotten is gone.
func (w *world) awaitForgotten(c *simHost) {
	w.until(c, func() bool { return len(c.im.super.sb.Forgotten) == 0 }, "states that are to be forgotten")
}

// dropSnapshots removes all snapshots, in any order, and lets an owner reclaim what they
// have held.
func (w *world) dropSnapshots() {
	if len(w.snaps) == 0 {
		return
	}
	for len(w.snaps) > 0 {
		i := w.rng.IntN(len(w.snaps))
		if err := RemoveSnapshot(context.Background(), w.inner, w.id, w.snaps[i].name); err != nil {
			w.fail("remove a snapshot: %v", err)
		}
		w.snaps = slices.Delete(w.snaps, i, i+1)
	}
	w.count(countForgotten, len(w.superblock().Forgotten) > 0)
	c := w.newHost()
	c.faults.on = false
	if err := c.open(w.id, false); err != nil {
		w.fail("open when all snapshots are gone: %v", err)
	}
	c.m = newModel(c.readAll("the image without snapshots"))
	w.awaitForgotten(c)
	c.close()
	w.checkStore()
}
