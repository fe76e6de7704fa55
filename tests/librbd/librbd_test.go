//go:build lab

package librbd_test

import (
	"bytes"
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
		h.awaitClient("fio")
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
	h.awaitClient("fio")
	if out, err := h.runs("qemu-img", "snapshot", "-a", "none", h.spec("vm1")); err == nil {
		t.Errorf("rolled back under fio: %s", out)
	}
	time.Sleep(time.Second)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	h.await("fio's handle stays", 15*time.Second, func() bool { return !strings.Contains(h.clients(), "fio") })
	h.awaitDetached()
	h.mustCheck("vm1")
}
