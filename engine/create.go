package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// CreateOptions says what a new image is like.
type CreateOptions struct {
	Size       uint64 // bytes, a multiple of BlockSize, at most MaxSize
	Empty      bool   // Size may be 0: the image is to grow before anything is made of it
	BlockSize  uint32 // bytes: 512 or 4096; 0 means 4096
	ObjectSize uint32 // bytes of data in a data object, a multiple of 4096; 0 means DefaultObjectSize; see leastObjectSize
}

func (o *CreateOptions) check() error {
	if o.BlockSize == 0 {
		o.BlockSize = 4096
	}
	if o.ObjectSize == 0 {
		o.ObjectSize = DefaultObjectSize
	}
	switch {
	case o.BlockSize != 512 && o.BlockSize != 4096:
		return fmt.Errorf("block size %d: it must be 512 or 4096", o.BlockSize)
	case o.Size == 0 && !o.Empty:
		return errors.New("size 0: an image must have at least one block")
	case o.Size%uint64(o.BlockSize) != 0:
		return fmt.Errorf("size %d is not a multiple of the block size %d", o.Size, o.BlockSize)
	case o.Size > MaxSize:
		return fmt.Errorf("size %d is beyond the limit of %d bytes (64 TiB)", o.Size, uint64(MaxSize))
	case o.ObjectSize < MinObjectSize || o.ObjectSize > MaxObjectSize || o.ObjectSize%4096 != 0:
		return fmt.Errorf("object size %d: it must be from %d to %d bytes, a multiple of 4096", o.ObjectSize, MinObjectSize, MaxObjectSize)
	case o.ObjectSize < leastObjectSize(o.Size):
		return fmt.Errorf("object size %d: an image of %d bytes needs %d at least, so that the list of its objects stays within its limit", o.ObjectSize, o.Size, leastObjectSize(o.Size))
	}
	return nil
}

// Create makes an empty image of that name in the store and returns its id. It
// fails with an error that matches backend.ErrExists when the name is taken, and with one
// that matches ErrLostDirectory in a store that has lost its names.
func Create(ctx context.Context, st backend.Store, name string, o CreateOptions) (uuid.UUID, error) {
	id, err := createNameless(ctx, st, name, o, false)
	if err != nil {
		return uuid.Nil, err
	}
	// The name comes last: an image that can be found is whole.
	if err := backend.Link(ctx, st, name, id); err != nil {
		if errors.Is(err, backend.ErrExists) {
			_ = st.Delete(ctx, SuperblockKey(id)) // lost the race; nobody knows the id
		}
		return uuid.Nil, fmt.Errorf("create image %s: %w", name, err)
	}
	return id, nil
}

// createNameless is Create up to the name, which is free; partial says that the image is
// going to be filled before it gets it.
func createNameless(ctx context.Context, st backend.Store, name string, o CreateOptions, partial bool) (uuid.UUID, error) {
	if err := o.check(); err != nil {
		return uuid.Nil, err
	}
	if err := nameIsFree(ctx, st, name); err != nil {
		return uuid.Nil, err
	}
	id := uuid.New()
	sb := &superblock{
		Image: id, Name: name, Created: time.Now().UTC().Truncate(time.Second), Partial: partial,
		Sectors: o.Size / SectorSize, BlockSize: o.BlockSize, ObjectSize: o.ObjectSize, Window: defaultWindow,
	}
	if o.Size == 0 {
		sb.Span = uint64(o.BlockSize / SectorSize) // there is no map of nothing
	}
	if _, err := st.Swap(ctx, SuperblockKey(id), backend.NoVersion, sb.encode()); err != nil {
		return uuid.Nil, fmt.Errorf("create image %s: %w", name, err)
	}
	return id, nil
}

// nameIsFree fails where a new image cannot have the name.
func nameIsFree(ctx context.Context, st backend.Store, name string) error {
	if err := freeName(ctx, st, name); err != nil {
		return err
	}
	return notLost(ctx, st)
}

// notLost fails with ErrLostDirectory where a new image would hide that the names of
// others are lost. The first image of a store, which somebody is just making, has its
// name in a moment.
func notLost(ctx context.Context, st backend.Store) error {
	const looks, pause = 10, 200 * time.Millisecond
	for n := 1; ; n++ {
		lost, err := LostDirectory(ctx, st)
		switch {
		case err != nil || !lost:
			return err
		case n == looks:
			return ErrLostDirectory
		}
		if err := (Real{}).Sleep(ctx, pause); err != nil {
			return err
		}
	}
}
