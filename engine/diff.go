package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// Range is a range of a disk.
type Range struct {
	Offset, Length uint64 // bytes; Length is not 0
	Zero           bool   // it reads as zeroes; else there is data
}

// Diff calls fn for the ranges, ascending and as long as can be, in which two states of an
// image differ: in which to has other data than from, or data where from has none, or none
// where from has some, and so zeroes. With from nil these are all that have data. It goes up
// to the end of to; beyond the end of from there is nothing in that. Only the map is read,
// and of that only where the states have different parts of it.
//
// What counts is where the data is. A sector that has been written counts, whatever was
// written, and so does one that was discarded; one that the cleaner has moved does as well.
// It moves nothing that a snapshot needs, and what a later state has from before the snapshot
// is where it was: so from a snapshot to a later state these are few. What it had begun to
// move when the snapshot was asked for it moves still, and of a state that is not a
// snapshot, or one on another branch, it may have moved all; so has Flatten of what an ancestor had.
func Diff(ctx context.Context, from, to *View, fn func(Range) error) error {
	return diffFrom(ctx, from, to, 0, fn)
}

// diffFrom is Diff for what is not before the byte start.
func diffFrom(ctx context.Context, from, to *View, start uint64, fn func(Range) error) error {
	if from != nil && from.im.id != to.im.id {
		return fmt.Errorf("these are states of two images, %s and %s", from.im.id, to.im.id)
	}
	ctx, stop := context.WithCancel(ctx)
	m := merger{fn: func(r Range) error {
		if r.Offset+r.Length <= start {
			return nil
		}
		if cut := max(start, r.Offset) - r.Offset; cut > 0 {
			r.Offset, r.Length = start, r.Length-cut
		}
		return fn(r)
	}}
	q := parallel.NewQueue(to.parallel, m.addAll)
	defer q.Wait()
	defer stop()
	for i := segmentOf(start / SectorSize); i < segmentsOf(to.im.sectors); i++ {
		if sameSegment(from, to.im, i) {
			continue
		}
		if err := q.Add(func() ([]Range, error) { return diffSegment(ctx, from, to, i) }); err != nil {
			return err
		}
	}
	if err := q.End(); err != nil {
		return err
	}
	return m.end()
}

// sameSegment reports whether it shows without a read that two states have the same in
// segment i. Its changes since what is stored are as good as that: objects do not change,
// and each number is that of one of them, on all branches.
func sameSegment(from *View, to *Image, i uint32) bool {
	b := to.objs
	if from == nil || i >= segmentsOf(from.im.sectors) {
		return b.empty(i) && !b.changed.has(i)
	}
	a := from.im.objs
	if from.im.sectors < min(segmentStart(i+1), to.sectors) { // what is stored may go further than from does
		return b.empty(i) && !b.changed.has(i) && a.empty(i) && !a.changed.has(i)
	}
	return a.places(i) == b.places(i) && slices.Equal(a.changes[i].all(), b.changes[i].all())
}

// all returns the changes of a segment that has some, or nil has none.
func (c *segmentChanges) all() []change {
	if c == nil {
		return nil
	}
	return c.list
}

// diffSegment returns in which ranges of segment i two states differ.
func diffSegment(ctx context.Context, from, to *View, i uint32) ([]Range, error) {
	var a, b *extmap.Span
	var fromEnd uint64
	err := parallel.Each(2, 2, func(k int) (err error) {
		if k == 0 {
			b, err = to.segment(ctx, i)
		} else if from != nil && i < segmentsOf(from.im.sectors) {
			fromEnd = from.im.sectors
			a, err = from.segment(ctx, i)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var list []Range
	m := merger{fn: func(r Range) error { list = append(list, r); return nil }}
	diffSpans(a, b, segmentStart(i), fromEnd, min(segmentStart(i+1), to.im.sectors), &m)
	return list, m.end()
}

// diffSpans tells m in which ranges of [s, end) two spans differ, of which the first counts up
// to fromEnd. Both may be nil.
func diffSpans(from, to *extmap.Span, s, fromEnd, end uint64, m *merger) {
	for s < end {
		a, inA := nextIn(from, s, min(fromEnd, end))
		b, inB := nextIn(to, s, end)
		stop := end // up to where nothing begins or ends
		for _, x := range []struct {
			e   extmap.Extent
			has *bool
		}{{a, &inA}, {b, &inB}} {
			switch {
			case *x.has && x.e.Sector == s:
				stop = min(stop, x.e.End())
			case *x.has:
				stop, *x.has = min(stop, x.e.Sector), false
			}
		}
		if inA != inB || inA && a.Loc != b.Loc {
			_ = m.add(Range{s * SectorSize, (stop - s) * SectorSize, !inB})
		}
		s = stop
	}
}

// merger joins ranges that meet.
type merger struct {
	fn   func(Range) error // gets them
	last Range             // Length is 0: none
}

func (m *merger) add(r Range) error {
	if l := &m.last; l.Length > 0 && l.Offset+l.Length == r.Offset && l.Zero == r.Zero {
		l.Length += r.Length
		return nil
	}
	err := m.end()
	m.last = r
	return err
}

func (m *merger) addAll(list []Range) error {
	for _, r := range list {
		if err := m.add(r); err != nil {
			return err
		}
	}
	return nil
}

// end passes on the last range.
func (m *merger) end() error {
	if m.last.Length == 0 {
		return nil
	}
	r := m.last
	m.last = Range{}
	return m.fn(r)
}

// PieceSize is the most data that DiffData gives at one time, in bytes.
const PieceSize = 4 << 20

// The data that is read at one time is that of so many ranges, in so many segments of the
// map, at most.
const (
	portionRanges   = 4096
	portionSegments = 8
)

// errStopped ends reads that nobody wants any more.
var errStopped = errors.New("the reading has been given up")

// DiffData is Diff with the data of to: fn gets ranges with data in pieces of up to
// PieceSize bytes, which are its own until it returns, and those of zeroes with nil. Much is
// read from the store ahead of what fn gets, so that as many of its disks are busy.
func DiffData(ctx context.Context, from, to *View, fn func(r Range, data []byte) error) error {
	return DiffDataFrom(ctx, from, to, 0, fn)
}

// DiffDataFrom is DiffData for what is not before the byte start, which is a multiple of
// SectorSize.
func DiffDataFrom(ctx context.Context, from, to *View, start uint64, fn func(r Range, data []byte) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	q := parallel.NewQueue(max(to.parallel/2, 1), func(p portion) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return p.tell(fn)
	})
	defer q.Wait()
	defer stop(errStopped)
	var p portion
	begin := func() error {
		full := p
		p = portion{}
		return q.Add(func() (portion, error) {
			err := full.read(ctx, to)
			return full, err
		})
	}
	err := diffFrom(ctx, from, to, start, func(r Range) error {
		for r.Length > 0 {
			if p.full(r) {
				if err := begin(); err != nil {
					return err
				}
			}
			r = p.take(r)
		}
		return nil
	})
	if err == nil {
		err = begin()
	}
	if err == nil {
		err = q.End()
	}
	return err
}

// portion is data that is read at one time.
type portion struct {
	ranges []Range // ascending
	bytes  int     // of data
	data   []byte  // of all of them, once it has been read
}

// full reports whether nothing of r, which comes next, goes in any more.
func (p *portion) full(r Range) bool {
	return p.bytes == PieceSize || len(p.ranges) == portionRanges ||
		len(p.ranges) > 0 && r.Offset-p.ranges[0].Offset >= portionSegments*segmentSectors*SectorSize
}

// take takes as much of r as goes in, and returns the rest.
func (p *portion) take(r Range) (rest Range) {
	x := r
	if !r.Zero {
		x.Length = min(r.Length, uint64(PieceSize-p.bytes))
		p.bytes += int(x.Length)
	}
	p.ranges = append(p.ranges, x)
	return Range{r.Offset + x.Length, r.Length - x.Length, r.Zero}
}

// read reads the data.
func (p *portion) read(ctx context.Context, v *View) (err error) {
	p.data = make([]byte, p.bytes)
	b := p.data
	var parts []viewPart
	for _, r := range p.ranges {
		if r.Zero {
			continue
		}
		if parts, err = v.parts(ctx, parts, b[:r.Length], r.Offset/SectorSize); err != nil {
			return err
		}
		b = b[r.Length:]
	}
	return v.read(ctx, parts)
}

// tell gives fn the ranges with their data.
func (p *portion) tell(fn func(Range, []byte) error) error {
	b := p.data
	for _, r := range p.ranges {
		var data []byte
		if !r.Zero {
			data, b = b[:r.Length], b[r.Length:]
		}
		if err := fn(r, data); err != nil {
			return err
		}
	}
	return nil
}
