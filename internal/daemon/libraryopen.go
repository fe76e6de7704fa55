package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// openTimeout bounds the opening of an image for a library client. What is being attached,
// detached or taken up again is waited for.
const openTimeout = time.Minute

// errDetached is for a client that comes back to an image that is not attached any more.
var errDetached = errors.New("it has been detached, or another host has had it, since the program opened it")

// A subject is what a client wants to open.
type subject struct {
	store    backend.URL
	info     engine.Info
	snapshot *engine.Snapshot // nil: the image itself
	rights   policy.Rights    // what the client may do with it
}

// url returns the subject's URL.
func (s *subject) url() string {
	if s.snapshot != nil {
		return s.store.Snapshot(s.info.Name, s.snapshot.Name)
	}
	return s.store.Image(s.info.Name)
}

// snapshotID returns the snapshot's id, uuid.Nil without one.
func (s *subject) snapshotID() uuid.UUID {
	if s.snapshot == nil {
		return uuid.Nil
	}
	return s.snapshot.ID
}

// lookUp finds what a client wants to open in its store. Where it may not, it does not learn
// whether the image is there.
func (s *session) lookUp(ctx context.Context, q *wire.OpenRequest, want policy.Rights) (*subject, error) {
	u, grants, err := s.libraryStore(q.Store)
	if err != nil {
		return nil, err
	}
	sub, name := &subject{store: u}, q.Image
	if q.Flags&wire.OpenByID != 0 {
		sub.info, name, err = s.d.describeByID(ctx, u, q.Image)
		if err == nil && !grants.Allow(name, want) || err != nil && errnoOf(err) == unix.ENOENT && !grants.AllowAll(want) {
			err = s.denied(want, fmt.Sprintf("image %q of %s", clip(q.Image), u))
		}
	} else if u, err = s.libraryImage(q.Store, q.Image, want); err == nil {
		sub.info, err = s.d.describeImage(ctx, u, q.Image)
	}
	if err != nil {
		return nil, err
	}
	sub.rights = grants.Rights(name)
	return sub, sub.pickSnapshot(q)
}

// clip keeps a wrong word from filling the screen.
func clip(s string) string { return s[:min(len(s), 64)] }

// pickSnapshot finds the snapshot that a client wants, if it wants one.
func (s *subject) pickSnapshot(q *wire.OpenRequest) error {
	if q.Snapshot == "" && q.Number == 0 {
		return nil
	}
	if s.snapshot = findSnapshot(s.info.Snapshots, q.Snapshot, q.Number); s.snapshot == nil {
		return fmt.Errorf("%s: %w", s.store.Image(s.info.Name), engine.ErrNoSnapshot)
	}
	return nil
}

// findSnapshot finds a snapshot by its name, or where that is empty by its number; nil if there
// is none.
func findSnapshot(list []engine.Snapshot, name string, number uint64) *engine.Snapshot {
	for i := range list {
		s := &list[i]
		if !s.Pending && (name != "" && s.Name == name || name == "" && wire.SnapshotNumber(s.ID) == number) {
			return s
		}
	}
	return nil
}

// describeByID is describeImage of an image of which the id is known. name is what the policy knows
// it by: the one that it has, or had before it came into the trash.
func (d *Daemon) describeByID(ctx context.Context, u backend.URL, text string) (info engine.Info, name string, err error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return info, "", fmt.Errorf("%q is no image's id: %w", clip(text), backend.ErrNotFound)
	}
	ctx, stop := context.WithTimeout(ctx, lookTimeout)
	defer stop()
	st, err := d.openSt(ctx, u)
	if err != nil {
		return info, "", err
	}
	defer st.Close()
	info, err = engine.DescribeID(ctx, st, id)
	if err == nil && info.Removed {
		err = engine.ErrRemoved
	}
	if err == nil { // the superblock's may be out of date, and another image's
		info.Name, name, err = namesOf(ctx, st, id)
	}
	if err != nil {
		err = fmt.Errorf("image %s in %s: %w", id, u, err)
	}
	return info, name, err
}

// An opened is an image that a library client has opened.
type opened struct {
	handle *handle
	rights policy.Rights // to the image
}

// openHandle opens an image for a library client, and attaches it if need be.
func (s *session) openHandle(ctx context.Context, q *wire.OpenRequest) (o opened, err error) {
	ctx, stop := context.WithTimeoutCause(ctx, openTimeout, fmt.Errorf("it could not be opened within a minute: %w", context.DeadlineExceeded))
	defer stop()
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	defer context.AfterFunc(s.d.serving, func() { leave(errEnding) })()
	readOnly, want := q.Flags&wire.OpenReadOnly != 0 || q.Snapshot != "" || q.Number != 0, policy.Read
	if !readOnly {
		want |= policy.Write
	}
	if o.handle, err = newHandle(s.who, s.conn, readOnly, q.Flags&wire.OpenShared != 0, s.version, q.Entries, q.Data); err != nil {
		return opened{}, err
	}
	if q.Flags&wire.OpenAgain != 0 {
		err = s.openAgain(ctx, q, want, &o)
	} else {
		err = s.openFresh(ctx, q, want, &o)
	}
	if err != nil {
		return opened{}, errors.Join(err, o.handle.put())
	}
	return o, nil
}

// openFresh opens what a client has not had open before.
func (s *session) openFresh(ctx context.Context, q *wire.OpenRequest, want policy.Rights, o *opened) error {
	sub, err := s.lookUp(ctx, q, want)
	if err != nil {
		return err
	}
	for {
		a := s.d.attachmentOf(sub.info.ID, sub.snapshotID())
		if a == nil {
			if err := s.d.attachFor(ctx, sub, o.handle.readOnly); err != nil && !errors.Is(err, errAttached) {
				return err
			}
			if s.d.attachmentOf(sub.info.ID, sub.snapshotID()) == nil {
				// Another client was faster, whose attempt has failed; or the name has become that of
				// another image.
				if !sleep(ctx, joinPause) {
					return context.Cause(ctx)
				}
				if sub, err = s.lookUp(ctx, q, want); err != nil {
					return err
				}
			}
			continue
		}
		if ok, err := s.join(ctx, a, sub, want, o, false); ok || err != nil {
			return err
		}
	}
}

// openAgain opens what a client had open when the daemon before this one died. It must have been
// attached ever since: what the client knows of it may be out of date otherwise. What the client
// had under way has ended then, also where it was its connection alone that has.
func (s *session) openAgain(ctx context.Context, q *wire.OpenRequest, want policy.Rights, o *opened) error {
	var sub *subject
	if s.caller.UID != 0 { // who only says that he had it open; root need not wait for the store
		byID := *q
		byID.Flags, byID.Image, byID.Snapshot, byID.Number = q.Flags|wire.OpenByID, q.ID.String(), "", 0
		var err error
		if sub, err = s.lookUp(ctx, &byID, want); err != nil {
			return err
		}
	}
	if err := s.d.living.await(ctx, q.Instead); err != nil {
		return err
	}
	for {
		a := s.d.again(q, o.handle.readOnly)
		if a == nil {
			return errDetached
		}
		if ok, err := s.join(ctx, a, sub, want, o, true); ok || err != nil {
			return err
		}
	}
}

// join makes the handle of o one of an attachment's, if the client may use that for the subject
// that it has found. It reports false where that is to be tried again.
func (s *session) join(ctx context.Context, a *attachment, sub *subject, want policy.Rights, o *opened, again bool) (bool, error) {
	o.rights = policy.All
	if s.caller.UID != 0 {
		// Who can write to the store itself can give an image there the id of one elsewhere.
		o.rights = sub.rights
		if u, name, _, err := backend.ParseSource(a.record().URL); err != nil || u != sub.store {
			o.rights &= s.d.guard.policy().In(s.caller, u).Rights(name)
		}
		if !o.rights.Has(want) {
			return false, fmt.Errorf("it is attached here by another URL: %w", s.denied(want, sub.url()))
		}
	}
	return a.join(ctx, o.handle, again)
}

// again finds what a client had open.
func (d *Daemon) again(q *wire.OpenRequest, readOnly bool) *attachment {
	for _, a := range d.all() {
		if rec := a.record(); !rec.Null && rec.ImageID == q.ID && rec.isSnapshot(q) && (readOnly || !rec.ReadOnly) {
			return a
		}
	}
	return nil
}

// isSnapshot reports whether what is attached is the snapshot that a client wants, or, if it
// wants none, the image itself. A client may know a snapshot by its name alone, which may be
// another by now: what counts is that by which it was attached.
func (r *record) isSnapshot(q *wire.OpenRequest) bool {
	switch {
	case r.Snapshot == uuid.Nil:
		return q.Snapshot == "" && q.Number == 0
	case q.Number != 0:
		return q.Number == wire.SnapshotNumber(r.Snapshot)
	}
	_, _, name, err := backend.ParseSource(r.URL)
	return err == nil && name == q.Snapshot
}

// attachmentOf finds the attachment of an image, or of a snapshot of it; nil if there is none. One
// that can be written to comes first.
func (d *Daemon) attachmentOf(image, snapshot uuid.UUID) *attachment {
	var found *attachment
	for _, a := range d.all() {
		if rec := a.record(); rec.ImageID == image && rec.Snapshot == snapshot && (found == nil || !rec.ReadOnly) {
			found = a
		}
	}
	return found
}

// attachFor attaches an image, or a snapshot, for library clients.
func (d *Daemon) attachFor(ctx context.Context, s *subject, readOnly bool) error {
	_, err := d.attach(ctx, api.AttachRequest{Image: s.url(), ID: -1, Library: true, ReadOnly: readOnly, LogSize: d.cfg.LibraryLogSize}, func(api.Progress) {})
	return err
}

// join makes a handle one of the attachment's. It reports false where that is to be tried again:
// the attachment has ended meanwhile, or is not open now. again says that the client has had the
// image open.
func (a *attachment) join(ctx context.Context, h *handle, again bool) (bool, error) {
	if ctx.Err() != nil {
		return false, fmt.Errorf("%s: %w", a.name(), context.Cause(ctx))
	}
	joined, err := a.joinNow(ctx, h, again)
	if errors.Is(err, errNotOpen) {
		sleep(ctx, joinPause)
		return false, nil
	}
	return joined, err
}

// joinPause is how long a client waits until it looks anew at what is not open.
const joinPause = 20 * time.Millisecond

// errNotOpen says that what is attached is being taken up or detached.
var errNotOpen = errors.New("it is not open now")

// joinNow is join, but for the wait.
func (a *attachment) joinNow(ctx context.Context, h *handle, again bool) (bool, error) {
	select {
	case a.op <- struct{}{}:
	case <-ctx.Done():
		return false, fmt.Errorf("%s is being attached, detached or changed: %w", a.name(), context.Cause(ctx))
	}
	defer func() { <-a.op }()
	if a.d.find(a.id) != a {
		return false, nil
	}
	switch rec := a.record(); {
	case again && (rec.Phase == phaseDetaching || a.anew):
		return false, errDetached
	case h.readOnly:
	case a.id < firstDoor && !(rec.Shared && h.shared):
		return false, a.refuseWriter(h)
	case rec.ReadOnly:
		return false, a.makeWay(ctx)
	}
	switch why := a.usable(ctx); {
	case why == nil:
		a.addHandle(h)
		return true, nil
	case errors.Is(why, errNotOpen):
		return false, why
	case again:
		return false, fmt.Errorf("%w: %w", errDetached, why)
	case a.id < firstDoor || len(a.clients()) > 0:
		return false, why
	}
	// It is of no use to anybody: what is wrong with the image, if it is still, is found anew.
	return false, a.detachReadily(ctx)
}

// refuseWriter says why a handle that writes cannot be beside the attachment's block device.
func (a *attachment) refuseWriter(h *handle) error {
	rec := a.record()
	what := "is shared with those alone that ask for it: lsdctl run --shared"
	switch {
	case rec.ReadOnly:
		what = "can be opened read-only beside that alone: lsdctl del it first"
	case h.shared:
		what = "was not attached with --shared: lsdctl del it, then lsdctl add --shared"
	case !rec.Shared:
		what = "can be opened read-only beside that alone: lsdctl del it first; or both with --shared, lsdctl add and lsdctl run"
	}
	return fmt.Errorf("%s is attached here as %s, and %s: %w", rec.URL, a.name(), what, unix.EBUSY)
}

// usable returns nil where the image is open, an error that matches errNotOpen where it may be
// later, and else why it gives errors to all. The caller holds op.
func (a *attachment) usable(ctx context.Context) error {
	a.mu.Lock()
	dk, state, why, detaching := a.disk, a.state, a.err, a.rec.Phase == phaseDetaching
	a.mu.Unlock()
	switch {
	case state == api.StateFailed:
		return fmt.Errorf("%s gives errors to its users: %w", a.name(), orNil(why))
	case dk == nil || detaching:
		return errNotOpen
	}
	ctx, stop := context.WithTimeout(ctx, statsTimeout)
	defer stop()
	switch s, err := dk.stats(ctx); {
	case err != nil: // its reactor has died
		return errNotOpen
	case lost(s):
		return fmt.Errorf("%s: %w", a.name(), errTaken)
	}
	return nil
}

// makeWay has what is attached read-only, for library clients alone, make way for one who writes: it
// is detached if nobody uses it. The caller holds op.
func (a *attachment) makeWay(ctx context.Context) error {
	if len(a.clients()) == 0 {
		return a.detachReadily(ctx)
	}
	return a.turnWritable(ctx)
}

// detachReadily detaches what has no users, for who holds op.
func (a *attachment) detachReadily(ctx context.Context) error {
	_, err := a.detachHeld(ctx, api.DetachRequest{Timeout: defaultDetachTimeout}, func(api.Progress) {})
	return err
}
