//go:build lab

// Package librbd_test runs unchanged programs that speak librbd, and the real lsdd, on a
// directory and on a Ceph cluster. There is no block device and no virtual machine.
package librbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/cephtest"
)

func TestMain(m *testing.M) { os.Exit(cephtest.Main(m, 400, "bluestore")) }

// program returns the path of one of those that make build has made.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../bin", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A host is a state directory, and the daemon on it.
type host struct {
	t     testing.TB
	dir   string
	store string // URL
	pool  string // what programs call the store
	tools string // directory of QEMU's programs, if they are not those that are installed
	// The library that programs run on has sanitizers, if that is not empty: LSD_LIBRBD_SAN, the
	// directory in which it is; preload is what has to be there before it.
	sanitizer, preload string
	socket             string
	flags              []string // of the daemon, besides those that it needs
	daemon             *exec.Cmd
	died               chan error
	log                *os.File
}

// onStores runs a test on each kind of store.
func onStores(t *testing.T, test func(*testing.T, *host)) {
	t.Run("file", func(t *testing.T) { test(t, newHost(t, "file")) })
	t.Run("rados", func(t *testing.T) { test(t, newHost(t, "rados")) })
}

// onStoresLong is onStores, but that the short form has no Ceph.
func onStoresLong(t *testing.T, test func(*testing.T, *host)) {
	t.Run("file", func(t *testing.T) { test(t, newHost(t, "file")) })
	if !testing.Short() {
		t.Run("rados", func(t *testing.T) { test(t, newHost(t, "rados")) })
	}
}

// newHost starts a daemon for a store of the kind that nobody has used yet.
func newHost(t testing.TB, kind string) *host {
	t.Helper()
	return newHostIn(t, kind, t.TempDir())
}

// newHostIn is newHost with a directory, and flags for the daemon.
func newHostIn(t testing.TB, kind, dir string, flags ...string) *host {
	t.Helper()
	h := &host{t: t, dir: dir, pool: "any", flags: flags}
	h.socket = filepath.Join(h.dir, "s")
	h.store = "file://" + filepath.Join(h.dir, "store")
	if kind == "rados" {
		h.pool = "rbd"
		h.store = "rados://rbd/" + uuid.NewString()
	}
	var err error
	if h.log, err = os.Create(filepath.Join(h.dir, "lsdd.log")); err != nil {
		t.Fatal(err)
	}
	if h.sanitizer = os.Getenv("LSD_LIBRBD_SAN"); h.sanitizer == "san" {
		h.preload = strings.TrimSpace(h.shell(".", "cc -print-file-name=libasan.so"))
	}
	h.start()
	t.Cleanup(func() {
		h.stop(syscall.SIGKILL)
		h.noReports()
		if t.Failed() {
			text, _ := os.ReadFile(h.log.Name())
			t.Logf("the daemon's log:\n%s", text)
		}
		h.log.Close()
	})
	return h
}

// start starts the daemon.
func (h *host) start() {
	h.t.Helper()
	h.daemon = exec.Command(program(h.t, "lsdd"), append([]string{"--socket", h.socket, "--state-dir", filepath.Join(h.dir, "state"), "--read-cache-size", "64M", "--librbd-log-size", "128M"}, h.flags...)...)
	h.daemon.Stdout, h.daemon.Stderr = h.log, h.log
	if err := h.daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.died = make(chan error, 1)
	go func(cmd *exec.Cmd, died chan error) { died <- cmd.Wait() }(h.daemon, h.died)
	c := api.NewClient(h.socket)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := c.Version(context.Background())
		if _, serr := os.Stat(h.socket + ".librbd"); err == nil && serr == nil {
			return
		}
		select {
		case err := <-h.died:
			h.t.Fatalf("lsdd has ended: %v", err)
		default:
		}
		if time.Now().After(end) {
			h.t.Fatalf("lsdd does not answer: %v", err)
		}
	}
}

// stop ends the daemon by a signal.
func (h *host) stop(sig syscall.Signal) {
	h.t.Helper()
	_ = h.daemon.Process.Signal(sig)
	select {
	case err := <-h.died:
		h.died <- err
	case <-time.After(time.Minute):
		h.t.Error("lsdd does not end")
		_ = h.daemon.Process.Kill()
	}
}

// image returns the URL of an image.
func (h *host) image(name string) string { return h.store + "/" + name }

// spec returns what QEMU calls an image.
func (h *host) spec(name string) string {
	if h.pool == "any" {
		return "rbd:any/" + name
	}
	return "rbd:rbd/" + name + ":conf=" + os.Getenv("CEPH_CONF")
}

// lsdctl runs lsdctl and returns what it prints.
func (h *host) lsdctl(args ...string) string {
	h.t.Helper()
	out, err := h.try(exec.Command(program(h.t, "lsdctl"), append([]string{"--socket", h.socket}, args...)...))
	if err != nil {
		h.t.Fatalf("lsdctl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// command returns a program that is to run on the library.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	ctl, name := "lsdctl", args[0]
	var env []string
	if h.tools != "" && strings.HasPrefix(name, "qemu-") {
		env = append(env, "QEMU_MODULE_DIR="+filepath.Join(h.tools, "../lib/x86_64-linux-gnu/qemu"))
		name = filepath.Join(h.tools, name)
	}
	if h.sanitizer != "" {
		ctl = h.sanitizer + "/lsdctl"
		env = append(env, "LD_PRELOAD="+h.preload, "UBSAN_OPTIONS=print_stacktrace=1,log_path="+h.reports(),
			// QEMU and fio have leaks of their own.
			"ASAN_OPTIONS=verify_asan_link_order=0,detect_leaks=0,log_path="+h.reports())
	}
	run := append([]string{"--socket", h.socket, "run", "--store", h.store, "--", name}, args[1:]...)
	cmd := exec.CommandContext(ctx, program(h.t, ctl), run...)
	cmd.Dir = h.dir // fio leaves files
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

// reports is how the names of the sanitizers' reports begin.
func (h *host) reports() string { return filepath.Join(h.dir, "sanitizer") }

var sanitizerFound = regexp.MustCompile("ERROR: |CHECK failed|runtime error: ")

// noReports ends that the sanitizers have found nothing.
func (h *host) noReports() {
	names, err := filepath.Glob(h.reports() + ".*")
	if err != nil {
		h.t.Error(err)
	}
	for _, name := range names {
		// That QEMU's coroutines have stacks of their own is but a warning.
		text, err := os.ReadFile(name)
		if err != nil || sanitizerFound.Match(text) {
			h.t.Errorf("a sanitizer: %v: %s", err, text)
		}
	}
}

// try runs a command and returns what it prints. The error has what it says.
func (h *host) try(cmd *exec.Cmd) (string, error) {
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()+out.String()))
	}
	return out.String(), nil
}

// run runs a program on the library, which must end well, and returns what it prints.
func (h *host) run(args ...string) string {
	h.t.Helper()
	out, err := h.runs(args...)
	if err != nil {
		h.t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	return out
}

// runs is run of what may fail.
func (h *host) runs(args ...string) (string, error) {
	h.t.Helper()
	ctx, stop := context.WithTimeoutCause(h.t.Context(), 4*time.Minute, errors.New("it does not end"))
	defer stop()
	return h.try(h.command(ctx, args...))
}

// io runs commands of qemu-io's, which must not fail.
func (h *host) io(spec string, commands ...string) {
	h.t.Helper()
	h.run(ioArgs(spec, commands)...)
}

func ioArgs(spec string, commands []string) []string {
	args := []string{"qemu-io", "-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return append(args, spec)
}

// shell runs a script in a directory and returns what it prints.
func (h *host) shell(dir, script string) string {
	h.t.Helper()
	cmd := exec.CommandContext(h.t.Context(), "bash", "-e", "-o", "pipefail", "-c", script)
	cmd.Dir = dir
	out, err := h.try(cmd)
	if err != nil {
		h.t.Fatalf("%s: %v", script, err)
	}
	return out
}

// attached returns what is attached.
func (h *host) attached() []api.Image {
	h.t.Helper()
	var list []api.Image
	if err := json.Unmarshal([]byte(h.lsdctl("list", "--json")), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

// clients returns who has the first image that is attached open.
func (h *host) clients() string {
	h.t.Helper()
	list := h.attached()
	if len(list) == 0 {
		return "none"
	}
	return fmt.Sprint(list[0].Clients)
}

// await waits until something is so, but not for longer than limit; complaint says that it is not.
func (h *host) await(complaint string, limit time.Duration, is func() bool) {
	h.t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("%s: clients are %s", complaint, h.clients())
		}
	}
}

// awaitClient waits until a program has an image open.
func (h *host) awaitClient(program string) {
	h.t.Helper()
	h.await(program+" does not open it", time.Minute, func() bool { return strings.Contains(h.clients(), program) })
}

// awaitDetached waits until nothing is attached any more: nobody uses it.
func (h *host) awaitDetached() {
	h.t.Helper()
	h.await("still attached", time.Minute, func() bool { return len(h.attached()) == 0 })
}

// mustCheck ends that nothing is wrong with an image that nobody has open.
func (h *host) mustCheck(name string) {
	h.t.Helper()
	for _, im := range h.attached() {
		h.lsdctl("del", im.Device)
	}
	h.lsdctl("check", "--deep", h.image(name))
}
