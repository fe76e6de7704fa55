package writelog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"

	"github.com/lsd-ceph/lsd/internal/mutate"
)

// Sizes of the format; docs/formats.md gives it byte for byte.
const (
	// Sector is the unit of every address: 512 bytes.
	Sector = 512
	// BlockSize is the unit of every write to the log and of its checksums.
	BlockSize = 4096
	// SegmentSize divides the log: no record crosses a multiple of it.
	SegmentSize = 8 << 20
	// MaxData is the most data that one record holds, and so the largest write
	// that is atomic.
	MaxData = 1 << 20
	// MinSize is the size of the smallest log's file: its header area and eight
	// segments.
	MinSize = DataOffset + 8*SegmentSize
	// DataOffset is where the first segment begins in the file.
	DataOffset = 1 << 20
	// MaxSize bounds the size of a log's file.
	MaxSize = 1 << 40

	headerMagic   = "LSDWLOG\x00"
	headerVersion = 1
	maxImageURL   = 1024
	headerCut     = 1128 // offset, behind the longest URL

	recordMagic   = 0x4345524c // "LREC"
	recordVersion = 1
	recordFixed   = 80 // bytes of a record's header before its extents
	extentSize    = 16
	maxExtents    = (BlockSize - recordFixed - 4) / extentSize

	zeroFlag = 1 << 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is matched by errors that say which part of a log is damaged.
var ErrCorrupt = errors.New("write log is corrupt")

// A Header says whose log a file is. Two copies are kept, so that one survives
// a torn write of the other.
type Header struct {
	Log        uuid.UUID // this log, made anew whenever a log is created
	Image      uuid.UUID // the image it belongs to
	Epoch      uint64    // the ownership of the image it belongs to
	FirstSeq   uint64    // sequence number of the record at position 0; 0 until the log is adopted
	Size       uint64    // bytes that hold records, a multiple of SegmentSize
	Boot       uuid.UUID // boot of the host that last opened it
	ImageURL   string    // where the image lives, for people and salvage
	generation uint64
	// cut is the number of the first record that the ownership Epoch has written, or
	// will write; 0 in a log that was adopted before there was this field.
	cut uint64
}

// cutOff reports whether a whole record was cut off by a recovery: it was written by an
// earlier ownership, behind a record that was lost, and its number and its place may be
// those of one that has been written, or is to be written, since.
func (h *Header) cutOff(r *record) bool {
	return h.cut > 0 && r.seq >= h.cut && r.epoch < h.Epoch && !mutate.On(mutate.CutOffKept)
}

func (h *Header) encode() []byte {
	b := make([]byte, BlockSize)
	le := binary.LittleEndian
	copy(b, headerMagic)
	le.PutUint32(b[8:], headerVersion)
	copy(b[16:], h.Log[:])
	copy(b[32:], h.Image[:])
	le.PutUint64(b[48:], h.generation)
	le.PutUint64(b[56:], h.Epoch)
	le.PutUint64(b[64:], h.FirstSeq)
	le.PutUint64(b[72:], h.Size)
	copy(b[80:], h.Boot[:])
	le.PutUint16(b[96:], uint16(len(h.ImageURL)))
	copy(b[98:], h.ImageURL)
	le.PutUint64(b[headerCut:], h.cut)
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// decodeHeader decodes one copy of a header. It checks everything that does not
// need the file's size.
func decodeHeader(b []byte) (Header, error) {
	le := binary.LittleEndian
	var h Header
	if len(b) != BlockSize || !bytes.Equal(b[:8], []byte(headerMagic)) {
		return h, fmt.Errorf("%w: not a write log", ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != headerVersion {
		return h, fmt.Errorf("%w: version %d of the log format is not known here", ErrCorrupt, v)
	}
	sum := le.Uint32(b[12:])
	c := bytes.Clone(b)
	le.PutUint32(c[12:], 0)
	if crc32.Checksum(c, castagnoli) != sum {
		return h, fmt.Errorf("%w: checksum of its header is wrong", ErrCorrupt)
	}
	copy(h.Log[:], b[16:])
	copy(h.Image[:], b[32:])
	h.generation = le.Uint64(b[48:])
	h.Epoch = le.Uint64(b[56:])
	h.FirstSeq = le.Uint64(b[64:])
	h.Size = le.Uint64(b[72:])
	copy(h.Boot[:], b[80:])
	n := int(le.Uint16(b[96:]))
	if n > maxImageURL || h.Size == 0 || h.Size%SegmentSize != 0 || h.Size > MaxSize {
		return h, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	h.ImageURL = string(b[98 : 98+n])
	h.cut = le.Uint64(b[headerCut:])
	return h, nil
}

// An Extent is one write inside a record.
type Extent struct {
	Sector uint64 // first sector in the image
	N      uint32 // sectors
	Pos    uint64 // position of its data in the log, in sectors; for zeroes, of its record
	Zero   bool   // no data: the sectors read as zeroes (discard, write-zeroes)
}

// record is the decoded header of one record.
type record struct {
	pos     uint64 // bytes
	seq     uint64
	flushed uint64
	epoch   uint64
	data    int // bytes, a multiple of BlockSize
	extents int
	prev    uint32
	sum     uint32 // CRC32C of the header
}

// size returns the bytes the record takes in the log.
func (r *record) size() uint64 { return BlockSize + uint64(r.data) }

// encodeRecord completes the header block b, whose extents are there already,
// and whose block checksums are at the end of the block.
func encodeRecord(b []byte, log *uuid.UUID, r *record) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], recordMagic)
	le.PutUint32(b[4:], 0)
	copy(b[8:24], log[:])
	le.PutUint64(b[24:], r.pos)
	le.PutUint64(b[32:], r.seq)
	le.PutUint64(b[40:], r.flushed)
	le.PutUint64(b[48:], r.epoch)
	le.PutUint32(b[56:], uint32(r.data))
	le.PutUint16(b[60:], uint16(r.extents))
	le.PutUint16(b[62:], recordVersion)
	le.PutUint32(b[64:], r.prev)
	clear(b[68:recordFixed])
	clear(b[recordFixed+r.extents*extentSize : BlockSize-4*(r.data/BlockSize)])
	r.sum = crc32.Checksum(b, castagnoli)
	le.PutUint32(b[4:], r.sum)
}

// putExtent writes extent i of a record; off is the offset of its data from the
// end of the header, in sectors.
func putExtent(b []byte, i int, sector uint64, n uint32, off uint32, zero bool) {
	e := b[recordFixed+i*extentSize:]
	binary.LittleEndian.PutUint64(e, sector)
	binary.LittleEndian.PutUint32(e[8:], n)
	if zero {
		off = zeroFlag
	}
	binary.LittleEndian.PutUint32(e[12:], off)
}

// looksLikeRecord reports whether b begins as a record's header does, cheaply.
func looksLikeRecord(b []byte) bool {
	return binary.LittleEndian.Uint32(b) == recordMagic
}

// decodeRecord decodes the header of a record of the given log. It vouches for
// the checksum, for the lengths, and for the extents lying inside the record
// and inside an image of the given number of sectors; the data is the caller's
// to verify. It changes b for a moment, so b must be the caller's own.
func decodeRecord(b []byte, log *uuid.UUID, sectors uint64) (record, bool) {
	le := binary.LittleEndian
	var r record
	if len(b) < BlockSize || !looksLikeRecord(b) || !bytes.Equal(b[8:24], log[:]) {
		return r, false
	}
	b = b[:BlockSize]
	r.sum = le.Uint32(b[4:])
	le.PutUint32(b[4:], 0)
	sum := crc32.Checksum(b, castagnoli)
	le.PutUint32(b[4:], r.sum)
	if sum != r.sum || le.Uint16(b[62:]) != recordVersion {
		return r, false
	}
	r.pos = le.Uint64(b[24:])
	r.seq = le.Uint64(b[32:])
	r.flushed = le.Uint64(b[40:])
	r.epoch = le.Uint64(b[48:])
	r.data = int(le.Uint32(b[56:]))
	r.extents = int(le.Uint16(b[60:]))
	r.prev = le.Uint32(b[64:])
	ok := r.pos%BlockSize == 0 && r.pos < 1<<62 && r.data%BlockSize == 0 && r.data <= MaxData &&
		recordFixed+r.extents*extentSize+4*(r.data/BlockSize) <= BlockSize &&
		r.pos%SegmentSize+r.size() <= SegmentSize
	if !ok {
		return r, false
	}
	for i := range r.extents {
		e, off := getExtent(b, i)
		if e.N == 0 || uint64(e.N) > sectors || e.Sector > sectors-uint64(e.N) ||
			!e.Zero && (int(off) > r.data/Sector || int(e.N) > r.data/Sector-int(off)) {
			return r, false
		}
	}
	return r, true
}

// getExtent decodes extent i; its Pos is for the caller to fill in, from off.
func getExtent(b []byte, i int) (e Extent, off uint32) {
	p := b[recordFixed+i*extentSize:]
	e.Sector = binary.LittleEndian.Uint64(p)
	e.N = binary.LittleEndian.Uint32(p[8:])
	off = binary.LittleEndian.Uint32(p[12:])
	e.Zero = off&zeroFlag != 0
	return e, off
}

// blockSum returns the checksum that the header b of r holds of data block i.
func (r *record) blockSum(b []byte, i int) uint32 {
	return binary.LittleEndian.Uint32(b[BlockSize-4*(r.data/BlockSize)+4*i:])
}

// putBlockSum stores the checksum of data block i in the header of a record with
// the given bytes of data.
func putBlockSum(hdr []byte, data, i int, sum uint32) {
	binary.LittleEndian.PutUint32(hdr[BlockSize-4*(data/BlockSize)+4*i:], sum)
}
