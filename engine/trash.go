package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// MaxDeferment bounds for how long an image in the trash can be kept from removal.
const MaxDeferment = 100 * 365 * 24 * time.Hour

// trashed is what the superblock says of an image in the trash. The directory alone says that it
// is there: an image that has this, and a name, was on its way when somebody was interrupted, or
// has come back so.
type trashed struct {
	ID    uuid.UUID `json:"id"` // of the move, so that whoever takes this away knows which it was
	Since time.Time `json:"since"`
	Until time.Time `json:"until"` // before this it is not removed without force
	Epoch uint64    `json:"epoch"` // of the image then
}

// inTrash reports whether the image is to be in the trash, where no directory says that: not if
// it has been attached since it was moved, for then it may be a name that was in use.
func (s *superblock) inTrash() bool { return s.Trash != nil && s.Trash.Epoch == s.Epoch }

// unknownTrashed says that nothing but its place tells of an image in the trash.
const unknownTrashed = "its superblock does not say until when it is to be kept"

// Trashed is an image in the trash.
type Trashed struct {
	ID    uuid.UUID `json:"id"`
	Name  string    `json:"name"` // that it had
	Size  uint64    `json:"size_bytes"`
	Since time.Time `json:"moved"`
	Until time.Time `json:"kept_until"`         // before this it is not removed without force
	Error string    `json:"error,omitempty"`    // why the rest is not known; it is kept without force
	Owner string    `json:"attached,omitempty"` // the host that has it attached
}

// DeferredError says that an image in the trash is to be kept still.
type DeferredError struct {
	Until time.Time // zero: it is not known until when
}

// Error returns one line that says what to do.
func (e *DeferredError) Error() string {
	if e.Until.IsZero() {
		return unknownTrashed + ": --force removes it all the same"
	}
	return fmt.Sprintf("it is to be kept until %s: --force removes it before", e.Until.Local().Format(time.DateTime))
}

// TrashOptions says how an image is moved to the trash.
type TrashOptions struct {
	URL      string        // names the image in messages
	Keep     time.Duration // for how long it is not removed without force, MaxDeferment at most
	Attached bool          // also one that has an owner, who goes on
}

// MoveToTrash moves the image of that name to the trash, and returns its id. Its name is free
// then; it has its data, snapshots and clones still. The superblock is changed first: after an
// interruption the image has its name, and the move can be repeated. It is kept for the longer
// time then, as it is where two move it at once.
func MoveToTrash(ctx context.Context, st backend.Store, name string, o TrashOptions) (uuid.UUID, error) {
	if o.Keep < 0 || o.Keep > MaxDeferment {
		return uuid.Nil, fmt.Errorf("kept for %v: it must be from 0 to %v", o.Keep, MaxDeferment)
	}
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		return uuid.Nil, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	mark := trashed{ID: uuid.New(), Since: now, Until: now.Add(o.Keep)}
	err = changeUnowned(ctx, st, id, o.URL, func(sb *superblock) error {
		switch {
		case sb.Removed:
			return removedError(true, nil)
		case sb.Trash != nil && sb.Trash.ID == mark.ID:
			return errNothing
		case sb.Owner != nil && !o.Attached:
			return owned(sb.Owner, &OpenOptions{URL: o.URL})
		}
		sb.mark(mark, name)
		return nil
	})
	if err != nil {
		return uuid.Nil, err
	}
	if err := backend.Move(ctx, st, id, name, backend.TrashName(id)); err != nil {
		return uuid.Nil, fmt.Errorf("move %s to the trash: %w", name, err)
	}
	if err := stayMarked(ctx, st, id, mark, name); err != nil {
		return uuid.Nil, fmt.Errorf("%s is in the trash, but for how long it is kept is not known: %w", name, err)
	}
	return id, nil
}

// mark notes that the image is in the trash, or on its way, from the name that it has. Where that
// was said before, the longer time counts.
func (s *superblock) mark(m trashed, name string) {
	if m.Epoch = s.Epoch; s.Trash != nil && s.Trash.Until.After(m.Until) {
		m.Until = s.Trash.Until
	}
	s.Trash, s.Name = &m, name
}

// stayMarked marks an image in the trash again, if that has been taken for what a move that was
// interrupted had left, by somebody who has given the image its name, or another one.
func stayMarked(ctx context.Context, st backend.Store, id uuid.UUID, m trashed, name string) error {
	err := changeInsistently(ctx, st, id, func(sb *superblock) error {
		if sb.Removed || sb.Trash != nil {
			return errNothing
		}
		if _, err := backend.Lookup(ctx, st, backend.TrashName(id)); err != nil {
			return err
		}
		sb.mark(m, name)
		return nil
	})
	if errors.Is(err, backend.ErrNotFound) {
		return nil // it is not there any more
	}
	return err
}

// changeUnowned is changeInsistently, and repeats a change that is refused because of a command
// that has the image, once that has ended.
func changeUnowned(ctx context.Context, st backend.Store, id uuid.UUID, url string, change func(*superblock) error) error {
	err := changeInsistently(ctx, st, id, change)
	var owned *OwnedError
	if errors.As(err, &owned) && owned.Command {
		if err = endCommand(ctx, patient{st, Real{}}, id, OpenOptions{URL: url, Clock: Real{}}); err == nil {
			err = changeInsistently(ctx, st, id, change)
		}
	}
	return err
}

// Trash returns the images in the trash of a store, in the order of their ids. One that cannot be
// read has an error.
func Trash(ctx context.Context, st backend.Store) ([]Trashed, error) {
	names, err := backend.Names(ctx, st)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(e backend.Entry) bool { return !backend.InTrash(e.Name) })
	list := make([]Trashed, len(names))
	err = parallel.Each(checkParallel, len(names), func(i int) (err error) {
		list[i], _, err = describeTrashed(ctx, st, names[i].ID)
		if errors.Is(err, ErrRemoved) {
			list[i].ID, err = uuid.Nil, nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(t Trashed) bool { return t.ID == uuid.Nil })
	slices.SortFunc(list, func(a, b Trashed) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	return list, nil
}

// InTrash returns the image id if it is in the trash, and an error that matches
// backend.ErrNotFound if it is not.
func InTrash(ctx context.Context, st backend.Store, id uuid.UUID) (Trashed, error) {
	if _, err := backend.Lookup(ctx, st, backend.TrashName(id)); err != nil {
		return Trashed{}, err
	}
	t, _, err := describeTrashed(ctx, st, id)
	return t, err
}

// describeTrashed describes an image that has its place in the trash, and returns what its
// superblock says of that, nil if it says nothing. It fails with ErrRemoved where the image has
// been removed but for that place.
func describeTrashed(ctx context.Context, st backend.Store, id uuid.UUID) (Trashed, *trashed, error) {
	t := Trashed{ID: id}
	sb, err := perhapsSuperblock(ctx, st, id)
	switch {
	case err != nil:
		return t, nil, err
	case sb == nil:
		t.Error = "its superblock cannot be read"
		return t, nil, nil
	case sb.Removed:
		return t, nil, removedError(true, nil)
	}
	t.Name, t.Size = sb.Name, sb.Sectors*SectorSize
	if sb.Owner != nil {
		t.Owner = sb.Owner.Host
	}
	if sb.Trash == nil {
		t.Error = unknownTrashed
		return t, nil, nil
	}
	t.Since, t.Until = sb.Trash.Since, sb.Trash.Until
	return t, sb.Trash, nil
}

// RestoreFromTrash gives the image id, which is in the trash, the name back that it had, or, if
// name is not empty, that one, and returns it. It fails with an error that matches
// backend.ErrNotFound where the image is not there, and with one that matches backend.ErrExists
// where another image has the name. One that was interrupted can be repeated: the directory is
// changed first, and so the image has its name at once.
func RestoreFromTrash(ctx context.Context, st backend.Store, id uuid.UUID, name string) (string, error) {
	place := backend.TrashName(id)
	_, lerr := backend.Lookup(ctx, st, place)
	if lerr != nil && !errors.Is(lerr, backend.ErrNotFound) {
		return "", lerr
	}
	sb, err := perhapsSuperblock(ctx, st, id)
	switch {
	case err != nil:
		return "", err
	case sb == nil && lerr != nil:
		return "", lerr
	case sb == nil && name == "":
		return "", fmt.Errorf("the superblock of image %s, which has its name, cannot be read: give it one", id)
	case sb == nil:
		sb = new(superblock)
	case sb.Removed:
		return "", removedError(true, nil)
	case name == "":
		name = sb.Name
	}
	if err := backend.CheckImageName(name); err != nil {
		return "", err
	}
	if lerr != nil {
		if now, err := backend.Lookup(ctx, st, name); sb.Trash == nil || err != nil || now != id {
			return "", lerr
		}
	} else if err := restoreName(ctx, st, id, name); err != nil {
		return "", err
	}
	return name, renamed(ctx, st, id, name, sb.Trash)
}

// restoreName moves an image from the trash to a name.
func restoreName(ctx context.Context, st backend.Store, id uuid.UUID, name string) error {
	if err := freeName(ctx, st, name); err != nil {
		return err
	}
	return backend.Move(ctx, st, id, backend.TrashName(id), name)
}

// renamed notes in the superblock of an image that it has got the name to. was is what said, before
// that, that it was in the trash, or on its way: that goes, unless the image has been moved there
// again.
func renamed(ctx context.Context, st backend.Store, id uuid.UUID, to string, was *trashed) error {
	err := changeInsistently(ctx, st, id, func(sb *superblock) error {
		switch {
		case sb.Removed:
			return removedError(true, nil)
		case sb.Trash != nil && was != nil && sb.Trash.ID == was.ID:
			sb.Trash = nil
		case sb.Trash != nil:
			return errNothing // whoever has moved it there since has noted the name that it had then
		case sb.Name == to:
			return errNothing
		}
		sb.Name = to
		return nil
	})
	if err != nil {
		return fmt.Errorf("it is %s now, but its superblock does not say so, which counts if the directory of names is lost: %w", to, err)
	}
	return nil
}

// RemoveTrashedOptions says how an image in the trash is removed.
type RemoveTrashedOptions struct {
	URL       string                // names the image in messages
	Force     bool                  // also one that is to be kept still, or cannot be read
	At        time.Time             // counts for what is to be kept until then as over; zero: now
	Snapshots bool                  // also one that has snapshots, which go with it
	Progress  func(done, total int) // as of RemoveOptions
}

// RemoveFromTrash removes the image id from the trash, as Remove does: its data is for Reclaim, or
// GC. It fails with an error that matches backend.ErrNotFound where the image is not there, with a
// DeferredError where it is to be kept still, and as Remove does.
func RemoveFromTrash(ctx context.Context, st backend.Store, id uuid.UUID, o RemoveTrashedOptions) error {
	place := backend.TrashName(id)
	if _, err := backend.Lookup(ctx, st, place); err != nil {
		return err
	}
	t, mark, err := describeTrashed(ctx, st, id)
	switch {
	case errors.Is(err, ErrRemoved): // but for its place
	case err != nil:
		return err
	case t.Error != "" && !o.Force:
		return &DeferredError{}
	}
	_, err = Remove(ctx, st, place, RemoveOptions{
		URL: o.URL, Snapshots: o.Snapshots, Progress: o.Progress,
		unreadable: o.Force, trashed: func(now *trashed) error { return o.due(mark, now) },
	})
	if errors.Is(err, errLeftTrash) {
		err = fmt.Errorf("%w: %w", backend.ErrNotFound, err)
	}
	return err
}

// errLeftTrash says that an image is not in the trash any more, or came there anew. It does not
// match backend.ErrNotFound: that an image is there that has no superblock must not be taken from it.
var errLeftTrash = errors.New("it has been restored, or moved to the trash anew")

// due returns nil if an image may be removed of which mark was known, and its superblock says now.
func (o *RemoveTrashedOptions) due(mark, now *trashed) error {
	switch at := o.At; {
	case mark == nil && now == nil:
		return nil // forced, or it would have been refused
	case mark == nil || now == nil || mark.ID != now.ID:
		return errLeftTrash
	case o.Force:
		return nil
	default:
		if at.IsZero() {
			at = time.Now()
		}
		if now.Until.After(at) {
			return &DeferredError{now.Until}
		}
		return nil
	}
}

// DueInTrash returns the images in the trash that are to be kept until at or less.
func DueInTrash(ctx context.Context, st backend.Store, at time.Time) ([]Trashed, error) {
	list, err := Trash(ctx, st)
	return slices.DeleteFunc(list, func(t Trashed) bool { return t.Error != "" || t.Until.After(at) }), err
}
