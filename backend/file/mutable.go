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

// Swap implements backend.Store.
func (s *Store) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	if err := begin(ctx, "swap", key, backend.CheckSwap(key, len(data))); err != nil {
		return backend.NoVersion, err
	}
	name := mutablePath(key)
	unlock, err := s.lock(ctx, key)
	if err != nil {
		if err := check(ctx, "swap", key); err != nil {
			return backend.NoVersion, err
		}
		return backend.NoVersion, fail("swap", key, err)
	}
	defer unlock()
	_, current, err := s.load(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return backend.NoVersion, fail("swap", key, err)
	}
	if current != old {
		return backend.NoVersion, &backend.Error{Op: "swap", Key: key, Class: backend.ErrConflict}
	}
	if err := check(ctx, "swap", key); err != nil {
		return backend.NoVersion, err
	}
	// 128 random bits: no version is ever used again, though nothing remembers
	// those of objects that were deleted.
	version := randomID()
	if err := s.replace(ctx, name, encodeMutable(version, data), data); err != nil {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return backend.NoVersion, check(ctx, "swap", key)
		}
		return backend.NoVersion, fail("swap", key, notAbsent(err))
	}
	return backend.Version(version), nil
}

// replace makes header and data the contents of the file, durably and in one
// step.
func (s *Store) replace(ctx context.Context, name string, header, data []byte) error {
	tmp, err := s.writeTmp(ctx, header, data)
	if err != nil {
		return err
	}
	if err := s.makeDirs(path.Dir(name)); err != nil {
		s.root.Remove(tmp)
		return err
	}
	if err := s.root.Rename(tmp, name); err != nil {
		s.root.Remove(tmp)
		return err
	}
	return s.syncDir(path.Dir(name))
}
