package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// GCOptions says what is to be collected of a store.
type GCOptions struct {
	// DryRun changes nothing.
	DryRun bool
	// Age is how old what somebody has begun to make, and not ended, must be to count as
	// left behind; 0 means DefaultGCAge. Clocks of hosts are compared for that.
	Age   time.Duration
	Clock Clock            // nil means Real{}
	Now   func() time.Time // what time it is; nil means time.Now
	// Progress is told in a few words what is being done; may be nil.
	Progress func(string)
	// Late is told the name of each removed image for which objects of owners that were fenced
	// may still come, and for how long: a later collection takes those, and what is left of the
	// image; may be nil. Clocks of hosts are compared for that too.
	// It is told the id of each image that has neither name nor superblock, of which an object
	// has come too lately, likewise.
	Late func(name string, left time.Duration)
	// Kept is told of objects of an image without name and superblock why they stay all the
	// same, whatever their age; may be nil.
	Kept func(id uuid.UUID, why string)
}

// DefaultGCAge is far more than it takes to make an image.
const DefaultGCAge = time.Hour

// maxPasses bounds how often a store is gone through in one collection.
const maxPasses = 100

// Garbage is something in a store that nothing refers to any more.
type Garbage struct {
	Image   uuid.UUID `json:"image_id"`
	Name    string    `json:"name"` // that it had, or was to have; the id where nothing says that
	What    string    `json:"what"`
	Objects int       `json:"objects"` // of them
}

// GC finds what nothing in a store refers to any more, and unless o.DryRun is set removes it:
// what is left of images that have been removed and that no clone of them needs, their names as
// well where the removal has not come to these, what is left of images that were not made to
// their end, and objects of images that have neither name nor superblock. What an image that has
// a name does not need any more goes when its owner works, or it is attached.
func GC(ctx context.Context, st backend.Store, o GCOptions) ([]Garbage, error) {
	if o.Age == 0 {
		o.Age = DefaultGCAge
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Late == nil {
		o.Late = func(string, time.Duration) {}
	}
	if o.Kept == nil {
		o.Kept = func(uuid.UUID, string) {}
	}
	if o.Clock == nil {
		o.Clock = Real{}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	g := &collector{st: patient{st, o.Clock}, o: o, now: o.Now(), found: []Garbage{}, waits: map[uuid.UUID]bool{}}
	for pass := 1; ; pass++ {
		before := len(g.found)
		if err := g.run(ctx); err != nil {
			return g.found, err
		}
		if o.DryRun || len(g.found) == before || pass == maxPasses {
			return g.found, nil
		}
		// What has gone may have been all that needed something of what was looked at before.
	}
}

// collector collects garbage.
type collector struct {
	st         patient
	o          GCOptions
	now        time.Time
	named      map[uuid.UUID]bool
	attributes map[uuid.UUID]bool // images that have some
	waits      map[uuid.UUID]bool // images that o.Late or o.Kept was told of
	found      []Garbage
}

func (g *collector) run(ctx context.Context) error {
	g.o.Progress("listing the store")
	s, err := scanStore(ctx, g.st)
	if err != nil {
		return err
	}
	if lost, err := LostDirectory(ctx, g.st); lost || err != nil {
		if err == nil {
			err = ErrLostDirectory
		}
		return err
	}
	// After the list: what has no name now is not a new image's.
	if g.named, err = namedImages(ctx, g.st); err != nil {
		return err
	}
	g.attributes = s.attributes
	b := &bereft{needed: map[uuid.UUID]bool{}}
	for _, id := range s.ids() {
		if !s.super[id] {
			continue
		}
		sb, _, err := loadSuperblock(ctx, g.st, id)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			continue
		case err != nil:
			return err
		}
		b.note(sb)
		if err := g.look(ctx, sb, s.objects[id]); err != nil && !vanished(ctx, g.st, id, err) {
			return err
		}
	}
	return g.remnants(ctx, s, b)
}

func (g *collector) old(t time.Time) bool { return g.now.Sub(t) >= g.o.Age }

// look looks at an image that has so many objects.
func (g *collector) look(ctx context.Context, sb *superblock, objects int) error {
	if err := g.claims(ctx, sb); err != nil {
		return err
	}
	unmade := !sb.Removed && !g.named[sb.Image] && g.old(sb.Created) && !sb.Partial && (objects == 1 || objects == 2 && g.attributes[sb.Image]) && sb.untouched()
	switch {
	case unmade:
		return g.collect(leftOf(sb, "it was not made to its end", objects), func() error { return g.removeUnmade(ctx, sb.Image) })
	case g.leftPartial(sb):
		alive, err := g.written(ctx, sb)
		if alive || err != nil {
			return err
		}
		if sb.mayArrive(false) > 0 {
			objects-- // the superblock, which stays a while
		}
		return g.collect(leftOf(sb, "it was not filled to its end", objects), func() error { return g.removePartial(ctx, sb) })
	case sb.Removed:
		return g.removed(ctx, sb)
	}
	return nil
}

// removed looks at an image that has been removed. Its name may be there still.
func (g *collector) removed(ctx context.Context, sb *superblock) error {
	id, named := sb.Image, g.named[sb.Image]
	late := sb.lateFor(g.now)
	g.late(id, sb.Name, late)
	list, kept, err := unneeded(ctx, g.st, sb, 0)
	if errors.Is(err, errLostClone) {
		return nil // CheckStore tells
	}
	if err != nil {
		return err
	}
	n := len(list)
	if kept == 0 && late == 0 && !slices.ContainsFunc(sb.Clones, func(p snapshot) bool { return !p.Made }) {
		n++ // the superblock
	}
	what := "it was removed, and no clone needs this"
	switch {
	case n == 0 && !named:
		return nil
	case n == 0:
		what = "the name, which it has still although it was removed"
	case named:
		what = "it was removed, but for its name, and no clone needs this"
	}
	return g.collect(leftOf(sb, what, n), func() error {
		if named {
			if err := unlinkAll(ctx, g.st, id); err != nil {
				return err
			}
			delete(g.named, id)
		}
		return g.reclaim(ctx, id, g.progress(sb.Name))
	})
}

// late says once that something of an image may go, or come, for so long; 0: nothing.
func (g *collector) late(id uuid.UUID, name string, left time.Duration) {
	if left > 0 && !g.waits[id] {
		g.waits[id] = true
		g.o.Late(name, left)
	}
}

// reclaim reclaims what an image was made of. What comes for it later another collection takes.
func (g *collector) reclaim(ctx context.Context, id uuid.UUID, progress func(done, total int)) error {
	r := reclamation{g.st, func() time.Time { return g.now }, reclaimBatch, progress}
	_, err := r.image(ctx, id)
	return err
}

// progress returns what is told of the removal of an image's objects.
func (g *collector) progress(name string) func(done, total int) {
	return func(done, total int) {
		g.o.Progress(fmt.Sprintf("removing what is left of %s: %d of %d objects", name, done, total))
	}
}

// untouched reports whether nothing that anybody has written is in the image alone: it has
// no checkpoint of its own, with which each ownership ends in which there was something.
func (s *superblock) untouched() bool {
	n := len(s.Epochs)
	return s.Owner == nil && !s.Loose && len(s.Points)+len(s.Snapshots)+len(s.Clones) == 0 &&
		(s.Epoch == 0 || n > 0 && s.Epochs[n-1].Epoch == s.Epoch) &&
		(s.Checkpoint == nil || !s.lineage().own(s.Checkpoint.Object))
}

// leftPartial reports whether an image was going to be filled, and may have been left.
func (g *collector) leftPartial(sb *superblock) bool {
	return sb.Partial && !sb.Removed && !g.named[sb.Image] && g.old(sb.Created)
}

// written reports whether somebody writes to a partial image: its owner is not gone before its
// lease has not been renewed for its whole length while the store answered.
func (g *collector) written(ctx context.Context, sb *superblock) (bool, error) {
	if sb.Owner == nil {
		return false, nil
	}
	g.o.Progress("waiting whether anybody writes to " + sb.Name)
	clock, step := g.o.Clock, leaseStep(sb.Owner.Lease)
	began := clock.Now()
	for before := began; clock.Now()-began <= sb.Owner.Lease; {
		if err := clock.Sleep(ctx, step); err != nil {
			return true, err
		}
		now, _, err := loadSuperblock(ctx, g.st, sb.Image)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			return true, nil // somebody has removed it
		case err != nil:
			return true, err
		case !sb.sameOwner(now):
			return true, nil
		case clock.Now()-before > sb.Owner.Lease/4+step:
			began = clock.Now() // it could not have been renewed either
		}
		before = clock.Now()
	}
	return false, nil
}

// sameOwner reports whether now has the owner that s has, which has not renewed its lease.
func (s *superblock) sameOwner(now *superblock) bool {
	if s.Owner == nil || now.Owner == nil {
		return s.Owner == now.Owner && s.Epoch == now.Epoch
	}
	return s.Epoch == now.Epoch && s.Owner.Renewal == now.Owner.Renewal
}

// removePartial removes a partial image that nobody writes to, unless somebody has begun to.
func (g *collector) removePartial(ctx context.Context, sb *superblock) error {
	err := changeInsistently(ctx, g.st, sb.Image, func(now *superblock) error {
		if !now.Removed && (!g.leftPartial(now) || !sb.sameOwner(now)) {
			return errors.New("it is in use: look at it again")
		}
		return now.remove(&RemoveOptions{Force: true, Snapshots: true})
	})
	if err != nil {
		return err
	}
	return g.reclaim(ctx, sb.Image, g.progress(sb.Name))
}

// removeUnmade removes an image that was not made to its end, unless it has got a name since.
func (g *collector) removeUnmade(ctx context.Context, id uuid.UUID) error {
	named, err := namedImages(ctx, g.st)
	if err != nil || named[id] {
		return err
	}
	_, _, err = changeSuperblock(ctx, g.st, id, func(sb *superblock) error {
		if !sb.untouched() {
			return errors.New("it is in use: look at it again")
		}
		return sb.remove(&RemoveOptions{Snapshots: true})
	})
	if err != nil {
		return err
	}
	return g.reclaim(ctx, id, nil)
}

// claims gives up the states that an image keeps for clones that are not there, or are none any
// more.
func (g *collector) claims(ctx context.Context, sb *superblock) error {
	for _, p := range slices.Clone(sb.Clones) {
		if !p.Made && !g.old(p.Since) {
			continue
		}
		why, leave := "which is not there", func(context.Context) error { return nil }
		switch clone, _, err := loadSuperblock(ctx, g.st, p.ID); {
		case err == nil && (clone.separated() || p.Object > 0 && len(clone.Origins) == 0): // the last: its separation was interrupted
			why, leave = "which is none any more", (&separator{st: g.st, id: p.ID}).leave
		case err == nil || !errors.Is(err, backend.ErrNotFound):
			continue
		case p.Made && g.named[p.ID]:
			continue // it is not removed but lost
		}
		err := g.collect(leftOf(sb, "the state that it keeps for the clone "+p.Name+", "+why, 0), func() error {
			if err := leave(ctx); err != nil && !errors.Is(err, backend.ErrNotFound) {
				return err
			}
			return releaseClone(ctx, g.st, sb.Image, p.ID)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func leftOf(of *superblock, what string, objects int) Garbage {
	return Garbage{Image: of.Image, Name: of.Name, What: what, Objects: objects}
}

// collect notes garbage, and removes it unless this is a dry run.
func (g *collector) collect(found Garbage, remove func() error) error {
	g.found = append(g.found, found)
	if g.o.DryRun {
		return nil
	}
	g.o.Progress("removing what is left of " + found.Name)
	return remove()
}
