// Package frame wraps the small mutable documents of a store: a fixed header
// with magic, version, length and CRC32C, then the payload.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// HeaderSize is the number of bytes before the payload:
//
//	0  magic, 8 bytes
//	8  version, uint32 little-endian
//	12 length of the payload in bytes, uint32
//	16 CRC32C of everything, this field taken as zero, uint32
//	20 zero, uint32
const HeaderSize = 24

// Errors of Decode match one of these.
var (
	ErrCorrupt = errors.New("corrupt")
	// ErrVersion is of what is undamaged, and in a format that is not read here.
	ErrVersion = errors.New("made by another version of lsd")
)

// Encode returns payload with a header before it. magic has 8 bytes.
func Encode(magic string, version uint32, payload []byte) []byte {
	if len(magic) != 8 {
		panic("frame: magic must have 8 bytes")
	}
	b := make([]byte, HeaderSize+len(payload))
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(payload)))
	copy(b[HeaderSize:], payload)
	binary.LittleEndian.PutUint32(b[16:], checksum(b))
	return b
}

// Decode checks b, which Encode made, and returns its payload, a part of b. A version
// that is none of those given is an error: what it means is not known here.
func Decode(magic string, b []byte, versions ...uint32) ([]byte, error) {
	le := binary.LittleEndian
	switch {
	case len(b) < HeaderSize || string(b[:8]) != magic:
		return nil, fmt.Errorf("%w: it does not begin as it must", ErrCorrupt)
	case uint64(le.Uint32(b[12:])) != uint64(len(b)-HeaderSize):
		return nil, fmt.Errorf("%w: it has %d bytes, its header says %d", ErrCorrupt, len(b), uint64(le.Uint32(b[12:]))+HeaderSize)
	case le.Uint32(b[16:]) != checksum(b):
		return nil, fmt.Errorf("%w: its checksum is wrong", ErrCorrupt)
	case !slices.Contains(versions, le.Uint32(b[8:])):
		return nil, fmt.Errorf("%w: its format is version %d, and this one reads version %d", ErrVersion, le.Uint32(b[8:]), slices.Max(versions))
	}
	return b[HeaderSize:], nil
}

// checksum is that of b with the checksum's own field taken as zero.
func checksum(b []byte) uint32 {
	t := crc32.MakeTable(crc32.Castagnoli)
	c := crc32.Update(0, t, b[:16])
	c = crc32.Update(c, t, make([]byte, 4))
	return crc32.Update(c, t, b[20:])
}
