// Package rbddiff reads and writes what has changed between two states of a disk, in the
// format of Ceph's rbd export-diff, version 1. docs/formats.md describes it.
package rbddiff

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	magic      = "rbd diff v1\n"
	maxName    = 4096     // bytes in the name of a snapshot
	bufferSize = 64 << 10 // bytes read or written at a time, at least
)

// The tags that records begin with.
const (
	tagFrom = 'f'
	tagTo   = 't'
	tagSize = 's'
	tagData = 'w'
	tagZero = 'z'
	tagEnd  = 'e'
)

// ErrFormat is matched by errors that say that a file is not in the format, or damaged.
var ErrFormat = errors.New("not a whole file of export-diff")

// Header is what a file says before its records.
type Header struct {
	From string // the snapshot that it is to be applied to; "": what reads as zeroes
	To   string // the snapshot that it leads to; "": none
	Size uint64 // bytes of the disk then; no record goes beyond it
}

// Writer writes a file. It is for one goroutine.
type Writer struct {
	w      *bufio.Writer
	size   uint64 // bytes
	closed bool
}

// NewWriter begins a file. What is written may be in memory until Close.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	b := []byte(magic)
	for _, s := range []struct {
		tag  byte
		name string
	}{{tagFrom, h.From}, {tagTo, h.To}} {
		if len(s.name) > maxName {
			return nil, fmt.Errorf("the name of a snapshot has %d bytes, it can have %d", len(s.name), maxName)
		}
		if s.name != "" {
			b = binary.LittleEndian.AppendUint32(append(b, s.tag), uint32(len(s.name)))
			b = append(b, s.name...)
		}
	}
	b = binary.LittleEndian.AppendUint64(append(b, tagSize), h.Size)
	wr := &Writer{w: bufio.NewWriterSize(w, bufferSize), size: h.Size}
	_, err := wr.w.Write(b)
	return wr, err
}

// Data writes a record that says that p is at the offset. Of no bytes there is none.
func (w *Writer) Data(off uint64, p []byte) error {
	if err := w.record(tagData, off, uint64(len(p))); err != nil {
		return err
	}
	_, err := w.w.Write(p)
	return err
}

// Zero writes a record that says that n bytes from the offset on are zeroes. Of no bytes
// there is none.
func (w *Writer) Zero(off, n uint64) error { return w.record(tagZero, off, n) }

func (w *Writer) record(tag byte, off, n uint64) error {
	switch {
	case w.closed:
		return errors.New("rbddiff: a record after the end")
	case off > w.size || n > w.size-off:
		return fmt.Errorf("rbddiff: %d bytes at %d are beyond the size of %d bytes", n, off, w.size)
	case n == 0:
		return nil
	}
	b := binary.LittleEndian.AppendUint64([]byte{tag}, off)
	_, err := w.w.Write(binary.LittleEndian.AppendUint64(b, n))
	return err
}

// Close ends the file, and writes all that is in memory. It does not close what is written
// to. A file without its end is not taken by readers, so after an error do not call it.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	if err := w.w.WriteByte(tagEnd); err != nil {
		return err
	}
	return w.w.Flush()
}

// Record says what is in a range of the disk. It is within the size that the header gives.
// Records come in any order; rbd writes them in ascending order, and so does lsdctl.
type Record struct {
	Offset, Length uint64 // bytes; Length is not 0
	Zero           bool   // zeroes; else Reader.Read gives the data
}

// Reader reads a file. Nothing in it is trusted. It is for one goroutine.
type Reader struct {
	r    *bufio.Reader
	h    Header
	tag  byte   // the next record's, 0 if it has not been read
	left uint64 // bytes of the current record's data that have not been read
	at   uint64 // their offset
	err  error  // why there is no more
}

// NewReader reads what a file says before its records. It reads ahead of what it needs.
func NewReader(r io.Reader) (*Reader, error) {
	rd := &Reader{r: bufio.NewReaderSize(r, bufferSize)}
	b := make([]byte, len(magic))
	if err := rd.full(b, "its first line"); err != nil {
		return nil, err
	}
	if string(b) != magic {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrFormat, magic[:len(magic)-1])
	}
	if err := rd.readHeader(); err != nil {
		return nil, err
	}
	return rd, nil
}

// readHeader reads up to the tag of the first record.
func (r *Reader) readHeader() error {
	seen := map[byte]bool{}
	for {
		tag, err := r.readTag()
		if err != nil {
			return err
		}
		if seen[tag] {
			return fmt.Errorf("%w: it has two records %q before its data", ErrFormat, tag)
		}
		seen[tag] = true
		switch tag {
		case tagFrom:
			r.h.From, err = r.name("the name of the snapshot that it begins with")
		case tagTo:
			r.h.To, err = r.name("the name of the snapshot that it leads to")
		case tagSize:
			r.h.Size, err = r.uint64("the size of the disk")
		default:
			if r.tag = tag; !seen[tagSize] {
				err = fmt.Errorf("%w: it does not say the size of the disk before its data", ErrFormat)
			}
			return err
		}
		if err != nil {
			return err
		}
	}
}

// Header returns what the file says before its records.
func (r *Reader) Header() Header { return r.h }

// Next goes on to the next record, past what has not been read of the one before. It returns
// io.EOF, not wrapped, after the last; an error that matches io.ErrUnexpectedEOF if the
// file ends before that, and one that matches ErrFormat if it is damaged.
func (r *Reader) Next() (Record, error) {
	if r.err != nil {
		return Record{}, r.err
	}
	rec, err := r.next()
	r.err = err
	return rec, err
}

func (r *Reader) next() (Record, error) {
	for {
		if err := r.skip(); err != nil {
			return Record{}, err
		}
		tag := r.tag
		if r.tag = 0; tag == 0 {
			var err error
			if tag, err = r.readTag(); err != nil {
				return Record{}, err
			}
		}
		switch tag {
		case tagEnd:
			return Record{}, io.EOF
		case tagData, tagZero:
		default:
			return Record{}, fmt.Errorf("%w: it has a record %q among its data", ErrFormat, tag)
		}
		rec, err := r.place()
		if err != nil {
			return Record{}, err
		}
		if rec.Zero = tag == tagZero; !rec.Zero {
			r.at, r.left = rec.Offset, rec.Length
		}
		if rec.Length > 0 {
			return rec, nil
		}
	}
}

// place reads where a record is, and checks it.
func (r *Reader) place() (rec Record, err error) {
	if rec.Offset, err = r.uint64("a record's offset"); err != nil {
		return Record{}, err
	}
	if rec.Length, err = r.uint64("a record's length"); err != nil {
		return Record{}, err
	}
	if rec.Offset > r.h.Size || rec.Length > r.h.Size-rec.Offset {
		return Record{}, fmt.Errorf("%w: a record of %d bytes at %d is beyond the size of %d bytes", ErrFormat, rec.Length, rec.Offset, r.h.Size)
	}
	return rec, nil
}

// Read reads data of the record that Next has returned. It returns io.EOF after all of it,
// and where there is none; an error that matches io.ErrUnexpectedEOF if the file ends
// before that.
func (r *Reader) Read(p []byte) (int, error) {
	switch {
	case r.left == 0:
		return 0, io.EOF
	case r.err != nil:
		return 0, r.err
	}
	if uint64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.r.Read(p)
	r.at, r.left = r.at+uint64(n), r.left-uint64(n)
	if err == io.EOF || err == nil && n == 0 && len(p) > 0 {
		err = r.cut()
	}
	r.err = err
	return n, err
}

// skip reads past what is left of the current record's data.
func (r *Reader) skip() error {
	for r.left > 0 {
		n, err := r.r.Discard(int(min(r.left, 1<<30)))
		r.at, r.left = r.at+uint64(n), r.left-uint64(n)
		if err == io.EOF {
			err = r.cut()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// cut returns the error for a file that ends in a record's data.
func (r *Reader) cut() error {
	return fmt.Errorf("%w: it ends before the data at %d: %w", ErrFormat, r.at, io.ErrUnexpectedEOF)
}

func (r *Reader) readTag() (byte, error) {
	var b [1]byte
	err := r.full(b[:], "its end")
	return b[0], err
}

func (r *Reader) uint64(what string) (uint64, error) {
	var b [8]byte
	err := r.full(b[:], what)
	return binary.LittleEndian.Uint64(b[:]), err
}

// name reads a name with its length.
func (r *Reader) name(what string) (string, error) {
	var b [4]byte
	if err := r.full(b[:], what); err != nil {
		return "", err
	}
	n := binary.LittleEndian.Uint32(b[:])
	if n == 0 || n > maxName {
		return "", fmt.Errorf("%w: %s has %d bytes", ErrFormat, what, n)
	}
	name := make([]byte, n)
	err := r.full(name, what)
	return string(name), err
}

// full reads all of b, which is said to be what.
func (r *Reader) full(b []byte, what string) error {
	switch _, err := io.ReadFull(r.r, b); {
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return fmt.Errorf("%w: it ends before %s: %w", ErrFormat, what, io.ErrUnexpectedEOF)
	default:
		return err
	}
}
