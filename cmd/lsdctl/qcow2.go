package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/rawfile"
	"golang.org/x/sys/unix"
)

// unpackEvery is how often it is looked how far qemu-img is.
const unpackEvery = 500 * time.Millisecond

// unpack unpacks a qcow2 file to a sparse file without a name in the directory tmp: whatever
// ends this process, nothing of it is left.
func (a *app) unpack(ctx context.Context, path, tmp string) (*rawfile.Source, error) {
	path, err := filepath.Abs(path) // qemu-img takes what is before a colon for a protocol
	if err != nil {
		return nil, err
	}
	size, data, err := a.examine(ctx, path)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(tmp, &fs); err != nil {
		return nil, fmt.Errorf("--tmp %s: %w", tmp, err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < data {
		return nil, fmt.Errorf("%s has %s free, and %s holds %s of data: name another directory with --tmp", tmp, bytesize.Human(free), path, bytesize.Human(data))
	}
	fd, err := unix.Open(tmp, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make a file in %s: %w: name another directory with --tmp", tmp, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(tmp, "unpacked"))
	if err = f.Truncate(int64(size)); err == nil {
		err = a.readQcow2(ctx, path, f, data)
	}
	var raw *rawfile.Source
	if err == nil {
		raw, err = rawfile.New(f, "what "+path+" was unpacked to")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return raw, nil
}

// examine returns the size of the disk in a qcow2 file, and how much data it holds.
func (a *app) examine(ctx context.Context, path string) (size, data uint64, err error) {
	var info struct {
		Size uint64 `json:"virtual-size"`
	}
	out, err := qemuImg(ctx, nil, "info", "--output=json", "-f", formatQcow2, path)
	if err == nil {
		err = json.Unmarshal(out, &info)
	}
	if err != nil {
		return 0, 0, err
	}
	if info.Size > 1<<62 {
		return 0, 0, fmt.Errorf("%s is of a disk of %d bytes", path, info.Size)
	}
	a.progress.show(api.Progress{What: "looking what is in " + path})
	var extents []struct {
		Length uint64 `json:"length"`
		Data   bool   `json:"data"`
	}
	out, err = qemuImg(ctx, nil, "map", "--output=json", "-f", formatQcow2, path)
	if err == nil {
		err = json.Unmarshal(out, &extents)
	}
	for _, e := range extents {
		if e.Data {
			data += e.Length
		}
	}
	return info.Size, data, err
}

// readQcow2 has qemu-img write a qcow2 file with so many bytes of data to f, which reads as
// zeroes.
func (a *app) readQcow2(ctx context.Context, path string, f *os.File, data uint64) error {
	ended := make(chan error, 1)
	go func() {
		_, err := qemuImg(ctx, f, "convert", "-n", "--target-is-zero", "-f", formatQcow2, "-O", formatRaw, path, "/proc/self/fd/3")
		ended <- err
	}()
	tick := time.NewTicker(unpackEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-tick.C:
		}
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) == nil {
			a.progress.show(api.Progress{What: "unpacking " + path, Done: min(uint64(st.Blocks)*512, data), Total: data})
		}
	}
}

// qemuImg runs qemu-img, which has f, if that is not nil, as descriptor 3, and returns what it
// has written. It does not outlive this process.
func qemuImg(ctx context.Context, f *os.File, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	runtime.LockOSThread() // the kernel takes the end of the thread that has started it for ours
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	switch {
	case err == nil:
		return out.Bytes(), nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return nil, errors.New("there is no qemu-img, which reads qcow2 files: install the package qemu-utils")
	}
	if line := api.OneLine(errors.New(strings.TrimSpace(errOut.String()))); line != "" {
		return nil, errors.New(line)
	}
	return nil, fmt.Errorf("qemu-img %s: %w", args[0], err)
}
