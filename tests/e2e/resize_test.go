//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"golang.org/x/sys/unix"
)

// sizeOf returns what the kernel says of the size of a device, in bytes.
func sizeOf(t testing.TB, dev string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimSpace(run(t, "blockdev", "--getsize64", dev)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// mustBeOf waits until a device has a size: who looks at it meanwhile still sees the old one.
func mustBeOf(t testing.TB, dev string, size uint64) {
	t.Helper()
	eventually(t, 20*time.Second, dev+" has the new size", func() bool { return sizeOf(t, dev) == size })
}

// roomIn returns the size of the file system that is mounted at dir, in bytes.
func roomIn(t testing.TB, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * uint64(st.Bsize)
}

// TestResize: an image grows under a mounted file system, which grows with it, by hand of
// this host and of another one; it has its size after the daemon was killed; and it becomes
// smaller, attached and not, while what was beyond reads as zeroes when it grows again. Where
// the kernel cannot change the size of a device all of that comes with the next attach.
func TestResize(t *testing.T) {
	clearKernelLog(t)
	h, other := newHost(t, "owner"), newHost(t, "other")
	url := storeURL(t) + "/disk"
	const mib = 1 << 20
	h.create(url, "128M")
	dev := h.add(url, "--lease", "8s")
	var features api.Features
	decode(t, h.must("features", "--json"), &features)
	online := slices.Contains(features.Names, "UPDATE_SIZE")
	run(t, "mkfs.ext4", "-q", dev)
	dir := filepath.Join(runDir, "mnt-resize")
	unmount := mounted(t, dev, dir)
	files := filepath.Join(dir, "files")
	sums := writeFiles(t, files, 1, pick(8, 48)<<20)
	load, err := spawn(nil, "fio", "--name=load", "--filename="+filepath.Join(dir, "load"), "--size=8M", "--rw=randwrite", "--bs=4k-64k",
		"--thread", "--ioengine=libaio", "--direct=1", "--iodepth=4", "--rate_iops=20", "--time_based", "--runtime=20m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(load.kill)

	h.refused([]string{"resize", url, "64M"}, "would lose what is beyond 64 MiB", "--allow-shrink")
	h.refused([]string{"resize", url, "200000000"}, "not a multiple of the block size")
	out := h.must("resize", url, "384M")
	if strings.Contains(out, "this kernel cannot change the size") == online {
		t.Errorf("resize: %s", out)
	}
	// On a kernel that can, another host's wish comes with the next renewal of the lease.
	other.must("resize", url, "512M")
	if online {
		mustBeOf(t, dev, 512*mib)
		before := roomIn(t, dir)
		run(t, "resize2fs", dev)
		if now := roomIn(t, dir); now < 3*before {
			t.Errorf("the file system has %d bytes, it had %d", now, before)
		}
		h.crash()
		h.awaitActive(dev)
		mustBeOf(t, dev, 512*mib)
	} else {
		h.awaitStatus(dev, 20*time.Second, "the image has the new size", func(im api.Image) bool { return isActive(im) && im.Stats.Size == 512*mib })
		mustBeOf(t, dev, 128*mib)
	}
	if !load.running() {
		t.Fatal("fio has ended: ", load.wait(0).err())
	}
	load.kill()
	<-load.done
	unmount()
	if !online {
		h.refused([]string{"resize", url, "128M", "--allow-shrink"}, "lsdctl del it first")
		h.del(dev)
		dev = h.add(url)
		mustBeOf(t, dev, 512*mib)
		run(t, "e2fsck", "-fp", dev)
		run(t, "resize2fs", dev)
	}
	unmount = mounted(t, dev, dir)
	checkFiles(t, files, sums)
	more := writeFiles(t, filepath.Join(dir, "more"), 2, pick(8, 48)<<20)
	unmount()
	fsck(t, "ext4", dev)

	// Smaller: first the file system, then the image.
	mark := filepath.Join(ssdDir, "mark")
	if err := os.WriteFile(mark, []byte(strings.Repeat("x", mib)), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsck", "-fp", dev)
	run(t, "resize2fs", dev, "192M")
	run(t, "dd", "if="+mark, "of="+dev, "bs=1M", "seek=300", "oflag=direct", "conv=notrunc")
	if online {
		h.must("resize", url, "256M", "--allow-shrink")
		mustBeOf(t, dev, 256*mib)
		h.del(dev)
	} else {
		h.del(dev)
		h.must("resize", url, "256M", "--allow-shrink")
	}
	h.must("resize", url, "200M", "--allow-shrink")
	h.must("resize", url, "320M")
	dev = h.add(url)
	mustBeOf(t, dev, 320*mib)
	run(t, "cmp", "-n", strconv.Itoa(mib), "-i", strconv.Itoa(300*mib)+":0", dev, "/dev/zero")
	fsck(t, "ext4", dev)
	unmount = mounted(t, dev, dir)
	checkFiles(t, files, sums)
	checkFiles(t, filepath.Join(dir, "more"), more)
	unmount()
	h.del(dev)
	if out := h.must("check", url, "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
	if lines := kernelErrors(t, dev); len(lines) > 0 {
		t.Errorf("kernel: %q", lines)
	}
}
