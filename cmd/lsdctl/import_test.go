package main

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// contentsOf returns what is in an image that nobody has.
func contentsOf(t *testing.T, url string) []byte {
	t.Helper()
	im, closeIt := openedImage(t, url)
	defer closeIt()
	b := make([]byte, im.Size())
	if err := im.ReadAt(context.Background(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// openedImage opens an image that nobody has, until closeIt.
func openedImage(t *testing.T, url string) (im *inproc.Image, closeIt func()) {
	t.Helper()
	u, name, err := backend.ParseImage(url)
	if err != nil {
		t.Fatal(err)
	}
	st := opened(t, u.String())
	id, err := backend.Lookup(context.Background(), st, name)
	if err != nil {
		t.Fatal(err)
	}
	im, err = inproc.Open(context.Background(), st, id, inproc.Options{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	return im, func() {
		if err := im.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

// newStore makes a store without images.
func newStore(t *testing.T) string {
	t.Helper()
	store := "file://" + t.TempDir() + "/store"
	must(t, "create", store+"/x", "--size", "1M")
	must(t, "rm", store+"/x")
	return store
}

// diskFile makes a file of a disk with data, zeroes and holes.
func diskFile(t *testing.T, size int) (path string, want []byte) {
	t.Helper()
	want = make([]byte, size)
	data := rand.NewChaCha8([32]byte{byte(size)})
	for at := 0; at+(200<<10) < size; at += 1 << 20 {
		_, _ = data.Read(want[at:][:200<<10])
	}
	path = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, want[:size/2], 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := size / 2 &^ (1<<20 - 1); at < size; at += 1 << 20 {
		if _, err := f.WriteAt(want[at:min(at+200<<10, size)], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	return path, want
}

// withStdin has the commands that fn runs read standard input from a pipe that gives b.
func withStdin(t *testing.T, b []byte, fn func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	before := os.Stdin
	os.Stdin = r
	defer func() { os.Stdin = before }()
	go func() {
		defer w.Close()
		_, _ = w.Write(b)
	}()
	fn()
}

func TestImportCommand(t *testing.T) {
	store := newStore(t)
	path, want := diskFile(t, 10<<20+5)
	out := must(t, "import", path, store+"/vm1")
	if !strings.HasPrefix(out, "made "+store+"/vm1 of 10 MiB, with 1.9") || !strings.HasSuffix(out, " MiB of data: attach it with lsdctl add "+store+"/vm1\n") {
		t.Errorf("import: %q", out)
	}
	padded := append(want, make([]byte, 4096-5)...)
	if !bytes.Equal(contentsOf(t, store+"/vm1"), padded) {
		t.Error("wrong data")
	}
	if out := must(t, "check", store+"/vm1", "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
	got := printed[imported](t, "import", path, store+"/vm2", "--size", "12M", "--block-size", "512", "--object-size", "1M")
	if got.Name != "vm2" || got.Size != 12<<20 || got.Data < 1<<20 || got.Data > 3<<20 {
		t.Errorf("import --json: %+v", got)
	}
	if i := printed[described](t, "info", store+"/vm2"); i.ID != got.ID || i.Size != 12<<20 || i.BlockSize != 512 || i.ObjectSize != 1<<20 || i.Owner != nil {
		t.Errorf("info: %+v", i)
	}
	if b := contentsOf(t, store+"/vm2"); !bytes.Equal(b[:len(want)], want) || len(bytes.Trim(b[len(want):], "\x00")) > 0 {
		t.Error("wrong data")
	}
	withStdin(t, want, func() { must(t, "import", "-", store+"/vm3") })
	if !bytes.Equal(contentsOf(t, store+"/vm3"), padded) {
		t.Error("wrong data")
	}
	if got := printed[[]engine.Garbage](t, "gc", store, "--age", "1ns"); len(got) != 0 {
		t.Errorf("gc: %+v", got)
	}
}

// TestImportBadInput: each is refused with one line, and leaves nothing.
func TestImportBadInput(t *testing.T) {
	store := newStore(t)
	path, _ := diskFile(t, 10<<20)
	dir := t.TempDir()
	qcow2 := filepath.Join(dir, "x.qcow2")
	if err := os.WriteFile(qcow2, []byte("QFI\xfb and nothing else"), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "create", store+"/there", "--size", "1M")
	before := objects(t, opened(t, store))
	for _, c := range []struct{ args, want string }{
		{"", "FILE is missing"},
		{path, "STORE/IMAGE is missing"},
		{path + " vm1", "not a URL"},
		{path + " mem:vm1", "tests"},
		{path + " " + store + "/-a", "image name"},
		{path + " " + store + "/a@b", "an image is wanted here"},
		{path + " " + store + "/there", store + "/there exists already: choose another name"},
		{path + " file://" + dir + "/none/x", "there is no store at file://" + dir + "/none: lsdctl create makes one"},
		{dir + "/none " + store + "/a", "no such file"},
		{dir + " " + store + "/a", dir + " is a directory"},
		{path + " " + store + "/a --size 4M", "import " + path + ": size 4194304: there are 10485760 bytes to import"},
		{path + " " + store + "/a --size 0", "size 0"},
		{path + " " + store + "/a --size 20000001", "not a multiple of the block size"},
		{path + " " + store + "/a --block-size 1024", "512 or 4096"},
		{path + " " + store + "/a --object-size 3", "object size"},
		{path + " " + store + "/a --object-size 2G", "limits"},
		{path + " " + store + "/a --format vmdk", "--format vmdk: it must be raw or qcow2"},
		{qcow2 + " " + store + "/a", qcow2 + " looks like a qcow2 file: say --format qcow2, or --format raw"},
		{"/dev/null " + store + "/a", "there is nothing in it: an image must have at least one block"},
	} {
		out, err := lsdctl(t, append([]string{"import"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || out != "" {
			t.Errorf("import %s: %q, %v", c.args, out, err)
		}
	}
	if after := objects(t, opened(t, store)); len(after) != len(before) {
		t.Errorf("left %q", after)
	}
	must(t, "import", qcow2, store+"/a", "--format", "raw")
}

func TestImportQcow2(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal("qemu-img is not installed: make setup")
	}
	store := newStore(t)
	path, want := diskFile(t, 10<<20)
	dir := t.TempDir()
	qcow2, colon := filepath.Join(dir, "x.qcow2"), filepath.Join(dir, "nbd:x")
	if out, err := exec.Command(img, "convert", "-f", "raw", "-O", "qcow2", "-c", path, qcow2).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Rename(qcow2, colon); err != nil {
		t.Fatal(err)
	}
	must(t, "import", colon, store+"/vm1", "--format", "qcow2", "--tmp", dir)
	if !bytes.Equal(contentsOf(t, store+"/vm1"), want) {
		t.Error("wrong data")
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("left %v, %v", list, err)
	}
	for _, c := range []struct{ args, want string }{
		{path + " " + store + "/a --format qcow2", "not in qcow2 format"},
		{colon + " " + store + "/a --format qcow2 --tmp " + dir + "/none", "--tmp " + dir + "/none: no such file"},
	} {
		if _, err := lsdctl(t, append([]string{"import"}, strings.Fields(c.args)...)...); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("import %s: %v", c.args, err)
		}
	}
	t.Setenv("PATH", dir)
	if _, err := lsdctl(t, "import", colon, store+"/a", "--format", "qcow2"); err == nil || err.Error() != "there is no qemu-img, which reads qcow2 files: install the package qemu-utils" {
		t.Errorf("import: %v", err)
	}
}
