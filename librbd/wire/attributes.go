package wire

// MaxValue is the most bytes of a value of metadata in a frame. The daemon keeps no longer ones
// than it says.
const MaxValue = 512 << 10

// A MetadataRequest is that of GetMetadata and RemoveMetadata.
type MetadataRequest struct{ Key string }

// Fields implements Message.
func (m *MetadataRequest) Fields(f Fields) { f.Name(&m.Key) }

// A Metadatum is the request of SetMetadata, and one of a MetadataList.
type Metadatum struct{ Key, Value string }

// Fields implements Message.
func (m *Metadatum) Fields(f Fields) {
	f.Name(&m.Key)
	f.Text(&m.Value, MaxValue)
}

// A MetadataResult is that of GetMetadata.
type MetadataResult struct{ Value string }

// Fields implements Message.
func (m *MetadataResult) Fields(f Fields) { f.Text(&m.Value, MaxValue) }

// A ListMetadataRequest asks for the metadata of an image, by key.
type ListMetadataRequest struct {
	After string // the last key that is known; empty: from the beginning
	Most  uint32 // of how many there is need; 0: all
}

// Fields implements Message.
func (m *ListMetadataRequest) Fields(f Fields) {
	f.Name(&m.After)
	f.U32(&m.Most)
}

const (
	minMetadatum = 4 + 4         // bytes
	minLocker    = 4 + 4 + 4 + 8 // bytes
	minWatcher   = 4 + 8 + 8     // bytes
)

// A MetadataList is a part of the metadata of an image.
type MetadataList struct {
	More     bool // there is more
	Metadata []Metadatum

	size int // bytes that Add has added
}

// Fields implements Message.
func (m *MetadataList) Fields(f Fields) {
	f.Bool(&m.More)
	elements(f, &m.Metadata, minMetadatum)
}

// Add adds metadata if the list has room for it, and else sets More and reports false.
func (m *MetadataList) Add(d Metadatum) bool {
	if !fits(&m.More, &m.size, minMetadatum+len(d.Key)+len(d.Value)) {
		return false
	}
	m.Metadata = append(m.Metadata, d)
	return true
}

// A LockRequest takes an advisory lock.
type LockRequest struct {
	Exclusive   bool
	Cookie, Tag string
}

// Fields implements Message.
func (m *LockRequest) Fields(f Fields) {
	f.Bool(&m.Exclusive)
	f.Name(&m.Cookie)
	f.Name(&m.Tag)
}

// An UnlockRequest gives up a lock of the client's own.
type UnlockRequest struct{ Cookie string }

// Fields implements Message.
func (m *UnlockRequest) Fields(f Fields) { f.Name(&m.Cookie) }

// A BreakLockRequest takes a lock from another client.
type BreakLockRequest struct{ Client, Cookie string }

// Fields implements Message.
func (m *BreakLockRequest) Fields(f Fields) {
	f.Name(&m.Client)
	f.Name(&m.Cookie)
}

// A Locker is one of a LockList.
type Locker struct {
	Client, Cookie, Address string
	Since                   int64 // nanoseconds since 1970
}

// Fields implements Message.
func (m *Locker) Fields(f Fields) {
	f.Name(&m.Client)
	f.Name(&m.Cookie)
	f.Name(&m.Address)
	f.I64(&m.Since)
}

// A LockList is the result of Locks.
type LockList struct {
	Exclusive bool
	Tag       string
	Lockers   []Locker
}

// Fields implements Message.
func (m *LockList) Fields(f Fields) {
	f.Bool(&m.Exclusive)
	f.Name(&m.Tag)
	elements(f, &m.Lockers, minLocker)
}

// A TimesResult is that of Times, in nanoseconds since 1970.
type TimesResult struct{ Created, Modified, Accessed int64 }

// Fields implements Message.
func (m *TimesResult) Fields(f Fields) {
	f.I64(&m.Created)
	f.I64(&m.Modified)
	f.I64(&m.Accessed)
}

// A Watcher is who has an image open to write to it.
type Watcher struct {
	Address string
	ID      uint64 // of the process
	Cookie  uint64 // of the handle
}

// Fields implements Message.
func (m *Watcher) Fields(f Fields) {
	f.Name(&m.Address)
	f.U64(&m.ID)
	f.U64(&m.Cookie)
}

// A WatcherList is the result of Watchers.
type WatcherList struct {
	Owned    bool   // the handle may write, and its host owns the image
	Host     string // that owns the image; empty: none
	Watchers []Watcher
}

// Fields implements Message.
func (m *WatcherList) Fields(f Fields) {
	f.Bool(&m.Owned)
	f.Name(&m.Host)
	elements(f, &m.Watchers, minWatcher)
}
