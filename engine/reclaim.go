package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// ErrRemoved is matched where nothing can be done with an image because it has been removed:
// what is left of it is for its clones, or has not been reclaimed yet.
var ErrRemoved = errors.New("the image has been removed")

// errLostClone is why it cannot be told what the clones of an image need.
var errLostClone = errors.New("a clone is lost")

// reclaimTries bounds how often it is looked anew what the clones of an image that has been
// removed need, because their owners have gone on meanwhile.
const reclaimTries = 10

// reclaimBatch bounds how many objects of an image without clones are listed at one time, so that
// a large one takes no more memory, some 25 MiB, of the daemon that reclaims it.
const reclaimBatch = 1 << 18

// Reclaim removes of an image that has been removed what none of its clones needs; if none
// is left, all of it, and then what only it needed of the image that it was cloned from, if
// that has been removed too. It may be interrupted at any time, and be repeated; what is left
// then, GC finds. Where the image has not been removed, or is gone, it does nothing. progress, if
// not nil, is told how many objects of how many are gone, for each image anew.
//
// late, if it is not 0, is for how long objects of owners that were fenced may still come: so
// long the image's superblock stays, and when that time is over Reclaim, or GC, is to be called
// again. Clocks of hosts are compared for that.
func Reclaim(ctx context.Context, st backend.Store, id uuid.UUID, progress func(done, total int)) (late time.Duration, err error) {
	r := reclamation{patient{st, Real{}}, time.Now, reclaimBatch, progress}
	if late, err = r.image(ctx, id); err != nil {
		return 0, fmt.Errorf("reclaim what image %s, which has been removed, was made of: %w", id, err)
	}
	return late, nil
}

// reclamation reclaims what images were made of that have been removed.
type reclamation struct {
	st       backend.Store
	now      func() time.Time
	batch    int                   // how many objects are listed at one time
	progress func(done, total int) // may be nil
}

// image is Reclaim of the image id.
func (r *reclamation) image(ctx context.Context, id uuid.UUID) (late time.Duration, err error) {
	if id == uuid.Nil {
		return 0, nil
	}
	for {
		sb, _, err := loadSuperblock(ctx, r.st, id)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			return 0, nil
		case err != nil:
			return 0, err
		case !sb.Removed:
			return 0, nil
		}
		late = sb.lateFor(r.now()) // before the list, which is to have what came until then
		gone, err := releaseGone(ctx, r.st, sb)
		if err != nil {
			return 0, err
		}
		if gone {
			continue
		}
		list, kept, err := unneeded(ctx, r.st, sb, r.batch)
		switch {
		case vanished(ctx, r.st, id, err):
			return 0, nil // another one was at it
		case err != nil:
			return 0, err
		}
		if err := deleteKeys(ctx, r.st, list, r.progress); err != nil {
			return 0, err
		}
		switch {
		case len(list) == r.batch && len(sb.Clones) == 0:
			continue // there may be more
		case len(sb.Clones) > 0 && kept > 0:
			_, err := r.image(ctx, sb.Parent) // which may keep something for what has gone now
			return late, err
		case len(sb.Clones) > 0:
			if slices.ContainsFunc(sb.Clones, func(p snapshot) bool { return !p.Made }) {
				return late, nil // somebody is at it
			}
			if passed, err := passOver(ctx, r.st, sb); err != nil || !passed {
				return late, err
			}
			continue
		}
		return late, r.end(ctx, sb, late == 0 || mutate.On(mutate.ReclaimEarly))
	}
}

// end ends the reclamation of an image of which nothing is left, nor any clone: but for its
// superblock, unless that is to go.
func (r *reclamation) end(ctx context.Context, sb *superblock, super bool) error {
	if sb.Parent != uuid.Nil {
		if err := releaseClone(ctx, r.st, sb.Parent, sb.Image); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
	}
	// The superblock last: as long as it is there a repetition comes by its ancestors. What one of
	// these waits for is for whoever reclaims that.
	if _, err := r.image(ctx, sb.Parent); err != nil {
		return err
	}
	// The name first: what has one and no superblock has lost it.
	if err := unlinkAll(ctx, r.st, sb.Image); err != nil || !super {
		return err
	}
	if err := r.st.Delete(ctx, SuperblockKey(sb.Image)); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	return nil
}

// vanished reports whether err means that an image is not there any more: somebody has reclaimed
// it to its end.
func vanished(ctx context.Context, st backend.Store, id uuid.UUID, err error) bool {
	if !errors.Is(err, backend.ErrNotFound) {
		return false
	}
	_, _, lerr := loadSuperblock(ctx, st, id)
	return errors.Is(lerr, backend.ErrNotFound)
}

// releaseGone gives up the states that an image keeps for clones that are not there any more,
// and reports whether there were any.
func releaseGone(ctx context.Context, st backend.Store, sb *superblock) (gone bool, err error) {
	for i := range sb.Clones {
		p := &sb.Clones[i]
		if !p.Made {
			continue
		}
		if _, _, err := loadSuperblock(ctx, st, p.ID); !errors.Is(err, backend.ErrNotFound) {
			continue
		}
		if err := new(cloneNeeds).gone(ctx, st, p); err != nil {
			return false, err
		}
		gone = true
		if err := releaseClone(ctx, st, sb.Image, p.ID); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return gone, err
		}
	}
	return gone, nil
}

// passOver takes an image that has been removed, of which nobody needs anything, out of the
// lineage: its clones are those of the image that it was cloned from, if there is one. Each
// step may be repeated. It reports false if that one has too many clones for it.
func passOver(ctx context.Context, st backend.Store, sb *superblock) (bool, error) {
	full := errors.New("it has as many clones as there can be")
	behind := errors.New("it is not known there any more")
	for _, p := range sb.Clones {
		parent := sb.Parent
		if parent != uuid.Nil {
			err := changeInsistently(ctx, st, parent, func(up *superblock) error {
				from := up.snapshotOf(sb.Image)
				switch {
				case up.snapshotOf(p.ID) != nil:
					return errNothing
				case from == nil:
					return behind
				case len(up.Clones) >= MaxClones:
					return full
				}
				claim := *from
				claim.ID, claim.Name = p.ID, p.Name
				up.Clones = append(up.Clones, claim)
				return nil
			})
			if errors.Is(err, backend.ErrNotFound) || errors.Is(err, behind) {
				// The parent may have been passed over itself, or this image by another one: then
				// it is to be looked at anew.
				switch now, _, lerr := loadSuperblock(ctx, st, sb.Image); {
				case errors.Is(lerr, backend.ErrNotFound):
					return true, nil
				case lerr != nil:
					return false, lerr
				case now.Parent != sb.Parent || now.snapshotOf(p.ID) == nil:
					return true, nil
				case len(now.Origins) == 0:
					err = backend.ErrNotFound // it was being separated from that, which keeps nothing for it any more
				}
			}
			switch {
			case errors.Is(err, backend.ErrNotFound):
				parent = uuid.Nil
			case errors.Is(err, full):
				return false, nil
			case err != nil:
				return false, err
			}
		}
		separated := false
		err := changeInsistently(ctx, st, p.ID, func(clone *superblock) error {
			separated = clone.separated()
			switch {
			case separated, clone.Parent == parent:
				return errNothing
			case clone.Parent != sb.Image:
				return behind
			}
			clone.Parent = parent
			clone.Origins = slices.DeleteFunc(clone.Origins, func(o origin) bool { return o.Image == sb.Image })
			return nil
		})
		if errors.Is(err, behind) {
			return false, nil
		}
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return false, err
		}
		if separated && parent != uuid.Nil {
			if err := releaseClone(ctx, st, parent, p.ID); err != nil && !errors.Is(err, backend.ErrNotFound) {
				return false, err
			}
		}
		if err := releaseClone(ctx, st, sb.Image, p.ID); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return false, err
		}
	}
	return true, nil
}

// unneeded returns the keys of the objects of an image that has been removed that none of its
// clones needs, and how many others there are. Its superblock is neither. What clones need
// only becomes less, but others that remove images pass some over meanwhile: what is found
// counts if no superblock of a removed image on the way has changed. sb becomes what that of
// the image is by then. most bounds, if it is not 0, how many keys there are where there are no
// clones; with clones all are listed, for those that are needed would be again.
func unneeded(ctx context.Context, st backend.Store, sb *superblock, most int) (list []string, kept int, err error) {
	enough := errors.New("enough")
	for range reclaimTries {
		n := &cloneNeeds{of: sb.Image, data: map[checkpointRef]bool{}, maps: map[mapName]bool{}, manifests: map[checkpointRef]bool{}, seen: map[uuid.UUID]backend.Version{}}
		var keys []string
		bounded := most > 0 && len(sb.Clones) == 0 // nor will there be any
		lerr := st.List(ctx, sb.Image.String()+"/", func(key string) error {
			switch {
			case parseKey(sb.Image, key).kind == KindSuperblock:
				return nil
			case bounded && len(keys) == most:
				return enough
			}
			keys = append(keys, key)
			return nil
		})
		if lerr != nil && !errors.Is(lerr, enough) {
			return nil, 0, lerr
		}
		now, version, lerr := loadSuperblock(ctx, st, sb.Image)
		if lerr != nil {
			return nil, 0, lerr
		}
		*sb = *now
		n.seen[sb.Image] = version
		if err = n.add(ctx, st, sb); err == nil {
			same, err := n.unchanged(ctx, st)
			if err != nil {
				return nil, 0, err
			}
			if !same {
				continue
			}
			kept = len(keys)
			list = slices.DeleteFunc(keys, func(key string) bool { return n.needs(parseKey(sb.Image, key)) })
			return list, kept - len(list), nil
		}
		if !errors.Is(err, backend.ErrNotFound) {
			break
		}
	}
	if err == nil {
		err = errors.New("others remove images at the same time: try again")
	}
	return nil, 0, fmt.Errorf("find out what clones need of image %s: %w", sb.Image, err)
}

// cloneNeeds is what the descendants of an image need of it, together.
type cloneNeeds struct {
	of        uuid.UUID
	seen      map[uuid.UUID]backend.Version // superblocks of removed images that were looked at
	named     map[uuid.UUID]bool            // images with names, once that was asked for
	data      map[checkpointRef]bool        // number and epoch
	maps      map[mapName]bool
	manifests map[checkpointRef]bool
}

// unchanged reports whether the superblocks of removed images are as they were looked at.
func (n *cloneNeeds) unchanged(ctx context.Context, st backend.Store) (bool, error) {
	for id, v := range n.seen {
		_, now, err := loadSuperblock(ctx, st, id)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			return false, nil
		case err != nil:
			return false, err
		case now != v:
			return false, nil
		}
	}
	return true, nil
}

// gone fails unless a clone of which there is no superblock has no name either: else it was
// not removed but lost.
func (n *cloneNeeds) gone(ctx context.Context, st backend.Store, p *snapshot) error {
	if n.named == nil {
		named, err := namedImages(ctx, st)
		if err != nil {
			return err
		}
		n.named = named
	}
	if n.named[p.ID] {
		return fmt.Errorf("%w: the superblock of %s, made as %s, is missing, and it has a name: bring it back from a copy of the pool, or remove it with lsdctl rm", errLostClone, p.ID, p.Name)
	}
	return nil
}

// add adds what the clones of an image need, which has been removed: for a clone that has been
// removed as well that is what its clones need.
func (n *cloneNeeds) add(ctx context.Context, st backend.Store, sb *superblock) error {
	for i := range sb.Clones {
		p := &sb.Clones[i]
		clone, version, err := loadSuperblock(ctx, st, p.ID)
		switch {
		case errors.Is(err, backend.ErrNotFound) && p.Made:
			err = n.gone(ctx, st, p)
		case errors.Is(err, backend.ErrNotFound):
			err = n.addState(ctx, st, sb, &p.point) // it is being made
		case err != nil:
			return err
		case clone.Removed:
			n.seen[p.ID] = version
			err = n.add(ctx, st, clone)
		default:
			err = n.addImage(ctx, st, clone)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addImage adds what an image needs: its present state, and its points.
func (n *cloneNeeds) addImage(ctx context.Context, st backend.Store, sb *superblock) error {
	if err := n.addState(ctx, st, sb, &point{Object: maxObjectSeq, Checkpoint: sb.Checkpoint}); err != nil {
		return err
	}
	line := sb.lineage()
	for _, p := range sb.Forgotten { // it is read once more before they go
		if c := p.Checkpoint; c != nil && line.of(c.Object) == n.of {
			n.manifests[*c] = true
		}
	}
	for p := range sb.states() {
		if !p.Settled {
			continue // it will be of what the present state is made of
		}
		if err := n.addState(ctx, st, sb, p); err != nil {
			return err
		}
	}
	return nil
}

// addState adds what a state of an image needs.
func (n *cloneNeeds) addState(ctx context.Context, st backend.Store, sb *superblock, p *point) error {
	line := sb.lineage()
	state := *p
	if sb.Image != n.of && !slices.ContainsFunc(line.origins, func(o origin) bool { return o.Image == n.of }) {
		return nil // it has nothing of it
	}
	if k := len(line.origins); sb.Image != n.of {
		// What comes later is none of the ancestors'.
		state.Object = min(state.Object, max(line.origins[k-1].Last, p.base()))
	}
	parts, err := loadParts(ctx, st, sb, &state)
	if err != nil {
		return err
	}
	for number, o := range parts.data {
		if o.needed && line.of(number) == n.of {
			n.data[checkpointRef{number, o.epoch}] = true
		}
	}
	for m, needed := range parts.maps {
		if needed && line.of(m.at.Object) == n.of {
			n.maps[m] = true
		}
	}
	if c := p.Checkpoint; c != nil && line.of(c.Object) == n.of {
		n.manifests[*c] = true
	}
	return nil
}

func (n *cloneNeeds) needs(k imageKey) bool {
	if mutate.On(mutate.ReclaimTorn) || mutate.On(mutate.ReclaimKept) {
		return mutate.On(mutate.ReclaimKept)
	}
	switch k.kind {
	case KindData:
		return n.data[k.ref]
	case KindManifest:
		return n.manifests[k.ref]
	case KindMap:
		return n.maps[mapName{k.ref, uint32(k.part)}]
	}
	return false
}
