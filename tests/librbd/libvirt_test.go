//go:build lab

package librbd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLibvirt: a storage pool of libvirt makes, lists, resizes, clones and deletes images.
func TestLibvirt(t *testing.T) {
	h := newHost(t, "rados") // a pool of libvirt is one of Ceph
	virsh := h.libvirtd()
	must := func(args ...string) string {
		t.Helper()
		out, err := virsh(args...)
		if err != nil {
			t.Fatalf("virsh %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	volumes := func() string { return strings.Join(strings.Fields(must("vol-list", "p")), " ") }
	want := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
	must("pool-define", h.poolXML("p"))
	must("pool-start", "p")
	want(volumes(), "")
	must("vol-create-as", "p", "vm1", "64M")
	if _, err := virsh("vol-create-as", "p", "vm1", "64M"); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("it is there: %v", err)
	}
	h.run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 9M", h.spec("vm1"))
	must("vol-resize", "--pool", "p", "vm1", "96M")
	if info := must("vol-info", "--pool", "p", "vm1"); !strings.Contains(info, "96.00 MiB") {
		t.Errorf("not resized: %s", info)
	}
	must("vol-clone", "--pool", "p", "vm1", "vm2")
	h.run("qemu-io", "-f", "raw", "-c", "read -P 5 1M 9M", "-c", "write -P 6 2M 1M", h.spec("vm2"))
	must("vol-clone", "--pool", "p", "vm1", "vm3") // of the snapshot that is there
	must("pool-refresh", "p")
	want(volumes(), "vm1 rbd/vm1 vm2 rbd/vm2 vm3 rbd/vm3")
	must("vol-wipe", "--pool", "p", "vm2")
	h.run("qemu-io", "-f", "raw", "-c", "read -P 0 0 96M", h.spec("vm2"))
	h.run("qemu-io", "-f", "raw", "-c", "read -P 5 1M 9M", h.spec("vm3"))
	must("vol-delete", "--pool", "p", "vm2")
	must("vol-delete", "--pool", "p", "vm3")
	if _, err := virsh("vol-delete", "--pool", "p", "vm1"); err == nil {
		t.Error("deleted though it has a snapshot")
	}
	must("vol-delete", "--pool", "p", "--delete-snapshots", "vm1")
	want(volumes(), "")
	want(h.lsdctl("ls", "--json", h.store), "[]\n")
	must("pool-destroy", "p")
	must("pool-undefine", "p")
}

// libvirtd starts libvirt's daemon on the library, with its driver of storage alone, in a mount
// namespace that hides what libvirt has on this machine. It returns virsh.
func (h *host) libvirtd() func(args ...string) (string, error) {
	h.t.Helper()
	storage, err := filepath.Glob("/usr/lib/*/libvirt/connection-driver/libvirt_driver_storage.so")
	if err != nil || len(storage) != 1 {
		h.t.Fatalf("libvirt's driver of storage: %q, %v", storage, err)
	}
	drivers := filepath.Join(h.dir, "drivers")
	if err := os.Mkdir(drivers, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Symlink(storage[0], filepath.Join(drivers, filepath.Base(storage[0]))); err != nil {
		h.t.Fatal(err)
	}
	conf := filepath.Join(h.dir, "libvirtd.conf")
	text := fmt.Sprintf("unix_sock_dir = %q\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n", h.dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	const hidden = `for d in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /run; do
		mkdir -p $d && mount -t tmpfs none $d || exit
	done
	exec libvirtd -f "$0" -p "$1"`
	cmd := h.command(h.t.Context(), "unshare", "--mount", "sh", "-c", hidden, conf, filepath.Join(h.dir, "libvirtd.pid"))
	cmd.Env = append(os.Environ(), "LIBVIRT_DRIVER_DIR="+drivers)
	h.service("libvirtd", cmd)
	virsh := func(args ...string) (string, error) {
		uri := "storage:///system?socket=" + filepath.Join(h.dir, "libvirt-sock")
		return h.plainly(append([]string{"virsh", "-q", "-c", uri}, args...)...)
	}
	h.awaitAnswer("libvirtd", func() error {
		_, err := virsh("pool-list")
		return err
	})
	return virsh
}

// poolXML returns the path of the definition of a pool of libvirt on the cluster.
func (h *host) poolXML(name string) string {
	h.t.Helper()
	conf, err := os.ReadFile(os.Getenv("CEPH_CONF"))
	if err != nil {
		h.t.Fatal(err)
	}
	mon := regexp.MustCompile(`v2:([\d.]+):(\d+)`).FindSubmatch(conf)
	if mon == nil {
		h.t.Fatalf("no monitor in %s", conf)
	}
	path := filepath.Join(h.dir, name+".xml")
	text := fmt.Sprintf(`<pool type="rbd"><name>%s</name><source><name>%s</name><host name="%s" port="%s"/></source></pool>`, name, h.pool, mon[1], mon[2])
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path
}
