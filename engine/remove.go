package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// removalTries is how often it is tried in a row to remove something before it is left
// for later: what is garbage must not keep the image from anything.
const removalTries = 5

// garbage is something in the store that nothing needs.
type garbage interface {
	// remove removes it, of which any part may have gone before.
	remove(context.Context, backend.Store) error
}

// object is the key of an object that is garbage.
type object string

func (o object) remove(ctx context.Context, st backend.Store) error {
	err := st.Delete(ctx, string(o))
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	return err
}

// objectParts are the objects that key names, from part 0 on, until as many in a row
// as gap are not there.
type objectParts struct {
	key func(part int) string
	gap int
}

func (p *objectParts) remove(ctx context.Context, st backend.Store) error {
	return deleteParts(ctx, st, p.key, p.gap)
}

// removal is the removal of garbage. One goroutine at a time may use it: the reactor,
// or a worker that tries.
type removal struct {
	left    []garbage        // not removed so far
	ended   map[garbage]bool // removed, or refused for good by the store
	refused []error
	tries   int // in a row that have removed nothing
}

func (r *removal) add(g garbage) { r.left = append(r.left, g) }

// try tries once to remove each of what is left, each for as long as timeout, and
// returns the first error. One that cannot be removed does not keep it from the others.
func (r *removal) try(ctx context.Context, st backend.Store, timeout time.Duration) (first error) {
	if r.ended == nil {
		r.ended = make(map[garbage]bool)
	}
	var failed []garbage
	for len(r.left) > 0 && ctx.Err() == nil {
		g := r.left[0]
		r.left = r.left[1:]
		err := removeOne(ctx, st, g, timeout)
		switch {
		case err == nil:
			r.ended[g] = true
		case errors.Is(err, backend.ErrPermanent):
			r.ended[g] = true
			r.refused = append(r.refused, err)
		default:
			failed = append(failed, g)
			if first == nil {
				first = err
			}
		}
	}
	r.left = append(r.left, failed...) // those that had no turn are first in the next try
	if first == nil && len(r.left) > 0 {
		first = ctx.Err()
	}
	return first
}

func removeOne(ctx context.Context, st backend.Store, g garbage, timeout time.Duration) error {
	ctx, stop := context.WithTimeout(ctx, timeout)
	defer stop()
	return g.remove(ctx, st)
}

// remove removes garbage on a worker, and then calls done, unless the image's service
// ends before. What could not be removed in some tries is left.
func (im *Image) remove(r *removal, done func()) { im.removeTry(r, done, 0) }

// removeTry is the next try of a removal, which waited so often for it in a row.
func (im *Image) removeTry(r *removal, done func(), waits int) {
	left := im.mayDelete()
	if left == 0 {
		im.removeLater(r, done, waits)
		return
	}
	var err error
	before := len(r.left)
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, min(left, im.cfg.StoreTimeout+time.Minute))
		defer stop()
		err = r.try(ctx, im.store, im.cfg.StoreTimeout)
	}, func() {
		if im.state == Fenced || im.state == Released {
			return
		}
		if r.tries++; len(r.left) < before {
			r.tries = 0
		}
		if err != nil && (left > im.cfg.StoreTimeout || !errors.Is(err, context.DeadlineExceeded)) {
			im.countStoreError(err) // else it was the lease that gave so little time
		}
		if len(r.left) > 0 && r.tries < removalTries {
			im.removeLater(r, done, r.tries)
			return
		}
		im.removalEnds(r, err)
		done()
	})
}

// removeLater repeats a removal after a pause, which is longer the more there were.
func (im *Image) removeLater(r *removal, done func(), waits int) {
	im.jobs++
	im.env.AfterFunc(im.backoff(waits), func() {
		im.jobs--
		if im.state != Fenced && im.state != Released {
			im.removeTry(r, done, waits+1)
		}
	})
}

// removalEnds logs what was not removed: what is left once, until a removal leaves
// nothing.
func (im *Image) removalEnds(r *removal, err error) {
	if len(r.refused) > 0 {
		err := errors.Join(r.refused...)
		im.countStoreError(err)
		im.logger.Warn("something dead could not be removed: it wastes space until lsdctl check --repair", "err", err)
	}
	if len(r.left) > 0 && !im.reaper.stuck {
		im.logger.Warn("something dead cannot be removed now: it wastes space until that is possible", "objects", len(r.left), "err", err)
	}
	im.reaper.stuck = len(r.left) > 0
}

// deleteParts deletes the objects that key names, from part 0 on, until as many in a row
// as gap are not there. The last goes first: if it is interrupted, the next one finds
// all that are left.
func deleteParts(ctx context.Context, st backend.Store, key func(part int) string, gap int) error {
	end, err := partsEnd(ctx, st, key, gap)
	if err != nil {
		return err
	}
	var refused []error
	for part := end - 1; part >= 0; part-- {
		switch err := st.Delete(ctx, key(part)); {
		case errors.Is(err, backend.ErrPermanent):
			refused = append(refused, err)
		case err != nil && !errors.Is(err, backend.ErrNotFound):
			return err
		}
	}
	return errors.Join(refused...)
}

// partsEnd returns the number of the part after the last one that is there, or may be: so may
// what the store refuses to tell of. If that is as many in a row as gap, there may be any
// number, and it fails, with an error that is not for good, as the store's was: were the parts
// given up, nobody would look for them again.
func partsEnd(ctx context.Context, st backend.Store, key func(part int) string, gap int) (end int, err error) {
	for part, missing, refused := 0, 0, 0; missing < gap; part++ {
		switch _, err := st.Stat(ctx, key(part)); {
		case errors.Is(err, backend.ErrNotFound):
			missing++
			refused = 0
		case errors.Is(err, backend.ErrPermanent):
			end, missing = part+1, 0
			if refused++; refused == gap {
				return 0, fmt.Errorf("find out how many parts there are: %v", err)
			}
		case err != nil:
			return 0, err
		default:
			end, missing, refused = part+1, 0, 0
		}
	}
	return end, nil
}
