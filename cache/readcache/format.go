package readcache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

// The format of the cache's file; docs/formats.md gives it byte for byte.
const (
	fileMagic    = "LSDRCACH"
	segmentMagic = "LSDRSEG\x00"
	version      = 1

	// BlockSize is the unit of everything: 4096 bytes of an object's data.
	BlockSize = 4096
	// SegmentSize is the unit in which the file is written and reclaimed.
	SegmentSize = 1 << 20
	// MinSize is the smallest cache: fewer segments make no queues.
	MinSize = 32 << 20
	// MaxSize is the largest cache.
	MaxSize = 8 << 40

	dataOffset    = 1 << 20 // the first segment is here
	segmentBlocks = SegmentSize / BlockSize
	headerBlocks  = 3
	headerBytes   = headerBlocks * BlockSize
	headerFixed   = 64
	entryBytes    = 40
	maxEntries    = segmentBlocks - headerBlocks
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errFormat is matched when what was read is not of this cache.
var errFormat = errors.New("not a read cache of this format")

// An Object names an immutable object: what it holds never changes.
type Object struct {
	Image  uuid.UUID
	Number uint64
	Epoch  uint64
}

// blockKey names one block of an object.
type blockKey struct {
	Object
	block uint32
}

// keyBytes is the length of a key as a segment's header has it, and as the
// checksum of a block covers it.
const keyBytes = 36

func (k *blockKey) encode(b []byte) {
	le := binary.LittleEndian
	copy(b, k.Image[:])
	le.PutUint64(b[16:], k.Number)
	le.PutUint64(b[24:], k.Epoch)
	le.PutUint32(b[32:], k.block)
}

func (k *blockKey) decode(b []byte) {
	le := binary.LittleEndian
	copy(k.Image[:], b)
	k.Number, k.Epoch, k.block = le.Uint64(b[16:]), le.Uint64(b[24:]), le.Uint32(b[32:])
}

// encodeFileHeader returns the file's first block.
func encodeFileHeader(b []byte, id uuid.UUID) {
	le := binary.LittleEndian
	clear(b[:BlockSize])
	copy(b, fileMagic)
	le.PutUint32(b[8:], version)
	copy(b[16:], id[:])
	le.PutUint32(b[32:], SegmentSize)
	le.PutUint32(b[12:], sumWithout(b[:BlockSize]))
}

// decodeFileHeader returns the cache's id.
func decodeFileHeader(b []byte) (id uuid.UUID, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) != BlockSize || !bytes.Equal(b[:8], []byte(fileMagic)):
		return id, errFormat
	case le.Uint32(b[8:]) != version:
		return id, fmt.Errorf("%w: version %d is not known here", errFormat, le.Uint32(b[8:]))
	case le.Uint32(b[12:]) != sumWithout(b):
		return id, fmt.Errorf("%w: checksum of its header is wrong", errFormat)
	case le.Uint32(b[32:]) != SegmentSize:
		return id, fmt.Errorf("%w: segments of %d bytes", errFormat, le.Uint32(b[32:]))
	}
	copy(id[:], b[16:])
	return id, nil
}

// sumWithout is the checksum of a header whose own field, at 12, counts as zero.
func sumWithout(b []byte) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, b[16:])
}

// A queue is one of S3-FIFO's two.
type queue uint8

const (
	small queue = iota // new blocks
	large              // blocks that have been used again: "main" in the paper
	queues
)

// segmentHeader is the beginning of a segment.
type segmentHeader struct {
	cache   uuid.UUID
	seq     uint64 // segments are numbered in the order in which they are begun
	index   uint32 // its place in the file
	queue   queue
	entries int
}

// entry returns the bytes of entry i in a segment's header.
func entry(b []byte, i int) []byte { return b[headerFixed+i*entryBytes:][:entryBytes] }

// encode writes the header to b, whose entries are there already.
func (h *segmentHeader) encode(b []byte) {
	le := binary.LittleEndian
	clear(b[:headerFixed])
	clear(b[headerFixed+h.entries*entryBytes : headerBytes])
	copy(b, segmentMagic)
	le.PutUint32(b[8:], version)
	copy(b[16:], h.cache[:])
	le.PutUint64(b[32:], h.seq)
	le.PutUint32(b[40:], h.index)
	le.PutUint32(b[44:], uint32(h.entries))
	b[48] = byte(h.queue)
	le.PutUint32(b[12:], sumWithout(b[:headerBytes]))
}

// decodeSegmentHeader decodes the header of the segment at index of the cache id.
func decodeSegmentHeader(b []byte, id uuid.UUID, index uint32) (segmentHeader, error) {
	le := binary.LittleEndian
	var h segmentHeader
	if len(b) != headerBytes || !bytes.Equal(b[:8], []byte(segmentMagic)) || le.Uint32(b[8:]) != version ||
		le.Uint32(b[12:]) != sumWithout(b) {
		return h, errFormat
	}
	copy(h.cache[:], b[16:])
	h.seq, h.index, h.queue = le.Uint64(b[32:]), le.Uint32(b[40:]), queue(b[48])
	n := le.Uint32(b[44:])
	if h.cache != id || h.index != index || h.queue >= queues || n > maxEntries || h.seq == 0 {
		return h, errFormat
	}
	h.entries = int(n)
	return h, nil
}

// entrySum returns the checksum that an entry has of its block.
func entrySum(e []byte) uint32 { return binary.LittleEndian.Uint32(e[keyBytes:]) }

func setEntry(e []byte, k *blockKey, sum uint32) {
	k.encode(e)
	binary.LittleEndian.PutUint32(e[keyBytes:], sum)
}
