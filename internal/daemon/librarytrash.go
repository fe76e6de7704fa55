package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// keptForEver is until when an image in the trash is kept of which that is not known: the last
// second that all clients can tell.
const keptForEver = 253402300799 // the end of the year 9999

// nameOf returns the name that the directory has for an image, which is its place where it is in
// the trash.
func nameOf(ctx context.Context, st backend.Store, id uuid.UUID) (string, error) {
	names, err := backend.Names(ctx, st)
	if err != nil {
		return "", err
	}
	for _, e := range names {
		if e.ID == id {
			return e.Name, nil
		}
	}
	return "", fmt.Errorf("it has no name: %w", backend.ErrNotFound)
}

// namesOf returns the name that the directory has for an image, and the one that it has for people,
// which is another one where it is in the trash.
func namesOf(ctx context.Context, st backend.Store, id uuid.UUID) (inDirectory, name string, err error) {
	if inDirectory, err = nameOf(ctx, st, id); err != nil || !backend.InTrash(inDirectory) {
		return inDirectory, inDirectory, err
	}
	t, err := engine.InTrash(ctx, st, id)
	return inDirectory, t.Name, err
}

// trashMove moves an image to the trash; who has it open goes on.
func (s *session) trashMove(ctx context.Context, f wire.Frame) error {
	var q wire.TrashMoveRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, err := s.libraryImage(q.Store, q.Image, policy.Manage)
	switch {
	case err != nil:
		return err
	case q.Keep > uint64(engine.MaxDeferment/time.Second):
		return fmt.Errorf("%w: %d seconds are longer than an image can be kept, %v", errInvalid, q.Keep, engine.MaxDeferment)
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		_, err := engine.MoveToTrash(ctx, st, q.Image, engine.TrashOptions{URL: u.Image(q.Image), Keep: time.Duration(q.Keep) * time.Second, Attached: true})
		return err
	})
}

// trashList lists the images in the trash, some at a time.
func (s *session) trashList(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.TrashListRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, grants, err := s.libraryStore(q.Store)
	if err != nil {
		return err
	}
	var list []engine.Trashed
	err = s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) (err error) {
		list, err = engine.Trash(ctx, st)
		return err
	})
	if err != nil && !errors.Is(err, backend.ErrNotFound) { // that: there is no store
		return err
	}
	list = slices.DeleteFunc(list, func(t engine.Trashed) bool { return !grants.Allow(t.Name, policy.Read) })
	from := sort.Search(len(list), func(i int) bool { return bytes.Compare(list[i].ID[:], q.After[:]) > 0 })
	l := &wire.TrashList{}
	for _, t := range list[from:] {
		im := wire.TrashedImage{ID: t.ID, Name: t.Name, Moved: t.Since.Unix(), Until: t.Until.Unix()}
		if t.Error != "" {
			im.Moved, im.Until = 0, keptForEver
		}
		if !l.Add(im) {
			break
		}
	}
	w.result = l
	return nil
}

// trashed parses the store and the id of an image in the trash that the client names, and fails if
// it may not manage images of the name that this had, and has another one, if name says so.
func (s *session) trashed(ctx context.Context, store, image, name string) (backend.URL, uuid.UUID, error) {
	u, grants, err := s.libraryStore(store)
	if err != nil {
		return u, uuid.Nil, err
	}
	if name != "" {
		if _, err := s.libraryImage(store, name, policy.Manage); err != nil {
			return u, uuid.Nil, err
		}
	}
	id, err := uuid.Parse(image)
	if err != nil {
		return u, id, fmt.Errorf("%q is no image's id: %w", clip(image), backend.ErrNotFound)
	}
	if grants.AllowAll(policy.Manage) {
		return u, id, nil
	}
	return u, id, s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		t, err := engine.InTrash(ctx, st, id)
		if errors.Is(err, backend.ErrNotFound) || err == nil && !grants.Allow(t.Name, policy.Manage) {
			return s.denied(policy.Manage, u.Image(id.String())) // whether it is there or not
		}
		return err
	})
}

// trashRemove removes an image from the trash; the space is reclaimed in the background.
func (s *session) trashRemove(ctx context.Context, f wire.Frame) error {
	var q wire.TrashRemoveRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, id, err := s.trashed(ctx, q.Store, q.Image, "")
	if err != nil {
		return err
	}
	return s.d.removeTrashed(ctx, u, id, engine.RemoveTrashedOptions{Force: q.Force})
}

// removeTrashed removes an image from the trash that no client has open.
func (d *Daemon) removeTrashed(ctx context.Context, u backend.URL, id uuid.UUID, o engine.RemoveTrashedOptions) error {
	o.URL = u.Image(backend.TrashName(id))
	return d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		if _, err := backend.Lookup(ctx, st, backend.TrashName(id)); err != nil {
			return err
		}
		if err := d.free(ctx, func(r *record) bool { return r.ImageID == id }); err != nil {
			return err
		}
		if err := engine.RemoveFromTrash(ctx, st, id, o); err != nil {
			return err
		}
		if err := d.reclaim.ask(api.ReclaimRequest{Store: u.String(), ImageID: id}); err != nil {
			d.logger.Warn("the space of a removed image is left to lsdctl gc", "image", o.URL, "err", err)
		}
		return nil
	})
}

// trashRestore brings an image back from the trash.
func (s *session) trashRestore(ctx context.Context, f wire.Frame) error {
	var q wire.TrashRestoreRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, id, err := s.trashed(ctx, q.Store, q.Image, q.Name)
	if err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		_, err := engine.RestoreFromTrash(ctx, st, id, q.Name)
		return err
	})
}

// trashPurge removes what need not be kept any more from the trash. What is in use, or has
// snapshots, stays, and the first of these is the error in the end.
func (s *session) trashPurge(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.TrashPurgeRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, grants, err := s.libraryStore(q.Store)
	if err != nil {
		return err
	}
	at := time.Now()
	if q.At != 0 {
		at = time.Unix(min(q.At, keptForEver), 0)
	}
	var due []engine.Trashed
	err = s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) (err error) {
		due, err = engine.DueInTrash(ctx, st, at)
		return err
	})
	due = slices.DeleteFunc(due, func(t engine.Trashed) bool { return !grants.Allow(t.Name, policy.Manage) })
	if errors.Is(err, backend.ErrNotFound) {
		return nil // there is no store
	}
	if err != nil {
		return err
	}
	var left error
	for i, t := range due {
		err := s.d.removeTrashed(ctx, u, t.ID, engine.RemoveTrashedOptions{At: at})
		switch {
		case err == nil, errors.Is(err, backend.ErrNotFound): // that: another one was at it
		case !stays(err):
			return err
		case left == nil:
			left = fmt.Errorf("%s, %s, stays in the trash: %w", t.Name, t.ID, err)
		}
		w.progress(api.Progress{Done: uint64(i + 1), Total: uint64(len(due))})
	}
	return left
}

// stays reports whether a purge leaves an image that it could not remove, and goes on.
func stays(err error) bool {
	var snapshots *engine.SnapshotsError
	var deferred *engine.DeferredError
	return errors.As(err, &snapshots) || errors.As(err, &deferred) || errnoOf(err) == unix.EBUSY
}
