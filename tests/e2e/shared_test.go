//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// inLibrary starts a program that uses librbd.
func (h *host) inLibrary(store string, options []string, program ...string) *process {
	h.t.Helper()
	args := append(h.common(), "run", "--store", store)
	args = append(append(append(args, options...), "--"), program...)
	return begin(h.t, []string{"LSD_DEBUG=1"}, filepath.Join(*binDir, "lsdctl"), args...)
}

// begin starts a command, which does not outlive the test.
func begin(t testing.TB, env []string, name string, args ...string) *process {
	t.Helper()
	p, err := spawn(env, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

// onDisk is qemu-io with these commands, by way of librbd.
func onDisk(commands ...string) []string {
	args := []string{"qemu-io", "-f", "raw", "-t", "none"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return append(args, "rbd:any/disk")
}

// readUntil reads through one handle, which is open read-only, until it finds something else.
const readUntil = `
import rados, rbd, time
with rados.Rados(conffile='') as cluster, cluster.open_ioctx('any') as io, rbd.Image(io, 'disk', read_only=True) as image:
    assert image.read(80 << 20, 4096) == b'\5' * 4096
    end = time.time() + 50
    while image.read(80 << 20, 4096) != b'\6' * 4096:
        assert time.time() < end, 'error: it stays as it was'
        time.sleep(.1)
`

// ok fails the test unless a process of inLibrary ends well.
func (p *process) ok(t testing.TB) {
	t.Helper()
	r := p.wait(time.Minute)
	if r.failed != nil || strings.Contains(r.stdout+r.stderr, "failed") || strings.Contains(r.stdout+r.stderr, "error") {
		t.Fatalf("%v\n%s%s", r.err(), r.stdout, r.stderr)
	}
}

// awaitLibrary waits until an image is open by so many handles, at least.
func (h *host) awaitLibrary(n int) {
	h.t.Helper()
	eventually(h.t, 30*time.Second, "librbd's clients", func() bool {
		l := h.list()
		return len(l) == 1 && len(l[0].Clients) >= n
	})
}

// TestShared: programs that speak librbd write beside a block device where both say --shared, also
// while the daemon is killed, and are refused where they do not; a device comes to programs that
// write, and to those that only read, under their handles.
func TestShared(t *testing.T) {
	clearKernelLog(t)
	h := newHost(t, "shared")
	store := storeURL(t)
	url := store + "/disk"
	h.create(url, "256M")
	dev := h.add(url, "--shared")
	if !h.status(dev).Shared {
		t.Error("it is not shared")
	}
	shared := []string{"--shared"}
	h.inLibrary(store, shared, onDisk("write -P 1 0 1M", "flush")...).ok(t)
	qemuIO(t, dev, "read -P 1 0 1M", "write -P 2 512k 512k")
	h.inLibrary(store, shared, onDisk("read -P 1 0 512k", "read -P 2 512k 512k", "write -P 3 1000 100")...).ok(t)
	qemuIO(t, dev, "read -P 1 0 1000", "read -P 3 1000 100", "read -P 1 1100 500k")
	r := h.inLibrary(store, nil, onDisk("write -P 9 0 4k")...).wait(time.Minute)
	if out := r.stdout + r.stderr; r.code == 0 || !strings.Contains(out, "busy") || !strings.Contains(out, "lsdctl run --shared") || !strings.Contains(out, dev) {
		t.Errorf("a program that does not share: status %d, %s", r.code, out)
	}
	h.refused(append(h.addArgs(url, "--shared"), "--read-only"), "--shared is for an image that can be written to")

	// Both write at once, each its half, and parts of the same sectors.
	lib := h.inLibrary(store, shared, append([]string{"fio", "--name=x", "--ioengine=rbd", "--pool=any", "--rbdname=disk", "--clientname=admin", "--offset=1M"}, mixed(1, "8M")...)...)
	stripes := h.inLibrary(store, shared, onDisk(strings.Split("sleep 3000"+strings.Repeat(";write -P 5 1000 24", 100), ";")...)...)
	h.awaitLibrary(2)
	direct := begin(t, nil, "fio", append([]string{"--name=x", "--filename=" + dev, "--direct=1", "--ioengine=libaio", "--offset=128M"}, mixed(2, "8M")...)...)
	h.crash()
	for i := range 4 {
		qemuIO(t, dev, fmt.Sprintf("write -P %d 0 4k", i), fmt.Sprintf("read -P %d 0 1000", i), fmt.Sprintf("read -P %d 1024 3k", i))
	}
	stripes.ok(t)
	for _, p := range []*process{lib, direct} {
		if r := p.wait(2 * time.Minute); r.err() != nil {
			t.Fatalf("%v\n%s", r.err(), h.logTail())
		}
	}
	h.awaitActive(dev)
	fio(t, dev, time.Minute, mixed(1, "8M", "--offset=1M", "--verify_only")...)

	open := h.inLibrary(store, shared, onDisk("write -P 7 64M 4k", "sleep 4000", "read -P 7 64M 4k")...)
	h.awaitLibrary(1)
	h.refused([]string{"del", dev}, "in use by process .*qemu-io")
	open.ok(t)
	h.del(dev)

	// The device comes to a program that writes.
	open = h.inLibrary(store, shared, onDisk("write -P 3 64M 64k", "sleep 8000", "read -P 4 64M 4k", "read -P 3 65540k 60k", "write -P 5 80M 4k")...)
	h.awaitLibrary(1)
	h.refused(h.addArgs(url), "in use by process .*qemu-io.*--shared")
	dev = h.add(url, "--shared")
	qemuIO(t, dev, "read -P 3 64M 64k", "write -P 4 64M 4k")
	open.ok(t)
	qemuIO(t, dev, "read -P 5 80M 4k")
	h.del(dev)

	// And to one that only reads, with none of this.
	open = h.inLibrary(store, nil, "/usr/bin/python3", "-c", readUntil)
	h.awaitLibrary(1)
	dev = h.add(url)
	qemuIO(t, dev, "write -P 6 80M 4k")
	open.ok(t)
	h.del(dev)
	if e := kernelErrors(t, dev); len(e) > 0 {
		t.Errorf("the kernel says: %q", e)
	}
}
