package writelog

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/google/uuid"

	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A File is the blocking view of a log's file or device. Offsets, lengths and
// addresses passed to it suit direct I/O: multiples of BlockSize, and memory
// from Buffer or of a uring.Arena. It is safe for concurrent use.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
	Size() int64
	// Buffer returns zeroed memory that suits direct I/O on this file.
	Buffer(n int) []byte
}

// Create makes f, all of which is zeroed or was a log before, an empty log. The
// size of the log follows from that of the file.
func Create(f File, h Header) error {
	if f.Size() < MinSize || f.Size() > MaxSize {
		return fmt.Errorf("a write log of %d bytes: it must have at least %d and at most %d", f.Size(), MinSize, int64(MaxSize))
	}
	if len(h.ImageURL) > maxImageURL {
		return fmt.Errorf("bad header for a write log")
	}
	h.Size = uint64(f.Size()-DataOffset) / SegmentSize * SegmentSize
	// The header of the log that was there before stays whole and counts, or the
	// new one does: never an older copy.
	h.generation = 1
	newest := 1
	if old, n, err := ReadHeader(f); err == nil {
		h.generation, newest = old.generation+1, n
	}
	for _, i := range [2]int{1 - newest, newest} {
		if err := writeHeader(f, &h, i); err != nil {
			return err
		}
	}
	return nil
}

func writeHeader(f File, h *Header, copyNo int) error {
	b := f.Buffer(BlockSize)
	copy(b, h.encode())
	if _, err := f.WriteAt(b, int64(copyNo)*BlockSize); err != nil {
		return fmt.Errorf("write header of the log: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("flush header of the log: %w", err)
	}
	return nil
}

// ReadHeader returns the newer of the two copies of a log's header that are
// whole, and which it is.
func ReadHeader(f File) (Header, int, error) {
	b := f.Buffer(2 * BlockSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return Header{}, 0, fmt.Errorf("read header of the log: %w", err)
	}
	h0, err0 := decodeHeader(b[:BlockSize])
	h1, err1 := decodeHeader(b[BlockSize:])
	h, n := h0, 0
	switch {
	case err0 != nil && err1 != nil:
		return Header{}, 0, err0
	case err0 != nil || err1 == nil && h1.generation > h0.generation:
		h, n = h1, 1
	}
	if h.Size > uint64(max(f.Size(), DataOffset))-DataOffset {
		return Header{}, 0, fmt.Errorf("%w: its file has %d bytes, its header says %d", ErrCorrupt, f.Size(), h.Size+DataOffset)
	}
	return h, n, nil
}

// Blank reports whether f holds no log: there are only zeroes up to where records
// begin. A block device by this name may be another one by now than it was, with
// something of which the first blocks are as good as empty.
func Blank(f File) (bool, error) {
	b := f.Buffer(DataOffset)
	switch _, err := f.ReadAt(b, 0); {
	case errors.Is(err, io.EOF):
		return false, fmt.Errorf("%w: it is too short for one", ErrCorrupt)
	case err != nil:
		return false, fmt.Errorf("read header of the log: %w", err)
	}
	for _, c := range b {
		if c != 0 {
			return false, nil
		}
	}
	return true, nil
}

// A Found is a whole record that a search of a log's file came upon.
type Found struct {
	Seq, Pos uint64 // Pos in bytes
	Epoch    uint64
	Data     int // bytes
	Extents  int
}

// Search looks at every block of a log's file for records of that log whose
// headers are whole, in the order of their places, whatever their order in time.
// Those that a recovery has cut off are left out. It reads all of the file, and stops
// when ctx ends.
func Search(ctx context.Context, f File, visit func(Found)) error {
	l, err := Open(f)
	if err != nil {
		return err
	}
	segs, err := newSegments(ctx, l, 0, 0)
	if err != nil {
		return err
	}
	defer segs.close()
	s := scanner{log: l, sectors: 1 << 63, segs: segs}
	for p := uint64(0); p < l.hdr.Size; p += BlockSize {
		if err := s.load(p); err != nil {
			return err
		}
		b := s.buf[p%SegmentSize:]
		if !looksLikeRecord(b) {
			continue
		}
		if r, ok := decodeRecord(b, &l.hdr.Log, s.sectors); ok && r.pos%l.hdr.Size == p && !l.hdr.cutOff(&r) {
			visit(Found{Seq: r.seq, Pos: r.pos, Epoch: r.epoch, Data: r.data, Extents: r.extents})
		}
	}
	return nil
}

// LastSeq returns the greatest sequence number of the records that Search finds,
// 0 if there is none.
func LastSeq(ctx context.Context, f File) (last uint64, err error) {
	err = Search(ctx, f, func(r Found) { last = max(last, r.Seq) })
	return last, err
}

// Open reads the header of a log and returns the log, which Recover then fills.
// It keeps f.
func Open(f File) (*Log, error) {
	h, n, err := ReadHeader(f)
	if err != nil {
		return nil, err
	}
	return &Log{
		file: f, hdr: h, header: n,
		crcs:    sums{held: make([]*blockSums, h.Size/SegmentSize)},
		readers: make([]uint32, h.Size/SegmentSize),
	}, nil
}

// A Record is what recovery found: one atomic group of writes, in order.
type Record struct {
	Seq     uint64
	Pos     uint64 // position of the record, in bytes
	End     uint64 // position after it, in bytes
	Epoch   uint64
	Extents []Extent // good until the visitor returns
}

// A Start says where recovery begins: after the last record that the store has.
type Start struct {
	Pos uint64 // bytes
	Seq uint64 // of the first record that the store does not have
}

// RecoverOptions says what a recovery goes by.
type RecoverOptions struct {
	// Sectors is the size of the image: nothing with an extent beyond it is a record.
	Sectors uint64
	// Boot is the identity of this boot of the host: if the log was last opened in
	// the same one, no power was lost, and only what was in flight can be torn, so
	// that the search for later records can be short. uuid.Nil makes it whole: all of
	// the log is read.
	Boot uuid.UUID
	// ReadAhead has a goroutine read the log while records are visited. Without it, all
	// is done on the caller's, in a certain order.
	ReadAhead bool
}

// Recover reads the records from start on and calls visit for each, in order, on the
// caller's goroutine. The log ends at the first record that is not whole, unless a later
// one proves that it had been flushed: then the error matches ErrCorrupt and says where.
// Recover stops when ctx ends. An error of visit is returned as it is. Nothing reads the
// file any more when Recover has returned.
func (l *Log) Recover(ctx context.Context, start Start, o RecoverOptions, visit func(Record) error) error {
	limit := start.Pos + l.hdr.Size
	end := uint64(0)
	if o.ReadAhead {
		end = segmentAfter(limit)
	}
	segs, err := newSegments(ctx, l, start.Pos/SegmentSize, end)
	if err != nil {
		return err
	}
	defer segs.close()
	s := scanner{log: l, sectors: o.Sectors, segs: segs}
	pos, seq, err := s.records(start, limit, visit)
	if err != nil {
		return err
	}
	far := limit
	if o.Boot != uuid.Nil && o.Boot == l.hdr.Boot {
		far = min(far, pos+MaxInFlight*(MaxData+BlockSize)+SegmentSize)
	}
	segs.end = min(segs.end, segmentAfter(far))
	if err := s.contradiction(pos, far, seq); err != nil {
		return err
	}
	l.head, l.trimmed, l.reclaimed = pos, start.Pos, start.Pos
	l.nextSeq, l.completed, l.prev = seq, seq-1, s.prev
	// What was read may still be in the disk's volatile cache. The header that
	// Adopt writes and flushes makes it durable.
	l.durable = seq - 1
	return nil
}

// segmentAfter returns the number of the first segment that begins at pos or behind it.
func segmentAfter(pos uint64) uint64 { return (pos + SegmentSize - 1) / SegmentSize }

// scanner looks at the records of a log.
type scanner struct {
	log     *Log
	sectors uint64
	segs    *segments
	buf     []byte // of the segment cur, if have
	cur     uint64
	have    bool
	epoch   uint64
	prev    uint32
}

// load makes buf hold the segment that pos is in.
func (s *scanner) load(pos uint64) (err error) {
	n := pos / SegmentSize
	if s.have && s.cur == n {
		return nil
	}
	s.buf, err = s.segs.get(n)
	s.cur, s.have = n, err == nil
	return err
}

// records calls visit for the records from start on, in order, and returns where the
// first one that is not whole would be, and its number.
func (s *scanner) records(start Start, limit uint64, visit func(Record) error) (pos, seq uint64, err error) {
	pos, seq = start.Pos, start.Seq
	known := false // the checksum of the record before is known
	var extents []Extent
	for pos < limit && !(mutate.On(mutate.RecoveryStopsEarly) && seq-start.Seq >= 8) {
		r, hdr, err := s.at(pos, seq, known)
		if err != nil {
			return 0, 0, err
		}
		if hdr == nil {
			break
		}
		extents = r.appendExtents(extents[:0], hdr)
		sums, at := s.log.crcs.of(s.log.segment(r.pos)), blockIndex(r.pos)+1
		for i := range r.data / BlockSize {
			sums[at+i] = r.blockSum(hdr, i)
		}
		pos = r.pos + r.size()
		if err := visit(Record{Seq: r.seq, Pos: r.pos, End: pos, Epoch: r.epoch, Extents: extents}); err != nil {
			return 0, 0, err
		}
		s.epoch, s.prev, known = r.epoch, r.sum, true
		seq++
	}
	return pos, seq, nil
}

// appendExtents appends to list the extents of the record with the header hdr.
func (r *record) appendExtents(list []Extent, hdr []byte) []Extent {
	for i := range r.extents {
		e, off := getExtent(hdr, i)
		e.Pos = r.pos / Sector
		if !e.Zero {
			e.Pos += BlockSize/Sector + uint64(off)
		}
		list = append(list, e)
	}
	return list
}

// at returns the record with the given number at pos, or at the segment after it,
// where the writer goes when a record does not fit. The header is nil when there
// is none.
func (s *scanner) at(pos, seq uint64, known bool) (record, []byte, error) {
	for _, p := range [2]uint64{pos, (pos + SegmentSize - 1) / SegmentSize * SegmentSize} {
		if err := s.load(p); err != nil {
			return record{}, nil, err
		}
		b := s.buf[p%SegmentSize:]
		r, ok := decodeRecord(b, &s.log.hdr.Log, s.sectors)
		if !ok || r.pos != p || r.seq != seq || r.epoch < s.epoch || r.epoch > s.log.hdr.Epoch || known && r.prev != s.prev || s.log.hdr.cutOff(&r) {
			continue
		}
		if s.whole(&r, b) {
			return r, b[:BlockSize], nil
		}
	}
	return record{}, nil, nil
}

// whole reports whether the data of the record at b is as its header says.
func (s *scanner) whole(r *record, b []byte) bool {
	for i := range r.data / BlockSize {
		if crc32.Checksum(b[BlockSize*(i+1):][:BlockSize], castagnoli) != r.blockSum(b, i) && !mutate.On(mutate.TornRecord) {
			return false
		}
	}
	return true
}

// contradiction looks for a record after pos that says that the record seq, which
// is not there, had been flushed. Such a record belongs to this log, is newer,
// and its own place is where its position says.
func (s *scanner) contradiction(pos, end, seq uint64) error {
	for p := pos; p < end; p += BlockSize {
		if err := s.load(p); err != nil {
			return err
		}
		b := s.buf[p%SegmentSize:]
		if !looksLikeRecord(b) {
			continue
		}
		r, ok := decodeRecord(b, &s.log.hdr.Log, s.sectors)
		if ok && r.pos == p && r.seq >= seq && r.epoch >= s.epoch && r.flushed >= seq && !s.log.hdr.cutOff(&r) && !mutate.On(mutate.ProofIgnored) {
			return fmt.Errorf("%w: record %d, at offset %d of its file, is damaged although record %d says that it had been flushed",
				ErrCorrupt, seq, s.log.offset(pos), r.seq)
		}
	}
	return nil
}
