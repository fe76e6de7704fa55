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

// CloneOptions says how a clone is made.
type CloneOptions struct {
	// Snapshot is the name of the snapshot that is cloned; "" means the image as it is now,
	// which is then as with CreateSnapshot.
	Snapshot string
	SnapshotOptions
}

// Clone makes a new image of that name in the store, which begins as a state of the image id,
// and returns its id. It copies nothing: the clone is made of what that state is made of, and
// of what is written to it. The image keeps the state for it, as it does for a snapshot; that
// may be removed. It fails with an error that matches backend.ErrExists when the name is
// taken, and with ErrNoSnapshot where there is no such snapshot. When ctx ends before the owner
// of the image has made the state, nothing is made.
func Clone(ctx context.Context, st backend.Store, id uuid.UUID, name string, o CloneOptions) (uuid.UUID, error) {
	o.SnapshotOptions = o.SnapshotOptions.withDefaults()
	if err := backend.CheckImageName(name); err != nil {
		return uuid.Nil, err
	}
	if err := nameIsFree(ctx, st, name); err != nil {
		return uuid.Nil, err
	}
	c := &cloner{snapshotMaker: newSnapshotMaker(st, id, name, o.SnapshotOptions), of: o.Snapshot}
	c.add = c.addClone
	if err := c.run(ctx); err != nil {
		return uuid.Nil, err
	}
	return c.want.ID, nil
}

// cloner makes one clone. The image first gets the state that it is to begin with, as it gets
// a snapshot; then the clone its superblock; then the image notes that it is there; and the
// name comes last. So whoever finds a state without a clone, or a clone without a name, can
// tell that nobody has it.
type cloner struct {
	*snapshotMaker
	of     string // the snapshot that is cloned, or ""
	naming bool   // it may have its name
}

// addClone adds the state that the clone begins with.
func (c *cloner) addClone(sb *superblock, p snapshot) error {
	if len(sb.Clones) == MaxClones {
		return fmt.Errorf("the image has %d clones, which is the limit", MaxClones)
	}
	if c.of != "" {
		from := sb.snapshotNamed(c.of)
		switch {
		case from == nil:
			return fmt.Errorf("%w: %s", ErrNoSnapshot, c.of)
		case !from.Settled:
			return fmt.Errorf("snapshot %s has been asked for, and not been taken yet", c.of)
		}
		p.point, p.Sectors, p.Last, p.Of = from.point, from.Sectors, from.Last, from.ID
	}
	sb.Clones = append(sb.Clones, p)
	return nil
}

func (c *cloner) run(ctx context.Context) error {
	at, err := c.make(ctx)
	if err != nil {
		return err
	}
	switch err := c.finish(ctx, at); {
	case err == nil:
		return nil
	case c.naming && !errors.Is(err, backend.ErrExists):
		// A name that comes late would be one of nothing.
		return fmt.Errorf("%w; it may have got its name all the same: see lsdctl ls; if not, lsdctl gc removes what was made of it", err)
	default:
		return c.undo(ctx, err)
	}
}

// finish makes the clone of the state that the image keeps for it.
func (c *cloner) finish(ctx context.Context, at *snapshot) error {
	parent, _, err := loadSuperblock(ctx, c.st, c.image)
	if err != nil {
		return err
	}
	sb, err := parent.cloneAt(at)
	if err != nil {
		return err
	}
	err = c.st.try(ctx, func() error {
		_, err := c.st.Swap(ctx, SuperblockKey(sb.Image), backend.NoVersion, sb.encode())
		if errors.Is(err, backend.ErrConflict) {
			return nil // an attempt of which nothing was known
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("make the superblock of the clone: %w", err)
	}
	if err := CopyMetadata(ctx, c.st, c.image, c.st, sb.Image); err != nil {
		return fmt.Errorf("give the clone the metadata of the image: %w", err)
	}
	if err := c.note(ctx); err != nil {
		return err
	}
	c.naming = true
	return backend.Link(ctx, c.st, c.want.Name, sb.Image)
}

// note notes that the clone is there.
func (c *cloner) note(ctx context.Context) error {
	return changeInsistently(ctx, c.st, c.image, func(sb *superblock) error {
		p := sb.snapshotOf(c.want.ID)
		switch {
		case p == nil:
			return errors.New("somebody has cleaned up what was made of the clone so far: try again")
		case p.Made:
			return errNothing
		}
		p.Made = true
		return nil
	})
}

// undo removes what there is of a clone that has not come to be because of why.
func (c *cloner) undo(ctx context.Context, why error) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer stop()
	err := backend.Unlink(ctx, c.st, c.want.Name, c.want.ID)
	if errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrConflict) {
		err = nil
	}
	if err == nil { // the superblock last: with it gc finds the rest
		err = deleteKeys(ctx, c.st, []string{attributesKey(c.want.ID), SuperblockKey(c.want.ID)}, nil)
	}
	if err == nil {
		err = releaseClone(ctx, c.st, c.image, c.want.ID)
	}
	if err != nil {
		return fmt.Errorf("%w; what was made of it could not be removed, which lsdctl gc does, with --remove, an hour from now: %w", why, err)
	}
	return why
}

// releaseClone says that the image need not keep any more what its clone begins with.
func releaseClone(ctx context.Context, st backend.Store, image, clone uuid.UUID) error {
	return changeInsistently(ctx, st, image, func(sb *superblock) error {
		if !slices.ContainsFunc(sb.Clones, func(p snapshot) bool { return p.ID == clone }) {
			return errNothing
		}
		sb.dropSnapshot(clone)
		return nil
	})
}

// cloneAt returns the superblock of the clone that begins at a state of the image. Its own
// objects have numbers, and its ownerships epochs, that go on from those; a rollback, which is
// none, marks where.
func (s *superblock) cloneAt(at *snapshot) (*superblock, error) {
	if s.Epoch == maxEpoch || at.Object >= lastWritten {
		return nil, errors.New("the image has used up its numbers for objects or ownerships: copy it to a new one")
	}
	c := &superblock{
		Image: at.ID, Name: at.Name, Created: time.Now().UTC().Truncate(time.Second), Sectors: at.Sectors, BlockSize: s.BlockSize, ObjectSize: s.ObjectSize, Window: s.Window,
		Epoch: s.Epoch + 1, Checkpoint: at.Checkpoint, Seq: at.Seq, Parent: s.Image,
	}
	if span := s.span(); span > c.Sectors {
		c.Span = span
	}
	first := at.Object + 1
	for _, o := range s.Origins {
		if o.Last < at.Object {
			c.Origins = append(c.Origins, o)
		}
	}
	if at.Object > 0 {
		c.Origins = append(c.Origins, origin{s.Image, at.Object})
	}
	for _, e := range s.Epochs {
		if e.Object < first {
			c.Epochs = append(c.Epochs, e)
		}
	}
	c.Epochs = append(c.Epochs, epochStart{Epoch: c.Epoch, Object: first, Seq: at.Last + 1})
	for _, b := range s.Rollbacks {
		if b.Object < first {
			c.Rollbacks = append(c.Rollbacks, b)
		}
	}
	c.Rollbacks = append(c.Rollbacks, rollback{Object: first, From: at.Object, Seq: at.Last})
	c.pruneRollbacks()
	return c, nil
}
