//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestVerify: what fio has written is what it reads, on the device, after an
// orderly detach, and on another host after this one died with everything in the
// store and its log deleted.
func TestVerify(t *testing.T) {
	h := newHost(t, "verify")
	url := storeURL(t) + "/disk"
	h.create(url, "4G")
	dev := h.add(url, "--lease", "2s")
	size := pick("24M", "256M")
	timeout := 5 * time.Minute
	fio(t, dev, timeout, mixed(1, size)...) // and verify
	log := h.status(dev).Log
	h.del(dev)
	if _, err := os.Stat(log); !os.IsNotExist(err) {
		t.Errorf("lsdctl del has left the write log %s (%v)", log, err)
	}

	dev = h.add(url, "--lease", "2s")
	fio(t, dev, timeout, mixed(1, size, "--verify_only")...)
	// Beside it, so that there is something in the log, too.
	fio(t, dev, timeout, mixed(2, size, "--offset=1G")...)
	h.must("flush", dev)
	im := h.status(dev)
	if im.Stats.Dirty != 0 {
		t.Errorf("%d bytes are dirty after lsdctl flush", im.Stats.Dirty)
	}
	h.die()
	if err := os.Remove(im.Log); err != nil {
		t.Fatal(err)
	}

	other := newHost(t, "elsewhere")
	copyOf := other.add(url, "--force", "--lease", "2s")
	fio(t, copyOf, timeout, mixed(1, size, "--verify_only")...)
	fio(t, copyOf, timeout, mixed(2, size, "--offset=1G", "--verify_only")...)
	if e, _ := filepath.Glob(filepath.Join(other.cache, "*")); len(e) == 0 {
		t.Error("the other host has no log of its own in its cache directory")
	}
	other.del(copyOf)
}
