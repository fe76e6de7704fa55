package readcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// OSFile is a cache's file, opened for direct I/O and locked.
type OSFile struct {
	f    *os.File
	size int64
}

// ErrLocked is matched when another process has the cache open.
var ErrLocked = errors.New("read cache is in use by another process")

// CheckSize returns why a cache cannot have that many bytes.
func CheckSize(size int64) error {
	if size < MinSize || size > MaxSize {
		return fmt.Errorf("a read cache of %d bytes: it must have from %d to %d", size, MinSize, int64(MaxSize))
	}
	return nil
}

// OpenFile opens the regular file at path for a cache of size bytes, makes it if
// it is not there, and reserves its space. A cache of another size is cut, or grows;
// a file that holds anything else is refused. While a process that died still has
// writes in flight the file is locked: OpenFile waits for it, at most as long as ctx
// lasts, and fails with ErrLocked.
func OpenFile(ctx context.Context, path string, size int64) (_ *OSFile, err error) {
	if err := CheckSize(size); err != nil {
		return nil, err
	}
	// Before it is opened: opening a device or pipe may have effects.
	st, err := os.Stat(path)
	if err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read cache %s is not a regular file", path)
	}
	made := errors.Is(err, fs.ErrNotExist)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	switch {
	case errors.Is(err, unix.EINVAL):
		if made {
			os.Remove(path) // created before O_DIRECT was refused
		}
		return nil, fmt.Errorf("read cache %s is on a file system without direct I/O (O_DIRECT): choose a local disk", path)
	case err != nil:
		return nil, &fs.PathError{Op: "open read cache", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := lock(ctx, f); err != nil {
		return nil, err
	}
	if err := foreign(f); err != nil {
		return nil, err
	}
	if err := reserve(f, size, unix.Fallocate); err != nil {
		return nil, fmt.Errorf("read cache %s of %d bytes: %w", path, size, err)
	}
	return &OSFile{f: f, size: size}, nil
}

func lock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("lock read cache %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", f.Name(), ErrLocked)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// foreign fails if f is somebody else's: it does not begin as a cache does, nor with the
// zeroes of one whose header has not been written yet.
func foreign(f *os.File) error {
	b := uring.AlignedBuffer(BlockSize)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the read cache's header: %w", err)
	}
	if b = b[:n]; bytes.HasPrefix(b, []byte(fileMagic)) || len(bytes.Trim(b, "\x00")) == 0 {
		return nil
	}
	return fmt.Errorf("%s holds something that is not a read cache: choose another file, or remove it", f.Name())
}

// reserve gives f its size, and takes the space for it now, by allocate, which is
// fallocate(2): a file system that runs full later does not fail the cache. If there is
// no room, f has none of it.
func reserve(f *os.File, size int64, allocate func(fd int, mode uint32, off, n int64) error) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() > size {
		if err := f.Truncate(size); err != nil {
			return err
		}
	}
	err = allocate(int(f.Fd()), 0, 0, size)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		err = f.Truncate(size)
	case err != nil:
		// ext4 leaves what it has found so far: all that the disk had.
		err = errors.Join(err, f.Truncate(min(st.Size(), size)))
	}
	return err
}

// Fd returns the descriptor, good until Close.
func (f *OSFile) Fd() int { return int(f.f.Fd()) }

// Name returns the path that the file was opened by.
func (f *OSFile) Name() string { return f.f.Name() }

// ReadAt implements File.
func (f *OSFile) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// WriteAt implements File.
func (f *OSFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

// Sync implements File.
func (f *OSFile) Sync() error { return unix.Fdatasync(int(f.f.Fd())) }

// Size implements File.
func (f *OSFile) Size() int64 { return f.size }

// Buffer implements File.
func (f *OSFile) Buffer(n int) []byte { return uring.AlignedBuffer(n) }

// Close closes the file and lets go of its lock.
func (f *OSFile) Close() error { return f.f.Close() }
