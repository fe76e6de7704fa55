package main

import (
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// TestResizeCommand: an image that nobody has becomes larger, and smaller if that is allowed.
func TestResizeCommand(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1G")
	size := func(want uint64) {
		t.Helper()
		if info := printed[engine.Info](t, "info", url, "--json"); info.Size != want || info.Owner != nil {
			t.Errorf("%+v, want %d bytes", info, want)
		}
	}
	if out := must(t, "resize", url, "2G"); out != url+" has 2 GiB now, it had 1 GiB\n" {
		t.Errorf("resize: %q", out)
	}
	size(2 << 30)
	if out := must(t, "resize", url, "2G"); out != url+" has 2 GiB already\n" {
		t.Errorf("resize to what it has: %q", out)
	}
	if _, err := lsdctl(t, "resize", url, "1G"); err == nil || err.Error() != url+" has 2 GiB, and would lose what is beyond 1 GiB: make its file system smaller first, then say --allow-shrink" {
		t.Errorf("made smaller without leave: %v", err)
	}
	if _, err := lsdctl(t, "resize", url, "1000", "--allow-shrink"); err == nil || !strings.Contains(err.Error(), "is not a multiple of the block size 4096") {
		t.Errorf("a size that cannot be: %v", err)
	}
	size(2 << 30)
	if got := printed[resized](t, "resize", url, "512M", "--allow-shrink", "--json"); got != (resized{Image: url, Size: 512 << 20, Before: 2 << 30}) {
		t.Errorf("resize --json: %+v", got)
	}
	size(512 << 20)
	must(t, "resize", url, "64T")
	size(64 << 40)
	must(t, "resize", url, "4096", "--allow-shrink")
	size(4096)
	if out := must(t, "check", url, "--deep"); !strings.Contains(out, "clean, 0 data objects") {
		t.Errorf("check: %s", out)
	}
}

// TestResizeAttached: one that is attached elsewhere becomes larger, and not smaller; what
// this host has attached is its daemon's to resize.
func TestResizeAttached(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1G")
	owned(t, url)
	if out := must(t, "resize", url, "2G"); out != url+" has 2 GiB now, it had 1 GiB\nbusy, which has it attached, finds that when it renews its lease, within 5 seconds\n" {
		t.Errorf("resize: %q", out)
	}
	if _, err := lsdctl(t, "resize", url, "1G", "--allow-shrink"); err == nil || !strings.Contains(err.Error(), "is attached by busy: make it smaller there") {
		t.Errorf("made smaller: %v", err)
	}
	info := printed[engine.Info](t, "info", url, "--json")
	d := newStubDaemon(t)
	d.attach(api.Image{ID: 3, Device: "/dev/ublkb3", URL: url, ImageID: info.ID})
	_, _ = lsdctlWith(t, d.socket, nil, "resize", url, "3G")
	if !d.was("POST /v1/images/3/resize") {
		t.Error("the daemon was not asked")
	}
	if info := printed[engine.Info](t, "info", url, "--json"); info.Size != 2<<30 {
		t.Errorf("resized beside the daemon: %+v", info)
	}
}
