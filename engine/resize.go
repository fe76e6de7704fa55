package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// Errors of a change of size; they are matched.
var (
	// ErrShrinks says that an image was to be made smaller by what only makes one larger.
	ErrShrinks = errors.New("it would lose what is beyond its new end")
	// ErrEmpty says that an image has no bytes yet: there are no snapshots and no clones of it.
	ErrEmpty  = errors.New("the image has 0 bytes: make it larger first")
	errShrunk = errors.New("the image is being made smaller")
)

// checkSize fails unless the image may have so many bytes.
func (s *superblock) checkSize(size uint64) error {
	o := CreateOptions{Size: size, BlockSize: s.BlockSize, ObjectSize: s.ObjectSize}
	return o.check()
}

// Grow makes the image id of size bytes, which is a multiple of its block size and at most
// MaxSize, whoever has it attached: that one goes on with the new size once it looks at the
// superblock, at a renewal of its lease or at Refresh. What is beyond its end so far reads as
// zeroes. It is one change of the superblock. One that is larger is refused with ErrShrinks.
func Grow(ctx context.Context, st backend.Store, id uuid.UUID, size uint64) error {
	return changeInsistently(ctx, st, id, func(sb *superblock) error {
		switch sectors := size / SectorSize; {
		case sb.Removed:
			return ErrRemoved
		case size%SectorSize == 0 && sb.Sectors == sectors:
			return errNothing
		case size < sb.Sectors*SectorSize:
			return ErrShrinks
		default:
			if err := sb.checkSize(size); err != nil {
				return err
			}
			sb.setSectors(sectors)
			return nil
		}
	})
}

// CheckSize fails unless the image may be given so many bytes now: not while it is being made
// smaller. It is called on the reactor.
func (im *Image) CheckSize(size uint64) error {
	if im.shrink != nil {
		return errShrunk
	}
	return im.super.sb.checkSize(size)
}

// fit makes the image as large as the superblock says it is, or as it is going to be.
func (im *Image) fit(sb *superblock) {
	if n := sb.span(); n > im.span.Load() {
		im.dirty.Grow(n)
		im.objs.grow(n)
		im.span.Store(n)
	}
	sectors := sb.Sectors
	if im.shrink != nil {
		sectors = min(sectors, im.shrink.to)
	}
	if sectors == im.sectors {
		return
	}
	im.sectors = sectors
	if im.env != nil && im.cfg.Resized != nil {
		im.cfg.Resized(sectors)
	}
}

const (
	// shrinkStep is how much is discarded at one time, in sectors: that takes some time of
	// the reactor for each page of the map.
	shrinkStep = 1 << 30 / SectorSize
	// shrinkDestage is how many steps are destaged at one time: until then each page has its
	// place in memory.
	shrinkDestage = 64
	// shrinkLooks is how many segments of the map are looked at in one turn.
	shrinkLooks = 1024
)

// shrinker makes an image smaller. What is beyond its new end is discarded, as by a client, so
// that it reads as zeroes if the image grows again; the superblock has the new size when all
// of that is in the store. If it ends before, the image has its old size, and may have lost
// any part of what was to go. The reactor owns it.
type shrinker struct {
	im       *Image
	from, to uint64 // the size, in sectors
	next     uint64 // the first sector that is not discarded
	steps    int
	request  Request
	progress func(done, total uint64)
	fn       func(error)
}

// Shrink makes the image of size bytes, of which it has more. Requests beyond that fail from
// now on, and what is there is lost. fn is told when the superblock says so, or why it does
// not: then the image has the size that it had, and what was to go may be there or not.
// progress, which may be nil, is told how many bytes of those to go are discarded. Shrink is
// called on the reactor, as fn and progress are.
func (im *Image) Shrink(size uint64, progress func(done, total uint64), fn func(error)) {
	if progress == nil {
		progress = func(uint64, uint64) {}
	}
	err := im.CheckSize(size)
	switch {
	case im.state != Active:
		err = im.ended()
	case im.readOnly:
		err = errors.New("the image is open read-only")
	case err == nil && size/SectorSize >= im.sectors:
		err = fmt.Errorf("it has %d bytes: that is no more than %d", im.sectors*SectorSize, size)
	}
	if err != nil {
		fn(err)
		return
	}
	s := &shrinker{im: im, from: im.sectors, to: size / SectorSize, next: size / SectorSize, progress: progress, fn: fn}
	s.request.Done = s
	im.shrink = s
	im.fit(im.super.sb)
	s.step()
}

// ended returns why an image that is not active is not.
func (im *Image) ended() error { return cmp.Or(im.why, errDetached) }

// step discards the next piece in which there may be something.
func (s *shrinker) step() {
	im, r := s.im, &s.request
	if im.shrink != s {
		return // it has ended
	}
	if mutate.On(mutate.ShrinkKept) {
		s.next = s.from
	}
	for looks := 0; s.next < s.from && !s.shows(); looks++ {
		s.next = min(segmentStart(segmentOf(s.next)+1), s.from)
		if looks == shrinkLooks {
			im.afterTurn(s.step)
			return
		}
	}
	switch {
	case im.state != Active:
		s.end(im.ended())
	case im.usedUp():
		s.end(errors.New("the image has used up its numbers for objects: copy it to a new one"))
	case s.next == s.from && mutate.On(mutate.ShrinkEarly):
		s.destaged(nil)
	case s.next == s.from:
		im.Destage(s.destaged)
	default:
		r.Op, r.Sector, r.Sectors = Discard, s.next, uint32(min(s.from-s.next, shrinkStep))
		r.Err, r.Leased, r.at, r.seq, r.pending = 0, false, 0, 0, 0
		im.write(r)
	}
}

// shows reports whether something other than zeroes may be read from the next sector on to the
// end of its segment, or is going to be: what waits for room in the log at the beginning may be
// writes beyond the new end. The first discard is behind them.
func (s *shrinker) shows() bool {
	im, i := s.im, segmentOf(s.next)
	if s.steps == 0 && im.blocked.n > 0 {
		return true
	}
	end := min(segmentStart(i+1), s.from)
	if _, ok := im.dirty.Next(s.next, end); ok || !im.ready(i) {
		return true
	}
	_, ok := im.objs.Next(s.next, end)
	return ok
}

// RequestDone implements Completer: a piece has been discarded.
func (s *shrinker) RequestDone(r *Request) {
	if r.Err != 0 {
		s.end(cmp.Or(s.im.why, error(r.Err)))
		return
	}
	s.next += uint64(r.Sectors)
	s.progress((s.next-s.to)*SectorSize, (s.from-s.to)*SectorSize)
	if s.steps++; s.steps%shrinkDestage == 0 {
		s.im.Destage(s.destaged)
		return
	}
	s.im.afterTurn(s.step)
}

// destaged goes on when what has been discarded is in the store.
func (s *shrinker) destaged(err error) {
	switch {
	case err != nil:
		s.end(err)
	case s.next < s.from:
		s.im.afterTurn(s.step)
	default:
		s.im.changeSuper(func(sb *superblock) {
			if sb.Sectors == s.from {
				sb.setSectors(s.to)
			}
		}, func() {
			err := error(nil)
			if now := s.im.super.sb.Sectors; now != s.to {
				err = fmt.Errorf("somebody has changed its size to %d bytes meanwhile", now*SectorSize)
			}
			s.end(err)
		})
	}
}

// end ends it: with an error the image has the size that the superblock says.
func (s *shrinker) end(err error) {
	if s.im.shrink != s {
		return // by the end of the image's service
	}
	s.im.shrink = nil
	if s.im.super.sb.Sectors == s.to {
		err = nil // in the very change that has ended the service, perhaps
	}
	if s.im.state != Fenced && s.im.state != Released {
		s.im.fit(s.im.super.sb)
	}
	s.fn(err)
}
