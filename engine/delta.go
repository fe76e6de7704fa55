package engine

import (
	"cmp"
	"iter"
	"math"
	"slices"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A delta says what of a segment has changed since it was stored whole: to what some ranges
// of its sectors are mapped now. On a large image that is written at random a checkpoint
// finds few changes in each of very many segments; their deltas are a small part of what
// the segments are. Each checkpoint repeats what the deltas before it have, so that a load
// reads the whole and one delta; when what has been repeated since the whole was written
// comes to as much as the whole, that is written again. This is the rent-or-buy problem: at
// no time has more than twice been put of what would have been, had the future been known.
// When little is left of the segment it is written whole as well: see shrunk.

// deltaFrom is the size of a stored segment, bytes, from which there are deltas of it.
const deltaFrom = 2 << 10

// sectorRange is a range of the sectors of a segment, counted from its start.
type sectorRange struct{ from, to uint32 }

// changedRanges returns the ranges of sectors that changes are of, ascending, none of which
// meets another.
func changedRanges(list []change) []sectorRange {
	ranges := make([]sectorRange, len(list))
	for i, x := range list {
		ranges[i] = sectorRange{x.at, x.at + x.n}
	}
	return joinRanges(ranges)
}

// joinRanges sorts ranges and joins those that meet, in place.
func joinRanges(ranges []sectorRange) []sectorRange {
	slices.SortFunc(ranges, func(a, b sectorRange) int { return cmp.Compare(a.from, b.from) })
	k := 0
	for _, r := range ranges {
		if k > 0 && r.from <= ranges[k-1].to {
			ranges[k-1].to = max(ranges[k-1].to, r.to)
			continue
		}
		ranges[k] = r
		k++
	}
	return ranges[:k]
}

// within goes through what a span, of a segment that begins at sector base, has in ranges:
// extents, and the holes between them.
func within(span *extmap.Span, base uint64, ranges []sectorRange) iter.Seq[segmentExtent] {
	return func(yield func(segmentExtent) bool) {
		for _, r := range ranges {
			for s, end := base+uint64(r.from), base+uint64(r.to); s < end; {
				e, ok := span.Next(s)
				if !ok || e.Sector > s {
					to := end
					if ok {
						to = min(to, e.Sector)
					}
					if !yield(segmentExtent{extmap.Extent{Sector: s, N: uint32(to - s)}, true}) {
						return
					}
					s = to
					continue
				}
				e.N = uint32(min(e.End(), end) - s)
				if !yield(segmentExtent{Extent: e}) {
					return
				}
				s = e.End()
			}
		}
	}
}

// shrunk reports whether a span, of a segment that begins at sector base, would take so
// little that what is stored whole, which takes that many bytes, is not to be kept: it would
// be read with every delta, and for as long as nothing else changes.
func shrunk(span *extmap.Span, base uint64, whole int) bool {
	n := 0
	for range extentsOf(span, base) {
		if n += extentBytes; n >= whole/4 {
			return false
		}
	}
	return true
}

// extentBytes is about the most that an extent takes in a stored segment.
const extentBytes = 16

// deltaOf is what is to be written as the delta of a segment.
type deltaOf struct {
	ranges   []sectorRange
	repeated uint32 // sectors that the deltas since the whole have repeated, this one with them
}

// newDelta returns the delta of changes that comes after one of the ranges old, with which
// that many sectors had been repeated.
func newDelta(changes []change, old []sectorRange, repeated uint32) deltaOf {
	own := changedRanges(changes)
	if len(old) == 0 || mutate.On(mutate.DeltaForgotten) {
		return deltaOf{own, repeated}
	}
	n := sectorsOf(own)
	all := joinRanges(slices.Concat(own, old))
	return deltaOf{all, uint32(min(uint64(repeated)+sectorsOf(all)-n, math.MaxUint32))}
}

// sectorsOf returns how many sectors ranges have.
func sectorsOf(ranges []sectorRange) (n uint64) {
	for _, r := range ranges {
		n += uint64(r.to - r.from)
	}
	return n
}

// pays reports whether the delta, which takes size bytes, is to be written, and not all of
// the segment again, which took whole bytes.
func (d *deltaOf) pays(size, whole int) bool {
	return size <= whole/2 && uint64(d.repeated)*uint64(size)/sectorsOf(d.ranges) < uint64(whole)
}
