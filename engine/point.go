package engine

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// point is a state of the image that must stay readable although the image has
// gone on: the one after a data object, as a checkpoint before it and the objects
// from there on give it. Snapshots are points, and so is where the image branched off
// from a write log that was lost to a forced take-over.
//
// Objects never change, so a point costs nothing but the objects that are kept
// for it, and whether one is needed follows from three numbers: its own, when it
// died, and the point's.
type point struct {
	Object     uint64         `json:"object"`               // the state is the one after this object; 0: empty
	Settled    bool           `json:"settled"`              // Object is known
	Checkpoint *checkpointRef `json:"checkpoint,omitempty"` // the last one then; nil: none
	Seq        uint64         `json:"seq,omitempty"`        // the last record in that; 0: it is not known here
}

// cutOff is the point at which an ownership ended that another host has ended by force.
// As long as it is there, that host's log can be salvaged. It is settled by the next owner,
// who finds where the store's run of objects ends.
type cutOff struct {
	point
	Epoch uint64    `json:"epoch"` // the ownership that ended there
	Log   uuid.UUID `json:"log"`   // its write log
	Host  string    `json:"host"`  // who had it
	Since time.Time `json:"since"`
	// Sectors is the image's size then; 0, of one that an earlier lsd made: as it is now.
	Sectors uint64 `json:"sectors,omitempty"`
}

// maxCutOffs bounds these points of an image: when there are more, the oldest goes.
const maxCutOffs = 64

// base returns the object after which the point's state is replayed.
func (p *point) base() uint64 {
	if p.Checkpoint == nil {
		return 0
	}
	return p.Checkpoint.Object
}

// same reports whether two points are at the same state, and go back to the same checkpoint.
func (p *point) same(q *point) bool {
	return p.Object == q.Object && p.Settled == q.Settled && sameRef(p.Checkpoint, q.Checkpoint)
}

// states calls yield for all points, of whatever kind.
func (s *superblock) states() iter.Seq[*point] {
	return func(yield func(*point) bool) {
		for i := range s.Points {
			if !yield(&s.Points[i].point) {
				return
			}
		}
		for p := range s.named() {
			if mutate.On(mutate.SnapshotUnheld) {
				return
			}
			if !yield(&p.point) {
				return
			}
		}
	}
}

// holds is what the points of an image keep, made for many questions: an image may have
// a thousand points, and a million objects. It does not change.
type holds struct {
	// pending says that there is a point of which it is not known yet where it is: not before
	// the object floor.
	pending bool
	floor   uint64
	at      []uint64 // the points, ascending
	bases   []uint64 // of those that have a checkpoint, ascending
	replay  []run64  // objects that are replayed for a point: ascending, apart
}

// holds returns what the points keep of what the image's present state is made of, or was.
// A point that the path to that does not pass keeps as much of it as the state does where
// the paths part: it may need less.
func (s *superblock) holds() *holds {
	h := new(holds)
	head := s.pathTo(maxObjectSeq)
	var runs []run64
	for p := range s.states() {
		base := p.base()
		if !p.Settled {
			h.pending = true
		} else {
			at := head.common(s.pathTo(p.Object))
			h.at = append(h.at, at)
			if base = min(base, at); base < at {
				runs = append(runs, run64{base, at})
			}
		}
		if p.Checkpoint != nil {
			h.bases = append(h.bases, base)
		}
	}
	slices.Sort(h.at)
	slices.Sort(h.bases)
	slices.SortFunc(runs, func(a, b run64) int { return cmp.Compare(a.after, b.after) })
	for _, r := range runs {
		if k := len(h.replay) - 1; k >= 0 && r.after <= h.replay[k].last {
			h.replay[k].last = max(h.replay[k].last, r.last)
			continue
		}
		h.replay = append(h.replay, r)
	}
	return h
}

// object reports whether a point needs data object number, which died with the object
// died; 0 means that it lives. It does if it is not newer than the point, and either died
// later or is replayed.
func (h *holds) object(number, died uint64) bool {
	if h.pending && (died == 0 || died > h.floor) || between(h.at, number, died) {
		return true
	}
	i, _ := slices.BinarySearchFunc(h.replay, number, func(r run64, n uint64) int { return cmp.Compare(r.last, n) })
	return i < len(h.replay) && h.replay[i].after < number
}

// mapObject reports whether a point needs a map object that the checkpoint at object
// written has made, and the one at object died has replaced.
func (h *holds) mapObject(written, died uint64) bool { return between(h.bases, written, died) }

// between reports whether one of the numbers, which are ascending, is not below from and is
// below to; 0 is beyond all.
func between(numbers []uint64, from, to uint64) bool {
	i, _ := slices.BinarySearch(numbers, from)
	return i < len(numbers) && (to == 0 || numbers[i] < to)
}

// heldManifest reports whether a point needs the manifest of a checkpoint, or it tells what
// a state that is being forgotten was made of.
func (s *superblock) heldManifest(c checkpointRef) bool {
	for p := range s.states() {
		if p.Checkpoint != nil && *p.Checkpoint == c {
			return true
		}
	}
	return slices.ContainsFunc(s.Forgotten, func(p point) bool { return p.Checkpoint != nil && *p.Checkpoint == c })
}

// cutOff keeps the state at which the present ownership ends for the sake of its
// log, in which there is more, if there is one that may turn up. Where it ends is known once
// the next owner has looked at the store.
func (s *superblock) cutOff() {
	o := s.Owner
	if o.Volatile {
		s.Loose = true // no point says so
		return
	}
	s.addCutOff(cutOff{point: point{Checkpoint: s.Checkpoint}, Epoch: s.Epoch, Log: o.Log, Host: o.Host, Since: o.Since, Sectors: s.Sectors})
}

// addCutOff keeps the state at which another ownership ended.
func (s *superblock) addCutOff(p cutOff) {
	s.Points = append(s.Points, p)
	if n := len(s.Points) - maxCutOffs; n > 0 {
		oldest := s.Points[n-1].Epoch
		s.Lost = max(s.Lost, oldest)
		s.dropCutOffs(func(p cutOff) bool { return p.Epoch <= oldest })
	}
}

// dropCutOffs gives up states that are kept for write logs.
func (s *superblock) dropCutOffs(drop func(cutOff) bool) {
	var dropped []point
	s.Points = slices.DeleteFunc(s.Points, func(p cutOff) bool {
		if drop(p) {
			dropped = append(dropped, p.point)
			return true
		}
		return false
	})
	for _, p := range dropped {
		s.forget(p)
	}
}

// forget is told of a point that has been given up. What only that needed goes in its time:
// objects of the path to the present state as the image loses them, or has lost them, and
// others as those of a state that is to be forgotten; the manifest as one that was replaced.
func (s *superblock) forget(p point) {
	if p.Settled && !s.pathTo(maxObjectSeq).has(p.Object) {
		s.Forgotten = append(s.Forgotten, p)
		return
	}
	s.dropManifest(p.Checkpoint)
}

// dropManifest has a manifest removed that nobody needs.
func (s *superblock) dropManifest(c *checkpointRef) {
	if c != nil && s.lineage().own(c.Object) && !sameRef(s.Checkpoint, c) && !s.heldManifest(*c) && !slices.Contains(s.Prev, *c) {
		s.Prev = append(s.Prev, *c)
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
		sb.dropCutOffs(func(p cutOff) bool { return p.Settled && (log == uuid.Nil || p.Log == log) })
		forgotten = before - len(sb.Points)
		if forgotten == 0 {
			return errNothing
		}
		return nil
	})
	return forgotten, err
}

// errNothing says that a superblock is as it should be.
var errNothing = errors.New("nothing to change")
