package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// diffTime is after how long a request for differences is answered with those that were found.
const diffTime = 2 * time.Second

// stateBefore is a snapshot that is kept open for the next request of a session: what a client
// wants to know of a large image are many. The zero value is none.
type stateBefore struct {
	id   uuid.UUID
	view *engine.View
	st   backend.Store
}

func (b *stateBefore) close() {
	if b.view != nil {
		b.view.Close()
		b.st.Close()
	}
	*b = stateBefore{}
}

// diff tells in which ranges what the handle has open differs from a snapshot, or which hold
// data. What was acknowledged before counts, also where it is in the write log alone.
func (s *session) diff(ctx context.Context, f wire.Frame, w *answer) error {
	var q wire.DiffRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	end := q.Offset + q.Length
	if end < q.Offset || end > engine.MaxSize {
		return fmt.Errorf("%w: %d bytes at %d", errInvalid, q.Length, q.Offset)
	}
	r := &wire.DiffResult{Next: end}
	w.result = r
	d := &differ{s: s, end: end, unit: engine.SectorSize, whole: q.Flags&wire.DiffWhole != 0, result: r}
	if q.From != "" || q.Number != 0 {
		same, err := s.stateBefore(ctx, &q)
		if same || err != nil {
			return err
		}
		d.o.From = s.before.view
	}
	d.o.Own = d.o.From == nil && q.Flags&wire.DiffParent == 0
	if d.whole {
		d.unit = engine.DefaultObjectSize // as describe has it
	}
	d.most = min(cmp.Or(int(min(q.Most, wire.MaxDiffRanges)), wire.MaxDiffRanges), wire.MaxDiffRanges)
	d.start = q.Offset
	err := d.run(ctx)
	if err != nil && errors.Is(err, engine.ErrOvertaken) {
		s.before.close()
	}
	return err
}

// stateBefore opens the snapshot that the client names. same says that it is what the handle has
// open.
func (s *session) stateBefore(ctx context.Context, q *wire.DiffRequest) (same bool, err error) {
	rec := s.attachment().record()
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return false, err
	}
	var list []engine.Snapshot
	if err := s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
		list, err = engine.Snapshots(ctx, st, id)
		return err
	}); err != nil {
		return false, err
	}
	from := findSnapshot(list, q.From, q.Number)
	switch {
	case from == nil:
		return false, engine.ErrNoSnapshot
	case from.ID == rec.Snapshot:
		return true, nil
	case rec.Snapshot != uuid.Nil && slices.IndexFunc(list, func(x engine.Snapshot) bool { return x.ID == rec.Snapshot }) < slices.IndexFunc(list, func(x engine.Snapshot) bool { return x.ID == from.ID }):
		return false, fmt.Errorf("%w: snapshot %s is later", errInvalid, from.Name)
	case from.ID == s.before.id:
		return false, nil
	}
	s.before.close()
	st, err := s.d.openSt(ctx, u)
	if err != nil {
		return false, err
	}
	view, err := engine.OpenView(ctx, st, rec.ImageID, engine.ViewOptions{Snapshot: from.ID})
	if err != nil {
		return false, errors.Join(err, st.Close())
	}
	s.before = stateBefore{from.ID, view, st}
	return false, nil
}

// differ answers one request for differences.
type differ struct {
	s          *session
	start, end uint64 // bytes
	unit       uint64 // that ranges are rounded to, in bytes
	whole      bool   // that is an object
	o          engine.MapPartOptions
	most       int // ranges
	result     *wire.DiffResult
}

// errFull says that the answer has room for no more.
var errFull = errors.New("it is full")

// run finds the ranges, as many as may be told at one time.
func (d *differ) run(ctx context.Context) error {
	end := (d.end + d.unit - 1) / d.unit * d.unit
	until := time.Now().Add(diffTime)
	for at := d.start / d.unit * d.unit; at < end; {
		part, err := d.s.mapPart(ctx, at, end, d.o)
		if err != nil {
			return err
		}
		err = d.tell(ctx, part)
		switch {
		case errors.Is(err, errFull):
			return nil
		case err != nil:
			return err
		case part.End <= at:
			return nil // it is the image's end
		}
		if at = part.End; at < d.end && at > d.start && time.Now().After(until) {
			d.result.Next = at
			return nil
		}
	}
	return nil
}

// tell adds the ranges of a part of the map. It fails with errFull, and says where to go on.
func (d *differ) tell(ctx context.Context, part *engine.MapPart) error {
	return part.Diff(ctx, func(r engine.Range) error {
		if !d.whole {
			return d.add(r.Offset, r.Offset+r.Length, !r.Zero)
		}
		for at, end := r.Offset/d.unit*d.unit, r.Offset+r.Length; at < end; at += d.unit {
			// An object of which only a part has become zeroes exists.
			if err := d.add(at, min(at+d.unit, part.Size), !r.Zero || part.HasData(at, at+d.unit)); err != nil {
				return err
			}
		}
		return nil
	})
}

// add adds what of [from, to) was asked for, and has not been told.
func (d *differ) add(from, to uint64, exists bool) error {
	from, to = max(from, d.start), min(to, d.end)
	list := d.result.Ranges
	n := len(list)
	if n > 0 {
		from = max(from, list[n-1].Offset+list[n-1].Length)
	}
	switch {
	case from >= to:
		return nil
	case n > 0 && list[n-1].Exists == exists && list[n-1].Offset+list[n-1].Length == from:
		list[n-1].Length += to - from
		return nil
	case n == d.most:
		d.result.Next = from
		return errFull
	}
	d.result.Ranges = append(list, wire.DiffRange{Offset: from, Length: to - from, Exists: exists})
	return nil
}

// mapPart returns a part of the map of what the handle has open. What is being taken up again, or
// replaced, is waited for.
func (s *session) mapPart(ctx context.Context, off, end uint64, o engine.MapPartOptions) (*engine.MapPart, error) {
	for until := time.Now().Add(openTimeout); ; {
		err := errNotOpen
		if dk := s.attachment().getDisk(); dk != nil && dk.image != nil {
			var p *engine.MapPart
			if p, err = dk.mapPart(ctx, off, end, o); err == nil || !errors.Is(err, reactor.ErrStopped) && s.attachment().getDisk() == dk {
				return p, err
			}
		} else if why := s.attachment().usable(ctx); why != nil && !errors.Is(why, errNotOpen) {
			return nil, why
		}
		if time.Now().After(until) || !sleep(ctx, joinPause) {
			return nil, fmt.Errorf("%s: %w", s.attachment().name(), cmp.Or(context.Cause(ctx), err))
		}
	}
}

// mapPart returns a part of the image's map: see engine.Image.MapPart.
func (d *disk) mapPart(ctx context.Context, off, end uint64, o engine.MapPartOptions) (*engine.MapPart, error) {
	done := make(chan error, 1)
	var part *engine.MapPart // the reactor's until done
	if err := call(ctx, d.reactor, func() {
		d.image.MapPart(off, end, o, func(p *engine.MapPart, err error) {
			part = p
			done <- err
		})
	}); err != nil {
		return nil, err
	}
	select {
	case err := <-done:
		return part, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-d.reactor.Done():
		return nil, d.died()
	}
}
