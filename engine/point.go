package engine

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// point is a state of the image that must stay readable although the image has
// gone on: the one after a data object, as a checkpoint before it and the objects
// from there on give it. So far the points of an image are where it branched off
// from a write log that was lost to a forced take-over; as long as one is there,
// that log can be salvaged.
//
// Objects never change, so a point costs nothing but the objects that are kept
// for it, and whether one is needed follows from three numbers: its own, when it
// died, and the point's.
type point struct {
	Object     uint64         `json:"object"`               // the state is the one after this object; 0: empty
	Settled    bool           `json:"settled"`              // Object is known
	Checkpoint *checkpointRef `json:"checkpoint,omitempty"` // the last one then; nil: none
	Epoch      uint64         `json:"epoch"`                // the ownership that ended there
	Log        uuid.UUID      `json:"log"`                  // its write log
	Host       string         `json:"host"`                 // who had it
	Since      time.Time      `json:"since"`
}

// maxPoints bounds the points of an image: when there are more, the oldest goes.
const maxPoints = 64

// base returns the object after which the point's state is replayed.
func (p *point) base() uint64 {
	if p.Checkpoint == nil {
		return 0
	}
	return p.Checkpoint.Object
}

// needsObject reports whether the point needs data object number, which died with
// the object died; 0 means that it lives.
func (p *point) needsObject(number, died uint64) bool {
	return !p.Settled || number <= p.Object && (died == 0 || died > p.Object || number > p.base())
}

// needsMap reports whether the point needs a map object that the checkpoint at
// object written has made, and the one at object died has replaced.
func (p *point) needsMap(written, died uint64) bool {
	return written <= p.base() && died > p.base()
}

// held reports whether a point needs a dead data object.
func (s *superblock) held(number, died uint64) bool {
	for i := range s.Points {
		if s.Points[i].needsObject(number, died) {
			return true
		}
	}
	return false
}

// heldMap reports whether a point needs a dead map object.
func (s *superblock) heldMap(written, died uint64) bool {
	for i := range s.Points {
		if s.Points[i].needsMap(written, died) {
			return true
		}
	}
	return false
}

// heldManifest reports whether a point needs the manifest of a checkpoint.
func (s *superblock) heldManifest(c checkpointRef) bool {
	for _, p := range s.Points {
		if p.Checkpoint != nil && *p.Checkpoint == c {
			return true
		}
	}
	return false
}

// cutOff keeps the state at which the present ownership ends for the sake of its
// log, in which there is more. Where it ends is known once the next owner has
// looked at the store.
func (s *superblock) cutOff() {
	o := s.Owner
	s.addPoint(point{Checkpoint: s.Checkpoint, Epoch: s.Epoch, Log: o.Log, Host: o.Host, Since: o.Since})
}

// addPoint keeps the state at which another ownership ended.
func (s *superblock) addPoint(p point) {
	s.Points = append(s.Points, p)
	if n := len(s.Points) - maxPoints; n > 0 {
		oldest := s.Points[n-1].Epoch
		s.Lost = max(s.Lost, oldest)
		s.dropPoints(func(p point) bool { return p.Epoch <= oldest })
	}
}

// dropPoints gives up points. What only they needed goes in its time: a manifest as
// one that has been replaced.
func (s *superblock) dropPoints(drop func(point) bool) {
	var dropped []point
	s.Points = slices.DeleteFunc(s.Points, func(p point) bool {
		if drop(p) {
			dropped = append(dropped, p)
			return true
		}
		return false
	})
	for _, p := range dropped {
		c := p.Checkpoint
		if c != nil && (s.Checkpoint == nil || *s.Checkpoint != *c) && !s.heldManifest(*c) && !slices.Contains(s.Prev, *c) {
			s.Prev = append(s.Prev, *c)
		}
	}
}

// ForgetLogs gives up the states that the image of that id keeps for write logs that
// were cut off: for the given one, or with uuid.Nil for all. It returns how many
// these were. Such a log cannot be salvaged any more. Whoever owns the image, or
// attaches it next, reclaims the space.
func ForgetLogs(ctx context.Context, st backend.Store, id, log uuid.UUID) (int, error) {
	forgotten := 0
	_, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error {
		before := len(sb.Points)
		sb.dropPoints(func(p point) bool { return p.Settled && (log == uuid.Nil || p.Log == log) })
		forgotten = before - len(sb.Points)
		if forgotten == 0 {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return forgotten, err
}

var errNothing = errors.New("nothing to change")
