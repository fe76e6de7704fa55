// Package rawfile reads the contents of a disk from a file, a block device or a stream, and
// passes over holes.
package rawfile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// align is what offsets of data are multiples of, in bytes, but for the end of the last.
const align = 4096

// A Source is what is read, once from its beginning to its end. It is for one goroutine.
type Source struct {
	f      *os.File
	name   string // for messages
	stream bool
	size   uint64 // bytes; of a stream, those that have been read
	pos    uint64 // what is before has been read
	end    uint64 // up to which there is data from pos on, as is known; not of a stream
}

// Open opens a file, a block device or a named pipe; it is to be closed.
func Open(path string) (*Source, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	s, err := New(f, path)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// New makes a source of f, which it takes over, with a name for messages.
func New(f *os.File, name string) (*Source, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	s := &Source{f: f, name: name}
	switch mode := info.Mode(); {
	case mode.IsDir():
		return nil, fmt.Errorf("%s is a directory", name)
	case mode.IsRegular():
		at, err := f.Seek(0, io.SeekCurrent)
		s.size, s.stream = uint64(info.Size()), err != nil || at != 0 // somebody has read of it before
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		n, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return nil, fmt.Errorf("find the size of %s: %w", name, err)
		}
		s.size = uint64(n)
	default:
		s.stream = true
	}
	if s.stream {
		s.size = 0
	}
	return s, nil
}

// Close closes the file.
func (s *Source) Close() error { return s.f.Close() }

// Size returns the size in bytes, and false for a stream: of that it is what has been read.
func (s *Source) Size() (uint64, bool) { return s.size, !s.stream }

// Begins reports whether a file or device, of which nothing has been read, begins with magic.
// A stream does not.
func (s *Source) Begins(magic string) bool {
	b := make([]byte, len(magic))
	if s.stream {
		return false
	}
	n, _ := s.f.ReadAt(b, 0)
	return string(b[:n]) == magic
}

// Next reads into p the next data, which is at the byte off, and returns how much that is.
// Before it there are zeroes from where the last one ended. It returns io.EOF after the last.
// If ctx ends before a stream has given some, p is not the caller's any more.
func (s *Source) Next(ctx context.Context, p []byte) (off uint64, n int, err error) {
	if ctx.Err() != nil {
		return 0, 0, context.Cause(ctx)
	}
	if s.stream {
		return s.nextOfStream(ctx, p)
	}
	if s.pos == s.end {
		if err := s.findData(); err != nil {
			return 0, 0, err
		}
	}
	if s.pos == s.size {
		return 0, 0, io.EOF
	}
	p = p[:min(uint64(len(p)), s.end-s.pos)]
	off = s.pos
	n, err = s.f.ReadAt(p, int64(off))
	s.pos += uint64(n)
	switch {
	case n == len(p):
		return off, n, nil
	case err == io.EOF:
		return 0, 0, s.shrunk(off + uint64(n))
	}
	return 0, 0, err
}

func (s *Source) shrunk(now uint64) error {
	return fmt.Errorf("%s has become smaller while it was read: it had %d bytes, and has %d", s.name, s.size, now)
}

// findData moves pos to where the next data is, or to the end, and end to where that ends.
func (s *Source) findData() error {
	fd := int(s.f.Fd())
	at, err := unix.Seek(fd, int64(s.pos), unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		// A hole to the end: if that is where it was.
		now, err := s.f.Seek(0, io.SeekEnd)
		if err == nil && uint64(now) < s.size {
			err = s.shrunk(uint64(now))
		}
		s.pos, s.end = s.size, s.size
		return err
	case err != nil: // what it is on knows no holes
		s.end = s.size
		return nil
	}
	s.pos = max(s.pos, min(uint64(at), s.size)/align*align)
	hole, err := unix.Seek(fd, int64(s.pos), unix.SEEK_HOLE)
	if err != nil {
		hole = int64(s.size)
	}
	s.end = min((uint64(hole)+align-1)/align*align, s.size)
	if s.end <= s.pos { // it has changed meanwhile
		s.end = s.size
	}
	return nil
}

// nextOfStream is Next for a stream, of which a read may take any time.
func (s *Source) nextOfStream(ctx context.Context, p []byte) (off uint64, n int, err error) {
	type result struct {
		n   int
		err error
	}
	read := make(chan result, 1)
	go func() {
		n, err := io.ReadFull(s.f, p)
		read <- result{n, err}
	}()
	select {
	case r := <-read:
		off = s.pos
		s.pos += uint64(r.n)
		s.size = s.pos
		if r.err == io.ErrUnexpectedEOF {
			r.err = nil
		}
		return off, r.n, r.err
	case <-ctx.Done():
		return 0, 0, context.Cause(ctx)
	}
}
