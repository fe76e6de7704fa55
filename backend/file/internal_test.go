package file

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

// What the tests of the other package need of this one.

// SetPatience makes d of lockPatience.
func (s *Store) SetPatience(d time.Duration) { s.patience = d }

// OnCompared has fn called between the look of each Swap and its rename.
func OnCompared(fn func()) { testHookCompared = fn }

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

func TestBusyError(t *testing.T) {
	for _, tt := range []struct {
		holder process
		want   string
	}{
		{process{}, "waited 1.5s for locks/0a, which another process holds: find and end it"},
		{process{id: os.Getpid(), name: "x"}, "waited 1.5s for locks/0a, which this process holds: its file system hangs or is slow"},
		{process{id: 1, name: "init"}, "waited 1.5s for locks/0a, which process 1 (init) holds: if it hangs, end it"},
		{process{id: 1, name: "init", stopped: true}, "waited 1.5s for locks/0a, which process 1 (init) holds: it is stopped: end it, or let it go on with kill -CONT 1"},
	} {
		err := fail("swap", "a", &busyError{"locks/0a", 1500 * time.Millisecond, tt.holder})
		if want := "swap a: store unavailable: " + tt.want; err.Error() != want || !errors.Is(err, backend.ErrTemporary) {
			t.Errorf("got %q; want %q", err, want)
		}
	}
}

func TestParseLock(t *testing.T) {
	for line, want := range map[string][2]uint64{
		"1: FLOCK  ADVISORY  WRITE 708 fe:00:262143 0 EOF\n":    {708, 262143},
		"1: -> FLOCK  ADVISORY  WRITE 708 fe:00:262143 0 EOF\n": {}, // it waits
		"2: POSIX  ADVISORY  WRITE 708 fe:00:262143 0 EOF\n":    {},
		"3: FLOCK  ADVISORY  WRITE x fe:00:262143 0 EOF\n":      {},
		"3: FLOCK  ADVISORY  WRITE 708 <none>:0 0 EOF\n":        {708, 0},
		"3: FLOCK  ADVISORY  WRITE 708 fe:00:y 0 EOF\n":         {},
		"3: FLOCK\n": {},
		"\n":         {},
	} {
		if pid, inode := parseLock(line); uint64(pid) != want[0] || inode != want[1] {
			t.Errorf("parseLock(%q) = %d, %d; want %d", line, pid, inode, want)
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
	f.Add(append(encodeMutable("00112233445566778899aabbccddeeff", []byte("x")), 'x'), false)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= mutableHeader { // get past length and checksum
			binary.LittleEndian.PutUint32(b[24:], uint32(len(b)-mutableHeader))
			binary.LittleEndian.PutUint32(b[28:], mutableSum(b[:mutableHeader], b[mutableHeader:]))
		}
		data, v, err := decodeMutable(b)
		if err == nil && !bytes.Equal(append(encodeMutable(string(v), data), data...), b) {
			t.Errorf("%x decodes to %q, %q, which encodes to something else", b, data, v)
		}
	})
}
