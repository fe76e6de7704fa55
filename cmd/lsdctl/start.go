package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

const (
	unit         = "lsd.service"
	startTimeout = 30 * time.Second
	defaultLog   = "/var/log/lsdd.log"
)

// Whether a daemon is started for nothing where the kernel has no block devices for it.
type driverNeed bool

const (
	withDriver    driverNeed = true
	withoutDriver driverNeed = false
)

// needDaemon makes sure that a daemon answers: it starts one if none does.
func (a *app) needDaemon(ctx context.Context, need driverNeed) error {
	err := ask(ctx, func(ctx context.Context) error {
		_, err := a.client().Version(ctx)
		return err
	})
	if err == nil || !errors.Is(err, api.ErrNoDaemon) {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("only root may attach images: try sudo")
	}
	if need { // before a daemon is started for nothing
		k, err := daemon.OpenDriver()
		if err != nil {
			return err
		}
		if err := k.Close(); err != nil {
			return err
		}
	}
	a.progress.show(api.Progress{What: "starting lsdd"})
	if a.socket == api.DefaultSocket && a.stateDir == api.DefaultStateDir && haveUnit() {
		return a.startUnit(ctx)
	}
	return a.startSupervised(ctx)
}

// haveUnit reports whether systemd runs and knows the daemon.
func haveUnit() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false
	}
	return exec.Command("systemctl", "cat", unit).Run() == nil
}

func (a *app) startUnit(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, startTimeout)
	defer stop()
	if out, err := exec.CommandContext(ctx, "systemctl", "start", unit).CombinedOutput(); err != nil {
		return fmt.Errorf("lsdd does not start: %s: see journalctl -u %s", firstLine(out, err), unit)
	}
	return a.awaitDaemon(ctx, nil)
}

func firstLine(out []byte, err error) string {
	if line, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n")); len(line) > 0 {
		return string(line)
	}
	return err.Error()
}

// findDaemon finds lsdd beside this program, or in PATH.
func findDaemon() (string, error) {
	if exe, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(exe), "lsdd")
		if unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	p, err := exec.LookPath("lsdd")
	if err != nil {
		return "", errors.New("lsdd is neither beside lsdctl nor in PATH: install it")
	}
	return filepath.Abs(p)
}

// startSupervised starts the daemon with its supervisor, in a session of its own.
func (a *app) startSupervised(ctx context.Context) error {
	path, err := findDaemon()
	if err != nil {
		return err
	}
	// The daemon's own directory is another.
	for _, p := range []*string{&a.socket, &a.stateDir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	logPath := defaultLog
	if a.stateDir != api.DefaultStateDir {
		logPath = filepath.Join(a.stateDir, "lsdd.log")
	}
	if err := os.MkdirAll(filepath.Dir(logPath), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("the daemon's log: %w", err)
	}
	defer log.Close()
	end, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd := exec.Command(path, "--supervise", "--socket", a.socket, "--state-dir", a.stateDir)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start lsdd: %w", err)
	}
	died := make(chan error, 1)
	go func() { died <- cmd.Wait() }()
	ctx, stop := context.WithTimeout(ctx, startTimeout)
	defer stop()
	if err := a.awaitDaemon(ctx, died); err != nil {
		said, _ := io.ReadAll(io.NewSectionReader(log, end, 64<<10))
		return fmt.Errorf("lsdd does not start: %s: see %s", lastLine(said, err), logPath)
	}
	return nil
}

func lastLine(out []byte, err error) string {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	if last := bytes.TrimPrefix(lines[len(lines)-1], []byte("lsdd: ")); len(last) > 0 {
		return string(last)
	}
	return err.Error()
}

// awaitDaemon waits until the daemon answers, dies or ctx ends.
func (a *app) awaitDaemon(ctx context.Context, died <-chan error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := a.client().Version(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-died:
			return errors.New("it ended at once")
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// features asks the kernel itself: no daemon is needed.
func features() (ublk.Features, error) {
	k, err := daemon.OpenDriver()
	if err != nil {
		return 0, err
	}
	defer k.Close()
	return k.Features()
}
