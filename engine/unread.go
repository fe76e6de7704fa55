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

// unread returns the segment that the running checkpoint needs and that is waited for longest,
// of those that are damaged; nil if there is none.
func (c *checkpointer) unread() (first *unreadPart) {
	if c.running == nil {
		return nil
	}
	for _, u := range c.running.unread {
		if !forGood(u.err) {
			continue
		}
		if first == nil || u.since < first.since || u.since == first.since && u.err.Error() < first.err.Error() {
			first = u
		}
	}
	return first
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
// checkpoint that belongs to that, where a part of the map that this needs has been damaged for
// mapPatience: else the image would be this host's until somebody brings the part back, which
// perhaps nobody can. Nothing is lost by that: all that was acknowledged is in data objects,
// whose headers the next owner reads from the last checkpoint on, and the part is to that one
// what it is to this. What there is of the checkpoint in the store the superblock knows as Intent.
//
// It is called when the superblock has been written, so the store works; when it cannot be the
// wait begins anew. Objects that are not accepted because the checkpoint does not come to its end
// are accepted first: without clients they are no more than the log holds.
func (im *Image) goUnread() {
	c := &im.checkpoint
	if im.state != Closing && im.state != Evicting || im.super.release != nil {
		return
	}
	u := c.unread()
	if u == nil || !c.unbound && im.env.Now()-u.since < im.mapPatience() {
		return
	}
	c.unbound = true
	if im.accepted.seq != im.sealed.seq || im.open != nil {
		return // till it is
	}
	c.leftOut = u.err
	im.logger.Warn("the image is let go of without a checkpoint, since part of the map cannot be read: everything that was acknowledged is in the store, and stays there; lsdctl check lists what is damaged", "err", u.err)
	im.goLoose()
}
