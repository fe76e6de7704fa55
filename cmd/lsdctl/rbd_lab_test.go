//go:build lab

package main

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/cephtest"
)

func TestMain(m *testing.M) { os.Exit(cephtest.Main(m, 300, "memstore")) }

// rbd runs the rbd tool on the cluster.
func rbd(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("rbd", append([]string{"-c", os.Getenv("CEPH_CONF")}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("rbd %s: %v: %s", strings.Join(args, " "), err, &stderr)
	}
	return out
}

// sumOf returns the checksum of what a snapshot of an RBD image has.
func sumOf(t *testing.T, image string) [32]byte {
	t.Helper()
	return sha256.Sum256(rbd(t, "export", image, "-"))
}

// exportedSum returns the checksum of what a snapshot of an image has, and how much that is.
func exportedSum(t *testing.T, dir, url string) ([32]byte, int) {
	t.Helper()
	file := filepath.Join(dir, "exported")
	must(t, "export", url, file, "--force")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b), len(b)
}

// TestRBD: an image comes from RBD and goes there, with its snapshots, which are of several
// sizes, by diffs that the rbd tool writes and reads.
func TestRBD(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	store := "rados://rbd/" + uuid.NewString()
	const src, dst = "rbd/src", "rbd/dst"

	// An RBD image with three snapshots: data with holes, some of it overwritten, and a
	// larger one with something at its end.
	disk := make([]byte, 40<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(disk[:3<<20])
	_, _ = rand.NewChaCha8([32]byte{2}).Read(disk[17<<20+4096 : 21<<20])
	if err := os.WriteFile(file("disk"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	rbd(t, "import", file("disk"), src)
	rbd(t, "snap", "create", src+"@a")
	rbd(t, "bench", "--io-type", "write", "--io-size", "4096", "--io-total", "1M", "--io-pattern", "rand", src)
	rbd(t, "snap", "create", src+"@b")
	rbd(t, "resize", "--size", "72M", src)
	rbd(t, "bench", "--io-type", "write", "--io-size", "65536", "--io-total", "8M", "--io-pattern", "rand", src)
	rbd(t, "snap", "create", src+"@c")

	url := store + "/vm"
	must(t, "create", url, "--size", "40M")
	names := []string{"a", "b", "c"}
	for i, to := range names {
		args := []string{"export-diff", src + "@" + to, file(to)}
		if i > 0 {
			args = append(args, "--from-snap", names[i-1])
		}
		rbd(t, args...)
		must(t, "import-diff", file(to), url)
	}
	for _, name := range names {
		if got, n := exportedSum(t, dir, url+"@"+name); got != sumOf(t, src+"@"+name) {
			t.Errorf("snapshot %s of the image from RBD, of %d bytes, is another one than there", name, n)
		}
	}

	// Back again, also from a later state to an earlier one.
	rbd(t, "create", dst, "--size", "40M")
	for i, to := range names {
		args := []string{"export-diff", url + "@" + to, file(to + ".lsd")}
		if i > 0 {
			args = append(args, "--from", names[i-1])
		}
		must(t, args...)
		rbd(t, "import-diff", file(to+".lsd"), dst)
	}
	for _, name := range names {
		if sumOf(t, src+"@"+name) != sumOf(t, dst+"@"+name) {
			t.Errorf("snapshot %s of the image that went back to RBD is another one", name)
		}
	}
	must(t, "snap", "rollback", url+"@b")
	must(t, "export-diff", url, file("back"), "--from", "c")
	rbd(t, "import-diff", file("back"), dst)
	if sumOf(t, src+"@b") != sumOf(t, dst) {
		t.Error("an RBD image that was brought from a later state to an earlier one is another one")
	}

	// As a whole, by a stream, and to another namespace.
	must(t, "export", url+"@c", file("whole"))
	must(t, "import", file("whole"), store+"/whole")
	other := "rados://rbd/" + uuid.NewString()
	must(t, "create", other+"/first", "--size", "1M")
	must(t, "copy", url, other+"/copy")
	for _, x := range []struct{ got, want string }{{store + "/whole", src + "@c"}, {other + "/copy@a", src + "@a"}, {other + "/copy@c", src + "@c"}, {other + "/copy", src + "@b"}} {
		if got, n := exportedSum(t, dir, x.got); got != sumOf(t, x.want) {
			t.Errorf("%s, of %d bytes, is another one than %s", x.got, n, x.want)
		}
	}
	for _, u := range []string{url, store + "/whole", other + "/copy"} {
		if out := must(t, "check", u, "--deep"); !strings.Contains(out, "clean") {
			t.Errorf("check: %s", out)
		}
		must(t, "rm", u, "--snapshots", "--wait")
	}
	must(t, "rm", other+"/first", "--wait")
	for _, s := range []string{store, other} {
		if left := objects(t, opened(t, s)); len(left) > 0 {
			t.Errorf("left in %s: %q", s, left)
		}
	}
}
