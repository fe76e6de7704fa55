package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

const (
	defaultDetachTimeout = 30 * time.Second
	// closeGrace is what the last steps may take beyond the user's timeout: by
	// then everything is in the store but what came in at the very end.
	closeGrace = 15 * time.Second
	// stopGrace is how long requests may go on, where force is used, once the device
	// is being stopped.
	stopGrace = 2 * time.Second
)

// A logFate is what a write log is good for once its image is detached.
type logFate int

const (
	logDone   logFate = iota // the store has everything: it goes
	logGoesOn                // the next attach goes on from it
	logOver                  // it holds what the store does not have, and cannot go on
)

// detach removes a device for a user. Nothing acknowledged is lost without
// force; with it, what is not in the store by the timeout stays in the log.
func (a *attachment) detach(ctx context.Context, q api.DetachRequest, progress func(api.Progress)) (api.Done, error) {
	if err := a.take(ctx); err != nil {
		return api.Done{}, err
	}
	defer func() { <-a.op }()
	setDefault(&q.Timeout, defaultDetachTimeout)
	return a.detachHeld(ctx, q, progress)
}

// detachHeld is detach for who holds op.
func (a *attachment) detachHeld(ctx context.Context, q api.DetachRequest, progress func(api.Progress)) (api.Done, error) {
	if !q.Force {
		if k, err := a.kernel(); err == nil {
			if h := a.holders(k); len(h) > 0 {
				return api.Done{}, a.busy(h)
			}
		}
	}
	if dk := a.getDisk(); dk != nil && a.record().Phase != phaseDetaching {
		if err := a.destageFirst(ctx, dk, q, progress); err != nil {
			return api.Done{}, err
		}
	}
	a.stopKeeper()
	if a.d.find(a.id) != a {
		return api.Done{}, nil // the keeper has come to the end of it meanwhile, or it never was attached
	}
	done, err := a.takeDown(ctx, q, progress)
	if err != nil && a.d.ctx.Err() == nil {
		a.startKeeper()
	}
	return done, err
}

// destageFirst brings everything into the store while the device still serves,
// so that a user who cannot wait any longer has lost nothing. A flattening ends here: what it
// moves is not to be waited for.
func (a *attachment) destageFirst(ctx context.Context, dk *disk, q api.DetachRequest, progress func(api.Progress)) error {
	dk.pauseFlatten()
	wait, stop := context.WithTimeout(ctx, q.Timeout)
	defer stop()
	err := dk.destage(wait, progress)
	if err == nil || q.Force && ctx.Err() == nil {
		return nil
	}
	if s, serr := dk.stats(wait); serr == nil && lost(s) {
		return nil // it is another's: there is nothing to be destaged any more
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s, _ := dk.stats(ctx)
	if errors.Is(err, errNotInTime) && s != nil && s.MapError != "" {
		// What waits for a checkpoint goes into the store once the image is being closed: see
		// engine.MapPatience.
		return nil
	}
	if errors.Is(err, errNotInTime) && s != nil {
		return fmt.Errorf("%s has %d MiB that are not in the store yet, after %v: it stays; wait longer with --timeout, or leave them in the log with --force (store: %s)",
			a.name(), (s.Dirty+1<<20-1)>>20, q.Timeout, orElse(s.LastStoreError, "no errors"))
	}
	return fmt.Errorf("%s stays: %w", a.name(), err)
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// takeDown removes the device, lets go of the image, and removes what there is
// to remove, in this order. The keeper does not run.
func (a *attachment) takeDown(ctx context.Context, q api.DetachRequest, progress func(api.Progress)) (api.Done, error) {
	k, err := a.kernel()
	if err != nil {
		return api.Done{}, err
	}
	dk := a.getDisk()
	a.mu.Lock()
	state, why := a.state, a.err
	a.mu.Unlock()
	if dk == nil && !q.Force && state != api.StateFailed {
		return api.Done{}, fmt.Errorf("%s is not open (%s): wait for it, or lsdctl del --force removes the device and keeps the log", a.name(), errText(why))
	}
	if err := a.stopDevice(ctx, k, dk, q.Force); err != nil {
		return api.Done{}, err
	}
	a.setState(api.StateDetaching, nil)
	fate, log, remarks := logGoesOn, uuid.Nil, []string(nil)
	if dk != nil {
		if fate, err = a.letGo(ctx, dk, q, progress); err != nil {
			return api.Done{}, err
		}
		if fate == logDone {
			remarks = a.leftOut(ctx, dk)
		}
		log = dk.logID
		dk.release()
		a.setDisk(nil)
	}
	if state == api.StateFailed && permanent(why) {
		fate = logOver
	}
	done, err := a.cleanUp(ctx, k, fate, log)
	done.Remarks = append(remarks, done.Remarks...)
	return done, err
}

// leftOut returns what there is to say of an image that was let go of without a checkpoint,
// nothing of others.
func (a *attachment) leftOut(ctx context.Context, dk *disk) []string {
	s, err := dk.stats(ctx)
	if err != nil || s == nil || s.MapError == "" {
		return nil
	}
	return []string{fmt.Sprintf("everything is in the store, but without a checkpoint of the map, of which a part cannot be read: %s; see lsdctl check %s, and bring back what it names from a copy of the pool", s.MapError, a.record().URL)}
}

func errText(err error) string {
	if err == nil {
		return "it is being taken up"
	}
	return err.Error()
}

// stopDevice stops the block device, which is written down before. A device that
// is in use is left as it is, unless force is set.
func (a *attachment) stopDevice(ctx context.Context, k kernel, dk *disk, force bool) error {
	ctx, stop := context.WithTimeout(ctx, deviceTimeout)
	defer stop()
	before := a.record().Phase
	if err := a.save(func(r *record) { r.Phase = phaseDetaching }); err != nil {
		return err
	}
	var err error
	switch {
	case before == phaseDetaching && (dk == nil || dk.dev == nil):
	case dk != nil && dk.dev != nil:
		if force {
			// The kernel waits for all requests that it has given to us, in a way
			// that nothing ends, not even our death: they must not wait for a store.
			defer time.AfterFunc(stopGrace, dk.refuse).Stop()
		}
		err = dk.dev.Stop(ctx, force)
	default:
		info, ierr := k.Info(ctx, a.id)
		if ierr == nil && a.d.owns(a.record(), info) {
			err = k.Stop(ctx, a.id, force)
		}
	}
	if err == nil || errors.Is(err, ublk.ErrNoDevice) {
		return nil
	}
	var busy *ublk.BusyError
	if errors.As(err, &busy) || dk != nil {
		return errors.Join(err, a.save(func(r *record) { r.Phase = before }))
	}
	return err
}

// letGo destages the rest and gives up the image.
func (a *attachment) letGo(ctx context.Context, dk *disk, q api.DetachRequest, progress func(api.Progress)) (logFate, error) {
	if dk.image == nil || dk.refused.Load() {
		return logGoesOn, nil
	}
	s, err := dk.stats(ctx)
	if err != nil {
		return logGoesOn, err
	}
	if lost(s) && dk.closed == nil {
		return fateOfLost(s), nil
	}
	grace := closeGrace
	if q.Force {
		grace = time.Second // the time was for destageFirst
	}
	if a.record().Phase == phaseDetaching && dk.dev == nil {
		grace = q.Timeout
	}
	wait, stop := context.WithTimeout(ctx, grace)
	defer stop()
	err = dk.close(wait, progress)
	if errors.Is(err, errNotInTime) && !q.Force {
		err = a.closePatiently(ctx, dk, progress, err)
	}
	if err == nil {
		return logDone, nil
	}
	if !q.Force {
		return logGoesOn, fmt.Errorf("%s is gone, but not everything is in the store yet (%w): that goes on, see lsdctl status; lsdctl del --force leaves it in the log", a.name(), err)
	}
	drop, stop := context.WithTimeout(context.Background(), quietTimeout)
	defer stop()
	return logGoesOn, dk.abandon(drop)
}

// closePatiently goes on with a close that has taken too long, as err says, where that waits for
// a part of the map that is damaged, which is bounded.
func (a *attachment) closePatiently(ctx context.Context, dk *disk, progress func(api.Progress), err error) error {
	if s, serr := dk.stats(ctx); serr != nil || s == nil || s.MapError == "" {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, engine.MapPatience+closeGrace)
	defer stop()
	return dk.close(ctx, progress)
}

// fateOfLost is the fate of the log of an image that another host has taken.
func fateOfLost(s *engine.Stats) logFate {
	if s.LogUsed > 0 {
		return logOver
	}
	return logDone
}

// cleanUp removes the device, the record and, if it is not needed, the log of that id.
func (a *attachment) cleanUp(ctx context.Context, k kernel, fate logFate, log uuid.UUID) (api.Done, error) {
	var done api.Done
	rec := a.record()
	del, stop := context.WithTimeout(context.WithoutCancel(ctx), deviceTimeout)
	defer stop()
	if info, err := k.Info(del, a.id); err == nil && a.d.owns(rec, info) {
		err := k.Delete(del, a.id)
		var busy *ublk.BusyError
		switch {
		case errors.As(err, &busy):
			done.Remarks = append(done.Remarks, fmt.Sprintf("%v: the device vanishes when that ends", err))
		case err != nil && !errors.Is(err, ublk.ErrNoDevice):
			return done, err
		}
	}
	if err := a.d.records.remove(rec.ID); err != nil {
		return done, err
	}
	defer a.d.forget(a) // until the log has gone, nobody here may make use of it
	a.logger.Info("detached", "log kept", fate != logDone && rec.Log != "")
	switch {
	case rec.Log == "" || !exists(rec.Log):
	case fate == logGoesOn:
		done.Remarks = append(done.Remarks, fmt.Sprintf("the write log %s is kept, it may hold what the store does not: lsdctl add %s with the same --cache goes on from it", rec.Log, rec.URL))
	case fate == logOver:
		done.Remarks = append(done.Remarks, fmt.Sprintf("the write log %s is kept, it may hold what the store does not: see lsdctl log ls, and lsdctl log salvage", rec.Log))
	default:
		if err := discardLog(del, rec, log); err != nil {
			done.Remarks = append(done.Remarks, fmt.Sprintf("the write log, which is not needed any more, could not be removed: %v", err))
		}
	}
	return done, nil
}

// discardLog removes the log of that id, which holds nothing: its file, or its header
// on a block device. Another lsdd may have gone on from it since it was let go of: then
// it is that one's.
func discardLog(ctx context.Context, rec record, log uuid.UUID) error {
	ctx, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	f, err := writelog.OpenFile(ctx, rec.Log)
	if err != nil {
		return err
	}
	defer f.Close()
	h, _, err := writelog.ReadHeader(f)
	if err != nil {
		return err
	}
	if h.Log != log {
		return errors.New("it has been begun anew meanwhile")
	}
	if !rec.LogDevice {
		return writelog.RemoveFile(rec.Log)
	}
	if _, err := f.WriteAt(f.Buffer(2*writelog.BlockSize), 0); err != nil {
		return err
	}
	return f.Sync()
}

// finishDetach ends, in the background, a detach that ran out of time or whose
// daemon died.
func (a *attachment) finishDetach(ctx context.Context) {
	dk := a.getDisk()
	s, err := dk.stats(ctx)
	if dk.closed != nil || err != nil || !lost(s) {
		if err := dk.close(ctx, func(api.Progress) {}); err != nil {
			if ctx.Err() == nil {
				a.setState(api.StateDetaching, err)
				a.logger.Error("the detached image cannot be closed: lsdctl del --force leaves it in its log", "err", err)
			}
			return
		}
	}
	k, err := a.kernel()
	if err != nil {
		return
	}
	fate := logGoesOn
	if s, err := dk.stats(ctx); err == nil && s != nil {
		fate = fateOfLost(s)
	}
	log := dk.logID
	dk.release()
	a.setDisk(nil)
	if _, err := a.cleanUp(ctx, k, fate, log); err != nil {
		a.setState(api.StateFailed, err)
		a.logger.Error("clean up after a detach", "err", err)
	}
}

// leave readies the attachment for the daemon's end and returns remarks.
func (a *attachment) leave(ctx context.Context, q exitRequest, progress func(api.Progress)) []string {
	if q.detach {
		done, err := a.detach(ctx, api.DetachRequest{Timeout: q.timeout}, progress)
		if err == nil {
			return done.Remarks
		}
		a.logger.Warn("not detached: the device waits for the next daemon", "err", err)
		return append([]string{fmt.Sprintf("%s is left for the next daemon: %s", a.name(), api.OneLine(err))}, a.leaveForNext(ctx, progress)...)
	}
	return a.leaveForNext(ctx, progress)
}

// leaveForNext destages what it can and leaves the device to the next daemon.
func (a *attachment) leaveForNext(ctx context.Context, progress func(api.Progress)) []string {
	select {
	case a.op <- struct{}{}: // never given back: this is the end
	case <-ctx.Done():
		if dk := a.getDisk(); dk != nil && a.record().Phase == phaseDetaching {
			dk.refuse() // see stopDevice
		}
		return []string{fmt.Sprintf("%s was being attached or detached: the next daemon takes that up", a.name())}
	}
	a.stopKeeper()
	dk := a.getDisk()
	if dk == nil {
		return nil
	}
	dk.pauseFlatten()
	var remarks []string
	if err := dk.destage(ctx, progress); err != nil {
		a.logger.Warn("not everything is in the store: the rest waits in the log", "err", err)
		remarks = append(remarks, fmt.Sprintf("%s: not everything is in the store: the rest waits in the log", a.name()))
	}
	drop, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	if err := dk.abandon(drop); err != nil {
		a.logger.Warn("the reactor does not answer", "err", err)
	}
	return remarks
}
