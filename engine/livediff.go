package engine

import (
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/internal/extmap"
)

// A MapPart is a part of the map of a running image as it was at one moment, with all that was
// acknowledged by then, wherever that is. Nobody changes it: any goroutine may use it.
type MapPart struct {
	Start, End uint64 // bytes
	Size       uint64 // of the image then, in bytes

	segment uint32
	from    *View
	span    *extmap.Span // nil: the whole part is the same in from, or empty without one
	same    bool         // nothing is to be told of it
}

// MapPartOptions says what is of interest in a part of a map.
type MapPartOptions struct {
	// From is an earlier state of the image that it is compared with; nil: what holds data is of
	// interest.
	From *View
	// Own leaves out what the image has in objects of its ancestors. It is for From nil.
	Own bool
}

// partSegments is how many segments of the map are passed over in a turn.
const partSegments = 4096

// MapPart calls fn with a part of the map that begins at the byte off: one in which there may be
// something of interest, or a larger one in which there is not. It ends before the byte end. fn is
// told why there is none. It is called on the reactor, as fn is, perhaps at once.
func (im *Image) MapPart(off, end uint64, o MapPartOptions, fn func(*MapPart, error)) {
	if err := im.mayTell(o.From); err != nil {
		fn(nil, err)
		return
	}
	if !im.readOnly && !im.leased() { // another host may have gone on by now
		im.env.AfterFunc(flattenPoll, func() { im.MapPart(off, end, o, fn) })
		return
	}
	size := im.sectors * SectorSize
	p := &MapPart{Start: off, End: min(end, size), Size: size, from: o.From}
	if off >= p.End {
		p.End, p.same = off, true
		fn(p, nil)
		return
	}
	i, last := segmentOf(off/SectorSize), segmentOf((p.End-1)/SectorSize)
	for n := 0; i <= last && n < partSegments && im.samePart(o.From, i); n++ {
		i++
	}
	start := segmentStart(i) * SectorSize
	if start > off {
		p.End, p.same = min(p.End, start), true
		fn(p, nil)
		return
	}
	im.withSegment(i, func(err error) {
		if err == nil {
			err = im.mayTell(o.From)
		}
		switch {
		case err != nil:
			fn(nil, err)
			return
		case !im.readOnly && !im.leased(): // the store may have taken long
			im.MapPart(off, end, o, fn)
			return
		}
		p.Size = im.sectors * SectorSize
		p.End, p.segment = min(p.End, p.Size, segmentStart(i+1)*SectorSize), i
		p.End = max(p.Start, p.End)
		p.span = im.present(i, o.Own)
		fn(p, nil)
	})
}

// mayTell returns why nothing of the map can be told.
func (im *Image) mayTell(from *View) error {
	switch {
	case im.state == Fenced || im.state == Released:
		return im.ended()
	case from != nil && from.im.id != im.id:
		return fmt.Errorf("these are states of two images, %s and %s", from.im.id, im.id)
	}
	return nil
}

// samePart reports whether it shows without a read that segment i is the same as in from, or is
// empty if that is nil.
func (im *Image) samePart(from *View, i uint32) bool {
	s := segmentStart(i)
	if _, ok := im.dirty.Next(s, min(segmentStart(i+1), im.sectors)); ok {
		return false
	}
	return sameSegment(from, im, i)
}

// present returns what segment i, which is in memory, has now. What is in the log is at a place
// that is none of an object.
func (im *Image) present(i uint32, own bool) *extmap.Span {
	s, end := segmentStart(i), min(segmentStart(i+1), im.sectors)
	span := im.objs.Copy(s, segmentPages)
	if own {
		im.leaveOwn(span, s, end)
	}
	for at := s; at < end; {
		e, ok := im.dirty.Next(at, end)
		if !ok {
			break
		}
		if e.Loc&extmap.Fixed != 0 {
			span.Remove(e.Sector, uint64(e.N))
		} else {
			span.Insert(e.Sector, uint64(e.N), extmap.Fixed)
		}
		at = e.End()
	}
	return span
}

// leaveOwn takes out of a span what is in objects of ancestors.
func (im *Image) leaveOwn(span *extmap.Span, s, end uint64) {
	for s < end {
		e, ok := nextIn(span, s, end)
		if !ok {
			return
		}
		s = e.End()
		if !im.line.own(refOf(e.Loc).seq()) {
			span.Remove(e.Sector, uint64(e.N))
		}
	}
}

// Diff calls fn for the ranges of the part that are of interest, as engine.Diff does, until it
// fails.
func (p *MapPart) Diff(ctx context.Context, fn func(Range) error) error {
	if p.same {
		return nil
	}
	s, end := p.Start/SectorSize, p.End/SectorSize
	var a *extmap.Span
	var fromEnd uint64
	if p.from != nil && p.segment < segmentsOf(p.from.im.sectors) {
		var err error
		if a, err = p.from.segment(ctx, p.segment); err != nil {
			return err
		}
		fromEnd = p.from.im.sectors
	}
	var list []Range
	m := merger{fn: func(r Range) error { list = append(list, r); return nil }}
	diffSpans(a, p.span, s, fromEnd, end, &m)
	if err := m.end(); err != nil {
		return err
	}
	for _, r := range list {
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

// HasData reports whether there is data in the part from byte start up to end.
func (p *MapPart) HasData(start, end uint64) bool {
	_, ok := nextIn(p.span, max(start, p.Start)/SectorSize, min(end, p.End)/SectorSize)
	return ok
}
