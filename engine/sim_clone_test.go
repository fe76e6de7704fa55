package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// simClone is a clone of the image, or of a clone.
type simClone struct {
	name  string
	id    uuid.UUID
	state []uint64 // what it must be, once it has been read
}

// clones does something with clones, while the owner of the image goes on.
func (w *world) cloning() {
	switch k := w.rng.IntN(6); {
	case k < 2 || len(w.cloned) == 0:
		w.clone()
	case k == 2:
		w.removeClone(w.rng.IntN(len(w.cloned)))
		for len(w.removed) > 0 && w.rng.IntN(2) == 0 {
			w.reclaim()
		}
	case k == 3:
		w.cloneOfClone(w.cloned[w.rng.IntN(len(w.cloned))])
	default:
		w.useClone(w.cloned[w.rng.IntN(len(w.cloned))])
	}
}

// clone makes a clone of a snapshot, or of the image as it is now. It begins as that was.
func (w *world) clone() {
	w.count(countClones, true)
	var s *simSnapshot
	of := ""
	if len(w.snaps) > 0 && w.rng.IntN(2) == 0 {
		s = w.snaps[w.rng.IntN(len(w.snaps))]
		of = s.name
	}
	m, floor := w.owner.m, w.floor()
	c := w.makeClone(w.id, of)
	if c == nil {
		return
	}
	ceiling := len(m.history)
	w.lookAtClone(c)
	if s != nil {
		if !slices.Equal(c.state, s.state) {
			w.fail("clone %s of snapshot %s is not as that: %s", c.name, of, newModel(s.state).describe(c.state))
		}
		return
	}
	if m.matchWithin(c.state, floor, ceiling) < 0 {
		w.fail("a clone is not the state after %d to %d writes: %s", floor, ceiling, m.describe(c.state))
	}
}

// floor returns how many writes at least are in a snapshot that is asked for now.
func (w *world) floor() int {
	if m := w.owner.m; w.owner.dead || w.owner.im == nil {
		return m.stored // its log is where it was
	}
	return w.owner.m.acked
}

// makeClone makes a clone of an image, or returns nil if that did not go through; then
// nothing of it is there, or it is cleaned up.
func (w *world) makeClone(id uuid.UUID, of string) *simClone {
	clone := &simClone{name: fmt.Sprintf("clone%d", w.nextSnap)}
	w.nextSnap++
	c := w.caller()
	defer w.drop(c)
	if w.rng.IntN(2) == 0 {
		w.owner.faults = simFaults{on: w.owner.faults.on}
	}
	caller := simCaller{c, w.now + 4*w.plan.lease}
	o := CloneOptions{Snapshot: of, SnapshotOptions: SnapshotOptions{Clock: caller, Parallel: 1}}
	if w.rng.IntN(2) == 0 && id == w.id {
		o.Nudge = func(context.Context) error { return w.nudge(caller) }
	}
	var err error
	if w.call(c, func() { clone.id, err = Clone(context.Background(), c.store, id, clone.name, o) }) || err != nil {
		if c.injected == 0 && err != nil && !errors.Is(err, context.DeadlineExceeded) {
			w.fail("clone: %v", err)
		}
		w.flushLate()
		w.half = append(w.half, clone.name)
		return nil
	}
	w.count(countClonesMade, true)
	w.cloned = append(w.cloned, clone)
	return clone
}

// cloneOfClone makes a clone of a clone, which nobody has open.
func (w *world) cloneOfClone(of *simClone) {
	if c := w.makeClone(of.id, ""); c != nil {
		w.count(countClonesOfClones, true)
		c.state = slices.Clone(of.state)
		w.lookAtClone(c)
	}
}

// lookAtClone opens a clone read-only, and reads all of it: it is what it was.
func (w *world) lookAtClone(s *simClone) {
	c := w.caller()
	c.readOnly = true
	if err := c.open(s.id, false); err != nil {
		w.fail("open clone %s: %v", s.name, err)
	}
	got := c.readAll("clone " + s.name)
	if s.state != nil && !slices.Equal(got, s.state) {
		w.fail("clone %s is not what it was: %s", s.name, newModel(s.state).describe(got))
	}
	s.state = got
	c.im.Close(func(error) {})
	w.until(c, func() bool { return c.im.Quiet() && c.env.idle() }, "close a clone")
	c.kill()
	w.drop(c)
}

// useClone attaches a clone on a host of its own, whose client writes to it while the owner
// of the image goes on.
func (w *world) useClone(s *simClone) {
	w.count(countClonesUsed, true)
	c := w.caller()
	if err := c.open(s.id, false); err != nil {
		w.fail("open clone %s: %v", s.name, err)
	}
	w.recovered(c, newModel(s.state), 0, false, "clone "+s.name)
	acting := w.acting
	w.acting = w.serving()
	flatten := w.rng.IntN(200) // at that step, if there is one
	flat := &flattening{}
	for i := range w.rng.IntN(300) {
		if w.rng.IntN(2) == 0 && len(c.out) < 24 {
			w.act(c)
		}
		if i == flatten {
			w.count(countFlattens, true)
			flat.begin(c)
		}
		w.step(w.now)
		if w.rng.IntN(8) == 0 {
			w.tick(w.now + w.plan.lease)
		}
	}
	w.acting = acting
	w.settle(c)
	w.endFlattening(c, flat)
	m := c.m
	c.close()
	s.state = slices.Clone(m.current)
	w.drop(c)
	w.flushLate()
	w.lookAtClone(s)
	if flatten < 150 || flat.flat {
		w.separate(s, flat.flat)
	}
}

// flattening is how far a clone is flattened.
type flattening struct{ begun, ended, flat bool }

func (f *flattening) begin(h *simHost) {
	f.begun = true
	h.im.Flatten(nil, func(err error) { f.ended, f.flat = true, err == nil })
}

// endFlattening waits until a clone is flattened, if that has been begun, or pauses it, or
// leaves that to its detaching. Nothing fails any more.
func (w *world) endFlattening(h *simHost, f *flattening) {
	k := w.rng.IntN(8)
	switch {
	case !f.begun || k == 0:
		return
	case k == 1:
		h.im.PauseFlatten()
	}
	for i := 0; !f.flat; i++ {
		if f.ended {
			if k == 1 || i > 100_000 {
				return
			}
			f.begin(h) // it had come upon what could not be read then
		}
		if i == 200_000 {
			w.fail("flatten: nothing moves: %+v", h.im.Stats())
		}
		w.step(math.MaxInt64)
	}
	w.count(countFlattened, true)
}

// separate separates a clone from its ancestors, if it can be; whoever does that may die. Its
// present state is flat, or may not be. All is as it was, and the store sound.
func (w *world) separate(s *simClone, flat bool) {
	c := w.caller()
	var found Separation
	var err error
	died := w.call(c, func() { found, err = Separate(context.Background(), c.store, s.id) })
	if !died && err != nil && c.injected == 0 {
		w.fail("separate %s: %v", s.name, err)
	}
	w.drop(c)
	w.flushLate()
	if !died && err == nil {
		if flat && slices.Contains(found.Needs, "its present state") {
			w.fail("separate %s, which is flat: %q", s.name, found.Needs)
		}
		w.count(countSeparated, len(found.Needs) == 0 && found.Parent != uuid.Nil)
	}
	for len(w.removed) > 0 && w.rng.IntN(2) == 0 {
		w.reclaim()
	}
	w.lookAtClone(s)
}

// flushLate lets come what has been given up: later it would be nobody's.
func (w *world) flushLate() {
	for len(w.late) > 0 {
		w.lateEffect(0)
	}
}

// removeClone removes a clone, whatever was cloned from it.
func (w *world) removeClone(i int) {
	s := w.cloned[i]
	w.cloned = slices.Delete(w.cloned, i, i+1)
	w.count(countClonesGone, true)
	c := w.caller()
	var err error
	if w.call(c, func() { _, err = Remove(context.Background(), c.store, s.name, RemoveOptions{URL: "mem:/" + s.name}) }) || err != nil {
		if c.injected == 0 && err != nil {
			w.fail("remove clone %s: %v", s.name, err)
		}
		w.flushLate()
		switch w.rng.IntN(3) {
		case 0:
			w.mustRemove(s.name)
		case 1: // as far as it has come somebody else sees to it, if it has begun
			w.collect()
			if _, err := backend.Lookup(context.Background(), w.inner, s.name); err == nil {
				w.mustRemove(s.name)
			}
		default: // somebody takes it for granted that it is gone
			if err := freeName(context.Background(), w.inner, s.name); err != nil {
				w.mustRemove(s.name)
			}
		}
	}
	w.drop(c)
	w.removed = append(w.removed, s)
}

// reclaim removes what an image was made of that was removed, now or some time ago, or it does
// not come to its end; then somebody else does it later.
func (w *world) reclaim() {
	i := w.rng.IntN(len(w.removed))
	s := w.removed[i]
	c := w.caller()
	defer w.drop(c)
	var err error
	died := w.call(c, func() { _, err = Reclaim(context.Background(), c.store, s.id, nil) })
	w.flushLate()
	w.count(countReclaims, !died && err == nil)
	switch {
	case !died && err == nil:
		w.removed = slices.Delete(w.removed, i, i+1)
	case c.injected == 0 && err != nil:
		w.fail("reclaim clone %s: %v", s.name, err)
	}
}

// mustRemove removes an image that is there, or half there. What it was made of is reclaimed by
// whoever does so later.
func (w *world) mustRemove(name string) {
	_, err := Remove(context.Background(), w.inner, name, RemoveOptions{URL: "mem:/" + name, Snapshots: true})
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		w.fail("remove %s: %v", name, err)
	}
	if _, err := backend.Lookup(context.Background(), w.inner, name); !errors.Is(err, backend.ErrNotFound) {
		w.fail("%s, which was removed, is there: %v", name, err)
	}
}

// dropClones removes the image and its clones, in any order. Those that are left are what they
// were, and in the end nothing is left.
func (w *world) dropClones() {
	if len(w.cloned) == 0 {
		return
	}
	all := w.cloned
	w.cloned = nil
	if !w.plan.extras.forced { // else it is not there any more
		image := &simClone{name: "disk", id: w.id}
		w.lookAtClone(image)
		all = append(all, image)
	}
	for len(all) > 0 {
		i := w.rng.IntN(len(all))
		w.mustRemove(all[i].name)
		w.removed = append(w.removed, all[i])
		all = slices.Delete(all, i, i+1)
		switch w.rng.IntN(3) {
		case 0:
			w.collect()
		case 1:
			w.reclaim()
		}
		for _, s := range all {
			w.lookAtClone(s)
		}
	}
	if w.rng.IntN(2) == 0 {
		w.collect()
	}
	for len(w.removed) > 0 {
		w.reclaim()
	}
	w.mustWait()
	w.collectLater()
	err := w.inner.List(context.Background(), "", func(key string) error {
		if key != backend.DirectoryKey && !w.strays[key] {
			w.fail("left over when all images are gone: %s", key)
		}
		return nil
	})
	if err != nil {
		w.fail("list: %v", err)
	}
}

// settleClones adopts the clones that there are although it was not said so, and cleans up
// what is left of others.
func (w *world) settleClones() {
	names, err := backend.Names(context.Background(), w.inner)
	if err != nil {
		w.fail("names: %v", err)
	}
	for _, n := range names {
		known := n.ID == w.id || slices.ContainsFunc(w.cloned, func(c *simClone) bool { return c.id == n.ID })
		switch {
		case known:
		case slices.Contains(w.half, n.Name):
			w.cloned = append(w.cloned, &simClone{name: n.Name, id: n.ID})
		default:
			w.fail("there is an image %s, which nobody has made", n.Name)
		}
	}
	left, err := GC(context.Background(), w.inner, GCOptions{Age: time.Nanosecond, DryRun: true})
	if err != nil || len(left) > 0 {
		w.fail("gc leaves %+v, %v", left, err)
	}
	for _, c := range w.cloned {
		w.lookAtClone(c)
		w.checkImage(c.name)
	}
	w.measure()
}

// measure measures the store: what it says adds up, and whose images are whole nothing is unknown.
func (w *world) measure() {
	u, err := addedUp(w.inner)
	if err != nil || u.Unknown > 0 || u.Strange > 0 {
		w.fail("usage: %+v, %v", u, err)
	}
	for _, im := range u.Images {
		if im.Error != "" {
			w.fail("usage of %s: %s", im.Name, im.Error)
		}
	}
}

// collect removes what is left of images that nobody has.
func (w *world) collect() {
	if _, err := GC(context.Background(), w.inner, GCOptions{Age: time.Nanosecond}); err != nil {
		w.fail("gc: %v", err)
	}
}

// checkImage checks an image as lsdctl check does.
func (w *world) checkImage(name string) {
	rep, err := Check(context.Background(), w.inner, name, "mem:/"+name, CheckOptions{Deep: true, Parallel: 1})
	if err != nil {
		w.fail("check of %s: %v", name, err)
	}
	for _, f := range rep.Errors {
		if !w.strays[f.Object] {
			w.fail("check of %s: %s", name, f)
		}
	}
}
