package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// superWriter changes the superblock for the owner: one change at a time, each a
// compare-and-swap that also renews the lease. The reactor owns it.
type superWriter struct {
	sb      *superblock // as last written or read: see takeSuper
	version backend.Version
	holds   *holds // of sb
	timer   Timer  // renews the lease
	tries   int

	running bool
	renew   bool          // a renewal is due
	changes []superChange // wanted, oldest first
	release func(error)   // the ownership is to be given up

	// until is when the lease runs out, by this host's clock, which goes on while
	// the host is suspended: a renewal counts from before it was sent, and a tenth
	// of the lease is kept as a margin for clocks that run at different rates.
	until time.Duration
	lost  bool // the lease has run out, and this was logged

	// While another host waits for the image: the last object that the store has
	// taken, and when that was.
	evictObject uint64
	evictMoved  time.Duration
	gaveUp      bool // the image goes without what is only in the log
	loose       bool // it goes without a checkpoint, or while objects of the cleaner may be under way
}

// takeSuper makes sb, of that version, what is known of the superblock. A snapshot that it asks
// for is going to be of a state that is not older than the one at which it is first seen
// here, so what died before goes on being removed: a full store would wait for that.
func (im *Image) takeSuper(sb *superblock, version backend.Version) {
	s := &im.super
	s.sb, s.version, s.holds = sb, version, sb.holds()
	im.fit(sb)
	if !s.holds.pending {
		im.pending = nil
		return
	}
	seen := map[uuid.UUID]uint64{}
	s.holds.floor = im.accepted.object
	for p := range sb.named() {
		if p.Settled {
			continue
		}
		at, ok := im.pending[p.ID]
		if !ok {
			at = im.accepted.object
		}
		seen[p.ID] = at
		s.holds.floor = min(s.holds.floor, at)
	}
	im.pending = seen
}

// superChange is a change of the superblock beside renewals. apply may be called
// more than once, each time on another copy.
type superChange struct {
	apply func(*superblock)
	fn    func()
}

// changeSuper changes the superblock as soon as that is possible, and then calls
// fn, unless the image's service ends before.
func (im *Image) changeSuper(apply func(*superblock), fn func()) {
	im.super.changes = append(im.super.changes, superChange{apply, fn})
	im.updateSuper()
}

// startSuper begins to renew the lease.
func (im *Image) startSuper() {
	s := &im.super
	s.timer = im.env.AfterFunc(im.renewEvery(), im.renewLease)
	// Open took the ownership a moment ago, but its clock is another: renew first.
	s.renew = true
	im.updateSuper()
}

// renewEvery is short beside the lease, and short enough that an owner soon finds
// that another host asks for the image.
func (im *Image) renewEvery() time.Duration { return min(im.super.sb.Owner.Lease/4, 5*time.Second) }

func (im *Image) renewLease() {
	if im.state == Fenced || im.state == Released {
		return
	}
	im.super.renew = true
	im.super.timer.Reset(im.renewEvery())
	if im.state == Evicting && im.stuck() {
		im.giveUp()
	}
	im.clean.watch()
	im.updateSuper()
	im.leased()
}

// stuck reports whether the store has taken nothing of what is being destaged for
// the length of a lease.
func (im *Image) stuck() bool {
	s, now := &im.super, im.env.Now()
	if s.evictObject != im.accepted.object {
		s.evictObject, s.evictMoved = im.accepted.object, now
	}
	return now-s.evictMoved > s.sb.Owner.Lease
}

// giveUp lets another host have the image as it is in the store. What is not
// there stays in the log, which can be salvaged.
func (im *Image) giveUp() {
	if im.super.release != nil {
		return
	}
	if im.accepted.seq == im.sealed.seq && im.open == nil {
		im.logger.Warn("the store does not take a checkpoint, or what the cleaner moves, or does not delete what is dead: another host gets the image without that; everything that was acknowledged is in the store")
		im.goLoose()
		return
	}
	im.logger.Error("the store does not take what was acknowledged: another host gets the image without it; the log is kept", "log", im.logID)
	im.super.gaveUp = true
	im.release(func(error) {})
}

// goLoose lets go of the image, of which everything acknowledged is in the store, as it is there.
func (im *Image) goLoose() {
	im.super.loose = true
	im.release(func(error) {})
}

// leased reports whether this host may still acknowledge: nobody else can own
// the image before the lease has run out.
func (im *Image) leased() bool {
	s := &im.super
	if im.state == Fenced || im.state == Released {
		return false
	}
	if mutate.On(mutate.LeaseIgnored) {
		return true
	}
	if s.gaveUp || s.loose {
		return false // the release may have taken effect already
	}
	if im.env.Now() < s.until {
		return true
	}
	if !s.lost && s.until > 0 {
		s.lost = true
		im.logger.Warn("the lease could not be renewed in time: writes wait until it is", "lease", s.sb.Owner.Lease)
	}
	return false
}

// mayDelete returns how much time there is for deleting objects of the image, 0
// if there is none. Whatever deletes an object asks it first, in this order:
//
//   - Nothing is deleted that the superblock as this host has last written it
//     still needs, together with the objects that have been accepted since. A
//     delete can be late by any time, on a host that is stopped or in the network,
//     and no look at a clock helps against that; but whoever owns the image by then
//     began with that superblock or a later one, and found these objects.
//   - Nothing is deleted without a lease that is good for a while. That is no
//     proof, for the reason above. It keeps a host that has slept from working on
//     an image that is another's by now, and a fenced one from deleting at all.
//
// Names hold the epoch and are never used twice, so what has become garbage once
// stays garbage.
func (im *Image) mayDelete() time.Duration {
	if !im.leased() || im.super.sb.Owner == nil { // it has just been given up
		return 0
	}
	left := im.super.until - im.env.Now()
	if left < im.super.sb.Owner.Lease/4 {
		return 0
	}
	return left
}

// updateSuper starts the next change of the superblock, if one is wanted and
// none is running.
func (im *Image) updateSuper() {
	s := &im.super
	if s.running || !s.renew && len(s.changes) == 0 && s.release == nil || im.state == Fenced || im.state == Released {
		return
	}
	next := s.sb.clone()
	next.Owner.Renewal++
	next.Owner.Client = im.client() // it changes when the store had to connect anew
	changes := len(s.changes)
	for _, c := range s.changes {
		c.apply(next)
	}
	next.pruneEpochs()
	releasing := s.release != nil
	if releasing {
		next.Loose = s.loose
		if s.gaveUp {
			next.cutOff()
		}
		next.Owner, next.Evict = nil, nil
		next.touched()
	}
	began := im.env.Now()
	var version backend.Version
	s.running = true
	im.askStore(func(ctx context.Context) (err error) {
		version, err = im.store.Swap(ctx, SuperblockKey(im.id), s.version, next.encode())
		return err
	}, func(err error) {
		s.running = false
		switch {
		case im.state == Fenced || im.state == Released:
		case errors.Is(err, backend.ErrConflict):
			im.reloadSuper()
		case errors.Is(err, backend.ErrNotFound):
			im.fenced(errors.New("the image has been removed"))
		case err != nil:
			im.retrySuper(err)
		default:
			im.superWritten(next, version, began, changes, releasing)
		}
	})
}

// superWritten takes over the superblock that was written.
func (im *Image) superWritten(next *superblock, version backend.Version, began time.Duration, changes int, releasing bool) {
	s := &im.super
	before := s.sb
	im.takeSuper(next, version)
	s.renew, s.tries = false, 0
	im.storeWorks(useOther)
	if releasing {
		im.released() // what was changed with it has nothing to go on with
		return
	}
	s.until = max(s.until, began+next.Owner.Lease*9/10)
	until := s.until
	if mutate.On(mutate.LeaseStretched) {
		until += 10 * next.Owner.Lease
	}
	im.env.LeaseUntil(until)
	done := s.changes[:changes]
	s.changes = slices.Clone(s.changes[changes:])
	for _, c := range done {
		c.fn()
	}
	if s.lost {
		s.lost = false
		im.logger.Info("the lease is renewed: writes go on")
	}
	im.pointsChanged(before)
	im.heedEviction() // it may have been asked for while Open was at it
	im.goUnread()
	im.takeSnapshots()
	im.forgetStates()
	im.acknowledge()
	im.advance()
	im.flatten.step() // it may have waited for the lease
	im.updateSuper()
}

func (im *Image) retrySuper(err error) {
	s := &im.super
	im.storeFailed(useOther, err)
	im.checkpoint.waitAnew()
	wait := min(im.backoff(s.tries), im.renewEvery())
	s.tries++
	im.env.AfterFunc(wait, im.updateSuper)
}

// reloadSuper reads the superblock after a conflict: somebody else has changed
// it, or an earlier attempt of ours, whose outcome was not known.
func (im *Image) reloadSuper() {
	s := &im.super
	var sb *superblock
	var version backend.Version
	s.running = true
	im.askStore(func(ctx context.Context) (err error) {
		sb, version, err = loadSuperblock(ctx, im.store, im.id)
		return err
	}, func(err error) {
		s.running = false
		switch {
		case im.state == Fenced || im.state == Released:
		case errors.Is(err, backend.ErrNotFound):
			im.fenced(errors.New("the image has been removed"))
		case err != nil:
			im.retrySuper(err)
		default:
			im.superReloaded(sb, version)
		}
	})
}

func (im *Image) superReloaded(sb *superblock, version backend.Version) {
	s := &im.super
	switch {
	case sb.Epoch == s.sb.Epoch && sb.Owner == nil && s.release != nil:
		// An earlier attempt to release had gone through.
		im.takeSuper(sb, version)
		im.released()
	case !mutate.On(mutate.EpochIgnored) && (sb.Epoch != s.sb.Epoch || sb.Owner == nil || sb.Owner.Log != im.logID):
		if sb.Removed {
			im.fenced(errors.New("the image has been removed"))
			return
		}
		who := "nobody"
		if sb.Owner != nil {
			who = sb.Owner.Host
		}
		im.fenced(fmt.Errorf("epoch %d is over: the image is at epoch %d, owned by %s", s.sb.Epoch, sb.Epoch, who))
	default:
		before := s.sb
		im.takeSuper(sb, version)
		s.renew = true
		im.pointsChanged(before)
		im.heedEviction()
		im.takeSnapshots()
		im.forgetStates()
		im.updateSuper()
	}
}

// heedEviction lets go of the image if the superblock says that another host asks for it.
func (im *Image) heedEviction() {
	if sb := im.super.sb; sb.Evict != nil && sb.Evict.Epoch == sb.Epoch {
		im.evict(sb.Evict.By)
	}
}

// evict lets go of the image because another host asks for it: no new write is
// taken, what was acknowledged is destaged.
func (im *Image) evict(by string) {
	if im.state != Active && im.state != Closing {
		return
	}
	closing := im.state == Closing
	im.state = Evicting
	im.super.evictObject, im.super.evictMoved = im.accepted.object, im.env.Now()
	im.why = fmt.Errorf("%s has asked for the image with --force", by)
	im.logger.Warn("another host takes the image over: new writes get errors, what was acknowledged is being destaged", "by", by)
	for im.blocked.n > 0 {
		im.finish(im.blocked.pop(), errEvicted)
	}
	if closing {
		return // it is letting go already; now stuck watches over that
	}
	im.letGo(func(err error) {
		if err != nil {
			im.logger.Error("could not let go of the image in an orderly way", "err", err)
			return
		}
		im.logger.Warn("let go of the image: everything that was acknowledged is in the store", "by", by)
	})
}

// release gives up the ownership.
func (im *Image) release(fn func(error)) {
	if im.super.release != nil {
		prev := im.super.release
		im.super.release = func(err error) { prev(err); fn(err) }
		return
	}
	im.super.release = fn
	im.updateSuper()
}

// released ends the image's service after the ownership has been given up.
func (im *Image) released() {
	fn := im.super.release
	im.super.release = nil
	why := im.why
	if why == nil {
		why = errDetached
	}
	im.fence(Released, why)
	fn(nil)
}

// client returns the name by which another host can shut this one out of the
// store, "" if there is none.
func (im *Image) client() string {
	if im.fencer == nil {
		return ""
	}
	if c := im.fencer.Identity(); len(c) <= maxClient {
		return c
	}
	return ""
}

// fenceOwner shuts the client of an owner that did not answer out of the store,
// where that can be done. It takes nothing from the lease, which is what keeps
// two hosts apart: it makes sure that what the other one has under way comes to
// nothing at once, and not to garbage later.
func (im *Image) fenceOwner(ctx context.Context, gone *owner, o *OpenOptions) {
	if im.fencer == nil || gone.Client == "" || gone.Client == im.client() {
		return // the last: an image of this very daemon, whose other images go on
	}
	o.Progress("shutting " + gone.Host + " out of the store")
	ctx, stop := context.WithTimeout(ctx, im.cfg.StoreTimeout)
	defer stop()
	if err := im.fencer.Fence(ctx, gone.Client); err != nil {
		im.logger.Warn("the owner that did not answer cannot be shut out of the store: its lease is over, so what it still writes is ignored, but it takes space",
			"owner", gone.Host, "client", gone.Client, "err", err)
		return
	}
	im.logger.Info("the owner that did not answer is shut out of the store", "owner", gone.Host, "client", gone.Client)
}
