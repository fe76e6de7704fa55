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
	segmentVersion = 3
	segmentFixed   = 52
	segmentPages   = 8
	segmentSectors = segmentPages * extmap.PageSectors // 64 MiB
	// maxSegmentExtents and maxSegmentBytes bound a segment: one extent for each
	// sector, each of them four numbers.
	maxSegmentExtents = segmentSectors
	maxSegmentBytes   = segmentFixed + maxSegmentExtents*20
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
	shift := 0 // of sectors, lengths and offsets
	if all&7 == 0 {
		shift = 3
	}
	b = append(b, make([]byte, segmentFixed)...)
	end, ref, off := base, uint64(0), uint64(0)
	for e := range list {
		b = binary.AppendUvarint(b, (e.Sector-end)>>shift)
		end = e.End()
		if e.hole {
			b = binary.AppendUvarint(b, uint64(e.N)>>shift<<1|extentHole)
			continue
		}
		b = binary.AppendUvarint(b, uint64(e.N)>>shift<<1)
		r, o := uint64(refOf(e.Loc)), uint64(offsetOf(e.Loc))>>shift
		b = binary.AppendVarint(b, int64(r-ref))
		b = binary.AppendVarint(b, int64(o-off))
		ref, off = r, o+uint64(e.N)>>shift
	}
	h := b[start:]
	copy(h, segmentMagic)
	le.PutUint32(h[8:], segmentVersion)
	copy(h[16:], id[:])
	le.PutUint32(h[32:], head.index)
	le.PutUint32(h[36:], uint32(len(h)))
	le.PutUint32(h[40:], uint32(extents))
	h[44], h[45] = byte(shift), byte(head.kind)
	le.PutUint32(h[48:], head.repeated)
	le.PutUint32(h[12:], crc32.Checksum(h, castagnoli))
	return b
}

// extentHole is the bit of an extent's length that says that it is a hole.
const extentHole = 1

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
	if head.segmentPart != p || int(le.Uint32(b[36:])) != len(b) || extents > maxSegmentExtents || shift > 3 || base >= sectors {
		return segmentHead{}, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	size := min(segmentSectors, sectors-base)
	d := varints{b: b[segmentFixed:]}
	at, ref, off := uint64(0), uint64(0), uint64(0)
	for range extents {
		gap, length := d.unsigned()<<shift, d.unsigned()
		n, hole := length>>1<<shift, length&extentHole != 0
		if d.bad || n == 0 || n > size || gap > size || at+gap > size-n || hole && p.kind != kindDelta {
			return segmentHead{}, fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
		}
		at += gap
		e := extmap.Extent{Sector: base + at, N: uint32(n)}
		at += n
		if hole {
			fn(segmentExtent{e, true})
			continue
		}
		ref += uint64(d.signed())
		off += uint64(d.signed())
		o := off << shift
		if d.bad || off > MaxObjectSize/SectorSize || o+n > MaxObjectSize/SectorSize ||
			ref > 1<<(63-locOffsetBits)-1 || objectRef(ref).seq() == 0 {
			return segmentHead{}, fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
		}
		e.Loc = objectRef(ref).loc(int(o))
		fn(segmentExtent{Extent: e})
		off += n >> shift
	}
	if len(d.b) > 0 {
		return segmentHead{}, fmt.Errorf("%w: %d bytes follow its extents", ErrCorrupt, len(d.b))
	}
	return head, nil
}

// varints decodes numbers from b until one is not whole.
type varints struct {
	b   []byte
	bad bool
}

func (d *varints) unsigned() uint64 {
	v, n := binary.Uvarint(d.b)
	if d.bad = d.bad || n <= 0; d.bad {
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *varints) signed() int64 {
	v, n := binary.Varint(d.b)
	if d.bad = d.bad || n <= 0; d.bad {
		return 0
	}
	d.b = d.b[n:]
	return v
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
