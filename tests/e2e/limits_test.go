//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The bounds that docs/operations.md gives.
const (
	idleImage    = 2 << 20 // bytes
	imageThreads = 1 + 4   // its reactor; what the kernel may add for its ring
	imageFiles   = 8
	// flusherFlag is PF_MEMALLOC_NOIO (include/linux/sched.h), which is how the
	// kernel keeps PR_SET_IO_FLUSHER.
	flusherFlag = 0x00080000
	reactorNice = "-10"
)

// procStatus returns a number of /proc/PID/status: bytes, or a count.
func procStatus(t testing.TB, pid int, field string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != field+":" {
			continue
		}
		n, err := strconv.Atoi(f[1])
		if err != nil {
			t.Fatal(err)
		}
		if len(f) == 3 {
			n <<= 10 // kB
		}
		return n
	}
	t.Fatalf("/proc/%d/status has no %s", pid, field)
	return 0
}

// TestLimits: many images in one daemon, on real block devices. Their memory is
// locked, all threads are I/O flushers, those that serve disks have their priority,
// threads and descriptors are bounded; and an image that was written to gives its
// memory back when it is idle, and works on.
func TestLimits(t *testing.T) {
	images := pick(8, 40)
	h := newHost(t, "host")
	store := storeURL(t)
	var devs []string
	add := func(i int) {
		url := fmt.Sprintf("%s/disk%d", store, i)
		h.create(url, "1G")
		devs = append(devs, h.add(url, "--batch-age", "500ms"))
	}
	add(0) // with what the first one alone brings: the store's threads, for one
	pid := h.pid()
	rss, threads, files := procStatus(t, pid, "VmRSS"), procStatus(t, pid, "Threads"), descriptors(t, pid)
	for i := range images {
		add(1 + i)
	}
	each := func() int { return (procStatus(t, pid, "VmRSS") - rss) / images }
	attached := each()

	// One program for all: each takes seconds to start in an emulated machine.
	data := func(rw string, args ...string) {
		t.Helper()
		fio(t, strings.Join(devs[1:], ":"), 2*time.Minute, append([]string{"--rw=" + rw, "--bs=512k", "--filesize=8m", fmt.Sprintf("--size=%dm", 8*images),
			"--file_service_type=sequential", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"}, args...)...)
	}
	data("write", "--do_verify=0")
	used := each()
	if used < 8<<20 {
		t.Errorf("an image that was written to has %d bytes: this tests nothing", used)
	}
	if n := procStatus(t, pid, "Threads") - threads; n > images*imageThreads+16 {
		t.Errorf("%d threads more for %d images", n, images)
	}
	if n := descriptors(t, pid) - files; n > images*imageFiles {
		t.Errorf("%d descriptors more for %d images", n, images)
	}
	// What came with the images must be locked as well, but for what the kernel shares.
	if locked, all := procStatus(t, pid, "VmLck"), procStatus(t, pid, "VmSize"); locked < all/10*9 {
		t.Errorf("%d MiB of %d are locked", locked>>20, all>>20)
	}
	if n := flushers(t, pid); n < 1+images {
		t.Errorf("%d threads have a priority, of %d that serve disks", n, 1+images)
	}

	began, idle := time.Now(), used
	for ; idle >= idleImage; idle = each() {
		if time.Since(began) > time.Minute {
			t.Fatalf("an idle image has %d bytes, want less than %d", idle, idleImage)
		}
		time.Sleep(time.Second / 4)
	}
	took := time.Since(began)
	t.Logf("%d images, each: %d KiB attached, %d KiB when written to, %d KiB after %v", images, attached>>10, used>>10, idle>>10, took.Round(time.Second))
	data("read")
	data("randwrite")
	for _, dev := range devs {
		h.del(dev)
	}
}

// descriptors returns how many files a process has open.
func descriptors(t testing.TB, pid int) int {
	t.Helper()
	l, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

// flushers checks that every thread of the process is an I/O flusher, and returns how
// many have the priority of those that serve disks.
func flushers(t testing.TB, pid int) (reactors int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("threads: %v, %v", tasks, err)
	}
	for _, path := range tasks {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything; flags are the seventh field
		// after it, the nice value is the seventeenth (proc(5)).
		i := strings.LastIndexByte(string(b), ')')
		f := strings.Fields(string(b[i+1:]))
		flags, err := strconv.ParseUint(f[6], 10, 64)
		if err != nil || flags&flusherFlag == 0 {
			t.Errorf("%s: flags %#x, %v: no I/O flusher: %s", path, flags, err, b)
		}
		if f[16] == reactorNice {
			reactors++
		}
	}
	return reactors
}
