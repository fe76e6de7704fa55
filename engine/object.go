package engine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/google/uuid"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// The format of a data object; docs/formats.md gives it byte for byte.
const (
	objectMagic     = "LSDDATA\x00"
	objectVersion   = 4
	objectFixed     = 128
	objectBlock     = 4096   // unit of the checksums
	objectJoined    = 1 << 0 // a flag of the header
	objectAlign     = 4096   // the data begins at a multiple of this
	maxObjectHeader = 8 << 20
	// maxObjectExtents is more than an object has. A batch has maxBatchExtents, and at most
	// twice as many pieces; a salvaged image, whose sectors may each lie elsewhere, has one for
	// each sector of its objects.
	maxObjectExtents = 128 << 10

	// firstRead is what is read of an object whose header's length is not known: 8 MiB of
	// random writes of 4 KiB have one of 12 or 16 KiB.
	firstRead = 32 << 10
)

// Checksums of blocks of the log are those of the same blocks in an object: see builtObject.sources.
const _ = -uint(objectBlock ^ writelog.BlockSize) // does not compile unless they are equal

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is matched by errors that name an object or log that is damaged.
var ErrCorrupt = errors.New("corrupt")

// objectExtentInfo is one write in a data object. Extents are in ascending order
// and do not overlap; their data follow one another in that order.
type objectExtentInfo struct {
	sector uint64
	n      uint32
	zero   bool
}

// objectHeader is a data object's header.
type objectHeader struct {
	image    uuid.UUID
	epoch    uint64
	seq      uint64 // number of the object
	firstSeq uint64 // records of the write log that it holds
	lastSeq  uint64
	log      uuid.UUID // the write log that these came from
	logEnd   uint64    // position in it, in bytes, after the last of them
	base     uint64    // of the cleaner's objects: see cleaned; else 0
	born     uint32    // number of the object that first held its newest data; 0: this one
	joined   bool      // it counts only with the next one: see split
	extents  []objectExtentInfo
	sums     []uint32 // CRC32C of each block of the data
	packed   []byte   // the extents as they are stored: see pack
	shift    uint8    // unit of what is packed: see unitShift
	header   int      // bytes before the data
	data     int      // bytes of data
}

// cleaned reports whether the cleaner has made the object, of data that the map
// had in older ones. It holds no records, and its extents count only where the map
// still refers to objects up to base.
func (h *objectHeader) cleaned() bool { return h.base != 0 }

// end returns the position after the object.
func (h *objectHeader) end() position { return position{h.seq, h.lastSeq, h.logEnd} }

// blocksOf returns how many blocks that many bytes of data have, the last one perhaps in part.
func blocksOf(data int) int { return (data + objectBlock - 1) / objectBlock }

// headerSize returns the length of a header whose extents take that many bytes.
func headerSize(packed, data int) int {
	n := objectFixed + 4*blocksOf(data) + packed
	return (n + objectAlign - 1) / objectAlign * objectAlign
}

// dataSize returns the bytes of data that the extents have.
func dataSize(extents []objectExtentInfo) int {
	n := 0
	for _, e := range extents {
		if !e.zero {
			n += int(e.n) * SectorSize
		}
	}
	return n
}

// pack packs the extents, of which there are no more than maxObjectExtents, and sets the
// length of the header. The size of the data is known already.
func (h *objectHeader) pack() {
	all := uint64(0)
	for _, e := range h.extents {
		all |= e.sector | uint64(e.n)
	}
	h.shift = unitShift(all)
	var c runColumns
	h.packed = h.packed[:0]
	end := uint64(0)
	for _, e := range h.extents {
		if c.full() {
			h.packed = c.flush(h.packed)
		}
		c.add((e.sector-end)>>h.shift, uint64(e.n)>>h.shift, e.zero)
		end = e.sector + uint64(e.n)
	}
	h.packed = c.flush(h.packed)
	h.header = headerSize(len(h.packed), h.data)
}

// encode writes the header, which has been packed, to the front of object, whose data is
// there already, and computes the checksums of both.
func (h *objectHeader) encode(object []byte) {
	h.sums = make([]uint32, blocksOf(h.data))
	for i := range h.sums {
		h.sumBlock(object, i)
	}
	h.put(object[:h.header])
}

// sumBlock computes the checksum of block i of the object's data.
func (h *objectHeader) sumBlock(object []byte, i int) {
	data := object[h.header:]
	h.sums[i] = crc32.Checksum(data[i*objectBlock:min((i+1)*objectBlock, len(data))], castagnoli)
}

// put writes the header, which has been packed and has the checksums of its data, to b,
// which is as long.
func (h *objectHeader) put(b []byte) {
	le := binary.LittleEndian
	clear(b)
	copy(b, objectMagic)
	le.PutUint32(b[8:], objectVersion)
	copy(b[16:], h.image[:])
	le.PutUint64(b[32:], h.epoch)
	le.PutUint64(b[40:], h.seq)
	le.PutUint64(b[48:], h.firstSeq)
	le.PutUint64(b[56:], h.lastSeq)
	copy(b[64:], h.log[:])
	le.PutUint64(b[80:], h.logEnd)
	le.PutUint32(b[88:], uint32(h.header))
	le.PutUint32(b[92:], uint32(h.data))
	le.PutUint32(b[96:], uint32(len(h.extents)))
	le.PutUint64(b[100:], h.base)
	le.PutUint32(b[108:], h.born)
	if h.joined {
		le.PutUint32(b[112:], objectJoined)
	}
	le.PutUint32(b[116:], uint32(len(h.packed)))
	b[120] = h.shift
	p := b[objectFixed:]
	for _, sum := range h.sums {
		le.PutUint32(p, sum)
		p = p[4:]
	}
	copy(p, h.packed)
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
}

// objectHeaderSize returns the length of the header that b, at least objectFixed
// bytes, begins.
func objectHeaderSize(b []byte) (int, error) {
	if len(b) < objectFixed || !bytes.Equal(b[:8], []byte(objectMagic)) {
		return 0, fmt.Errorf("%w: not a data object", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != objectVersion {
		return 0, fmt.Errorf("%w or too new: version %d of the object format is not known here", ErrCorrupt, v)
	}
	n := int(binary.LittleEndian.Uint32(b[88:]))
	if n < objectAlign || n > maxObjectHeader || n%objectAlign != 0 {
		return 0, fmt.Errorf("%w: header of %d bytes", ErrCorrupt, n)
	}
	return n, nil
}

// decodeObjectHeader decodes the header, which is all of b, of a data object of
// an image with the given number of sectors.
func decodeObjectHeader(b []byte, sectors uint64) (*objectHeader, error) {
	le := binary.LittleEndian
	n, err := objectHeaderSize(b)
	if err != nil {
		return nil, err
	}
	if n != len(b) {
		return nil, fmt.Errorf("%w: %d bytes where its header has %d", ErrCorrupt, len(b), n)
	}
	sum := le.Uint32(b[12:])
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, make([]byte, 4))
	if crc32.Update(c, castagnoli, b[16:]) != sum && !mutate.On(mutate.HeaderUnverified) {
		return nil, fmt.Errorf("%w: checksum of its header is wrong", ErrCorrupt)
	}
	h := &objectHeader{
		epoch: le.Uint64(b[32:]), seq: le.Uint64(b[40:]),
		firstSeq: le.Uint64(b[48:]), lastSeq: le.Uint64(b[56:]), logEnd: le.Uint64(b[80:]),
		header: n, data: int(le.Uint32(b[92:])), base: le.Uint64(b[100:]), born: le.Uint32(b[108:]), shift: b[120],
	}
	copy(h.image[:], b[16:])
	copy(h.log[:], b[64:])
	flags, count, packed := le.Uint32(b[112:]), int(le.Uint32(b[96:])), int(le.Uint32(b[116:]))
	h.joined = flags&objectJoined != 0
	if h.data%SectorSize != 0 || h.data > MaxObjectSize || count > min(maxObjectExtents, packed/4*columnExtents) || packed > n || headerSize(packed, h.data) != n ||
		!validShift(h.shift) || flags&^objectJoined != 0 || h.seq == 0 || h.seq > maxObjectSeq || h.epoch > maxEpoch || h.firstSeq == 0 ||
		h.cleaned() && (h.lastSeq != h.firstSeq-1 || h.base >= h.seq || uint64(h.born) > h.base || h.joined) ||
		!h.cleaned() && (h.lastSeq < h.firstSeq || h.born != 0) {
		return nil, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	p := b[objectFixed:]
	h.sums = make([]uint32, blocksOf(h.data))
	for i := range h.sums {
		h.sums[i] = le.Uint32(p)
		p = p[4:]
	}
	if err := h.unpack(p[:packed], count, sectors); err != nil {
		return nil, err
	}
	if dataSize(h.extents) != h.data {
		return nil, fmt.Errorf("%w: its extents do not add up to its data", ErrCorrupt)
	}
	return h, nil
}

// unpack decodes count extents, which are all of b.
func (h *objectHeader) unpack(b []byte, count int, sectors uint64) error {
	shift := h.shift
	var c runColumns
	h.extents = make([]objectExtentInfo, 0, count)
	end := uint64(0)
	for len(h.extents) < count {
		var ok bool
		if b, ok = c.read(b, min(count-len(h.extents), columnExtents)); !ok {
			return fmt.Errorf("%w: its extents are cut short", ErrCorrupt)
		}
		for i := range c.n {
			gap, n, zero := c.run(i)
			if n == 0 || zero && h.cleaned() || gap > sectors || n > min(sectors, math.MaxUint32>>shift) || end+(gap+n)<<shift > sectors {
				return fmt.Errorf("%w: extent %d is out of range", ErrCorrupt, len(h.extents))
			}
			h.extents = append(h.extents, objectExtentInfo{end + gap<<shift, uint32(n << shift), zero})
			end += (gap + n) << shift
		}
	}
	if len(b) > 0 {
		return fmt.Errorf("%w: %d bytes follow its extents", ErrCorrupt, len(b))
	}
	return nil
}

// verifyBlocks checks data that begins at block first of an object's data.
func verifyBlocks(data []byte, sums []uint32, first int) error {
	for i := 0; len(data) > 0; i++ {
		n := min(objectBlock, len(data))
		if first+i >= len(sums) || crc32.Checksum(data[:n], castagnoli) != sums[first+i] {
			return fmt.Errorf("%w: checksum of block %d is wrong", ErrCorrupt, first+i)
		}
		data = data[n:]
	}
	return nil
}
