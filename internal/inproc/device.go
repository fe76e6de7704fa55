package inproc

import (
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/memfile"
)

var _ writelog.File = (*memfile.File)(nil)

// device is the view of a file in memory that a loop has. The loop owns it.
type device struct {
	loop *loop
	file *memfile.File
}

var _ aio.Device = (*device)(nil)

// ReadAt implements aio.Device.
func (d *device) ReadAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.file.ReadAt(p, off)
	d.complete(n, c)
}

// WriteAt implements aio.Device.
func (d *device) WriteAt(p []byte, off int64, c aio.Completer) {
	n, _ := d.file.WriteAt(p, off)
	d.complete(n, c)
}

// Sync implements aio.Device.
func (d *device) Sync(c aio.Completer) { d.complete(0, c) }

// complete tells c in a later turn: it must not be told from within its call.
func (d *device) complete(res int, c aio.Completer) {
	d.loop.Post(func() { c.Complete(int32(res), 0) })
}
