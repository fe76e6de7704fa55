package engine

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/cache/writelog"
)

// batch is a run of whole records on its way into one data object, or into a group of
// them: see split. The reactor owns it; while building, a worker reads its extents,
// which do not change any more by then.
type batch struct {
	object   uint64 // number of its first object, given when sealed; it may rise until it is being built
	objects  int    // how many it has, given when sealed
	firstSeq uint64
	lastSeq  uint64
	start    uint64 // log positions in bytes: [start, end)
	end      uint64
	extents  []writelog.Extent // in order of writing
	kind     []dataKind        // of each extent
	sectors  uint64            // of data, overwritten ones included
	kinds    [maxGroup]uint64  // the same, of each kind
	place    [maxGroup]uint8   // which of the objects gets each kind, given when sealed
	began    time.Duration     // env.Now() when its first write arrived

	// Of a batch that the cleaner has made, which holds no records.
	moved []movedPiece
	base  uint64

	state     batchState
	memory    int64         // bytes of Shared.destage that it has
	buf       []byte        // its objects, one after the other, once built
	built     []builtObject // of buf
	putting   int           // of these, that workers have
	failed    error         // of a put since the batch was built last, or nil
	tries     int
	notBefore time.Duration // of another attempt
}

// builtObject is a data object of a batch.
type builtObject struct {
	header *objectHeader
	pieces []piece // in the order of the object's data
	mixed  []int   // blocks of it whose checksums the log does not have, for they are not each one of its own
	bytes  []byte  // of the batch's buffer; nil once it is in the store
}

// last returns the number of the batch's last object.
func (b *batch) last() uint64 { return b.object + uint64(b.objects) - 1 }

// at returns the position after the batch.
func (b *batch) at() position { return position{b.last(), b.lastSeq, b.end} }

// cleaned reports whether the cleaner has made the batch.
func (b *batch) cleaned() bool { return b.base != 0 }

type batchState int

const (
	batchSealed   batchState = iota // waits for its turn
	batchBuilding                   // a worker reads the log
	batchBuilt                      // waits to be put
	batchPutting                    // workers put its objects
	batchDurable                    // waits for the ones before it
)

// piece is a part of a batch that is not overwritten inside it.
type piece struct {
	sector uint64
	pos    uint64 // in the log, in sectors
	n      uint32
	zero   bool
	kind   dataKind
	at     int // offset of its data in the object's data, in bytes
}

// bytes returns the length of the piece's data.
func (p piece) bytes() int {
	if p.zero {
		return 0
	}
	return int(p.n) * SectorSize
}

// survivors returns what is left of the extents when each sector keeps only its
// newest write, in ascending order of sectors, adjoining zeroes merged. kinds has the
// kind of each extent.
//
// They are sorted first: what is written at random hardly overlaps, and of what does not, nothing
// needs to be looked for.
func survivors(extents []writelog.Extent, kinds []dataKind) []piece {
	order := placesBy(len(extents), func(i int) uint64 { return extents[i].Sector })
	pieces := make([]piece, 0, len(extents))
	var covered []span
	for n := 0; len(order) > 0; order = order[n:] {
		n = overlapping(extents, order)
		if n == 1 {
			pieces = append(pieces, pieceOf(extents, kinds, order[0], spanOf(extents[order[0]])))
			continue
		}
		slices.Sort(order[:n])
		first := len(pieces)
		covered = covered[:0]
		for k := n - 1; k >= 0; k-- {
			i := order[k]
			covered = uncovered(covered, spanOf(extents[i]), func(s span) {
				pieces = append(pieces, pieceOf(extents, kinds, i, s))
			})
		}
		slices.SortFunc(pieces[first:], func(a, b piece) int { return cmp.Compare(a.sector, b.sector) })
	}
	return mergeZeroes(pieces)
}

// placesBy returns 0 to n-1 in ascending order of their keys, those of the same key in theirs. No
// two keys are 2^40 apart: neither sectors of an image are, nor positions in a log.
func placesBy(n int, key func(i int) uint64) []int {
	const bits = 24 // of a place
	least, most := ^uint64(0), uint64(0)
	for i := range n {
		least, most = min(least, key(i)), max(most, key(i))
	}
	if n >= 1<<bits || n > 0 && most-least >= 1<<(64-bits) {
		panic("engine: a batch is larger than it may be")
	}
	keys := make([]uint64, n) // numbers are sorted in half of the time that what they stand for takes
	for i := range n {
		keys[i] = (key(i)-least)<<bits | uint64(i)
	}
	slices.Sort(keys)
	places := make([]int, n)
	for k := range keys {
		places[k] = int(keys[k] & (1<<bits - 1))
	}
	return places
}

// overlapping returns how many of the first extents, in the order of their sectors, hang together: the
// next one has no sector of these.
func overlapping(extents []writelog.Extent, order []int) int {
	end := spanOf(extents[order[0]]).to
	n := 1
	for ; n < len(order) && extents[order[n]].Sector < end; n++ {
		end = max(end, spanOf(extents[order[n]]).to)
	}
	return n
}

// spanOf returns the sectors of e.
func spanOf(e writelog.Extent) span { return span{e.Sector, e.Sector + uint64(e.N)} }

// pieceOf returns the sectors s of the i-th extent.
func pieceOf(extents []writelog.Extent, kinds []dataKind, i int, s span) piece {
	e := &extents[i]
	p := piece{sector: s.from, pos: e.Pos, n: uint32(s.to - s.from), zero: e.Zero, kind: kinds[i]}
	if !e.Zero {
		p.pos += s.from - e.Sector
	}
	return p
}

func mergeZeroes(pieces []piece) []piece {
	out := pieces[:0]
	for _, p := range pieces {
		if k := len(out) - 1; k >= 0 && p.zero && out[k].zero && out[k].sector+uint64(out[k].n) == p.sector &&
			uint64(out[k].n)+uint64(p.n) < 1<<32 {
			out[k].n += p.n
			continue
		}
		out = append(out, p)
	}
	return out
}

// span is a run of sectors, [from, to).
type span struct{ from, to uint64 }

// uncovered calls fn for the parts of s that are in none of the spans, which are
// sorted and apart, and returns the spans with s joined to them.
func uncovered(spans []span, s span, fn func(span)) []span {
	i, _ := slices.BinarySearchFunc(spans, s.from, func(x span, from uint64) int {
		if x.to < from {
			return -1
		}
		return 1
	})
	joined, j, at := s, i, s.from
	for ; j < len(spans) && spans[j].from <= s.to; j++ {
		if at < spans[j].from {
			fn(span{at, spans[j].from})
		}
		at = max(at, spans[j].to)
		joined.from, joined.to = min(joined.from, spans[j].from), max(joined.to, spans[j].to)
	}
	if at < s.to {
		fn(span{at, s.to})
	}
	return slices.Replace(spans, i, j, joined)
}

// layout gives each piece of data its place and returns the object's extents,
// in which pieces that adjoin in the image are one.
func layout(pieces []piece) (extents []objectExtentInfo, size int) {
	extents = make([]objectExtentInfo, 0, len(pieces))
	for i := range pieces {
		p := &pieces[i]
		p.at = size
		size += p.bytes()
		if k := len(extents) - 1; k >= 0 && !p.zero && !extents[k].zero && extents[k].sector+uint64(extents[k].n) == p.sector {
			extents[k].n += p.n
			continue
		}
		extents = append(extents, objectExtentInfo{p.sector, p.n, p.zero})
	}
	return extents, size
}

// A logSource reads the data of a batch, in ascending order of positions.
type logSource interface {
	// read copies the sectors from the position in sectors to dst. If these are whole blocks of the
	// log it gives sums, which has room for just those, their checksums; else sums is empty.
	read(dst []byte, pos uint64, sums []uint32) error
}

// mirrorSource reads from the log's memory, whose place is pinned.
type mirrorSource struct {
	log    *writelog.Log
	mirror writelog.Mirror
}

func (s mirrorSource) read(dst []byte, pos uint64, sums []uint32) error {
	copy(dst, s.mirror.At(pos, len(dst)))
	if len(sums) > 0 {
		s.log.Sums(sums, pos)
	}
	return nil
}

// diskSource reads from the SSD, a window at a time.
type diskSource struct {
	log    *writelog.Log
	end    uint64 // sectors
	window []byte // of readWindow bytes, that suit the log's ReadWindow
	buf    []byte
	from   uint64 // sectors; what buf holds
}

const readWindow = 2 << 20

func (s *diskSource) read(dst []byte, pos uint64, sums []uint32) error {
	const perSegment = writelog.SegmentSize / SectorSize
	if last := pos + uint64(len(dst)/SectorSize) - 1; last >= s.end || last/perSegment != pos/perSegment {
		return fmt.Errorf("%w: extent crosses its segment of the log", ErrCorrupt)
	}
	for len(dst) > 0 {
		src, err := s.load(pos)
		if err != nil {
			return err
		}
		n := min(len(dst), len(src)) / SectorSize
		if whole := min(n/blockSectors, len(sums)); whole > 0 {
			n = whole * blockSectors
			err = s.log.CopyVerified(dst, src, pos, sums[:whole])
			sums = sums[whole:]
		} else {
			err = s.log.VerifyWindow(s.buf, s.from, pos, uint64(n))
			copy(dst, src[:n*SectorSize])
		}
		if err != nil {
			return err
		}
		dst, pos = dst[n*SectorSize:], pos+uint64(n)
	}
	return nil
}

// load returns what there is from pos on, in the window that it lies in.
func (s *diskSource) load(pos uint64) ([]byte, error) {
	if to := s.from + uint64(len(s.buf)/SectorSize); pos < s.from || pos >= to {
		from, to := s.log.Window(pos, s.end, readWindow)
		s.buf, s.from = s.window[:(to-from)*SectorSize], from
		if err := s.log.ReadWindow(s.buf, from); err != nil {
			s.buf = nil
			return nil, err
		}
	}
	return s.buf[(pos-s.from)*SectorSize:], nil
}

// source says where in the log the data of a piece, or of a part of it, is, and where it belongs in
// a batch's buffer.
type source struct {
	pos  uint64 // sectors
	dst  []byte
	sums []uint32 // of the object's header, if each block of it is one of the log's; else empty
}

// build makes the data objects of b from what src reads, and returns the buffer in
// which they are. h says whose they are and which records they hold.
func (b *batch) build(h objectHeader, src logSource, buffer func(int) []byte) ([]byte, []builtObject, error) {
	built := make([]builtObject, b.objects)
	pieces := survivors(b.extents, b.kind)
	for _, p := range pieces {
		i := b.objects - 1
		if !p.zero {
			i = int(b.place[p.kind])
		}
		built[i].pieces = append(built[i].pieces, p)
	}
	size := 0
	for i := range built {
		o := &built[i]
		o.header = new(objectHeader)
		*o.header = h
		o.header.seq, o.header.joined = b.object+uint64(i), i < b.objects-1
		o.header.extents, o.header.data = layout(o.pieces)
		o.header.pack()
		size += o.header.header + o.header.data
	}
	buf := buffer(size)
	sources, rest := make([]source, 0, len(pieces)), buf
	for i := range built {
		o := &built[i]
		n := o.header.header + o.header.data
		o.bytes, rest = rest[:n:n], rest[n:]
		sources = o.sources(sources)
	}
	for _, i := range placesBy(len(sources), func(i int) uint64 { return sources[i].pos }) {
		s := &sources[i]
		if err := src.read(s.dst, s.pos, s.sums); err != nil {
			return nil, nil, err
		}
	}
	for i := range built {
		o := &built[i]
		for _, k := range o.mixed {
			o.header.sumBlock(o.bytes, k)
		}
		o.header.put(o.bytes[:o.header.header])
	}
	return buf, built, nil
}

// sources appends where the object's data comes from. The checksums of its blocks come from the log
// as well, if they have the same bytes there in one block: the writes of programs that write whole
// blocks.
func (o *builtObject) sources(list []source) []source {
	h := o.header
	data := o.bytes[h.header:]
	h.sums, o.mixed = make([]uint32, blocksOf(h.data)), o.mixed[:0]
	for _, p := range o.pieces {
		if p.zero {
			continue
		}
		whole := 0 // blocks
		if p.pos%blockSectors == 0 && p.at%objectBlock == 0 {
			whole = p.bytes() / objectBlock
		}
		first, at, end := p.at/objectBlock, p.at+whole*objectBlock, p.at+p.bytes()
		if whole > 0 {
			list = append(list, source{p.pos, data[p.at:at], h.sums[first:][:whole]})
		}
		if at == end {
			continue
		}
		list = append(list, source{p.pos + uint64(whole*blockSectors), data[at:end], nil})
		for k := at / objectBlock; k < blocksOf(end); k++ {
			if n := len(o.mixed); n == 0 || o.mixed[n-1] < k {
				o.mixed = append(o.mixed, k)
			}
		}
	}
	return list
}
