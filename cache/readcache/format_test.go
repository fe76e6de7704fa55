package readcache

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/uuid"
)

func FuzzDecodeFileHeader(f *testing.F) {
	b := make([]byte, BlockSize)
	f.Add(bytes.Clone(b))
	encodeFileHeader(b, uuid.UUID{1, 2, 3})
	f.Add(bytes.Clone(b))
	f.Add(b[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == BlockSize { // past the checksum
			binary.LittleEndian.PutUint32(b[12:], sumWithout(b))
		}
		id, err := decodeFileHeader(b)
		if err != nil {
			return
		}
		again := make([]byte, BlockSize)
		encodeFileHeader(again, id)
		if got, err := decodeFileHeader(again); err != nil || got != id {
			t.Errorf("id %v becomes %v: %v", id, got, err)
		}
	})
}

func testHeader(entries int) (segmentHeader, []byte) {
	h := segmentHeader{cache: uuid.UUID{1, 2, 3}, seq: 77, index: 5, queue: large, entries: entries}
	b := make([]byte, headerBytes)
	for i := range entries {
		setEntry(entry(b, i), &blockKey{testObject(uint64(i)), uint32(i * i)}, uint32(i)*7919)
	}
	h.encode(b)
	return h, b
}

func FuzzDecodeSegmentHeader(f *testing.F) {
	for _, n := range []int{0, 1, maxEntries} {
		_, b := testHeader(n)
		f.Add(b)
		f.Add(b[:headerFixed])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == headerBytes && bytes.HasPrefix(b, []byte(segmentMagic)) {
			// Past the checksum, which keeps a fuzzer from everything behind it.
			sum := sumWithout(b)
			b[12], b[13], b[14], b[15] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
		}
		h, err := decodeSegmentHeader(b, uuid.UUID{1, 2, 3}, 5)
		if err != nil {
			return
		}
		if h.entries > maxEntries || h.queue >= queues || h.index != 5 || h.seq == 0 {
			t.Fatalf("decoded %+v", h)
		}
		for i := range h.entries {
			var k blockKey
			k.decode(entry(b, i))
			e := make([]byte, entryBytes)
			setEntry(e, &k, entrySum(entry(b, i)))
			if !bytes.Equal(e, entry(b, i)) {
				t.Fatalf("entry %d does not survive", i)
			}
		}
	})
}

func TestSegmentHeader(t *testing.T) {
	h, b := testHeader(maxEntries)
	got, err := decodeSegmentHeader(b, h.cache, h.index)
	if err != nil || got != h {
		t.Fatalf("decoded %+v: %v", got, err)
	}
	for i := range b {
		b[i] ^= 1
		if _, err := decodeSegmentHeader(b, h.cache, h.index); err == nil {
			t.Errorf("byte %d may be anything", i)
		}
		b[i] ^= 1
	}
	if _, err := decodeSegmentHeader(b, uuid.UUID{9}, h.index); err == nil {
		t.Error("another cache's segment is taken")
	}
	if _, err := decodeSegmentHeader(b, h.cache, h.index+1); err == nil {
		t.Error("a segment at another's place is taken")
	}
}
