package engine

import "context"

// mapEncoder encodes segments for a map object. One goroutine uses it.
type mapEncoder struct {
	partReader
	sectors   uint64 // of the image
	deltaFrom int
	mapPart
}

// encode adds segments, in order.
func (e *mapEncoder) encode(ctx context.Context, list []copiedSegment) {
	for _, s := range list {
		if at := e.wants(s); at.size > 0 {
			e.soon = append(e.soon, at)
		}
	}
	for _, s := range list {
		switch e.how(s) {
		case encodeDelta:
			if !e.addDelta(ctx, s) {
				e.addWhole(s)
			}
		case encodeWhole:
			e.addWhole(s)
		case encodeMove:
			e.move(ctx, s)
		}
	}
}

// encoding says how a segment is added.
type encoding byte

const (
	encodeMove  encoding = iota // as it is stored
	encodeWhole                 // from the copy of it
	encodeDelta                 // what has changed, if that pays
)

// how decides how a segment is added. No delta pays where little is stored.
func (e *mapEncoder) how(s copiedSegment) encoding {
	switch whole := int(s.stored[kindWhole].size); {
	case len(s.changes) > 0 && whole > 0 && whole >= e.deltaFrom:
		return encodeDelta
	case len(s.changes) > 0 || s.span != nil && s.kind == kindWhole:
		return encodeWhole
	}
	return encodeMove
}

// wants returns the place of what may have to be read to add a segment; of size 0 if it is nothing.
func (e *mapEncoder) wants(s copiedSegment) place {
	switch e.how(s) {
	case encodeDelta:
		return s.stored[kindDelta]
	case encodeMove:
		return s.stored[s.kind]
	}
	return place{}
}

// addWhole adds all of a segment of which there is a copy.
func (e *mapEncoder) addWhole(s copiedSegment) {
	p, from := segmentPart{index: s.index}, len(e.b)
	e.b = encodeSegment(e.b, e.line.image, segmentHead{segmentPart: p}, extentsOf(s.span, segmentStart(s.index)))
	e.written(p, from, false)
}

// move adds what is unchanged as it is stored. Where that is damaged the copy of it will do;
// without one it stays where it is.
func (e *mapEncoder) move(ctx context.Context, s copiedSegment) {
	at := s.stored[s.kind]
	b, err := e.read(ctx, at)
	if err == nil {
		_, err = decodeSegment(b, e.line.of(at.object.at.Object), s.segmentPart, e.sectors, func(segmentExtent) {})
	}
	switch {
	case err == nil:
		from := len(e.b)
		e.b = append(e.b, b...)
		if !e.line.own(at.object.at.Object) {
			ownSegment(e.b[from:], e.line.image)
		}
		e.written(s.segmentPart, from, true)
	case s.span != nil:
		e.addWhole(s)
	default:
		e.left = append(e.left, leftSegment{s.segmentPart, at, &segmentError{s.segmentPart, e.line.mapKey(at.object.at, at.object.part), at.offset, err}})
	}
}

// addDelta adds the delta of a segment that has changed, and reports true, unless the segment
// is to be written whole.
func (e *mapEncoder) addDelta(ctx context.Context, s copiedSegment) bool {
	base, whole := segmentStart(s.index), int(s.stored[kindWhole].size)
	if shrunk(s.span, base, whole) {
		return false
	}
	var old []sectorRange
	var head segmentHead
	p := segmentPart{s.index, kindDelta}
	if at := s.stored[kindDelta]; at.size > 0 {
		b, err := e.read(ctx, at)
		if err == nil {
			head, err = decodeSegment(b, e.line.of(at.object.at.Object), p, e.sectors, func(x segmentExtent) {
				old = append(old, sectorRange{uint32(x.Sector - base), uint32(x.End() - base)})
			})
		}
		if err != nil {
			return false // all of it is at hand
		}
	}
	d := newDelta(s.changes, old, head.repeated)
	from := len(e.b)
	e.b = encodeSegment(e.b, e.line.image, segmentHead{p, d.repeated}, within(s.span, base, d.ranges))
	if !d.pays(len(e.b)-from, whole) {
		e.b = e.b[:from]
		return false
	}
	e.written(p, from, false)
	return true
}

// written notes that what has been added from a byte on is all of p.
func (e *mapEncoder) written(p segmentPart, from int, moved bool) {
	e.segments = append(e.segments, writtenSegment{p, storedSegment{offset: uint32(from), size: uint32(len(e.b) - from)}, moved})
}
