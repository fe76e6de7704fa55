//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lsd-ceph/lsd/internal/api"
)

// freeze stops the daemon where it is, as a debugger or a host in trouble does;
// the block devices and their users go on. thaw lets it go on.
func (h *host) freeze() (thaw func()) {
	h.t.Helper()
	pid := h.pid()
	if pid == 0 {
		h.t.Fatal("no daemon to stop\n" + h.logTail())
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		h.t.Fatal(err)
	}
	thawed := false
	thaw = func() {
		if !thawed {
			thawed = true
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	h.t.Cleanup(thaw)
	return thaw
}

// freezeOutside is freeze at a moment when the daemon is not just replacing an object
// of the store in a directory: it would keep the lock of that, and others would be
// refused, see TestStoppedLock. That is a moment which is rarely met.
func (h *host) freezeOutside(store string) (thaw func()) {
	h.t.Helper()
	dir, isFile := strings.CutPrefix(store, "file://")
	held := ""
	for try := range 50 {
		thaw = h.freeze()
		if !isFile {
			return thaw
		}
		if held = heldLock(h.t, h.pid(), filepath.Join(dir, "locks")); held == "" {
			return thaw
		}
		thaw()
		// Longer and longer: a slow disk takes more than a second to make it durable.
		time.Sleep(time.Duration(30+10*try) * time.Millisecond)
	}
	h.t.Fatalf("the daemon holds a lock of the store all the time, at last %s", held)
	return nil
}

// heldLock returns the path of a file of the directory that the process has locked, or
// nothing. A file is known by its device and inode: the daemon has files on other
// devices locked all the time, and they may have the same inodes.
func heldLock(t testing.TB, pid int, dir string) string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	ours := map[string]string{}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		ours[fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)] = path
	}
	b, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) { // 1: FLOCK ADVISORY WRITE 708 fe:00:262143 0 EOF
		f := strings.Fields(line)
		if len(f) > 5 && f[1] == "FLOCK" && f[4] == strconv.Itoa(pid) && ours[f[5]] != "" {
			return ours[f[5]]
		}
	}
	return ""
}

// settled returns what has been acknowledged once nothing more is.
func (s *stamper) settled() vector {
	s.t.Helper()
	last := s.acked()
	for quiet := 0; quiet < 10; time.Sleep(50 * time.Millisecond) {
		if now := s.acked(); now != last {
			last, quiet = now, 0
		} else {
			quiet++
		}
	}
	return last
}

// TestStoppedOwner: the daemon of an image under load is stopped for longer than
// its lease. While nobody takes the image, that is a pause. When another host does,
// the first one acknowledges nothing from the moment it was stopped, its users get
// errors, and everything that it had acknowledged is either with the new owner, if
// it had been destaged, or in its log, which is refused and can be salvaged. Its
// other images go on.
func TestStoppedOwner(t *testing.T) {
	first, second := newHost(t, "first"), newHost(t, "second")
	store := storeURL(t)
	url := store + "/disk"
	first.create(url, "1G")
	first.create(store+"/other", "1G")
	dev := first.add(url, "--lease", "3s", "--batch-age", "1h")
	other := first.add(store+"/other", "--lease", "3s")
	plan := stampPlan{Seed: 40, Slots: 16, Pause: 500}
	s := startStamps(t, dev, plan)
	beside := startStamps(t, other, stampPlan{Seed: 41, Slots: 16, Pause: 2000})

	thaw := first.freeze()
	time.Sleep(5 * time.Second)
	thaw()
	s.awaitWrites(100, time.Minute)
	beside.awaitWrites(20, time.Minute)

	destaged := s.acked()
	first.must("flush", dev)
	s.awaitWrites(100, time.Minute)
	thaw = first.freezeOutside(store)
	acked := s.settled()
	found := second.add(url, "--lease", "3s", "--force")
	last := stamps(t, found, plan)
	atLeast(t, "what had been destaged", last, destaged)
	atLeast(t, "what was written at all", read(&s.board.Begun), last)
	if last.sum() >= acked.sum() {
		t.Fatalf("%v was acknowledged and %v is in the store: this tests nothing", acked, last)
	}
	branch := stampPlan{Seed: 42, Slots: 16, Base: 800 << 20}
	sb := startStamps(t, found, branch)
	sb.awaitWrites(50, time.Minute)
	branched := sb.stop()

	thaw()
	if r := s.wait(time.Minute); r.failed == nil || !strings.Contains(r.stderr, "input/output error") {
		t.Errorf("the writer on the first host ended with %v", r.err())
	}
	if now := s.acked(); now != acked {
		t.Errorf("acknowledged after another host had taken the image: %v, %v before", now, acked)
	}
	im := first.awaitStatus(dev, time.Minute, "it is fenced", func(im api.Image) bool { return im.State == "fenced" })
	if !strings.Contains(im.Error, "second") || len(im.Advice) == 0 {
		t.Errorf("the first host does not say who has the image: %q %q", im.Error, im.Advice)
	}
	beside.awaitWrites(50, 2*time.Minute)
	beside.stop()
	if *storeKind == "rados" {
		if b, err := os.ReadFile(second.log); err != nil || !strings.Contains(string(b), "shut out of the store") {
			t.Errorf("the first host's client was not blocklisted (%v):\n%s", err, second.logTail())
		}
	}

	if got := stamps(t, found, plan); got != last {
		t.Errorf("the second host has %v, and had %v", got, last)
	}
	if got := stamps(t, found, branch); got != branched {
		t.Errorf("the second host has %v of its own writes, and had %v", got, branched)
	}
	first.del(dev)
	first.refused(first.addArgs(url, "--force"), "epoch", "never reached the store", "log salvage", im.Log)
	first.must("log", "salvage", im.Log, store+"/salvaged")
	dev = first.add(store + "/salvaged")
	atLeast(t, "what the first host had acknowledged, in its log", stamps(t, dev, plan), acked)
	if got := stamps(t, dev, branch); got.sum() != 0 {
		t.Errorf("the salvaged image has %v of the other history", got)
	}
	first.del(dev)
	first.del(other)
	second.del(found)
}

// holdLocks is the main function of a process that takes all locks of the mutable
// objects of a store in a directory and is stopped then.
func holdLocks(dir string) error {
	for i := range 64 {
		f, err := os.OpenFile(filepath.Join(dir, "locks", fmt.Sprintf("%02x", i)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			return err
		}
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(time.Hour) // not every thread stops at once
	return nil
}

// TestStoppedLock: a process is stopped while it has the superblock of an image
// locked in a store in a directory. The owner cannot renew its lease, and says whom it
// waits for; another host is refused with one line that says so; when that process
// is ended all goes on.
func TestStoppedLock(t *testing.T) {
	if *storeKind != "file" {
		t.Skip("only the store in a directory has locks")
	}
	first, second := newHost(t, "first"), newHost(t, "second")
	store := storeURL(t)
	url := store + "/disk"
	first.create(url, "1G")
	dev := first.add(url, "--lease", "3s", "--store-timeout", "2s")
	plan := stampPlan{Seed: 43, Slots: 16, Pause: 500}
	s := startStamps(t, dev, plan)
	s.awaitWrites(50, time.Minute)

	holder := plan.tool(t, "hold", "-dev", strings.TrimPrefix(store, "file://"))
	t.Cleanup(holder.kill)
	eventually(t, time.Minute, "a process that is stopped", func() bool {
		if !holder.running() {
			t.Fatal(holder.wait(0).err())
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", holder.cmd.Process.Pid))
		return strings.Contains(string(b), ") T ")
	})
	if heldLock(t, holder.cmd.Process.Pid, filepath.Join(strings.TrimPrefix(store, "file://"), "locks")) == "" {
		t.Fatal("the locks that it has are not found: TestStoppedOwner would miss them, too")
	}
	who := fmt.Sprintf(`which process %d \(.*\) holds: it is stopped: end it`, holder.cmd.Process.Pid)
	first.awaitStatus(dev, time.Minute, "the lease is over, and it says why", func(im api.Image) bool {
		return isActive(im) && im.Stats.LeaseLeft == 0 && regexp.MustCompile(who).MatchString(im.Stats.LastStoreError)
	})
	second.refused(second.addArgs(url, "--lease", "3s", "--force"), who)

	holder.kill()
	s.awaitWrites(100, 2*time.Minute)
	acked := s.stop()
	if got := stamps(t, dev, plan); got != acked {
		t.Errorf("the disk holds %v, acknowledged were %v", got, acked)
	}
	first.del(dev)
	dev = second.add(url)
	if got := stamps(t, dev, plan); got != acked {
		t.Errorf("on the other host: %v, acknowledged were %v", got, acked)
	}
	second.del(dev)
}
