//go:build lab

package librbd_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fio runs fio's rbd engine on an image.
func (h *host) fio(image string, args ...string) {
	h.t.Helper()
	h.run(h.fioArgs(image, args...)...)
}

func (h *host) fioArgs(image string, args ...string) []string {
	return append([]string{"fio", "--name=x", "--ioengine=rbd", "--clientname=admin", "--pool=" + h.pool, "--rbdname=" + image, "--randrepeat=0"}, args...)
}

// TestFio: what fio writes it reads again, whatever the sizes of blocks, in both ways of taking
// completions, with trims in between.
func TestFio(t *testing.T) {
	verify := []string{"--size=48m", "--verify=crc32c", "--verify_fatal=1", "--iodepth=32"}
	onStores(t, func(t *testing.T, h *host) {
		h.lsdctl("create", h.image("vm1"), "--size", "256M", "--block-size", "512")
		for _, c := range []struct {
			name string
			args []string
		}{
			{"4k", []string{"--rw=randwrite", "--bs=4k"}},
			{"sizes", []string{"--rw=randwrite", "--bsrange=512-1m", "--bs_unaligned=0", "--blockalign=512"}},
			{"bytes", []string{"--rw=randwrite", "--bsrange=513-70001", "--bs_unaligned=1", "--size=8m", "--iodepth=8"}},
			{"busy poll", []string{"--rw=randwrite", "--bs=16k", "--busy_poll=1"}},
			{"trims", []string{"--rw=randtrimwrite", "--bs=64k"}},
			{"sequential", []string{"--rw=write", "--bs=1m"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				h.fio("vm1", append(append([]string{}, verify...), c.args...)...)
			})
		}
		h.mustCheck("vm1")
	})
}

// TestQEMU: QEMU's tools make an image, bring data in and out, resize it, and make, roll back to
// and remove snapshots.
func TestQEMU(t *testing.T) {
	onStores(t, func(t *testing.T, h *host) {
		raw := filepath.Join(h.dir, "raw")
		data := make([]byte, 24<<20)
		if _, err := rand.Read(data[4<<20 : 9<<20]); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(raw, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := h.runs("qemu-img", "info", h.spec("none")); err == nil || !strings.Contains(err.Error(), "No such file or directory") {
			t.Errorf("an image that is not there: %q, %v", out, err)
		}
		vm := h.spec("vm1")
		h.run("qemu-img", "create", "-f", "raw", vm, "24M")
		h.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, vm)
		h.run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, vm)
		h.run("qemu-img", "snapshot", "-c", "before", vm)
		h.run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", "-c", "write -P 9 12345 777", "-c", "read -P 9 12345 777", "-c", "flush", vm)
		if out, err := h.runs("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, vm); err == nil {
			t.Errorf("nothing has changed: %s", out)
		}
		if out := h.run("qemu-img", "snapshot", "-l", vm); !strings.Contains(out, "before") {
			t.Errorf("the snapshot is not listed: %q", out)
		}
		h.run("qemu-img", "snapshot", "-a", "before", vm)
		h.run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, vm)
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
		h.mustCheck("vm1")
		// What is empty is passed over, and nothing else, whether it has reached the store or not.
		h.run("qemu-io", "-f", "raw", "-c", "write -P 5 30M 64k", "-c", "discard 0 1M", vm)
		if out := h.run("qemu-img", "map", "--output=json", vm); !strings.Contains(out, `"start": 16777216, "length": 8388608, "depth": 0, "present": true, "zero": true`) {
			t.Errorf("map: %s", out)
		}
		h.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", vm, back+".qcow2")
		h.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", vm, back+".qcow2")
		h.run("qemu-io", "-f", "raw", "-c", "write 0 1M", vm)
		h.lsdctl("rm", h.image("vm1")) // though it is attached for a little longer
	})
}

// TestDaemonKilled: fio goes on and finds all that it has written, though the daemon is killed
// again and again.
func TestDaemonKilled(t *testing.T) {
	onStores(t, func(t *testing.T, h *host) {
		h.lsdctl("create", h.image("vm1"), "--size", "256M")
		cmd := h.command(t.Context(), h.fioArgs("vm1", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=256m", "--io_size=8g", "--time_based=1", "--runtime=12",
			"--verify=crc32c", "--verify_fatal=1", "--verify_backlog=2048")...)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for range 3 {
			time.Sleep(2 * time.Second)
			h.stop(syscall.SIGKILL)
			time.Sleep(300 * time.Millisecond)
			h.start()
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("fio: %v: %s", err, said.String())
			}
		case <-time.After(2 * time.Minute):
			_ = cmd.Process.Kill()
			t.Errorf("fio hangs: %s", said.String())
		}
		h.mustCheck("vm1")
	})
}

// TestClientKilled: the death of a client frees its handle at once.
func TestClientKilled(t *testing.T) {
	h := newHost(t, "file")
	h.lsdctl("create", h.image("vm1"), "--size", "64M")
	cmd := h.command(t.Context(), h.fioArgs("vm1", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=64m", "--time_based=1", "--runtime=60")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	clients := func() string {
		list := h.attached()
		if len(list) == 0 {
			return "none"
		}
		return fmt.Sprint(list[0].Clients)
	}
	await := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(15 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: clients are %s", what, clients())
			}
		}
	}
	await("fio does not open it", func() bool { return strings.Contains(clients(), "fio") })
	if out, err := h.runs("qemu-img", "snapshot", "-a", "none", h.spec("vm1")); err == nil {
		t.Errorf("rolled back under fio: %s", out)
	}
	time.Sleep(time.Second)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	await("fio's handle stays", func() bool { return !strings.Contains(clients(), "fio") })
	h.awaitDetached()
	h.mustCheck("vm1")
}
