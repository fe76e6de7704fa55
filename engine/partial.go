package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// An image that is made of something else is partial until it is whole, and gets its name
// then: half an image is nobody's, also if the process that fills it dies. GC removes one
// that nobody fills any more.

// touchEvery is how often the superblock of a partial image without an owner says that it is
// being filled.
const touchEvery = time.Minute

// ErrCollected is matched when a partial image is not there any more.
var ErrCollected = errors.New("somebody has removed what there was of it, as lsdctl gc does where it is not being written")

// errWhole is matched when an image is not partial any more: another process has finished it.
var errWhole = errors.New("another command has made it whole already")

// CreatePartial makes an empty image that is going to be filled, and to have that name, which
// is free, and returns its id. Finish gives it the name, Abort removes it.
func CreatePartial(ctx context.Context, st backend.Store, name string, o CreateOptions) (uuid.UUID, error) {
	if err := backend.CheckImageName(name); err != nil {
		return uuid.Nil, err
	}
	return createNameless(ctx, st, name, o, true)
}

// Finish gives a partial image, which is whole and which nobody owns, its name. With a size,
// in bytes, it is made of that size first: nothing may ever have been beyond. It fails with an
// error that matches backend.ErrExists where the name has been taken meanwhile.
func Finish(ctx context.Context, st backend.Store, name string, id uuid.UUID, size uint64) error {
	// From here on GC takes it for one that is just being made.
	err := changePartial(ctx, st, id, func(sb *superblock) error {
		sb.Name = name
		sb.touched()
		if size == 0 || size/SectorSize == sb.Sectors {
			return nil
		}
		if err := sb.checkSize(size); err != nil {
			return err
		}
		sb.Sectors, sb.Span = size/SectorSize, 0
		return nil
	})
	if err == nil {
		err = backend.Link(ctx, st, name, id)
	}
	if err != nil {
		return fmt.Errorf("give image %s its name: %w", name, err)
	}
	// It has a name, so it is whole, whatever the superblock says: whoever attaches it next
	// takes that back if this cannot.
	err = changePartial(ctx, st, id, func(sb *superblock) error {
		sb.whole()
		return nil
	})
	if errors.Is(err, ErrCollected) {
		return fmt.Errorf("give image %s its name: %w", name, err)
	}
	return nil
}

// whole says that the image is not partial any more.
func (s *superblock) whole() { s.Partial, s.Copy = false, nil }

// changePartial changes the superblock of a partial image that is there: not that of one which
// another process has finished, and which somebody may use.
func changePartial(ctx context.Context, st backend.Store, id uuid.UUID, change func(*superblock) error) error {
	err := changeInsistently(ctx, st, id, func(sb *superblock) error {
		switch {
		case sb.Removed:
			return ErrCollected
		case !sb.Partial:
			return errWhole
		}
		return change(sb)
	})
	if errors.Is(err, backend.ErrNotFound) {
		return ErrCollected
	}
	return err
}

// touch says that a partial image is being filled.
func touch(ctx context.Context, st backend.Store, id uuid.UUID) error {
	return changePartial(ctx, st, id, func(sb *superblock) error {
		sb.touched()
		return nil
	})
}

// touched notes in the superblock of a partial image that it is being filled.
func (s *superblock) touched() {
	if s.Partial {
		s.Created = time.Now().UTC().Truncate(time.Second)
	}
}

// Abort removes a partial image that is not going to be finished because of why, also when
// ctx has ended, and its name if it has got that after all. Whoever calls it had the image open,
// if anybody had, and has closed it. It returns why, which may be nil,
// with what could not be removed. One that another process has finished is left alone.
func Abort(ctx context.Context, st backend.Store, id uuid.UUID, why error) error {
	p := patient{st, Real{}}
	ctx = context.WithoutCancel(ctx)
	err := changeInsistently(ctx, p, id, func(sb *superblock) error {
		if !sb.Partial {
			return errWhole
		}
		return sb.remove(&RemoveOptions{Force: true, Snapshots: true, ended: true})
	})
	if err == nil {
		r := reclamation{p, time.Now, reclaimBatch, nil}
		_, err = r.image(ctx, id)
	}
	if err == nil || errors.Is(err, backend.ErrNotFound) || errors.Is(err, errWhole) {
		return why
	}
	err = fmt.Errorf("what was written of image %s could not be removed, which lsdctl gc does, with --remove: %w", id, err)
	if why != nil {
		err = fmt.Errorf("%w; %w", why, err)
	}
	return err
}

// CopyState says how far a partial image is a copy of another one.
type CopyState struct {
	// Source is the image of which it is to be a copy.
	Source uuid.UUID `json:"source"`
	// From is the last snapshot of that of which all is in the store, as of those before;
	// uuid.Nil if there is none.
	From uuid.UUID `json:"from,omitzero"`
	// Count is how many these are. One that has gone since does not go unnoticed, whatever
	// the others are called by now.
	Count int `json:"count,omitempty"`
	// To is the next one, of which what is before the byte Offset is in the store.
	To     uuid.UUID `json:"to,omitzero"`
	Offset uint64    `json:"offset,omitempty"`
}

func (c *CopyState) valid() bool { return c.Source != uuid.Nil && c.Count >= 0 && c.Offset <= MaxSize }

// NoteCopy notes how far the partial image id is a copy, and that it is being filled.
func NoteCopy(ctx context.Context, st backend.Store, id uuid.UUID, c CopyState) error {
	return changePartial(ctx, st, id, func(sb *superblock) error {
		sb.Copy = &c
		sb.touched()
		return nil
	})
}

// CopyOf returns how far the image id is a copy, and the name that it is to have. It fails
// with an error that matches backend.ErrNotFound if there is no such image that is partial
// and a copy.
func CopyOf(ctx context.Context, st backend.Store, id uuid.UUID) (c CopyState, name string, err error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return c, "", err
	}
	if !sb.Partial || sb.Copy == nil || sb.Removed {
		return c, "", fmt.Errorf("copy %s %w", id, backend.ErrNotFound)
	}
	return *sb.Copy, sb.Name, nil
}
