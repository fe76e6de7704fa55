// Package lab is what comparisons are measured in: a directory on a disk, a throw-away Ceph
// cluster, lsd's daemon, fio, and turns that the sides take. Nothing in it says what is
// compared.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Effort says how much is measured.
type Effort struct {
	Turns   int    // that each side takes
	Seconds int    // of a turn that goes by time
	Short   bool   // sizes are those for a first look, too
	Cases   string // only cases in whose names this regular expression finds something
}

// Pick returns the value for the short or the long form.
func Pick[T any](e Effort, short, long T) T {
	if e.Short {
		return short
	}
	return long
}

// Host is the machine on which a comparison runs, native or virtual, for as long as it runs.
// One goroutine uses it.
type Host struct {
	Effort
	Dir  string // its own, on the disk that is measured; gone in the end
	Root string // of the project
	VM   bool   // this is the virtual machine; /dev/vda is Dir's disk
	// Spare is a whole block device that nobody uses, in the virtual machine: on the disk that
	// is measured as well.
	Spare string
	// Idle is what daemons with many images take of the processors in half a second when nothing
	// is done: Rest takes that for rest, between two of its looks.
	Idle time.Duration

	began   time.Time
	cluster *Cluster
	slow    *group // of the OSD, once it has been slowed down
	daemons []*Daemon
	closers []func() // the last one first
}

// NewHost returns a host with a directory of its own below dir.
func NewHost(e Effort, root, dir string) (*Host, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	own, err := os.MkdirTemp(dir, "beside.")
	if err != nil {
		return nil, err
	}
	h := &Host{Effort: e, Dir: own, Root: root, began: time.Now()}
	h.Defer(func() { os.RemoveAll(own) })
	return h, nil
}

// Defer has a function called when the host is closed, before those that were there already.
func (h *Host) Defer(fn func()) { h.closers = append(h.closers, fn) }

// Close ends all that runs on the host.
func (h *Host) Close() {
	for len(h.closers) > 0 {
		last := len(h.closers) - 1
		fn := h.closers[last]
		h.closers = h.closers[:last]
		fn()
	}
}

// Say tells the user what is being done, and for how long the host has been there.
func (h *Host) Say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "   %4.0f s  "+format+"\n", append([]any{time.Since(h.began).Seconds()}, args...)...)
}

// Program returns the path of one of the programs that make build has made.
func (h *Host) Program(name string) string { return filepath.Join(h.Root, "bin", name) }

// Run runs a program to its end and returns what it prints; the error has what it says. It
// works in the host's directory, for fio leaves files.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	return Output(h.Command(ctx, name, args...))
}

// Shell runs a script.
func (h *Host) Shell(ctx context.Context, script string) (string, error) {
	return h.Run(ctx, "bash", "-e", "-o", "pipefail", "-c", script)
}

// Command returns a program that is to run in the host's directory.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = h.Dir
	cmd.WaitDelay = 5 * time.Second // a daemon that it has started may hold its pipes
	return cmd
}

// Output runs a command and returns what it prints. The error has what it says.
func Output(cmd *exec.Cmd) (string, error) {
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err := cmd.Run()
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(said.String()+out.String()))
	}
	return out.String(), nil
}

// Await waits until something is so, but not for longer than limit.
func Await(ctx context.Context, what string, limit time.Duration, is func() (bool, error)) error {
	ctx, stop := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer stop()
	for {
		ok, err := is()
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Rest waits until the daemons and the OSD have nothing left to do from earlier turns.
func (h *Host) Rest(ctx context.Context) error {
	// There is a rest after each turn: of a first look, whose figures nobody quotes, it is a fifth.
	look := Pick(h.Effort, 300*time.Millisecond, 500*time.Millisecond)
	quiet := look / 20
	if h.VM {
		quiet *= 4 // an emulated processor: to be asked is work
	}
	quiet += h.Idle
	before, calm := time.Duration(-1), 0
	return Await(ctx, "daemon and OSD come to rest", 3*time.Minute, func() (bool, error) {
		if before >= 0 {
			time.Sleep(look)
		}
		now, dirty, err := h.busy(ctx)
		if err != nil {
			return false, err
		}
		if before >= 0 && now-before <= quiet && dirty == 0 {
			calm++
		} else {
			calm = 0
		}
		before = now
		return calm == 3, nil
	})
}

// busy returns the processors' time of all that Rest waits for, and what is not in the store yet.
func (h *Host) busy(ctx context.Context) (cpu time.Duration, dirty uint64, err error) {
	pids := []int{}
	if h.cluster != nil && h.cluster.osd != 0 {
		pids = append(pids, h.cluster.osd)
	}
	for _, d := range h.daemons {
		pids = append(pids, d.Pid())
		n, err := d.Dirty(ctx)
		if err != nil {
			return 0, 0, err
		}
		dirty += n
	}
	for _, pid := range pids {
		t, err := CPU(pid)
		if err != nil {
			return 0, 0, err
		}
		cpu += t
	}
	return cpu, dirty, nil
}

// CPU returns the processors' time that a process has had.
func CPU(pid int) (time.Duration, error) {
	user, system, err := CPUTimes(pid)
	return user + system, err
}

// CPUTimes returns the processors' time that a process has had for itself, and in the kernel.
func CPUTimes(pid int) (user, system time.Duration, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// utime and stime are the 14th and the 15th field; the second, in brackets, may have blanks.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 13 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	var times [2]time.Duration
	for i, s := range fields[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		times[i] = time.Duration(n) * time.Second / 100 // USER_HZ, which is 100 for all programs
	}
	return times[0], times[1], nil
}

// DropCaches has the kernel forget what it has in memory of files.
func DropCaches() error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("dropping the kernel's caches: %w", err)
	}
	return nil
}
