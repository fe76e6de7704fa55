package wire

import "github.com/google/uuid"

// A TrashMoveRequest moves an image to the trash.
type TrashMoveRequest struct {
	Store, Image string
	Keep         uint64 // for how many seconds it is not removed without force
}

// Fields implements Message.
func (m *TrashMoveRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.U64(&m.Keep)
}

// A TrashListRequest asks for the images in the trash, by id.
type TrashListRequest struct {
	Store string
	After uuid.UUID // the last one that is known; zero: from the beginning
}

// Fields implements Message.
func (m *TrashListRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.ID(&m.After)
}

// A TrashedImage is one of a TrashList.
type TrashedImage struct {
	ID    uuid.UUID
	Name  string // that it had
	Moved int64  // seconds since 1970
	Until int64  // it is not removed before without force; seconds since 1970
}

// minTrashedImage is the least that a TrashedImage takes, in bytes.
const minTrashedImage = 16 + 4 + 8 + 8

// Fields implements Message.
func (m *TrashedImage) Fields(f Fields) {
	f.ID(&m.ID)
	f.Name(&m.Name)
	f.I64(&m.Moved)
	f.I64(&m.Until)
}

// A TrashList is a part of the images in the trash.
type TrashList struct {
	More   bool // there are more
	Images []TrashedImage

	size int // bytes that Add has added
}

// Fields implements Message.
func (m *TrashList) Fields(f Fields) {
	f.Bool(&m.More)
	elements(f, &m.Images, minTrashedImage)
}

// Add adds an image if the list has room for it, and else sets More and reports false.
func (m *TrashList) Add(im TrashedImage) bool {
	if !fits(&m.More, &m.size, minTrashedImage+len(im.Name)) {
		return false
	}
	m.Images = append(m.Images, im)
	return true
}

// A TrashRemoveRequest removes an image from the trash.
type TrashRemoveRequest struct {
	Store string
	Image string // its id, in its usual form
	Force bool   // also one that is to be kept still
}

// Fields implements Message.
func (m *TrashRemoveRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.Bool(&m.Force)
}

// A TrashRestoreRequest brings an image back from the trash.
type TrashRestoreRequest struct {
	Store string
	Image string // its id, in its usual form
	Name  string // empty: the one that it had
}

// Fields implements Message.
func (m *TrashRestoreRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.Name(&m.Image)
	f.Name(&m.Name)
}

// A TrashPurgeRequest removes what need not be kept any more from the trash.
type TrashPurgeRequest struct {
	Store string
	At    int64 // what is to be kept until then or less; seconds since 1970; 0: now
}

// Fields implements Message.
func (m *TrashPurgeRequest) Fields(f Fields) {
	f.Name(&m.Store)
	f.I64(&m.At)
}
