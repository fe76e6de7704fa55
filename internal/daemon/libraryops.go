package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// changeTimeout bounds what is changed in a store for a library client.
const changeTimeout = time.Minute

// parse reads what a request asks.
func parse(f wire.Frame, q wire.Message) error {
	return invalid(wire.Parse(f.Payload, q))
}

// hello begins a session.
func (s *session) hello(f wire.Frame, w *answer) error {
	var q wire.HelloRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	if q.Low > ring.Version || q.High < max(q.Low, ring.MinVersion) {
		return fmt.Errorf("%w: the client speaks version %d to %d of the ring, this lsdd version %d to %d: use those of one release", errInvalid, q.Low, q.High, ring.MinVersion, ring.Version)
	}
	s.version = min(q.High, ring.Version)
	w.result = &wire.HelloResult{Version: s.version, Entries: ring.MaxEntries, Data: ring.MaxData, Daemon: s.d.cfg.Version}
	return nil
}

// open opens an image: the session is a handle from then on.
func (s *session) open(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.OpenRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	if s.handle != nil {
		return errRules
	}
	if err := s.takeRing(q.Data); err != nil {
		return err
	}
	o, err := s.openHandle(ctx, &q)
	if err != nil {
		s.giveRing()
		return err
	}
	s.handle, s.rights = o.handle, o.rights
	s.d.living.add(s.handle)
	st, err := s.describe(ctx)
	if err != nil {
		s.end()
		return err
	}
	res := &wire.OpenResult{StatResult: st, Entries: q.Entries, Data: q.Data, Number: s.handle.number}
	if s.handle.readOnly {
		res.Flags = wire.OpenedReadOnly
	}
	files := s.handle.mem.Files()
	w.result, w.files = res, files[:]
	return nil
}

// describe says what the handle's image is like.
func (s *session) describe(ctx context.Context) (o wire.StatResult, err error) {
	rec := s.attachment().record()
	_, name, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return o, err
	}
	if backend.InTrash(name) { // it is called what it was
		if err := s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
			info, err := engine.DescribeID(ctx, st, id)
			name = info.Name
			return err
		}); err != nil {
			return o, err
		}
	}
	o.ID, o.Name, o.Size, o.Block = rec.ImageID, name, rec.Size, rec.BlockSize
	o.ObjectSize = engine.DefaultObjectSize
	for dk := s.attachment().getDisk(); dk != nil && dk.image != nil; dk = s.attachment().getDisk() {
		size, err := dk.size(ctx)
		if err == nil {
			o.Size = size
			break
		}
		if !errors.Is(err, reactor.ErrStopped) || !sleep(ctx, joinPause) {
			return o, err
		}
	}
	return o, nil
}

// closeHandle ends the handle, once nothing of it is under way.
func (s *session) closeHandle(ctx context.Context) error {
	for dk := s.attachment().getDisk(); dk != nil; dk = s.attachment().getDisk() {
		err := dk.unhook(ctx, s.handle)
		if err == nil {
			break
		}
		if !errors.Is(err, reactor.ErrStopped) || !sleep(ctx, joinPause) {
			return err
		}
	}
	s.end()
	return nil
}

func (s *session) stat(ctx context.Context, w *answer) error {
	o, err := s.describe(ctx)
	w.result = &o
	return err
}

// inStore does something with a store.
func (d *Daemon) inStore(ctx context.Context, u backend.URL, do func(context.Context, backend.Store) error) error {
	ctx, stop := context.WithTimeout(ctx, changeTimeout)
	defer stop()
	st, err := d.openSt(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	return do(ctx, st)
}

// create makes an image, and the store if there is none.
func (s *session) create(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.CreateRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, err := s.libraryImage(q.Store, q.Image, policy.Manage)
	if err != nil {
		return err
	}
	o := engine.CreateOptions{Size: q.Size, Empty: true, BlockSize: 4096, ObjectSize: uint32(min(q.ObjectSize, engine.MaxObjectSize))}
	if q.Size == 0 || q.Size%4096 != 0 { // what is to grow from nothing may get any size
		o.BlockSize = 512
	}
	if o.ObjectSize < engine.MinObjectSize {
		o.ObjectSize = engine.DefaultObjectSize
	}
	// Tried on nothing first: a bad size must not leave a new store behind.
	if _, err := engine.Create(ctx, mem.New(), q.Image, o); err != nil {
		return invalid(err)
	}
	if err := s.d.needStore(ctx, u); err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		id, err := engine.Create(ctx, st, q.Image, o)
		w.result = &wire.CreateResult{ID: id}
		return err
	})
}

// needStore makes a store if there is none.
func (d *Daemon) needStore(ctx context.Context, u backend.URL) error {
	ctx, stop := context.WithTimeout(ctx, changeTimeout)
	defer stop()
	st, err := d.openSt(ctx, u)
	if errors.Is(err, backend.ErrNotFound) {
		st, err = d.createSt(ctx, u)
	}
	if err != nil {
		return err
	}
	return st.Close()
}

// remove removes an image; the space is reclaimed in the background.
func (s *session) remove(ctx context.Context, f wire.Frame) error {
	var q wire.RemoveRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, err := s.libraryImage(q.Store, q.Image, policy.Manage)
	if err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		id, err := backend.Lookup(ctx, st, q.Image)
		if err != nil {
			return err
		}
		if err := s.d.free(ctx, func(r *record) bool { return r.ImageID == id }); err != nil {
			return err
		}
		if id, err = engine.Remove(ctx, st, q.Image, engine.RemoveOptions{URL: u.Image(q.Image)}); err != nil {
			return err
		}
		if err := s.d.reclaim.ask(api.ReclaimRequest{Store: u.String(), ImageID: id}); err != nil {
			s.d.logger.Warn("the space of a removed image is left to lsdctl gc", "image", u.Image(q.Image), "err", err)
		}
		return nil
	})
}

// free detaches what was attached for library clients and has none, of that which what chooses.
func (d *Daemon) free(ctx context.Context, what func(*record) bool) error {
	for _, a := range d.all() {
		if rec := a.record(); a.id < firstDoor || !what(&rec) {
			continue
		}
		if c := a.clients(); len(c) > 0 {
			return a.busy(c)
		}
		if err := a.detachInTurn(ctx); err != nil {
			return err
		}
	}
	return nil
}

// detachInTurn detaches what has no users, once nobody else is at it.
func (a *attachment) detachInTurn(ctx context.Context) error {
	if err := a.takeInTurn(ctx); err != nil {
		return err
	}
	defer func() { <-a.op }()
	return a.detachReadily(ctx)
}

// takeInTurn takes op, which the caller gives back, once nobody else is at it.
func (a *attachment) takeInTurn(ctx context.Context) error {
	select {
	case a.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %w", a.name(), errAtIt)
	}
}

// list lists the names of those of a store's images that the client may read, some at a time.
func (s *session) list(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.ListRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, grants, err := s.libraryStore(q.Store)
	if err != nil {
		return err
	}
	var names []backend.Entry
	err = s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) (err error) {
		names, err = backend.Names(ctx, st)
		return err
	})
	if errors.Is(err, backend.ErrNotFound) {
		err = nil // there is no store, and so no image
	}
	if err != nil {
		return err
	}
	// Of others it must not even be known that they are there.
	names = slices.DeleteFunc(names, func(e backend.Entry) bool { return backend.InTrash(e.Name) || !grants.Allow(e.Name, policy.Read) })
	slices.SortFunc(names, func(a, b backend.Entry) int { return strings.Compare(a.Name, b.Name) })
	from := sort.Search(len(names), func(i int) bool { return names[i].Name > q.After })
	l := &wire.ListResult{}
	for _, n := range names[from:] {
		if !l.Add(wire.ListedImage{Name: n.Name, ID: n.ID}) {
			break
		}
	}
	w.result = l
	return nil
}

// rename gives an image another name.
func (s *session) rename(ctx context.Context, f wire.Frame) error {
	var q wire.RenameRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	u, err := s.libraryImage(q.Store, q.Image, policy.Manage)
	if err == nil {
		_, err = s.libraryImage(q.Store, q.Name, policy.Manage)
	}
	if err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error { return engine.Rename(ctx, st, q.Image, q.Name) })
}

// resize gives the image another size.
func (s *session) resize(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.ResizeRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	if err := s.onAttachment(func(a *attachment) error {
		_, err := a.resize(ctx, api.ResizeRequest{Size: q.Size, Shrink: q.Shrink}, w.progress)
		return err
	}); err != nil {
		return err
	}
	return s.size(ctx, w)
}

// size answers with the size of the image.
func (s *session) size(ctx context.Context, w *answer) error {
	o, err := s.describe(ctx)
	w.result = &wire.SizeResult{Size: o.Size}
	return err
}

// named does something with the store of the handle's image and the name of a snapshot.
func (s *session) named(ctx context.Context, f wire.Frame, do func(context.Context, backend.Store, uuid.UUID, string) error) error {
	var q wire.SnapshotRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	if err := backend.CheckSnapshotName(q.Name); err != nil {
		return invalid(err)
	}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error { return do(ctx, st, id, q.Name) })
}

// withStore does something with the store of the handle's image.
func (s *session) withStore(ctx context.Context, do func(context.Context, backend.Store, uuid.UUID) error) error {
	rec := s.attachment().record()
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return err
	}
	return s.d.inStore(ctx, u, func(ctx context.Context, st backend.Store) error { return do(ctx, st, rec.ImageID) })
}

// snapshot makes a snapshot.
func (s *session) snapshot(ctx context.Context, f wire.Frame) error {
	return s.changed(s.named(ctx, f, func(ctx context.Context, st backend.Store, id uuid.UUID, name string) error {
		_, err := engine.CreateSnapshot(ctx, st, id, name, engine.SnapshotOptions{Nudge: s.refresh})
		return err
	}))
}

// changed tells the image's clients what has succeeded.
func (s *session) changed(err error) error {
	if err == nil {
		s.attachment().tellChange()
	}
	return err
}

// removeSnapshot removes a snapshot that nobody here has open.
func (s *session) removeSnapshot(ctx context.Context, f wire.Frame) error {
	return s.changed(s.named(ctx, f, func(ctx context.Context, st backend.Store, id uuid.UUID, name string) error {
		list, err := engine.Snapshots(ctx, st, id)
		if err != nil {
			return err
		}
		for _, snap := range list {
			if snap.Name != name {
				continue
			}
			if err := s.d.free(ctx, func(r *record) bool { return r.Snapshot == snap.ID }); err != nil {
				return err
			}
			if a := s.d.attachmentOf(id, snap.ID); a != nil {
				return fmt.Errorf("%s is attached as %s: lsdctl del %s first: %w", a.record().URL, a.name(), a.name(), unix.EBUSY)
			}
		}
		return engine.RemoveSnapshot(ctx, st, id, name)
	}))
}

// renameSnapshot gives a snapshot another name.
func (s *session) renameSnapshot(ctx context.Context, f wire.Frame) error {
	var q wire.RenameSnapshotRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	for _, name := range []string{q.Snapshot, q.Name} {
		if err := backend.CheckSnapshotName(name); err != nil {
			return invalid(err)
		}
	}
	return s.changed(s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		return engine.RenameSnapshot(ctx, st, id, q.Snapshot, q.Name)
	}))
}

// snapshots lists the snapshots of the handle's image.
func (s *session) snapshots(ctx context.Context, w *answer) error {
	var list []engine.Snapshot
	if err := s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
		list, err = engine.Snapshots(ctx, st, id)
		return err
	}); err != nil {
		return err
	}
	l := &wire.SnapshotList{}
	for _, snap := range list {
		if !snap.Pending {
			l.Snapshots = append(l.Snapshots, wire.ListedSnapshot{Number: wire.SnapshotNumber(snap.ID), Size: snap.Size, Made: snap.Created.UnixNano(), Name: snap.Name})
		}
	}
	w.result = l
	return nil
}

// rollBack makes the image what it was at a snapshot, for the handle that asks.
func (s *session) rollBack(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.SnapshotRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	if err := s.onAttachment(func(a *attachment) error {
		_, err := a.rollBack(ctx, api.RollbackRequest{Snapshot: q.Name}, s.handle, w.progress)
		return err
	}); err != nil {
		return err
	}
	return s.size(ctx, w)
}
