package writelog

import (
	"fmt"
	"hash/crc32"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// BenchmarkRecover recovers logs in a file in the directory for temporary files (TMPDIR), from its
// disk, full of records as clients write them that have 32 writes of 4 KiB under way, after a reboot.
// Beside it, what it takes just to read as much, one segment after the other.
func BenchmarkRecover(b *testing.B) {
	for _, segments := range []int{8, 128, 512} {
		boot := uuid.New()
		f := writeLog(b, segments, boot)
		b.Run(fmt.Sprintf("MiB=%d", segments*SegmentSize>>20), func(b *testing.B) {
			b.SetBytes(int64(segments * SegmentSize))
			for b.Loop() {
				l, err := Open(f)
				if err != nil {
					b.Fatal(err)
				}
				o := RecoverOptions{Sectors: testSectors, Boot: uuid.New(), ReadAhead: true}
				if err := l.Recover(b.Context(), Start{Seq: 1}, o, nothing); err != nil || l.nextSeq < uint64(segments*62) {
					b.Fatal(err, l.nextSeq)
				}
			}
		})
		b.Run(fmt.Sprintf("read/MiB=%d", segments*SegmentSize>>20), func(b *testing.B) {
			b.SetBytes(int64(segments * SegmentSize))
			mem, err := uring.NewArena(SegmentSize)
			if err != nil {
				b.Fatal(err)
			}
			defer mem.Close()
			mem.PreferLarge()
			for b.Loop() {
				for i := range int64(segments) {
					if _, err := f.ReadAt(mem.Bytes(), DataOffset+i*SegmentSize); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
		f.Close()
	}
}

// writeLog makes a log of that many segments, full of records of 32 writes each.
func writeLog(b *testing.B, segments int, boot uuid.UUID) *OSFile {
	b.Helper()
	path := filepath.Join(b.TempDir(), "bench.log")
	if err := MakeFile(b.Context(), path, DataOffset+int64(segments)*SegmentSize, nil); err != nil {
		b.Fatal(err)
	}
	f, err := OpenFile(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	h := Header{Log: uuid.New(), Image: uuid.New(), Epoch: 1, FirstSeq: 1, Boot: boot}
	if err := Create(f, h); err != nil {
		b.Fatal(err)
	}
	buf := f.Buffer(SegmentSize)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	const writes = 32
	r := record{data: writes * BlockSize, extents: writes, epoch: 1, seq: 1}
	for i := range segments {
		for at := 0; at+int(r.size()) <= SegmentSize; at += int(r.size()) {
			hdr, data := buf[at:][:BlockSize], buf[at+BlockSize:]
			r.pos, r.flushed = uint64(i*SegmentSize+at), r.seq-1
			for k := range writes {
				putExtent(hdr, k, (r.seq*writes+uint64(k))%(testSectors/8)*8, 8, uint32(k*8), false)
				putBlockSum(hdr, r.data, k, crc32.Checksum(data[k*BlockSize:][:BlockSize], castagnoli))
			}
			encodeRecord(hdr, &h.Log, &r)
			r.prev = r.sum
			r.seq++
		}
		if _, err := f.WriteAt(buf, DataOffset+int64(i)*SegmentSize); err != nil {
			b.Fatal(err)
		}
	}
	return f
}
