package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"golang.org/x/sys/unix"
)

// snapNames returns the names of an image's snapshots.
func snapNames(t *testing.T, url string) (names []string) {
	t.Helper()
	var list []engine.Snapshot
	if err := json.Unmarshal([]byte(must(t, "snap", "ls", url, "--json")), &list); err != nil || list == nil {
		t.Fatal(list, err)
	}
	for _, s := range list {
		names = append(names, s.Name)
	}
	return names
}

func TestSnapCommands(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	url := store + "/vm1"
	must(t, "create", url, "--size", "20G")
	if got := snapNames(t, url); len(got) != 0 {
		t.Errorf("snapshots of a new image: %q", got)
	}
	if out := must(t, "info", url); strings.Contains(out, "snapshots") {
		t.Errorf("info: %s", out)
	}
	if out := must(t, "snap", "create", url+"@monday"); out != "made "+url+"@monday\n" {
		t.Errorf("snap create: %q", out)
	}
	var made engine.Snapshot
	if err := json.Unmarshal([]byte(must(t, "snap", "create", url+"@b", "--json")), &made); err != nil ||
		made.Name != "b" || made.Size != 20<<30 || made.ID == uuid.Nil || made.Pending || time.Since(made.Created) > time.Minute {
		t.Errorf("snap create --json: %+v, %v", made, err)
	}
	lines := strings.Split(must(t, "snap", "ls", url), "\n")
	if len(lines) != 4 || !slices.Equal(strings.Fields(lines[0]), []string{"NAME", "SIZE", "CREATED", "STATE"}) ||
		!strings.HasPrefix(lines[1], "monday  20 GiB") || !strings.HasSuffix(lines[1], "ready") {
		t.Errorf("snap ls: %q", lines)
	}
	must(t, "snap", "rename", url+"@monday", "tuesday")
	must(t, "snap", "rename", url+"@b", url+"@a")
	if got := snapNames(t, url); !slices.Equal(got, []string{"tuesday", "a"}) {
		t.Errorf("snap ls: %q", got)
	}
	if out := must(t, "info", url); !strings.Contains(out, "2: tuesday, a\n") {
		t.Errorf("info: %s", out)
	}
	must(t, "snap", "create", url+"@c")
	must(t, "snap", "create", url+"@d")
	if out := must(t, "info", url); !strings.Contains(out, "4, the last: a, c, d; see lsdctl snap ls "+url+"\n") {
		t.Errorf("info: %s", out)
	}
	must(t, "snap", "rm", url+"@a")
	if got := snapNames(t, url); !slices.Equal(got, []string{"tuesday", "c", "d"}) {
		t.Errorf("snap ls: %q", got)
	}
	// The image's new name is that of its snapshots.
	must(t, "rename", url, "vm2")
	if got := snapNames(t, store+"/vm2"); len(got) != 3 {
		t.Errorf("snap ls: %q", got)
	}
	must(t, "rename", store+"/vm2", url)
	if out := must(t, "check", url, "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
	must(t, "rm", url, "--snapshots")
	if out := must(t, "ls", store); strings.Contains(out, "vm1") {
		t.Errorf("ls: %s", out)
	}
}

// stubDaemon is a daemon that has what it is told attached.
type stubDaemon struct {
	socket string
	mu     sync.Mutex
	asked  []string    // guarded by mu: requests, in order
	images []api.Image // guarded by mu
	did    func()      // what a refresh does
}

func newStubDaemon(t *testing.T) *stubDaemon {
	d := &stubDaemon{socket: filepath.Join(t.TempDir(), "sock"), did: func() {}}
	ln, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		d.asked = append(d.asked, r.Method+" "+r.URL.Path)
		images := slices.Clone(d.images)
		d.mu.Unlock()
		if r.Method == http.MethodGet {
			_ = json.NewEncoder(w).Encode(images)
			return
		}
		d.did()
		_ = api.NewSender(w, func() {}).Result(api.Done{})
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return d
}

// attach has the daemon say that images are attached, and forget what it was asked.
func (d *stubDaemon) attach(images ...api.Image) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.images, d.asked = images, nil
}

func (d *stubDaemon) refreshed() bool { return d.was("POST /v1/images/3/refresh") }

// was reports whether the daemon was asked that.
func (d *stubDaemon) was(request string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Contains(d.asked, request)
}

// TestSnapAttached: what this host's daemon has attached is looked at by it at once, and
// not removed.
func TestSnapAttached(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	must(t, "snap", "create", url+"@monday")
	var info engine.Info
	if err := json.Unmarshal([]byte(must(t, "info", url, "--json")), &info); err != nil || len(info.Snapshots) != 1 {
		t.Fatal(info, err)
	}
	d := newStubDaemon(t)
	image := api.Image{ID: 3, Device: "/dev/ublkb3", URL: url, ImageID: info.ID}
	snap := api.Image{ID: 4, Device: "/dev/ublkb4", URL: url + "@sunday", ImageID: info.ID, Snapshot: info.Snapshots[0].ID, ReadOnly: true}
	other := api.Image{ID: 5, Device: "/dev/ublkb5", URL: url + "@other", ImageID: info.ID, Snapshot: uuid.New(), ReadOnly: true}
	d.attach(image, snap)
	for _, args := range [][]string{{"snap", "rm", url + "@monday"}, {"rm", url, "--snapshots"}} {
		_, err := lsdctlWith(t, d.socket, nil, args...)
		if err == nil || !strings.Contains(err.Error(), "is attached as /dev/ublkb4: lsdctl del /dev/ublkb4 first") {
			t.Errorf("lsdctl %v: %v", args, err)
		}
	}
	if d.refreshed() {
		t.Error("refreshed for nothing")
	}
	d.attach(other, image)
	if _, err := lsdctlWith(t, d.socket, nil, "snap", "rm", url+"@monday"); err != nil || !d.refreshed() {
		t.Errorf("snap rm: %v, refreshed: %v", err, d.refreshed())
	}
	d.attach(other) // which is no owner
	must(t, "snap", "create", url+"@monday")
	if _, err := lsdctlWith(t, d.socket, nil, "snap", "rm", url+"@monday"); err != nil || d.refreshed() {
		t.Errorf("snap rm: %v, refreshed: %v", err, d.refreshed())
	}
}

// memoryLog is the file of a write log.
type memoryLog []byte

func (m memoryLog) ReadAt(p []byte, off int64) (int, error)  { return copy(p, m[off:]), nil }
func (m memoryLog) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }
func (m memoryLog) Size() int64                              { return int64(len(m)) }
func (m memoryLog) Sync() error                              { return nil }
func (m memoryLog) Close() error                             { return nil }
func (memoryLog) Buffer(n int) []byte                        { return make([]byte, n) }

// owned makes the image of that URL one that a host has attached, which does nothing.
func owned(t *testing.T, url string) {
	t.Helper()
	ctx := context.Background()
	u, name, err := backend.ParseImage(url)
	if err != nil {
		t.Fatal(err)
	}
	st, err := open.Store(ctx, u)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		t.Fatal(err)
	}
	log := make(memoryLog, writelog.MinSize)
	if _, err := engine.Open(ctx, st, id, engine.OpenOptions{Log: log, URL: url, Host: "busy"}); err != nil {
		t.Fatal(err)
	}
}

// TestSnapTimeout: the host that has the image attached does not make a snapshot in time. It
// is withdrawn, whether that host is this one or not.
func TestSnapTimeout(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	owned(t, url)
	d := newStubDaemon(t)
	var info engine.Info
	if err := json.Unmarshal([]byte(must(t, "info", url, "--json")), &info); err != nil {
		t.Fatal(err)
	}
	for _, images := range [][]api.Image{nil, {{ID: 3, ImageID: info.ID}}} {
		d.attach(images...)
		_, err := lsdctlWith(t, d.socket, nil, "snap", "create", url+"@monday", "--timeout", "600ms")
		if err == nil || !strings.Contains(err.Error(), "busy, which has the image attached, has not made it") || !strings.Contains(err.Error(), "it is withdrawn") {
			t.Errorf("snap create: %v", err)
		}
		if d.refreshed() != (images != nil) {
			t.Errorf("refreshed: %v, attached: %v", d.refreshed(), images)
		}
	}
	if got := snapNames(t, url); len(got) != 0 {
		t.Errorf("snapshots: %q", got)
	}
}

// freezer is a file system that notes when it is frozen.
type freezer struct {
	t      *testing.T
	mu     sync.Mutex
	frozen bool // guarded by mu
	times  int  // guarded by mu
	err    error
	thaw   error
	during func()
}

func (f *freezer) freeze(path string) (func() error, error) {
	if path != "/mnt/vm1" {
		f.t.Errorf("freezes %s", path)
	}
	if f.err != nil {
		return nil, f.err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = true
	f.times++
	if f.during != nil {
		f.during()
	}
	return func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if !f.frozen {
			f.t.Error("thawed twice")
		}
		f.frozen = false
		return f.thaw
	}, nil
}

func (f *freezer) isFrozen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen
}

// TestSnapFreeze: the file system is frozen while the snapshot is made, and thawed in any
// case.
func TestSnapFreeze(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	create := func(f *freezer, socket string, more ...string) (string, error) {
		t.Helper()
		f.t = t
		out, err := lsdctlWith(t, socket, f.freeze, append([]string{"snap", "create", url + "@monday", "--freeze", "/mnt/vm1"}, more...)...)
		if f.isFrozen() {
			t.Error("it stays frozen")
		}
		return out, err
	}
	f := &freezer{}
	if out, err := create(f, "/none"); err != nil || f.times != 1 || out != "made "+url+"@monday\n" {
		t.Errorf("frozen %d times: %q, %v", f.times, out, err)
	}
	if _, err := create(f, "/none"); err == nil || f.times != 1 {
		t.Errorf("of a name that is taken: frozen %d times, %v", f.times, err)
	}
	must(t, "snap", "rm", url+"@monday")
	for _, x := range []struct {
		f    *freezer
		want string
		made bool
	}{
		{&freezer{err: errors.New("cannot be frozen")}, "cannot be frozen", false},
		{&freezer{thaw: errors.New("stays frozen")}, "stays frozen", true},
	} {
		if _, err := create(x.f, "/none"); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v does not say %q", err, x.want)
		}
		if got := snapNames(t, url); (len(got) > 0) != x.made {
			t.Errorf("%s: %q", x.want, got)
		}
	}
	must(t, "snap", "rm", url+"@monday")
	for _, s := range []unix.Signal{unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGTSTP} {
		ignored := signal.Ignored(s) // as nohup has it: then lsdctl goes on
		f := &freezer{during: func() {
			if ignored {
				return
			}
			came := make(chan os.Signal, 1)
			signal.Notify(came, s)
			defer signal.Stop(came)
			if err := syscall.Kill(os.Getpid(), s); err != nil {
				t.Error(err)
			}
			<-came
			time.Sleep(200 * time.Millisecond) // so it has arrived while the kernel was at it
		}}
		_, err := create(f, "/none")
		switch {
		case ignored && err == nil:
			must(t, "snap", "rm", url+"@monday")
		case ignored || err == nil || !strings.Contains(err.Error(), "signal: "+s.String()) || f.times != 1:
			t.Errorf("%v: frozen %d times, %v", s, f.times, err)
		}
	}
	// The one who has it attached waits for what is frozen.
	owned(t, url)
	var info engine.Info
	if err := json.Unmarshal([]byte(must(t, "info", url, "--json")), &info); err != nil {
		t.Fatal(err)
	}
	d := newStubDaemon(t)
	d.attach(api.Image{ID: 3, ImageID: info.ID})
	f = &freezer{}
	d.did = func() {
		for deadline := time.Now().Add(10 * time.Second); f.isFrozen() && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
	}
	if _, err := create(f, d.socket, "--timeout", "300ms"); err == nil || !strings.Contains(err.Error(), "it is withdrawn") || f.times != 1 {
		t.Errorf("frozen %d times: %v", f.times, err)
	}
	if got := snapNames(t, url); len(got) != 0 {
		t.Errorf("snapshots: %q", got)
	}
}

// TestThawedEarly: what was done all the same does not count.
func TestThawedEarly(t *testing.T) {
	f := &freezer{t: t}
	a := newApp(os.Stdout, os.Stderr)
	a.freeze = f.freeze
	err := a.whileFrozen(context.Background(), "/mnt/vm1", 10*time.Millisecond, func(ctx context.Context) error {
		<-ctx.Done()
		for f.isFrozen() {
			time.Sleep(time.Millisecond)
		}
		return nil
	})
	if !errors.Is(err, errThawed) || !strings.Contains(err.Error(), "10ms are over") {
		t.Errorf("%v", err)
	}
}

// TestFreezeBesideStore: what the snapshot needs must not be frozen.
func TestFreezeBesideStore(t *testing.T) {
	dir := t.TempDir()
	url := "file://" + dir + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	never := func(string) (func() error, error) {
		t.Error("frozen")
		return nil, errors.New("frozen")
	}
	mount := dir
	for !sameFS(mount, dir) {
		mount = filepath.Dir(mount)
	}
	if _, err := lsdctlWith(t, "/none", never, "snap", "create", url+"@monday", "--freeze", mount); err == nil || !strings.Contains(err.Error(), "the store file://"+dir+"/store is there") {
		t.Errorf("%v", err)
	}
	if got := snapNames(t, url); len(got) != 0 {
		t.Errorf("snapshots: %q", got)
	}
}

// TestDisksOf finds the disks of a file system below partitions and the device mapper.
func TestDisksOf(t *testing.T) {
	sys, dir := t.TempDir(), t.TempDir()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	file := func(name string) {
		t.Helper()
		name = filepath.Join(sys, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, name string) {
		t.Helper()
		name = filepath.Join(sys, name)
		_ = os.Remove(name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.Symlink(filepath.Join(sys, to), name)); err != nil {
			t.Fatal(err)
		}
	}
	file("devices/ublkb3/ublkb3p1/partition")
	file("devices/sda/size")
	file("devices/dm-0/size")
	link("devices/ublkb3/ublkb3p1", "devices/dm-0/slaves/ublkb3p1")
	link("devices/sda", "devices/dm-0/slaves/sda")
	number := fmt.Sprintf("dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if got := disksOf(sys, dir); got != nil {
		t.Errorf("unknown: %q", got)
	}
	if got := disksOf(sys, dir+"/none"); got != nil {
		t.Errorf("nothing: %q", got)
	}
	for device, want := range map[string]string{"ublkb3": "ublkb3", "ublkb3/ublkb3p1": "ublkb3", "sda": "sda", "dm-0": "sda ublkb3"} {
		link("devices/"+device, number)
		if got := strings.Join(disksOf(sys, dir), " "); got != want {
			t.Errorf("%s: %q, want %q", device, got, want)
		}
	}
}
