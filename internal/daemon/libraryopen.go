package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
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

// lookUp finds what a client wants to open in its store.
func (d *Daemon) lookUp(ctx context.Context, q *wire.OpenRequest) (*subject, error) {
	u, err := libraryStore(q.Store)
	if err != nil {
		return nil, err
	}
	s := &subject{store: u}
	if q.Flags&wire.OpenByID != 0 {
		s.info, err = d.describeByID(ctx, u, q.Image)
	} else if err = invalid(backend.CheckImageName(q.Image)); err == nil {
		s.info, err = d.describeImage(ctx, u, q.Image)
	}
	if err != nil || q.Snapshot == "" && q.Number == 0 {
		return s, err
	}
	for i, snap := range s.info.Snapshots {
		if !snap.Pending && (q.Snapshot != "" && snap.Name == q.Snapshot || q.Snapshot == "" && wire.SnapshotNumber(snap.ID) == q.Number) {
			s.snapshot = &s.info.Snapshots[i]
			return s, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", u.Image(s.info.Name), engine.ErrNoSnapshot)
}

// libraryStore parses the URL of a store that a client names.
func libraryStore(s string) (backend.URL, error) {
	u, err := backend.ParseStore(s)
	if err == nil && u.Scheme == backend.SchemeMem {
		err = errors.New("a mem: store lives and dies with one process: it is for tests")
	}
	return u, invalid(err)
}

// describeByID is describeImage of an image of which the id is known.
func (d *Daemon) describeByID(ctx context.Context, u backend.URL, text string) (engine.Info, error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return engine.Info{}, fmt.Errorf("%q is no image's id: %w", text, backend.ErrNotFound)
	}
	ctx, stop := context.WithTimeout(ctx, lookTimeout)
	defer stop()
	st, err := d.openSt(ctx, u)
	if err != nil {
		return engine.Info{}, err
	}
	defer st.Close()
	info, err := engine.DescribeID(ctx, st, id)
	if err == nil && info.Removed {
		err = engine.ErrRemoved
	}
	if err != nil {
		return info, fmt.Errorf("image %s in %s: %w", id, u, err)
	}
	return info, nil
}

// openHandle opens an image for a library client, and attaches it if need be.
func (d *Daemon) openHandle(ctx context.Context, q *wire.OpenRequest, who string, sock io.Closer) (*attachment, *handle, error) {
	ctx, stop := context.WithTimeoutCause(ctx, openTimeout, fmt.Errorf("it could not be opened within a minute: %w", context.DeadlineExceeded))
	defer stop()
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	defer context.AfterFunc(d.serving, func() { leave(errEnding) })()
	readOnly := q.Flags&wire.OpenReadOnly != 0 || q.Snapshot != "" || q.Number != 0
	h, err := newHandle(who, sock, readOnly, q.Entries, q.Data)
	if err != nil {
		return nil, nil, err
	}
	var a *attachment
	if q.Flags&wire.OpenAgain != 0 {
		a, err = d.openAgain(ctx, q, h)
	} else {
		a, err = d.openFresh(ctx, q, h)
	}
	if err != nil {
		return nil, nil, errors.Join(err, h.put())
	}
	return a, h, nil
}

// openFresh opens what a client has not had open before.
func (d *Daemon) openFresh(ctx context.Context, q *wire.OpenRequest, h *handle) (*attachment, error) {
	s, err := d.lookUp(ctx, q)
	if err != nil {
		return nil, err
	}
	for {
		a := d.attachmentOf(s.info.ID, s.snapshotID())
		if a == nil {
			if err := d.attachFor(ctx, s, h.readOnly); err != nil && !errors.Is(err, errAttached) {
				return nil, err
			}
			continue // also where another client was faster, whose attempt may yet fail
		}
		if ok, err := a.join(ctx, h, false); ok || err != nil {
			return a, err
		}
	}
}

// openAgain opens what a client had open when the daemon before this one died. It must have been
// attached ever since: what the client knows of it may be out of date otherwise.
func (d *Daemon) openAgain(ctx context.Context, q *wire.OpenRequest, h *handle) (*attachment, error) {
	for {
		a := d.again(q, h.readOnly)
		if a == nil {
			return nil, errDetached
		}
		if ok, err := a.join(ctx, h, true); ok || err != nil {
			return a, err
		}
	}
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
	_, err := d.attach(ctx, api.AttachRequest{Image: s.url(), ID: -1, Library: true, ReadOnly: readOnly}, func(api.Progress) {})
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
	case a.id < firstDoor:
		return false, fmt.Errorf("%s is attached here as %s, and can be opened read-only beside that alone: lsdctl del %s first: %w", rec.URL, a.name(), a.name(), unix.EBUSY)
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

// makeWay detaches what is attached read-only, so that it can be attached to be written to. The
// caller holds op.
func (a *attachment) makeWay(ctx context.Context) error {
	if c := a.clients(); len(c) > 0 {
		return fmt.Errorf("%w, which have it open read-only", a.busy(c))
	}
	return a.detachReadily(ctx)
}

// detachReadily detaches what has no users, for who holds op.
func (a *attachment) detachReadily(ctx context.Context) error {
	_, err := a.detachHeld(ctx, api.DetachRequest{Timeout: defaultDetachTimeout}, func(api.Progress) {})
	return err
}
