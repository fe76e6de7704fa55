package readcache

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOSFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	f, err := OpenFile(context.Background(), path, MinSize)
	if err != nil {
		t.Fatal(err)
	}
	c := mustOpen(t, f)
	read(t, c.Client(), 1, 0, testSize, Keep)
	c.Close()

	soon, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer stop()
	if _, err := OpenFile(soon, path, MinSize); !errors.Is(err, ErrLocked) {
		t.Errorf("second open: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{2 * MinSize, MinSize} {
		if f, err = OpenFile(context.Background(), path, size); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Size() != size || f.Size() != size {
			t.Errorf("size %d, want %d (%v)", st.Size(), size, err)
		}
		c = mustOpen(t, f)
		if read(t, c.Client(), 1, 0, testSize, Keep) {
			t.Error("the store was asked")
		}
		c.Close()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForeignFile: a file that is not a read cache stays as it is; one that a process
// has left before it had written the header is taken.
func TestForeignFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	for _, content := range [][]byte{[]byte("x"), append(make([]byte, 1024), bytes.Repeat([]byte("mine"), 16<<20)...)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenFile(context.Background(), path, MinSize); err == nil || !strings.Contains(err.Error(), "not a read cache") {
			t.Errorf("a file of %d bytes: %v", len(content), err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, content) {
			t.Errorf("a file of %d bytes was changed (%v)", len(content), err)
		}
	}
	for _, size := range []int64{0, 100, MinSize} {
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		f, err := OpenFile(context.Background(), path, MinSize)
		if err != nil {
			t.Fatalf("%d zeroes: %v", size, err)
		}
		f.Close()
	}
}

// TestNoRoom: a cache for which there is no room does not take what there is. ext4
// leaves a file with what could be allocated before it had no more.
func TestNoRoom(t *testing.T) {
	for _, before := range []int64{0, MinSize} {
		f, err := os.Create(filepath.Join(t.TempDir(), "cache"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if before > 0 {
			if err := reserve(f, before, unix.Fallocate); err != nil {
				t.Fatal(err)
			}
		}
		half := func(fd int, mode uint32, off, n int64) error {
			return errors.Join(unix.Fallocate(fd, mode, off, n/2), unix.ENOSPC)
		}
		if err := reserve(f, 4*MinSize, half); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("a cache without room: %v", err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Size != before || st.Blocks*512 > before+BlockSize {
			t.Errorf("the file has %d bytes and takes %d, want %d (%v)", st.Size, st.Blocks*512, before, err)
		}
	}
}

func TestRefusedFiles(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		path string
		size int64
		want string
	}{
		{dir, MinSize, "not a regular file"},
		{"/dev/null", MinSize, "not a regular file"},
		{filepath.Join(dir, "none", "cache"), MinSize, "no such file"},
		{filepath.Join(dir, "cache"), MinSize - 1, "must have from"},
		{filepath.Join(dir, "cache"), MaxSize + 1, "must have from"},
	} {
		if _, err := OpenFile(context.Background(), c.path, c.size); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s of %d bytes: %v, want %q", c.path, c.size, err, c.want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("%v is left behind (%v)", left, err)
	}
}
