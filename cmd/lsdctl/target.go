package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lsd-ceph/lsd/internal/durable"
	"golang.org/x/sys/unix"
)

// A target is what something is exported to: a file, which is there once it is whole; a
// block device; or standard output.
type target struct {
	name   string    // as it was given
	path   string    // of a file or device, past symbolic links
	stream io.Writer // standard output, else nil
	device bool
	mode   fs.FileMode // of the file that is replaced; 0: there is none
	fresh  bool        // nothing has that path, so nothing is to be replaced
	f      *os.File
	parts  []string // files that are not whole, to be removed
}

// stdout is the FILE that means standard output.
const stdout = "-"

// newTarget looks at FILE, of which nothing is changed before it is opened. With force a file
// that is there is replaced, and a device overwritten.
func (a *app) newTarget(name string, force bool) (*target, error) {
	t := &target{name: name}
	if name == stdout {
		if f, ok := a.out.(*os.File); ok && terminal(f) {
			return nil, errors.New("what is exported is not for a terminal: name a file, or redirect the output")
		}
		t.stream = a.out
		return t, nil
	}
	path, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	if past, err := filepath.EvalSymlinks(path); err == nil {
		path = past
	}
	t.path = path
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		dir, err := os.Stat(filepath.Dir(path))
		if err == nil && !dir.IsDir() {
			err = &fs.PathError{Op: "open", Path: filepath.Dir(path), Err: unix.ENOTDIR}
		}
		_, link := os.Lstat(path) // one that leads nowhere is replaced
		t.fresh = !force && link != nil
		return t, err
	case err != nil:
		return nil, err
	case st.Mode().IsRegular() && !force:
		return nil, fmt.Errorf("%s exists already: --force replaces it", name)
	case st.Mode().IsRegular():
		t.mode = st.Mode().Perm()
	case st.Mode().Type() != fs.ModeDevice:
		return nil, fmt.Errorf("%s is neither a file nor a block device: for a pipe, write - and redirect the output", name)
	case !force:
		return nil, fmt.Errorf("%s is a block device: --force overwrites what is on it", name)
	default:
		t.device = true
	}
	return t, nil
}

func terminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// open opens what is written to, unless it is standard output.
func (t *target) open() (err error) {
	switch {
	case t.stream != nil:
	case t.device:
		t.f, err = os.OpenFile(t.path, os.O_WRONLY|unix.O_EXCL, 0)
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%s is in use: unmount or detach it first", t.name)
		}
	default:
		t.f, err = t.newPart()
	}
	return err
}

// newPart makes a file beside the target's, which is removed if it does not become that.
func (t *target) newPart() (*os.File, error) {
	path := filepath.Join(filepath.Dir(t.path), ".lsdctl-"+rand.Text()+".part")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, t.failed(err)
	}
	t.parts = append(t.parts, path)
	if t.mode != 0 {
		err = f.Chmod(t.mode)
	}
	if err != nil {
		f.Close()
		return nil, t.failed(err)
	}
	return f, nil
}

// finish makes what was written last, f, the target: it is there after a power cut as well.
func (t *target) finish() error {
	if t.stream != nil {
		return nil
	}
	err := t.f.Sync()
	if e := t.f.Close(); err == nil {
		err = e
	}
	if err == nil && !t.device {
		last := len(t.parts) - 1
		if err = t.rename(t.parts[last]); err == nil {
			t.parts = t.parts[:last]
			err = durable.SyncDir(filepath.Dir(t.path))
		}
	}
	return t.failed(err)
}

// rename gives a part the target's name. What somebody else has made of that name meanwhile,
// for which an export leaves time, is left alone.
func (t *target) rename(part string) error {
	if t.fresh {
		err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, t.path, unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
			return err
		} // else this file system cannot do that
	}
	return os.Rename(part, t.path)
}

// drop removes what has not become the target.
func (t *target) drop() {
	if t.f != nil {
		t.f.Close()
	}
	for _, path := range t.parts {
		os.Remove(path)
	}
	t.parts = nil
}

// failed is the error of a target that could not be written.
func (t *target) failed(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &path):
		err = path.Err
	case errors.As(err, &link):
		err = link.Err
	}
	switch {
	case t.stream != nil:
		return fmt.Errorf("write: %w", err)
	case t.device:
		return fmt.Errorf("write %s: %w: what is on it is of no use", t.name, err)
	}
	return fmt.Errorf("write %s: %w: nothing of it is kept", t.name, err)
}

// Write writes what follows.
func (t *target) Write(p []byte) (n int, err error) {
	if t.stream != nil {
		n, err = t.stream.Write(p)
	} else {
		n, err = t.f.Write(p)
	}
	return n, t.failed(err)
}

// zeroes are written where there is nothing.
var zeroes [1 << 20]byte

// begin prepares for a disk of that many bytes, which is going to be written in ascending order.
func (t *target) begin(size uint64) error {
	switch {
	case t.stream != nil:
		return nil
	case !t.device:
		return t.failed(t.f.Truncate(int64(size)))
	}
	room, err := t.f.Seek(0, io.SeekEnd)
	if err == nil && uint64(room) < size {
		return fmt.Errorf("%s has %d bytes, and the image %d: it is too small", t.name, room, size)
	}
	return t.failed(err)
}

// data writes p at an offset, which is where a stream has come to.
func (t *target) data(off uint64, p []byte) error {
	if t.stream != nil {
		_, err := t.Write(p)
		return err
	}
	_, err := t.f.WriteAt(p, int64(off))
	return t.failed(err)
}

// zero makes n bytes from an offset on zeroes. In a new file they are, and take no space.
func (t *target) zero(off, n uint64) error {
	if t.stream == nil && !t.device {
		return nil
	}
	if t.device && n > 0 && unix.Fallocate(int(t.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)) == nil {
		return nil // it does that by itself
	}
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if err := t.data(off, zeroes[:k]); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}
