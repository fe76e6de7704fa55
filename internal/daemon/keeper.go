package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

const (
	// maxRetry bounds the pause between two attempts to take an image up.
	maxRetry = 10 * time.Second
	// damagedTries is how many attempts to take an image up must meet damage in its
	// store, one after the other, for that to be believed: an answer can also have been
	// damaged on its way.
	damagedTries = 5
	// soon is how long a reactor must have worked to be replaced at once.
	soon = 2 * time.Second
)

// startKeeper starts the keeper. The caller holds op, or nobody else knows a.
func (a *attachment) startKeeper() {
	ctx, stop := context.WithCancel(a.d.ctx)
	a.stop, a.kept = stop, make(chan struct{})
	go func(kept chan struct{}) {
		defer close(kept)
		defer stop()
		a.keep(ctx)
	}(a.kept)
}

// stopKeeper ends the keeper and waits for it. The caller holds op.
func (a *attachment) stopKeeper() {
	if a.kept == nil {
		return
	}
	a.stop()
	<-a.kept
	a.kept = nil
}

// keep is the keeper.
func (a *attachment) keep(ctx context.Context) {
	pause := a.d.recRetry
	for {
		if a.getDisk() == nil {
			began := time.Now()
			if !a.takeUp(ctx) {
				if ctx.Err() != nil || a.over() || !sleep(ctx, pause) {
					return
				}
				pause = min(2*pause, maxRetry)
				continue
			}
			if !a.over() {
				a.logger.Info("taken up", "took", time.Since(began).Round(time.Millisecond))
			}
		}
		began := time.Now()
		if a.record().Phase == phaseDetaching {
			dk := a.getDisk()
			if a.finishDetach(ctx); ctx.Err() != nil || a.getDisk() != dk || !dk.dead() {
				return
			}
			a.drop(dk, dk.reactor.Err())
		} else if !a.awaitEnd(ctx) {
			return
		}
		if time.Since(began) > soon {
			pause = a.d.recRetry
		} else if !sleep(ctx, pause) {
			return
		} else {
			pause = min(2*pause, maxRetry)
		}
	}
}

// over reports that nothing more is to be tried.
func (a *attachment) over() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state == api.StateFailed
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// takeUp tries once to bring up what is recorded, and reports whether that is
// done. What cannot be brought up ever gets errors for its users: they would
// wait for all time.
func (a *attachment) takeUp(ctx context.Context) bool {
	err := a.bringUp(ctx, bringUpOptions{progress: func(api.Progress) {}})
	if errors.Is(err, engine.ErrCorrupt) {
		a.damaged++
	} else {
		a.damaged = 0
	}
	if err == nil {
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	a.mu.Lock()
	before := a.err
	a.mu.Unlock()
	if before == nil || before.Error() != err.Error() {
		a.logger.Error("cannot take it up", "err", err)
	}
	a.setState(api.StateRecovering, err)
	fresh := a.record().Phase == phaseAttaching
	unmade := fresh && errors.Is(err, errLogGone) // the daemon ended before it had made the log
	if !unmade && !permanent(err) || a.damaged > 0 && a.damaged < damagedTries {
		return false
	}
	if fresh {
		a.logger.Warn("it had not been attached yet when the daemon ended: its record is removed")
		a.scrap(ctx)
		return false
	}
	return a.fail(ctx, err)
}

// permanent reports that trying again makes no sense.
func permanent(err error) bool {
	var owned *engine.OwnedError
	var stale *engine.StaleLogError
	return errors.As(err, &owned) || errors.As(err, &stale) || errors.Is(err, engine.ErrForeignLog) ||
		errors.Is(err, engine.ErrCorrupt) || errors.Is(err, writelog.ErrCorrupt) || errors.Is(err, errImageGone) || errors.Is(err, errTaken) ||
		errors.Is(err, engine.ErrNoSnapshot)
}

var (
	errImageGone = errors.New("the image has been removed from its store")
	errTaken     = errors.New("another host had the image meanwhile: what this host's users know of it is out of date")
	errLogGone   = errors.New("its write log is not there")
)

// fail gives the device's users errors from here on, because of why. It reports whether
// there is a device that does so. If that cannot be done now, all of it is tried again:
// they would wait for all time.
func (a *attachment) fail(ctx context.Context, why error) bool {
	dk, err := a.serveErrors(ctx)
	if err != nil {
		a.logger.Error("cannot give errors to the users of the device", "err", err)
		return false
	}
	a.setState(api.StateFailed, why)
	if dk == nil {
		return false
	}
	a.setDisk(dk)
	return true
}

// serveErrors recovers the record's device with a disk that has errors for everything,
// and returns that, or nil if nobody uses the device.
func (a *attachment) serveErrors(ctx context.Context) (*disk, error) {
	k, err := a.kernel()
	if err != nil {
		return nil, err
	}
	rec := a.record()
	switch info, err := k.Info(ctx, rec.ID); {
	case errors.Is(err, ublk.ErrNoDevice), err == nil && (info.State == ublk.StateDead || !a.d.owns(rec, info)):
		return nil, nil
	case err != nil:
		return nil, err
	}
	dk, err := emptyDisk(rec, a.logger)
	if err != nil {
		return nil, err
	}
	dev, err := k.Recover(ctx, rec.ID)
	if err == nil {
		err = dk.serve(ctx, dev, &rec)
	}
	if err != nil {
		dk.release()
		return nil, err
	}
	return dk, nil
}

// scrap removes what is left of an attachment that never came to be.
func (a *attachment) scrap(ctx context.Context) {
	ctx, stop := context.WithTimeout(ctx, deviceTimeout) // somebody may have it open
	defer stop()
	rec := a.record()
	if k, err := a.kernel(); err == nil {
		if info, err := k.Info(ctx, rec.ID); err == nil && a.d.owns(rec, info) {
			if err := k.Delete(ctx, rec.ID); err != nil {
				a.logger.Error("remove the device", "err", err)
			}
		}
	}
	if err := a.d.records.remove(rec.ID); err != nil {
		a.logger.Error("clean up", "err", err)
	}
	a.setState(api.StateFailed, nil)
	a.d.forget(a)
}

// awaitEnd waits until the disk has died, takes it away and reports true; or
// until ctx ends.
func (a *attachment) awaitEnd(ctx context.Context) bool {
	dk := a.getDisk()
	if dk == nil { // failed, without a device
		<-ctx.Done()
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-dk.dev.Done(): // also when the reactor died
		if dk.dev.Err() == nil {
			a.setState(api.StateGone, errors.New("another program has stopped the block device"))
			a.logger.Warn("another program has stopped the block device: lsdctl del it")
			select {
			case <-ctx.Done():
				return false
			case <-dk.reactor.Done():
			}
		}
	}
	a.drop(dk, dk.dev.Err())
	return true
}

// drop takes a disk away that has died of err.
func (a *attachment) drop(dk *disk, err error) {
	a.logger.Error("the image's reactor died: the image is opened anew, its users wait", "err", err)
	a.setState(api.StateRecovering, fmt.Errorf("its reactor died: %w", orNil(err)))
	a.setDisk(nil)
	a.mu.Lock()
	a.restarts++
	a.mu.Unlock()
	ctx, stop := context.WithTimeout(context.Background(), quietTimeout)
	defer stop()
	_ = dk.abandon(ctx) // where the device failed and the reactor lives
	dk.release()
}

// orNil makes an error of none, for a message.
func orNil(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}
