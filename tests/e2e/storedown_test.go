//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"golang.org/x/sys/unix"
)

// outage makes a store that can be made unable to take writes, and functions to
// do that and to end it. For rados the OSD is stopped; for file the disk is full: as
// what replaces something frees a block, a superblock may still find one, until begin is
// called again.
func outage(t *testing.T) (store string, begin, end func()) {
	if *storeKind == "rados" {
		up := true
		t.Cleanup(func() {
			if !up {
				askHost(t, "ceph start-osd")
			}
		})
		return storeURL(t), func() { up = false; askHost(t, "ceph stop-osd") }, func() { askHost(t, "ceph start-osd"); up = true }
	}
	dir := smallDisk(t, "small", "1G")
	ballast := filepath.Join(dir, "ballast")
	return "file://" + dir + "/store", func() {
			f, err := os.OpenFile(ballast, os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for n := int64(64 << 20); n >= 4096; n /= 2 {
				for err = nil; err == nil; {
					at, _ := f.Seek(0, io.SeekEnd)
					err = unix.Fallocate(int(f.Fd()), 0, at, n)
				}
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
			}
		}, func() {
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
		}
}

// TestStoreDown: while the store takes nothing, writes go on until the log is
// full, then wait; reads of what is local go on; afterwards nothing is lost.
func TestStoreDown(t *testing.T) {
	clearKernelLog(t)
	store, begin, end := outage(t)
	h := newHost(t, "outage")
	url := store + "/disk"
	h.create(url, "1G")
	// Before the outage all puts are to be in time, of a guest that is emulated as well.
	dev := h.add(url, "--batch-age", "500ms", "--store-timeout", "8s")
	plan := stampPlan{Seed: 6, Slots: 64}
	s := startStamps(t, dev, plan)
	s.awaitWrites(200, time.Minute)
	im := h.awaitStatus(dev, time.Minute, "destage works", func(im api.Image) bool { return isActive(im) && im.Stats.PutCount > 0 })
	if im.Stats.StoreDown || im.StoreDownSince != nil {
		t.Errorf("before the outage the store is said to be down: %+v", im)
	}

	begin()
	s.awaitWrites(100, time.Minute)
	im = h.awaitStatus(dev, 2*time.Minute, "it says that the store is down", func(im api.Image) bool { return isActive(im) && im.Stats.StoreDown })
	if im.Stats.StoreErrors == 0 || im.Stats.LastStoreError == "" || !advises(im, "store") {
		t.Errorf("the store is down, and the status does not say why or what to do: %+v %q", im.Stats, im.Advice)
	}

	im = h.awaitStatus(dev, 5*time.Minute, "the log is full and writes wait", func(im api.Image) bool {
		return isActive(im) && im.Stats.Waiting > 0 && im.Stats.Stalled > 1
	})
	// As the log fills, writes slow down before they stop.
	before := s.acked()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
		time.Sleep(2 * time.Second)
		if now := s.acked(); now != before {
			before = now
			continue
		}
		break
	}
	im = h.awaitStatus(dev, time.Minute, "the log is full", isActive)
	if im.Stats.LogUsed < im.Stats.LogSize*3/4 || im.Stats.Dirty == 0 || im.Stats.Stalls == 0 || im.StoreDownSince == nil || !advises(im, "log is full") {
		t.Errorf("writes wait, and the status does not tell that the log is full: %+v %q", im.Stats, im.Advice)
	}
	out := h.must("status", dev)
	for _, want := range []string{"down since", "wait for room in the log", "->"} {
		if !strings.Contains(out, want) {
			t.Errorf("lsdctl status does not say %q:\n%s", want, out)
		}
	}
	for w, k := range before {
		r := plan.tool(t, "read", "-dev", dev, "-writer", fmt.Sprint(w), "-write", fmt.Sprint(k)).wait(20 * time.Second)
		if r.err() != nil {
			t.Errorf("a read of what is in the log: %v", r.err())
		}
	}
	h.refused([]string{"del", dev, "--timeout", "1s"}, "in use|open|holds|busy")
	time.Sleep(time.Second)
	if now := s.acked(); now != before {
		t.Errorf("writes were acknowledged with a full log: %v, %v before", now, before)
	}
	if !s.running() {
		t.Fatalf("the writer ended: %v", s.wait(0).err())
	}

	end()
	s.awaitWrites(100, 2*time.Minute)
	acked := s.stop()
	h.must("flush", dev)
	im = h.awaitStatus(dev, time.Minute, "all is well again", func(im api.Image) bool {
		return isActive(im) && !im.Stats.StoreDown && im.Stats.Dirty == 0 && im.Stats.Waiting == 0 && im.StoreDownSince == nil
	})
	if im.Stats.ReadErrors != 0 || im.Stats.LogError != "" || len(im.Advice) != 0 {
		t.Errorf("after the outage: %+v %q", im.Stats, im.Advice)
	}
	if got := stamps(t, dev, plan); got != acked {
		t.Errorf("the disk holds %v, acknowledged were %v", got, acked)
	}
	h.storeHas(url, dev, plan, acked)
}

// storeHas detaches a device and checks that all that was acknowledged comes back
// from the store, and that the kernel has reported no error.
func (h *host) storeHas(url, dev string, plan stampPlan, acked vector) {
	h.t.Helper()
	h.del(dev)
	dev = h.add(url)
	if got := stamps(h.t, dev, plan); got != acked {
		h.t.Errorf("from the store: %v, acknowledged were %v", got, acked)
	}
	h.del(dev)
	if e := kernelErrors(h.t, dev); len(e) > 0 {
		h.t.Errorf("the kernel reports: %q", e)
	}
}

// TestStoreKilled: the OSD is killed and comes back, as another one at the same
// address. The cluster has not heard of the first one's end then, and whoever does
// not ask it again never finds the second one.
func TestStoreKilled(t *testing.T) {
	if *storeKind != "rados" {
		t.Skip("a file store has no server that could be killed")
	}
	clearKernelLog(t)
	h := newHost(t, "killed")
	url := storeURL(t) + "/disk"
	h.create(url, "1G")
	const lease = 4 * time.Second
	dev := h.add(url, "--lease", lease.String(), "--batch-age", "500ms", "--store-timeout", "2s")
	plan := stampPlan{Seed: 13, Slots: 32, Pause: 500}
	s := startStamps(t, dev, plan)
	s.awaitWrites(200, time.Minute)
	t.Cleanup(func() { askHost(t, "ceph start-osd") })
	for _, down := range []time.Duration{0, 2 * lease} {
		askHost(t, "ceph kill-osd")
		time.Sleep(down)
		askHost(t, "ceph start-osd")
		// With what is left of a lease writes go on even without a store.
		began := time.Now()
		puts := h.awaitActive(dev).Stats.PutCount
		h.awaitStatus(dev, time.Minute, "the lease is renewed and objects are put", func(im api.Image) bool {
			return isActive(im) && !im.Stats.StoreDown && im.Stats.LeaseLeft > 0 && im.Stats.PutCount > puts
		})
		time.Sleep(lease)
		s.awaitWrites(100, time.Minute)
		t.Logf("the OSD was away for %v; all is well after %v", down, time.Since(began).Round(time.Millisecond))
	}
	acked := s.stop()
	h.must("flush", dev)
	if im := h.status(dev); im.Stats.ReadErrors != 0 || im.Stats.LogError != "" {
		t.Errorf("afterwards: %+v", im.Stats)
	}
	h.storeHas(url, dev, plan, acked)
}

// TestDelStoreDown: while a store is away and writes wait for it, the daemon can be
// told to end, and the device to go; the writers get errors, and what was
// acknowledged stays in the log.
func TestDelStoreDown(t *testing.T) {
	store, begin, end := outage(t)
	h := newHost(t, "gone")
	url := store + "/disk"
	h.create(url, "1G")
	dev := h.add(url, "--lease", "4s", "--batch-age", "500ms", "--store-timeout", "2s")
	plan := stampPlan{Seed: 14, Slots: 64}
	s := startStamps(t, dev, plan)
	s.awaitWrites(200, time.Minute)
	begin()
	stalled := func() {
		t.Helper()
		for last, since, began := s.acked(), time.Now(), time.Now(); time.Since(since) < 5*time.Second; time.Sleep(100 * time.Millisecond) {
			if now := s.acked(); now != last {
				last, since = now, time.Now()
			}
			if time.Since(began) > 3*time.Minute {
				t.Fatal("writes go on without a store")
			}
		}
	}
	stalled()
	h.terminate() // and the supervisor
	h.start()
	h.awaitStatus(dev, time.Minute, "the device is taken up", func(im api.Image) bool { return im.State != "" })
	if !s.running() {
		t.Fatalf("the writer ended: %v", s.wait(0).err())
	}

	end()
	s.awaitWrites(50, 2*time.Minute)
	begin()
	stalled()
	began := time.Now()
	if r := h.ctl("del", dev, "--force", "--timeout", "3s"); r.failed != nil || !strings.Contains(r.stderr, ".log is kept") {
		t.Errorf("lsdctl del does not say that the log is kept: %v\n%s", r.err(), r.stderr)
	}
	took := time.Since(began).Round(time.Millisecond)
	t.Logf("the device is gone after %v", took)
	if took > 20*time.Second {
		t.Errorf("that is long, with --timeout 3s")
	}
	if r := s.wait(time.Minute); r.failed == nil || !strings.Contains(r.stderr, "input/output error") {
		t.Errorf("the writer ended with %v", r.err())
	}
	acked := s.acked()
	end()
	dev = h.add(url)
	atLeast(t, "what was acknowledged", stamps(t, dev, plan), acked)
	h.del(dev)
}

// advises reports whether one of the status's advices speaks of something.
func advises(im api.Image, of string) bool {
	for _, a := range im.Advice {
		if strings.Contains(a, of) {
			return true
		}
	}
	return false
}

// TestFullPool: while the pool is full an image keeps its lease, since renewals take no
// room; when there is room again all that was acknowledged gets there.
func TestFullPool(t *testing.T) {
	if *storeKind != "rados" {
		t.Skip("a full file system is TestStoreDown's")
	}
	clearKernelLog(t)
	h := newHost(t, "fullpool")
	url := storeURL(t) + "/disk"
	h.create(url, "1G")
	const lease = 10 * time.Second
	dev := h.add(url, "--batch-age", "500ms", "--store-timeout", "2s", "--lease", lease.String())
	plan := stampPlan{Seed: 9, Slots: 64}
	s := startStamps(t, dev, plan)
	s.awaitWrites(100, time.Minute)

	askHost(t, "ceph full")
	full := true
	defer func() {
		if full {
			askHost(t, "ceph room")
		}
	}()
	im := h.awaitStatus(dev, time.Minute, "it says that the store is full", func(im api.Image) bool {
		return isActive(im) && im.Stats.StoreDown && strings.Contains(im.Stats.LastStoreError, "no space left")
	})
	if !advises(im, "store") {
		t.Errorf("the status does not say what to do: %q", im.Advice)
	}
	time.Sleep(2 * lease)
	im = h.awaitStatus(dev, time.Minute, "it is active", isActive)
	if im.Stats.LeaseLeft <= 0 || !im.Stats.StoreDown {
		t.Errorf("after two leases the store is down: %v, and the lease is good for %v", im.Stats.StoreDown, im.Stats.LeaseLeft)
	}
	askHost(t, "ceph room")
	full = false
	s.awaitWrites(100, time.Minute)
	acked := s.stop()
	h.must("flush", dev)
	im = h.awaitStatus(dev, time.Minute, "all is well again", func(im api.Image) bool {
		return isActive(im) && !im.Stats.StoreDown && im.Stats.Dirty == 0 && im.Stats.Waiting == 0
	})
	if im.Stats.ReadErrors != 0 || len(im.Advice) != 0 {
		t.Errorf("afterwards: %+v %q", im.Stats, im.Advice)
	}
	h.storeHas(url, dev, plan, acked)
}
