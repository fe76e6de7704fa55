package ring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Versions of the ring: the second one has compare and write, and counts the image's changes.
const (
	MinVersion = 1
	Version    = 2
)

// Limits of a ring.
const (
	MinEntries = 8
	MaxEntries = 1024
	MinData    = 2 << 20  // bytes
	MaxData    = 64 << 20 // bytes
)

// ErrLimits is what errors of NewMemory match when what was asked for is no ring.
var ErrLimits = errors.New("outside the ring's limits")

// Places in the header, in bytes.
const (
	offMagic       = 0
	offVersion     = 4
	offEntries     = 8
	offDataStart   = 16
	offDataSize    = 24
	offCRC         = 32
	offSQTail      = 64
	offSQHead      = 128
	offCQTail      = 192
	offDaemonSleep = 320
	offClientSleep = 384
	offImageSize   = 448
	offChanges     = 456
	offDecided     = 512
	queueStart     = 4096
)

const (
	magic    = "LRNG"
	sqeWords = 8 // of 8 bytes
	cqeWords = 4
	align    = 4096 // of the data area, and of a request's sectors in it
)

// A Memory is a ring's shared memory and the two eventfds of its sides. It is made for
// one client. It belongs to who made it, who closes it when nobody serves its Conn.
type Memory struct {
	version uint32
	entries uint32
	files   [3]int // memory, and the eventfds that wake the daemon and the client

	// Views of the mapping. The client can write to all of it.
	data        []byte
	sq          [][sqeWords]uint64
	cq          [][cqeWords]uint64
	sqTail      *uint32
	sqHead      *uint32
	cqTail      *uint32
	daemonSleep *uint32
	clientSleep *uint32
	decided     []uint32 // a bit for each tag

	mu      sync.Mutex
	mem     []byte // the mapping; guarded by mu: nil when closed
	changes uint64 // of the image, as the client was told; guarded by mu
}

// layout returns where the data area of a ring begins, and how long its memory is.
func layout(entries uint32, data uint64) (start, size uint64) {
	start = queueStart + uint64(entries)*8*(sqeWords+cqeWords)
	start = (start + align - 1) &^ (align - 1)
	return start, start + data
}

// NewMemory makes the memory of a ring of a version and of so many entries, a power of two,
// with a data area of data bytes. The error matches ErrLimits when that is not allowed.
func NewMemory(version, entries uint32, data uint64) (*Memory, error) {
	switch {
	case version < MinVersion || version > Version:
		return nil, fmt.Errorf("ring of version %d: %w", version, ErrLimits)
	case entries < MinEntries || entries > MaxEntries || bits.OnesCount32(entries) != 1:
		return nil, fmt.Errorf("ring of %d entries, which is no power of two from %d to %d: %w", entries, MinEntries, MaxEntries, ErrLimits)
	case data < MinData || data > MaxData || data%align != 0:
		return nil, fmt.Errorf("ring with %d bytes for data, which is no multiple of %d from %d to %d: %w", data, align, MinData, MaxData, ErrLimits)
	case binary.NativeEndian.Uint16([]byte{1, 0}) != 1:
		return nil, fmt.Errorf("ring on a big-endian machine: %w", errors.ErrUnsupported)
	}
	m := &Memory{version: version, entries: entries, files: [3]int{-1, -1, -1}}
	start, size := layout(entries, data)
	if err := m.open(int64(size)); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.view(start)
	m.writeHeader(start, data)
	return m, nil
}

// open makes the memory, of size bytes, and the eventfds.
func (m *Memory) open(size int64) error {
	fd, err := unix.MemfdCreate("lsd-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("make a ring's memory: %w", err)
	}
	m.files[0] = fd
	if err := unix.Ftruncate(fd, size); err != nil {
		return fmt.Errorf("make a ring's memory of %d bytes: %w", size, err)
	}
	// A client that could make it shorter could have any access of ours fail (SIGBUS).
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal a ring's memory: %w", err)
	}
	if m.mem, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map a ring's memory of %d bytes: %w", size, err)
	}
	for i := 1; i < len(m.files); i++ {
		if m.files[i], err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			m.files[i] = -1
			return fmt.Errorf("make a ring's eventfd: %w", err)
		}
	}
	return nil
}

// view finds the parts of the mapping; the data area begins at start.
//
// Unsafe: the queues, their words and the header's words are integers at places that
// are multiples of their size, in a mapping that is page aligned, long enough for all of
// them (layout), and cannot become shorter. They are valid until Close.
func (m *Memory) view(start uint64) {
	word := func(off int) *uint32 { return (*uint32)(unsafe.Pointer(&m.mem[off])) }
	m.sqTail, m.sqHead, m.cqTail = word(offSQTail), word(offSQHead), word(offCQTail)
	m.daemonSleep, m.clientSleep = word(offDaemonSleep), word(offClientSleep)
	m.decided = unsafe.Slice(word(offDecided), MaxEntries/32)
	m.sq = unsafe.Slice((*[sqeWords]uint64)(unsafe.Pointer(&m.mem[queueStart])), m.entries)
	m.cq = unsafe.Slice((*[cqeWords]uint64)(unsafe.Pointer(&m.mem[queueStart+8*sqeWords*int(m.entries)])), m.entries)
	m.data = m.mem[start:len(m.mem):len(m.mem)]
}

// writeHeader writes what does not change.
func (m *Memory) writeHeader(start, data uint64) {
	h := m.mem
	copy(h[offMagic:], magic)
	binary.LittleEndian.PutUint32(h[offVersion:], m.version)
	binary.LittleEndian.PutUint32(h[offEntries:], m.entries)
	binary.LittleEndian.PutUint64(h[offDataStart:], start)
	binary.LittleEndian.PutUint64(h[offDataSize:], data)
	binary.LittleEndian.PutUint32(h[offCRC:], crc32.Checksum(h[:offCRC], crc32.MakeTable(crc32.Castagnoli)))
}

// Entries returns how many requests there can be at a time: IO.Tag is below it.
func (m *Memory) Entries() uint32 { return m.entries }

// DataSize returns the bytes of the data area.
func (m *Memory) DataSize() uint64 { return uint64(len(m.data)) }

// Files returns the descriptors that the client gets: the memory, the eventfd that
// wakes the daemon, and the one that wakes the client. They are the Memory's.
func (m *Memory) Files() [3]int { return m.files }

// SetSize tells the client the size of the image in bytes. Any goroutine may call it;
// after Close it does nothing.
func (m *Memory) SetSize(bytes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mem != nil {
		// Unsafe: as in view.
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&m.mem[offImageSize])), bytes)
	}
}

// Changed counts a change of the image, or of its snapshots, for the client, whom Group.Tell
// wakes. Any goroutine may call it; after Close it does nothing.
func (m *Memory) Changed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mem != nil && m.version >= 2 {
		m.changes++
		// Unsafe: as in view.
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&m.mem[offChanges])), m.changes)
	}
}

// Close frees the memory and closes the descriptors; the client's stay. Nobody may be
// serving its Conn, nor use the Buf of any of its IOs. A second Close does nothing.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.mem != nil {
		err = unix.Munmap(m.mem)
		m.mem = nil
	}
	for i, fd := range m.files {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
			m.files[i] = -1
		}
	}
	if err != nil {
		return fmt.Errorf("close a ring's memory: %w", err)
	}
	return nil
}
