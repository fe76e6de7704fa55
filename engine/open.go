package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/boottime"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A Clock is how Open tells and spends time. Real is the one of this host.
type Clock interface {
	Now() time.Duration
	Sleep(ctx context.Context, d time.Duration) error
}

// defaultParallel is how many reads from the store recovery makes at one time.
const defaultParallel = 16

// Real is this host's clock, which goes on while the host is suspended.
type Real struct{}

// Now returns the time since the host was booted.
func (Real) Now() time.Duration { return boottime.Now() }

// Sleep waits for d or until ctx ends.
func (Real) Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// OpenOptions says how an image is opened.
type OpenOptions struct {
	// ReadOnly opens the image as the store has it now; it takes no ownership
	// and needs no log.
	ReadOnly bool
	// Snapshot is the id of a snapshot that is opened instead of the image as it is now;
	// uuid.Nil means none. It goes with ReadOnly alone.
	Snapshot uuid.UUID
	// Log is the file of the write log, locked: zeroed, or a log of this image.
	// The image keeps it.
	Log writelog.File
	// URL is where the image lives, for messages and the log's header.
	URL string
	// Host names this host to others.
	Host string
	// Boot identifies this boot of the host; uuid.Nil if that is not known.
	Boot uuid.UUID
	// Volatile says that Log is in the memory of this process. If that dies, another host
	// needs no force once the lease is over, and no state is kept for the log.
	Volatile bool
	// Force takes the image over from a live owner, which is asked to let go.
	Force bool
	// Partial says that the image is opened to be filled, and is partial until Finish. One that
	// is whole is refused.
	Partial bool
	// Lease is how long a renewal of the ownership is good for; 0 means
	// DefaultLease.
	Lease time.Duration
	Clock Clock // nil means Real{}
	// Parallel is how many reads from the store recovery makes at one time; 0
	// means a default. 1 makes their order certain, and has the log read when it is
	// needed, not ahead.
	Parallel int
	// Progress is told in a few words what takes time; may be nil.
	Progress func(string)
	Config   Config
}

// OwnedError says that an image is attached elsewhere.
type OwnedError struct {
	Image string
	Host  string
	Since time.Time
	Lease time.Duration
	// Command says that it is not attached, but in the hands of a command there.
	Command bool
}

// Error returns one line that says what to do.
func (e *OwnedError) Error() string {
	if e.Command {
		return fmt.Sprintf("%s is in use by a command on %s since %s: wait until that has ended; if it was killed, until %v later",
			e.Image, e.Host, e.Since.Local().Format("2006-01-02 15:04:05"), e.Lease)
	}
	return fmt.Sprintf("%s is attached by %s since %s: detach it there, or take it over with --force",
		e.Image, e.Host, e.Since.Local().Format("2006-01-02 15:04:05"))
}

// StaleLogError says that a log belongs to an ownership that is over, and holds
// what never reached the store.
type StaleLogError struct {
	Image   string
	Epoch   uint64 // of the log
	Now     uint64 // of the image
	Records uint64 // that the store does not have; 0: it does not know that epoch, or where that ended
}

// Error returns one line; the caller adds the log's name and what to do.
func (e *StaleLogError) Error() string {
	if e.Records == 0 {
		return fmt.Sprintf("the write log belongs to epoch %d of %s, which is at epoch %d now and does not know any more what the store had of it",
			e.Epoch, e.Image, e.Now)
	}
	return fmt.Sprintf("the write log belongs to epoch %d of %s, which is at epoch %d now, and holds %d records that never reached the store",
		e.Epoch, e.Image, e.Now, e.Records)
}

// ErrForeignLog is matched when a log belongs to another image.
var ErrForeignLog = errors.New("the write log belongs to another image")

// Open opens the image id, takes its ownership and recovers it from store and
// log. It blocks; ctx bounds it, and Config.StoreTimeout each call of the store: how
// long all of it takes depends on how much there is to read. The image works under
// ctx's values, not its cancellation, until it is closed.
func Open(ctx context.Context, st backend.Store, id uuid.UUID, o OpenOptions) (*Image, error) {
	if o.Lease == 0 {
		o.Lease = DefaultLease
	}
	if o.Lease < MinLease || o.Lease > MaxLease {
		return nil, fmt.Errorf("lease %v: it must be from %v to %v", o.Lease, MinLease, MaxLease)
	}
	if o.Snapshot != uuid.Nil && !o.ReadOnly {
		return nil, errors.New("a snapshot can be opened read-only alone")
	}
	recovery, sb, err := o.lookAt(ctx, st, id)
	if err != nil {
		return nil, err
	}
	var im *Image
	if o.ReadOnly {
		im, err = openAsIs(ctx, recovery, sb, &o)
	} else {
		im = newImage(ctx, recovery, sb, &o)
		im.fencer, _ = st.(backend.Fencer)
		if err = im.takeAndRecover(ctx, &o); err != nil {
			im.dropUnopened()
			err = im.missing(ctx, sb, err)
		}
	}
	if err != nil {
		return nil, err
	}
	im.store = st
	return im, nil
}

// lookAt sets what is not set to its default, and returns the store as recovery asks it, and
// the image's superblock. It fails where the image has been removed.
func (o *OpenOptions) lookAt(ctx context.Context, st backend.Store, id uuid.UUID) (patient, *superblock, error) {
	if o.Clock == nil {
		o.Clock = Real{}
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	o.Config = o.Config.withDefaults()
	recovery := patient{prompt{st, o.Config.StoreTimeout}, o.Clock}
	sb, _, err := loadSuperblock(ctx, recovery, id)
	if err == nil {
		err = removedError(sb.Removed, nil)
	}
	return recovery, sb, err
}

// missing tells what it means that an attach has not found something, beginning with the
// superblock sb. Of an image that has been removed alone the error matches
// backend.ErrNotFound.
func (im *Image) missing(ctx context.Context, sb *superblock, err error) error {
	if !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	if im.super.sb != nil {
		sb = im.super.sb // as this attach has changed it
	}
	now, _, lerr := loadSuperblock(ctx, im.store, im.id)
	switch {
	case lerr != nil:
		return lerr
	case !sameStates(sb, now):
		return fmt.Errorf("another host has changed the image meanwhile: try again: %v", err)
	}
	return missingPart(err)
}

// missingPart is the error of an image of which something is not there.
func missingPart(err error) error {
	return fmt.Errorf("%w: part of the image is not there: %v", ErrCorrupt, err)
}

// dropUnopened gives back what an image has that could not be opened.
func (im *Image) dropUnopened() {
	im.cancel()
	im.objs.leave()
}

func newImage(ctx context.Context, st backend.Store, sb *superblock, o *OpenOptions) *Image {
	im := &Image{
		id: sb.Image, line: sb.lineage(), store: st, cfg: o.Config.withDefaults(), readOnly: o.ReadOnly,
		sectors: sb.Sectors, object: uint64(sb.ObjectSize / SectorSize), window: sb.Window,
		dirty: extmap.New(sb.span()), parallel: cmp.Or(o.Parallel, defaultParallel),
	}
	im.span.Store(sb.span())
	im.shared = im.cfg.Shared
	im.objs = newPagedMap(sb.span(), &im.shared.Map)
	im.logger = im.cfg.Logger
	im.cache, im.cacheDev = im.cfg.ReadCache, im.cfg.ReadCacheDevice
	im.reads = im.cache.Client()
	var cancel context.CancelFunc
	im.ctx, cancel = context.WithCancel(context.WithoutCancel(ctx))
	im.cancel = func() {
		cancel()
		im.reads.Close()
	}
	im.objs.Replaced = im.replaced
	im.checkpoint.im = im
	im.clean.im, im.clean.bad = im, map[uint32]bool{}
	im.reaper.going = map[uint32]bool{}
	return im
}

// takeAndRecover makes this host the owner and brings map and log up to date.
func (im *Image) takeAndRecover(ctx context.Context, o *OpenOptions) error {
	err := im.takeOnce(ctx, o)
	if errors.Is(err, errReleased) { // by an attempt of ours that had given up, or taken by it
		err = im.takeOnce(ctx, o)
	}
	return err
}

// errReleased says that the log, which was the owner's when it was looked at, is not the
// owner's any more: nobody has the image, or somebody else; or that it has become the owner's.
var errReleased = errors.New("the image has changed hands meanwhile: try again")

func (im *Image) takeOnce(ctx context.Context, o *OpenOptions) error {
	log, err := im.examineLog(ctx, o)
	if err != nil {
		return err
	}
	ours := log != nil
	if !ours {
		if im.unused == uuid.Nil {
			im.unused = uuid.New()
		}
		// The log is there before the superblock names it: whatever stops this
		// attempt, the next one finds that the image is its own.
		h := writelog.Header{Log: im.unused, Image: im.id, ImageURL: o.URL, Boot: o.Boot}
		if err := writelog.Create(o.Log, h); err != nil {
			return err
		}
		if log, err = writelog.Open(o.Log); err != nil {
			return err
		}
	}
	im.log, im.logID = log, log.Header().Log
	sb, err := im.acquire(ctx, o, ours)
	if err != nil {
		return err
	}
	if err = im.recoverOwned(ctx, sb, o); err != nil && !ours {
		im.giveBack(ctx)
	}
	return err
}

// recoverOwned brings map and log up to date once the image is this host's.
func (im *Image) recoverOwned(ctx context.Context, sb *superblock, o *OpenOptions) error {
	o.Progress("recovering the map")
	if err := im.recoverStore(ctx, sb); err != nil {
		return err
	}
	o.Progress("recovering the write log")
	first, err := im.recoverLog(ctx, o)
	if err != nil {
		return err
	}
	if err := im.log.Adopt(sb.Epoch, first, o.Boot); err != nil {
		return err
	}
	return im.settleOwnership(ctx)
}

// giveBack releases an ownership that was taken a moment ago, with an empty log,
// and cannot be used.
func (im *Image) giveBack(ctx context.Context) {
	// Also when ctx has ended: that may be why.
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), im.cfg.StoreTimeout)
	defer stop()
	_, _, err := changeSuperblock(ctx, im.store, im.id, func(sb *superblock) error {
		if sb.Owner == nil || sb.Owner.Log != im.logID {
			return backend.ErrConflict
		}
		sb.Owner, sb.Evict = nil, nil
		// What the ownership before has left beyond its end is still to be noted, and the
		// point that told of it may be gone: see inherit.
		sb.Loose = im.unreleased
		return nil
	})
	if err != nil {
		im.logger.Warn("could not give back the ownership of the image", "err", err)
	}
}

// examineLog returns the log that was given if it is the image's present one, and
// nil if it is blank or may be made anew. Otherwise it is refused.
func (im *Image) examineLog(ctx context.Context, o *OpenOptions) (*writelog.Log, error) {
	empty, err := writelog.Blank(o.Log)
	if err != nil {
		return nil, err
	}
	if empty {
		return nil, nil
	}
	l, err := writelog.Open(o.Log)
	if err != nil {
		return nil, err
	}
	h := l.Header()
	if h.Image != im.id {
		return nil, fmt.Errorf("%w: %s (%s)", ErrForeignLog, h.ImageURL, h.Image)
	}
	sb, version, err := loadSuperblock(ctx, im.store, im.id)
	if err != nil {
		return nil, err
	}
	if sb.Owner != nil && sb.Owner.Log == h.Log && h.Epoch <= sb.Epoch {
		return l, nil
	}
	// Its ownership is over. It may go if the store has all that it holds.
	last, err := im.lastSeq(ctx, o.Log)
	if err != nil {
		return nil, err
	}
	have, err := im.endOfEpoch(ctx, sb, h.Epoch)
	if err != nil {
		return nil, err
	}
	stale := &StaleLogError{Image: o.URL, Epoch: h.Epoch, Now: sb.Epoch}
	switch {
	case last == 0 || mutate.On(mutate.StaleLogDropped):
	case last > have:
		stale.Records = last - have
		return nil, stale
	case h.Epoch <= sb.Lost && (len(sb.Epochs) == 0 || h.Epoch < sb.Epochs[0].Epoch),
		h.Epoch > sb.Epoch: // the store was brought back from a copy
		return nil, stale
	case !sb.ended(h.Epoch):
		if err := im.confirmEnd(ctx, sb, version, o); err != nil {
			return nil, err
		}
	}
	im.spent = h.Log
	if last == 0 && h.Epoch == 0 {
		// Perhaps an attempt whose outcome is not known made it: what that changes,
		// however late, is then ours.
		im.unused = h.Log
	}
	return nil, nil
}

// confirmEnd makes sure that the last ownership ends where the store's run of objects
// ends, as it was found after the superblock sb. Somebody who has taken the image over and
// has not yet said where that is may have looked before the last objects came, and says
// otherwise: that is waited for. Who does not come to it within the lease loses the image;
// then, and if it has been said, the log is to be looked at again.
func (im *Image) confirmEnd(ctx context.Context, sb *superblock, version backend.Version, o *OpenOptions) error {
	wait := time.Duration(0)
	if sb.Owner != nil {
		if !o.Force && !sb.Owner.Volatile {
			return owned(sb.Owner, o)
		}
		wait = sb.Owner.Lease
		o.Progress(fmt.Sprintf("waiting for %s, which is taking the image over, at most %v", sb.Owner.Host, wait))
	}
	for began := o.Clock.Now(); ; {
		_, now, err := loadSuperblock(ctx, im.store, im.id)
		if err != nil {
			return err
		}
		if now != version {
			return errReleased
		}
		if o.Clock.Now()-began >= wait {
			break
		}
		if err := o.Clock.Sleep(ctx, leaseStep(wait)); err != nil {
			return err
		}
	}
	if sb.Owner == nil {
		return nil // who takes it over from here on finds what was found here
	}
	sb.cutOff()
	sb.Owner, sb.Evict = nil, nil
	if _, err := im.store.Swap(ctx, SuperblockKey(im.id), version, sb.encode()); err != nil && !errors.Is(err, backend.ErrConflict) {
		return fmt.Errorf("end the ownership that was being taken: %w", err)
	}
	return errReleased
}

// endCommand ends the ownership of a command that has died, when its lease is over. It fails
// with an OwnedError where that is alive. What else may own the image it leaves alone.
func endCommand(ctx context.Context, st backend.Store, id uuid.UUID, o OpenOptions) error {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil || sb.Owner == nil || !sb.Owner.Volatile {
		return err
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	o.ReadOnly = true
	im := newImage(ctx, st, sb, &o)
	defer im.dropUnopened()
	sb, version, err := im.waitForOwner(ctx, &o)
	switch {
	case errors.Is(err, backend.ErrConflict):
		return nil // somebody else has it
	case err != nil || sb.Owner == nil:
		return err
	}
	sb.cutOff()
	sb.Owner, sb.Evict = nil, nil
	if _, err := st.Swap(ctx, SuperblockKey(id), version, sb.encode()); err != nil && !errors.Is(err, backend.ErrConflict) {
		return fmt.Errorf("end the ownership of a command that has died: %w", err)
	}
	return nil
}

// owned returns the error for an image that has an owner.
func owned(by *owner, o *OpenOptions) error {
	return &OwnedError{Image: o.URL, Host: by.Host, Since: by.Since, Lease: by.Lease, Command: by.Volatile}
}

// leaseStep is the pause between two looks at an image whose owner has so long a lease.
func leaseStep(lease time.Duration) time.Duration {
	return min(max(lease/20, 100*time.Millisecond), 2*time.Second)
}

// endOfEpoch returns the last record that the store took from the ownership
// epoch, or from those before it.
func (im *Image) endOfEpoch(ctx context.Context, sb *superblock, epoch uint64) (uint64, error) {
	for _, e := range sb.Epochs {
		if e.Epoch > epoch {
			return e.Seq - 1, nil
		}
	}
	// It was the last one to write: what the store has in all.
	at, err := im.storeEnd(ctx, sb)
	return at.seq, err
}

// acquire makes this host the owner, in a new epoch. ours says that im.logID is
// the log of the present owner, which is this host then: it has died, for the
// log could be locked.
func (im *Image) acquire(ctx context.Context, o *OpenOptions, ours bool) (*superblock, error) {
	for {
		sb, version, err := loadSuperblock(ctx, im.store, im.id)
		if err != nil {
			return nil, err
		}
		switch {
		case sb.Removed:
			return nil, ErrRemoved
		case o.Partial && !sb.Partial:
			return nil, errWhole
		case ours && (sb.Owner == nil || sb.Owner.Log != im.logID):
			return nil, errReleased
		case !ours && sb.Owner != nil && sb.Owner.Log == im.logID:
			return nil, errReleased // what an attempt of ours that had given up had sent has come meanwhile
		}
		if sb.Owner != nil && !ours {
			if !o.Force && !sb.Owner.Volatile {
				return nil, owned(sb.Owner, o)
			}
			// The change below is of the very state that was found over: an owner
			// that renews its lease in between keeps it.
			sb, version, err = im.waitForOwner(ctx, o)
			if errors.Is(err, backend.ErrConflict) {
				continue
			}
			if err != nil {
				return nil, err
			}
		}
		if sb.Epoch == maxEpoch {
			return nil, errors.New("the image has been attached more often than it can be")
		}
		im.inherit(sb, ours)
		if !o.Partial {
			sb.whole() // it has its name: see Finish
		}
		before := sb.Owner
		sb.Epoch++
		sb.Evict = nil
		sb.Owner = &owner{Host: o.Host, Log: im.logID, Lease: o.Lease, Since: time.Now().UTC().Truncate(time.Second), Client: im.client(), Volatile: o.Volatile, Reads: superVersion}
		version, err = im.store.Swap(ctx, SuperblockKey(im.id), version, sb.encode())
		if errors.Is(err, backend.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("take the ownership: %w", err)
		}
		im.takeSuper(sb, version)
		if before != nil && !ours {
			im.fenceOwner(ctx, before, o)
		}
		return sb, nil
	}
}

// inherit notes in the superblock what the ownership so far, which was not given
// up, leaves behind: a checkpoint that it had begun, and the log of another host,
// with which the image must stay readable as it is now.
func (im *Image) inherit(sb *superblock, ours bool) {
	sb.dropIntent()
	if sb.Owner != nil && !ours {
		sb.cutOff()
	}
	im.unreleased = sb.Owner != nil || sb.unsettled()
	sb.dropCutOffs(func(p cutOff) bool { return p.Log == im.spent })
}

// waitForOwner asks the owner to let go, and returns the superblock when it has,
// or when its lease has gone unrenewed for its whole length on this host's clock. Without
// force the owner is not asked, and one that is alive makes it fail with an OwnedError.
// The wait counts only while the store answers: while it does not, the owner
// cannot renew either. It fails with ErrConflict when somebody else has become
// the owner.
func (im *Image) waitForOwner(ctx context.Context, o *OpenOptions) (*superblock, backend.Version, error) {
	sb, version, err := changeSuperblock(ctx, im.store, im.id, func(sb *superblock) error {
		if !o.Force {
			return errNothing
		}
		sb.Evict = &eviction{Epoch: sb.Epoch, By: o.Host}
		return nil
	})
	if err != nil || sb.Owner == nil {
		return sb, version, err
	}
	if !o.Force && !sb.Owner.Volatile {
		return nil, "", owned(sb.Owner, o)
	}
	o.Progress(fmt.Sprintf("waiting for %s to let go, at most %v after its last sign of life", sb.Owner.Host, sb.Owner.Lease))
	step := leaseStep(sb.Owner.Lease)
	epoch, renewal := sb.Epoch, sb.Owner.Renewal
	seen, before := o.Clock.Now(), o.Clock.Now()
	for {
		if err := o.Clock.Sleep(ctx, step); err != nil {
			return nil, "", err
		}
		sb, version, err := loadSuperblock(ctx, im.store, im.id)
		now := o.Clock.Now()
		switch {
		case errors.Is(err, backend.ErrTemporary):
			seen, before = now, now
			continue
		case err != nil:
			return nil, "", err
		case sb.Owner == nil:
			return sb, version, nil
		case sb.Epoch != epoch:
			return nil, "", backend.ErrConflict
		case !o.Force && sb.Owner.Renewal != renewal:
			return nil, "", owned(sb.Owner, o)
		case sb.Owner.Renewal != renewal || now-before > sb.Owner.Lease/4+step:
			renewal, seen = sb.Owner.Renewal, now
		case now-seen > sb.Owner.Lease, mutate.On(mutate.LeaseNotAwaited):
			return sb, version, nil
		}
		before = now
	}
}

// settleOwnership records where this epoch begins, and so where the ones before
// ended, and what those may have left beyond.
func (im *Image) settleOwnership(ctx context.Context) error {
	first := im.accepted.object + 1
	sb, version, err := changeSuperblock(ctx, im.store, im.id, func(sb *superblock) error {
		if sb.Epoch != im.super.sb.Epoch || sb.Owner == nil || sb.Owner.Log != im.logID {
			return errors.New("another host has taken the image over meanwhile")
		}
		if n := len(sb.Epochs); n > 0 && sb.Epochs[n-1].Epoch == sb.Epoch {
			return nil // an attempt whose outcome was not known
		}
		sb.settleEnd(im.accepted.object, im.unreleased)
		if mutate.On(mutate.EpochUnrecorded) && len(sb.Epochs) > 0 {
			return nil
		}
		sb.Epochs = append(sb.Epochs, epochStart{Epoch: sb.Epoch, Object: first, Seq: im.accepted.seq + 1})
		sb.pruneEpochs()
		return nil
	})
	if err != nil {
		return fmt.Errorf("take the ownership: %w", err)
	}
	im.takeSuper(sb, version)
	return nil
}
