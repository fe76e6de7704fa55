package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// flatten moves what the image has in objects of its ancestors into objects of its own. It is
// paused when ctx ends, unlike what makes an image smaller, since that can wait; and when the
// image is detached, which this does not hold up, or the daemon ends.
func (a *attachment) flatten(ctx context.Context, progress func(api.Progress)) (api.Flattened, error) {
	wait, err := a.beginFlatten(ctx)
	if err != nil {
		return api.Flattened{}, err
	}
	moved, err := wait(progress)
	if errors.Is(err, engine.ErrPaused) {
		err = fmt.Errorf("%w: what was moved stays moved, and lsdctl flatten goes on from there", err)
	}
	if err != nil {
		return api.Flattened{}, fmt.Errorf("%s: %w", a.name(), err)
	}
	a.logger.Info("flattened", "moved bytes", moved)
	return api.Flattened{Moved: moved}, nil
}

// beginFlatten begins to flatten the image, and returns what waits for that.
func (a *attachment) beginFlatten(ctx context.Context) (wait func(func(api.Progress)) (uint64, error), err error) {
	if err := a.take(ctx); err != nil {
		return nil, err
	}
	defer func() { <-a.op }()
	if err := a.writable(); err != nil {
		return nil, err
	}
	err = a.withImage(func(dk *disk) (err error) {
		wait, err = dk.flatten(ctx)
		return err
	})
	return wait, err
}

// flatten begins to flatten the image until ctx ends, and returns what waits for the end of
// that, and tells how many bytes were moved.
func (d *disk) flatten(ctx context.Context) (wait func(func(api.Progress)) (uint64, error), err error) {
	var moved uint64 // the reactor's until done
	ended := false   // the reactor's
	done := make(chan error, 1)
	told := make(chan api.Progress, 1)
	tell := func(n, total uint64) {
		moved = n
		select {
		case told <- api.Progress{What: "moving what it has of its ancestors", Done: n, Total: total}:
		default:
		}
	}
	pause := func() {
		if !ended { // else it would be another one that is paused
			d.image.PauseFlatten()
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// If ctx ends meanwhile it begins, and is paused at once: so whoever waits is told of that.
	begin, over := context.WithTimeout(context.WithoutCancel(ctx), deviceTimeout)
	defer over()
	if err := call(begin, d.reactor, func() {
		stop := context.AfterFunc(ctx, func() { d.reactor.Post(pause) })
		d.image.Flatten(tell, func(err error) {
			ended = true
			stop()
			done <- err
		})
	}); err != nil {
		return nil, err
	}
	return func(progress func(api.Progress)) (uint64, error) {
		for {
			select {
			case p := <-told:
				progress(p)
			case err := <-done:
				return moved, err
			case <-d.reactor.Done():
				return 0, d.died()
			}
		}
	}, nil
}

// pauseFlatten ends a flattening that is under way: who waits for it is told.
func (d *disk) pauseFlatten() {
	if d.image != nil {
		d.reactor.Post(d.image.PauseFlatten)
	}
}
