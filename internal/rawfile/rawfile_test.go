package rawfile_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/internal/rawfile"
)

// readAll reads all of a source, in pieces of so many bytes, and returns what a disk of it
// has, and how many bytes were data.
func readAll(t *testing.T, s *rawfile.Source, piece int) (disk []byte, data int, err error) {
	t.Helper()
	p := make([]byte, piece)
	last := uint64(0)
	for {
		off, n, err := s.Next(t.Context(), p)
		if err == io.EOF {
			size, _ := s.Size()
			return append(disk, make([]byte, size-uint64(len(disk)))...), data, nil
		}
		if err != nil {
			return nil, 0, err
		}
		if off < last || off%4096 != 0 || n == 0 {
			t.Fatalf("%d bytes at %d, after %d", n, off, last)
		}
		disk = append(disk, make([]byte, off-last)...)
		disk = append(disk, p[:n]...)
		last, data = off+uint64(n), data+n
	}
}

// sparse makes a file of data and holes, and returns what is in it.
func sparse(t *testing.T, size int) (path string, want []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want = make([]byte, size)
	rng := rand.NewChaCha8([32]byte{7})
	for at := 1 << 20; at+100_000 < size; at += 3 << 20 {
		_, _ = rng.Read(want[at:][:100_000])
		if _, err := f.WriteAt(want[at:][:100_000], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	return path, want
}

func TestFile(t *testing.T) {
	for _, size := range []int{0, 1, 4097, 1<<20 + 100_001, 20<<20 + 3} {
		path, want := sparse(t, size)
		s, err := rawfile.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if n, known := s.Size(); n != uint64(size) || !known {
			t.Errorf("size %d, %v", n, known)
		}
		got, data, err := readAll(t, s, 64<<10)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("size %d: wrong data, %v", size, err)
		}
		if size > 10<<20 && data > size/2 {
			t.Logf("the file system of %s knows no holes: %d bytes", path, data)
		}
	}
}

func TestStream(t *testing.T) {
	want := make([]byte, 300_000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(want)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s, err := rawfile.New(r, "standard input")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, known := s.Size(); known {
		t.Error("the size of a stream is known")
	}
	go func() {
		defer w.Close()
		for b := want; len(b) > 0; b = b[min(len(b), 7777):] {
			_, _ = w.Write(b[:min(len(b), 7777)])
		}
	}()
	got, _, err := readAll(t, s, 64<<10)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong data: %v", err)
	}
}

// TestStreamStops: who waits for a stream need not wait for ever.
func TestStreamStops(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s, err := rawfile.New(r, "standard input")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	stop(enough)
	if _, _, err := s.Next(ctx, make([]byte, 4096)); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// TestPart: of a file of which something has been read the rest is a stream.
func TestPart(t *testing.T) {
	path, want := sparse(t, 2<<20)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, f, 1<<20); err != nil {
		t.Fatal(err)
	}
	s, err := rawfile.New(f, path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, _, err := readAll(t, s, 4096)
	if err != nil || !bytes.Equal(got, want[1<<20:]) {
		t.Errorf("wrong data: %v", err)
	}
}

func TestShrinks(t *testing.T) {
	for _, to := range []int64{12345, 1<<20 + 5000, 19 << 20} {
		path, _ := sparse(t, 20<<20)
		s, err := rawfile.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, _, err := s.Next(t.Context(), make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, to); err != nil {
			t.Fatal(err)
		}
		_, _, err = readAll(t, s, 64<<10)
		if err == nil || !strings.Contains(err.Error(), "has become smaller while it was read: it had 20971520 bytes") {
			t.Errorf("%d: %v", to, err)
		}
	}
}

func TestBegins(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("QFI\xfbabc"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := rawfile.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if !s.Begins("QFI\xfb") || s.Begins("QFIx") || s.Begins("QFI\xfbabcdef") {
		t.Error("wrong beginning")
	}
	if _, err := rawfile.Open(t.TempDir()); err == nil || !strings.HasSuffix(err.Error(), "is a directory") {
		t.Error(err)
	}
}
