package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// flusherEnv keeps a process that could not become an I/O flusher from trying for
// ever.
const flusherEnv = "LSD_IO_FLUSHER"

// BecomeIOFlusher makes all threads of the process I/O flushers
// (PR_SET_IO_FLUSHER, prctl(2)): the kernel does not make them wait, when memory
// is short, for a disk that this very process serves. The attribute is a
// thread's; those that it makes inherit it, and a program that it executes. The Go
// runtime has threads before main begins, so the process sets it on one and
// executes itself: then there are no others. It returns when that has been done, as
// it has for one that Supervise started, or cannot be.
func BecomeIOFlusher(logger *slog.Logger) error {
	tried := os.Getenv(flusherEnv) != ""
	if err := os.Unsetenv(flusherEnv); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0); err == nil && on == 1 {
		return nil
	}
	err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	if err == nil && tried {
		err = errors.New("the kernel forgets it")
	}
	if err != nil {
		logger.Warn("no PR_SET_IO_FLUSHER: when memory is short, a disk used by this host may hang", "err", err)
		return nil
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	if err := unix.Exec(exe, os.Args, append(os.Environ(), flusherEnv+"=1")); err != nil {
		return fmt.Errorf("execute %s: %w", exe, err)
	}
	return nil
}
