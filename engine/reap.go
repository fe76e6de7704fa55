package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

const (
	reapBatch = 16 // objects that one worker deletes
	reapJobs  = 2  // workers that delete at one time
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
	waiters []func(error)
	deleted uint64
}

// reap starts to delete what may go.
func (im *Image) reap() {
	x, t := &im.reaper, &im.table
	last := im.checkpoint.last
	if last == nil || mutate.On(mutate.DeadKept) || !im.leased() || x.jobs >= reapJobs {
		im.reaped()
		return
	}
	var batch []objectInfo
	kept := t.dead[:0]
	for _, n := range t.dead {
		o := t.find(uint64(n))
		switch {
		case o == nil:
			continue
		case len(batch) < reapBatch && !x.going[n] && (uint64(n) <= last.Object || mutate.On(mutate.DeletedEarly)) && !im.super.sb.held(uint64(n), uint64(o.died)):
			batch = append(batch, *o)
		}
		kept = append(kept, n)
	}
	t.dead = kept
	if len(batch) == 0 {
		im.reaped()
		return
	}
	x.jobs++
	keys := make([]string, len(batch))
	for i, o := range batch {
		x.going[o.number] = true
		keys[i] = dataKey(im.id, uint64(o.number), uint64(o.epoch))
	}
	im.removeKeys(func(ctx context.Context) error { return deleteAll(ctx, im.store, &keys) }, func() {
		x.jobs--
		for _, o := range batch {
			delete(x.going, o.number)
			t.remove(uint64(o.number))
		}
		x.deleted += uint64(len(batch))
		im.reap()
	})
	im.reap()
}

// reaped tells those who wait that nothing more can be deleted now.
func (im *Image) reaped() {
	if im.reaper.jobs == 0 {
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
// begun can arrive any more.
func (im *Image) startLeftovers() {
	sb := im.super.sb
	if len(sb.Stale) == 0 && len(sb.Prev) == 0 {
		return
	}
	stale, prev := len(sb.Stale), slices.Clone(sb.Prev)
	parts := im.manifestParts()
	first, second := leftovers{sb: sb, parts: parts}, leftovers{sb: sb, parts: parts}
	im.removeKeys(func(ctx context.Context) error { return first.remove(ctx, im.store) }, func() {
		im.env.AfterFunc(leftoverGrace, func() {
			if im.state != Active {
				return
			}
			im.removeKeys(func(ctx context.Context) error { return second.remove(ctx, im.store) }, func() {
				im.changeSuper(func(sb *superblock) { sb.dropStale(stale, prev) }, func() {})
			})
		})
	})
}

// manifestParts returns how many parts a manifest of the image may have had.
func (im *Image) manifestParts() int { return 2 + 2*im.manifestSize()/manifestPart }

// manifestSize returns how many bytes a manifest takes now, at most.
func (im *Image) manifestSize() int {
	return manifestFixed + len(im.table.list)*manifestObject + len(im.objs.maps)*manifestMap + len(im.objs.stored)*manifestSegment
}

// leftoverGrace is the time after which nothing that a dead or fenced owner has
// begun can arrive in the store any more.
const leftoverGrace = 2 * time.Minute

// dropStale forgets the first entries of what may have been left behind, but for
// those of owners that were cut off: a host that was paused may go on at any time,
// and put what it had begun before it learns that it is fenced.
func (s *superblock) dropStale(n int, prev []checkpointRef) {
	var kept []staleObjects
	for i, x := range s.Stale {
		cutOff := slices.ContainsFunc(s.Points, func(p point) bool { return p.Epoch == x.Epoch })
		if i >= n || cutOff {
			kept = append(kept, x)
		}
	}
	s.Stale = kept
	s.Prev = slices.DeleteFunc(s.Prev, func(c checkpointRef) bool { return slices.Contains(prev, c) })
}

// leftovers is what a superblock says may have been left behind. One goroutine at a
// time may use it.
type leftovers struct {
	sb    *superblock
	parts int // that a manifest may have
	next  int // entry, first of Prev, then of Stale
}

// remove removes it, from where the last call ended. Something that the store
// refuses to delete does not keep it from the rest.
func (l *leftovers) remove(ctx context.Context, st backend.Store) error {
	var refused []error
	for ; l.next < len(l.sb.Prev)+len(l.sb.Stale); l.next++ {
		err := l.removeNext(ctx, st)
		if errors.Is(err, backend.ErrPermanent) {
			refused = append(refused, err)
		} else if err != nil {
			return err
		}
	}
	return errors.Join(refused...)
}

func (l *leftovers) removeNext(ctx context.Context, st backend.Store) error {
	sb := l.sb
	if l.next < len(sb.Prev) {
		c := sb.Prev[l.next]
		if sb.heldManifest(c) {
			return nil
		}
		return deleteParts(ctx, st, func(part int) string { return manifestKey(sb.Image, c, part) }, 1)
	}
	x := sb.Stale[l.next-len(sb.Prev)]
	if x.Checkpoint {
		return l.removeCheckpoint(ctx, st, checkpointRef{Object: x.Object, Epoch: x.Epoch})
	}
	var keys []string
	for n := x.Object; n <= x.Object+uint64(sb.Window); n++ {
		keys = append(keys, dataKey(sb.Image, n, x.Epoch))
	}
	if err := deleteAll(ctx, st, &keys); err != nil {
		return fmt.Errorf("an object of an earlier owner: %w", err)
	}
	return nil
}

// removeCheckpoint removes what a checkpoint has put before it was published, unless
// it was published after all.
func (l *leftovers) removeCheckpoint(ctx context.Context, st backend.Store, c checkpointRef) error {
	sb := l.sb
	if sb.Checkpoint != nil && *sb.Checkpoint == c || sb.heldManifest(c) {
		return nil
	}
	refused := deleteParts(ctx, st, func(part int) string { return mapKey(sb.Image, c, uint32(part)) }, checkpointPuts)
	if refused != nil && !errors.Is(refused, backend.ErrPermanent) {
		return refused
	}
	// The manifest's first part is put last, so the others may be there without it.
	err := deleteParts(ctx, st, func(part int) string { return manifestKey(sb.Image, c, part) }, l.parts)
	if err != nil && !errors.Is(err, backend.ErrPermanent) {
		return err
	}
	return errors.Join(refused, err)
}
