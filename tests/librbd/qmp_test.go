//go:build lab

package librbd_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDaemonize: a QEMU that goes into the background has its disk there.
func TestDaemonize(t *testing.T) {
	onStores(t, func(t *testing.T, h *host) {
		h.lsdctl("create", h.image("vm1"), "--size", "64M")
		monitor, pidfile := filepath.Join(h.dir, "qmp"), filepath.Join(h.dir, "pid")
		h.run(append(append(machine("-S", "-daemonize"), h.disk("vm1")...), "-pidfile", pidfile, "-qmp", "unix:"+monitor+",server=on,wait=off")...)
		text, err := os.ReadFile(pidfile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
		q := dialQMP(t, monitor, func() error { return syscall.Kill(pid, 0) })
		h.io(q.export("vm1", h.dir), "write -P 7 4k 1M", "flush")
		q.do("quit", nil)
		for end := time.Now().Add(time.Minute); !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("QEMU does not end")
			}
		}
		h.io(h.spec("vm1"), "read -P 7 4k 1M", "read -P 0 0 4k")
		h.mustCheck("vm1")
	})
}

// TestBlockResize: a disk grows under a QEMU that uses it, and shrinks again.
func TestBlockResize(t *testing.T) {
	onStoresLong(t, func(t *testing.T, h *host) {
		h.lsdctl("create", h.image("vm1"), "--size", "64M")
		v := h.qemu("vm", append(machine("-S"), h.disk("vm1")...)...)
		for _, mib := range []uint64{100, 64, 80} {
			v.do("block_resize", map[string]any{"node-name": "vm1", "size": mib << 20})
			if got := v.size("vm1"); got != mib<<20 {
				t.Errorf("QEMU has %d bytes, want %d MiB", got, mib)
			}
			if list := h.attached(); len(list) != 1 || list[0].Size != mib<<20 {
				t.Errorf("the daemon has %+v, want %d MiB", list, mib)
			}
			h.io(h.spec("vm1"), fmt.Sprintf("write -P 9 %dM 1M", mib-1))
		}
		v.quit()
		h.io(h.spec("vm1"), "read -P 9 63M 1M", "read -P 0 64M 15M", "read -P 9 79M 1M")
		h.mustCheck("vm1")
	})
}

// TestMirror: a disk moves to another image while it is written to.
func TestMirror(t *testing.T) {
	onStoresLong(t, func(t *testing.T, h *host) {
		for _, name := range []string{"vm1", "vm2"} {
			h.lsdctl("create", h.image(name), "--size", "64M")
		}
		v := h.qemu("vm", append(machine("-S"), h.disk("vm1")...)...)
		disk := v.export("vm1", h.dir)
		h.io(disk, "write -P 3 0 40M")
		write := func(round int) {
			var commands []string
			for i := range 200 {
				commands = append(commands, fmt.Sprintf("aio_write -P %d %dk 12k", round, (i*7919+round*5)%65000))
			}
			h.io(disk, append(commands, "aio_flush", "flush")...)
		}
		v.do("blockdev-add", h.node("vm2"))
		v.do("blockdev-mirror", map[string]any{"job-id": "mirror", "device": "vm1", "target": "vm2", "sync": "full", "speed": 40 << 20})
		for round := range 5 {
			write(10 + round)
		}
		v.await("BLOCK_JOB_READY")
		write(20)
		v.do("block-job-complete", map[string]any{"device": "mirror"})
		var done struct{ Error string }
		if err := json.Unmarshal(v.await("BLOCK_JOB_COMPLETED"), &done); err != nil || done.Error != "" {
			t.Fatalf("the mirror ends with %+v, %v", done, err)
		}
		h.run("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", h.spec("vm1"), h.spec("vm2"))
		// The disk is the other image now.
		write(30)
		v.quit()
		if out, err := h.runs("qemu-img", "compare", "-f", "raw", "-F", "raw", h.spec("vm1"), h.spec("vm2")); err == nil {
			t.Errorf("what is written after the move still goes to the first image: %s", out)
		}
		h.mustCheck("vm1")
		h.mustCheck("vm2")
	})
}

// TestMigration: another QEMU takes a disk over, with what the first had written.
func TestMigration(t *testing.T) {
	onStoresLong(t, func(t *testing.T, h *host) {
		h.lsdctl("create", h.image("vm1"), "--size", "64M")
		args := append(machine("-S"), h.disk("vm1")...)
		socket := filepath.Join(h.dir, "migrate")
		from, to := h.qemu("from", args...), h.qemu("to", append(args, "-incoming", "unix:"+socket)...)
		h.io(from.export("vm1", h.dir), "write -P 5 0 8M")
		from.do("nbd-server-stop", nil)
		from.migrate(to, socket)
		to.do("cont", nil)
		h.io(to.export("vm1", h.dir), "read -P 5 0 8M", "write -P 6 4M 8M")
		to.quit()
		h.io(h.spec("vm1"), "read -P 5 0 4M", "read -P 6 4M 8M")
		h.mustCheck("vm1")
	})
}

// TestGrows: an image can hold another format of QEMU's, which makes it larger as it is written to.
func TestGrows(t *testing.T) {
	h := newHost(t, "file")
	h.lsdctl("create", h.image("vm1"), "--size", "1M")
	v := h.qemu("vm", machine("-S")...)
	node := h.protocol("vm1")
	node["node-name"] = "vm1"
	v.do("blockdev-add", node)
	v.do("blockdev-create", map[string]any{"job-id": "format", "options": map[string]any{"driver": "qcow2", "file": "vm1", "size": 24 << 20}})
	v.job("format")
	v.quit()
	raw, _ := h.sparse()
	h.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, h.spec("vm1"))
	h.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, h.spec("vm1"))
	h.run("qemu-img", "check", "-f", "qcow2", h.spec("vm1"))
	h.mustCheck("vm1")
	// Made anew it begins with nothing.
	h.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, h.spec("vm2"))
	h.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, h.spec("vm2"))
	h.run("qemu-img", "check", "-f", "qcow2", h.spec("vm2"))
	h.mustCheck("vm2")
}

// job waits until a job has ended, well.
func (q *qmp) job(id string) {
	q.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		var jobs []struct{ ID, Status, Error string }
		if err := json.Unmarshal(q.do("query-jobs", nil), &jobs); err != nil {
			q.t.Fatal(err)
		}
		if len(jobs) != 1 || jobs[0].ID != id || jobs[0].Error != "" || time.Now().After(end) {
			q.t.Fatalf("job %s: %+v", id, jobs)
		}
		if jobs[0].Status == "concluded" {
			return
		}
	}
}
