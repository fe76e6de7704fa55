package wire

import "github.com/google/uuid"

// A CloneRequest makes an image of a snapshot of another one in the same store.
type CloneRequest struct {
	Store, Image string
	Snapshot     string
	Number       uint64 // of the snapshot, if Snapshot is empty
	Name         string
}

// Fields implements Message.
func (m *CloneRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.Name(&m.Snapshot)
	f.U64(&m.Number)
	f.Name(&m.Name)
}

// A CloneResult says which image was made.
type CloneResult struct {
	ID         uuid.UUID
	ObjectSize uint64 // bytes
}

// Fields implements Message.
func (m *CloneResult) Fields(f Fields) {
	f.ID(&m.ID)
	f.U64(&m.ObjectSize)
}

// Flags of a ParentResult.
const (
	ParentRemoved uint32 = 1 << iota // the image is there for its clones only
	ParentUnnamed                    // the snapshot has been removed, or it was none: Snapshot is an id
)

// A ParentResult says of what the handle's image was cloned.
type ParentResult struct {
	ID       uuid.UUID
	Name     string
	Snapshot string
	Number   uint64 // of the snapshot
	Overlap  uint64 // bytes
	Flags    uint32
}

// Fields implements Message.
func (m *ParentResult) Fields(f Fields) {
	f.ID(&m.ID)
	f.Name(&m.Name)
	f.Name(&m.Snapshot)
	f.U64(&m.Number)
	f.U64(&m.Overlap)
	f.U32(&m.Flags)
}

// ChildrenDeep is a flag of a ChildrenRequest: the clones of clones as well.
const ChildrenDeep uint32 = 1

// A ChildrenRequest asks for the clones of what the handle has open, by id.
type ChildrenRequest struct {
	After uuid.UUID // the last one that is known; zero: from the beginning
	Flags uint32
}

// Fields implements Message.
func (m *ChildrenRequest) Fields(f Fields) {
	f.ID(&m.After)
	f.U32(&m.Flags)
}

// ChildRemoved is a flag of a ListedChild: it is there for its own clones only.
const ChildRemoved uint32 = 1

// A ListedChild is one of a ChildrenResult.
type ListedChild struct {
	ListedImage
	Flags uint32
}

// minListedChild is the least that a ListedChild takes, in bytes.
const minListedChild = minListedImage + 4

// Fields implements Message.
func (m *ListedChild) Fields(f Fields) {
	m.ListedImage.Fields(f)
	f.U32(&m.Flags)
}

// A ChildrenResult is a part of the clones.
type ChildrenResult struct {
	More     bool // there are more
	Children []ListedChild

	size int // bytes that Add has added
}

// Fields implements Message.
func (m *ChildrenResult) Fields(f Fields) {
	f.Bool(&m.More)
	elements(f, &m.Children, minListedChild)
}

// Add adds a clone if the result has room for it, and else sets More and reports false.
func (m *ChildrenResult) Add(c ListedChild) bool {
	if !fits(&m.More, &m.size, minListedChild+len(c.Name)) {
		return false
	}
	m.Children = append(m.Children, c)
	return true
}

// Flags of a DiffRequest.
const (
	DiffParent uint32 = 1 << iota // also what the image has of its ancestors
	DiffWhole                     // whole objects
)

// A DiffRequest asks for the ranges in which what the handle has open differs from a snapshot.
type DiffRequest struct {
	From           string // a snapshot
	Number         uint64 // of a snapshot, if From is empty; 0: none, what holds data is asked for
	Offset, Length uint64 // bytes
	Flags          uint32
	Most           uint32 // ranges of the answer; 0: as many as it holds
}

// Fields implements Message.
func (m *DiffRequest) Fields(f Fields) {
	f.Name(&m.From)
	f.U64(&m.Number)
	f.U64(&m.Offset)
	f.U64(&m.Length)
	f.U32(&m.Flags)
	f.U32(&m.Most)
}

// A DiffRange is a range of a DiffResult.
type DiffRange struct {
	Offset, Length uint64 // bytes
	Exists         bool   // there is data; else it reads as zeroes
}

// diffRange is what a DiffRange takes, in bytes.
const diffRange = 8 + 8 + 4

// MaxDiffRanges is how many ranges a DiffResult holds.
const MaxDiffRanges = (MaxPayload - resultHead - 8 - 4) / diffRange

// Fields implements Message.
func (m *DiffRange) Fields(f Fields) {
	f.U64(&m.Offset)
	f.U64(&m.Length)
	f.Bool(&m.Exists)
}

// A DiffResult is a part of the ranges, ascending.
type DiffResult struct {
	Next   uint64 // byte up to which these are all
	Ranges []DiffRange
}

// Fields implements Message.
func (m *DiffResult) Fields(f Fields) {
	f.U64(&m.Next)
	elements(f, &m.Ranges, diffRange)
}

// CopyDeep is a flag of a CopyRequest: with the snapshots.
const CopyDeep uint32 = 1

// A CopyRequest makes an image, in any store, that is what the handle has open. The result is a
// CreateResult.
type CopyRequest struct {
	Store, Image string
	Flags        uint32
}

// Fields implements Message.
func (m *CopyRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.U32(&m.Flags)
}
