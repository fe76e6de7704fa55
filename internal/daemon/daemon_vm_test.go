//go:build ublk

// Tests against a real kernel: they need root and ublk_drv, and TMPDIR on a disk.
// Build them with "go test -c -tags ublk ./internal/daemon" and run the binary on
// such a machine, or in a virtual machine: scripts/vm -- ./daemon.test.

package daemon

import (
	"bytes"
	"os/exec"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// newVMHost is newHost on the real kernel.
func newVMHost(t *testing.T, w *world) *host {
	t.Helper()
	h := w.newHost()
	h.openKernel, h.kern = h.openDriver, nil
	return h
}

// TestVMPanic: reactors die one after the other under a device in use, whose
// user notices nothing but the time it takes.
func TestVMPanic(t *testing.T) {
	w := newWorld(t)
	h := newVMHost(t, w)
	id := h.add(api.AttachRequest{ID: -1, Queues: 2, Depth: 32})
	a := h.find(id)
	load := exec.Command("fio", "--name=x", "--filename="+a.name(), "--direct=1", "--ioengine=libaio", "--iodepth=16",
		"--rw=randwrite", "--bsrange=4k-128k", "--size=48m", "--io_size=200m", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=128", "--allow_file_create=0",
		"--time_based", "--runtime=15")
	var out bytes.Buffer
	load.Stdout, load.Stderr = &out, &out
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	const panics = 5
	for i := range panics {
		time.Sleep(1500 * time.Millisecond)
		dk := a.getDisk()
		if dk == nil {
			h.await(id, api.StateActive)
			dk = a.getDisk()
		}
		dk.reactor.Post(func() { panic("test") })
		<-dk.reactor.Done()
		if im := h.await(id, api.StateActive); im.Restarts != i+1 {
			t.Errorf("%d restarts, want %d", im.Restarts, i+1)
		}
	}
	if err := load.Wait(); err != nil {
		t.Errorf("fio: %v\n%s", err, out.String())
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Error(err)
	}
}

// TestVMHalfMade: a daemon died between adding a device and starting it.
func TestVMHalfMade(t *testing.T) {
	w := newWorld(t)
	h := newVMHost(t, w)
	id := h.add(api.AttachRequest{ID: 9})
	a := h.find(id)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	k, err := h.kernel()
	if err != nil {
		t.Fatal(err)
	}
	dev, err := k.Add(t.Context(), deviceParams(a.record()))
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil { // as the daemon's death does
		t.Fatal(err)
	}
	info, err := k.Info(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("added, not started: %+v", info)
	if !h.owns(a.record(), info) {
		t.Error("a device that was added is not known as this daemon's")
	}
	if err := k.Delete(t.Context(), id); err != nil {
		t.Error(err)
	}
}
