// Package writelog is the circular journal on the local SSD from which writes
// are acknowledged; docs/formats.md gives its format byte for byte.
//
// Writes that arrive in one turn of the reactor are appended to one record,
// which Commit writes in one piece (group commit). A record's place is its
// position: the number of bytes that were ever appended before it, so that
// position modulo the log's size is its place in the file and no record of an
// earlier lap can be taken for one of this lap. Records are numbered without
// gaps, for the whole life of the image.
//
// The newest segments of the log are mirrored in memory: a record is built in that
// memory, written from it, and can be read from it. A log has memory of its own for
// some segments; while that does not hold what is not in the store it borrows more of
// a Pool, and without that it gives the memory of the oldest segment to the next one.
//
// A Log is opened and recovered with blocking calls, on any one goroutine. From
// Start on it belongs to the reactor, which alone may call its methods, but for
// ReadBlocking.
package writelog

import (
	"fmt"
	"hash/crc32"
	"math"
	"syscall"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A Client is told of a log's progress, on the reactor.
type Client interface {
	// LogCompleted says that every record up to seq has been written.
	LogCompleted(seq uint64)
	// LogDurable says that every record up to seq is on stable media.
	LogDurable(seq uint64)
	// LogSpace says that an append that was refused may go through now.
	LogSpace()
	// LogFailed says that the SSD failed; no append succeeds from here on.
	LogFailed(err error)
}

// A Status says whether an append went through.
type Status int

const (
	// Appended: the write is in the open record.
	Appended Status = iota
	// Full: the log has no room until more of it is trimmed.
	Full
	// Busy: as much is being written, or read from memory, as may be at once.
	Busy
	// Failed: the SSD failed.
	Failed
)

// MaxInFlight bounds the records that are being written at one time.
const MaxInFlight = 64

// inflight is a record on its way to the SSD. Its slot is reused in ring order.
type inflight struct {
	log  *Log
	pos  uint64 // bytes
	seq  uint64
	buf  []byte // what is left to write
	off  int64
	done bool
}

// A Log is a write log. See the package comment for who may call what.
type Log struct {
	file   File
	hdr    Header
	header int // which copy counted when the log was opened

	dev    aio.Device
	client Client

	mem      mirror
	memStart uint64 // position from which on mem has been filled by this process
	crcs     sums

	head      uint64 // position after the last appended byte of closed records
	trimmed   uint64 // everything before is in the store
	reclaimed uint64 // everything before may be overwritten: trimmed, less what is being read
	nextSeq   uint64 // of the record that is open or will be opened next
	prev      uint32 // CRC32C of the last closed record's header

	open record // the record being filled; valid while isOpen
	// used counts the sectors of data in the open record, alignment included.
	used   int
	isOpen bool
	// summed has a bit for each block of data of the open record whose checksum is among crcs.
	summed [MaxData / BlockSize / 64]uint64

	ring        [MaxInFlight]inflight
	first, last uint64 // ring[first%n] .. ring[(last-1)%n] are in flight
	maxInFlight int

	completed uint64 // seq
	durable   uint64 // seq
	syncWant  uint64 // seq that somebody waits for
	syncing   uint64 // seq that the running sync will make durable; 0: none runs

	pins    []uint64 // positions from which on memory must stay
	readers []uint32 // reads from the SSD in each segment: one for each fragment of a request
	refused bool     // an append was refused: tell the client when there is room
	writing int      // record writes that the device has
	err     error
}

// syncDone receives the completion of a sync.
type syncDone Log

// Header returns what the log's header says.
func (l *Log) Header() Header { return l.hdr }

// Size returns the bytes that the log can hold.
func (l *Log) Size() uint64 { return l.hdr.Size }

// Used returns the bytes between the oldest record that is not yet in the store
// and the newest one.
func (l *Log) Used() uint64 { return l.end() - l.trimmed }

// Err returns why the log failed, or nil.
func (l *Log) Err() error { return l.err }

// Completed returns the sequence number up to which records have been written.
func (l *Log) Completed() uint64 { return l.completed }

// Durable returns the sequence number up to which records are on stable media.
func (l *Log) Durable() uint64 { return l.durable }

// Seq returns the sequence number of the record that the last append went into.
func (l *Log) Seq() uint64 {
	if l.isOpen {
		return l.nextSeq
	}
	return l.nextSeq - 1
}

// Head returns the position, in bytes, after everything that was appended.
func (l *Log) Head() uint64 { return l.end() }

// OwnMemory returns how much memory the log has that it was not lent, in bytes.
func (l *Log) OwnMemory() uint64 { return uint64(l.mem.owned) * SegmentSize }

// Idle reports that no record is open or in flight.
func (l *Log) Idle() bool { return !l.isOpen && l.first == l.last }

// Rest drops what memory an idle log does not need, and reports whether its
// mirror may be dropped, too: then no byte of it is read any more until it has
// been written anew. It does nothing unless all of the log is in the store, and
// nothing is in flight.
func (l *Log) Rest() bool {
	if l.Used() > 0 || l.reclaimed != l.trimmed || !l.Idle() || !l.Quiet() {
		return false
	}
	l.memStart = l.head
	l.mem.clear()
	l.crcs.spare = nil
	return true
}

// Quiet reports whether nothing is in flight to or from the SSD.
func (l *Log) Quiet() bool {
	for _, n := range l.readers {
		if n > 0 {
			return false
		}
	}
	return l.writing == 0 && l.syncing == 0 && len(l.pins) == 0
}

// end is the position after the last byte appended, the open record's included.
func (l *Log) end() uint64 {
	if l.isOpen {
		return l.open.pos + BlockSize + uint64(blocks(l.used))*BlockSize
	}
	return l.head
}

const perBlock = BlockSize / Sector

func blocks(sectors int) int { return (sectors + perBlock - 1) / perBlock }

// Start hands the log to the reactor that owns dev. mem, whose length is a
// multiple of SegmentSize, is kept until the log is dropped, as is what pool, which
// may be nil, has lent by then. depth is the most records in flight, 1 to
// MaxInFlight; fewer make larger records.
func (l *Log) Start(dev aio.Device, client Client, mem []byte, pool Pool, depth int) {
	if len(mem) == 0 || len(mem)%SegmentSize != 0 || depth < 1 || depth > MaxInFlight {
		panic("writelog: Start: bad arguments")
	}
	l.dev, l.client, l.mem, l.memStart, l.maxInFlight = dev, client, newMirror(mem, pool), l.head, depth
	for i := range l.ring {
		l.ring[i].log = l
	}
}

// room makes sure that the open record can take one more extent with the given
// number of sectors of data, opening one if need be.
func (l *Log) room(sectors int) Status {
	if l.err != nil {
		return Failed
	}
	if l.isOpen {
		used := l.aligned(sectors) + sectors
		size := uint64(BlockSize + blocks(used)*BlockSize)
		if l.open.extents < maxExtents &&
			recordFixed+(l.open.extents+1)*extentSize+4*blocks(used) <= BlockSize &&
			blocks(used)*BlockSize <= MaxData && l.open.pos%SegmentSize+size <= SegmentSize {
			return l.space(l.open.pos + size)
		}
		l.Commit()
	}
	if l.last-l.first >= uint64(l.maxInFlight) {
		return Busy
	}
	size := uint64(BlockSize + blocks(sectors)*BlockSize)
	pos := l.head
	if pos%SegmentSize+size > SegmentSize {
		pos += SegmentSize - pos%SegmentSize
	}
	if st := l.space(pos + size); st != Appended {
		return st
	}
	l.open = record{pos: pos, seq: l.nextSeq, epoch: l.hdr.Epoch, prev: l.prev}
	l.used, l.isOpen = 0, true
	clear(l.summed[:])
	return Appended
}

// space reports whether the log may grow to the position end.
func (l *Log) space(end uint64) Status {
	if end-l.reclaimed > l.hdr.Size && !mutate.On(mutate.LogOverwritten) {
		return Full
	}
	if n := (end - 1) / SegmentSize; n >= l.mem.next && !l.mem.grow(n, l.needed(), l.trimmed) {
		return Busy
	}
	return Appended
}

// needed returns the position before which memory is not used: neither by the open record, nor by
// those in flight, nor by who has pinned it.
func (l *Log) needed() uint64 {
	low := uint64(math.MaxUint64)
	if mutate.On(mutate.MemoryReused) {
		return low
	}
	if l.first != l.last {
		low = l.ring[l.first%MaxInFlight].pos
	} else if l.isOpen {
		low = l.open.pos
	}
	for _, p := range l.pins {
		low = min(low, p)
	}
	return low
}

// aligned returns where, in sectors, the next extent's data begins in the open
// record: writes of whole blocks begin at a block, so that they can be read back
// without a detour.
func (l *Log) aligned(sectors int) int {
	if sectors >= perBlock {
		return blocks(l.used) * perBlock
	}
	return l.used
}

// Append adds a write of data, a whole number of sectors and at most MaxData
// bytes, at the image's given sector, and copies it. It returns the position of
// the data in sectors. Unless the status is Appended nothing has happened, and
// the client's LogSpace follows when trying again makes sense.
func (l *Log) Append(sector uint64, data []byte) (uint64, Status) {
	n := len(data) / Sector
	if n == 0 || len(data)%Sector != 0 || len(data) > MaxData {
		panic("writelog: Append: bad length")
	}
	if st := l.room(n); st != Appended {
		l.refused = true
		return 0, st
	}
	at := l.aligned(n)
	hdr := l.mem.bytes(l.open.pos, BlockSize)
	putExtent(hdr, l.open.extents, sector, uint32(n), uint32(at), false)
	body := l.mem.bytes(l.open.pos+BlockSize, blocks(at+n)*BlockSize)
	clear(body[l.used*Sector : at*Sector])
	l.fill(body, at, data)
	l.open.extents++
	l.used = at + n
	return (l.open.pos+BlockSize)/Sector + uint64(at), Appended
}

// fill copies data into the open record, whose data body is, from the sector at on. What fills whole
// blocks does not change any more: their checksums are taken here, while the processor has them in
// its cache.
func (l *Log) fill(body []byte, at int, data []byte) {
	if at%perBlock == 0 {
		sums, first := l.crcs.of(l.segment(l.open.pos)), blockIndex(l.open.pos)+1
		for ; len(data) >= BlockSize; data, at = data[BlockSize:], at+perBlock {
			i := at / perBlock
			b := body[i*BlockSize:][:BlockSize]
			copy(b, data)
			sums[first+i] = crc32.Checksum(b, castagnoli)
			l.summed[i/64] |= 1 << (i % 64)
		}
	}
	copy(body[at*Sector:], data)
}

// AppendZeroes adds a write of n sectors of zeroes that takes no space for data:
// a discard, or write-zeroes. It returns the record's position in sectors.
func (l *Log) AppendZeroes(sector uint64, n uint32) (uint64, Status) {
	if n == 0 {
		panic("writelog: AppendZeroes: nothing")
	}
	if st := l.room(0); st != Appended {
		l.refused = true
		return 0, st
	}
	putExtent(l.mem.bytes(l.open.pos, BlockSize), l.open.extents, sector, n, 0, true)
	l.open.extents++
	return l.open.pos / Sector, Appended
}

// Commit closes the open record, if there is one, and starts to write it. The
// reactor calls it at the end of each turn. Of a log that has failed the record is in
// memory alone.
func (l *Log) Commit() {
	if !l.isOpen {
		return
	}
	l.isOpen = false
	r := &l.open
	r.data = blocks(l.used) * BlockSize
	r.flushed = l.durable
	buf := l.mem.bytes(r.pos, int(r.size()))
	clear(buf[BlockSize+l.used*Sector:])
	sums, at := l.crcs.of(l.segment(r.pos)), blockIndex(r.pos)+1
	for i := range r.data / BlockSize {
		if l.summed[i/64]&(1<<(i%64)) == 0 {
			sums[at+i] = crc32.Checksum(buf[BlockSize*(i+1):][:BlockSize], castagnoli)
		}
		putBlockSum(buf, r.data, i, sums[at+i])
	}
	encodeRecord(buf[:BlockSize], &l.hdr.Log, r)
	l.head, l.prev = r.pos+r.size(), r.sum
	l.nextSeq++
	if l.err != nil {
		return
	}
	f := &l.ring[l.last%MaxInFlight]
	f.pos, f.seq, f.buf, f.off, f.done = r.pos, r.seq, buf, l.offset(r.pos), false
	l.last++
	l.writing++
	l.dev.WriteAt(f.buf, f.off, f)
}

// offset returns where in the file the position is.
func (l *Log) offset(pos uint64) int64 { return DataOffset + int64(pos%l.hdr.Size) }

// blockIndex returns which block of its segment the position is in.
func blockIndex(pos uint64) int { return int(pos % SegmentSize / BlockSize) }

// Complete receives the result of writing a record.
func (f *inflight) Complete(res int32, _ uint32) {
	l := f.log
	l.writing--
	switch {
	case res < 0:
		l.fail(fmt.Errorf("write to the log failed: %w", syscall.Errno(-res)))
		return
	case int(res) < len(f.buf):
		if res == 0 || res%BlockSize != 0 {
			l.fail(fmt.Errorf("write to the log ended after %d of %d bytes", res, len(f.buf)))
			return
		}
		f.buf, f.off = f.buf[res:], f.off+int64(res)
		l.writing++
		l.dev.WriteAt(f.buf, f.off, f)
		return
	}
	f.done = true
	n := l.first
	for n != l.last && (l.ring[n%MaxInFlight].done || mutate.On(mutate.AckOutOfOrder)) {
		n++
	}
	if n == l.first || l.err != nil {
		return
	}
	l.completed = l.ring[(n-1)%MaxInFlight].seq
	l.first = n
	l.client.LogCompleted(l.completed)
	l.kickSync()
	l.offerSpace()
}

func (l *Log) offerSpace() {
	if l.refused {
		l.refused = false
		l.client.LogSpace()
	}
}

// fail ends the log's service; what has been acknowledged stays readable.
func (l *Log) fail(err error) {
	if l.err == nil {
		l.err = err
		l.client.LogFailed(err)
	}
}

// Sync asks for every record up to seq, which has been appended, to be made
// durable; LogDurable tells. Only one sync runs at a time: a later call may be
// served by one that covers it.
func (l *Log) Sync(seq uint64) {
	if seq <= l.durable {
		panic("writelog: Sync of what is durable")
	}
	if l.syncWant <= l.durable || seq < l.syncWant {
		l.syncWant = seq
	}
	l.kickSync()
}

func (l *Log) kickSync() {
	if l.syncing != 0 || l.syncWant <= l.durable || l.completed < l.syncWant || l.err != nil {
		return
	}
	l.syncing = l.completed
	if mutate.On(mutate.SyncCoversInFlight) {
		l.syncing = l.nextSeq - 1
	}
	l.dev.Sync((*syncDone)(l))
}

// Complete receives the result of a sync.
func (s *syncDone) Complete(res int32, _ uint32) {
	l := (*Log)(s)
	seq := l.syncing
	l.syncing = 0
	if res < 0 {
		// What an fsync that failed left behind is unknown: it is not tried again.
		l.fail(fmt.Errorf("flush of the log failed: %w", syscall.Errno(-res)))
		return
	}
	l.durable = seq
	l.client.LogDurable(seq)
	l.kickSync()
}

// Trim says that everything before the position in bytes is in the store.
func (l *Log) Trim(pos uint64) {
	if pos < l.trimmed || pos > l.head {
		panic("writelog: Trim: position outside the log")
	}
	l.trimmed = pos
	l.mem.shrink(min(l.needed(), pos))
	l.reclaim()
}

// reclaim lets go of what has been trimmed and is not being read.
func (l *Log) reclaim() {
	old := l.reclaimed
	for l.reclaimed < l.trimmed && l.readers[l.segment(l.reclaimed)] == 0 {
		start := l.reclaimed - l.reclaimed%SegmentSize
		l.reclaimed = min(start+SegmentSize, l.trimmed)
		// The next lap may have begun to use the segment, if it was half reclaimed.
		if l.reclaimed == start+SegmentSize && l.end() <= start+l.hdr.Size {
			l.crcs.drop(l.segment(start))
		}
	}
	if l.reclaimed != old {
		l.offerSpace()
	}
}

func (l *Log) segment(pos uint64) int { return int(pos % l.hdr.Size / SegmentSize) }

// Pin keeps the memory from the position in bytes on from being reused, so that
// another goroutine may read it. It reports false, and pins nothing, if that
// part of the log is not in memory any more.
func (l *Log) Pin(pos uint64) bool {
	if !l.InMemory(pos) {
		return false
	}
	l.pins = append(l.pins, pos)
	return true
}

// Unpin undoes one Pin of the same position.
func (l *Log) Unpin(pos uint64) {
	for i, p := range l.pins {
		if p == pos {
			l.pins[i] = l.pins[len(l.pins)-1]
			l.pins = l.pins[:len(l.pins)-1]
			l.offerSpace()
			return
		}
	}
	panic("writelog: Unpin of what is not pinned")
}

// InMemory reports whether everything from the position in bytes on is in memory.
func (l *Log) InMemory(pos uint64) bool {
	return pos >= l.memStart && l.mem.has(pos)
}

// Remembers reports whether anything before the position in bytes is in memory.
func (l *Log) Remembers(pos uint64) bool {
	return pos > max(l.memStart, l.mem.start(l.mem.first))
}

// A Mirror is a part of the log in memory. While it is pinned it may be read on any goroutine.
type Mirror struct {
	first uint64 // segment
	segs  [][]byte
}

// At returns n bytes from the position in sectors, which lie in one record.
func (m Mirror) At(pos uint64, n int) []byte {
	at := pos * Sector
	i := at % SegmentSize
	return m.segs[at/SegmentSize-m.first][i : i+uint64(n) : i+uint64(n)]
}

// Mirror returns the memory of the positions from start to end, in bytes, which is in memory.
func (l *Log) Mirror(start, end uint64) Mirror {
	m := Mirror{first: start / SegmentSize}
	for n := m.first; l.mem.start(n) < end; n++ {
		m.segs = append(m.segs, l.mem.segment(n))
	}
	return m
}

// Memory returns n sectors from the position in sectors, which lie in one
// record, if they are in memory, else nil. The slice is good until the next
// append, or as long as its position is pinned.
func (l *Log) Memory(pos uint64, n uint32) []byte {
	if !l.InMemory(pos * Sector) {
		return nil
	}
	return l.mem.bytes(pos*Sector, int(n)*Sector)
}

// Hold keeps the segment of the position in sectors from being overwritten while
// it is read from the SSD; Release undoes it.
func (l *Log) Hold(pos uint64) { l.readers[l.segment(pos*Sector)]++ }

// Release undoes one Hold of the same position.
func (l *Log) Release(pos uint64) {
	l.readers[l.segment(pos*Sector)]--
	l.reclaim()
}

// Direct reports whether Read can serve a read of n sectors at the position.
func (l *Log) Direct(pos uint64, n uint32) bool {
	return pos%perBlock == 0 && n%perBlock == 0
}

// Read starts to read whole blocks from the SSD into p, which must be aligned to a
// block; c receives the device's result, and then calls Verify. The caller
// holds the position.
func (l *Log) Read(p []byte, pos uint64, c aio.Completer) {
	l.dev.ReadAt(p, l.offset(pos*Sector), c)
}

// Verify checks whole blocks that were read from the position in sectors.
func (l *Log) Verify(p []byte, pos uint64) error {
	for i := 0; i < len(p); i += BlockSize {
		if _, err := l.verifyBlock(p[i:i+BlockSize], pos+uint64(i)/Sector); err != nil {
			return err
		}
	}
	return nil
}

// verifyBlock checks the block that was read from the position in sectors, and returns its checksum.
func (l *Log) verifyBlock(b []byte, pos uint64) (uint32, error) {
	sum, at := crc32.Checksum(b, castagnoli), pos*Sector
	if sum != l.crcs.held[l.segment(at)][blockIndex(at)] && !mutate.On(mutate.LogReadUnverified) {
		return 0, fmt.Errorf("%w: checksum of the block at offset %d of its file is wrong", ErrCorrupt, l.offset(at))
	}
	return sum, nil
}

// CopyVerified copies whole blocks that were read from the position in sectors, checks the copy, and
// gives sums, which has room for just that many, the CRC32C of each. A block is in the processor's
// cache meanwhile: memory is read once. Any goroutine may call it, for a position that is held or
// not yet trimmed.
func (l *Log) CopyVerified(dst, src []byte, pos uint64, sums []uint32) error {
	for i := range sums {
		b := dst[i*BlockSize:][:BlockSize]
		copy(b, src[i*BlockSize:][:BlockSize])
		var err error
		if sums[i], err = l.verifyBlock(b, pos+uint64(i)*perBlock); err != nil {
			return err
		}
	}
	return nil
}

// Sums gives sums the CRC32C of as many whole blocks from the position in sectors on, all of them in
// one record that has been committed: of what was appended, whatever has become of it since. Any
// goroutine may call it, for a position that is held or not yet trimmed.
func (l *Log) Sums(sums []uint32, pos uint64) {
	at := pos * Sector
	if n := copy(sums, l.crcs.held[l.segment(at)][blockIndex(at):]); n < len(sums) {
		panic("writelog: Sums: not all in one record")
	}
}

// ReadBlocking reads whole sectors from the position in sectors, which lie in
// one record, from the SSD into dst. Any goroutine may call it, for a position
// that is held or not yet trimmed. scratch must hold the blocks that the range
// meets and suit direct I/O.
func (l *Log) ReadBlocking(dst []byte, pos uint64, scratch []byte) error {
	n := uint64(len(dst) / Sector)
	from := pos / perBlock * perBlock
	to := (pos + n + perBlock - 1) / perBlock * perBlock
	p := scratch[:(to-from)*Sector]
	if err := l.ReadWindow(p, from); err != nil {
		return err
	}
	if err := l.Verify(p, from); err != nil {
		return err
	}
	copy(dst, p[(pos-from)*Sector:])
	return nil
}

// Buffer returns memory that suits ReadWindow.
func (l *Log) Buffer(n int) []byte { return l.file.Buffer(n) }

// Window returns a range of positions, in sectors, that begins at the block of
// pos, ends at end, the next segment, or n bytes further, and can be read at
// once by ReadWindow.
func (l *Log) Window(pos, end uint64, n int) (from, to uint64) {
	const perSegment = SegmentSize / Sector
	from = pos / perBlock * perBlock
	to = min((end+perBlock-1)/perBlock*perBlock, (pos/perSegment+1)*perSegment, from+uint64(n/Sector))
	return from, to
}

// ReadWindow reads whole blocks of one segment into p, without a check; any
// goroutine may call it, as ReadBlocking.
func (l *Log) ReadWindow(p []byte, from uint64) error {
	if _, err := l.file.ReadAt(p, l.offset(from*Sector)); err != nil {
		return fmt.Errorf("read of the log: %w", err)
	}
	return nil
}

// VerifyWindow checks the blocks in which the n sectors of data from pos lie, in
// a window that was read from the position from.
func (l *Log) VerifyWindow(p []byte, from, pos, n uint64) error {
	a := pos / perBlock * perBlock
	b := (pos + n + perBlock - 1) / perBlock * perBlock
	return l.Verify(p[(a-from)*Sector:(b-from)*Sector], a)
}

// Adopt makes the log belong to a new ownership of its image, durably; first is
// the number of the record at position 0. Records of earlier ownerships behind those
// that recovery has found are none from then on. It is called after recovery and
// before Start.
func (l *Log) Adopt(epoch, first uint64, boot uuid.UUID) error {
	if epoch < l.hdr.Epoch || first == 0 {
		panic("writelog: Adopt: bad arguments")
	}
	h := l.hdr
	h.Epoch, h.FirstSeq, h.Boot, h.generation, h.cut = epoch, first, boot, h.generation+1, l.nextSeq
	// The copy that counts now comes last, so that one of them is whole at any
	// time. It does come: a copy that is damaged must not bring back an older
	// ownership, which would not know the newest records.
	for _, copyNo := range [2]int{1 - l.header, l.header} {
		if err := writeHeader(l.file, &h, copyNo); err != nil {
			return err
		}
	}
	l.hdr = h
	return nil
}

// Close closes the log's file. Nothing may be in flight.
func (l *Log) Close() error { return l.file.Close() }
