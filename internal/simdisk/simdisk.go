// Package simdisk is a simulated SSD, driven by a seed.
//
// Faults that it makes, and that its users must survive:
//   - operations complete in any order;
//   - a killed process's operations in flight take effect or not;
//   - a power cut keeps, of the writes that no sync covered, any subset, and of
//     each any subset of its 512-byte sectors; but the cache of the disk has a
//     size, and what does not fit any more is stable;
//   - reads return what is not there, as Corrupt makes it;
//   - operations fail, as Fail says; a write that fails may leave any subset of
//     its sectors behind, and a sync that fails makes nothing stable.
//
// A sync covers the writes that had completed when it was called. Damage makes
// bits flip at rest.
//
// A Disk is not safe for concurrent use.
package simdisk

import (
	"io"
	"math/rand/v2"
	"syscall"
	"unsafe"

	"github.com/lsd-ceph/lsd/internal/aio"
)

const (
	blockSize  = 4096
	sectorSize = 512
	cacheSize  = 16 << 20
)

// A Kind is what an operation does.
type Kind int

const (
	// Read reads.
	Read Kind = iota
	// Write writes.
	Write
	// Sync makes stable what was written.
	Sync
)

// An Op is one operation on a disk.
type Op struct {
	Kind Kind
	Off  int64 // not for Sync
	Len  int
}

type op struct {
	Op
	p   []byte
	c   aio.Completer
	gen int // sync: writes up to this number are covered
}

// unsynced is a write that has completed, or was in flight, and may be lost.
type unsynced struct {
	gen  int
	off  int64
	data []byte // never modified
}

// block is the contents of a block of the disk, which are never modified; nil
// is zeroes.
type block = *[blockSize]byte

// A Disk is a simulated SSD. It implements aio.Device, whose operations end when
// Step says so, and the write log's blocking File.
type Disk struct {
	rng     *rand.Rand
	size    int64
	cache   []block // what reads see
	stable  []block // what a power cut leaves
	pending []unsynced
	cached  int // bytes in pending
	gen     int
	queue   []op

	// Fail, if not nil, says which operations fail with EIO.
	Fail func(Op) bool
	// Corrupt, if not nil, may change what an operation has read.
	Corrupt func(o Op, p []byte)
	// Aligned asks for memory of queued operations that is aligned to a block.
	Aligned bool
	// Writes, Syncs and Reads count what was done.
	Writes, Syncs, Reads int
}

// New returns a disk of the given number of zero bytes.
func New(size int64, rng *rand.Rand) *Disk {
	blocks := (size + blockSize - 1) / blockSize
	return &Disk{rng: rng, size: size, cache: make([]block, blocks), stable: make([]block, blocks)}
}

// store puts whole blocks, which are not modified from then on, in their places.
func store(m []block, data []byte, off int64) {
	for i := off / blockSize; len(data) > 0; i++ {
		m[i] = block(data)
		data = data[blockSize:]
	}
}

// tear puts some of the sectors of data in their places.
func (d *Disk) tear(m []block, data []byte, off int64) {
	for ; len(data) > 0; data, off = data[blockSize:], off+blockSize {
		b := new([blockSize]byte)
		if old := m[off/blockSize]; old != nil {
			*b = *old
		}
		for s := 0; s < blockSize; s += sectorSize {
			if d.rng.IntN(2) == 0 {
				copy(b[s:s+sectorSize], data[s:])
			}
		}
		m[off/blockSize] = b
	}
}

func load(m []block, p []byte, off int64) {
	for i := off / blockSize; len(p) > 0; i++ {
		if b := m[i]; b != nil {
			copy(p, b[:])
		} else {
			clear(p[:blockSize])
		}
		p = p[blockSize:]
	}
}

func (d *Disk) read(p []byte, off int64) {
	load(d.cache, p, off)
	if d.Corrupt != nil {
		d.Corrupt(Op{Read, off, len(p)}, p)
	}
	d.Reads++
}

func (d *Disk) write(p []byte, off int64) {
	data := append([]byte(nil), p...)
	store(d.cache, data, off)
	d.gen++
	d.pending = append(d.pending, unsynced{d.gen, off, data})
	d.Writes++
	d.cached += len(data)
	for d.cached > cacheSize {
		d.evict()
	}
}

// failWrite does what a write that fails may do: some of it.
func (d *Disk) failWrite(p []byte, off int64) {
	old := make([]byte, len(p))
	load(d.cache, old, off)
	for s := 0; s < len(p); s += sectorSize {
		if d.rng.IntN(2) == 0 {
			copy(old[s:s+sectorSize], p[s:])
		}
	}
	d.write(old, off)
}

// evict makes the oldest write stable.
func (d *Disk) evict() {
	u := d.pending[0]
	store(d.stable, u.data, u.off)
	d.cached -= len(u.data)
	d.pending[0] = unsynced{}
	d.pending = d.pending[1:]
}

// settle makes stable the writes up to number gen.
func (d *Disk) settle(gen int) {
	for len(d.pending) > 0 && d.pending[0].gen <= gen {
		d.evict()
	}
	d.Syncs++
}

func (d *Disk) check(p []byte, off int64) {
	if off < 0 || off%blockSize != 0 || len(p)%blockSize != 0 || off+int64(len(p)) > d.size {
		panic("simdisk: operation outside the disk or not aligned")
	}
}

func (d *Disk) fails(o Op) bool { return d.Fail != nil && d.Fail(o) }

// memory checks that p suits direct I/O on a disk with blocks of blockSize, which may
// ask for memory that is aligned to them.
func (d *Device) memory(p []byte) {
	// The address is needed only as a number.
	if d.Aligned && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%blockSize != 0 {
		panic("simdisk: memory of an operation is not aligned")
	}
}

// ReadAt queues a read (aio.Device).
func (d *Device) ReadAt(p []byte, off int64, c aio.Completer) {
	d.check(p, off)
	d.memory(p)
	d.queue = append(d.queue, op{Op: Op{Read, off, len(p)}, p: p, c: c})
}

// WriteAt queues a write (aio.Device).
func (d *Device) WriteAt(p []byte, off int64, c aio.Completer) {
	d.check(p, off)
	d.memory(p)
	d.queue = append(d.queue, op{Op: Op{Write, off, len(p)}, p: p, c: c})
}

// Sync queues a sync (aio.Device).
func (d *Device) Sync(c aio.Completer) {
	d.queue = append(d.queue, op{Op: Op{Kind: Sync}, c: c, gen: d.gen})
}

// A Device is the asynchronous view of a Disk.
type Device struct{ *Disk }

// Device returns the asynchronous view.
func (d *Disk) Device() *Device { return &Device{d} }

// InFlight returns the number of operations that have not completed.
func (d *Disk) InFlight() int { return len(d.queue) }

// Step completes one queued operation, chosen by the seed, and reports whether
// there was one.
func (d *Disk) Step() bool {
	if len(d.queue) == 0 {
		return false
	}
	i := d.rng.IntN(len(d.queue))
	o := d.queue[i]
	d.queue = append(d.queue[:i], d.queue[i+1:]...)
	res := int32(len(o.p))
	fails := d.fails(o.Op)
	switch {
	case fails:
		res = -int32(syscall.EIO)
		if o.Kind == Write {
			d.failWrite(o.p, o.Off)
		}
	case o.Kind == Read:
		d.read(o.p, o.Off)
	case o.Kind == Write:
		d.write(o.p, o.Off)
	default:
		d.settle(o.gen)
	}
	o.c.Complete(res, 0)
	return true
}

// Kill ends the process that uses the disk: what it had in flight takes effect
// or not.
func (d *Disk) Kill() {
	for _, o := range d.queue {
		if o.Kind == Write && d.rng.IntN(2) == 0 {
			d.write(o.p, o.Off)
		}
	}
	d.queue = nil
}

// CutPower ends the host: of what was not synced, any part of it is there.
func (d *Disk) CutPower() {
	for _, o := range d.queue {
		if o.Kind == Write {
			d.pending = append(d.pending, unsynced{off: o.Off, data: append([]byte(nil), o.p...)})
		}
	}
	d.queue = nil
	mode := d.rng.IntN(3) // lose much, lose little, anything
	for _, u := range d.pending {
		switch {
		case mode == 0 && d.rng.IntN(4) > 0, mode == 2 && d.rng.IntN(2) == 0:
		case d.rng.IntN(4) == 0:
			d.tear(d.stable, u.data, u.off)
		default:
			store(d.stable, u.data, u.off)
		}
	}
	d.pending, d.cached = nil, 0
	copy(d.cache, d.stable)
}

// Damage flips one bit of the byte at off, at rest and as read.
func (d *Disk) Damage(off int64) {
	b := new([blockSize]byte)
	load(d.cache, b[:], off/blockSize*blockSize)
	b[off%blockSize] ^= 1 << d.rng.IntN(8)
	d.cache[off/blockSize], d.stable[off/blockSize] = b, b
}

// ReadAt reads, blocking.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.check(p, off)
	if d.fails(Op{Read, off, len(p)}) {
		return 0, syscall.EIO
	}
	d.read(p, off)
	return len(p), nil
}

// WriteAt writes, blocking.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.check(p, off)
	if d.fails(Op{Write, off, len(p)}) {
		d.failWrite(p, off)
		return 0, syscall.EIO
	}
	d.write(p, off)
	return len(p), nil
}

// Sync makes everything written stable, blocking.
func (d *Disk) Sync() error {
	if d.fails(Op{Kind: Sync}) {
		return syscall.EIO
	}
	d.settle(d.gen)
	return nil
}

// Size returns the size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Close does nothing: the disk outlives the process that opened it.
func (d *Disk) Close() error { return nil }

// Buffer returns n zero bytes.
func (d *Disk) Buffer(n int) []byte { return make([]byte, n) }

var _ interface {
	io.ReaderAt
	io.WriterAt
} = (*Disk)(nil)
