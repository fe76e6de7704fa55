package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/internal/transfer"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// flattenTries is how often an image is flattened anew that needs something of its parent again.
const flattenTries = 3

// atLength does something with the store of the handle's image that may take any time.
func (s *session) atLength(ctx context.Context, do func(context.Context, backend.URL, backend.Store, uuid.UUID) error) error {
	rec := s.attachment().record()
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return err
	}
	st, err := s.d.openSt(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	return do(ctx, u, st, rec.ImageID)
}

// flatten moves what the image has of its ancestors into objects of its own, and ends that it is
// a clone if no snapshot of it is one still, as lsdctl flatten does. What was moved stays moved if
// the client goes.
func (s *session) flatten(ctx context.Context, w *answer) error {
	return s.atLength(ctx, func(ctx context.Context, u backend.URL, st backend.Store, id uuid.UUID) error {
		info, err := engine.DescribeID(ctx, st, id)
		if err == nil && info.Parent == uuid.Nil {
			err = invalid(errors.New(engine.ErrNoParent.Error())) // as to librbd, not "no such file"
		}
		for try := 1; err == nil; try++ {
			if err = s.onAttachment(func(a *attachment) error {
				_, err := a.flatten(ctx, w.progress)
				return err
			}); err != nil {
				break
			}
			var found engine.Separation
			found, err = engine.Separate(ctx, st, id)
			if err != nil || !slices.Contains(found.Needs, engine.PresentState) {
				break
			}
			if try == flattenTries {
				err = errors.New("it was changed meanwhile, and needs something of its parent still: flatten it again")
			}
		}
		if err == nil {
			s.reclaimRemoved(ctx, u, st, info.Parent)
		}
		return err
	})
}

// reclaimRemoved is reclaim of an image that may not have been removed.
func (s *session) reclaimRemoved(ctx context.Context, u backend.URL, st backend.Store, id uuid.UUID) {
	switch info, err := engine.DescribeID(ctx, st, id); {
	case errors.Is(err, backend.ErrNotFound): // all of it is gone
	case err != nil:
		s.d.logger.Warn("it is not known whether there is space to be reclaimed of the parent of an image that was flattened: lsdctl gc finds it", "store", u.String(), "parent", id, "err", err)
	case info.Removed:
		s.reclaim(u, id)
	}
}

// reclaim has reclaimed what nobody needs any more of an image that has been removed.
func (s *session) reclaim(u backend.URL, id uuid.UUID) {
	if err := s.d.reclaim.ask(api.ReclaimRequest{Store: u.String(), ImageID: id}); err != nil {
		s.d.logger.Warn("the space of a removed image is left to lsdctl gc", "store", u.String(), "image", id, "err", err)
	}
}

// copy makes an image that is what the handle has open. Nothing is left of one that has not come
// to its end.
func (s *session) copy(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.CopyRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	to, err := s.libraryImage(q.Store, q.Image, policy.Manage)
	if err != nil {
		return err
	}
	if err := s.d.needStore(ctx, to); err != nil {
		return err
	}
	dst, err := s.d.openSt(ctx, to)
	if err != nil {
		return err
	}
	defer dst.Close()
	var mu sync.Mutex // some of what it does it does side by side
	o := transfer.CopyOptions{
		HeadOnly: q.Flags&wire.CopyDeep == 0,
		Of:       s.attachment().record().Snapshot,
		Whole:    true,
		Snapshot: engine.SnapshotOptions{Nudge: s.refresh},
		Options: transfer.Options{URL: to.Image(q.Image), Logger: s.d.logger, Progress: func(what string, done, total uint64) {
			mu.Lock()
			defer mu.Unlock()
			if total > 0 {
				w.progress(api.Progress{What: what, Done: done, Total: total})
			}
		}},
	}
	return s.atLength(ctx, func(ctx context.Context, _ backend.URL, src backend.Store, id uuid.UUID) error {
		if info, err := engine.DescribeID(ctx, src, id); err != nil || info.Size == 0 {
			return cmp.Or(err, engine.ErrEmpty)
		}
		made, err := transfer.Copy(ctx, src, id, dst, q.Image, o)
		if err != nil {
			return fmt.Errorf("copy to %s: %w", to.Image(q.Image), err)
		}
		w.result = &wire.CreateResult{ID: made.ID}
		return nil
	})
}
