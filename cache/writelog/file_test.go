package writelog

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMakeAndOpenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	ctx := context.Background()
	var last int64
	if err := MakeFile(ctx, path, MinSize, func(n int64) { last = n }); err != nil {
		t.Fatal(err)
	}
	if last != MinSize {
		t.Errorf("progress ended at %d of %d", last, int64(MinSize))
	}
	if err := MakeFile(ctx, path, MinSize, nil); !errors.Is(err, os.ErrExist) {
		t.Errorf("made again over an existing log: %v", err)
	}
	f, err := OpenFile(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if blank, err := Blank(f); err != nil || !blank {
		t.Errorf("a new file: blank %v, %v", blank, err)
	}
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	if _, err := OpenFile(short, path); !errors.Is(err, ErrLocked) {
		t.Errorf("opened twice: %v, want ErrLocked", err)
	}
}

func TestMakeFileLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	err := MakeFile(ctx, filepath.Join(dir, "x.log"), MinSize, func(int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, size := range []int64{0, MinSize - 4096, MinSize + 1, MaxSize + 4096} {
		if err := MakeFile(context.Background(), filepath.Join(dir, "x.log"), size, nil); err == nil {
			t.Errorf("a log of %d bytes was made", size)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestNoDirectIO needs root, as everything that attaches does: ramfs is a file
// system without direct I/O.
func TestNoDirectIO(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "ramfs", 0, ""); err != nil {
		t.Fatalf("mount ramfs: %v", err)
	}
	defer unix.Unmount(dir, 0)
	err := MakeFile(context.Background(), filepath.Join(dir, "x.log"), MinSize, nil)
	if err == nil || !strings.Contains(err.Error(), "O_DIRECT") || strings.Contains(err.Error(), "\n") {
		t.Errorf("on ramfs: %v, want one line about O_DIRECT", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestDevice: a block device is the log's alone, and blank only where nothing is.
func TestDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a block device needs root")
	}
	image := filepath.Join(t.TempDir(), "disk")
	if err := MakeFile(context.Background(), image, MinSize, nil); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	path := string(bytes.TrimSpace(out))
	defer exec.Command("losetup", "--detach", path).Run()
	f, err := OpenFile(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Size() != MinSize {
		t.Errorf("%d bytes, want %d", f.Size(), int64(MinSize))
	}
	if other, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0); !errors.Is(err, unix.EBUSY) {
		other.Close()
		t.Errorf("opened by another program: %v", err)
	}
	short, stop := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer stop()
	if _, err := OpenFile(short, path); !errors.Is(err, ErrLocked) {
		t.Errorf("opened twice: %v, want ErrLocked", err)
	}
	b := f.Buffer(BlockSize)
	b[64] = 1
	for _, tt := range []struct {
		off   int64
		blank bool
	}{{DataOffset, true}, {64 << 10, false}} { // the latter is where btrfs has its superblock
		if _, err := f.WriteAt(b, tt.off); err != nil {
			t.Fatal(err)
		}
		if blank, err := Blank(f); err != nil || blank != tt.blank {
			t.Errorf("with something at %d: blank %v, %v", tt.off, blank, err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0) // as a mount does
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	short, stop = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer stop()
	if _, err := OpenFile(short, path); !errors.Is(err, ErrLocked) {
		t.Errorf("a device of another program: %v, want ErrLocked", err)
	}
}

// TestRemovedMeanwhile: who waits for a log that is removed by the one who has it does
// not get what nobody can find any more.
func TestRemovedMeanwhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	if err := MakeFile(context.Background(), path, MinSize, nil); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan error)
	go func() {
		g, err := OpenFile(context.Background(), path)
		if err == nil {
			g.Close()
		}
		opened <- err
	}()
	time.Sleep(50 * time.Millisecond)
	if err := errors.Join(RemoveFile(path), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("opened: %v", err)
	}
}

// TestMakeFileTwice: two make a log at one time, and one that was left half-made is no
// obstacle.
func TestMakeFileTwice(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "x.log")
	if err := os.WriteFile(path+".new", []byte("left"), 0o600); err != nil {
		t.Fatal(err)
	}
	var second error
	err := MakeFile(ctx, path, MinSize, func(int64) {
		if second == nil {
			second = MakeFile(ctx, path, MinSize, nil)
		}
	})
	if err != nil {
		t.Errorf("the first: %v", err)
	}
	if !errors.Is(second, ErrLocked) {
		t.Errorf("the second: %v, want ErrLocked", second)
	}
	f, err := OpenFile(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if blank, err := Blank(f); err != nil || !blank || f.Size() != MinSize {
		t.Errorf("%d bytes, blank %v, %v", f.Size(), blank, err)
	}
	if left, _ := filepath.Glob(path + "?*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
