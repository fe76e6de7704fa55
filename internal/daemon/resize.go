package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"golang.org/x/sys/unix"
)

// resize gives the image another size, and its device as far as the kernel can do that. While
// it waits for the store the attachment may be detached, which ends it.
func (a *attachment) resize(ctx context.Context, q api.ResizeRequest, progress func(api.Progress)) (api.Image, error) {
	dk, wait, err := a.beginResize(ctx, q)
	if err != nil {
		return api.Image{}, err
	}
	err = wait(progress)
	if ferr := a.endResize(context.WithoutCancel(ctx), dk); err == nil {
		err = ferr
	}
	if err != nil {
		return api.Image{}, fmt.Errorf("%s: %w", a.name(), err)
	}
	a.logger.Info("resized", "bytes", q.Size)
	return a.describe(ctx), nil
}

// beginResize begins to give the image of the disk that it returns another size, and returns
// what waits for that.
func (a *attachment) beginResize(ctx context.Context, q api.ResizeRequest) (dk *disk, wait func(func(api.Progress)) error, err error) {
	if err := a.take(ctx); err != nil {
		return nil, nil, err
	}
	defer func() { <-a.op }()
	if err := a.writable(); err != nil {
		return nil, nil, err
	}
	err = a.withImage(func(d *disk) (err error) {
		dk = d
		size, err := dk.size(ctx)
		if err == nil {
			err = dk.checkSize(ctx, q.Size)
		}
		switch {
		case err != nil:
			return err
		case q.Size >= size:
			wait = func(progress func(api.Progress)) error { return a.grow(ctx, dk, q.Size, progress) }
			return nil
		case !q.Shrink:
			return engine.ErrShrinks
		}
		wait, err = a.shrink(ctx, dk, q.Size)
		return err
	})
	return dk, wait, err
}

// endResize gives the device the size that the image has by now, unless it has been taken away.
func (a *attachment) endResize(ctx context.Context, dk *disk) error {
	if a.fits(dk) {
		return nil
	}
	if err := a.take(ctx); err != nil {
		return err
	}
	defer func() { <-a.op }()
	if a.getDisk() != dk || a.d.find(a.id) != a {
		return nil
	}
	if err := a.fitDevice(ctx, dk); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	return nil
}

// grow makes the image larger.
func (a *attachment) grow(ctx context.Context, dk *disk, size uint64, progress func(api.Progress)) error {
	if err := engine.Grow(ctx, dk.store, a.record().ImageID, size); err != nil {
		return err
	}
	return dk.refresh(ctx, progress)
}

// shrink begins to make the image smaller. Its device is first: whoever uses that is to see at
// once what there is not any more.
func (a *attachment) shrink(ctx context.Context, dk *disk, size uint64) (wait func(func(api.Progress)) error, err error) {
	a.fit.Lock()
	if err = errNotOpen; dk.dev != nil {
		err = dk.dev.Resize(ctx, size)
	}
	a.fit.Unlock()
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, errors.New("this kernel cannot change the size of a device: lsdctl del it first")
	}
	if err == nil {
		wait, err = dk.shrink(ctx, size)
	}
	if err != nil {
		if ferr := a.fitDevice(context.WithoutCancel(ctx), dk); ferr != nil {
			err = errors.Join(err, ferr)
		}
	}
	return wait, err
}

// fitDevice gives the device of a disk the size of its image. The error matches
// unix.EOPNOTSUPP where the kernel cannot do that: then the device gets it when the image is
// attached the next time.
func (a *attachment) fitDevice(ctx context.Context, dk *disk) error {
	a.fit.Lock()
	defer a.fit.Unlock()
	if dk.image == nil || dk.dev == nil {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, deviceTimeout)
	defer stop()
	size, err := dk.size(ctx)
	if err != nil {
		return err
	}
	if dk.dev.Params().SizeBytes != size {
		if err := dk.dev.Resize(ctx, size); err != nil {
			return err
		}
		a.logger.Info("the device has another size", "bytes", size)
	}
	if a.record().Size == size {
		return nil
	}
	return a.save(func(r *record) { r.Size = size })
}

// resized is told on the reactor that the image has another size than before, in sectors.
func (a *attachment) resized(sectors uint64) {
	a.tellSize(sectors * engine.SectorSize)
	go a.follow()
}

// follow gives the device the size that the image has got, unless it has that already.
func (a *attachment) follow() {
	if dk := a.getDisk(); dk == nil || a.fits(dk) {
		return // without a disk it is brought up with the size that it has by then
	}
	select {
	case a.op <- struct{}{}:
	case <-a.d.ctx.Done():
		return
	}
	defer func() { <-a.op }()
	if dk := a.getDisk(); dk != nil && a.d.find(a.id) == a {
		a.logFit(a.fitDevice(a.d.ctx, dk))
	}
}

// fits reports whether the device of a disk, and its record, have the size of its image.
func (a *attachment) fits(dk *disk) bool {
	if dk.image == nil {
		return true // it serves errors, whatever its size
	}
	ctx, stop := context.WithTimeout(a.d.ctx, statsTimeout)
	defer stop()
	size, err := dk.size(ctx)
	a.fit.Lock()
	defer a.fit.Unlock()
	return err == nil && dk.dev != nil && dk.dev.Params().SizeBytes == size && a.record().Size == size
}

// logFit logs why the device has not the size of its image.
func (a *attachment) logFit(err error) {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		a.logger.Warn("the image has another size, which its device gets when it is attached the next time: this kernel cannot change it")
	case err != nil:
		a.logger.Error("give the device the size of its image", "err", err)
	}
}

// size returns the size of the image, which is to be there, in bytes.
func (d *disk) size(ctx context.Context) (n uint64, err error) {
	err = call(ctx, d.reactor, func() { n = d.image.Sectors() * engine.SectorSize })
	return n, err
}

// checkSize fails unless the image may be given a size now.
func (d *disk) checkSize(ctx context.Context, size uint64) error {
	var wrong error
	err := call(ctx, d.reactor, func() { wrong = invalid(d.image.CheckSize(size)) })
	return cmp.Or(err, wrong)
}

// shrink begins to make the image smaller, and returns what waits for that. What it began goes
// on when ctx ends.
func (d *disk) shrink(ctx context.Context, size uint64) (wait func(func(api.Progress)) error, err error) {
	done := make(chan error, 1)
	discarded := make(chan api.Progress, 1)
	tell := func(n, total uint64) {
		select {
		case discarded <- api.Progress{What: "discarding what goes", Done: n, Total: total}:
		default:
		}
	}
	if err := call(ctx, d.reactor, func() { d.image.Shrink(size, tell, func(err error) { done <- err }) }); err != nil {
		return nil, err
	}
	return func(progress func(api.Progress)) error {
		for {
			select {
			case p := <-discarded:
				progress(p)
			case err := <-done:
				return err
			case <-d.reactor.Done():
				return d.died()
			case <-ctx.Done():
				return fmt.Errorf("it goes on without you: see lsdctl status: %w", context.Cause(ctx))
			}
		}
	}, nil
}

// sizeAdvice says what to do about a device that has not the size of its image.
func sizeAdvice(im api.Image) string {
	if im.Stats == nil || im.Stats.Size == im.Size || im.State != api.StateActive {
		return ""
	}
	return fmt.Sprintf("the image has %s, its device %s until it is attached the next time (lsdctl del, then add): this kernel cannot change that", bytesize.Human(im.Stats.Size), bytesize.Human(im.Size))
}
