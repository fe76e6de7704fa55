package engine

import (
	"context"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

const (
	reapBatch = 16 // objects that one worker deletes
	reapJobs  = 2  // workers that delete at one time
	// reapLook is how many objects that turn out to be kept are looked at in one turn.
	reapLook = 1024
)

// reaper deletes data objects that nothing refers to any more. The reactor owns
// it.
//
// An object may go when it is dead, no point needs it, and the last checkpoint has
// it behind itself: recovery needs the headers of those after it. That an owner
// deletes late, when another has taken over, does no harm: the object with which
// the deleted one died was in the store before, so it died in the other's map too.
type reaper struct {
	jobs    int
	going   map[uint32]bool // being deleted
	later   map[uint32]bool // could not be deleted: it is tried again after the next checkpoint
	stuck   bool            // something could not be removed, and this was logged
	looking bool            // there is more to look at in the next turn
	waiters []func(error)
	deleted uint64
}

// reap starts to delete what may go.
func (im *Image) reap() {
	x, t := &im.reaper, &im.table
	last := im.checkpoint.last
	holds := im.super.holds
	switch {
	case x.looking:
		return
	case last == nil, mutate.On(mutate.DeadKept), !im.leased(), x.jobs >= reapJobs:
		im.reaped()
		return
	}
	var batch []objectInfo
	before := len(t.kept)
	i, left := 0, t.dead[:0]
	for ; i < len(t.dead) && len(batch) < reapBatch && len(t.kept)-before < reapLook; i++ { // no further: there may be a million
		n := t.dead[i]
		o := t.find(uint64(n))
		switch {
		case o == nil:
			continue
		case x.going[n] || x.later[n]:
		case holds.object(uint64(n), uint64(o.died)):
			t.kept = append(t.kept, n)
			continue
		case uint64(n) > last.Object && !mutate.On(mutate.DeletedEarly):
		case !im.line.own(uint64(n)):
			t.remove(uint64(n)) // an ancestor's, which knows who needs it
			continue
		default:
			batch = append(batch, *o)
		}
		left = append(left, n)
	}
	more := i < len(t.dead)
	if len(left) < i {
		t.dead = append(left, t.dead[i:]...)
	}
	switch {
	case len(batch) == 0 && more:
		x.looking = true
		im.env.AfterFunc(0, func() {
			x.looking = false
			im.reap()
		})
		return
	case len(batch) == 0:
		im.reaped()
		return
	}
	x.jobs++
	r := new(removal)
	dead := make([]garbage, len(batch))
	for i, o := range batch {
		x.going[o.number] = true
		dead[i] = im.deadData(o)
		r.add(dead[i])
	}
	im.remove(r, func() {
		x.jobs--
		for i, o := range batch {
			delete(x.going, o.number)
			im.reapedOne(o, r.ended[dead[i]])
		}
		im.reap()
	})
	im.reap()
}

// deadData is a data object that is garbage, and of which the read cache may have blocks.
type deadData struct {
	object
	cache *readcache.Cache
	name  readcache.Object
	data  uint32 // blocks
	sums  uint32 // of its checksums
}

// deadData returns the garbage that a data object is.
func (im *Image) deadData(o objectInfo) deadData {
	_, sums := im.sumsKey(&o)
	return deadData{object(dataKey(im.id, uint64(o.number), uint64(o.epoch))), im.cache, im.objectName(&o), uint32(sumCount(&o)), sums}
}

// remove implements garbage.
func (d deadData) remove(ctx context.Context, st backend.Store) error {
	if err := d.object.remove(ctx, st); err != nil {
		return err
	}
	d.cache.Forget(d.name, 0, d.data)
	d.cache.Forget(d.name, sumsBlock, d.sums)
	return nil
}

// reapedOne says whether a data object has been deleted.
func (im *Image) reapedOne(o objectInfo, gone bool) {
	x := &im.reaper
	if gone {
		im.table.remove(uint64(o.number))
		x.deleted++
		return
	}
	if x.later == nil {
		x.later = make(map[uint32]bool)
	}
	x.later[o.number] = true
}

// reaped tells those who wait that nothing more can be deleted now.
func (im *Image) reaped() {
	if im.reaper.jobs == 0 && !im.reaper.looking {
		im.reaper.tell(nil)
	}
}

func (x *reaper) tell(err error) {
	waiters := x.waiters
	x.waiters = nil
	for _, fn := range waiters {
		fn(err)
	}
}

// afterReaping calls fn when all that may be deleted now is, or with the error with
// which the image's service ends before.
func (im *Image) afterReaping(fn func(error)) {
	im.reaper.waiters = append(im.reaper.waiters, fn)
	im.reap()
}

// startLeftovers removes what crashes and fenced owners have left in the store, as
// far as the superblock knows of it, now, and again when nothing that they had
// begun can arrive any more. Map objects wait for that, and for an owner that was cut off
// until its point is given up: one that came when those before it had gone would not be
// found (see mapParts).
func (im *Image) startLeftovers() {
	sb := im.super.sb
	if len(sb.Stale) == 0 && len(sb.Prev) == 0 {
		return
	}
	stale, prev := slices.DeleteFunc(slices.Clone(sb.Stale), sb.mayGoOn), slices.DeleteFunc(slices.Clone(sb.Prev), sb.heldManifest)
	first, second := leftovers(sb, im.manifestParts()), leftovers(sb, im.manifestParts())
	for _, x := range stale {
		if c := x.ref(); x.Checkpoint && !sb.published(c) {
			second.add(sb.mapParts(c))
		}
	}
	im.remove(first, func() {
		im.removeLeftovers(second, func() {
			im.changeSuper(func(sb *superblock) { sb.dropStale(stale, prev) }, func() {})
		})
	})
}

// removeLeftovers removes leftovers when leftoverGrace has passed, and again each time
// that it has until none is left, and then calls done.
func (im *Image) removeLeftovers(r *removal, done func()) {
	im.env.AfterFunc(leftoverGrace, func() {
		if im.state != Active {
			return
		}
		r.tries = 0
		im.remove(r, func() {
			if len(r.left) > 0 {
				im.removeLeftovers(r, done)
				return
			}
			done()
		})
	})
}

// removeManifests removes manifests of checkpoints that points went back to which have been
// given up, and takes them off the superblock's list of those that were replaced. What cannot
// be removed now the next start tries again.
func (im *Image) removeManifests(refs []checkpointRef) {
	refs = slices.DeleteFunc(refs, im.super.sb.heldManifest) // by others
	if len(refs) == 0 {
		return
	}
	r := new(removal)
	for _, c := range refs {
		r.add(im.super.sb.manifestParts(c, im.manifestParts()))
	}
	im.remove(r, func() {
		if len(r.left) == 0 {
			im.changeSuper(func(sb *superblock) {
				sb.Prev = slices.DeleteFunc(sb.Prev, func(c checkpointRef) bool { return slices.Contains(refs, c) })
			}, func() {})
		}
	})
}

// manifestParts returns how many parts a manifest of the image may have had.
func (im *Image) manifestParts() int { return 2 + 2*im.manifestSize()/manifestPart }

// manifestSize returns how many bytes a manifest takes now, at most.
func (im *Image) manifestSize() int {
	m := im.objs
	return manifestFixed + len(im.table.list)*manifestObject + len(m.maps)*manifestMap + (len(m.segments[kindWhole])+len(m.segments[kindDelta]))*manifestSegment
}

// leftoverGrace is the time after which nothing that a dead or fenced owner has
// begun can arrive in the store any more.
const leftoverGrace = 2 * time.Minute

// dropStale forgets entries of what may have been left behind, but for those of owners that
// may go on, and manifests that were replaced.
func (s *superblock) dropStale(stale []staleObjects, prev []checkpointRef) {
	s.Stale = slices.DeleteFunc(s.Stale, func(x staleObjects) bool { return slices.Contains(stale, x) && !s.mayGoOn(x) })
	s.Prev = slices.DeleteFunc(s.Prev, func(c checkpointRef) bool { return slices.Contains(prev, c) })
}

// mayGoOn reports whether it is an owner that was cut off who may have left something behind:
// a host that was paused may go on at any time, and put what it had begun before it learns
// that it is fenced.
func (s *superblock) mayGoOn(x staleObjects) bool {
	return slices.ContainsFunc(s.Points, func(p cutOff) bool { return p.Epoch == x.Epoch })
}

// leftovers returns what a superblock says may have been left behind, but for map objects, of
// an image whose manifests may have so many parts.
func leftovers(sb *superblock, parts int) *removal {
	r := new(removal)
	for _, c := range sb.Prev {
		if !sb.heldManifest(c) {
			r.add(sb.manifestParts(c, parts))
		}
	}
	for _, x := range sb.Stale {
		if !x.Checkpoint {
			for n := x.Object; n <= x.Object+uint64(sb.Window); n++ {
				r.add(object(dataKey(sb.Image, n, x.Epoch)))
			}
			continue
		}
		if c := x.ref(); !sb.published(c) { // after all
			r.add(sb.manifestParts(c, parts))
		}
	}
	return r
}

// published reports whether the image, or a point, goes back to a checkpoint.
func (s *superblock) published(c checkpointRef) bool {
	return sameRef(s.Checkpoint, &c) || s.heldManifest(c)
}

// manifestParts names the parts of a manifest. The first is put last, and may be deleted
// first, so the others may be there without it.
func (s *superblock) manifestParts(c checkpointRef, parts int) *objectParts {
	return &objectParts{func(part int) string { return manifestKey(s.Image, c, part) }, parts}
}

// mapParts names the map objects of a checkpoint that was not published. As long as none has
// been deleted, or nothing comes any more and the last go first, fewer are missing before one
// that is there than may be under way at one time.
func (s *superblock) mapParts(c checkpointRef) *objectParts {
	return &objectParts{func(part int) string { return mapKey(s.Image, c, uint32(part)) }, checkpointPuts}
}
