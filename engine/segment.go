package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"iter"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// A map segment is the part of the object map for a fixed span of the image. It
// is the unit in which the map is loaded, evicted and written. What a checkpoint writes of
// it is the whole, or its delta: what has changed since the whole was written.
// docs/formats.md gives the format of both byte for byte.
const (
	segmentMagic   = "LSDMAPS\x00"
	segmentVersion = 4
	segmentFixed   = 52
	segmentPages   = 8
	segmentSectors = segmentPages * extmap.PageSectors // 64 MiB
	// maxSegmentExtents and maxSegmentBytes bound a segment: one extent for each
	// sector, each of them four numbers.
	maxSegmentExtents = segmentSectors
	maxSegmentBytes   = segmentFixed + maxSegmentExtents*20
	// fullSegment is what one of random writes of 4 KiB takes in memory, about.
	fullSegment = segmentSectors / blockSectors * 6
)

// segmentKind says what of a segment is stored.
type segmentKind uint8

const (
	kindWhole segmentKind = iota // all of it
	kindDelta                    // what has changed since
	segmentKinds
)

// segmentPart is a segment, or its delta.
type segmentPart struct {
	index uint32
	kind  segmentKind
}

func (p segmentPart) String() string {
	if p.kind == kindDelta {
		return fmt.Sprintf("delta of map segment %d", p.index)
	}
	return fmt.Sprintf("map segment %d", p.index)
}

// segmentHead is what is known of a stored segment before its extents.
type segmentHead struct {
	segmentPart
	repeated uint32 // of a delta: see deltaOf
}

// segmentExtent is an extent of a segment. In a delta there are holes as well: sectors that
// are mapped to nothing.
type segmentExtent struct {
	extmap.Extent
	hole bool
}

// segmentsOf returns the number of segments of an image of that many sectors.
func segmentsOf(sectors uint64) uint32 {
	return uint32((sectors + segmentSectors - 1) / segmentSectors)
}

// segmentOf returns the segment that a sector is in.
func segmentOf(sector uint64) uint32 { return uint32(sector / segmentSectors) }

// segmentStart returns the first sector of a segment.
func segmentStart(i uint32) uint64 { return uint64(i) * segmentSectors }

// extentsOf goes through the extents of a span that begins at sector s.
func extentsOf(span *extmap.Span, s uint64) iter.Seq[segmentExtent] {
	return func(yield func(segmentExtent) bool) {
		for e, ok := span.Next(s); ok && yield(segmentExtent{Extent: e}); e, ok = span.Next(e.End()) {
		}
	}
}

// encodeSegment appends a segment, or a delta, of some extents, ascending, to b. One
// without extents adds nothing. They are gone through twice.
func encodeSegment(b []byte, id uuid.UUID, head segmentHead, list iter.Seq[segmentExtent]) []byte {
	le := binary.LittleEndian
	start := len(b)
	base := segmentStart(head.index)
	extents, all := 0, uint64(0)
	for e := range list {
		extents++
		all |= e.Sector - base | uint64(e.N)
		if !e.hole {
			all |= uint64(offsetOf(e.Loc))
		}
	}
	if extents == 0 {
		return b
	}
	shift := unitShift(all)
	b = append(b, make([]byte, segmentFixed)...)
	var c extentColumns
	end := base
	for e := range list {
		if c.runs.full() {
			b = c.flush(b)
		}
		c.add((e.Sector-end)>>shift, uint64(e.N)>>shift, e.hole, refOf(e.Loc), uint64(offsetOf(e.Loc))>>shift)
		end = e.End()
	}
	b = c.flush(b)
	h := b[start:]
	copy(h, segmentMagic)
	le.PutUint32(h[8:], segmentVersion)
	copy(h[16:], id[:])
	le.PutUint32(h[32:], head.index)
	le.PutUint32(h[36:], uint32(len(h)))
	le.PutUint32(h[40:], uint32(extents))
	h[44], h[45] = shift, byte(head.kind)
	le.PutUint32(h[48:], head.repeated)
	le.PutUint32(h[12:], crc32.Checksum(h, castagnoli))
	return b
}

// ownSegment makes an encoded segment, or delta, of an ancestor one of the image id.
func ownSegment(b []byte, id uuid.UUID) {
	copy(b[16:], id[:])
	binary.LittleEndian.PutUint32(b[12:], 0)
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
}

// decodeSegment decodes a segment, or a delta, which is all of b, and calls fn for its
// extents, ascending. The image has the given number of sectors. Whether the objects that it
// refers to exist is for the caller to check; after an error what fn was called for means
// nothing.
func decodeSegment(b []byte, id uuid.UUID, p segmentPart, sectors uint64, fn func(segmentExtent)) (segmentHead, error) {
	le := binary.LittleEndian
	if err := checkObject(b, segmentMagic, segmentVersion, segmentFixed, id); err != nil {
		return segmentHead{}, err
	}
	head := segmentHead{segmentPart{le.Uint32(b[32:]), segmentKind(b[45])}, le.Uint32(b[48:])}
	base, extents, shift := segmentStart(p.index), le.Uint32(b[40:]), b[44]
	if head.segmentPart != p || int(le.Uint32(b[36:])) != len(b) || extents > maxSegmentExtents || !validShift(shift) || base >= sectors {
		return segmentHead{}, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	size := min(segmentSectors, sectors-base)
	d := segmentDecoder{base: base, size: size, shift: shift, holes: p.kind == kindDelta}
	rest := b[segmentFixed:]
	for left := int(extents); left > 0 && d.err == nil; left -= d.runs.n {
		rest = d.some(rest, min(left, columnExtents), fn)
	}
	if d.err == nil && len(rest) > 0 {
		d.err = fmt.Errorf("%w: %d bytes follow its extents", ErrCorrupt, len(rest))
	}
	return head, d.err
}

// segmentDecoder decodes the extents of a segment.
type segmentDecoder struct {
	extentColumns
	base, size uint64 // sectors: where the segment begins, and how many it has in the image
	at         uint64 // end of the extents before, from base
	shift      uint8
	holes      bool // there may be some
	err        error
}

// some decodes the next n extents from b, calls fn for each, and returns what follows them.
func (d *segmentDecoder) some(b []byte, n int, fn func(segmentExtent)) []byte {
	rest, ok := d.read(b, n)
	if !ok {
		d.err = fmt.Errorf("%w: its extents are cut short", ErrCorrupt)
		return nil
	}
	place := 0
	for i := range n {
		gap, n, hole := d.runs.run(i)
		if gap > d.size || n == 0 || n > d.size || d.at+(gap+n)<<d.shift > d.size || hole && !d.holes {
			d.err = fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
			return nil
		}
		e := segmentExtent{extmap.Extent{Sector: d.base + d.at + gap<<d.shift, N: uint32(n << d.shift)}, hole}
		d.at += (gap + n) << d.shift
		if !hole {
			const most = MaxObjectSize / SectorSize
			ref, off := d.refs[place], d.offsets[place]
			if ref > maxObjectRef || objectRef(ref).seq() == 0 || off > most || (off+n)<<d.shift > most {
				d.err = fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
				return nil
			}
			e.Loc = objectRef(ref).loc(int(off << d.shift))
			place++
		}
		fn(e)
	}
	return rest
}

// checkObject checks magic, version, checksum and image of a part of a
// checkpoint.
func checkObject(b []byte, magic string, version uint32, fixed int, id uuid.UUID) error {
	le := binary.LittleEndian
	if len(b) < fixed || string(b[:8]) != magic {
		return fmt.Errorf("%w: it does not begin as it must", ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != version {
		return fmt.Errorf("%w or too new: version %d is not known here", ErrCorrupt, v)
	}
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, make([]byte, 4))
	if crc32.Update(c, castagnoli, b[16:]) != le.Uint32(b[12:]) {
		return fmt.Errorf("%w: its checksum is wrong", ErrCorrupt)
	}
	if [16]byte(b[16:32]) != id {
		return fmt.Errorf("%w: it belongs to another image", ErrCorrupt)
	}
	return nil
}
