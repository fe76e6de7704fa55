package writelog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/lsd-ceph/lsd/internal/durable"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// OSFile is a log's file or block device, opened for direct I/O and locked.
//
// The lock belongs to the open file, which every operation in flight refers to:
// so whoever gets the lock knows that nothing a dead process had begun to write
// can still arrive.
type OSFile struct {
	f    *os.File
	size int64
}

// ErrLocked is matched when another process has the log open.
var ErrLocked = errors.New("write log is in use by another process")

// CheckSize reports whether a log can have so many bytes.
func CheckSize(size int64) error {
	if size < MinSize || size > MaxSize || size%BlockSize != 0 {
		return fmt.Errorf("a write log of %d bytes: it must have from %d to %d, a multiple of %d", size, MinSize, int64(MaxSize), BlockSize)
	}
	return nil
}

// MakeFile makes the file of a log at path, which must not exist, with the given
// number of bytes, all written, and durable. progress, if set, is called now and
// then with the bytes written so far. On an error nothing is left behind. It fails with
// ErrLocked while another process makes it.
func MakeFile(ctx context.Context, path string, size int64, progress func(int64)) (err error) {
	if err := CheckSize(size); err != nil {
		return err
	}
	tmp := path + ".new"
	f, err := makeTemp(tmp)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
		f.Close()
	}()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return fmt.Errorf("make write log %s of %d bytes: %w", path, size, err)
	}
	// Written through once: a flush into extents that the file system holds as
	// unwritten would cost one of its transactions each time.
	zero := uring.AlignedBuffer(4 << 20)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(zero)), size-off)
		if _, err := f.WriteAt(zero[:n], off); err != nil {
			return fmt.Errorf("make write log %s: %w", path, err)
		}
		off += n
		if progress != nil {
			progress(off)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("make write log %s: %w", path, err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("make write log %s: %w", path, err)
	}
	return durable.SyncDir(filepath.Dir(path))
}

// makeTemp makes an empty file, locked, of what a crash may have left under this name. It
// fails with ErrLocked while another process is at it: two that wrote to one file would
// have the zeroes of the one come over the records of the other.
func makeTemp(path string) (*os.File, error) {
	for {
		f, err := openLocked(path, unix.O_CREAT)
		if err == nil {
			if err = f.Truncate(0); err != nil {
				f.Close()
			}
		}
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, errMoved):
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("%s is being made: %w", path, ErrLocked)
		default:
			return nil, err
		}
	}
}

// RemoveFile removes the file of a log, durably.
func RemoveFile(path string) error {
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove write log: %w", err)
	}
	return durable.SyncDir(filepath.Dir(path))
}

func openDirect(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC|flags, 0o600)
	switch {
	case errors.Is(err, unix.EINVAL):
		if flags&unix.O_CREAT != 0 {
			os.Remove(path) // created before O_DIRECT was refused
		}
		return nil, fmt.Errorf("%s is on a file system without direct I/O (O_DIRECT): choose a directory on a local disk", filepath.Dir(path))
	case err != nil:
		return nil, &os.PathError{Op: "open write log", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// OpenFile opens and locks the log at path, a file or a block device. While a
// process that died still has writes in flight the lock is held: OpenFile waits
// for it, at most as long as ctx lasts, and then fails with ErrLocked. A block device
// must be nobody else's either, and is not to be had until it is closed: not mounted,
// or part of another one.
func OpenFile(ctx context.Context, path string) (*OSFile, error) {
	flags := 0
	switch st, err := os.Stat(path); {
	case err != nil: // openLocked says why
	case st.Mode()&fs.ModeType == fs.ModeDevice:
		flags = unix.O_EXCL
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("write log %s is neither a file nor a block device", path)
	}
	var f *os.File
	for {
		var err error
		if f, err = openLocked(path, flags); err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, errMoved) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			if errors.Is(err, unix.EBUSY) {
				return nil, fmt.Errorf("%s: %w, or the device is mounted or part of another one", path, ErrLocked)
			}
			return nil, fmt.Errorf("%s: %w", path, ErrLocked)
		case <-time.After(5 * time.Millisecond):
		}
	}
	size, err := f.Seek(0, io.SeekEnd) // a block device's size too
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("size of write log %s: %w", path, err)
	}
	return &OSFile{f: f, size: size}, nil
}

// openLocked opens and locks the log at path, if nobody has it.
func openLocked(path string, flags int) (*os.File, error) {
	f, err := openDirect(path, flags)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && flags&unix.O_EXCL == 0 {
		err = stillThere(f, path)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock write log %s: %w", path, err)
	}
	return f, nil
}

// stillThere fails if path does not name the file f any more, which who had it locked
// has removed: it is to be opened anew.
func stillThere(f *os.File, path string) error {
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	if st, err := os.Stat(path); err == nil && os.SameFile(mine, st) {
		return nil
	}
	return errMoved
}

var errMoved = errors.New("the file has been removed or renamed meanwhile")

// Fd returns the descriptor, good until Close.
func (f *OSFile) Fd() int { return int(f.f.Fd()) }

// Name returns the path that the file was opened by.
func (f *OSFile) Name() string { return f.f.Name() }

// ReadAt implements File.
func (f *OSFile) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// WriteAt implements File.
func (f *OSFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

// Sync makes durable what was written (fdatasync: sizes never change).
func (f *OSFile) Sync() error { return unix.Fdatasync(int(f.f.Fd())) }

// Size returns the size in bytes that the file had when it was opened.
func (f *OSFile) Size() int64 { return f.size }

// Close closes the file and lets go of its lock.
func (f *OSFile) Close() error { return f.f.Close() }

// Buffer returns zeroed memory that suits direct I/O.
func (f *OSFile) Buffer(n int) []byte { return uring.AlignedBuffer(n) }
