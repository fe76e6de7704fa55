package backend

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// DirectoryKey is the key of the mutable object that holds the names of a
// store's images. Its format is described in docs/format-directory.md.
const DirectoryKey = "directory"

// An Entry of the directory is one image.
type Entry struct {
	Name string
	ID   uuid.UUID
}

// trashMark is what the names of images in the trash begin with, and no other name does.
const trashMark = "~"

// TrashName returns the name that the image id has in the directory while it is in the trash.
func TrashName(id uuid.UUID) string { return trashMark + id.String() }

// InTrash reports whether a name is one that TrashName returns.
func InTrash(name string) bool {
	text, ok := strings.CutPrefix(name, trashMark)
	id, err := uuid.Parse(text)
	return ok && err == nil && TrashName(id) == name
}

// check returns nil if an entry may be in a directory.
func (e Entry) check() error {
	if e.ID != uuid.Nil && e.Name == TrashName(e.ID) {
		return nil
	}
	return CheckImageName(e.Name)
}

// Lookup returns the id of the image of that name, or ErrNotFound.
func Lookup(ctx context.Context, s Store, name string) (uuid.UUID, error) {
	d, _, err := loadDirectory(ctx, s)
	if err != nil {
		return uuid.Nil, err
	}
	i, ok := d.find(name)
	if !ok {
		return uuid.Nil, &Error{Op: "look up", Key: name, Class: ErrNotFound}
	}
	return d[i].ID, nil
}

// Names returns all images of the store, in the byte order of their names, in which those
// in the trash, which InTrash tells, are the last. It is empty, without an error, for a store
// that never held one.
func Names(ctx context.Context, s Store) ([]Entry, error) {
	d, _, err := loadDirectory(ctx, s)
	return d, err
}

// Link adds the image id under that name, which CheckImageName accepts. It
// fails with ErrExists when the name belongs to another image, and succeeds
// when it belongs to id: so a caller may repeat a Link that failed.
func Link(ctx context.Context, s Store, name string, id uuid.UUID) error {
	if err := CheckImageName(name); err != nil {
		return &Error{Op: "link", Class: ErrPermanent, Cause: err}
	}
	if id == uuid.Nil {
		return &Error{Op: "link", Key: name, Class: ErrPermanent, Cause: errors.New("the image has no id")}
	}
	return changeDirectory(ctx, s, func(d directory, _ bool) (directory, error) {
		i, ok := d.find(name)
		if ok && d[i].ID != id {
			return nil, &Error{Op: "link", Key: name, Class: ErrExists}
		}
		if ok {
			return nil, nil
		}
		return slices.Insert(d, i, Entry{name, id}), nil
	})
}

// Unlink removes the name, if it belongs to the image id. It fails with
// ErrNotFound when there is no such name, and with ErrConflict when it belongs
// to another image.
func Unlink(ctx context.Context, s Store, name string, id uuid.UUID) error {
	return changeDirectory(ctx, s, func(d directory, unknown bool) (directory, error) {
		i, ok := d.find(name)
		switch {
		case unknown && (!ok || d[i].ID != id):
			return nil, nil // that was us
		case !ok:
			return nil, &Error{Op: "unlink", Key: name, Class: ErrNotFound}
		case d[i].ID != id:
			return nil, &Error{Op: "unlink", Key: name, Class: ErrConflict, Cause: fmt.Errorf("it is image %v now", d[i].ID)}
		}
		return slices.Delete(d, i, i+1), nil
	})
}

// Rename gives the image of the name old the name new, in one step that others
// see whole or not at all. It fails with ErrNotFound when there is no image
// old, and with ErrExists when there is an image new, also if the two are the
// same name.
func Rename(ctx context.Context, s Store, old, new string) error {
	return rename(ctx, s, old, new, uuid.Nil)
}

// Move is Rename of the image id, which may have TrashName(id) before or after it. It fails with
// ErrNotFound also when the name old belongs to another image.
func Move(ctx context.Context, s Store, id uuid.UUID, old, new string) error {
	return rename(ctx, s, old, new, id)
}

// rename renames the image old, if it is the image want; uuid.Nil is any.
func rename(ctx context.Context, s Store, old, new string, want uuid.UUID) error {
	if err := (Entry{new, want}).check(); err != nil {
		return &Error{Op: "rename", Key: old, Class: ErrPermanent, Cause: err}
	}
	var id uuid.UUID // of the image that is being renamed
	return changeDirectory(ctx, s, func(d directory, unknown bool) (directory, error) {
		i, ok := d.find(old)
		j, taken := d.find(new)
		if unknown && taken && d[j].ID == id && (!ok || d[i].ID != id) {
			return nil, nil // that was us
		}
		if !ok || want != uuid.Nil && d[i].ID != want {
			return nil, &Error{Op: "rename", Key: old, Class: ErrNotFound}
		}
		if taken {
			return nil, &Error{Op: "rename", Key: old, Class: ErrExists, Cause: fmt.Errorf("there is an image %s", new)}
		}
		id = d[i].ID
		d = slices.Delete(d, i, i+1)
		j, _ = d.find(new)
		return slices.Insert(d, j, Entry{new, id}), nil
	})
}

// ErrUnknownVersion is matched by the error of a directory whose format this program does
// not know: it may be whole, and is never changed.
var ErrUnknownVersion = errors.New("of a format that this program does not know")

// Rebuild makes the directory anew with these entries, in any order, which must have
// different names. It fails with ErrConflict when there is one that can be read, and with
// ErrUnknownVersion when it is one of another version. Two must not be at it at one time
// where the store itself cannot read what is there: that goes first, in a step of its own.
func Rebuild(ctx context.Context, s Store, entries []Entry) error {
	d := slices.SortedFunc(slices.Values(entries), func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	old, version, err := s.Load(ctx, DirectoryKey)
	switch {
	case errors.Is(err, ErrNotFound):
		version = NoVersion
	case errors.Is(err, ErrPermanent) && !errors.Is(err, fs.ErrPermission):
		if err := s.Delete(ctx, DirectoryKey); err != nil {
			return err
		}
		version = NoVersion
	case err != nil:
		return err
	default:
		_, err := decodeDirectory(old)
		if err == nil {
			return &Error{Op: "rebuild", Key: DirectoryKey, Class: ErrConflict, Cause: errors.New("it is there, and whole")}
		}
		if errors.Is(err, ErrUnknownVersion) {
			return &Error{Op: "rebuild", Key: DirectoryKey, Class: ErrPermanent, Cause: err}
		}
	}
	b, err := directory(d).encode()
	if err != nil {
		return err
	}
	if _, err := decodeDirectory(b); err != nil {
		return &Error{Op: "rebuild", Key: DirectoryKey, Class: ErrPermanent, Cause: err}
	}
	_, err = s.Swap(ctx, DirectoryKey, version, b)
	return err
}

// The limits of changeDirectory. Conflicts are progress, of somebody else;
// temporary failures are not.
const (
	maxDirectoryConflicts = 1000
	maxDirectoryFailures  = 5
	maxDirectoryPause     = 500 * time.Millisecond
)

// changeDirectory replaces the directory d by change(d). It calls change again
// for each state of the directory that it meets. unknown says that an earlier
// result of change may have been stored. A nil directory without an error
// means that d is as it should be.
//
// A Swap whose outcome is unknown may also take effect later; trying again is
// safe, since then the version is another one and the new try conflicts.
func changeDirectory(ctx context.Context, s Store, change func(d directory, unknown bool) (directory, error)) error {
	unknown := false
	pause := 2 * time.Millisecond
	for conflicts, failures := 0, 0; ; {
		d, version, err := loadDirectory(ctx, s)
		if err == nil {
			if d, err = change(d, unknown); err != nil || d == nil {
				return err
			}
			var data []byte
			if data, err = d.encode(); err != nil {
				return err
			}
			_, err = s.Swap(ctx, DirectoryKey, version, data)
			unknown = unknown || errors.Is(err, ErrTemporary)
		}
		switch {
		case errors.Is(err, ErrConflict) && conflicts < maxDirectoryConflicts:
			conflicts++
		case errors.Is(err, ErrTemporary) && failures < maxDirectoryFailures:
			failures++
		default:
			return err
		}
		// Jitter keeps those who conflicted from meeting again.
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			if errors.Is(err, ErrTemporary) && errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return err // it says more: why there was no answer in time
			}
			return fmt.Errorf("change the directory of images: %w", ctx.Err())
		}
		pause = min(2*pause, maxDirectoryPause)
	}
}

func loadDirectory(ctx context.Context, s Store) (directory, Version, error) {
	data, version, err := s.Load(ctx, DirectoryKey)
	if errors.Is(err, ErrNotFound) {
		return directory{}, NoVersion, nil
	}
	if err != nil {
		return nil, NoVersion, err
	}
	d, err := decodeDirectory(data)
	if err != nil {
		return nil, NoVersion, &Error{Op: "load", Key: DirectoryKey, Class: ErrPermanent, Cause: err}
	}
	return d, version, nil
}

// A directory is sorted by name, and no name is there twice.
type directory []Entry

// find returns the index of name, or where it would be inserted, and whether
// it is there.
func (d directory) find(name string) (int, bool) {
	return slices.BinarySearchFunc(d, name, func(e Entry, name string) int {
		return strings.Compare(e.Name, name)
	})
}

const (
	directoryMagic   = "lsd dir\n"
	directoryVersion = 2
	// directoryOld is a version that is read as well, and written where nothing is in the
	// trash: it has none.
	directoryOld     = 1
	directoryHeader  = len(directoryMagic) + 4 + 4
	directoryTrailer = 4
	directoryMinSize = 1 + 1 + 16 // of an entry
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode returns d in the format of docs/format-directory.md.
func (d directory) encode() ([]byte, error) {
	size := directoryHeader + directoryTrailer
	for _, e := range d {
		size += 1 + len(e.Name) + len(e.ID)
	}
	if size > MaxMutable {
		return nil, &Error{Op: "swap", Key: DirectoryKey, Class: ErrPermanent, Cause: fmt.Errorf("the store is full of images: it has %d", len(d)-1)}
	}
	b := make([]byte, 0, size)
	b = append(b, directoryMagic...)
	b = binary.LittleEndian.AppendUint32(b, d.version())
	b = binary.LittleEndian.AppendUint32(b, uint32(len(d)))
	for _, e := range d {
		b = append(b, byte(len(e.Name)))
		b = append(b, e.Name...)
		b = append(b, e.ID[:]...)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

// version returns the least version of the format that has all of d.
func (d directory) version() uint32 {
	if n := len(d); n > 0 && InTrash(d[n-1].Name) {
		return directoryVersion
	}
	return directoryOld
}

// decodeDirectory returns the directory that encode made b of, or an error of
// one line that says what is wrong with b.
func decodeDirectory(b []byte) (directory, error) {
	if len(b) < directoryHeader+directoryTrailer || string(b[:len(directoryMagic)]) != directoryMagic {
		return nil, errors.New("not a directory of images")
	}
	version := binary.LittleEndian.Uint32(b[8:])
	if version != directoryVersion && version != directoryOld {
		return nil, fmt.Errorf("directory of images is %w: version %d, not %d or %d", ErrUnknownVersion, version, directoryOld, directoryVersion)
	}
	body, sum := b[:len(b)-directoryTrailer], binary.LittleEndian.Uint32(b[len(b)-directoryTrailer:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, errors.New("directory of images is corrupt: CRC32C mismatch")
	}
	count := binary.LittleEndian.Uint32(b[12:])
	body = body[directoryHeader:]
	if uint64(count) > uint64(len(body)/directoryMinSize) {
		return nil, errors.New("directory of images is corrupt: count is too large")
	}
	d := make(directory, 0, count)
	for range count {
		e, n := decodeEntry(body)
		if n == 0 || e.check() != nil {
			return nil, fmt.Errorf("directory of images is corrupt: bad entry %d", len(d))
		}
		if len(d) > 0 && d[len(d)-1].Name >= e.Name {
			return nil, fmt.Errorf("directory of images is corrupt: entry %d is out of order", len(d))
		}
		d, body = append(d, e), body[n:]
	}
	if len(body) != 0 {
		return nil, errors.New("directory of images is corrupt: bytes after the last entry")
	}
	if version != d.version() {
		return nil, fmt.Errorf("directory of images is corrupt: version %d with what is version %d", version, d.version())
	}
	return d, nil
}

// decodeEntry returns the entry that b begins with and its length in bytes, or
// 0 if b is too short.
func decodeEntry(b []byte) (Entry, int) {
	if len(b) == 0 {
		return Entry{}, 0
	}
	n := 1 + int(b[0])
	if len(b) < n+16 {
		return Entry{}, 0
	}
	return Entry{string(b[1:n]), uuid.UUID(b[n : n+16])}, n + 16
}
