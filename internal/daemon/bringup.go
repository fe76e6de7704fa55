package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

const (
	// deviceTimeout bounds what the kernel does with a device to take it away.
	deviceTimeout = 20 * time.Second
	// startTimeout bounds what the kernel does with a device until it serves. That is
	// a dozen steps, which wait for its own threads: on a host that is short of
	// processors they take seconds, and that must not fail an attach.
	startTimeout = time.Minute
	// connectTimeout bounds the connection to a store. What an image then reads of the
	// store is bounded call by call, by its store timeout, and what it reads of its log
	// by nothing: there may be much of it, on an SSD that all images share, and an
	// attempt that is cut short has the next one begin anew.
	connectTimeout = 2 * time.Minute
)

// bringUpOptions says how a record becomes a disk.
type bringUpOptions struct {
	fresh    bool // for a user who waits: what fails is undone
	force    bool
	progress func(api.Progress)
}

// bringUp opens the image and makes, or recovers, the device.
func (a *attachment) bringUp(ctx context.Context, o bringUpOptions) error {
	k, err := a.kernel()
	if err != nil {
		return err
	}
	if !o.fresh && a.found {
		if err := a.settle(ctx); err != nil {
			return err
		}
	}
	rec := a.record()
	there := false
	if !o.fresh {
		if there, err = a.findDevice(ctx, k, rec); err != nil {
			return err
		}
	}
	dk, err := a.openDisk(ctx, rec, there, o)
	if err != nil {
		return err
	}
	if rec.Phase == phaseDetaching && !there {
		a.setDisk(dk)
		a.setState(api.StateDetaching, nil)
		return nil
	}
	if err := a.present(ctx, k, dk, there); err != nil {
		a.setDisk(nil)
		a.giveUp(dk, o.fresh)
		return err
	}
	a.setDisk(dk)
	a.setState(api.StateActive, nil)
	a.logFit(a.fitDevice(ctx, dk))
	return nil
}

// findDevice reports whether the record's device is there and may have users.
func (a *attachment) findDevice(ctx context.Context, k kernel, rec record) (bool, error) {
	ctx, stop := context.WithTimeout(ctx, deviceTimeout)
	defer stop()
	info, err := k.Info(ctx, rec.ID)
	switch {
	case errors.Is(err, ublk.ErrNoDevice):
		return false, nil
	case err != nil:
		return false, err
	case !a.d.owns(rec, info):
		return false, fmt.Errorf("%s is another program's now", a.name())
	case info.State == ublk.StateDead:
		// Added and never started, or stopped: nobody has it open.
		return false, k.Delete(ctx, rec.ID)
	}
	return true, nil
}

// present is bringUpDevice of the attachment's own disk.
func (a *attachment) present(ctx context.Context, k kernel, dk *disk, there bool) error {
	if !a.record().Shared {
		return a.bringUpDevice(ctx, k, dk, there)
	}
	// What library clients had under way is done again before what the kernel had: what they had
	// compared must not be changed before they write. So they have the disk before it has a device.
	a.fit.Lock()
	defer a.fit.Unlock()
	a.setDisk(dk)
	return a.bringUpDevice(ctx, k, dk, there)
}

// bringUpDevice makes dk serve the record's device.
func (a *attachment) bringUpDevice(ctx context.Context, k kernel, dk *disk, there bool) error {
	ctx, stop := context.WithTimeout(ctx, startTimeout)
	defer stop()
	if !there {
		size := a.record().Size
		if dk.image != nil { // which may have another size by now
			var err error
			if size, err = dk.size(ctx); err != nil {
				return err
			}
		}
		err := a.save(func(r *record) {
			r.Boot, r.PID, r.LogID, r.Taken, r.Size = a.d.env.boot, os.Getpid(), dk.logID, false, size
		})
		if err != nil {
			return err
		}
	}
	rec := a.record()
	var dev device
	var err error
	if there {
		dev, err = k.Recover(ctx, rec.ID)
	} else {
		dev, err = k.Add(ctx, deviceParams(rec))
	}
	if err != nil {
		return err
	}
	err = dk.serve(ctx, dev, &rec)
	if err == nil && rec.Phase != phaseAttached {
		err = a.save(func(r *record) { r.Phase = phaseAttached })
	}
	if err != nil && !there {
		clean, stop := context.WithTimeout(context.WithoutCancel(ctx), deviceTimeout)
		defer stop()
		// The kernel reads the partition table before it has started a device, and stops
		// none that is being started. If the store does not answer, it gets errors, but where
		// library clients would get them, too.
		if !dk.hooked.any() {
			defer time.AfterFunc(stopGrace, dk.refuse).Stop()
		}
		err = errors.Join(err, dev.Delete(clean, true))
	}
	return err
}

// deviceParams says what the block device of a record is like.
func deviceParams(rec record) ublk.Params {
	return ublk.Params{
		ID:              rec.ID,
		SizeBytes:       rec.Size,
		LogicalBlock:    int(rec.BlockSize),
		IOOpt:           1 << 20,
		ReadOnly:        rec.ReadOnly,
		VolatileCache:   true,
		FUA:             true,
		MaxDiscardBytes: 1 << 30,
		MaxZeroesBytes:  1 << 30,
		DiscardGranule:  int(rec.BlockSize),
		Queues:          rec.Queues,
		Depth:           rec.Depth,
		NoData:          rec.Null,
	}
}

// giveUp drops a disk whose device did not come to be. What a user has just
// asked for is undone; else the next attempt goes on from the log.
func (a *attachment) giveUp(dk *disk, undo bool) {
	ctx, stop := context.WithTimeout(context.Background(), quietTimeout)
	defer stop()
	if undo {
		if err := dk.close(ctx, func(api.Progress) {}); err != nil {
			a.logger.Error("could not give the image back", "err", err)
		}
	}
	_ = dk.abandon(ctx)
	dk.release()
}

// owns reports whether a device that is there is that of the record: since this
// boot, and, while nobody had been told of it, by the one who wrote the record.
func (d *Daemon) owns(rec record, info ublk.Info) bool {
	return rec.Boot == d.env.boot && (rec.Phase != phaseAttaching || info.ServerPID <= 0 || info.ServerPID == rec.PID)
}

// openDisk opens the image of a record. there says that the record's device has
// users, who rely on what they know of the image.
func (a *attachment) openDisk(ctx context.Context, rec record, there bool, o bringUpOptions) (*disk, error) {
	if rec.Null {
		return emptyDisk(rec, a.logger)
	}
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return nil, err
	}
	st, err := a.connect(ctx, u)
	if err != nil {
		return nil, err
	}
	st = a.d.shared.storeOps.counted(a.d.shared.gates.bound(u, st))
	var log *writelog.OSFile
	var header uuid.UUID
	if !rec.ReadOnly {
		if log, header, err = openLog(ctx, rec); err != nil {
			return nil, errors.Join(err, st.Close())
		}
	}
	if there = there && log != nil; there {
		if err := a.noteTaken(ctx, st, header); err != nil {
			return nil, errors.Join(explainOpen(rec, err), log.Close(), st.Close())
		}
	}
	owner := new(atomic.Pointer[attachment])
	owner.Store(a)
	dk, err := openDisk(ctx, diskOptions{
		rec: rec, store: st, log: log, host: a.d.cfg.Host, env: a.d.env, shared: a.d.shared,
		force: o.force, progress: o.progress, owner: owner, logger: a.logger, cache: a.d.readCache,
	})
	if err != nil {
		return nil, explainOpen(rec, err)
	}
	if now := a.record(); there && (now.Taken || now.LogID != dk.logID) {
		// The engine took it anew: nothing was lost, but it was another's.
		a.giveUp(dk, true)
		return nil, errTaken
	}
	return dk, nil
}

// noteTaken writes down that another host has had the image since the device's users
// were served, if the superblock says so: its owner has not the log that they know.
// Nothing says so any more once the engine has taken the image anew, with a log that
// may have the same id. header is the id in the log's header.
func (a *attachment) noteTaken(ctx context.Context, st backend.Store, header uuid.UUID) error {
	rec := a.record()
	if rec.LogID == uuid.Nil { // written by a daemon that did not note it
		rec.LogID = header
		if err := a.save(func(r *record) { r.LogID = header }); err != nil {
			return err
		}
	}
	if rec.Taken {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, cmp.Or(rec.StoreTimeout, lookTimeout))
	defer stop()
	owner, err := engine.OwnerOf(ctx, st, rec.ImageID)
	if err != nil || owner != nil && owner.Log == rec.LogID {
		return err
	}
	return a.save(func(r *record) { r.Taken = true })
}

// connect opens the store u.
func (a *attachment) connect(ctx context.Context, u backend.URL) (backend.Store, error) {
	ctx, stop := context.WithTimeout(ctx, connectTimeout)
	defer stop()
	return a.d.openSt(ctx, u)
}

// openLog opens the write log of a record and returns the id in its header, nil
// if it has none.
func openLog(ctx context.Context, rec record) (*writelog.OSFile, uuid.UUID, error) {
	wait, stop := context.WithTimeout(ctx, lockTimeout)
	defer stop()
	f, err := writelog.OpenFile(wait, rec.Log)
	if errors.Is(err, os.ErrNotExist) {
		return nil, uuid.Nil, fmt.Errorf("%w: %s: mount its file system; or, if it is lost, lsdctl del --force, then lsdctl add --force opens the image at what the store has", errLogGone, rec.Log)
	}
	if err != nil {
		return nil, uuid.Nil, err
	}
	blank, err := writelog.Blank(f)
	if err != nil || blank {
		if err != nil {
			f.Close()
			return nil, uuid.Nil, err
		}
		return f, uuid.Nil, nil
	}
	h, _, err := writelog.ReadHeader(f)
	if err != nil {
		f.Close()
		return nil, uuid.Nil, fmt.Errorf("%s: %w", rec.Log, err)
	}
	return f, h.Log, nil
}

// explainOpen adds to an error of engine.Open what the engine does not know.
func explainOpen(rec record, err error) error {
	var owned *engine.OwnedError
	var stale *engine.StaleLogError
	switch {
	case errors.As(err, &owned):
		return err // it names the image
	case errors.As(err, &stale):
		return fmt.Errorf("%s: %w: it is kept; see lsdctl log ls, and lsdctl log salvage to bring it back as an image of its own; move it away to attach without it", rec.Log, err)
	case errors.Is(err, engine.ErrForeignLog):
		return fmt.Errorf("%s: %w: it is kept; see lsdctl log ls, and use another --cache", rec.Log, err)
	case errors.Is(err, writelog.ErrCorrupt):
		return fmt.Errorf("%s: %w: it is kept; move it away, and lsdctl add --force opens the image at what the store has", rec.Log, err)
	case errors.Is(err, engine.ErrNoSnapshot):
		return fmt.Errorf("%s: %w", rec.URL, err) // it says what became of it
	case errors.Is(err, backend.ErrNotFound):
		return fmt.Errorf("%s: %w: %w", rec.URL, errImageGone, err)
	case errors.Is(err, engine.ErrCorrupt):
		return fmt.Errorf("open %s: %w: see lsdctl check %s", rec.URL, err, rec.imageURL())
	}
	return fmt.Errorf("open %s: %w", rec.URL, err)
}
