// Package transfer brings into a store what is elsewhere: files, what has changed between
// two states of a disk, and images of other stores.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// A Source gives the contents of a disk: see rawfile.Source.
type Source interface {
	// Next reads the next data into p, and returns where it is, in bytes, and how much; io.EOF
	// after the last. What is between is zeroes. Data is ascending, and begins at a multiple of
	// engine.SectorSize unless it is at the very end.
	Next(ctx context.Context, p []byte) (off uint64, n int, err error)
	// Size returns the disk's size in bytes, and false if it is known at the end alone.
	Size() (uint64, bool)
}

// leaveTimeout bounds the attempt to give an image back that is left because of an error.
const leaveTimeout = 10 * time.Second

// Options says how an image is written.
type Options struct {
	URL string // names the image in messages
	// Progress is told what is being done, and how many bytes of how many have been dealt with;
	// total is 0 if that is not known. May be nil.
	Progress func(what string, done, total uint64)
	Logger   *slog.Logger // as in inproc.Options

	patience, lease time.Duration // as in inproc.Options
}

func (o Options) withDefaults() Options {
	if o.Progress == nil {
		o.Progress = func(string, uint64, uint64) {}
	}
	return o
}

// inproc returns how an image is opened for it.
func (o *Options) inproc() inproc.Options {
	return inproc.Options{URL: o.URL, Logger: o.Logger, Patience: o.patience, Lease: o.lease, Progress: func(what string) { o.Progress(what, 0, 0) }}
}

// Imported is what has been made by Import.
type Imported struct {
	ID   uuid.UUID
	Size uint64 // bytes
	Data uint64 // bytes of them that are not in blocks of zeroes
}

// Import makes a new image of that name of what src gives. The image is of create.Size bytes,
// which must have room for all of src; 0 means the size of src, in whole blocks. It has its
// name when it is whole; if that cannot be, also because ctx ends, nothing is left of it.
func Import(ctx context.Context, st backend.Store, name string, src Source, create engine.CreateOptions, o Options) (Imported, error) {
	o = o.withDefaults()
	im := &importer{src: src, o: o, size: create.Size}
	have, known := src.Size()
	switch {
	case known && create.Size > 0 && have > create.Size:
		return Imported{}, tooSmall(create.Size, have)
	case create.Size == 0 && known:
		im.size = wholeBlocks(have, create.BlockSize)
		create.Size = im.size
	case create.Size == 0:
		create.Size = engine.LargestSize(create.ObjectSize)
	}
	id, err := engine.CreatePartial(ctx, st, name, create)
	if err != nil {
		return Imported{}, err
	}
	made := Imported{ID: id}
	if made.Data, err = im.fill(ctx, st, id, create.Size); err == nil {
		made.Size = im.size
		if made.Size == 0 {
			have, _ = src.Size()
			made.Size = wholeBlocks(have, create.BlockSize)
		}
		err = finish(ctx, st, name, id, made.Size)
	}
	if err != nil {
		o.Progress("removing what was written", 0, 0)
		return Imported{}, engine.Abort(ctx, st, id, err)
	}
	return made, nil
}

func finish(ctx context.Context, st backend.Store, name string, id uuid.UUID, size uint64) error {
	if size == 0 {
		return errors.New("there is nothing in it: an image must have at least one block")
	}
	return engine.Finish(ctx, st, name, id, size)
}

func tooSmall(size, have uint64) error {
	return fmt.Errorf("size %d: there are %d bytes to import", size, have)
}

// wholeBlocks returns n rounded up to whole blocks; a block size of 0 means the usual one.
func wholeBlocks(n uint64, block uint32) uint64 {
	if block == 0 {
		block = 4096
	}
	return (n + uint64(block) - 1) / uint64(block) * uint64(block)
}

// importer fills an image.
type importer struct {
	src  Source
	o    Options
	size uint64 // of the image, as was asked for; 0: that of what comes
}

// fill writes what the source gives to the image id, of so many bytes, and returns how many
// bytes of data there are. The image is nobody's then, and all of it is in the store.
func (x *importer) fill(ctx context.Context, st backend.Store, id uuid.UUID, size uint64) (data uint64, err error) {
	options := x.o.inproc()
	options.Partial = true
	im, err := inproc.Open(ctx, st, id, options)
	if err != nil {
		return 0, err
	}
	w := inproc.NewWriter(ctx, im, true)
	err = x.copy(ctx, w, size)
	w.Stop()
	if err != nil {
		leave(im, err)
		return 0, err
	}
	x.o.Progress("bringing the rest into the store", 0, 0)
	return w.Wrote(), im.Close(ctx)
}

// leave leaves an image as it is, because of why.
func leave(im *inproc.Image, why error) {
	gone, stop := context.WithCancelCause(context.Background())
	stop(why)
	_ = im.Close(gone)
}

// leaveGently closes an image because of why, if possible so that others need not wait for it.
func leaveGently(ctx context.Context, im *inproc.Image, why error) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer stop()
	_ = im.Close(ctx)
	return why
}

// copy writes all that the source gives.
func (x *importer) copy(ctx context.Context, w *inproc.Writer, size uint64) error {
	what := "writing " + x.o.URL
	total, _ := x.src.Size()
	for {
		b, err := w.Buffer()
		if err != nil {
			return err
		}
		off, n, err := x.src.Next(ctx, b)
		if err != nil || off+uint64(n) > size {
			w.Return(b)
		}
		switch {
		case err == io.EOF:
			return w.Wait()
		case err != nil:
			return err
		case off+uint64(n) > size:
			return tooSmall(size, off+uint64(n))
		}
		end := int(wholeBlocks(uint64(n), engine.SectorSize))
		clear(b[n:end])
		if err := w.Write(b[:end], off); err != nil {
			return err
		}
		x.o.Progress(what, off+uint64(n), total)
	}
}
