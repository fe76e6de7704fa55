package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// ErrNoParent is matched where a state of an image is no clone's, or needs nothing any more of
// what the image was cloned from.
var ErrNoParent = errors.New("it was not cloned from another image, or needs nothing of that any more")

// Ancestry says of what a state of a clone was cloned.
type Ancestry struct {
	Parent  uuid.UUID // the image
	Name    string    // that it was made under: the directory has the one that counts
	Removed bool      // it is there for its clones only
	// State is the id of the snapshot that was cloned, or where it was none the clone's own.
	State    uuid.UUID
	Snapshot string // its name; "" where it was none, or has been removed
	Overlap  uint64 // bytes up to which the state may have something of the parent
}

// AncestryOf returns of what the image id was cloned, as its present state has it, or its
// snapshot of that id unless that is uuid.Nil. A state that needs nothing of it any more, as when
// it was flattened while others of the image need the parent, has none. It fails with ErrNoParent
// where there is none.
func AncestryOf(ctx context.Context, st backend.Store, id, snapshot uuid.UUID) (Ancestry, error) {
	for try := 1; ; try++ {
		sb, _, err := loadSuperblock(ctx, st, id)
		if err != nil {
			return Ancestry{}, err
		}
		a, err := sb.ancestry(ctx, st, snapshot)
		if err == nil || !errors.Is(err, backend.ErrNotFound) {
			return a, err
		}
		// A state that was given up since, or a parent that was passed over.
		now, _, lerr := loadSuperblock(ctx, st, id)
		switch {
		case lerr != nil:
			return a, lerr
		case now.Parent == sb.Parent && sameStates(sb, now), try == separationTries:
			return a, fmt.Errorf("%w: %w", ErrNoParent, err)
		}
	}
}

// ancestry is AncestryOf. It fails with backend.ErrNotFound also where the image has changed.
func (s *superblock) ancestry(ctx context.Context, st backend.Store, snapshot uuid.UUID) (Ancestry, error) {
	if s.Parent == uuid.Nil {
		return Ancestry{}, ErrNoParent
	}
	sectors, what := s.Sectors, PresentState
	if snapshot != uuid.Nil {
		p := s.snapshotOf(snapshot)
		if p == nil {
			return Ancestry{}, ErrNoSnapshot
		}
		sectors, what = p.Sectors, "snapshot "+p.Name
	}
	switch flat, err := s.flattened(ctx, st, what); {
	case err != nil:
		return Ancestry{}, err
	case flat:
		return Ancestry{}, ErrNoParent
	}
	parent, _, err := loadSuperblock(ctx, st, s.Parent)
	if err != nil {
		return Ancestry{}, err
	}
	at := parent.snapshotOf(s.Image)
	if at == nil {
		return Ancestry{}, fmt.Errorf("the parent keeps nothing for it: %w", backend.ErrNotFound)
	}
	a := Ancestry{Parent: s.Parent, Name: parent.Name, Removed: parent.Removed, State: at.Of, Overlap: min(at.Sectors, sectors) * SectorSize}
	if p := parent.clonedFrom(at); p != nil {
		a.State, a.Snapshot = p.ID, p.Name
	}
	if a.State == uuid.Nil {
		a.State = s.Image
	}
	return a, nil
}

// flattened reports whether a state of a clone, which is named as kept names it, needs nothing of
// an ancestor, as a checkpoint of the clone's own says. What began as an empty image did is told by
// its origins: it has none.
func (s *superblock) flattened(ctx context.Context, st backend.Store, what string) (bool, error) {
	if len(s.Origins) == 0 {
		return false, nil
	}
	look := &separator{st: patient{st, Real{}}, id: s.Image, flat: map[checkpointRef]bool{}}
	for name, p := range s.kept() {
		if name == what {
			flat, err := look.isFlat(ctx, s, p)
			if err != nil {
				return false, fmt.Errorf("%s: %w", name, err)
			}
			return flat, nil
		}
	}
	return false, nil
}

// clonedFrom returns the snapshot that a clone was made of, of which the image keeps the state
// at; nil if it was none, or has been removed. Where it was not noted the first that is the same
// state will do.
func (s *superblock) clonedFrom(at *snapshot) *snapshot {
	for i := range s.Snapshots {
		p := &s.Snapshots[i]
		if p.ID == at.Of || at.Of == uuid.Nil && p.Settled && p.Object == at.Object {
			return p
		}
	}
	return nil
}

// A Descendant is an image that was cloned from another one, or from a clone of that.
type Descendant struct {
	ID      uuid.UUID
	Name    string // that it has, or had
	Removed bool   // it is there for clones of its own only
}

// Descendants returns the clones of the image id, or those of its snapshot of unless that is
// uuid.Nil; with deep also the clones of these, and so on. What has been removed, and has no
// clone left, is not among them.
func Descendants(ctx context.Context, st backend.Store, id, of uuid.UUID, deep bool) ([]Descendant, error) {
	names, err := backend.Names(ctx, st)
	if err != nil {
		return nil, err
	}
	w := &descent{st: st, deep: deep, names: make(map[uuid.UUID]string, len(names)), seen: map[uuid.UUID]bool{id: true}}
	for _, n := range names {
		w.names[n.ID] = n.Name
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return nil, err
	}
	return w.below(ctx, sb, func(at *snapshot) bool {
		if of == uuid.Nil {
			return true
		}
		p := sb.clonedFrom(at)
		return p != nil && p.ID == of
	})
}

// descent collects descendants.
type descent struct {
	st    backend.Store
	deep  bool
	names map[uuid.UUID]string
	seen  map[uuid.UUID]bool // damaged superblocks may say that an image is its own ancestor
}

// below returns the clones of an image, those that wanted chooses, and with deep all below them.
func (w *descent) below(ctx context.Context, sb *superblock, wanted func(*snapshot) bool) (list []Descendant, err error) {
	for i := range sb.Clones {
		at := &sb.Clones[i]
		if !at.Made || w.seen[at.ID] || !wanted(at) {
			continue
		}
		w.seen[at.ID] = true
		more, err := w.clone(ctx, at)
		if err != nil {
			return nil, err
		}
		list = append(list, more...)
	}
	return list, nil
}

// clone returns a clone, if it is one still, and with deep what is below it.
func (w *descent) clone(ctx context.Context, at *snapshot) ([]Descendant, error) {
	name, named := w.names[at.ID]
	list := []Descendant{{ID: at.ID, Name: name}}
	if named && !w.deep {
		return list, nil
	}
	sb, _, err := loadSuperblock(ctx, w.st, at.ID)
	if errors.Is(err, backend.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	more, err := w.below(ctx, sb, func(*snapshot) bool { return true })
	if err != nil {
		return nil, err
	}
	if !named {
		if list[0].Name, list[0].Removed = sb.Name, true; sb.Removed && len(more) == 0 {
			return nil, nil
		}
	}
	if !w.deep {
		more = nil
	}
	return append(list, more...), nil
}
