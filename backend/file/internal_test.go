package file

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func TestClass(t *testing.T) {
	for errno, want := range map[unix.Errno]error{
		unix.ENOENT:  backend.ErrNotFound,
		unix.EEXIST:  backend.ErrExists,
		unix.EACCES:  backend.ErrPermanent,
		unix.EPERM:   backend.ErrPermanent,
		unix.ENOTDIR: backend.ErrPermanent,
		unix.EROFS:   backend.ErrPermanent,
		unix.ENOSPC:  backend.ErrTemporary,
		unix.EDQUOT:  backend.ErrTemporary,
		unix.EIO:     backend.ErrTemporary,
		unix.EMFILE:  backend.ErrTemporary,
	} {
		err := fail("put", "a", &fs.PathError{Op: "write", Path: "x", Err: errno})
		if !errors.Is(err, want) || !errors.Is(err, errno) {
			t.Errorf("%v became %v; want %v", errno, err, want)
		}
		if got, want := err.Error(), fmt.Sprintf("put a: %v: %v", want, errno); got != want {
			t.Errorf("%v became %q; want %q", errno, got, want)
		}
	}
	for _, err := range []error{errCorrupt, errNotStore, os.ErrClosed, errors.New("path escapes from parent")} {
		if !errors.Is(fail("get", "a", err), backend.ErrPermanent) {
			t.Errorf("%v became %v", err, fail("get", "a", err))
		}
	}
}

// TestMutableFormat pins the format: stores out there hold these bytes.
func TestMutableFormat(t *testing.T) {
	const version = "00112233445566778899aabbccddeeff"
	data := []byte("hello")
	b := append(encodeMutable(version, data), data...)
	const want = "6c7364206d75740a" + version + "05000000" + "3dac7f53" + "68656c6c6f"
	if hex.EncodeToString(b) != want {
		t.Errorf("encode = %x; want %s", b, want)
	}
	got, v, err := decodeMutable(b)
	if err != nil || v != version || !bytes.Equal(got, data) {
		t.Errorf("decode = %q, %q, %v", got, v, err)
	}
	for i := range b {
		for bit := range 8 {
			bad := bytes.Clone(b)
			bad[i] ^= 1 << bit
			if got, v, err := decodeMutable(bad); err == nil {
				t.Fatalf("decode with bit %d of byte %d flipped = %q, %q", bit, i, got, v)
			}
		}
		if got, v, err := decodeMutable(b[:i]); err == nil {
			t.Fatalf("decode of the first %d bytes = %q, %q", i, got, v)
		}
	}
}

// TestNoFsync: a read-only file system without fsync, as squashfs and proc are, has
// nothing to flush; one that can change must have it.
func TestNoFsync(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for dir, want := range map[string]error{"/proc": unix.EINVAL, storetest.ReadOnly(t, "/proc"): nil} {
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		s := &Store{root: root}
		if err := s.syncDir("."); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", dir, err, want)
		}
	}
}

func FuzzMutable(f *testing.F) {
	f.Add(append(encodeMutable("00112233445566778899aabbccddeeff", []byte("x")), 'x'))
	f.Fuzz(func(t *testing.T, b []byte) {
		data, v, err := decodeMutable(b)
		if err == nil && !bytes.Equal(append(encodeMutable(string(v), data), data...), b) {
			t.Errorf("%x decodes to %q, %q, which encodes to something else", b, data, v)
		}
	})
}
