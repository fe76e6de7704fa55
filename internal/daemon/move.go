package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// What is attached read-only for library clients does not keep away who writes: its handles get
// another disk under them, which has the image open to be written to, in the same attachment for
// a library client, and in that of the device for lsdctl add. What they had under way is done
// again there. Where the image is open to be written to already, and may have a device beside its
// handles, that is given the disk as it is, and nobody notices.
//
// The attachment is told first what log that disk is going to have: a record that is read-only and
// names a log is one that is being opened to be written to. If the daemon dies then, the next one
// finds whether the image has come to be its own with that log (settle); and of two attachments of
// the image it leaves out one (sortOut).

// opening reports whether what is attached read-only was being opened to be written to.
func (r *record) opening() bool { return r.ReadOnly && r.Log != "" }

// reads reports whether what is attached only reads, and will.
func (r *record) reads() bool { return r.ReadOnly && !r.opening() }

// writeAs takes over from another record what there is to say of how an image is written to.
func (r *record) writeAs(o *record) {
	r.Log, r.LogDevice, r.LogSize, r.LogMemory = o.Log, o.LogDevice, o.LogSize, o.LogMemory
	r.Lease, r.BatchAge, r.CheckpointEvery, r.SpaceRatio, r.StoreTimeout = o.Lease, o.BatchAge, o.CheckpointEvery, o.SpaceRatio, o.StoreTimeout
}

// intend writes down that an attachment that is read-only is about to be written to as to says, and
// returns what takes that back, unless the daemon dies: then it is the next one's.
func (a *attachment) intend(to *record) (undo func() error, err error) {
	before := a.record()
	if err := a.save(func(r *record) { r.writeAs(to) }); err != nil {
		return nil, err
	}
	return func() error {
		if a.d.ctx.Err() != nil {
			return nil
		}
		return a.save(func(r *record) { r.writeAs(&before) })
	}, nil
}

// turnWritable makes what is attached read-only for library clients an attachment that may be
// written to. When it fails, everything is as before. The caller holds op.
func (a *attachment) turnWritable(ctx context.Context) (err error) {
	to := a.record()
	to.ReadOnly, to.LogSize = false, cmp.Or(a.d.cfg.LibraryLogSize, DefaultLogSize)
	if err := a.d.planLog(&to, ""); err != nil {
		return err
	}
	undo, err := a.intend(&to)
	if err != nil {
		return err
	}
	made := false
	defer func() {
		if err == nil {
			return
		}
		if made && a.d.ctx.Err() == nil {
			err = errors.Join(err, a.d.removeIfIdle(to))
		}
		err = errors.Join(err, undo())
	}()
	if b := a.d.twin(&to, a); b != nil { // whoever comes after this finds that it is being opened
		return fmt.Errorf("%w: %w", b.inTheWay(&to), unix.EBUSY)
	}
	progress := func(api.Progress) {}
	if made, err = makeLog(ctx, to, progress); err != nil {
		return err
	}
	dk, err := a.openDisk(ctx, to, false, bringUpOptions{fresh: true, progress: progress})
	if err != nil {
		return explainLocked(to, err)
	}
	if err := a.turnTo(ctx, dk, &to); err != nil {
		a.giveUp(dk, a.d.ctx.Err() == nil)
		return err
	}
	return nil
}

// turnTo gives the attachment, of which the caller holds op, a disk that can be written to as to
// says. It fails before anything of it has been done.
func (a *attachment) turnTo(ctx context.Context, dk *disk, to *record) error {
	size, err := dk.size(ctx)
	if err != nil {
		return err
	}
	a.stopKeeper()
	defer func() {
		if a.d.ctx.Err() == nil && a.d.find(a.id) == a {
			a.startKeeper()
		}
	}()
	if a.d.find(a.id) != a {
		return fmt.Errorf("%s has ended meanwhile", a.name())
	}
	if err := a.save(func(r *record) {
		r.writeAs(to)
		r.Phase, r.ReadOnly, r.Boot, r.PID, r.LogID, r.Taken, r.Size = phaseAttached, false, a.d.env.boot, os.Getpid(), dk.logID, false, size
	}); err != nil {
		return err
	}
	a.endDisk()
	// A door starts at once, and always.
	rec := a.record()
	err = dk.serve(a.d.ctx, a.d.doors.replace(deviceParams(rec)), &rec)
	a.setDisk(dk)
	a.setState(api.StateActive, nil)
	a.logger.Info("it was read-only, and can be written to from now on", "log", to.Log)
	return err
}

// endDisk ends the work of the attachment's disk, if it has one, so that its handles can be hooked
// to another. The keeper does not run.
func (a *attachment) endDisk() {
	dk := a.getDisk()
	if dk == nil {
		return
	}
	a.setDisk(nil)
	ctx, stop := context.WithTimeout(context.Background(), quietTimeout)
	defer stop()
	_ = dk.abandon(ctx) // it can have died: then there is nothing to end
	dk.release()
}

// settle finds what became of an attachment that was being opened to be written to when the daemon
// died: it may be if the image is its own, and is read-only as before if not. Then the log that was
// made for it goes, unless somebody depends on it.
func (a *attachment) settle(ctx context.Context) error {
	rec := a.record()
	if !rec.opening() {
		return nil
	}
	log, err := a.intended(ctx, &rec)
	switch {
	case err != nil:
		return err
	case log != uuid.Nil:
		a.logger.Info("it was being opened to be written to when the daemon ended, and can be")
		return a.save(func(r *record) { r.ReadOnly, r.LogID, r.Taken = false, log, false })
	case !rec.LogDevice && exists(rec.Log):
		if err := a.d.removeIfIdle(rec); err != nil {
			return err
		}
	}
	return a.save(func(r *record) { r.Log, r.LogDevice = "", false })
}

// intended returns the id of the log that a record names if the owner of the image has it, else
// uuid.Nil.
func (a *attachment) intended(ctx context.Context, rec *record) (uuid.UUID, error) {
	f, header, err := openLog(ctx, *rec)
	switch {
	case errors.Is(err, errLogGone), errors.Is(err, writelog.ErrCorrupt):
		return uuid.Nil, nil
	case err != nil:
		return uuid.Nil, err
	}
	if err := f.Close(); err != nil || header == uuid.Nil {
		return uuid.Nil, err
	}
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return uuid.Nil, err
	}
	st, err := a.connect(ctx, u)
	if err != nil {
		return uuid.Nil, err
	}
	defer st.Close()
	ctx, stop := context.WithTimeout(ctx, cmp.Or(rec.StoreTimeout, lookTimeout))
	defer stop()
	owner, err := engine.OwnerOf(ctx, st, rec.ImageID)
	switch {
	case errors.Is(err, backend.ErrNotFound), err == nil && (owner == nil || owner.Log != header):
		return uuid.Nil, nil
	case err != nil:
		return uuid.Nil, err
	}
	return header, nil
}

// sortOut leaves out of what is recorded one of two that are there because the daemon died when it
// moved library clients from one to the other. Of an attachment that had not come to be yet nobody
// has been told; what it has of the image the other one knows of, too.
func (d *Daemon) sortOut(recs []record) []record {
	over := make(map[int]bool)
	for i := range recs {
		for j := range recs {
			device, door := &recs[i], &recs[j]
			if device.ID >= firstDoor || door.ID < firstDoor || device.ImageID != door.ImageID || !device.clash(door) {
				continue
			}
			if device.ReadOnly { // nothing moves to one, and what the door's clients wrote it does not have
				continue
			}
			a := newAttachment(d, *door, api.StateRecovering)
			if device.Phase == phaseAttaching {
				a = newAttachment(d, *device, api.StateRecovering)
			}
			a.logger.Info("the daemon ended when it moved library clients", "from", deviceName(door.ID), "to", deviceName(device.ID), "left out", a.name())
			a.scrap(d.ctx)
			over[a.id] = true
		}
	}
	kept := recs[:0]
	for _, r := range recs {
		if !over[r.ID] {
			kept = append(kept, r)
		}
	}
	return kept
}

// makeRoom has what is attached for library clients alone make way for a device of rec. Where they
// use it, and may go on beside the device, it is returned, for attach, and its op is taken.
func (d *Daemon) makeRoom(ctx context.Context, rec *record) (door *attachment, err error) {
	defer func() {
		if err != nil && door != nil {
			<-door.op
			door = nil
		}
	}()
	for _, a := range d.all() {
		if r := a.record(); a.id < firstDoor || !r.clash(rec) {
			continue
		}
		if err := a.takeInTurn(ctx); err != nil {
			return door, err
		}
		c := a.clients()
		if len(c) > 0 && door == nil && d.find(a.id) == a {
			door = a
			if err := a.mayBecome(rec, c); err != nil {
				return door, err
			}
			continue
		}
		if len(c) > 0 {
			err = a.busy(c)
		} else {
			err = a.detachReadily(ctx)
		}
		<-a.op
		if err != nil {
			return door, err
		}
	}
	return door, nil
}

// mayBecome fails unless the handles of an attachment, which the clients have, may move to a device
// of rec.
func (a *attachment) mayBecome(rec *record, clients []string) error {
	r := a.record()
	switch {
	case r.ImageID != rec.ImageID:
		return a.inTheWay(rec)
	case rec.ReadOnly || !sameStore(&r, rec):
		return a.busy(clients)
	case r.ReadOnly:
		return nil
	}
	writers, alone := a.writers()
	switch {
	case len(writers) == 0 || len(alone) == 0 && rec.Shared:
		return rec.goesOnAs(&r)
	case len(alone) == 0:
		return fmt.Errorf("%w, which write, and share it with a device that is attached with --shared", a.busy(writers))
	case rec.Shared:
		return fmt.Errorf("%w, which write, and were not started by lsdctl run --shared", a.busy(alone))
	}
	return fmt.Errorf("%w, which write", a.busy(writers))
}

// writers returns the clients that write, and those of them that do not share the image with a block
// device.
func (a *attachment) writers() (all, alone []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for h := range a.handles {
		if h.readOnly {
			continue
		}
		all = append(all, h.who)
		if !h.shared {
			alone = append(alone, h.who)
		}
	}
	return all, alone
}

// goesOnAs makes the record one of a device of an image that is open as another record says, which
// stays as it is: it fails where that is not what was asked for.
func (r *record) goesOnAs(o *record) error {
	other := func(want, have int64) bool { return want != 0 && want != have }
	if r.Log != o.Log || other(r.LogMemory, o.LogMemory) || other(int64(r.Lease), int64(o.Lease)) ||
		other(int64(r.BatchAge), int64(o.BatchAge)) || other(int64(r.CheckpointEvery), int64(o.CheckpointEvery)) ||
		other(int64(r.StoreTimeout), int64(o.StoreTimeout)) || r.SpaceRatio != 0 && r.SpaceRatio != o.SpaceRatio {
		return fmt.Errorf("%s is open already, with the write log %s: that and other settings of it cannot be changed while library clients have it open: lsdctl add it without them", o.URL, o.Log)
	}
	r.writeAs(o)
	return nil
}

// sameStore reports whether two records are of one store. An image elsewhere can have the same id,
// if somebody has given it that.
func sameStore(a, b *record) bool {
	u, _, _, err := backend.ParseSource(a.URL)
	v, _, _, berr := backend.ParseSource(b.URL)
	return err == nil && berr == nil && u == v
}

// moveTo makes the handles of an attachment those of another, which is open, and ends it. The
// caller holds op of both.
func (a *attachment) moveTo(b *attachment) {
	a.stopKeeper()
	a.endDisk()
	a.giveHandles(b, nil)
	a.endAs(b)
}

// endAs ends an attachment that has become b.
func (a *attachment) endAs(b *attachment) {
	ctx, stop := context.WithTimeout(context.Background(), deviceTimeout)
	defer stop()
	err := a.d.doors.Delete(ctx, a.id)
	if errors.Is(err, ublk.ErrNoDevice) {
		err = nil
	}
	if err := errors.Join(err, a.d.records.remove(a.id)); err != nil { // the next daemon does it
		a.logger.Error("what is left of an attachment that has moved could not be removed", "err", err)
	}
	a.d.forget(a)
	a.logger.Info("its library clients have moved", "to", b.name())
}

// takeOver makes the attachment the device of an image that library clients have open by another
// one, door, and write to: they do not notice. The caller holds op of both; when it fails, everything
// is as before, but for the attachment's record.
func (a *attachment) takeOver(ctx context.Context, door *attachment) (err error) {
	k, err := a.kernel()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && a.d.ctx.Err() == nil {
			err = errors.Join(err, a.d.records.remove(a.id))
		}
	}()
	if err := a.d.records.save(a.record()); err != nil {
		return err
	}
	door.stopKeeper()
	dk := door.getDisk()
	if dk == nil || dk.image == nil || dk.dead() || a.d.find(door.id) != door {
		err = fmt.Errorf("%s: %w", door.name(), errNotOpen)
	} else if err = door.lend(ctx, k, dk, a); err == nil {
		door.endAs(a)
		a.setState(api.StateActive, nil)
		a.logFit(a.fitDevice(ctx, dk))
		a.startKeeper()
		a.logger.Info("attached beside library clients", "log", a.record().Log)
		return nil
	}
	if a.d.ctx.Err() == nil && a.d.find(door.id) == door {
		door.startKeeper()
	}
	return err
}

// lend has the disk of an attachment serve the device of another one in the place of its own, and
// then gives it that with the handles.
func (a *attachment) lend(ctx context.Context, k kernel, dk *disk, to *attachment) error {
	a.fit.Lock()
	defer a.fit.Unlock()
	dev, front := dk.dev, dk.front
	if err := to.bringUpDevice(ctx, k, dk, false); err != nil {
		if failed := dk.dev; failed != dev {
			dk.stand(dev, front)
			wait, stop := context.WithTimeout(context.Background(), deviceTimeout)
			defer stop()
			select {
			case <-failed.Done(): // it has been deleted
				err = errors.Join(err, failed.Close())
			case <-wait.Done():
				a.logger.Error("a device that could not be started does not end: its buffers stay")
			}
		}
		return err
	}
	a.giveHandles(to, dk)
	return nil
}

// giveHandles makes the handles those of b, and the disk, too, if it is not nil.
func (a *attachment) giveHandles(b *attachment, dk *disk) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if dk != nil {
		a.disk = nil
		dk.owner.Store(b)
	}
	for h := range a.handles {
		h.at.Store(b)
		b.handles[h] = struct{}{}
	}
	if b.disk != nil {
		b.disk.hook(slices.Collect(maps.Keys(a.handles))...)
	}
	clear(a.handles)
	if dk != nil { // which has them hooked
		b.disk = dk
	}
}
