package daemon

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// metadata says what metadata the handle's image has.
func (s *session) metadata(ctx context.Context, f wire.Frame, w *answer) error {
	if f.Type == wire.GetMetadata {
		var q wire.MetadataRequest
		if err := parse(f, &q); err != nil {
			return err
		}
		return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
			v, err := engine.MetadataOf(ctx, st, id, q.Key)
			w.result = &wire.MetadataResult{Value: v}
			return err
		})
	}
	var q wire.ListMetadataRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		all, err := engine.Metadata(ctx, st, id)
		w.result = page(all, &q)
		return err
	})
}

// page returns as much of the metadata that is asked for as a frame holds.
func page(all []engine.Metadatum, q *wire.ListMetadataRequest) *wire.MetadataList {
	l := new(wire.MetadataList)
	for _, m := range all {
		switch {
		case m.Key <= q.After:
			continue
		case q.Most > 0 && len(l.Metadata) == int(q.Most):
			l.More = true
			return l
		}
		if !l.Add(wire.Metadatum{Key: m.Key, Value: m.Value}) {
			return l
		}
	}
	return l
}

// changeMetadata changes the metadata of the handle's image.
func (s *session) changeMetadata(ctx context.Context, f wire.Frame) error {
	if f.Type == wire.RemoveMetadata {
		var q wire.MetadataRequest
		if err := parse(f, &q); err != nil {
			return err
		}
		return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
			return engine.RemoveMetadata(ctx, st, id, q.Key)
		})
	}
	var q wire.Metadatum
	if err := parse(f, &q); err != nil {
		return err
	}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		return engine.SetMetadata(ctx, st, id, q.Key, q.Value)
	})
}

// locks lists the advisory locks of the handle's image, or changes them. Handles that are
// read-only may: that keeps nobody from writing.
func (s *session) locks(ctx context.Context, f wire.Frame, w *answer) error {
	switch f.Type {
	case wire.Lock:
		return s.lock(ctx, f)
	case wire.Unlock:
		var q wire.UnlockRequest
		if err := parse(f, &q); err != nil {
			return err
		}
		p, err := s.d.processAt(s.conn)
		if err != nil {
			return err
		}
		return s.unlock(ctx, p.client(), q.Cookie)
	case wire.BreakLock:
		var q wire.BreakLockRequest
		if err := parse(f, &q); err != nil {
			return err
		}
		number, ok := strings.CutPrefix(q.Client, "client.")
		if _, err := strconv.ParseUint(number, 10, 64); !ok || err != nil {
			return fmt.Errorf("%w: %.100q is no client of a lock", errInvalid, q.Client)
		}
		return s.unlock(ctx, q.Client, q.Cookie)
	}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		l, err := engine.LocksOf(ctx, st, id)
		w.result = lockList(&l)
		return err
	})
}

func lockList(l *engine.Locks) *wire.LockList {
	r := &wire.LockList{Exclusive: l.Exclusive, Tag: l.Tag}
	for _, o := range l.Lockers {
		r.Lockers = append(r.Lockers, wire.Locker{Client: o.Client, Cookie: o.Cookie, Address: o.Address, Since: o.Since.UnixNano()})
	}
	return r
}

func (s *session) lock(ctx context.Context, f wire.Frame) error {
	var q wire.LockRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	p, err := s.d.processAt(s.conn)
	if err != nil {
		return err
	}
	l := engine.Locker{Client: p.client(), Cookie: q.Cookie, Address: p.address(), Since: time.Now()}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		return engine.Lock(ctx, st, id, l, q.Exclusive, q.Tag)
	})
}

func (s *session) unlock(ctx context.Context, client, cookie string) error {
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		return engine.Unlock(ctx, st, id, client, cookie)
	})
}

// times says when the handle's image was made. Nobody notes when it is read or written.
func (s *session) times(ctx context.Context, w *answer) error {
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		info, err := engine.DescribeID(ctx, st, id)
		made := info.Created.UnixNano()
		w.result = &wire.TimesResult{Created: made, Modified: made, Accessed: made}
		return err
	})
}

// watchers says who has the handle's image open to write to it: here each handle, and the block
// device; elsewhere the host that owns it.
func (s *session) watchers(ctx context.Context, w *answer) error {
	l := &wire.WatcherList{}
	id, host := s.attachment().record().ImageID, s.d.cfg.Host
	for _, a := range s.d.all() {
		if rec := a.record(); rec.ImageID != id || rec.ReadOnly || rec.Snapshot != uuid.Nil {
			continue
		}
		l.Watchers = append(l.Watchers, a.watchers()...)
	}
	err := s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		info, err := engine.DescribeID(ctx, st, id)
		if err == nil && info.Owner != nil {
			l.Host = info.Owner.Host
		}
		return err
	})
	l.Owned = !s.handle.readOnly && l.Host == host && s.owns(ctx)
	if l.Host != "" && l.Host != host {
		l.Watchers = append(l.Watchers, wire.Watcher{Address: l.Host + ":0/0"})
	}
	w.result = l
	return err
}

// owns reports whether the handle's image is this daemon's, as far as the reactor knows.
func (s *session) owns(ctx context.Context) bool {
	dk := s.attachment().getDisk()
	if dk == nil {
		return false
	}
	st, err := dk.stats(ctx)
	return err == nil && !lost(st)
}

// watchers returns who has the attachment open to write to it.
func (a *attachment) watchers() []wire.Watcher {
	var list []wire.Watcher
	if a.id < firstDoor {
		list = append(list, wire.Watcher{Address: fmt.Sprintf("%s:0/%s", a.d.cfg.Host, a.name()), Cookie: uint64(a.id)})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for h := range a.handles {
		conn, ok := h.sock.(*net.UnixConn)
		if !ok || h.readOnly {
			continue
		}
		if p, err := a.d.processAt(conn); err == nil { // else it is just going
			list = append(list, wire.Watcher{Address: p.address(), ID: p.number(), Cookie: h.number})
		}
	}
	return list
}
