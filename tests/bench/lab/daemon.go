package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// Daemon is an lsdd on the host, with a state directory of its own.
type Daemon struct {
	Client *api.Client
	Log    string // path of what it says

	host   *Host
	dir    string
	socket string
	flags  []string
	cmd    *exec.Cmd
	died   chan error
	ended  bool
}

// Daemon starts an lsdd with these flags besides those that it needs.
func (h *Host) Daemon(ctx context.Context, flags ...string) (*Daemon, error) {
	dir, err := os.MkdirTemp(h.Dir, "lsd")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "s")
	d := &Daemon{host: h, dir: dir, socket: socket, Log: filepath.Join(dir, "lsdd.log"), flags: flags, Client: api.NewClient(socket)}
	if err := d.Start(ctx); err != nil {
		return nil, err
	}
	h.daemons = append(h.daemons, d)
	h.Defer(d.End)
	return d, nil
}

// Start starts the daemon, again after Kill, and returns when it answers.
func (d *Daemon) Start(ctx context.Context) error {
	log, err := os.OpenFile(d.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = exec.Command(d.host.Program("lsdd"), append([]string{"--socket", d.socket, "--state-dir", filepath.Join(d.dir, "state")}, d.flags...)...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		return err
	}
	died := make(chan error, 1)
	d.died = died
	go func(cmd *exec.Cmd) { died <- cmd.Wait() }(d.cmd)
	err = Await(ctx, "lsdd answers", 30*time.Second, func() (bool, error) {
		select {
		case err := <-died:
			died <- err
			return false, fmt.Errorf("it has ended: %v: %s", err, lastLine(d.Log))
		default:
		}
		_, err := d.Client.Version(ctx)
		_, serr := os.Stat(d.socket + ".librbd")
		return err == nil && serr == nil, nil
	})
	return err
}

// lastLine returns the last line of a file, "" if there is none.
func lastLine(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

// Pid returns its process.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

// Kill ends the daemon with kill -9.
func (d *Daemon) Kill() error { return d.signal(syscall.SIGKILL) }

func (d *Daemon) signal(sig syscall.Signal) error {
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-d.died:
		d.died <- err
		return nil
	case <-time.After(time.Minute):
		return errors.New("lsdd does not end")
	}
}

// End detaches all and ends the daemon: a block device without a server would hang its users. What
// it has on the disk goes, too. When the host is closed that is done where it has not been.
func (d *Daemon) End() {
	if d.ended {
		return
	}
	d.ended = true
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	if _, err := d.Client.Shutdown(ctx, api.ShutdownRequest{Detach: true, Timeout: 20 * time.Second}, nil); err != nil {
		d.host.Say("the end of lsdd: %v", err)
	}
	_ = d.signal(syscall.SIGKILL)
	d.host.daemons = without(d.host.daemons, d)
	os.RemoveAll(d.dir)
}

func without(all []*Daemon, d *Daemon) (rest []*Daemon) {
	for _, x := range all {
		if x != d {
			rest = append(rest, x)
		}
	}
	return rest
}

// Lsdctl runs lsdctl and returns what it prints.
func (d *Daemon) Lsdctl(ctx context.Context, args ...string) (string, error) {
	return d.host.Run(ctx, d.host.Program("lsdctl"), append([]string{"--socket", d.socket}, args...)...)
}

// Command returns a program that is to run on lsd's librbd, on the images of a store.
func (d *Daemon) Command(ctx context.Context, store string, args ...string) *exec.Cmd {
	return d.host.Command(ctx, d.host.Program("lsdctl"), append([]string{"--socket", d.socket, "run", "--store", store, "--"}, args...)...)
}

// Dirty returns how much is not in the store yet. It asks without a program between, which
// would take a part of what is measured.
func (d *Daemon) Dirty(ctx context.Context) (n uint64, err error) {
	list, err := d.Client.Images(ctx)
	for _, im := range list {
		if im.Stats != nil {
			n += im.Stats.Dirty
		}
	}
	return n, err
}

// AwaitStored waits until all is in the store.
func (d *Daemon) AwaitStored(ctx context.Context, limit time.Duration) error {
	_, err := d.AwaitDirty(ctx, 0, limit)
	return err
}

// AwaitDirty waits until at most so many bytes are not in the store, and returns how many are not.
func (d *Daemon) AwaitDirty(ctx context.Context, most uint64, limit time.Duration) (n uint64, err error) {
	err = Await(ctx, "all is in the store", limit, func() (ok bool, err error) {
		n, err = d.Dirty(ctx)
		return n <= most, err
	})
	return n, err
}

// Detach detaches all images.
func (d *Daemon) Detach(ctx context.Context) error {
	list, err := d.Client.Images(ctx)
	if err != nil {
		return err
	}
	for _, im := range list {
		if _, err := d.Client.Detach(ctx, im.ID, api.DetachRequest{}, nil); err != nil {
			return fmt.Errorf("detaching %s: %w", im.Device, err)
		}
	}
	return nil
}
