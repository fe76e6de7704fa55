//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
)

// snapshotLab is an image under load: a file system in its first half, which fio writes to,
// and stamped writes in its second half.
type snapshotLab struct {
	t       testing.TB
	h       *host
	url     string
	dev     string
	dir     string // where the file system is mounted
	files   string // in there
	unmount func()
	load    *process
	plan    stampPlan
	stamps  *stamper
}

func newSnapshotLab(t testing.TB, h *host, url string) *snapshotLab {
	t.Helper()
	l := &snapshotLab{t: t, h: h, url: url, dir: filepath.Join(runDir, "mnt-snapshots")}
	l.files = filepath.Join(l.dir, "files")
	h.create(url, "512M")
	// Another host that wants a snapshot waits for a renewal of this lease.
	l.dev = h.add(url, "--lease", "12s")
	run(t, "mkfs.ext4", "-q", l.dev, "256M")
	l.unmount = mounted(t, l.dev, l.dir)
	var err error
	l.load, err = spawn(nil, "fio", "--name=load", "--filename="+filepath.Join(l.dir, "load"), "--size=8M", "--rw=randwrite", "--bs=4k-64k",
		"--thread", "--ioengine=libaio", "--direct=1", "--iodepth=4", "--rate_iops=20", "--time_based", "--runtime=20m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.load.kill)
	l.plan = stampPlan{Seed: 30, Slots: 16, Base: 384 << 20, Pause: 20000}
	l.stamps = startStamps(t, l.dev, l.plan)
	l.stamps.awaitWrites(100, time.Minute)
	return l
}

// during runs what makes a snapshot, under load, and tells how long that and any write
// beside it took. It returns what a snapshot may hold at least and at most.
func (l *snapshotLab) during(what string, do func()) (least, most vector) {
	l.t.Helper()
	l.stamps.board.Longest.Store(0)
	l.stamps.awaitWrites(100, time.Minute)
	usual := l.stamps.board.Longest.Swap(0)
	least = l.stamps.acked()
	began := time.Now()
	do()
	took := time.Since(began)
	most = read(&l.stamps.board.Begun)
	l.stamps.awaitWrites(4*stampWriters, time.Minute) // those that it held up are over
	l.t.Logf("%s: %v; the longest of %d writes meanwhile took %v, of 100 before %v", what, took.Round(time.Millisecond), most.sum()-least.sum(),
		time.Duration(l.stamps.board.Longest.Load()).Round(100*time.Microsecond), time.Duration(usual).Round(100*time.Microsecond))
	if !l.load.running() {
		l.t.Fatal("fio has ended: ", l.load.wait(0).err())
	}
	return least, most
}

// check makes sure that what a device holds is a state from least to most, and returns it.
func (l *snapshotLab) check(dev string, least, most vector) vector {
	l.t.Helper()
	got := stamps(l.t, dev, l.plan)
	atLeast(l.t, "what had been acknowledged before the snapshot", got, least)
	atLeast(l.t, "what had been written at all when it was there", most, got)
	return got
}

// end ends the load, and returns what was acknowledged.
func (l *snapshotLab) end() vector {
	l.t.Helper()
	acked := l.stamps.stop()
	if !l.load.running() {
		l.t.Fatal("fio has ended: ", l.load.wait(0).err())
	}
	l.load.kill()
	<-l.load.done
	return acked
}

func (l *snapshotLab) list() (list []engine.Snapshot) {
	l.t.Helper()
	decode(l.t, l.h.must("snap", "ls", l.url, "--json"), &list)
	return list
}

// TestSnapshots: snapshots are made under load, on the host that has the image and on
// another one. They hold what was there, also when the image goes on, the daemon is killed,
// and they get another name. The file system in one that was made with --freeze needs no
// recovery.
func TestSnapshots(t *testing.T) {
	clearKernelLog(t)
	h, other := newHost(t, "owner"), newHost(t, "other")
	store := storeURL(t)
	url := store + "/disk"
	l := newSnapshotLab(t, h, url)

	l.during("flush", func() { h.must("flush", l.dev) }) // what the times below are to be measured by
	smallDisk(t, "small", "8M")
	least, most := l.during("snap create", func() { h.must("snap", "create", url+"@crash") })
	if err := os.Mkdir(l.files, 0o755); err != nil {
		t.Fatal(err)
	}
	sums := writeFiles(t, l.files, 1, pick(4, 48)<<20) // some of it in the page cache alone
	frozenLeast, frozenMost := l.during("snap create --freeze", func() { h.must("snap", "create", url+"@frozen", "--freeze", l.dir) })
	farLeast, farMost := l.during("snap create on another host", func() { other.must("snap", "create", url+"@far") })
	h.refused([]string{"snap", "create", url + "@frozen", "--freeze", l.dir}, "exists already")
	h.refused([]string{"snap", "create", url + "@new", "--freeze", l.files}, "not a mount point")
	h.refused([]string{"snap", "create", url + "@new", "--freeze", ssdDir}, "cannot be frozen: the write log of "+url)
	h.refused([]string{"snap", "create", url + "@new", "--freeze", runDir + "/small"}, "is on loop.*, and the image is attached as "+l.dev)
	if list := l.list(); len(list) != 3 || list[0].Name != "crash" || list[1].Name != "frozen" || list[2].Name != "far" {
		t.Errorf("snapshots: %+v", list)
	}

	// Everything that they hold is overwritten.
	if err := os.RemoveAll(l.files); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, l.dir, 2, pick(4, 48)<<20)
	l.stamps.awaitWrites(500, time.Minute)
	h.must("flush", l.dev)

	h.refused(h.addArgs(url+"@frozen"), "--read-only")
	crash, frozen := h.add(url+"@crash", "--read-only"), h.add(url+"@frozen", "--read-only")
	inCrash, inFrozen := l.check(crash, least, most), l.check(frozen, frozenLeast, frozenMost)
	fsck(t, "ext4", frozen)
	copyOf := filepath.Join(runDir, "mnt-frozen")
	unmount := mounted(t, frozen, copyOf, "-o", "ro,noload")
	checkFiles(t, filepath.Join(copyOf, "files"), sums)
	h.refused([]string{"snap", "rm", url + "@frozen"}, "is attached as "+frozen, "lsdctl del")
	if s := h.status(frozen); s.URL != url+"@frozen" || !s.ReadOnly || s.Snapshot != l.list()[1].ID {
		t.Errorf("status: %+v", s)
	}
	far := other.add(url+"@far", "--read-only") // beside the owner
	l.check(far, farLeast, farMost)
	other.del(far)

	h.must("snap", "rename", url+"@crash", "renamed")
	h.crash()
	l.stamps.awaitWrites(4*stampWriters, time.Minute)
	h.awaitActive(crash)
	h.awaitActive(frozen)
	acked := l.end()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
	checkFiles(t, filepath.Join(copyOf, "files"), sums)
	if a, b := stamps(t, crash, l.plan), stamps(t, frozen, l.plan); a != inCrash || b != inFrozen {
		t.Errorf("after a kill the snapshots hold %v and %v, and held %v and %v", a, b, inCrash, inFrozen)
	}
	unmount()
	h.del(crash)
	h.del(frozen)
	h.must("snap", "rm", url+"@renamed")

	l.unmount()
	h.del(l.dev)
	removeSnapshots(t, l, acked)
	if e := kernelErrors(t, "ublkb"); len(e) > 0 {
		t.Errorf("the kernel reports: %q", e)
	}
}

// removeSnapshots checks the image and its snapshots in the store alone, and removes them.
func removeSnapshots(t testing.TB, l *snapshotLab, acked vector) {
	t.Helper()
	h, store := l.h, strings.TrimSuffix(l.url, "/disk")
	h.must("check", l.url, "--deep")
	h.must("rename", l.url, "moved")
	url := store + "/moved"
	h.must("snap", "create", url+"@unattached")
	dev := h.add(url)
	if got := stamps(t, dev, l.plan); got != acked {
		t.Errorf("the image holds %v, acknowledged were %v", got, acked)
	}
	fsck(t, "ext4", dev)
	h.del(dev)
	if out := h.must("info", url); !strings.Contains(out, "3: frozen, far, unattached") {
		t.Errorf("lsdctl info: %s", out)
	}
	h.refused([]string{"rm", url}, "it has 3 snapshots", "--snapshots")
	h.must("snap", "rm", url+"@far")
	h.must("check", url, "--deep")
	h.must("rm", url, "--snapshots")
	if out := h.must("ls", store, "--json"); out != "[]" {
		t.Errorf("lsdctl ls: %s", out)
	}
	h.must("check", store)
}
