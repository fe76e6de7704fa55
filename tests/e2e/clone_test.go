//go:build e2e

package e2e

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
)

// cloneLab is an image with a file system, a clone of it, and what is in both.
type cloneLab struct {
	t     testing.TB
	h     *host
	store string
	load  *process // writes to the image's file system
	sums  map[string][32]byte
}

// A disk is an attached image whose file system is mounted.
type disk struct {
	dev, dir string
	unmount  func()
}

func (l *cloneLab) url(name string) string { return l.store + "/" + name }

// mount mounts a device, on a directory of that name.
func (l *cloneLab) mount(dev, name string) *disk {
	l.t.Helper()
	d := &disk{dev: dev, dir: filepath.Join(runDir, "mnt-"+name)}
	d.unmount = mounted(l.t, dev, d.dir)
	return d
}

// detach unmounts and detaches a disk, whose file system must be sound.
func (l *cloneLab) detach(d *disk) {
	l.t.Helper()
	d.unmount()
	fsck(l.t, "ext4", d.dev)
	l.h.del(d.dev)
}

// check makes sure that a disk has the files that it had as a snapshot, and those of its own
// that were written by own.
func (l *cloneLab) check(d *disk, own map[string][32]byte) {
	l.t.Helper()
	checkFiles(l.t, filepath.Join(d.dir, "files"), l.sums)
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		l.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if n := e.Name(); n != "lost+found" && n != "load" && n != "files" {
			names = append(names, n)
		}
	}
	if len(own) == 0 && len(names) > 0 || len(own) > 0 && !slices.Equal(names, []string{"own"}) {
		l.t.Errorf("%s has %q beside its files", d.dir, names)
	}
	if len(own) > 0 {
		checkFiles(l.t, filepath.Join(d.dir, "own"), own)
	}
}

// own writes files that only this disk has.
func (l *cloneLab) own(d *disk, seed uint64) map[string][32]byte {
	l.t.Helper()
	dir := filepath.Join(d.dir, "own")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	return writeFiles(l.t, dir, seed, pick(1, 16)<<20)
}

// newCloneLab makes an image with files, under load, and a snapshot of it.
func newCloneLab(t testing.TB) (*cloneLab, *disk) {
	t.Helper()
	l := &cloneLab{t: t, h: newHost(t, "clones"), store: storeURL(t)}
	l.h.create(l.url("disk"), "256M")
	dev := l.h.add(l.url("disk"))
	run(t, "mkfs.ext4", "-q", dev)
	d := l.mount(dev, "disk")
	if err := os.Mkdir(filepath.Join(d.dir, "files"), 0o755); err != nil {
		t.Fatal(err)
	}
	l.sums = writeFiles(t, filepath.Join(d.dir, "files"), 1, pick(3, 48)<<20)
	var err error
	l.load, err = spawn(nil, "fio", "--name=load", "--filename="+filepath.Join(d.dir, "load"), "--size=8M", "--rw=randwrite", "--bs=4k-64k",
		"--thread", "--ioengine=libaio", "--direct=1", "--iodepth=4", "--rate_iops=50", "--time_based", "--runtime=20m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.load.kill)
	l.h.must("snap", "create", l.url("disk")+"@base", "--freeze", d.dir)
	return l, d
}

// TestClones: clones of a snapshot, and of an image as it is under load, are disks of their
// own beside it. It is rolled back, and removed while a clone is attached, and the daemon
// killed meanwhile: the clones go on. When all are removed nothing is left in the store.
func TestClones(t *testing.T) {
	clearKernelLog(t)
	l, d := newCloneLab(t)
	h, url := l.h, l.url("disk")
	want := "made " + l.url("copy") + ": attach it with lsdctl add " + l.url("copy")
	if out := h.must("clone", url+"@base", l.url("copy")); out != want {
		t.Errorf("lsdctl clone: %q, want %q", out, want)
	}
	h.must("clone", url, "live")
	h.refused([]string{"clone", url, "copy"}, l.url("copy")+" exists already")
	h.refused([]string{"clone", url + "@none", "new"}, "no such snapshot: none")
	h.refused([]string{"snap", "rollback", url + "@base"}, d.dev+" is in use by mount ")

	c := l.mount(h.add(l.url("copy")), "copy")
	l.check(c, nil)
	onDisk, onCopy := l.own(d, 2), l.own(c, 3)
	l.check(d, onDisk)
	l.check(c, onCopy)
	if !l.load.running() {
		t.Fatal("fio has ended: ", l.load.wait(0).err())
	}
	l.load.kill()
	<-l.load.done
	l.detach(d)
	l.detach(c)
	l.relatives()

	d.dev = h.add(url)
	h.must("snap", "rollback", url+"@base") // nothing has the device open
	h.awaitActive(d.dev)
	d = l.mount(d.dev, "disk")
	l.check(d, nil)
	l.detach(d)
	c = l.mount(h.add(l.url("copy")), "copy")
	l.check(c, onCopy)
	live := l.mount(h.add(l.url("live")), "live") // its journal is replayed
	l.check(live, nil)
	l.detach(live)
	l.removeParent(c, onCopy)
	l.flatten(c, onCopy)

	l.detach(c)
	c = l.mount(h.add(l.url("copy")), "copy") // from the store alone
	l.check(c, onCopy)
	l.detach(c)
	l.removeClones()
	if e := kernelErrors(t, "ublkb"); len(e) > 0 {
		t.Errorf("the kernel reports: %q", e)
	}
}

// relatives checks what is told of the clones.
func (l *cloneLab) relatives() {
	l.t.Helper()
	var list []struct{ Name string }
	decode(l.t, l.h.must("children", l.url("disk"), "--json"), &list)
	if len(list) != 2 || list[0].Name != "copy" || list[1].Name != "live" {
		l.t.Errorf("clones: %+v", list)
	}
	l.checkParent("disk")
}

// checkParent checks the name of what the clone was made of.
func (l *cloneLab) checkParent(name string) {
	l.t.Helper()
	var info struct {
		Parent uuid.UUID
		Name   string `json:"parent_name"`
	}
	decode(l.t, l.h.must("info", l.url("copy"), "--json"), &info)
	if info.Parent == uuid.Nil || info.Name != name {
		l.t.Errorf("lsdctl info: cloned from %+v, not from %q", info, name)
	}
}

// removeParent removes the image that the attached clone c was made of, and has the daemon
// killed meanwhile. The clone is written to as before.
func (l *cloneLab) removeParent(c *disk, onCopy map[string][32]byte) {
	l.t.Helper()
	l.h.refused([]string{"rm", l.url("disk")}, "it has 1 snapshot", "--snapshots")
	removal := l.begin("rm", "disk", "--snapshots")
	l.h.crash()
	maps.Copy(onCopy, l.own(c, 4)) // where they have the same name they are the newer ones
	run(l.t, "sync", "-f", c.dir)
	if r := removal.wait(time.Minute); r.err() != nil {
		l.t.Fatal(r.err())
	}
	l.h.awaitActive(c.dev)
	l.checkParent("")
	// The daemon that was killed may have been asked to reclaim it: then the next one does.
	out := l.h.must("gc", l.store)
	for end := time.Now().Add(time.Minute); out != "nothing is left behind" && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		out = l.h.must("gc", l.store)
	}
	if out != "nothing is left behind" {
		l.t.Errorf("lsdctl gc: %s", out)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		l.t.Fatal(err)
	}
	l.check(c, onCopy)
}

// begin begins an lsdctl command on an image.
func (l *cloneLab) begin(command, image string, args ...string) *process {
	l.t.Helper()
	p, err := spawn(nil, filepath.Join(*binDir, "lsdctl"), slices.Concat(l.h.common(), []string{command, l.url(image)}, args)...)
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// flatten flattens the attached clone c, and has the daemon killed meanwhile; then once more,
// while it is written to.
func (l *cloneLab) flatten(c *disk, onCopy map[string][32]byte) {
	l.t.Helper()
	first := l.begin("flatten", "copy")
	l.h.crash()
	first.wait(time.Minute) // which may have come to its end before
	l.h.awaitActive(c.dev)
	second := l.begin("flatten", "copy")
	maps.Copy(onCopy, l.own(c, 5))
	if r := second.wait(time.Minute); r.err() != nil || !strings.Contains(r.stdout, "is no clone") {
		l.t.Fatalf("lsdctl flatten: %v, %q", r.err(), r.stdout)
	}
	var info struct{ Parent uuid.UUID }
	if decode(l.t, l.h.must("info", l.url("copy"), "--json"), &info); info.Parent != uuid.Nil {
		l.t.Errorf("lsdctl info: cloned from %s after it was flattened", info.Parent)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		l.t.Fatal(err)
	}
	l.check(c, onCopy)
}

// removeClones removes the clones, and looks for what is left in the store.
func (l *cloneLab) removeClones() {
	l.t.Helper()
	l.h.must("check", l.url("copy"), "--deep")
	l.h.must("rm", l.url("live"), "--wait")
	l.h.must("check", l.url("copy"))
	l.h.must("check", l.store)
	var info struct{ ID uuid.UUID }
	decode(l.t, l.h.must("info", l.url("copy"), "--json"), &info)
	l.h.must("rm", l.url("copy"), "--wait")
	// Of an image whose daemon died the superblock stays as long as something may come: for two
	// minutes, which only the long form waits.
	objects := 2
	out := l.h.must("gc", l.store, "--age", "1ns")
	for end := time.Now().Add(4 * time.Minute); *long && out != "nothing is left behind" && time.Now().Before(end); time.Sleep(time.Second) {
		objects = 1
		out = l.h.must("gc", l.store, "--age", "1ns", "--remove")
	}
	if first, _, _ := strings.Cut(out, "\n"); first != "nothing is left behind" && (*long || first != "nothing is left behind that can go now") {
		l.t.Errorf("lsdctl gc: %s", out)
	}
	var rep engine.CheckReport
	decode(l.t, l.h.must("check", l.store, "--json"), &rep)
	if rep.Objects > objects || rep.ID != uuid.Nil || len(rep.Errors) > 0 {
		l.t.Errorf("lsdctl check: %+v", rep)
	}
	dir, ok := strings.CutPrefix(l.store, "file://")
	if !ok {
		return
	}
	super := ""
	if objects > 1 {
		super = engine.SuperblockKey(info.ID)
	}
	err := filepath.WalkDir(filepath.Join(dir, "objects"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && !strings.HasPrefix(e.Name(), "directory+") && (super == "" || !strings.Contains(path, super+"+")) {
			l.t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		l.t.Error(err)
	}
}
