package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Exit statuses of the daemon.
const (
	// ExitRefused is that of one that could not start and would not the next time,
	// as with bad flags: it is not started again.
	ExitRefused = 1
	// ExitFailed is that of one that failed and may not the next time (EX_TEMPFAIL
	// of sysexits.h).
	ExitFailed = 75
)

const (
	// atOnce is how short a life must be for the next one to wait.
	atOnce   = 300 * time.Millisecond
	maxPause = 5 * time.Second
)

// Supervise runs a command, again whenever it dies, and passes signals on to it.
// It returns the status of a command that ended by itself with success or with
// ExitRefused.
func Supervise(ctx context.Context, logger *slog.Logger, name string, args []string) (int, error) {
	// What it starts inherits it from this thread: see BecomeIOFlusher, which says
	// so where it fails.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP)
	defer signal.Stop(signals)
	var pause time.Duration
	ending := false
	for {
		cmd := exec.Command(name, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		// A signal from a terminal reaches it once, through here.
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		began := time.Now()
		if err := cmd.Start(); err != nil {
			return ExitFailed, fmt.Errorf("start %s: %w", name, err)
		}
		died := make(chan error, 1)
		go func() { died <- cmd.Wait() }()
		var err error
		ending, err = await(ctx, cmd, signals, died, ending)
		status := cmd.ProcessState.ExitCode()
		if ending || status == 0 || status == ExitRefused {
			return max(status, 0), nil
		}
		if time.Since(began) >= atOnce {
			pause = 0
		}
		logger.Error("lsdd died: starting it again", "err", err, "pause", pause)
		if !wait(ctx, signals, pause) {
			return 0, nil
		}
		pause = min(max(2*pause, 100*time.Millisecond), maxPause)
	}
}

// await waits for the command's end and passes signals on meanwhile. It reports
// whether one of them, or ctx, asked for the end.
func await(ctx context.Context, cmd *exec.Cmd, signals <-chan os.Signal, died <-chan error, ending bool) (bool, error) {
	done := ctx.Done()
	for {
		select {
		case err := <-died:
			return ending, err
		case s := <-signals:
			ending = ending || s == unix.SIGTERM || s == unix.SIGINT
			forward(cmd, s)
		case <-done:
			ending, done = true, nil
			forward(cmd, unix.SIGTERM)
		}
	}
}

func forward(cmd *exec.Cmd, s os.Signal) {
	if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		slog.Warn("pass a signal on", "signal", s, "err", err)
	}
}

// wait waits for d; it reports false when a signal asks for the end.
func wait(ctx context.Context, signals <-chan os.Signal, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return true
		case <-ctx.Done():
			return false
		case s := <-signals:
			if s == unix.SIGTERM || s == unix.SIGINT {
				return false
			}
		}
	}
}
