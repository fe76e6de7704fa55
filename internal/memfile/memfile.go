// Package memfile is a file in memory, which takes memory only where it has been written to: to
// make one that is large, and to go through it, costs next to nothing.
package memfile

import (
	"errors"
	"io"
)

// chunk is what a file takes memory in, in bytes.
const chunk = 1 << 20

var errPlace = errors.New("outside of the file")

// A File has a fixed size, and is zeroes where nothing has been written. Who writes to a part
// of it does so before others know of that part, and only one writes at a time: so there is no
// lock.
type File struct {
	size   int64
	chunks [][]byte // nil: zeroes
}

// New returns a file of size bytes.
func New(size int64) *File {
	return &File{size: size, chunks: make([][]byte, (size+chunk-1)/chunk)}
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errPlace
	}
	if off >= f.size {
		return 0, io.EOF
	}
	var err error
	if n := f.size - off; n < int64(len(p)) {
		p, err = p[:n], io.EOF
	}
	done := 0
	for done < len(p) {
		c, at := f.chunks[off/chunk], off%chunk
		n := int(min(int64(len(p)-done), chunk-at))
		if c == nil {
			clear(p[done:][:n])
		} else {
			copy(p[done:][:n], c[at:])
		}
		done, off = done+n, off+int64(n)
	}
	return done, err
}

// WriteAt implements io.WriterAt.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errPlace
	}
	var err error
	if n := max(f.size-off, 0); n < int64(len(p)) {
		p, err = p[:n], io.ErrShortWrite
	}
	done := 0
	for done < len(p) {
		i, at := off/chunk, off%chunk
		if f.chunks[i] == nil {
			f.chunks[i] = make([]byte, chunk)
		}
		n := copy(f.chunks[i][at:], p[done:])
		done, off = done+n, off+int64(n)
	}
	return done, err
}

// Size returns the size in bytes.
func (f *File) Size() int64 { return f.size }

// Sync does nothing: nothing outlives the process.
func (f *File) Sync() error { return nil }

// Close does nothing.
func (f *File) Close() error { return nil }

// Buffer returns n bytes of zeroes.
func (f *File) Buffer(n int) []byte { return make([]byte, n) }
