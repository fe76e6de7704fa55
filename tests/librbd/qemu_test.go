//go:build lab

package librbd_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestQEMU: QEMU's tools make an image, bring data in and out, resize it, and make, roll back to
// and remove snapshots; what they think of it is true.
func TestQEMU(t *testing.T) {
	onStores(t, testQEMU)
}

// TestNewQEMU is TestQEMU with a QEMU that is newer than the one that is installed.
func TestNewQEMU(t *testing.T) {
	h := newHost(t, "file")
	h.tools = filepath.Join(strings.TrimSpace(h.shell("../../scripts", "./fetch-qemu")), "usr/bin")
	if out := h.run("qemu-img", "--version"); strings.HasPrefix(out, "qemu-img version 7.") {
		t.Fatalf("that is no newer one: %s", out)
	}
	testQEMU(t, h)
}

func testQEMU(t *testing.T, h *host) {
	if out, err := h.runs("qemu-img", "info", h.spec("none")); err == nil || !strings.Contains(err.Error(), "No such file or directory") {
		t.Errorf("an image that is not there: %q, %v", out, err)
	}
	raw, data := h.sparse()
	vm := h.spec("vm1")
	h.run("qemu-img", "create", "-f", "raw", vm, "24M")
	h.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, vm)
	h.same(raw, "vm1")
	h.mapped("vm1", data)
	h.run("qemu-img", "snapshot", "-c", "before", vm)
	h.io(vm, "write -P 7 1M 3M", "write -P 9 12345 777", "read -P 9 12345 777", "flush")
	if out, err := h.runs("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, vm); err == nil {
		t.Errorf("nothing has changed: %s", out)
	}
	if out := h.run("qemu-img", "snapshot", "-l", vm); !strings.Contains(out, "before") {
		t.Errorf("the snapshot is not listed: %q", out)
	}
	h.run("qemu-img", "snapshot", "-a", "before", vm)
	h.same(raw, "vm1")
	h.run("qemu-img", "resize", "-f", "raw", vm, "32M")
	if out := h.run("qemu-img", "info", vm); !strings.Contains(out, "32 MiB") {
		t.Errorf("not resized: %s", out)
	}
	h.run("qemu-img", "snapshot", "-d", "before", vm)
	back := filepath.Join(h.dir, "back")
	h.run("qemu-img", "convert", "-f", "raw", "-O", "raw", vm, back)
	got, err := os.ReadFile(back)
	if err != nil || len(got) != 32<<20 || !bytes.Equal(got[:24<<20], data) {
		t.Errorf("what comes back is something else: %d bytes, %v", len(got), err)
	}
	h.passesOver(vm)
	for _, more := range [][]string{{"-w", "--flush-interval=64"}, {"-w", "-s", "65536", "-S", "196608"}, {}} {
		h.run(append(append([]string{"qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "1000", "-d", "32"}, more...), vm)...)
	}
	h.mustCheck("vm1")
	if out, err := h.runs("qemu-img", "check", "-f", "raw", vm); err == nil || !strings.Contains(err.Error(), "does not support checks") {
		t.Errorf("a raw image that is checked: %q, %v", out, err)
	}
	h.io(vm, "write 0 1M")
	h.lsdctl("rm", h.image("vm1")) // though it is attached for a little longer
}

// passesOver ends that what is empty of an image is passed over, and nothing else, whether it has
// reached the store or not.
func (h *host) passesOver(vm string) {
	h.t.Helper()
	h.io(vm, "write -P 5 30M 64k", "discard 0 1M")
	if out := h.run("qemu-img", "map", "--output=json", vm); !strings.Contains(out, `"start": 16777216, "length": 8388608, "depth": 0, "present": true, "zero": true`) {
		h.t.Errorf("map: %s", out)
	}
	copied := filepath.Join(h.dir, "copied.qcow2")
	h.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", vm, copied)
	h.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", vm, copied)
}

// sparse makes a file of 24 MiB with 5 MiB of data in it.
func (h *host) sparse() (path string, data []byte) {
	h.t.Helper()
	data = make([]byte, 24<<20)
	if _, err := rand.Read(data[4<<20 : 9<<20]); err != nil {
		h.t.Fatal(err)
	}
	path = filepath.Join(h.dir, "raw")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path, data
}

// same ends that an image holds what a file does.
func (h *host) same(path, image string) {
	h.t.Helper()
	h.run("qemu-img", "compare", "-f", "raw", "-F", "raw", path, h.spec(image))
}

// mapped ends that what qemu-img takes for holes of an image are, in what it holds, and that it
// tells of every byte.
func (h *host) mapped(image string, data []byte) {
	h.t.Helper()
	var runs []struct {
		Start, Length int
		Data          bool
	}
	if err := json.Unmarshal([]byte(h.run("qemu-img", "map", "--output=json", "-f", "raw", h.spec(image))), &runs); err != nil {
		h.t.Fatal(err)
	}
	at := 0
	for _, r := range runs {
		if r.Start != at || r.Length <= 0 || r.Length > len(data)-at {
			h.t.Fatalf("a run of %d bytes at %d; want one at %d", r.Length, r.Start, at)
		}
		at += r.Length
		if !r.Data && len(bytes.Trim(data[r.Start:at], "\x00")) > 0 {
			h.t.Errorf("no data between %d and %d", r.Start, at)
		}
	}
	if at != len(data) {
		h.t.Errorf("%d bytes are mapped, want %d", at, len(data))
	}
}
