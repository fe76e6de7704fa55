package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// A map segment is the part of the object map for a fixed span of the image. It
// is the unit in which the map is loaded, evicted and written. docs/formats.md
// gives its format byte for byte.
const (
	segmentMagic   = "LSDMAPS\x00"
	segmentVersion = 2
	segmentFixed   = 48
	segmentPages   = 8
	segmentSectors = segmentPages * extmap.PageSectors // 64 MiB
	// maxSegmentExtents and maxSegmentBytes bound a segment: one extent for each
	// sector, each of them four numbers.
	maxSegmentExtents = segmentSectors
	maxSegmentBytes   = segmentFixed + maxSegmentExtents*20
)

// segmentsOf returns the number of segments of an image of that many sectors.
func segmentsOf(sectors uint64) uint32 {
	return uint32((sectors + segmentSectors - 1) / segmentSectors)
}

// segmentOf returns the segment that a sector is in.
func segmentOf(sector uint64) uint32 { return uint32(sector / segmentSectors) }

// segmentStart returns the first sector of a segment.
func segmentStart(i uint32) uint64 { return uint64(i) * segmentSectors }

// encodeSegment appends segment index, with the extents of span, to b. An empty
// one adds nothing.
func encodeSegment(b []byte, id uuid.UUID, index uint32, span *extmap.Span) []byte {
	le := binary.LittleEndian
	start := len(b)
	base := segmentStart(index)
	extents, all := 0, uint64(0)
	for s := base; ; {
		e, ok := span.Next(s)
		if !ok {
			break
		}
		extents++
		all |= e.Sector - base | uint64(e.N) | uint64(offsetOf(e.Loc))
		s = e.End()
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
	for s := base; ; {
		e, ok := span.Next(s)
		if !ok {
			break
		}
		b = binary.AppendUvarint(b, (e.Sector-end)>>shift)
		b = binary.AppendUvarint(b, uint64(e.N)>>shift)
		r, o := uint64(refOf(e.Loc)), uint64(offsetOf(e.Loc))>>shift
		b = binary.AppendVarint(b, int64(r-ref))
		b = binary.AppendVarint(b, int64(o-off))
		ref, off, end = r, o+uint64(e.N)>>shift, e.End()
		s = end
	}
	h := b[start:]
	copy(h, segmentMagic)
	le.PutUint32(h[8:], segmentVersion)
	copy(h[16:], id[:])
	le.PutUint32(h[32:], index)
	le.PutUint32(h[36:], uint32(len(h)))
	le.PutUint32(h[40:], uint32(extents))
	h[44] = byte(shift)
	le.PutUint32(h[12:], crc32.Checksum(h, castagnoli))
	return b
}

// decodeSegment decodes segment index, which is all of b, of an image of the
// given number of sectors. Whether the objects that it refers to exist is for the
// caller to check.
func decodeSegment(b []byte, id uuid.UUID, index uint32, sectors uint64) (*extmap.Span, error) {
	le := binary.LittleEndian
	if err := checkObject(b, segmentMagic, segmentVersion, segmentFixed, id); err != nil {
		return nil, err
	}
	base := segmentStart(index)
	extents, shift := le.Uint32(b[40:]), b[44]
	if le.Uint32(b[32:]) != index || int(le.Uint32(b[36:])) != len(b) || extents > maxSegmentExtents || shift > 3 || base >= sectors {
		return nil, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	size := min(segmentSectors, sectors-base)
	span := extmap.NewSpan(base, segmentPages)
	d := varints{b: b[segmentFixed:]}
	at, ref, off := uint64(0), uint64(0), uint64(0)
	for range extents {
		gap, n := d.unsigned()<<shift, d.unsigned()<<shift
		ref += uint64(d.signed())
		off += uint64(d.signed())
		o := off << shift
		switch {
		case d.bad, n == 0 || n > size || gap > size || at+gap > size-n,
			off > MaxObjectSize/SectorSize, o+n > MaxObjectSize/SectorSize,
			ref > 1<<(63-locOffsetBits)-1, objectRef(ref).seq() == 0:
			return nil, fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
		}
		at += gap
		span.Insert(base+at, n, objectRef(ref).loc(int(o)))
		at += n
		off += n >> shift
	}
	if len(d.b) > 0 {
		return nil, fmt.Errorf("%w: %d bytes follow its extents", ErrCorrupt, len(d.b))
	}
	return span, nil
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
