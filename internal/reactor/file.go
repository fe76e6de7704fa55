package reactor

import (
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// A File does asynchronous I/O on a file through its reactor's ring. It
// implements [aio.Device]; its methods are called on the reactor's goroutine.
type File struct {
	ring *uring.Ring
	fd   int
}

var _ aio.Device = (*File)(nil)

// File returns a File for fd, which stays the caller's: it must be open until
// the last operation has completed, and the caller closes it. Whether buffers
// must be aligned depends on how it was opened (O_DIRECT).
func (r *Reactor) File(fd int) *File { return &File{r.ring, fd} }

// ReadAt implements [aio.Device].
func (f *File) ReadAt(p []byte, off int64, c aio.Completer) { f.ring.Read(f.fd, p, off, c) }

// WriteAt implements [aio.Device].
func (f *File) WriteAt(p []byte, off int64, c aio.Completer) { f.ring.Write(f.fd, p, off, c) }

// Sync implements [aio.Device].
func (f *File) Sync(c aio.Completer) { f.ring.Fsync(f.fd, true, c) }
