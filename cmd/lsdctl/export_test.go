package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/rbddiff"
	"golang.org/x/sys/unix"
)

// Sizes of images that are exported here, which are not whole numbers of MiB. The large one
// has two segments of the map.
const (
	exportSize = 5<<20 + 4096
	exportLong = 66<<20 + 4096
)

// drawn is a disk that is written at random, and what is on it.
type drawn struct {
	*disk
	rng    *rand.Rand
	now    []byte
	states map[string][]byte // of its snapshots; "" is what the store has now
}

func newDrawn(t *testing.T, url string, seed, size uint64) *drawn {
	t.Helper()
	must(t, "create", url, "--size", fmt.Sprint(size), "--object-size", "1M")
	d := &drawn{disk: newDisk(t, url), rng: rand.New(rand.NewPCG(seed, 1)), now: make([]byte, size), states: map[string][]byte{}}
	d.attach()
	return d
}

// draw writes and discards here and there: at the beginning and at the end, which has the end
// of the first of two segments of the map.
func (d *drawn) draw(n int) {
	d.t.Helper()
	for range n {
		k := 4096 * (1 + d.rng.IntN(30))
		at := 4096 * d.rng.IntN(300)
		if d.rng.IntN(2) > 0 {
			at = len(d.now) - 4096*(1+d.rng.IntN(700))
		}
		p := d.now[at:min(at+k, len(d.now))]
		if d.rng.IntN(4) == 0 {
			clear(p)
			d.write(engine.Discard, at, p)
			continue
		}
		for i := range p {
			p[i] = byte(d.rng.Uint32())
		}
		d.write(engine.Write, at, bytes.Clone(p))
	}
	if d.rng.IntN(2) == 0 {
		d.destage()
	}
}

// take makes a snapshot.
func (d *drawn) take(name string) {
	d.t.Helper()
	d.snapshot(name)
	d.states[name] = bytes.Clone(d.now)
}

// stop detaches the disk: the store has all of it.
func (d *drawn) stop() {
	d.detach()
	d.states[""] = d.now
}

// at returns the URL of a state.
func (d *drawn) at(snap string) string {
	if snap == "" {
		return d.url
	}
	return d.url + "@" + snap
}

// mustHave compares a file with what it is to have.
func mustHave(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s has %d bytes, which are not the %d that it should have", path, len(got), len(want))
	}
}

// mustHold lists a directory.
func mustHold(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, want) {
		t.Errorf("%s has %q, want %q", dir, names, want)
	}
}

// TestExport: a snapshot, and the image, as a file and as a stream; a file that is there is
// replaced only if that is asked for.
func TestExport(t *testing.T) {
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 1, exportLong)
	d.draw(50)
	d.take("monday")
	d.draw(20)
	d.stop()
	dir := t.TempDir()
	for _, snap := range []string{"monday", ""} {
		file := filepath.Join(dir, "disk"+snap+".raw")
		out := must(t, "export", d.at(snap), file)
		if !strings.HasPrefix(out, "wrote "+file+": ") || !strings.HasSuffix(out, " of data, of an image of 66 MiB\n") {
			t.Errorf("export: %q", out)
		}
		mustHave(t, file, d.states[snap])
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if blocks := st.Sys().(*syscall.Stat_t).Blocks; blocks*512 > 6<<20 {
			t.Errorf("a file with holes takes %d bytes", blocks*512)
		}
		if out := must(t, "export", d.at(snap), "-"); out != string(d.states[snap]) {
			t.Errorf("the stream has %d bytes, which are not those of the image", len(out))
		}
	}
	file, link := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "link")
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("disk.raw", link); err != nil {
		t.Fatal(err)
	}
	if _, err := lsdctl(t, "export", d.at("monday"), link); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a file that is there: %v", err)
	}
	mustHave(t, file, d.states[""])
	e := printed[exported](t, "export", d.at("monday"), link, "--force")
	if e.File != link || e.Format != "raw" || e.Size != exportLong || e.Data == 0 || e.Data > 6<<20 || e.Zeroes != 0 {
		t.Errorf("export --json: %+v", e)
	}
	mustHave(t, file, d.states["monday"])
	if st, err := os.Lstat(file); err != nil || st.Mode() != 0o600 {
		t.Errorf("the file that was replaced: %v, %v", st.Mode(), err)
	}
	mustHold(t, dir, "disk.raw", "diskmonday.raw", "link")
}

// TestExportQcow2: qemu-img finds in the qcow2 what is in the raw file.
func TestExportQcow2(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Fatal("qemu-img is not installed: make setup")
	}
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 2, exportSize)
	d.draw(50)
	d.stop()
	dir := t.TempDir()
	raw, byName, byFlag := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "disk.img")
	must(t, "export", d.url, raw)
	must(t, "export", d.url, byName)
	must(t, "export", d.url, byFlag, "--format", "qcow2")
	for _, file := range []string{byName, byFlag} {
		if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, file).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if b, err := os.ReadFile(file); err != nil || !bytes.HasPrefix(b, []byte("QFI\xfb")) {
			t.Errorf("%s is not qcow2: %v", file, err)
		}
	}
	mustHold(t, dir, "disk.img", "disk.qcow2", "disk.raw")
	must(t, "export", d.url, byName, "--force", "--format", "raw")
	mustHave(t, byName, d.now)
	t.Setenv("PATH", t.TempDir())
	if _, err := lsdctl(t, "export", d.url, filepath.Join(dir, "x.qcow2")); err == nil || !strings.Contains(err.Error(), "apt install qemu-utils") {
		t.Errorf("without qemu-img: %v", err)
	}
	mustHold(t, dir, "disk.img", "disk.qcow2", "disk.raw")
}

// TestExportQcow2Fails: a conversion that fails or is interrupted leaves nothing.
func TestExportQcow2Fails(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	dir, fake := t.TempDir(), t.TempDir()
	t.Setenv("PATH", fake)
	for _, x := range []struct{ script, want string }{
		{"echo it cannot >&2\nexit 3", "it cannot"},
		{"exec /bin/sleep 60", "deadline exceeded"},
	} {
		if err := os.WriteFile(filepath.Join(fake, "qemu-img"), []byte("#!/bin/sh\n"+x.script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		cmd := newApp(io.Discard, os.Stderr).command()
		cmd.SetArgs([]string{"export", url, filepath.Join(dir, "disk.qcow2")})
		if err := cmd.ExecuteContext(ctx); err == nil || !strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want %q", err, x.want)
		}
		mustHold(t, dir)
	}
}

// TestExportFails: what cannot be read, or written, to its end leaves nothing, and a file that
// was there stays as it was.
func TestExportFails(t *testing.T) {
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 3, exportSize)
	d.draw(300)
	d.stop()
	dir := t.TempDir()
	file := filepath.Join(dir, "disk")
	if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	fails := func(want string, args ...string) {
		t.Helper()
		_, err := lsdctl(t, args...)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("lsdctl %v: %v, want %q", args, err, want)
		}
		mustHold(t, dir, "disk")
		mustHave(t, file, []byte("old"))
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, what := range []string{"export", "export-diff"} {
		cmd := newApp(full, full).command()
		cmd.SetArgs([]string{what, d.url, "-"})
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("%s to what is full: %v", what, err)
		}
		ctx, stop := context.WithCancel(t.Context())
		cmd = newApp(os.Stdout, full).command()
		cmd.SetArgs([]string{what, d.url, file, "--force"})
		stop()
		if err := cmd.ExecuteContext(ctx); err == nil {
			t.Errorf("%s was interrupted, and came to its end", what)
		}
		mustHold(t, dir, "disk")
		mustHave(t, file, []byte("old"))
	}
	keys := slices.DeleteFunc(objects(t, d.st), func(key string) bool { return !strings.Contains(key, "/d/") })
	if err := d.st.Delete(t.Context(), slices.Max(keys)); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"export", "export-diff"} {
		fails("corrupt", what, d.url, file, "--force")
		fails("corrupt", what, d.url, "-")
	}
}

// TestExportFull: a disk that is full is told in one line.
func TestExportFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 4, exportSize)
	d.draw(200)
	d.stop()
	for _, what := range []string{"export", "export-diff"} {
		file := filepath.Join(dir, "disk")
		if _, err := lsdctl(t, what, d.url, file); err == nil || !strings.HasSuffix(err.Error(), "write "+file+": no space left on device: nothing of it is kept") {
			t.Errorf("%s: %v", what, err)
		}
		mustHold(t, dir)
	}
}

// TestExportToDevice: all of a device is written, zeroes as well, as far as the image goes; one
// that is too small is not touched.
func TestExportToDevice(t *testing.T) {
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 5, exportSize)
	d.draw(50)
	d.stop()
	a := newApp(io.Discard, os.Stderr)
	u, image, _, err := parseSource(d.url)
	if err != nil {
		t.Fatal(err)
	}
	for _, more := range []int{0, 4096, -4096} {
		path := filepath.Join(t.TempDir(), "device")
		old := bytes.Repeat([]byte{0xaa}, exportSize+more)
		if err := os.WriteFile(path, old, 0o600); err != nil {
			t.Fatal(err)
		}
		target := &target{name: path, path: path, device: true}
		err := a.withDiff(t.Context(), u, image, "", "", func(_, v *engine.View) error {
			_, err := a.exportRaw(t.Context(), v, target)
			return err
		})
		if more < 0 {
			if err == nil || !strings.Contains(err.Error(), "too small") {
				t.Errorf("a small device: %v", err)
			}
			mustHave(t, path, old)
			continue
		}
		if err == nil {
			err = target.finish()
		}
		if err != nil {
			t.Fatal(err)
		}
		mustHave(t, path, append(bytes.Clone(d.now), old[exportSize:]...))
	}
}

// TestExportTargets: what is not a file, or is there, is refused before anything is read.
func TestExportTargets(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"export", "export-diff"} {
		for _, x := range []struct{ file, want string }{
			{dir, "neither a file nor a block device"},
			{dir + "/pipe", "neither a file nor a block device"},
			{"/dev/null", "neither a file nor a block device"},
			{dir + "/none/disk", "no such file or directory"},
			{dir + "/pipe/disk", "not a directory"},
		} {
			if _, err := lsdctl(t, what, url, x.file, "--force"); err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("%s to %s: %v, want %q", what, x.file, err, x.want)
			}
		}
		if _, err := lsdctl(t, what, url, "-", "--json"); err == nil || !strings.Contains(err.Error(), "--json") {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := lsdctl(t, what, url+"@none", dir+"/x"); err == nil || !strings.Contains(err.Error(), "see lsdctl snap ls") {
			t.Errorf("%s: %v", what, err)
		}
	}
	mustHold(t, dir, "pipe")
}

// TestExportMeanwhile: what has got the name of FILE while it was written is replaced with
// --force alone, and a symbolic link that leads nowhere is no such thing.
func TestExportMeanwhile(t *testing.T) {
	for _, tt := range []struct {
		name        string
		force, link bool
		want        string
	}{
		{"fresh", false, false, "theirs"},
		{"force", true, false, "ours"},
		{"link", false, true, "ours"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk")
			if tt.link {
				if err := os.Symlink("nowhere", path); err != nil {
					t.Fatal(err)
				}
			}
			x, err := newApp(io.Discard, os.Stderr).newTarget(path, tt.force)
			if err != nil {
				t.Fatal(err)
			}
			defer x.drop()
			if err := x.open(); err != nil {
				t.Fatal(err)
			}
			if _, err := x.Write([]byte("ours")); err != nil {
				t.Fatal(err)
			}
			if !tt.link {
				if err := os.WriteFile(path, []byte("theirs"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := x.finish(); (err != nil) != (tt.want == "theirs") || err != nil && !strings.Contains(err.Error(), "file exists: nothing of it is kept") {
				t.Errorf("written: %v", err)
			}
			x.drop()
			mustHave(t, path, []byte(tt.want))
			mustHold(t, dir, "disk")
		})
	}
}

// TestExportOfAttached: it is said that an image is attached, on standard error.
func TestExportOfAttached(t *testing.T) {
	d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 6, exportSize)
	d.draw(10)
	d.take("s")
	d.destage()
	d.states[""] = bytes.Clone(d.now)
	for _, snap := range []string{"", "s"} {
		errOut, err := os.Create(filepath.Join(t.TempDir(), "err"))
		if err != nil {
			t.Fatal(err)
		}
		defer errOut.Close()
		var out bytes.Buffer
		cmd := newApp(&out, errOut).command()
		cmd.SetArgs([]string{"export", d.at(snap), "-"})
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), d.states[snap]) {
			t.Errorf("%q is not what it should be", d.at(snap))
		}
		told, err := os.ReadFile(errOut.Name())
		if err != nil {
			t.Fatal(err)
		}
		if remark := d.url + " is attached by here: this is what of it has reached the store\n"; strings.HasPrefix(string(told), remark) != (snap == "") {
			t.Errorf("%q: %q", d.at(snap), told)
		}
	}
}

// apply applies a file of export-diff to b, as import-diff does, and returns what it has, and
// what it says first.
func apply(t *testing.T, file string, b []byte) ([]byte, rbddiff.Header) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := rbddiff.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, r.Header().Size)
	copy(got, b)
	last := uint64(0)
	for {
		rec, err := r.Next()
		if err == io.EOF {
			return got, r.Header()
		}
		if err != nil {
			t.Fatal(err)
		}
		if rec.Offset < last || !rec.Zero && rec.Length > 4<<20 {
			t.Errorf("%+v after %d", rec, last)
		}
		last = rec.Offset + rec.Length
		p := got[rec.Offset:last]
		if clear(p); !rec.Zero {
			if _, err := io.ReadFull(r, p); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestExportDiff: what has changed between any two states of a history, on top of the first,
// gives the second; what diff tells is what export-diff writes.
func TestExportDiff(t *testing.T) {
	seeds := uint64(3)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		d := newDrawn(t, "file://"+t.TempDir()+"/store/vm1", 100+seed, exportSize)
		for n := range 8 {
			d.draw(10 + d.rng.IntN(30))
			switch k := d.rng.IntN(4); {
			case k < 3 || len(d.states) == 0:
				d.take(fmt.Sprint("s", n))
			default:
				to := slices.Sorted(maps.Keys(d.states))[d.rng.IntN(len(d.states))]
				d.detach()
				must(t, "snap", "rollback", d.url+"@"+to)
				d.attach()
				copy(d.now, d.states[to])
			}
		}
		d.draw(10)
		d.stop()
		names := slices.Sorted(maps.Keys(d.states)) // the first one is ""
		file := filepath.Join(t.TempDir(), "diff")
		for range 15 {
			from, to := names[d.rng.IntN(len(names))], names[d.rng.IntN(len(names))]
			args := []string{"export-diff", d.at(to), file, "--force"}
			if from != "" {
				args = append(args, "--from", from)
			}
			e := printed[exported](t, args...)
			base := d.states[from]
			if from == "" {
				base = nil
			}
			got, h := apply(t, file, base)
			if !bytes.Equal(got, d.states[to]) {
				t.Fatalf("seed %d: from %q to %q: it does not give that", seed, from, to)
			}
			if h != (rbddiff.Header{From: from, To: to, Size: exportSize}) || e.Format != "rbd diff v1" || e.Size != exportSize {
				t.Errorf("%+v, %+v", h, e)
			}
			args = []string{"diff", d.at(from)}
			if to != "" {
				args = append(args, "@"+to)
			}
			var data, zeroes uint64
			for _, r := range printed[[]changed](t, args...) {
				if r.Exists {
					data += r.Length
				} else {
					zeroes += r.Length
				}
			}
			if data != e.Data || zeroes != e.Zeroes {
				t.Errorf("diff has %d and %d bytes, export-diff %d and %d", data, zeroes, e.Data, e.Zeroes)
			}
		}
	}
}

// TestDiffCommand: each form of it, as a table and as JSON.
func TestDiffCommand(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	url := store + "/vm1"
	must(t, "create", url, "--size", "100M")
	must(t, "create", store+"/other", "--size", "100M")
	d := newDisk(t, url)
	d.attach()
	p := bytes.Repeat([]byte{1}, 8192)
	d.write(engine.Write, 0, p)
	d.write(engine.Write, 1<<20, p)
	d.snapshot("a")
	d.write(engine.Write, 4096, p[:4096])
	d.write(engine.Discard, 1<<20, p)
	d.snapshot("b")
	d.write(engine.Write, 50<<20, p)
	d.detach()
	const head = "OFFSET           LENGTH           TYPE\n"
	for _, x := range []struct{ args, want string }{
		{url + "@a @b", head + "4096             4096             data\n1048576          8192             zero\n2 ranges: 4 KiB of data, 8 KiB of zeroes\n"},
		{url + "@b " + url + "@a", head + "4096             4096             data\n1048576          8192             data\n2 ranges: 12 KiB of data, 0 B of zeroes\n"},
		{url + "@b", head + "52428800         8192             data\n1 range: 8 KiB of data, 0 B of zeroes\n"},
		{url + " @a", head + "0                8192             data\n1048576          8192             data\n2 ranges: 16 KiB of data, 0 B of zeroes\n"},
		{url, head + "0                8192             data\n52428800         8192             data\n2 ranges: 16 KiB of data, 0 B of zeroes\n"},
		{url + "@a @a", "nothing\n"},
		{url + "@a @a --json", "[]\n"},
		{url + "@a @b --json", `[
  {"offset":4096,"length":4096,"exists":true},
  {"offset":1048576,"length":8192,"exists":false}
]
`},
	} {
		if got := must(t, append([]string{"diff"}, strings.Fields(x.args)...)...); got != x.want {
			t.Errorf("diff %s:\n%swant\n%s", x.args, got, x.want)
		}
	}
	for _, x := range []struct{ args, want string }{
		{"", "STORE/IMAGE[@FROM] is missing"},
		{url + " b", "write @NAME"},
		{url + " @", "empty snapshot name"},
		{url + " @a b", "too much"},
		{url + "@a @none", "no such snapshot"},
		{url + "@none", "no such snapshot"},
		{url + "@a " + store + "/other@b", "of another image"},
		{store + "/none", "no such image"},
	} {
		if _, err := lsdctl(t, append([]string{"diff"}, strings.Fields(x.args)...)...); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("diff %s: %v, want %q", x.args, err, x.want)
		}
	}
}
