package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// openAsIs opens an image, or a snapshot, read-only, as the store has it now. Its owner may
// go on while it is read, and remove what the superblock had led to: a new checkpoint is the
// sign; or it is larger, and has objects that refer beyond its old end. Then the image is read
// anew. Both are rare beside that.
func openAsIs(ctx context.Context, st backend.Store, sb *superblock, o *OpenOptions) (*Image, error) {
	for {
		im, err := recoverAsIs(ctx, st, sb, o)
		if im == nil {
			return nil, err
		}
		if err == nil || errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrCorrupt) {
			switch now, _, lerr := loadSuperblock(ctx, st, sb.Image); {
			case lerr != nil:
				err = lerr
			case !sameFor(o.Snapshot, sb, now):
				im.dropUnopened()
				o.Progress("reading the image anew, for its owner has gone on")
				sb = now
				continue
			case errors.Is(err, backend.ErrNotFound):
				err = missingPart(err)
			}
		}
		if err != nil {
			im.dropUnopened()
			return nil, err
		}
		return im, nil
	}
}

// recoverAsIs builds the map of an image, or of a snapshot. The image that it returns, if
// any, is to be dropped where there is an error as well.
func recoverAsIs(ctx context.Context, st backend.Store, sb *superblock, o *OpenOptions) (*Image, error) {
	if o.Snapshot == uuid.Nil {
		im := newImage(ctx, st, sb, o)
		return im, im.recoverStore(ctx, sb)
	}
	p := sb.snapshotOf(o.Snapshot)
	switch {
	case p == nil:
		return nil, fmt.Errorf("%w: it has been removed", ErrNoSnapshot)
	case !p.Settled:
		return nil, fmt.Errorf("snapshot %s has been asked for, and not been taken yet", p.Name)
	}
	sb = sb.clone()
	sb.setSectors(p.Sectors)
	im := newImage(ctx, st, sb, o)
	im.takeSuper(sb, "")
	return im, im.recoverPoint(ctx, sb, &p.point)
}

// recoverPoint builds the map as it was at a point; at one that is not settled, up to the
// end of the run.
func (im *Image) recoverPoint(ctx context.Context, sb *superblock, p *point) error {
	if err := im.loadCheckpoint(ctx, p.Checkpoint); err != nil {
		return err
	}
	missing, err := im.replay(ctx, sb, p.Object)
	if err == nil && p.Settled && im.accepted.object < p.Object {
		err = fmt.Errorf("data object %d, which the image as it was needs, is not there any more: %w", max(missing, im.accepted.object+1), backend.ErrNotFound)
	}
	return err
}

// sameFor reports whether two superblocks lead to the same state for whoever opens the
// snapshot, or with uuid.Nil the image itself.
func sameFor(snapshot uuid.UUID, a, b *superblock) bool {
	if snapshot == uuid.Nil {
		return sameStates(a, b)
	}
	p, q := a.snapshotOf(snapshot), b.snapshotOf(snapshot)
	return p != nil && q != nil && p.same(&q.point)
}
