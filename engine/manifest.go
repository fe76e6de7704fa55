package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

// The format of a checkpoint's manifest; docs/formats.md gives it byte for byte.
const (
	manifestMagic   = "LSDCKPT\x00"
	manifestVersion = 3
	manifestFixed   = 128
	manifestObject  = 28
	manifestMap     = 24
	manifestSegment = 16
	manifestKind    = 31 // bit of a segment's index that says that it is a delta

	// manifestPart is the size of the objects that a large manifest is cut into,
	// and maxManifest bounds all of it.
	manifestPart = 32 << 20
	maxManifest  = 1 << 30

	// fragments and spareObjects are how far the cleaner lets the objects of an image
	// exceed in number what its data would fill, before it merges them (see
	// cleaner.scattered). Objects that are dead, or kept for a point, are within that:
	// full ones exceed it in their space, by the space ratio, and that is far less.
	fragments    = 4
	spareObjects = 64
)

// largestManifest returns how many bytes a manifest of an image of the given size
// can take, with data objects of the given size.
func largestManifest(size, object uint64) uint64 {
	segments := uint64(segmentsOf(size / SectorSize))
	objects := fragments*((size+object-1)/object) + spareObjects
	// A segment may be alone in its map object, and its delta as well; and so may have been the
	// delta before, which is dead.
	return manifestFixed + objects*manifestObject + segments*(3*manifestMap+2*manifestSegment)
}

// leastObjectSize returns the least size of data objects, in whole MiB, with which
// the manifests of an image of the given size can be read.
func leastObjectSize(size uint64) uint32 {
	object := uint64(MinObjectSize)
	for largestManifest(size, object) > maxManifest {
		object += 1 << 20
	}
	return uint32(object)
}

// LargestSize returns the largest power of two that the size in bytes of an image can be with
// data objects of a size; 0 means the usual one.
func LargestSize(object uint32) uint64 {
	if object == 0 {
		object = DefaultObjectSize
	}
	size := uint64(MaxSize)
	for leastObjectSize(size) > max(object, MinObjectSize) {
		size /= 2
	}
	return size
}

// manifest is what a checkpoint's manifest holds.
type manifest struct {
	image   uuid.UUID
	epoch   uint64
	at      position
	log     uuid.UUID
	objects []objectInfo // ascending
	storedMap
}

func (m *manifest) ref() checkpointRef { return checkpointRef{m.at.object, m.epoch} }

// size returns the bytes of the encoded manifest.
func (m *manifest) size() int {
	held, _ := m.held()
	return manifestFixed + len(m.objects)*manifestObject + len(m.maps)*manifestMap + held*manifestSegment
}

func (m *manifest) encode() []byte {
	le := binary.LittleEndian
	held, _ := m.held()
	size := m.size()
	b := make([]byte, manifestFixed, size)
	copy(b, manifestMagic)
	le.PutUint32(b[8:], manifestVersion)
	copy(b[16:], m.image[:])
	le.PutUint64(b[32:], m.epoch)
	le.PutUint64(b[40:], m.at.object)
	le.PutUint64(b[48:], m.at.seq)
	copy(b[56:], m.log[:])
	le.PutUint64(b[72:], m.at.logEnd)
	le.PutUint32(b[80:], uint32(size))
	le.PutUint32(b[84:], uint32(len(m.objects)))
	le.PutUint32(b[88:], uint32(len(m.maps)))
	le.PutUint32(b[92:], uint32(held))
	for _, o := range m.objects {
		died := o.died
		if o.live > 0 {
			died = 0
		}
		for _, v := range [...]uint32{o.number, o.epoch, o.sectors, o.live, died, o.born, uint32(o.header)} {
			b = le.AppendUint32(b, v)
		}
	}
	for _, o := range m.maps {
		for _, v := range [...]uint32{uint32(o.at.Object), uint32(o.at.Epoch), o.part, o.size, o.live, o.died} {
			b = le.AppendUint32(b, v)
		}
	}
	for i := range m.segments[kindWhole] {
		for kind := range segmentKinds {
			if s := m.segment(kind, uint32(i)); s.size > 0 {
				for _, v := range [...]uint32{uint32(i) | uint32(kind)<<manifestKind, s.object, s.offset, s.size} {
					b = le.AppendUint32(b, v)
				}
			}
		}
	}
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// manifestSize returns the size of the manifest that b, its first part, begins.
func manifestSize(b []byte) (int, error) {
	if len(b) < manifestFixed || string(b[:8]) != manifestMagic {
		return 0, fmt.Errorf("%w: it does not begin as it must", ErrCorrupt)
	}
	n := int(binary.LittleEndian.Uint32(b[80:]))
	if n < manifestFixed || n > maxManifest || len(b) != min(n, manifestPart) {
		return 0, fmt.Errorf("%w: it has %d bytes where its header says %d", ErrCorrupt, len(b), n)
	}
	return n, nil
}

// decodeManifest decodes a checkpoint's manifest of an image of the given size.
func decodeManifest(b []byte, id uuid.UUID, sectors uint64) (*manifest, error) {
	le := binary.LittleEndian
	if err := checkObject(b, manifestMagic, manifestVersion, manifestFixed, id); err != nil {
		return nil, err
	}
	m := &manifest{image: id, epoch: le.Uint64(b[32:])}
	m.at = position{le.Uint64(b[40:]), le.Uint64(b[48:]), le.Uint64(b[72:])}
	copy(m.log[:], b[56:])
	objects, maps, segments := int(le.Uint32(b[84:])), int(le.Uint32(b[88:])), int(le.Uint32(b[92:]))
	if len(b) != int(le.Uint32(b[80:])) || len(b)-manifestFixed != objects*manifestObject+maps*manifestMap+segments*manifestSegment ||
		m.at.object == 0 || m.at.object > maxObjectSeq || m.epoch > maxEpoch {
		return nil, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	b, err := m.decodeObjects(b[manifestFixed:], objects)
	if err == nil {
		b, err = m.decodeMaps(b, maps)
	}
	if err == nil {
		err = m.decodeSegments(b, segments, sectors)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (m *manifest) decodeObjects(b []byte, n int) (rest []byte, err error) {
	le := binary.LittleEndian
	m.objects = make([]objectInfo, n)
	last := uint32(0)
	for i := range m.objects {
		header := le.Uint32(b[24:])
		o := objectInfo{number: le.Uint32(b), epoch: le.Uint32(b[4:]), sectors: le.Uint32(b[8:]), live: le.Uint32(b[12:]),
			died: le.Uint32(b[16:]), born: le.Uint32(b[20:]), header: uint16(header)}
		if o.number <= last || uint64(o.number) > m.at.object || o.sectors > MaxObjectSize/SectorSize || o.live > o.sectors ||
			uint64(o.died) > m.at.object || o.born > o.number || header == 0 || header > maxObjectHeader/objectAlign {
			return nil, fmt.Errorf("%w: the entry of data object %d is out of range", ErrCorrupt, i)
		}
		last = o.number
		m.objects[i], b = o, b[manifestObject:]
	}
	return b, nil
}

func (m *manifest) decodeMaps(b []byte, n int) (rest []byte, err error) {
	le := binary.LittleEndian
	m.maps = make([]mapObject, n)
	for i := range m.maps {
		o := mapObject{at: checkpointRef{uint64(le.Uint32(b)), uint64(le.Uint32(b[4:]))}, part: le.Uint32(b[8:]),
			size: le.Uint32(b[12:]), live: le.Uint32(b[16:]), died: le.Uint32(b[20:])}
		if o.at.Object == 0 || o.at.Object > m.at.object || o.live > o.size || uint64(o.died) > m.at.object {
			return nil, fmt.Errorf("%w: the entry of map object %d is out of range", ErrCorrupt, i)
		}
		m.maps[i], b = o, b[manifestMap:]
	}
	return b, nil
}

func (m *manifest) decodeSegments(b []byte, n int, sectors uint64) error {
	live := make([]uint64, len(m.maps))
	if err := m.decodePlaces(b, n, sectors, live); err != nil {
		return err
	}
	for i, o := range m.maps {
		if uint64(o.live) != live[i] { // it would be removed too early, or never
			return fmt.Errorf("%w: the entry of map object %d is not that of its segments", ErrCorrupt, i)
		}
	}
	return nil
}

// decodePlaces decodes where the segments are, and adds up in live what the map objects
// have of them.
func (m *manifest) decodePlaces(b []byte, n int, sectors uint64, live []uint64) error {
	if n == 0 {
		return nil
	}
	le := binary.LittleEndian
	if last := le.Uint32(b[(n-1)*manifestSegment:]) &^ (1 << manifestKind); last < segmentsOf(sectors) {
		m.segments[kindWhole] = make([]storedSegment, 0, last+1)
	}
	next := uint32(0) // entry: index, and above that kind
	for range n {
		i, kind := le.Uint32(b)&^(1<<manifestKind), segmentKind(le.Uint32(b)>>manifestKind)
		s := storedSegment{le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint32(b[12:])}
		if entry := 2*i + uint32(kind); entry < next || i >= segmentsOf(sectors) || kind == kindDelta && m.empty(i) ||
			uint64(s.object) >= uint64(len(m.maps)) || s.size < segmentFixed || s.size > maxSegmentBytes ||
			uint64(s.offset)+uint64(s.size) > uint64(m.maps[s.object].size) {
			return fmt.Errorf("%w: the entry of map segment %d is out of range", ErrCorrupt, i)
		}
		next = 2*i + uint32(kind) + 1
		live[s.object] += uint64(s.size)
		m.set(kind, i, s)
		b = b[manifestSegment:]
	}
	return nil
}
