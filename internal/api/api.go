// Package api is the language of lsdctl and lsdd: JSON over HTTP on a unix
// socket. What takes long is answered by a stream of lines, each a JSON object:
// any number of {"progress":...}, then one {"result":...} or {"error":...}.
package api

import (
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/engine"
)

// Default places; each can be set by a flag or in the environment.
const (
	DefaultSocket   = "/run/lsd/lsd.sock"
	DefaultStateDir = "/var/lib/lsd"
	EnvSocket       = "LSD_SOCKET"
	EnvStateDir     = "LSD_STATE_DIR"
)

// What the C library finds in the environment.
const (
	EnvLibrarySocket = "LSD_LIBRBD_SOCKET"
	EnvLibraryStore  = "LSD_STORE"  // URL of the store of all images
	EnvLibraryShared = "LSD_SHARED" // not empty and not 0: images are opened to be shared with a block device
)

// DefaultLibrarySocket is where the daemon at DefaultSocket waits for library clients.
const DefaultLibrarySocket = "/run/lsd/librbd.sock"

// LibrarySocket returns where the daemon at a socket waits for library clients.
func LibrarySocket(socket string) string {
	if socket == DefaultSocket {
		return DefaultLibrarySocket
	}
	return socket + ".librbd"
}

// FirstLibrary is the lowest number of what is attached without a block device.
const FirstLibrary = 1 << 20

// Paths of the API. Those with {id} are about the device /dev/ublkb{id}.
const (
	PathVersion   = "/v1/version"    // GET: Version
	PathFeatures  = "/v1/features"   // GET: Features
	PathImages    = "/v1/images"     // GET: []Image; POST AttachRequest: stream of Image
	PathReadCache = "/v1/read-cache" // GET: ReadCache
	PathReclaim   = "/v1/reclaim"    // POST ReclaimRequest: stream of Done
	PathShutdown  = "/v1/shutdown"   // POST ShutdownRequest: stream of Done
)

// Version says which daemon answers.
type Version struct {
	Version  string    `json:"version"`
	PID      int       `json:"pid"`
	Host     string    `json:"host"`
	StateDir string    `json:"state_dir"`
	Started  time.Time `json:"started"`
}

// ReadCache is the read cache that the daemon's images share.
type ReadCache struct {
	Path  string `json:"path"`
	Error string `json:"error,omitempty"` // why there is none
	readcache.Stats
}

// States of an attached image that the engine does not know.
const (
	StateAttaching  = "attaching"
	StateRecovering = "recovering" // the daemon is taking it up again
	StateDetaching  = "detaching"  // the device is gone, the log is being destaged
	StateFailed     = "failed"     // it cannot be opened; the device gives errors
	StateGone       = "gone"       // somebody else has stopped the device
	StateHung       = "hung"       // its reactor does not answer
	StateActive     = "active"
)

// AttachRequest asks for a block device. The zero value of a field means its
// default.
type AttachRequest struct {
	Image     string        `json:"image"` // URL; a snapshot's with ReadOnly alone
	ID        int           `json:"id"`    // of the device; -1: any
	Cache     string        `json:"cache,omitempty"`
	LogSize   int64         `json:"log_size,omitempty"`
	LogMemory int64         `json:"log_memory,omitempty"`
	Queues    int           `json:"queues,omitempty"`
	Depth     int           `json:"depth,omitempty"`
	ReadOnly  bool          `json:"read_only,omitempty"`
	Shared    bool          `json:"shared,omitempty"` // library clients that ask for it may write, too
	Force     bool          `json:"force,omitempty"`
	Lease     time.Duration `json:"lease_ns,omitempty"`
	Null      bool          `json:"null,omitempty"` // no image: a device that forgets
	Size      uint64        `json:"size,omitempty"` // of a null device
	// Library asks for no block device: the image is there for library clients.
	Library bool `json:"library,omitempty"`

	BatchAge        time.Duration `json:"batch_age_ns,omitempty"`
	CheckpointEvery int           `json:"checkpoint_every,omitempty"`
	SpaceRatio      float64       `json:"space_ratio,omitempty"`
	StoreTimeout    time.Duration `json:"store_timeout_ns,omitempty"`
}

// Image is an attached image.
type Image struct {
	ID        int       `json:"id"`
	Device    string    `json:"device"` // "lib0" and so on where there is none
	URL       string    `json:"image"`  // "null" for a null device; a snapshot's as it was when it was attached
	ImageID   uuid.UUID `json:"image_id"`
	Snapshot  uuid.UUID `json:"snapshot_id,omitzero"` // if that is what is attached
	Size      uint64    `json:"size_bytes"`           // of the device; the image's is in Stats
	BlockSize uint32    `json:"block_size"`
	State     string    `json:"state"`
	Error     string    `json:"error,omitempty"` // why it is not active
	Since     time.Time `json:"since"`           // of State
	ReadOnly  bool      `json:"read_only"`
	Shared    bool      `json:"shared,omitempty"` // library clients that ask for it may write, too
	Null      bool      `json:"null"`
	Log       string    `json:"log,omitempty"` // path of the write log
	LogMemory int64     `json:"log_memory_bytes,omitempty"`
	Queues    int       `json:"queues"`
	Depth     int       `json:"depth"`
	Restarts  int       `json:"restarts"` // times that its reactor was replaced
	// Clients are the processes that have it open through librbd, one entry for each handle.
	Clients []string `json:"clients,omitempty"`

	StoreDownSince *time.Time    `json:"store_down_since,omitempty"`
	Stats          *engine.Stats `json:"stats,omitempty"` // nil while it is not open
	Advice         []string      `json:"advice,omitempty"`
}

// ResizeRequest asks for another size of an image that is attached: the answer is the Image,
// whose Size is that of its device.
type ResizeRequest struct {
	Size   uint64 `json:"size_bytes"`
	Shrink bool   `json:"shrink,omitempty"` // it may become smaller, and lose what is beyond
}

// Flattened is the result of a flattening.
type Flattened struct {
	Moved uint64 `json:"moved_bytes"` // into objects of the image's own, this time
}

// RollbackRequest asks for an attached image as it was at a snapshot: the answer is the Image.
type RollbackRequest struct {
	Snapshot string `json:"snapshot"` // its name
}

// DetachRequest asks for the end of a device.
type DetachRequest struct {
	Force   bool          `json:"force,omitempty"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// Done is the result of what has nothing to tell but perhaps a remark.
type Done struct {
	Remarks []string `json:"remarks,omitempty"`
}

// ShutdownRequest asks the daemon to end.
type ShutdownRequest struct {
	// Detach removes the devices; else they wait for the next daemon.
	Detach  bool          `json:"detach,omitempty"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// ReclaimRequest asks the daemon to reclaim in the background what a removed image was made of.
// It is written down before it is answered, so the next daemon goes on where this one ends.
type ReclaimRequest struct {
	Store   string    `json:"store"` // URL
	ImageID uuid.UUID `json:"image_id"`
}

// Features is what the kernel's ublk driver can do.
type Features struct {
	Mask    uint64   `json:"mask"`
	Kernel  string   `json:"kernel"`
	Names   []string `json:"names"`
	Used    []string `json:"used"`    // those that lsd uses
	Missing []string `json:"missing"` // those that lsd would use
}

// Progress is how far something has come. Total is 0 when that is not known.
type Progress struct {
	What  string `json:"what"`
	Done  uint64 `json:"done,omitempty"` // bytes
	Total uint64 `json:"total,omitempty"`
}

// Log is a write log that was found.
type Log struct {
	Path    string    `json:"path"`
	Size    int64     `json:"size_bytes"`
	LogID   uuid.UUID `json:"log_id"`
	Image   string    `json:"image"`
	ImageID uuid.UUID `json:"image_id"`
	Epoch   uint64    `json:"epoch"`
	Records uint64    `json:"records"`    // found in it, destaged ones included
	Data    uint64    `json:"data_bytes"` // in these
	LastSeq uint64    `json:"last_record"`
	InUse   bool      `json:"in_use"`
	State   string    `json:"state"` // in a few words
}
