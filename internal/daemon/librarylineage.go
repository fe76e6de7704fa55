package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// clone makes an image of a snapshot of another one.
func (s *session) clone(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.CloneRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, err := s.libraryImage(q.Store, q.Image, policy.Read)
	if err == nil {
		_, err = s.libraryImage(q.Store, q.Name, policy.Manage)
	}
	if err == nil && (q.Snapshot != "" || q.Number == 0) {
		err = invalid(backend.CheckSnapshotName(q.Snapshot))
	}
	if err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		parent, err := engine.Describe(ctx, st, q.Image)
		if err == nil && parent.Removed {
			err = engine.ErrRemoved
		}
		if err != nil {
			return err
		}
		snap := findSnapshot(parent.Snapshots, q.Snapshot, q.Number)
		if snap == nil {
			return fmt.Errorf("%s: %w", u.Image(q.Image), engine.ErrNoSnapshot)
		}
		id, err := engine.Clone(ctx, st, parent.ID, q.Name, engine.CloneOptions{Snapshot: snap.Name})
		w.result = &wire.CloneResult{ID: id, ObjectSize: engine.DefaultObjectSize}
		return err
	})
}

// parent says of what the handle's image was cloned, as what the handle has open has it.
func (s *session) parent(ctx context.Context, w *answer) error {
	of := s.attachment().record().Snapshot
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		a, err := engine.AncestryOf(ctx, st, id, of)
		if err != nil {
			return err
		}
		if a.Overlap == 0 {
			return engine.ErrNoParent // as to librbd
		}
		p := &wire.ParentResult{ID: a.Parent, Name: a.Name, Snapshot: a.Snapshot, Number: wire.SnapshotNumber(a.State), Overlap: a.Overlap}
		switch name, err := nameOf(ctx, st, a.Parent); {
		case a.Removed, err == nil && backend.InTrash(name):
			p.Flags |= wire.ParentRemoved
		case err == nil:
			p.Name = name
		case !errors.Is(err, backend.ErrNotFound):
			return err
		}
		if p.Snapshot == "" {
			p.Flags, p.Snapshot = p.Flags|wire.ParentUnnamed, a.State.String()
		}
		w.result = p
		return nil
	})
}

// children lists what was cloned from what the handle has open, some at a time.
func (s *session) children(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.ChildrenRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	grants, err := s.imageGrants()
	if err != nil {
		return err
	}
	of := s.attachment().record().Snapshot
	var list []engine.Descendant
	if err := s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
		if list, err = engine.Descendants(ctx, st, id, of, q.Flags&wire.ChildrenDeep != 0); err != nil {
			return err
		}
		return showTrashed(ctx, st, list)
	}); err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(c engine.Descendant) bool { return !grants.Allow(c.Name, policy.Read) })
	slices.SortFunc(list, func(a, b engine.Descendant) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	from := sort.Search(len(list), func(i int) bool { return bytes.Compare(list[i].ID[:], q.After[:]) > 0 })
	l := &wire.ChildrenResult{}
	for _, c := range list[from:] {
		x := wire.ListedChild{ListedImage: wire.ListedImage{Name: c.Name, ID: c.ID}}
		if c.Removed {
			x.Flags = wire.ChildRemoved
		}
		if !l.Add(x) {
			break
		}
	}
	w.result = l
	return nil
}

// showTrashed gives what is in the trash of a list the name that it had.
func showTrashed(ctx context.Context, st backend.Store, list []engine.Descendant) error {
	for i := range list {
		c := &list[i]
		if !backend.InTrash(c.Name) {
			continue
		}
		t, err := engine.InTrash(ctx, st, c.ID)
		switch {
		case err == nil:
			c.Name = t.Name
		case !errors.Is(err, backend.ErrNotFound): // that: it has just left it
			return err
		}
		c.Removed = true // for clients
	}
	return nil
}
