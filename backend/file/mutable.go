package file

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"path"

	"github.com/lsd-ceph/lsd/backend"
)

// The header of the file of a mutable object.
const (
	mutableMagic  = "lsd mut\n"
	mutableHeader = 8 + 16 + 4 + 4 // magic, version, length, checksum
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errCorrupt = &permanentError{"corrupt: the file is no mutable object, or its CRC32C is wrong"}

// encodeMutable returns the header for the version, which are 32 hexadecimal
// digits, and data.
func encodeMutable(version string, data []byte) []byte {
	b := append(make([]byte, 0, mutableHeader), mutableMagic...)
	b, err := hex.AppendDecode(b, []byte(version))
	if err != nil || len(b) != 24 {
		panic("file: bad version " + version)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return binary.LittleEndian.AppendUint32(b, mutableSum(b, data))
}

func mutableSum(header, data []byte) uint32 {
	return crc32.Update(crc32.Checksum(header[:28], castagnoli), castagnoli, data)
}

// decodeMutable returns the contents and version in the file b, or errCorrupt.
// The contents are part of b.
func decodeMutable(b []byte) ([]byte, backend.Version, error) {
	if len(b) < mutableHeader || string(b[:8]) != mutableMagic {
		return nil, backend.NoVersion, errCorrupt
	}
	header, data := b[:mutableHeader], b[mutableHeader:]
	if uint64(binary.LittleEndian.Uint32(header[24:])) != uint64(len(data)) ||
		binary.LittleEndian.Uint32(header[28:]) != mutableSum(header, data) {
		return nil, backend.NoVersion, errCorrupt
	}
	return data, backend.Version(hex.EncodeToString(header[8:24])), nil
}

// Load implements backend.Store.
func (s *Store) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	if err := begin(ctx, "load", key, backend.CheckKey(key)); err != nil {
		return nil, backend.NoVersion, err
	}
	data, version, err := s.load(mutablePath(key))
	if err == nil {
		// A Swap that is under way, or died, may not have flushed the name of
		// what we have just read.
		err = s.syncDir(path.Dir(mutablePath(key)))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, backend.NoVersion, s.absent("load", key)
	}
	if err != nil {
		return nil, backend.NoVersion, fail("load", key, err)
	}
	return data, version, nil
}

// load reads the file of a mutable object.
func (s *Store) load(name string) ([]byte, backend.Version, error) {
	f, info, err := s.open(name)
	if err != nil {
		return nil, backend.NoVersion, err
	}
	defer f.Close()
	if info.Size() > mutableHeader+backend.MaxMutable {
		return nil, backend.NoVersion, errCorrupt
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, backend.NoVersion, err
	}
	return decodeMutable(b)
}

// testHookCompared, if it is not nil, is called under the lock, between the look
// at the version and the rename.
var testHookCompared func()

// Swap implements backend.Store.
//
// What takes time is done without the lock: a process that is stopped while it
// holds one keeps all others from that object until it goes on or ends.
func (s *Store) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	if err := begin(ctx, "swap", key, backend.CheckSwap(key, len(data))); err != nil {
		return backend.NoVersion, err
	}
	name := mutablePath(key)
	// The first look spares writing what cannot be kept; that of exchange decides.
	if err := s.compare(name, old); err != nil {
		return backend.NoVersion, swapFailed(ctx, key, err)
	}
	// 128 random bits: no version is ever used again, though nothing remembers
	// those of objects that were deleted.
	version := randomID()
	tmp, err := s.writeTmp(ctx, encodeMutable(version, data), data)
	if err != nil {
		return backend.NoVersion, swapFailed(ctx, key, err)
	}
	if err = s.makeDirs(path.Dir(name)); err == nil {
		err = s.exchange(ctx, key, old, tmp)
	}
	if err != nil {
		s.root.Remove(tmp)
		return backend.NoVersion, swapFailed(ctx, key, err)
	}
	// Whoever has read it since then flushes the directory as well.
	if err := s.syncDir(path.Dir(name)); err != nil {
		return backend.NoVersion, swapFailed(ctx, key, err)
	}
	return backend.Version(version), nil
}

// swapFailed returns the error of a Swap of key that failed with err.
func swapFailed(ctx context.Context, key string, err error) error {
	if errors.Is(err, backend.ErrConflict) {
		return &backend.Error{Op: "swap", Key: key, Class: backend.ErrConflict}
	}
	return failed(ctx, "swap", key, notAbsent(err))
}

// compare returns ErrConflict unless the file of a mutable object has the version
// old, or is absent and that is NoVersion.
func (s *Store) compare(name string, old backend.Version) error {
	_, current, err := s.load(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if current != old {
		return backend.ErrConflict
	}
	return nil
}

// exchange makes the file tmp that of the mutable object if its version is old.
// Nobody else can change the object between the two, however long that takes: a
// process that is stopped there still holds the lock, and one that has ended does
// not come to the rename.
func (s *Store) exchange(ctx context.Context, key string, old backend.Version, tmp string) error {
	unlock, err := s.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	name := mutablePath(key)
	if err := s.compare(name, old); err != nil {
		return err
	}
	if testHookCompared != nil {
		testHookCompared()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.root.Rename(tmp, name)
}
