// Package simdisk is a simulated SSD, driven by a seed.
//
// Faults that it makes, and that its users must survive:
//   - operations complete in any order;
//   - a killed process's operations in flight take effect or not;
//   - a power cut keeps, of the writes that no sync covered, any subset, and of
//     each any subset of its 512-byte sectors.
//
// A sync covers the writes that had completed when it was called. Damage makes
// bits flip at rest.
//
// A Disk is not safe for concurrent use.
package simdisk

import (
	"errors"
	"io"
	"math/rand/v2"

	"github.com/lsd-ceph/lsd/internal/aio"
)

const (
	blockSize  = 4096
	sectorSize = 512
)

type kind int

const (
	read kind = iota
	write
	sync
)

type op struct {
	kind kind
	p    []byte
	off  int64
	c    aio.Completer
	gen  int // sync: writes up to this number are covered
}

// unsynced is a write that has completed, or was in flight, and may be lost.
type unsynced struct {
	gen  int
	off  int64
	data []byte
}

// A Disk is a simulated SSD. It implements aio.Device, whose operations end when
// Step says so, and the write log's blocking File.
type Disk struct {
	rng     *rand.Rand
	size    int64
	cache   map[int64]*[blockSize]byte // what reads see
	stable  map[int64]*[blockSize]byte // what a power cut leaves
	pending []unsynced
	gen     int
	queue   []op

	// FailWrites and FailSyncs make those operations fail with EIO.
	FailWrites, FailSyncs bool
	// Writes, Syncs and Reads count what was done.
	Writes, Syncs, Reads int
}

// New returns a disk of the given number of zero bytes.
func New(size int64, rng *rand.Rand) *Disk {
	return &Disk{rng: rng, size: size, cache: map[int64]*[blockSize]byte{}, stable: map[int64]*[blockSize]byte{}}
}

func store(m map[int64]*[blockSize]byte, p []byte, off int64) {
	for len(p) > 0 {
		b := m[off/blockSize]
		if b == nil {
			b = new([blockSize]byte)
			m[off/blockSize] = b
		}
		n := copy(b[off%blockSize:], p)
		p, off = p[n:], off+int64(n)
	}
}

func load(m map[int64]*[blockSize]byte, p []byte, off int64) {
	for len(p) > 0 {
		n := min(len(p), int(blockSize-off%blockSize))
		if b := m[off/blockSize]; b != nil {
			copy(p[:n], b[off%blockSize:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+int64(n)
	}
}

func (d *Disk) write(p []byte, off int64) {
	store(d.cache, p, off)
	d.gen++
	d.pending = append(d.pending, unsynced{d.gen, off, append([]byte(nil), p...)})
	d.Writes++
}

// settle makes stable the writes up to number gen.
func (d *Disk) settle(gen int) {
	i := 0
	for i < len(d.pending) && d.pending[i].gen <= gen {
		store(d.stable, d.pending[i].data, d.pending[i].off)
		i++
	}
	d.pending = d.pending[i:]
	d.Syncs++
}

func (d *Disk) check(p []byte, off int64) {
	if off < 0 || off%blockSize != 0 || len(p)%blockSize != 0 || off+int64(len(p)) > d.size {
		panic("simdisk: operation outside the disk or not aligned")
	}
}

// ReadAt queues a read (aio.Device).
func (d *Device) ReadAt(p []byte, off int64, c aio.Completer) {
	d.check(p, off)
	d.queue = append(d.queue, op{kind: read, p: p, off: off, c: c})
}

// WriteAt queues a write (aio.Device).
func (d *Device) WriteAt(p []byte, off int64, c aio.Completer) {
	d.check(p, off)
	d.queue = append(d.queue, op{kind: write, p: p, off: off, c: c})
}

// Sync queues a sync (aio.Device).
func (d *Device) Sync(c aio.Completer) {
	d.queue = append(d.queue, op{kind: sync, c: c, gen: d.gen})
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
	const eio = -5
	res := int32(len(o.p))
	switch o.kind {
	case read:
		load(d.cache, o.p, o.off)
		d.Reads++
	case write:
		if d.FailWrites {
			res = eio
			break
		}
		d.write(o.p, o.off)
	case sync:
		if d.FailSyncs {
			res = eio
			break
		}
		d.settle(o.gen)
	}
	o.c.Complete(res, 0)
	return true
}

// Kill ends the process that uses the disk: what it had in flight takes effect
// or not.
func (d *Disk) Kill() {
	for _, o := range d.queue {
		if o.kind == write && d.rng.IntN(2) == 0 {
			d.write(o.p, o.off)
		}
	}
	d.queue = nil
}

// CutPower ends the host: of what was not synced, any part of it is there.
func (d *Disk) CutPower() {
	for _, o := range d.queue {
		if o.kind == write {
			d.pending = append(d.pending, unsynced{off: o.off, data: append([]byte(nil), o.p...)})
		}
	}
	d.queue = nil
	mode := d.rng.IntN(3) // lose much, lose little, anything
	for _, u := range d.pending {
		switch {
		case mode == 0 && d.rng.IntN(4) > 0, mode == 2 && d.rng.IntN(2) == 0:
		case d.rng.IntN(4) == 0:
			for s := 0; s < len(u.data); s += sectorSize {
				if d.rng.IntN(2) == 0 {
					store(d.stable, u.data[s:s+sectorSize], u.off+int64(s))
				}
			}
		default:
			store(d.stable, u.data, u.off)
		}
	}
	d.pending = nil
	d.cache = map[int64]*[blockSize]byte{}
	for k, b := range d.stable {
		c := *b
		d.cache[k] = &c
	}
}

// Damage flips one bit of the byte at off, at rest and as read.
func (d *Disk) Damage(off int64) {
	var b [1]byte
	load(d.cache, b[:], off)
	b[0] ^= 1 << d.rng.IntN(8)
	store(d.cache, b[:], off)
	store(d.stable, b[:], off)
}

// ReadAt reads, blocking.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.check(p, off)
	load(d.cache, p, off)
	d.Reads++
	return len(p), nil
}

// WriteAt writes, blocking.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.check(p, off)
	if d.FailWrites {
		return 0, errors.New("input/output error")
	}
	d.write(p, off)
	return len(p), nil
}

// Sync makes everything written stable, blocking.
func (d *Disk) Sync() error {
	if d.FailSyncs {
		return errors.New("input/output error")
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
