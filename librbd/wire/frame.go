// Package wire is the language of the socket between the C library and the daemon
// (docs/format-librbd.md, "The socket"): frames, and what is in them. It knows the bytes
// and not what they ask for.
//
// What comes from the other side is checked before it is used as a length, and takes no
// more memory than its own bytes are worth.
package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
)

// Limits and the version of frames.
const (
	Version    = 1
	HeaderSize = 24      // bytes
	MaxPayload = 1 << 20 // bytes
	MaxName    = 4096    // bytes
)

const magic = "LRBD"

// A Type says what a frame is: a request, or an answer to one.
type Type uint16

// The types of requests.
const (
	Hello          Type = 1
	Open           Type = 2
	Close          Type = 3
	Create         Type = 4
	Remove         Type = 5
	List           Type = 6
	Rename         Type = 7
	TrashMove      Type = 10
	ListTrash      Type = 11
	TrashRemove    Type = 12
	TrashRestore   Type = 13
	TrashPurge     Type = 14
	Clone          Type = 8
	Stat           Type = 16
	Resize         Type = 17
	Snapshot       Type = 18
	RemoveSnapshot Type = 19
	ListSnapshots  Type = 20
	RollBack       Type = 21
	RenameSnapshot Type = 22
	Parent         Type = 23
	Children       Type = 24
	Flatten        Type = 25
	Diff           Type = 26
	Copy           Type = 27
	ListMetadata   Type = 28
	GetMetadata    Type = 29
	SetMetadata    Type = 30
	RemoveMetadata Type = 31
	Locks          Type = 32
	Lock           Type = 33
	Unlock         Type = 34
	BreakLock      Type = 35
	Times          Type = 36
	Watchers       Type = 37
	Features       Type = 40
	SwitchFeatures Type = 41
)

const (
	progress Type = 0x4000
	result   Type = 0x8000
)

// Progress returns the type of the frames that say how far the request t is.
func (t Type) Progress() Type { return t | progress }

// Result returns the type of the answer to the request t.
func (t Type) Result() Type { return t | result }

// String returns the name of the request, and what it is an answer to.
func (t Type) String() string {
	names := map[Type]string{
		Hello: "hello", Open: "open", Close: "close", Create: "create", Remove: "remove", List: "list", Rename: "rename",
		TrashMove: "move to the trash", ListTrash: "list the trash", TrashRemove: "remove from the trash",
		TrashRestore: "restore from the trash", TrashPurge: "purge the trash",
		Stat: "stat", Resize: "resize", Snapshot: "snapshot", RemoveSnapshot: "remove a snapshot",
		ListSnapshots: "list the snapshots", RollBack: "roll back", RenameSnapshot: "rename a snapshot",
		Clone: "clone", Parent: "parent", Children: "children", Flatten: "flatten", Diff: "diff", Copy: "copy",
		ListMetadata: "list the metadata", GetMetadata: "get metadata", SetMetadata: "set metadata", RemoveMetadata: "remove metadata",
		Locks: "locks", Lock: "lock", Unlock: "unlock", BreakLock: "break a lock", Times: "times", Watchers: "watchers",
		Features: "features", SwitchFeatures: "switch features",
	}
	request := t &^ (progress | result)
	name, ok := names[request]
	if !ok {
		name = "type " + strconv.Itoa(int(request))
	}
	switch t - request {
	case progress:
		return "progress of " + name
	case result:
		return "result of " + name
	case progress | result:
		return "type " + strconv.Itoa(int(t))
	}
	return name
}

// Errors of Reader.Read match one of these, where it is not the connection that failed.
var (
	// ErrFrame is of what is no frame, or a damaged one.
	ErrFrame = errors.New("no frame of lsd")
	// ErrVersion is of a frame of another version.
	ErrVersion = errors.New("frame of another version of lsd")
	// ErrTooLong is of what does not fit into a frame.
	ErrTooLong = errors.New("too long")
)

// A Frame is one message.
type Frame struct {
	Type    Type
	Number  uint64 // of the request, which its answers carry too
	Payload []byte
}

// Append appends the frame's bytes to b. It fails with ErrTooLong when there are more
// than MaxPayload in it.
func (f Frame) Append(b []byte) ([]byte, error) {
	if len(f.Payload) > MaxPayload {
		return b, fmt.Errorf("%v of %d bytes, of at most %d: %w", f.Type, len(f.Payload), MaxPayload, ErrTooLong)
	}
	le, at := binary.LittleEndian, len(b)
	b = append(b, magic...)
	b = le.AppendUint16(b, Version)
	b = le.AppendUint16(b, uint16(f.Type))
	b = le.AppendUint32(b, uint32(len(f.Payload)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, f.Number)
	b = append(b, f.Payload...)
	le.PutUint32(b[at+12:], checksum(b[at:at+HeaderSize], f.Payload))
	return b, nil
}

// checksum is that of header and payload, with the checksum's own field taken as zero.
func checksum(header, payload []byte) uint32 {
	t := crc32.MakeTable(crc32.Castagnoli)
	c := crc32.Update(0, t, header[:12])
	c = crc32.Update(c, t, make([]byte, 4))
	c = crc32.Update(c, t, header[16:])
	return crc32.Update(c, t, payload)
}

// parseHeader checks the header h and returns the frame without its payload, and how
// long that is.
func parseHeader(h []byte) (Frame, int, error) {
	le := binary.LittleEndian
	if string(h[:4]) != magic {
		return Frame{}, 0, fmt.Errorf("%w: it begins with % x", ErrFrame, h[:4])
	}
	if v := le.Uint16(h[4:]); v != Version {
		return Frame{}, 0, fmt.Errorf("%w: version %d, and this one reads version %d", ErrVersion, v, Version)
	}
	f := Frame{Type: Type(le.Uint16(h[6:])), Number: le.Uint64(h[16:])}
	n := le.Uint32(h[8:])
	if n > MaxPayload {
		return Frame{}, 0, fmt.Errorf("%w: %v of %d bytes, of at most %d", ErrFrame, f.Type, n, MaxPayload)
	}
	return f, int(n), nil
}

// check compares the checksum in the header h with that of the frame.
func check(h []byte, f Frame) error {
	if sum := binary.LittleEndian.Uint32(h[12:]); sum != checksum(h, f.Payload) {
		return fmt.Errorf("%w: the checksum of %v is wrong", ErrFrame, f.Type)
	}
	return nil
}

// A Reader reads frames from a connection. One goroutine uses it.
type Reader struct {
	r      *bufio.Reader
	header [HeaderSize]byte
	buf    bytes.Buffer
}

// NewReader returns a Reader from r. Descriptors that come with what it reads are let go
// of by the kernel, if r is a unix socket.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReader(r)} }

// Read returns the next frame. Its payload is valid until the next Read. The error is
// io.EOF where the connection ended between two frames, and io.ErrUnexpectedEOF in one.
// No frame can be read after an error.
func (r *Reader) Read() (Frame, error) {
	if _, err := io.ReadFull(r.r, r.header[:]); err != nil {
		if err == io.EOF {
			return Frame{}, err
		}
		return Frame{}, fmt.Errorf("read a frame's header: %w", err)
	}
	f, n, err := parseHeader(r.header[:])
	if err != nil {
		return Frame{}, err
	}
	// The buffer grows with what comes, not with what was announced.
	r.buf.Reset()
	if _, err := io.CopyN(&r.buf, r.r, int64(n)); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, fmt.Errorf("read %v of %d bytes: %w", f.Type, n, err)
	}
	f.Payload = r.buf.Bytes()
	return f, check(r.header[:], f)
}

// A Writer writes frames to a connection. One goroutine uses it.
type Writer struct {
	w   io.Writer
	buf []byte
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write writes a frame, with one call of the connection's Write.
func (w *Writer) Write(f Frame) error {
	var err error
	if w.buf, err = f.Append(w.buf[:0]); err != nil {
		return err
	}
	if _, err := w.w.Write(w.buf); err != nil {
		return fmt.Errorf("write %v: %w", f.Type, err)
	}
	return nil
}
