//go:build lab

package librbd_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTgt: an iSCSI initiator reads and writes an image through tgt, and finds there what QEMU
// has by itself.
func TestTgt(t *testing.T) {
	onStores(t, func(t *testing.T, h *host) {
		vm := h.spec("vm1")
		h.run("qemu-img", "create", "-f", "raw", vm, "64M")
		h.run("qemu-io", "-f", "raw", "-c", "write -P 3 32M 1M", vm)
		const target = "iqn.2026-01.org.example:lsd"
		portal, admin := h.tgtd()
		admin("--lld", "iscsi", "--mode", "target", "--op", "new", "--tid", "1", "--targetname", target)
		admin("--lld", "iscsi", "--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", "1",
			"--bstype", "rbd", "--backing-store", h.pool+"/vm1", "--bsopts", "conf="+os.Getenv("CEPH_CONF"))
		admin("--lld", "iscsi", "--mode", "logicalunit", "--op", "update", "--tid", "1", "--lun", "1", "--params", "thin_provisioning=1")
		admin("--lld", "iscsi", "--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL")
		h.plain("qemu-io", "-f", "raw",
			"-c", "read -P 3 32M 1M", "-c", "write -P 7 1M 3M", "-c", "write -P 9 10240 512", "-c", "write -z 3M 512k", "-c", "flush",
			"-c", "discard 2M 1M", "-c", "read -P 0 2M 1536k", "-c", "read -P 7 3584k 512k", "iscsi://"+portal+"/"+target+"/1")
		admin("--lld", "iscsi", "--mode", "logicalunit", "--op", "delete", "--tid", "1", "--lun", "1")
		h.run("qemu-io", "-f", "raw", "-c", "read -P 3 32M 1M", "-c", "read -P 7 1M 1M", "-c", "read -P 9 10240 512",
			"-c", "read -P 0 10752 1000k", "-c", "read -P 0 2M 1536k", "-c", "read -P 7 3584k 512k", vm)
		h.mustCheck("vm1")
	})
}

// tgtd starts tgt's daemon on the library, and returns where its targets are, and what tells it
// what to do.
func (h *host) tgtd() (portal string, admin func(args ...string)) {
	h.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	portal = l.Addr().String()
	l.Close()
	env := "TGT_IPC_SOCKET=" + filepath.Join(h.dir, "tgt")
	h.service("tgtd", h.command(h.t.Context(), "env", env, "tgtd", "-f", "--pid-file", filepath.Join(h.dir, "tgtd.pid"), "--iscsi", "portal="+portal))
	try := func(args ...string) (string, error) {
		return h.plainly(append([]string{"env", env, "tgtadm"}, args...)...)
	}
	h.awaitAnswer("tgtd", func() error {
		_, err := try("--lld", "iscsi", "--mode", "target", "--op", "show")
		return err
	})
	return portal, func(args ...string) {
		h.t.Helper()
		if out, err := try(args...); err != nil {
			h.t.Fatalf("tgtadm %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}
