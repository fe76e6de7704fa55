package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/frame"
	"github.com/lsd-ceph/lsd/internal/plural"
)

// Rename gives the image of the name from, and its superblock, the name to. Who has it
// attached goes on. It fails with an error that matches backend.ErrNotFound where there is
// no image from, and with one that matches backend.ErrExists where there is an image to.
func Rename(ctx context.Context, st backend.Store, from, to string) error {
	id, err := backend.Lookup(ctx, st, from)
	if err != nil {
		return err
	}
	var was *trashed
	switch sb, err := perhapsSuperblock(ctx, st, id); {
	case err != nil:
		return err
	case sb != nil && sb.Removed:
		return removedError(true, nil)
	case sb != nil:
		was = sb.Trash
	}
	if from != to {
		if err := freeName(ctx, st, to); err != nil {
			return err
		}
	}
	if err := backend.Rename(ctx, st, from, to); err != nil {
		return err
	}
	return renamed(ctx, st, id, to, was)
}

// SnapshotsError says that an image is not removed because it has snapshots.
type SnapshotsError struct{ Count int }

// Error returns one line that says what to do.
func (e *SnapshotsError) Error() string {
	return fmt.Sprintf("it has %s, which would go with it: remove them first, or say --snapshots", plural.Count(e.Count, "snapshot"))
}

// RemoveOptions says how an image is removed.
type RemoveOptions struct {
	URL       string // names the image in messages
	Force     bool   // also one that has an owner, or cannot be read
	Snapshots bool   // also one that has snapshots, which go with it
	ended     bool   // the owner is of this process, and all that it had under way has ended
	// unreadable says that it may be one that cannot be read, and trashed, if it is not nil,
	// whether it may be removed, of what its superblock says of the trash.
	unreadable bool
	trashed    func(*trashed) error
	// Progress is told how many objects of how many are gone, where the data of one that cannot
	// be read has to go first; may be nil.
	Progress func(done, total int)
}

// Remove removes the image of that name and returns its id: from its return on there is no such
// image. It takes as much of the store whatever is in the image: the data stays, for Reclaim of
// the id, or GC. Unless the options say otherwise, one that has an owner is refused with an
// OwnedError, and one that has snapshots with a SnapshotsError. A removal that was interrupted
// can be repeated, since the name goes last, or be left to GC. Of an image that cannot be read,
// or has lost its superblock, the data goes first: nothing but its name says what it was.
func Remove(ctx context.Context, st backend.Store, name string, o RemoveOptions) (uuid.UUID, error) {
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		return uuid.Nil, err
	}
	remove := func() error {
		return changeUnowned(ctx, st, id, o.URL, func(sb *superblock) error { return sb.remove(&o) })
	}
	o.unreadable = o.unreadable || o.Force
	if err = remove(); o.unreadable && errors.Is(err, frame.ErrCorrupt) {
		err = remove() // it may be the answer that was damaged
	}
	if errors.Is(err, backend.ErrNotFound) || o.unreadable && err != nil && unreadable(ctx, st, id) {
		if err = noClones(ctx, st, id); err == nil {
			err = removeObjects(ctx, st, id, o.Progress)
		}
		if err != nil {
			err = fmt.Errorf("remove image %s: %w", name, err)
		}
	}
	if err != nil {
		return uuid.Nil, err
	}
	if err := unlinkAll(ctx, st, id); err != nil {
		return uuid.Nil, fmt.Errorf("remove the name %s, whose image is removed: try again: %w", name, err)
	}
	return id, nil
}

// unreadable reports whether the superblock of an image cannot be read, but for one that a later
// lsd has written.
func unreadable(ctx context.Context, st backend.Store, id uuid.UUID) bool {
	_, _, err := loadSuperblock(ctx, st, id)
	return unreadableSuper(err) && !errors.Is(err, frame.ErrVersion)
}

// unlinkAll takes away the names that an image has which has been removed: the superblock may
// have another one than the directory.
func unlinkAll(ctx context.Context, st backend.Store, id uuid.UUID) error {
	for moved := true; moved; {
		names, err := backend.Names(ctx, st)
		if err != nil {
			return err
		}
		moved = false
		for _, e := range names {
			if e.ID != id {
				continue
			}
			err := backend.Unlink(ctx, st, e.Name, id)
			if errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrConflict) {
				moved = true // somebody has renamed it, or is at it too
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

// isRemoved reports whether an image has been removed, and its name perhaps not yet taken away.
// Where that cannot be told it has not.
func isRemoved(ctx context.Context, st backend.Store, id uuid.UUID) (bool, error) {
	sb, err := perhapsSuperblock(ctx, st, id)
	return sb != nil && sb.Removed, err
}

// perhapsSuperblock returns the superblock of an image, nil without an error if it is not there or
// cannot be read.
func perhapsSuperblock(ctx context.Context, st backend.Store, id uuid.UUID) (*superblock, error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if errors.Is(err, backend.ErrNotFound) || unreadableSuper(err) {
		return nil, nil
	}
	return sb, err
}

// removedError returns the error of an image that has been removed, which matches
// backend.ErrNotFound too, or else err.
func removedError(removed bool, err error) error {
	if removed {
		return fmt.Errorf("%w: %w", backend.ErrNotFound, ErrRemoved)
	}
	return err
}

// freeName fails with an error that matches backend.ErrExists where an image has the name. From
// one that has been removed, by somebody who was interrupted at that, it takes the name away.
func freeName(ctx context.Context, st backend.Store, name string) error {
	id, err := backend.Lookup(ctx, st, name)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	removed, err := isRemoved(ctx, st, id)
	switch {
	case err != nil:
		return err
	case removed:
		return unlinkAll(ctx, st, id)
	}
	return fmt.Errorf("image %s %w", name, backend.ErrExists)
}

// remove makes the image one that has been removed, in an epoch that nobody owns.
func (s *superblock) remove(o *RemoveOptions) error {
	switch {
	case s.Removed:
		return errNothing
	case o.trashed != nil && o.trashed(s.Trash) != nil:
		return o.trashed(s.Trash)
	case s.Owner != nil && !o.Force:
		return owned(s.Owner, &OpenOptions{URL: o.URL})
	case len(s.Snapshots) > 0 && !o.Snapshots:
		return &SnapshotsError{len(s.Snapshots)}
	}
	if d := s.mayArrive(o.ended); d > 0 {
		s.Late = time.Now().UTC().Add(d + time.Second).Truncate(time.Second)
	}
	s.Removed, s.Owner, s.Evict = true, nil, nil
	s.Snapshots, s.Points, s.Forgotten = nil, nil, nil
	s.Clones = slices.DeleteFunc(s.Clones, func(p snapshot) bool { return !p.Settled })
	if s.Epoch < maxEpoch {
		s.Epoch++ // nobody has it from here on
	}
	return nil
}

// maxLate bounds what superblocks say of how long something may come: twice as long as it can
// be, for clocks that differ.
const maxLate = 2 * (MaxLease + leftoverGrace)

// mayArrive returns for how long objects may come that owners of the image had begun to put, or
// that the present one, unless it has ended, will put until it finds that it is fenced.
func (s *superblock) mayArrive(ended bool) time.Duration {
	switch {
	case s.Owner != nil && !ended:
		return s.Owner.Lease + leftoverGrace
	case len(s.Stale) > 0 || s.unsettled() || s.Owner == nil && s.Intent != nil:
		return leftoverGrace
	}
	return 0
}

// lateFor returns for how long after now objects may come for an image that has been removed. If
// that cannot be, some clock is wrong, and nothing is waited for.
func (s *superblock) lateFor(now time.Time) time.Duration {
	if left := s.Late.Sub(now); left > 0 && left <= maxLate {
		return left
	}
	return 0
}

// noClones fails if another image is made of objects of the image id, whose superblock cannot
// be read.
func noClones(ctx context.Context, st backend.Store, id uuid.UUID) error {
	s, err := scanStore(ctx, st)
	if err != nil {
		return err
	}
	for _, other := range s.ids() {
		if other == id || !s.super[other] || s.objects[id] == 0 {
			continue
		}
		sb, _, err := loadSuperblock(ctx, st, other)
		if err != nil {
			return fmt.Errorf("whether %s needs anything of it is not known: %w", other, err)
		}
		if sb.Parent == id || slices.ContainsFunc(sb.Origins, func(o origin) bool { return o.Image == id }) {
			return fmt.Errorf("%s is a clone that needs part of it: bring its superblock back from a copy of the pool", sb.Name)
		}
	}
	return nil
}

// removeObjects removes all objects of an image. The superblock goes first, so that
// nobody attaches an image whose objects are on their way out.
func removeObjects(ctx context.Context, st backend.Store, id uuid.UUID, progress func(done, total int)) error {
	if err := st.Delete(ctx, SuperblockKey(id)); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	var keys []string
	if err := st.List(ctx, id.String()+"/", func(key string) error { keys = append(keys, key); return nil }); err != nil {
		return err
	}
	return deleteKeys(ctx, st, keys, progress)
}

// deleteKeys deletes objects, of which any may be gone. progress, if not nil, is told how many
// of them are.
func deleteKeys(ctx context.Context, st backend.Store, keys []string, progress func(done, total int)) error {
	for i, key := range keys {
		if err := st.Delete(ctx, key); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		if progress != nil {
			progress(i+1, len(keys))
		}
	}
	return nil
}
