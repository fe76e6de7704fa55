//go:build lab

package librbd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nobody is a user that is not root, and its group.
const nobody = 65534

// TestOtherUser: QEMU's tools work for a user other than root as far as the policy says, also
// where the daemon is killed under them, and lsdctl run says why where they cannot.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become others")
	}
	dir := publicDir(t)
	policy := filepath.Join(dir, "policy")
	store := "file://" + filepath.Join(dir, "store")
	if err := os.WriteFile(policy, []byte("allow user:65534 "+store+" mine* read,write\nallow user:65534 "+store+" base read\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := newHostIn(t, "file", dir, "--librbd-policy", policy)
	h.lsdctl("create", h.image("mine"), "--size", "64M")
	h.lsdctl("create", h.image("base"), "--size", "64M")
	h.lsdctl("snap", "create", h.image("base")+"@s")
	h.lsdctl("create", h.image("other"), "--size", "64M")
	command := func(uid uint32, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "bin", "lsdctl"), append([]string{"--socket", h.socket, "run", "--store", h.store, "--"}, args...)...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return cmd
	}
	as := func(uid uint32, args ...string) (string, error) { return h.try(command(uid, args...)) }
	works := func(args ...string) {
		t.Helper()
		if _, err := as(nobody, args...); err != nil {
			t.Errorf("%s: %v", strings.Join(args, " "), err)
		}
	}
	denied := func(uid uint32, args ...string) {
		t.Helper()
		if out, err := as(uid, args...); err == nil || !strings.Contains(err.Error(), "Operation not permitted") {
			t.Errorf("user %d: %s: %q, %v", uid, strings.Join(args, " "), out, err)
		}
	}
	mine, base := h.spec("mine"), h.spec("base@s") // QEMU opens what is no snapshot to write, always
	works("qemu-io", "-f", "raw", "-c", "write -P 7 1M 3M", "-c", "read -P 7 1M 3M", "-c", "flush", mine)
	works("qemu-img", "snapshot", "-c", "s", mine)
	works("qemu-img", "snapshot", "-a", "s", mine)
	works("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", base, mine)
	works("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", base)
	denied(nobody, "qemu-img", "info", h.spec("base"))
	denied(nobody, "qemu-img", "info", h.spec("other"))
	denied(nobody, "qemu-img", "info", h.spec("none"))
	denied(nobody, "qemu-img", "create", "-f", "raw", h.spec("mine2"), "24M")
	denied(nobody, "qemu-img", "resize", "-f", "raw", mine, "128M")
	denied(12345, "qemu-img", "info", mine)

	h.killUnder(command(nobody, "qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "-c", "sleep 3000", "-c", "write -P 9 1M 1M", "-c", "read -P 9 0 2M", mine))

	h.stop(syscall.SIGTERM)
	if _, err := as(nobody, "true"); err == nil || !strings.Contains(err.Error(), "only root may start it") {
		t.Errorf("without a daemon: %v", err)
	}
	h.flags = []string{"--librbd-group", "0"}
	h.start()
	if _, err := as(nobody, "true"); err == nil || !strings.Contains(err.Error(), "no permission for "+h.socket+".librbd") {
		t.Errorf("without rights to the socket: %v", err)
	}
}

// killUnder kills the daemon while a program has an image open and has written to it.
func (h *host) killUnder(cmd *exec.Cmd) {
	h.t.Helper()
	out, err := os.Create(filepath.Join(h.t.TempDir(), "out"))
	if err != nil {
		h.t.Fatal(err)
	}
	defer out.Close()
	said := func() string {
		text, _ := os.ReadFile(out.Name())
		return string(text)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); !strings.Contains(said(), "wrote"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			h.t.Fatalf("it does not begin: %s", said())
		}
	}
	h.stop(syscall.SIGKILL)
	h.start()
	if err := cmd.Wait(); err != nil || strings.Contains(said(), "fail") || strings.Count(said(), "wrote") != 2 {
		h.t.Errorf("the daemon was killed: %v: %s", err, said())
	}
}

// publicDir returns a directory that everybody can get at, with lsdctl and the library in bin.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lsd-other")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "bin", "librbd"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lsdctl", "librbd/librbd-preload.so"} {
		data, err := os.ReadFile(program(t, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "bin", name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
