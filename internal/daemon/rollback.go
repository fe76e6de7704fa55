package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

// rollBack makes the image what it was at a snapshot. Its device, which nobody may have open,
// is away meanwhile. If this daemon dies the image is not attached, and as it was or as it is
// to be. A library client that has asked for it, by, keeps its handle: it happens at a point
// where nothing of it is under way.
func (a *attachment) rollBack(ctx context.Context, q api.RollbackRequest, by *handle, progress func(api.Progress)) (api.Image, error) {
	if err := a.take(ctx); err != nil {
		return api.Image{}, err
	}
	defer func() { <-a.op }()
	if rec := a.record(); rec.Null || rec.ReadOnly || rec.Phase != phaseAttached {
		return api.Image{}, fmt.Errorf("%s is not an image that can be rolled back", a.name())
	}
	k, err := a.kernel()
	if err != nil {
		return api.Image{}, err
	}
	if by != nil {
		a.setAside(by, true)
		defer a.setAside(by, false)
	}
	if h := a.holders(k); len(h) > 0 {
		return api.Image{}, a.busy(h)
	}
	// Before the device is taken away for nothing.
	err = a.withImage(func(dk *disk) error {
		if err := a.hasSnapshot(ctx, dk, q.Snapshot); err != nil {
			return err
		}
		return a.destageFirst(ctx, dk, api.DetachRequest{Timeout: defaultDetachTimeout}, progress)
	})
	if err != nil {
		return api.Image{}, err
	}
	a.stopKeeper()
	defer func() {
		if a.d.ctx.Err() == nil && a.d.find(a.id) == a {
			a.startKeeper()
		}
	}()
	dk := a.getDisk()
	if dk == nil || a.d.find(a.id) != a {
		return api.Image{}, fmt.Errorf("%s has ended meanwhile", a.name())
	}
	if by != nil {
		if err := a.pause(ctx, dk, by); err != nil {
			return api.Image{}, err
		}
	}
	if err := a.takeAway(ctx, k, dk, progress); err != nil {
		if by != nil && a.getDisk() == dk {
			dk.hook(by)
		}
		return api.Image{}, err
	}
	// This, too, is brought to an end, whether somebody waits for it or not.
	err = a.rollBackImage(a.d.ctx, q.Snapshot)
	if err := errors.Join(err, a.bringBack(a.d.ctx, k, progress)); err != nil {
		return api.Image{}, err
	}
	a.tellChange()
	a.logger.Info("rolled back", "snapshot", q.Snapshot)
	return a.describe(ctx), nil
}

// hasSnapshot fails unless the image has the snapshot.
func (a *attachment) hasSnapshot(ctx context.Context, dk *disk, name string) error {
	ctx, stop := context.WithTimeout(ctx, lookTimeout)
	defer stop()
	list, err := engine.Snapshots(ctx, dk.store, a.record().ImageID)
	if err == nil && !slices.ContainsFunc(list, func(s engine.Snapshot) bool { return s.Name == name && !s.Pending }) {
		err = fmt.Errorf("%w: %s", engine.ErrNoSnapshot, name)
	}
	return err
}

// takeAway stops the device and lets go of the image; the record and the log stay. Once the
// device has been stopped it goes on also when ctx ends: else the image would end up detached,
// and as it was.
func (a *attachment) takeAway(ctx context.Context, k kernel, dk *disk, progress func(api.Progress)) error {
	if err := a.stopDevice(ctx, k, dk, false); err != nil {
		return err
	}
	ctx = a.d.ctx
	a.setState(api.StateDetaching, nil)
	switch fate, err := a.letGo(ctx, dk, api.DetachRequest{}, progress); {
	case err != nil:
		return err
	case fate != logDone:
		return errTaken
	}
	dk.release()
	a.setDisk(nil)
	del, stop := context.WithTimeout(context.WithoutCancel(ctx), deviceTimeout)
	defer stop()
	if err := k.Delete(del, a.id); err != nil && !errors.Is(err, ublk.ErrNoDevice) {
		return err
	}
	return nil
}

// rollBackImage rolls back the image, which nobody owns.
func (a *attachment) rollBackImage(ctx context.Context, snapshot string) error {
	rec := a.record()
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return err
	}
	st, err := a.connect(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	ctx, stop := context.WithTimeout(ctx, lookTimeout)
	defer stop()
	return engine.Rollback(ctx, st, rec.ImageID, snapshot, engine.RollbackOptions{URL: rec.URL})
}

// bringBack attaches the image anew. If that cannot be done the attachment has ended.
func (a *attachment) bringBack(ctx context.Context, k kernel, progress func(api.Progress)) error {
	err := a.save(func(r *record) { r.Phase = phaseAttaching })
	if err == nil {
		a.setState(api.StateAttaching, nil)
		err = a.bringUp(ctx, bringUpOptions{fresh: true, progress: progress})
	}
	if err == nil || ctx.Err() != nil { // else it is the next daemon's
		return err
	}
	rec := a.record()
	err = fmt.Errorf("%s is not attached any more: lsdctl add %s: %w", a.name(), rec.URL, err)
	if _, cerr := a.cleanUp(ctx, k, logGoesOn, rec.LogID); cerr != nil {
		err = errors.Join(err, cerr)
	}
	return err
}
