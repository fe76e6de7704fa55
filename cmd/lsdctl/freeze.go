package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezeFS freezes the file system that is mounted at path: everything that has been
// written to it is on its disk, and writes wait until thaw is called, which must be.
func freezeFS(path string) (thaw func() error, err error) {
	f, err := openMount(path)
	if err != nil {
		return nil, err
	}
	if err := fsIoctl(f, fiFreeze); err != nil {
		f.Close()
		switch {
		case errors.Is(err, unix.EBUSY):
			return nil, fmt.Errorf("%s is frozen already, by somebody else: fsfreeze --unfreeze %s", path, path)
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
			return nil, fmt.Errorf("%s cannot be frozen: its file system does not know how", path)
		case errors.Is(err, unix.EPERM):
			return nil, fmt.Errorf("%s cannot be frozen: only root may do that", path)
		}
		return nil, fmt.Errorf("%s cannot be frozen: %w", path, err)
	}
	return func() error {
		err := fsIoctl(f, fiThaw)
		f.Close()
		if err != nil && !errors.Is(err, unix.EINVAL) { // that: somebody else has thawed it
			return fmt.Errorf("%s stays frozen: %w: fsfreeze --unfreeze %s", path, err, path)
		}
		return nil
	}, nil
}

// openMount opens the root of what is mounted at path. A directory below it is refused: a
// mount that is missing must not have the file system frozen that it would be on.
func openMount(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Statx_t
	err = unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_TYPE, &st)
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w", path, err)
	case st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0:
		err = fmt.Errorf("%s is not a mount point", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func fsIoctl(f *os.File, op uintptr) error {
	var arg int32 // the kernel does not look at it
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(&arg))); e != 0 {
		return e
	}
	return nil
}

// sameFS reports whether a path that is there is on the file system that is mounted at mount.
func sameFS(mount, path string) bool {
	f, err := openMount(mount)
	if err != nil {
		return false
	}
	defer f.Close()
	var a, b unix.Stat_t
	return unix.Fstat(int(f.Fd()), &a) == nil && unix.Stat(path, &b) == nil && a.Dev == b.Dev
}

// sysfs is where the kernel tells of block devices.
const sysfs = "/sys"

// disksOf returns the names of the disks that the file system at mount is on, through
// partitions and the device mapper; nothing if that is not known.
func disksOf(sys, mount string) []string {
	var st unix.Stat_t
	if unix.Stat(mount, &st) != nil {
		return nil
	}
	return disksUnder(filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))))
}

func disksUnder(device string) (names []string) {
	device, err := filepath.EvalSymlinks(device)
	if err != nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(device, "partition")); err == nil {
		device = filepath.Dir(device)
	}
	slaves, err := os.ReadDir(filepath.Join(device, "slaves"))
	if err != nil || len(slaves) == 0 {
		return []string{filepath.Base(device)}
	}
	for _, s := range slaves {
		names = append(names, disksUnder(filepath.Join(device, "slaves", s.Name()))...)
	}
	return names
}

// errThawed says that a file system was thawed before what it was frozen for was done.
var errThawed = errors.New("the file system had to be thawed before the snapshot was there")

// whileFrozen runs do, at most for the given time, while the file system at the mount point
// path takes no writes. It is thawed when do returns, and in any case when that time is over
// or a signal asks for the end: do may wait for what is frozen. If do succeeds all the same
// the error matches errThawed.
func (a *app) whileFrozen(ctx context.Context, path string, timeout time.Duration, do func(context.Context) error) error {
	ctx, stop := untilAnySignal(ctx)
	defer stop()
	// What is shown may go to a file there, and wait for the thaw.
	a.progress.hold(true)
	defer a.progress.hold(false)
	thaw, err := a.freeze(path)
	if err != nil {
		return err
	}
	thaw = sync.OnceValue(thaw)
	defer func() { _ = thaw() }() // after a panic; else its error has been seen
	ctx, end := within(ctx, timeout)
	defer end()
	inTime := context.AfterFunc(ctx, func() { _ = thaw() })
	if err = context.Cause(ctx); err == nil {
		err = do(ctx)
	}
	if !inTime() && err == nil {
		err = fmt.Errorf("%w: %w", errThawed, context.Cause(ctx))
	}
	if terr := thaw(); terr != nil {
		return errors.Join(err, terr)
	}
	return err
}

// untilAnySignal returns a context that ends with the first signal that would end or stop
// the program. Until the function that it returns is called, none does.
func untilAnySignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTSTP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	go func() {
		select {
		case s := <-signals:
			cancel(fmt.Errorf("signal: %v", s))
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
	}
}
