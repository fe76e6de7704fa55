//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// A host is a daemon with everything of its own: two of them are two hosts to
// each other.
type host struct {
	t      testing.TB
	name   string
	dir    string // state, and write logs in cache
	cache  string
	socket string
	sup    *process // the supervisor
	log    string   // what it and its daemons say
	starts int
}

// newHost starts a supervised daemon on a state directory that is empty, or left
// over from a boot before. When the test ends, nothing of it is left.
func newHost(t testing.TB, name string) *host {
	t.Helper()
	base := strings.ReplaceAll(t.Name(), "/", "-")
	h := &host{
		t: t, name: name, dir: filepath.Join(ssdDir, base, name), socket: filepath.Join(runDir, name+"-"+strconv.FormatInt(requests.Add(1), 10)+".sock"),
		log: filepath.Join(*outDir, base+"."+name+".daemon-log"),
	}
	h.cache = filepath.Join(h.dir, "cache")
	if err := os.MkdirAll(h.cache, 0o700); err != nil {
		t.Fatal(err)
	}
	h.start()
	t.Cleanup(h.cleanUp)
	return h
}

func (h *host) common() []string { return []string{"--socket", h.socket} }

// start starts the supervisor and waits until the daemon answers.
func (h *host) start() {
	h.t.Helper()
	h.starts++
	f, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintf(f, "--- start %d\n", h.starts)
	script := `log=$1; shift; exec "$@" >>"$log" 2>&1`
	h.sup, err = spawn(nil, "bash", append([]string{"-c", script, "lsdd", h.log, filepath.Join(*binDir, "lsdd"),
		"--supervise", "--state-dir", h.dir, "--host-name", h.name, "--librbd-log-size", logSize}, h.common()...)...)
	if err != nil {
		h.t.Fatal(err)
	}
	var last result
	defer func() {
		if last.failed != nil {
			h.t.Logf("the last attempt: %v\n%s", last.err(), h.logTail())
		}
	}()
	eventually(h.t, 30*time.Second, "a daemon that answers", func() bool {
		if !h.sup.running() {
			h.t.Fatalf("the supervisor ended: %v\n%s", h.sup.err, h.logTail())
		}
		last = h.ctl("list")
		return last.failed == nil
	})
}

// logTail returns the end of the daemon's log.
func (h *host) logTail() string {
	b, _ := os.ReadFile(h.log)
	return string(b[max(0, len(b)-4000):])
}

// pid returns the process of the daemon itself, 0 if it is not there.
func (h *host) pid() int {
	b, err := os.ReadFile(filepath.Join(h.dir, "lsdd.lock"))
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`process (\d+)`).FindSubmatch(b)
	if m == nil {
		return 0
	}
	pid, _ := strconv.Atoi(string(m[1]))
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(name)) != "lsdd" {
		return 0
	}
	return pid
}

// crash kills the daemon; its supervisor brings it back.
func (h *host) crash() {
	h.t.Helper()
	pid := h.pid()
	if pid == 0 {
		h.t.Fatal("no daemon to kill\n" + h.logTail())
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
}

// die kills supervisor and daemon: the host is gone.
func (h *host) die() {
	h.t.Helper()
	pid := h.pid()
	h.sup.kill() // its group; the daemon has one of its own
	if pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-h.sup.done
	eventually(h.t, 20*time.Second, "the end of the daemon", func() bool { return h.pid() == 0 })
}

// terminate ends the daemon as an administrator does.
func (h *host) terminate() {
	h.t.Helper()
	_ = h.sup.cmd.Process.Signal(syscall.SIGTERM)
	if r := h.sup.wait(time.Minute); r.err() != nil {
		h.t.Fatalf("%v\n%s", r.err(), h.logTail())
	}
	if pid := h.pid(); pid != 0 {
		h.t.Fatalf("the supervisor ended but the daemon, process %d, did not", pid)
	}
}

// ctl runs lsdctl.
func (h *host) ctl(args ...string) result { return h.ctlFor(time.Minute, args...) }

func (h *host) ctlFor(timeout time.Duration, args ...string) result {
	return execute(timeout, nil, filepath.Join(*binDir, "lsdctl"), append(h.common(), args...)...)
}

// must runs lsdctl, which must succeed, and returns what it says.
func (h *host) must(args ...string) string {
	h.t.Helper()
	r := h.ctlFor(2*time.Minute, args...)
	if r.err() != nil {
		if r.code == -1 {
			h.t.Logf("what the daemon is at:\n%s", h.goroutines())
		}
		h.t.Fatalf("%v\ndaemon:\n%s", r.err(), h.logTail())
	}
	return strings.TrimSpace(r.stdout)
}

// goroutines says where all of the daemon is.
func (h *host) goroutines() string {
	r := execute(20*time.Second, nil, "curl", "-s", "--unix-socket", h.socket, "http://lsd/debug/pprof/goroutine?debug=2")
	return r.stdout + r.stderr
}

// refused runs lsdctl, which must end with status 1 and one line that matches
// all of these expressions.
func (h *host) refused(args []string, expressions ...string) {
	h.t.Helper()
	checkRefused(h.t, h.ctl(args...), expressions...)
}

func checkRefused(t testing.TB, r result, expressions ...string) {
	t.Helper()
	text := r.stderr
	if r.took > time.Second {
		// Progress comes before it, on lines without the program's name.
		if i := strings.Index(text, "lsdctl: "); i > 0 && text[i-1] == '\n' {
			text = text[i:]
		}
	}
	line, ok := strings.CutSuffix(text, "\n")
	switch {
	case r.code != 1:
		t.Errorf("%s: status %d, want 1: %q %q %v", r.cmd, r.code, r.stdout, r.stderr, r.failed)
	case !ok || strings.Contains(line, "\n") || !strings.HasPrefix(line, "lsdctl: "):
		t.Errorf("%s: not exactly one line: %q", r.cmd, r.stderr)
	case r.stdout != "":
		t.Errorf("%s: it failed, and printed %q", r.cmd, r.stdout)
	}
	for _, e := range expressions {
		if !regexp.MustCompile("(?i)" + e).MatchString(r.stderr) {
			t.Errorf("%s: %q does not match %q", r.cmd, r.stderr, e)
		}
	}
}

// logSize is that of the smallest log: what goes through it wraps around.
const logSize = "65M"

// create makes an image.
func (h *host) create(url, size string, args ...string) {
	h.t.Helper()
	h.must(append([]string{"create", url, "--size", size}, args...)...)
}

// add attaches an image with a small log and returns its device.
func (h *host) add(url string, args ...string) string {
	h.t.Helper()
	return h.device(h.must(h.addArgs(url, args...)...))
}

func (h *host) addArgs(url string, args ...string) []string {
	a := append([]string{"add", url, "--cache", h.cache}, args...)
	if !slices.Contains(args, "--log-size") {
		a = append(a, "--log-size", logSize)
	}
	return a
}

// device returns the device that lsdctl add has printed.
func (h *host) device(out string) string {
	h.t.Helper()
	if !regexp.MustCompile(`^/dev/ublkb\d+$`).MatchString(out) {
		h.t.Fatalf("lsdctl add says %q, not a device", out)
	}
	if fi, err := os.Stat(out); err != nil || fi.Mode()&os.ModeDevice == 0 || fi.Mode()&os.ModeCharDevice != 0 {
		h.t.Fatalf("%s is no block device (%v)", out, err)
	}
	return out
}

// del detaches a device; all of its image is in the store then.
func (h *host) del(dev string, args ...string) {
	h.t.Helper()
	h.must(append([]string{"del", dev}, args...)...)
	if _, err := os.Stat(dev); !errors.Is(err, os.ErrNotExist) {
		h.t.Fatalf("%s is still there after lsdctl del (%v)", dev, err)
	}
}

// list returns what is attached.
func (h *host) list() (l []api.Image) {
	h.t.Helper()
	out := h.must("list", "--json")
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		h.t.Fatalf("lsdctl list --json: %v in %q", err, out)
	}
	return l
}

// status returns what lsdctl status says of a device. It may fail while the
// daemon is being replaced: ok is false then.
func (h *host) tryStatus(dev string) (im api.Image, ok bool) {
	r := h.ctlFor(20*time.Second, "status", dev, "--json")
	if r.failed != nil {
		return im, false
	}
	// One device is asked for: a list of it will do, too.
	var l []api.Image
	if err := json.Unmarshal([]byte(r.stdout), &im); err == nil {
		return im, true
	}
	if err := json.Unmarshal([]byte(r.stdout), &l); err != nil || len(l) != 1 {
		h.t.Errorf("lsdctl status --json: %v in %q", err, r.stdout)
		return im, false
	}
	return l[0], true
}

// status is tryStatus of an image that is open.
func (h *host) status(dev string) api.Image {
	h.t.Helper()
	im, ok := h.tryStatus(dev)
	if !ok || im.Stats == nil {
		h.t.Fatalf("no status of %s: %+v\n%s", dev, im, h.logTail())
	}
	return im
}

// awaitStatus waits until the status of a device is as ok wants it.
func (h *host) awaitStatus(dev string, timeout time.Duration, what string, ok func(api.Image) bool) api.Image {
	h.t.Helper()
	var im api.Image
	began := time.Now()
	for {
		var there bool
		if im, there = h.tryStatus(dev); there && ok(im) {
			return im
		}
		if time.Since(began) > timeout {
			b, _ := json.Marshal(im)
			h.t.Fatalf("%s: not within %v: %s\nstatus: %s\ndaemon:\n%s", dev, timeout, what, b, h.logTail())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func isActive(im api.Image) bool { return im.State == api.StateActive && im.Stats != nil }

// awaitActive waits until a device is served.
func (h *host) awaitActive(dev string) api.Image {
	h.t.Helper()
	return h.awaitStatus(dev, time.Minute, "it is served", isActive)
}

// cleanUp removes all devices and ends the daemon.
func (h *host) cleanUp() {
	if h.t.Failed() {
		h.t.Logf("end of %s:\n%s", h.log, h.logTail())
	}
	if !h.sup.running() {
		if entries, _ := os.ReadDir(filepath.Join(h.dir, "attachments")); len(entries) == 0 {
			return
		}
		h.start()
	}
	r := h.ctl("list", "--json")
	var l []api.Image
	if err := json.Unmarshal([]byte(r.stdout), &l); err != nil && r.failed == nil {
		h.t.Errorf("lsdctl list --json: %v", err)
	}
	for _, im := range l {
		if r := h.ctlFor(time.Minute, "del", im.Device, "--force", "--timeout", "20s"); r.failed != nil {
			h.t.Errorf("clean up: %v\n%s", r.err(), h.logTail())
		}
	}
	h.terminate()
}

// decode decodes the JSON that lsdctl has printed.
func decode(t testing.TB, out string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
}
