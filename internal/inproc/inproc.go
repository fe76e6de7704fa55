// Package inproc runs an image in this process, for commands that write to one that nobody
// has attached. There is no device and no ring, and the write log is in memory: what has been
// written is in the store after Destage, or Close, and not before. If the process dies,
// others can have the image as soon as its lease is over, without force.
package inproc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/memfile"
)

const (
	// logSize is the size of the write log's file: it bounds what has been written and is
	// not in the store.
	logSize = writelog.DataOffset + 16*writelog.SegmentSize
	// mirror is how much of the newest part of the log the image has in its own memory.
	mirror = 2 * writelog.SegmentSize
	// maxRequest bounds one request to the image, in bytes.
	maxRequest = 1 << 20
	// maxDiscard bounds one discard, in bytes: see engine.Image.Shrink.
	maxDiscard = 1 << 30
	// defaultLease is short: if the process dies, others wait for so long.
	defaultLease = 15 * time.Second
	// storePatience is for how long the store may fail without a success in between, by
	// default.
	storePatience = time.Minute
	// watches is how often in that time it is looked at, and a store that is full has only
	// that part of it.
	watches, fullShare = 60, 12
	// quietPoll is the pause between two looks whether an image that has ended is quiet.
	quietPoll = time.Millisecond
)

// errClosed ends the watch over the store.
var errClosed = errors.New("the image is closed")

// Options says how an image is opened.
type Options struct {
	URL string // names the image in messages
	// Partial says that the image is being filled: see engine.OpenOptions.
	Partial bool
	// Patience is for how long a store that fails is tried again before that ends what waits
	// for it; 0 means a minute. One that says that it is full is not tried for so long.
	Patience time.Duration
	// Lease is how long others wait for the image if this process dies; 0 means a default.
	Lease    time.Duration
	Progress func(string) // is told in a few words what takes time; may be nil
	// Logger gets what an operator should know; nil: warnings go to slog.Default, and what
	// is of less weight nowhere.
	Logger *slog.Logger
}

// Image is an open image. Its methods may be called by any goroutine, but for Close.
type Image struct {
	store    backend.Store
	id       uuid.UUID
	epoch    uint64 // of this ownership
	loop     *loop
	image    *engine.Image // the loop's
	patience time.Duration
	failing  time.Time       // when the store was first found to fail, zero while it works; the loop's
	failed   context.Context // ends, with its cause, when the store has failed for too long
	fail     context.CancelCauseFunc
}

// Open takes the image id, which nobody else may have, and returns it when it can be used.
// It fails with an *engine.OwnedError where somebody has it.
func Open(ctx context.Context, st backend.Store, id uuid.UUID, o Options) (*Image, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("name of this host: %w", err)
	}
	log := memfile.New(logSize)
	im, err := engine.Open(ctx, st, id, engine.OpenOptions{
		Log: log, URL: o.URL, Host: host, Volatile: true, Partial: o.Partial, Lease: cmp.Or(o.Lease, defaultLease), Progress: o.Progress,
		Config: engine.Config{Logger: o.Logger, PaceFrom: 1, Burst: -1},
	})
	if err != nil {
		return nil, err
	}
	i := &Image{store: st, id: id, loop: newLoop(), image: im, patience: cmp.Or(o.Patience, storePatience)}
	i.failed, i.fail = context.WithCancelCause(context.Background())
	dev := &device{loop: i.loop, file: log}
	go i.loop.run(func() {
		im.Start(i.loop, dev, make([]byte, mirror))
		i.watch()
	}, im.EndTurn)
	i.call(func() { i.epoch = im.Stats().Epoch })
	return i, nil
}

// watch looks at the store now and then. An image waits for one that fails, since its users
// can; a command cannot do so for ever.
func (i *Image) watch() {
	switch err := i.image.StoreFails(); {
	case err == nil:
		i.failing = time.Time{}
	case i.failing.IsZero():
		i.failing = time.Now()
		fallthrough
	default:
		full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
		if d := time.Since(i.failing); d >= i.patience || full && d >= i.patience/fullShare {
			i.fail(fmt.Errorf("the store fails: %w", err))
		}
	}
	if i.failed.Err() == nil {
		i.loop.AfterFunc(i.patience/watches, i.watch)
	}
}

// Size returns the image's size in bytes.
func (i *Image) Size() uint64 {
	var n uint64
	i.call(func() { n = i.image.Sectors() * engine.SectorSize })
	return n
}

// BlockSize returns the bytes of a logical block of the image.
func (i *Image) BlockSize() (n uint32) {
	i.call(func() { n = i.image.Stats().BlockSize })
	return n
}

// CheckSize fails unless the image may be given so many bytes.
func (i *Image) CheckSize(size uint64) (err error) {
	i.call(func() { err = i.image.CheckSize(size) })
	return err
}

// call runs fn on the loop and waits for it.
func (i *Image) call(fn func()) {
	ran := make(chan struct{})
	i.loop.Post(func() { fn(); close(ran) })
	<-ran
}

// await has begin started on the loop, and waits until it tells how it ended, or until ctx
// ends, or the store has failed for too long: what it began goes on then. Nothing begins for
// a ctx that has ended.
func await(ctx context.Context, i *Image, begin func(fn func(error))) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	i.loop.Post(func() { begin(func(err error) { done <- err }) })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-i.failed.Done():
		return context.Cause(i.failed)
	}
}

// WriteAt writes p at the byte off, both of whole sectors. If ctx ends before it has, p is the
// image's until that is closed.
func (i *Image) WriteAt(ctx context.Context, p []byte, off uint64) error {
	for len(p) > 0 {
		n := min(len(p), maxRequest)
		if err := i.do(ctx, engine.Request{Op: engine.Write, Sector: off / engine.SectorSize, Sectors: uint32(n / engine.SectorSize), Buf: p[:n]}); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
		}
		p, off = p[n:], off+uint64(n)
	}
	return nil
}

// ReadAt fills p from the byte off on, both of whole sectors. If ctx ends before it has, p is
// the image's until that is closed.
func (i *Image) ReadAt(ctx context.Context, p []byte, off uint64) error {
	for len(p) > 0 {
		n := min(len(p), maxRequest)
		if err := i.do(ctx, engine.Request{Op: engine.Read, Sector: off / engine.SectorSize, Sectors: uint32(n / engine.SectorSize), Buf: p[:n]}); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		p, off = p[n:], off+uint64(n)
	}
	return nil
}

// Discard makes n bytes from off on, both of whole sectors, read as zeroes.
func (i *Image) Discard(ctx context.Context, off, n uint64) error {
	for n > 0 {
		k := min(n, maxDiscard)
		if err := i.do(ctx, engine.Request{Op: engine.Discard, Sector: off / engine.SectorSize, Sectors: uint32(k / engine.SectorSize)}); err != nil {
			return fmt.Errorf("discard %d bytes at %d: %w", k, off, err)
		}
		n, off = n-k, off+k
	}
	return nil
}

// done tells of the end of a request.
type done struct{ fn func(error) }

// RequestDone implements engine.Completer.
func (d done) RequestDone(r *engine.Request) {
	if r.Err != 0 {
		d.fn(r.Err)
		return
	}
	d.fn(nil)
}

// do makes one request.
func (i *Image) do(ctx context.Context, r engine.Request) error {
	err := await(ctx, i, func(fn func(error)) {
		r.Done = done{fn}
		i.image.Submit(&r)
	})
	if errors.Is(err, syscall.EIO) {
		why := ""
		i.call(func() { why = i.image.Stats().Why })
		if why != "" {
			err = errors.New(why)
		}
	}
	return err
}

// Destage returns when everything that has been written is in the store.
func (i *Image) Destage(ctx context.Context) error { return await(ctx, i, i.image.Destage) }

// Shrink makes the image of size bytes, of which it has more: see engine.Image.Shrink.
// progress may be nil.
func (i *Image) Shrink(ctx context.Context, size uint64, progress func(done, total uint64)) error {
	return await(ctx, i, func(fn func(error)) { i.image.Shrink(size, progress, fn) })
}

// Flatten moves what the image has in objects of its ancestors into objects of its own: see
// engine.Image.Flatten. If ctx ends before that is done, or the store has failed for too long,
// it is paused: nothing of it goes on then. The error matches engine.ErrPaused where it was.
// progress may be nil.
func (i *Image) Flatten(ctx context.Context, progress func(done, total uint64)) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ended := false // the loop's
	pause := func() {
		if !ended {
			i.image.PauseFlatten()
		}
	}
	err := await(context.WithoutCancel(ctx), i, func(fn func(error)) {
		stop := context.AfterFunc(ctx, func() { i.loop.Post(pause) })
		i.image.Flatten(progress, func(err error) {
			ended = true
			stop()
			fn(err)
		})
	})
	i.call(pause) // where the store has failed
	if errors.Is(err, engine.ErrPaused) && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", err, context.Cause(ctx))
	}
	return err
}

// Refresh has the image do what its superblock asks for.
func (i *Image) Refresh(ctx context.Context) error { return await(ctx, i, i.image.Refresh) }

// Snapshot makes a snapshot of that name of what the image is now. If ctx ends before it is
// there, or the store has failed for too long, it is withdrawn, if that can be. It fails where
// another one has taken the image.
func (i *Image) Snapshot(ctx context.Context, name string) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(i.failed, func() { stop(context.Cause(i.failed)) })()
	_, err := engine.CreateSnapshot(ctx, i.store, i.id, name, engine.SnapshotOptions{Nudge: i.Refresh, Epoch: i.epoch})
	return err
}

// Close writes what is left to the store, gives the image back, and ends what runs of it. If
// ctx ends before, or that cannot be done, also because the store has failed for too long,
// the image is left as if this process had died. It is called once, when nothing else is.
func (i *Image) Close(ctx context.Context) error {
	err := await(ctx, i, i.image.Close)
	if err != nil {
		err = fmt.Errorf("give the image back: %w", err)
	}
	i.fail(errClosed)
	i.call(i.image.Abandon)
	for quiet := false; ; time.Sleep(quietPoll) {
		if i.call(func() { quiet = i.image.Quiet() }); quiet {
			break
		}
	}
	i.loop.stop()
	return err
}
