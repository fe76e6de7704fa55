package engine

import (
	"errors"
	"syscall"
	"time"
)

// unreadPart is a segment that the running checkpoint needs and that cannot be read.
type unreadPart struct {
	since time.Duration // env.Now() when the wait for it began: when it was first found damaged, as a rule
	err   error         // of the last attempt
}

const (
	// MapPatience is for how long, at most, an image that is let go of waits for a part of its
	// map that is damaged. It is less where the lease is shorter.
	MapPatience = DefaultLease
	// mapRetries is for how many pauses between attempts it waits at least.
	mapRetries = 2
)

// mapPatience is for how long an image that is let go of waits for a part of its map that is
// damaged.
func (im *Image) mapPatience() time.Duration {
	return min(max(im.super.sb.Owner.Lease, mapRetries*im.cfg.RetryMax), MapPatience)
}

// forGood reports whether an error of a read says that what was to be read is damaged, so that
// to wait is of no use, and not that the store does not answer. These are
//
//   - ErrCorrupt: a checksum, a magic number, a size or a name inside is wrong;
//   - ErrNotFound: the object is not there;
//   - ErrPermanent: the store says itself that to ask again does not help;
//   - EIO: what a disk says of a sector, and RADOS of an object, of which it has no good copy
//     any more. Both may say so for a moment, therefore a Store calls it temporary.
//
// Each of these may also be the answer of a store that is ill as a whole, or a single answer
// that was damaged on its way. So whoever gives something up for them looks whether the store
// works otherwise, and asks again for a while.
func forGood(err error) bool { return damaged(err) || errors.Is(err, syscall.EIO) }

// missed notes that an attempt to read segment i has failed.
func (c *checkpointer) missed(i uint32, err error) {
	r := c.running
	if r == nil || !r.loading[i] {
		return
	}
	u := r.unread[i]
	switch {
	case u == nil && !forGood(err):
		return
	case u == nil:
		if len(r.unread) == 0 { // where an object is damaged there may be thousands
			c.im.logger.Error("part of the map cannot be read: there is no checkpoint until it can; lsdctl check lists what is damaged", "err", err)
		}
		u = &unreadPart{since: c.im.env.Now()}
		r.unread[i] = u
	}
	u.err = err
}

// unread returns why a segment that the running checkpoint needs cannot be read, of the one that
// is waited for longest, and since when; nil if there is none, or the store does not answer.
func (c *checkpointer) unread() (err error, since time.Duration) {
	if c.running == nil {
		return nil, 0
	}
	for _, u := range c.running.unread {
		if forGood(u.err) && (err == nil || u.since < since || u.since == since && u.err.Error() < err.Error()) {
			err, since = u.err, u.since
		}
	}
	return err, since
}

// waitAnew begins the wait for what cannot be read anew: the store does not work.
func (c *checkpointer) waitAnew() {
	if c.running == nil {
		return
	}
	for _, u := range c.running.unread {
		u.since = c.im.env.Now()
	}
}

// goUnread lets go of an image that is being closed, or that another host asks for, without the
// checkpoint that belongs to that, where the checkpoint needs a part of the map that has been
// damaged for some time: nobody can have the image before somebody brings the part back, and
// perhaps nobody can. It costs nothing but time of the next owner: all that was
// acknowledged is in data objects, whose headers recovery reads from the last checkpoint on. It
// has the same to say of that part of the map. What there is of the checkpoint in the store the
// superblock knows as Intent.
//
// It is called when the superblock has been written, so the store works; while it cannot be
// written the wait begins anew each time. What is not accepted yet, because of the bounds that a
// checkpoint which does not come to its end has broken, is accepted before, in spite of them.
func (im *Image) goUnread() {
	c := &im.checkpoint
	if im.state != Closing && im.state != Evicting || im.super.release != nil {
		return
	}
	why, since := c.unread()
	if why == nil || !c.unbound && im.env.Now()-since < im.mapPatience() {
		return
	}
	c.unbound = true
	if im.accepted.seq != im.sealed.seq || im.open != nil {
		return // till it is
	}
	c.leftOut = why
	im.logger.Warn("the image is let go of without a checkpoint, since part of the map cannot be read: everything that was acknowledged is in the store, and stays there; lsdctl check lists what is damaged", "err", why)
	im.goLoose()
}
