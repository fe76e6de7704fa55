package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
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
	// maxRetry bounds the pause between two attempts to take an image up.
	maxRetry = 10 * time.Second
	// damagedTries is how many attempts to take an image up must meet damage in its
	// store, one after the other, for that to be believed: an answer can also have been
	// damaged on its way.
	damagedTries = 5
	// soon is how long a reactor must have worked to be replaced at once.
	soon = 2 * time.Second
)

// An attachment is one block device and the image behind it.
//
// Its keeper, a goroutine, brings the image up and takes it up again when its
// reactor dies. Attach, detach and the daemon's end work on an attachment
// without its keeper: whoever holds op may stop and start it.
type attachment struct {
	d      *Daemon
	id     int
	logger *slog.Logger
	op     chan struct{} // holds a token while somebody is at it

	stop context.CancelFunc // of the keeper; guarded by op
	kept chan struct{}      // closed when the keeper has ended; guarded by op; nil without one

	fit sync.Mutex // held by who gives the device the size of the image: the keeper, or who holds op

	damaged int // attempts in a row that met damage in the store; the keeper's

	mu        sync.Mutex
	rec       record // guarded by mu, as all that follows
	disk      *disk  // nil while it is not open
	state     string // as long as the image itself has nothing to say
	err       error  // why it is in this state
	since     time.Time
	restarts  int
	storeDown time.Time // since when; zero: it is not
	stalled   bool      // a stall has been logged

	// handles are those of library clients. Each is hooked to disk, while there is one.
	handles map[*handle]struct{}
	unused  time.Time   // since when there are none, and it is active
	found   bool        // an earlier daemon has attached it
	anew    bool        // it was attaching it, so what its clients knew of the image may be out of date
	leaving atomic.Bool // see letGoUnused
}

func newAttachment(d *Daemon, rec record, state string) *attachment {
	a := &attachment{d: d, id: rec.ID, op: make(chan struct{}, 1), rec: rec, state: state, since: time.Now(), handles: make(map[*handle]struct{}), unused: time.Now(), found: state == api.StateRecovering}
	a.anew = a.found && rec.Phase == phaseAttaching
	a.logger = d.logger.With("device", a.name())
	if rec.URL != "" {
		a.logger = a.logger.With("image", rec.URL)
	}
	return a
}

func (a *attachment) name() string { return deviceName(a.id) }

// deviceName is what people call the attachment of a number.
func deviceName(id int) string {
	if id >= firstDoor {
		return fmt.Sprintf("lib%d", id-firstDoor)
	}
	return fmt.Sprintf("/dev/ublkb%d", id)
}

// kernel returns what makes the attachment's device.
func (a *attachment) kernel() (kernel, error) {
	if a.id >= firstDoor {
		return a.d.doors, nil
	}
	return a.d.kernel()
}

// busy says that it is in use, and by whom.
func (a *attachment) busy(holders []string) error {
	return &ublk.BusyError{ID: a.id, Name: a.name(), Holders: holders}
}

// takeWait is how long somebody who wants to change an attachment waits for another one who
// is at it: most are done by then.
const takeWait = time.Second

// take takes op, which the caller gives back.
func (a *attachment) take(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, takeWait)
	defer stop()
	select {
	case a.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %w", a.name(), errAtIt)
	}
}

// errAtIt says that somebody is at an attachment.
var errAtIt = errors.New("is being attached, detached or changed: wait for that")

func (a *attachment) record() record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rec
}

// writable fails unless what is attached is an image that can be written to, and stays so.
func (a *attachment) writable() error {
	switch rec := a.record(); {
	case rec.Null || rec.ReadOnly:
		return fmt.Errorf("%s is not an image that can be written to", a.name())
	case rec.Phase == phaseDetaching: // it has no device any more
		return fmt.Errorf("%s is being detached: wait for that", a.name())
	}
	return nil
}

// save writes the record down, changed by change.
func (a *attachment) save(change func(*record)) error {
	rec := a.record()
	change(&rec)
	if err := a.d.records.save(rec); err != nil {
		return err
	}
	a.mu.Lock()
	a.rec = rec
	a.mu.Unlock()
	return nil
}

func (a *attachment) setState(state string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state != state {
		a.since = time.Now()
		a.unused = a.since
	}
	a.state, a.err = state, err
}

func (a *attachment) setDisk(dk *disk) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.disk == dk {
		return // its handles are hooked
	}
	a.disk = dk
	if dk == nil {
		return
	}
	for h := range a.handles {
		dk.hook(h)
	}
}

func (a *attachment) getDisk() *disk {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.disk
}

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
	if !o.fresh {
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
	st = a.d.shared.gates.bound(u, st)
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
