package wire

import (
	"fmt"
	"strings"
	"syscall"
	"unicode"

	"github.com/google/uuid"
)

// A HelloRequest is the first on each connection.
type HelloRequest struct {
	Low, High uint32 // versions of the ring that the client speaks
	Program   string
}

// Fields implements Message.
func (m *HelloRequest) Fields(f Fields) {
	f.U32(&m.Low)
	f.U32(&m.High)
	f.Name(&m.Program)
}

// A HelloResult says what the daemon can do.
type HelloResult struct {
	Version uint32 // of the ring
	Entries uint32 // most of a ring
	Data    uint64 // most bytes of data of a ring
	Daemon  string // its version
}

// Fields implements Message.
func (m *HelloResult) Fields(f Fields) {
	f.U32(&m.Version)
	f.U32(&m.Entries)
	f.U64(&m.Data)
	f.Name(&m.Daemon)
}

// Flags of an OpenRequest.
const (
	OpenReadOnly uint32 = 1 << iota
	OpenByID            // Image is an id
	OpenAgain           // after the connection has ended: ID is that of the image
	OpenInstead         // with OpenAgain: Instead is there
	OpenShared          // to write, also beside a block device that is shared
)

// An OpenRequest opens an image, or a snapshot of it.
type OpenRequest struct {
	Store    string // URL
	Image    string
	Snapshot string // empty: the image itself
	Number   uint64 // of a snapshot; 0: none
	Flags    uint32
	Entries  uint32    // of the ring
	Data     uint64    // bytes of the ring's data area
	ID       uuid.UUID // zero without OpenAgain
	Instead  uint64    // number of the handle that the client had: OpenResult.Number
}

// Fields implements Message.
func (m *OpenRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.Name(&m.Snapshot)
	f.U64(&m.Number)
	f.U32(&m.Flags)
	f.U32(&m.Entries)
	f.U64(&m.Data)
	f.ID(&m.ID)
	if m.Flags&OpenInstead != 0 { // clients of older releases do not know it
		f.U64(&m.Instead)
	}
}

// A StatResult is what an image is.
type StatResult struct {
	ID         uuid.UUID
	Name       string
	Size       uint64 // bytes
	Block      uint32 // bytes of a logical block
	ObjectSize uint64 // bytes
}

// Fields implements Message.
func (m *StatResult) Fields(f Fields) {
	f.ID(&m.ID)
	f.Name(&m.Name)
	f.U64(&m.Size)
	f.U32(&m.Block)
	f.U64(&m.ObjectSize)
}

// OpenedReadOnly is a flag of an OpenResult.
const OpenedReadOnly uint32 = 1

// An OpenResult comes with the three descriptors of the ring: see WriteWithFiles.
type OpenResult struct {
	StatResult
	Entries uint32
	Data    uint64 // bytes
	Flags   uint32
	Number  uint64 // of the handle, unlike all others that there are
}

// Fields implements Message.
func (m *OpenResult) Fields(f Fields) {
	m.StatResult.Fields(f)
	f.U32(&m.Entries)
	f.U64(&m.Data)
	f.U32(&m.Flags)
	f.U64(&m.Number)
}

// A CreateRequest makes an image.
type CreateRequest struct {
	Store, Image string
	Size         uint64 // bytes
	ObjectSize   uint64 // bytes; 0: the daemon's choice
}

// Fields implements Message.
func (m *CreateRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.U64(&m.Size)
	f.U64(&m.ObjectSize)
}

// A CreateResult says which image was made.
type CreateResult struct{ ID uuid.UUID }

// Fields implements Message.
func (m *CreateResult) Fields(f Fields) { f.ID(&m.ID) }

// A RemoveRequest removes an image.
type RemoveRequest struct{ Store, Image string }

// Fields implements Message.
func (m *RemoveRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
}

// A ListRequest asks for the images of a store, by name.
type ListRequest struct {
	Store string
	After string // the last name that is known; empty: from the beginning
}

// Fields implements Message.
func (m *ListRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.After)
}

// A ListedImage is one of a ListResult.
type ListedImage struct {
	Name string
	ID   uuid.UUID
}

const (
	minListedImage    = 4 + 16         // bytes
	minListedSnapshot = 8 + 8 + 8 + 4  // bytes
	resultHead        = 8 + 4          // bytes before the fields of a result without an error
	listHead          = resultHead + 8 // bytes before the elements of a part of a list
)

// Fields implements Message.
func (m *ListedImage) Fields(f Fields) {
	f.Name(&m.Name)
	f.ID(&m.ID)
}

// A ListResult is a part of the images of a store.
type ListResult struct {
	More   bool // there are more
	Images []ListedImage

	size int // bytes that Add has added
}

// Fields implements Message.
func (m *ListResult) Fields(f Fields) {
	f.Bool(&m.More)
	elements(f, &m.Images, minListedImage)
}

// Add adds an image if the result has room for it, and else sets More and reports false.
func (m *ListResult) Add(im ListedImage) bool {
	if !fits(&m.More, &m.size, minListedImage+len(im.Name)) {
		return false
	}
	m.Images = append(m.Images, im)
	return true
}

// fits counts an element of n bytes of a part of a list, which has size already, if the part has
// room for it, and else sets more and reports false.
func fits(more *bool, size *int, n int) bool {
	if listHead+*size+n > MaxPayload {
		*more = true
		return false
	}
	*size += n
	return true
}

// elements goes through the elements of a list, each of at least size bytes.
func elements[T any, P interface {
	*T
	Message
}](f Fields, list *[]T, size int) {
	if n := f.Count(len(*list), size); n != len(*list) {
		*list = make([]T, n)
	}
	for i := range *list {
		P(&(*list)[i]).Fields(f)
	}
}

// A RenameRequest gives an image another name.
type RenameRequest struct{ Store, Image, Name string }

// Fields implements Message.
func (m *RenameRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.Name(&m.Name)
}

// A ResizeRequest gives the image another size.
type ResizeRequest struct {
	Size   uint64 // bytes
	Shrink bool   // it may become smaller
}

// Fields implements Message.
func (m *ResizeRequest) Fields(f Fields) {
	f.U64(&m.Size)
	f.Bool(&m.Shrink)
}

// A SizeResult is that of Resize and RollBack: the size of the image in bytes.
type SizeResult struct{ Size uint64 }

// Fields implements Message.
func (m *SizeResult) Fields(f Fields) { f.U64(&m.Size) }

// A SnapshotRequest is that of Snapshot, RemoveSnapshot and RollBack: a snapshot's name.
type SnapshotRequest struct{ Name string }

// Fields implements Message.
func (m *SnapshotRequest) Fields(f Fields) { f.Name(&m.Name) }

// A RenameSnapshotRequest gives a snapshot another name.
type RenameSnapshotRequest struct{ Snapshot, Name string }

// Fields implements Message.
func (m *RenameSnapshotRequest) Fields(f Fields) {
	f.Name(&m.Snapshot)
	f.Name(&m.Name)
}

// A ListedSnapshot is one of a SnapshotList.
type ListedSnapshot struct {
	Number uint64 // see SnapshotNumber
	Size   uint64 // bytes
	Made   int64  // nanoseconds since 1970
	Name   string
}

// Fields implements Message.
func (m *ListedSnapshot) Fields(f Fields) {
	f.U64(&m.Number)
	f.U64(&m.Size)
	f.I64(&m.Made)
	f.Name(&m.Name)
}

// A SnapshotList is the result of ListSnapshots.
type SnapshotList struct{ Snapshots []ListedSnapshot }

// Fields implements Message.
func (m *SnapshotList) Fields(f Fields) { elements(f, &m.Snapshots, minListedSnapshot) }

// SnapshotNumber returns the number of the snapshot whose id is given.
func SnapshotNumber(id uuid.UUID) uint64 {
	var n uint64
	for _, b := range id[:8] {
		n = n<<8 | uint64(b)
	}
	return n &^ (1 << 63)
}

// A Progress says how much of a request is done. What it counts the request says.
type Progress struct{ Done, Total uint64 }

// Fields implements Message.
func (m *Progress) Fields(f Fields) {
	f.U64(&m.Done)
	f.U64(&m.Total)
}

// An Error is a result that is one.
type Error struct {
	Errno syscall.Errno
	Text  string // what a person should know, in one line
}

// Error returns the text, or what the errno means.
func (e *Error) Error() string {
	if e.Text == "" {
		return e.Errno.Error()
	}
	return e.Text
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

// status is the beginning of each result.
type status struct {
	res  int64
	text string
}

// Fields implements Message.
func (m *status) Fields(f Fields) {
	f.I64(&m.res)
	f.Name(&m.text)
}

// AppendResult appends the payload of a result without an error. m is nil where it has
// no fields.
func AppendResult(b []byte, m Message) ([]byte, error) {
	if m == nil {
		return Append(b, &status{})
	}
	return Append(b, &status{}, m)
}

// AppendError appends the payload of a result that is an error; errno must not be 0. The
// text is made one line of UTF-8, and cut off if it is long.
func AppendError(b []byte, errno syscall.Errno, text string) []byte {
	text = oneLine(text)
	b, err := Append(b, &status{res: -int64(errno), text: text})
	if err != nil {
		panic(err) // oneLine has seen to it
	}
	return b
}

// oneLine returns text without what is no UTF-8 or would end the line, of at most
// MaxName bytes.
func oneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	if len(text) > MaxName {
		text = strings.ToValidUTF8(text[:MaxName], "")
	}
	return text
}

// ParseResult sets m, which may be nil, to what is in the payload of a result, or
// returns the result's *Error.
func ParseResult(payload []byte, m Message) error {
	d := NewDecoder(payload)
	var s status
	s.Fields(d)
	switch {
	case d.Err() != nil:
		return d.Err()
	case s.res > 0 || s.res < -4095: // MAX_ERRNO, include/linux/err.h
		return fmt.Errorf("%w: the result is %d", ErrPayload, s.res)
	case s.res < 0:
		return &Error{Errno: syscall.Errno(-s.res), Text: s.text}
	}
	if m != nil {
		m.Fields(d)
	}
	return d.Err()
}
