//go:build e2e

package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// snapshotOf returns names, sizes and link counts of everything below the
// directories: what a refused command must leave as it is.
func snapshotOf(t testing.TB, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			// Handles of a file store have a directory in tmp while they are open.
			if e.IsDir() && filepath.Base(filepath.Dir(path)) == "tmp" {
				return fs.SkipDir
			}
			fi, err := e.Info()
			if err != nil {
				return err
			}
			if !e.IsDir() {
				fmt.Fprintf(&b, "%s %d\n", path, fi.Size())
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// smallDisk mounts a file system of its own in a file on the SSD.
func smallDisk(t testing.TB, name, size string) (dir string) {
	t.Helper()
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		run(t, "modprobe", "loop")
	}
	disk := filepath.Join(ssdDir, name+".disk")
	dir = filepath.Join(runDir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "truncate", "-s", size, disk)
	run(t, "mkfs.ext4", "-q", "-F", "-m", "0", disk)
	run(t, "mount", "-o", "loop", disk, dir)
	t.Cleanup(func() {
		_ = execute(20*time.Second, nil, "umount", "-l", dir)
		os.Remove(disk)
	})
	return dir
}

// TestBadInput: each mistake gets one clear line and status 1, and changes
// nothing.
func TestBadInput(t *testing.T) {
	h := newHost(t, "bad")
	store := storeURL(t)
	url, attached, foreign := store+"/disk", store+"/attached", store+"/foreign"
	for _, u := range []string{url, attached, foreign} {
		h.create(u, "64M")
	}
	dev := h.add(attached)
	// The log of another image where this one's would be.
	var info struct{ ID string }
	decode(t, h.must("info", foreign, "--json"), &info)
	foreignCache := filepath.Join(h.dir, "foreign-cache")
	if err := os.Mkdir(foreignCache, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "--sparse=always", h.status(dev).Log, filepath.Join(foreignCache, info.ID+".log"))

	full := smallDisk(t, "full", "24M")
	noDirect := filepath.Join(runDir, "no-direct")
	if err := os.MkdirAll(noDirect, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "ramfs", "ramfs", noDirect)
	t.Cleanup(func() { _ = execute(20*time.Second, nil, "umount", "-l", noDirect) })
	file := filepath.Join(runDir, "a-file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}

	type mistake struct {
		args []string
		want []string
	}
	a := func(args ...string) []string { return args }
	mistakes := []mistake{
		{h.addArgs(store + "/nothing"), a("no such image", "lsdctl ls")},
		{a("info", store+"/nothing"), a("no such image")},
		{a("rm", store+"/nothing"), a("no such image")},
		{a("create", url, "--size", "64M"), a("exists already")},
		{h.addArgs(attached), a("attached here already, as " + dev)},
		{a("rm", attached), a("attached by bad")},
		{a("create", store+"/new", "--size", "0"), a("size 0")},
		{a("create", store+"/new", "--size", "4097"), a("not a multiple of the block size 4096")},
		{a("create", store+"/new", "--size", "65T"), a("beyond the limit", "64 TiB")},
		{a("create", store+"/new", "--size", "99999999999999999999"), a("size")},
		{a("create", store+"/new", "--size", "-5G"), a("not a size")},
		{a("create", store+"/new", "--size", "big"), a("not a size")},
		{a("create", store+"/new"), a("--size is missing")},
		{a("create", store+"/new", "--size", "1G", "--block-size", "1000"), a("block size 1000", "512 or 4096")},
		{a("create", store+"/new", "--size", "1G", "--object-size", "64K"), a("object size")},
		{a("create", store+"/new", "--size", "64T", "--object-size", "4M"), a("object size 4194304", "needs 8388608")},
		{a("create", store+"/-new", "--size", "1G"), a("bad image name")},
		{a("create", store+"/a%2Fb", "--size", "1G"), a("URL|image name")},
		{a("create", "disk", "--size", "1G"), a("not a URL")},
		{a("create", "http://x/y", "--size", "1G"), a("unknown scheme")},
		{a("create", "file://relative/x", "--size", "1G"), a("absolute path")},
		{a("create", "rados://pool", "--size", "1G"), a("names no image")},
		{a("create", "rados://rbd/x?conf=/nowhere/ceph.conf", "--size", "1G"), a("/nowhere/ceph.conf")},
		{h.addArgs("disk"), a("not a URL")},
		{a("ls", "file:///nowhere/at/all"), a("no store at")},
		{h.addArgs("file:///nowhere/at/all/disk"), a("/nowhere/at/all")},
		{a("add", url, "--cache", filepath.Join(h.dir, "missing")), a("cache directory .*missing is not there")},
		{a("add", url, "--cache", file), a("neither a directory nor a block device")},
		{a("add", url, "--cache", full, "--log-size", logSize), a("no space left", "--log-size|--cache")},
		{a("add", url, "--cache", noDirect, "--log-size", logSize), a("O_DIRECT")},
		{h.addArgs(url, "--log-size", "1M"), a("write log of 1048576 bytes")},
		{h.addArgs(url, "--queues", "0"), a("queues")},
		{h.addArgs(url, "--depth", "100000"), a("depth")},
		{h.addArgs(url, "--lease", "1ms"), a("lease")},
		{h.addArgs(url, "--nonsense"), a("unknown flag", "--help")},
		{a("add"), a("STORE/IMAGE is missing")},
		{a("add", foreign, "--cache", foreignCache), a("belongs to another image", "kept")},
		{a("del", "/dev/ublkb77"), a("ublkb77")},
		{a("del", "/dev/sda"), a("not an lsd device")},
		{a("status", "/dev/ublkb77"), a("ublkb77")},
		{a("flush", "ublkb77"), a("ublkb77")},
		{a("del"), a("DEVICE is missing")},
		{a("frobnicate"), a("no command")},
	}
	if *storeKind == "rados" {
		mistakes = append(mistakes,
			mistake{a("create", "rados://nopool/x", "--size", "1G"), a("pool", "nopool")},
			mistake{h.addArgs("rados://nopool/x"), a("pool", "nopool")},
			mistake{a("ls", "rados://nopool"), a("pool", "nopool")})
	}
	dirs := []string{h.dir, full, noDirect, foreignCache}
	if *storeKind == "file" {
		dirs = append(dirs, strings.TrimPrefix(store, "file://"))
	}
	before, images, list := snapshotOf(t, dirs...), h.must("ls", store, "--json"), len(h.list())
	// The owner of the one that is attached says all the time that it lives.
	noRenewals := regexp.MustCompile(`"renewals": \d+`)
	images = noRenewals.ReplaceAllString(images, "")
	for _, m := range mistakes {
		h.refused(m.args, m.want...)
		if now := snapshotOf(t, dirs...); now != before {
			t.Fatalf("lsdctl %q was refused and has changed something:\n%s\nbefore:\n%s", m.args, now, before)
		}
	}
	if now := noRenewals.ReplaceAllString(h.must("ls", store, "--json"), ""); now != images {
		t.Errorf("the store is another now: %s\nbefore: %s", now, images)
	}
	if n := len(h.list()); n != list {
		t.Errorf("%d images are attached, %d were", n, list)
	}
	// What was refused works when it is right: nothing holds on to it.
	right := h.add(url)
	h.del(right)

	// A device that is in use stays.
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	h.refused(a("del", dev), "in use|open|holds", "e2e.test|"+fmt.Sprint(os.Getpid()))
	f.Close()
	h.del(dev)
}

// TestDamage: what is damaged in the store is refused with its name.
func TestDamage(t *testing.T) {
	store := storeURL(t)
	if *storeKind != "file" {
		// The objects are the same; here they can be reached without a client.
		store = "file://" + filepath.Join(fsDir, "damage-"+fmt.Sprint(os.Getpid()))
	}
	dir := strings.TrimPrefix(store, "file://")
	h := newHost(t, "damage")
	// find returns the object of the store whose name matches; the last of them.
	find := func(t *testing.T, id, pattern string) string {
		t.Helper()
		all, err := filepath.Glob(filepath.Join(dir, "objects", id, pattern))
		if err != nil || len(all) == 0 {
			t.Fatalf("no object %s/%s (%v)", id, pattern, err)
		}
		return all[len(all)-1]
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, id string) (object string)
		add    bool // the image opens, and what cannot be read gives an error
		want   []string
	}{
		{"superblock", func(t *testing.T, id string) string {
			name := find(t, id, "super+mut")
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 0xff
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return id + "/super"
		}, false, []string{"superblock", "corrupt|CRC|checksum"}},
		{"truncated-object", func(t *testing.T, id string) string {
			name := find(t, id, "d/*+obj")
			if err := os.Truncate(name, 5000); err != nil {
				t.Fatal(err)
			}
			return strings.TrimSuffix(filepath.Base(name), "+obj")
		}, true, nil},
		{"truncated-map", func(t *testing.T, id string) string {
			name := find(t, id, "m/*+obj")
			if err := os.Truncate(name, 20); err != nil {
				t.Fatal(err)
			}
			return strings.TrimSuffix(filepath.Base(name), "+obj")
		}, true, nil},
		{"truncated-checkpoint", func(t *testing.T, id string) string {
			name := find(t, id, "c/*+obj")
			if err := os.Truncate(name, 20); err != nil {
				t.Fatal(err)
			}
			return strings.TrimSuffix(filepath.Base(name), "+obj")
		}, false, []string{"corrupt|truncated|short|bytes"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			url := store + "/" + c.name
			h.create(url, "64M")
			dev := h.add(url)
			qemuIO(t, dev, "write -P 7 1M 1M", "flush")
			h.del(dev)
			var info struct{ ID string }
			decode(t, h.must("info", url, "--json"), &info)
			object := c.damage(t, info.ID)
			if !c.add {
				h.refused(h.addArgs(url), append(c.want, object)...)
				if l := h.list(); len(l) != 0 {
					t.Errorf("refused, and there: %+v", l)
				}
				if l, _ := filepath.Glob(filepath.Join(h.cache, "*.log*")); len(l) != 0 {
					t.Errorf("refused, and a log was left: %v", l)
				}
				h.refused(h.addArgs(url), append(c.want, object)...) // and again
				return
			}
			r := h.ctl(h.addArgs(url)...)
			if r.failed != nil {
				checkRefused(t, r, object)
				return
			}
			dev = h.device(strings.TrimSpace(r.stdout))
			if r := execute(time.Minute, nil, "dd", "if="+dev, "of=/dev/null", "bs=1M", "skip=1", "count=1", "iflag=direct"); !strings.Contains(r.stderr, "Input/output error") {
				t.Errorf("what is not there was read: %v %q", r.err(), r.stderr)
			}
			if !strings.Contains(h.logTail(), object) {
				t.Errorf("the daemon's log does not name %s:\n%s", object, h.logTail())
			}
			if im := h.status(dev); im.Stats.ReadErrors == 0 {
				t.Errorf("the status has no read errors: %+v", im.Stats)
			}
			h.del(dev)
		})
	}
}

// TestNoDaemon: a daemon that is not there, or does not answer; a user who is
// not root; a kernel without ublk.
func TestNoDaemon(t *testing.T) {
	h := newHost(t, "absent")
	url := "file://" + filepath.Join(fsDir, "no-daemon", "disk")
	h.create(url, "64M")
	pid := h.pid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	h.refused([]string{"list"}, "does not answer")
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("it took %v to tell that the daemon does not answer", d)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.terminate()
	for _, args := range [][]string{{"list"}, {"status"}, {"del", "0"}, {"flush", "0"}} {
		h.refused(args, "no lsdd answers")
	}

	// Not root: a copy, as the build may be where only root can read.
	ctl := filepath.Join(runDir, "lsdctl-for-all")
	run(t, "install", "-m", "0755", filepath.Join(*binDir, "lsdctl"), ctl)
	checkRefused(t, execute(time.Minute, nil, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
		ctl, "--socket", h.socket, "--state-dir", filepath.Join(runDir, "nobodys"), "add", url), "root")

	// Without the driver, and without a way to load it.
	if m, err := os.ReadDir("/sys/module/ublk_drv/holders"); err != nil || len(m) > 0 {
		t.Fatalf("the driver is no module that can be removed: %v", err)
	}
	run(t, "modprobe", "-r", "ublk_drv")
	defer run(t, "modprobe", "ublk_drv")
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	script := `mount -t tmpfs none /lib/modules && exec "$@"`
	state := filepath.Join(h.dir, "never")
	without := func(args ...string) result {
		return execute(time.Minute, nil, "unshare", append([]string{"-m", "bash", "-c", script, "sh",
			filepath.Join(*binDir, "lsdctl"), "--socket", h.socket, "--state-dir", state}, args...)...)
	}
	checkRefused(t, without("add", url), "ublk", "modprobe|kernel")
	checkRefused(t, without("features"), "ublk", "modprobe|kernel")
	if _, err := os.Stat(state); !os.IsNotExist(err) {
		t.Errorf("a daemon was started for nothing: %v", err)
	}
}
