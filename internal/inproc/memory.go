package inproc

import (
	"io"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/aio"
)

// memory is the file of a write log, in memory. Who writes to a part of it does so before
// others know of that part, so there is no lock.
type memory []byte

var _ writelog.File = memory(nil)

func newMemory(size int) memory { return make(memory, size) }

// ReadAt implements writelog.File.
func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements writelog.File.
func (m memory) WriteAt(p []byte, off int64) (int, error) {
	n := copy(m[min(off, int64(len(m))):], p)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Sync implements writelog.File.
func (m memory) Sync() error { return nil }

// Close implements writelog.File.
func (m memory) Close() error { return nil }

// Size implements writelog.File.
func (m memory) Size() int64 { return int64(len(m)) }

// Buffer implements writelog.File.
func (m memory) Buffer(n int) []byte { return make([]byte, n) }

// device is the view of a memory that a loop has. The loop owns it.
type device struct {
	loop   *loop
	memory memory
}

var _ aio.Device = (*device)(nil)

// ReadAt implements aio.Device.
func (d *device) ReadAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.memory.ReadAt(p, off)
	d.complete(n, c)
}

// WriteAt implements aio.Device.
func (d *device) WriteAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.memory.WriteAt(p, off)
	d.complete(n, c)
}

// Sync implements aio.Device.
func (d *device) Sync(c aio.Completer) { d.complete(0, c) }

// complete tells c in a later turn: it must not be told from within its call.
func (d *device) complete(res int, c aio.Completer) {
	d.loop.Post(func() { c.Complete(int32(res), 0) })
}
