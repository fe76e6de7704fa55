package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/durable"
)

// Versions of a record's format. That of a snapshot is one that a daemon which knows no
// snapshots refuses, for it would serve the image as it is now; and that of an attachment
// without a block device one that refuses who would make one.
const (
	recordVersion   = 1
	snapshotVersion = 2
	libraryVersion  = 3
)

// A phase is how far an attachment has come.
type phase string

const (
	phaseAttaching phase = "attaching" // nobody has been told of the device yet
	phaseAttached  phase = "attached"
	phaseDetaching phase = "detaching" // the device is gone, or about to be
)

// A record is what is written down of an attachment, before anything of it is
// there, so that a daemon that comes later finds everything. It holds no secrets.
type record struct {
	Version   int       `json:"version"`
	ID        int       `json:"id"` // of the block device; from firstDoor on there is none
	Phase     phase     `json:"phase"`
	Boot      uuid.UUID `json:"boot"` // of the host, when the device was added
	PID       int       `json:"pid"`  // of the daemon that added it
	URL       string    `json:"image,omitempty"`
	ImageID   uuid.UUID `json:"image_id"`
	Snapshot  uuid.UUID `json:"snapshot_id,omitzero"` // of the image; uuid.Nil: the image itself
	Size      uint64    `json:"size_bytes"`
	BlockSize uint32    `json:"block_size"`
	Log       string    `json:"log,omitempty"` // path: a file, or a block device
	LogSize   int64     `json:"log_size,omitempty"`
	LogDevice bool      `json:"log_device,omitempty"`
	LogMemory int64     `json:"log_memory,omitempty"` // asked for; 0: the daemon's to choose
	Queues    int       `json:"queues"`
	Depth     int       `json:"depth"`
	ReadOnly  bool      `json:"read_only,omitempty"`
	// Shared says that library clients may write beside the block device, if they ask for it. An
	// earlier daemon does not know of it, and lets none.
	Shared bool      `json:"shared,omitempty"`
	Null   bool      `json:"null,omitempty"`
	Added  time.Time `json:"added"`

	// LogID is that of the log with which the device was made: as long as the image's
	// owner has it, its users know the image as it is. Taken says that this was not so
	// once, which is written down before the log can be made anew.
	LogID uuid.UUID `json:"log_id"`
	Taken bool      `json:"taken,omitempty"`

	Lease           time.Duration `json:"lease_ns,omitempty"`
	BatchAge        time.Duration `json:"batch_age_ns,omitempty"`
	CheckpointEvery int           `json:"checkpoint_every,omitempty"`
	SpaceRatio      float64       `json:"space_ratio,omitempty"`
	StoreTimeout    time.Duration `json:"store_timeout_ns,omitempty"`
}

// version returns the version of the format that the record needs.
func (r *record) version() int {
	switch {
	case r.ID >= firstDoor:
		return libraryVersion
	case r.Snapshot != uuid.Nil:
		return snapshotVersion
	}
	return recordVersion
}

// imageURL returns the URL of the image, also if it is a snapshot that is attached.
func (r *record) imageURL() string {
	if u, image, _, err := backend.ParseSource(r.URL); err == nil {
		return u.Image(image)
	}
	return r.URL
}

// clash reports whether two attachments cannot be beside each other on one host.
func (r *record) clash(o *record) bool {
	image := r.ImageID == o.ImageID && r.ImageID != uuid.Nil && r.Snapshot == uuid.Nil && o.Snapshot == uuid.Nil
	return image && !(r.reads() && o.reads()) || r.Log != "" && r.Log == o.Log
}

// records is the directory of a host's records.
type records struct{ dir string }

func (rs records) path(id int) string { return filepath.Join(rs.dir, strconv.Itoa(id)+recordSuffix) }

// save writes a record so that after a crash at any moment either the old one
// or the new one is there, whole.
func (rs records) save(r record) error {
	r.Version = r.version()
	if err := saveJSON(rs.path(r.ID), r); err != nil {
		return fmt.Errorf("write down the attachment: %w", err)
	}
	return nil
}

// remove removes the record of the device id, if there is one.
func (rs records) remove(id int) error {
	if err := removeDurably(rs.path(id)); err != nil {
		return fmt.Errorf("remove the record of the attachment: %w", err)
	}
	return nil
}

// load returns all records. One that cannot be read does not keep the others
// from being taken up: what is wrong is told to bad.
func (rs records) load(bad func(path string, err error)) ([]record, error) {
	return loadAll(rs.dir, bad, func(path, base string) (record, error) {
		r, err := readRecord(path)
		if err == nil && strconv.Itoa(r.ID) != base {
			err = fmt.Errorf("it is about device %d", r.ID)
		}
		return r, err
	})
}

// loadAll reads the files of a directory of the state directory, which it makes if need be, by
// read, which gets a path and the name without its suffix. Files of which that fails are told to
// bad, and left out.
func loadAll[R any](dir string, bad func(path string, err error), read func(path, base string) (R, error)) ([]R, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the state directory: %w", err)
	}
	var list []R
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), tempSuffix) {
			_ = os.Remove(path) // left over from a crash; the real one is beside it
			continue
		}
		base, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		r, err := read(path, base)
		if err != nil {
			bad(path, err)
			continue
		}
		list = append(list, r)
	}
	return list, nil
}

func readRecord(path string) (record, error) {
	var r record
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	switch {
	case r.Version < recordVersion || r.Version > libraryVersion:
		return r, fmt.Errorf("version %d of the format is not known here", r.Version)
	case r.Version != r.version():
		return r, fmt.Errorf("version %d of the format, and it is about attachment %d, snapshot %v", r.Version, r.ID, r.Snapshot)
	}
	return r, nil
}

const (
	recordSuffix = ".json"
	tempSuffix   = ".new"
)

// saveJSON writes v to the file at path, durably and all at once.
func saveJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return writeFileSync(path, append(b, '\n'))
}

// removeDurably removes the file at path, if there is one.
func removeDurably(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(path))
	}
	return err
}

// writeFileSync replaces the file at path, durably and all at once.
func writeFileSync(path string, b []byte) (err error) {
	tmp := path + tempSuffix
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}
