package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// alter writes a block of b at off to an image, and makes a snapshot.
func alter(t *testing.T, url string, b byte, off uint64, snap string) {
	t.Helper()
	im, closeIt := openedImage(t, url)
	if err := im.WriteAt(context.Background(), bytes.Repeat([]byte{b}, 8192), off); err != nil {
		t.Fatal(err)
	}
	if err := im.Discard(context.Background(), 1<<20, 4096); err != nil {
		t.Fatal(err)
	}
	closeIt()
	must(t, "snap", "create", url+"@"+snap)
}

// TestImportDiffCommand: what export-diff has written of each snapshot makes another image
// that has all of them.
func TestImportDiffCommand(t *testing.T) {
	store := newStore(t)
	from, to := store+"/vm1", store+"/vm2"
	path, _ := diskFile(t, 10<<20)
	must(t, "import", path, from)
	must(t, "snap", "create", from+"@s0")
	alter(t, from, 1, 3<<20, "s1")
	alter(t, from, 2, 5<<20, "s2")
	must(t, "create", to, "--size", "1M")
	dir := t.TempDir()
	var states [][]byte
	for i := range 3 {
		name, file := fmt.Sprint("s", i), filepath.Join(dir, fmt.Sprint(i))
		args := []string{"export-diff", from + "@" + name, file}
		if i > 0 {
			args = append(args, "--from", fmt.Sprint("s", i-1))
		}
		must(t, args...)
		if i == 1 {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			withStdin(t, b, func() {
				out := must(t, "import-diff", "-", to)
				if want := "applied standard input: " + to + "@s1 is there, of 10 MiB, with 8 KiB of data changed\n"; out != want {
					t.Errorf("import-diff: %q, want %q", out, want)
				}
			})
		} else {
			got := printed[importedDiff](t, "import-diff", file, to)
			if got.Name != "vm2" || got.To != name || got.Size != 10<<20 || i == 2 && (got.From != "s1" || got.Data != 8192) {
				t.Errorf("import-diff --json: %+v", got)
			}
		}
		states = append(states, contentsOf(t, to))
	}
	if !bytes.Equal(states[2], contentsOf(t, from)) {
		t.Error("they differ")
	}
	for i := range 3 {
		snap := fmt.Sprint("s", i)
		must(t, "snap", "rollback", from+"@"+snap)
		if !bytes.Equal(states[i], contentsOf(t, from)) {
			t.Errorf("they differ at %s", snap)
		}
	}
	if got := snapNames(t, to); !slices.Equal(got, []string{"s0", "s1", "s2"}) {
		t.Errorf("snapshots: %q", got)
	}
	if out := must(t, "check", to, "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
}

// TestImportDiffRefused: each is refused with one line that says what to do, and a file that
// is damaged changes nothing.
func TestImportDiffRefused(t *testing.T) {
	store := newStore(t)
	url := store + "/vm1"
	must(t, "create", url, "--size", "10M")
	dir := t.TempDir()
	full, next, none, cut, junk := dir+"/full", dir+"/next", dir+"/none", dir+"/cut", dir+"/junk"
	alter(t, url, 1, 0, "s0")
	must(t, "export-diff", url+"@s0", full)
	alter(t, url, 2, 2<<20, "s1")
	must(t, "export-diff", url+"@s1", next, "--from", "s0")
	b, err := os.ReadFile(next)
	if err == nil {
		err = os.WriteFile(cut, b[:len(b)-1], 0o600)
	}
	if err == nil {
		err = os.WriteFile(junk, []byte("nothing of the kind"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	must(t, "create", store+"/other", "--size", "10M")
	must(t, "create", store+"/used", "--size", "10M")
	im, closeIt := openedImage(t, store+"/used")
	if err := im.WriteAt(context.Background(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	closeIt()
	must(t, "clone", url+"@s0", "written")
	must(t, "snap", "create", store+"/written@s0")
	alter(t, store+"/written", 3, 4<<20, "s9")
	must(t, "create", store+"/busy", "--size", "10M")
	owned(t, store+"/busy")
	for _, c := range []struct{ args, want string }{
		{"", "FILE is missing"},
		{full, "STORE/IMAGE is missing"},
		{full + " " + store + "/none", store + "/none: no such image"},
		{full + " " + url + "@s0", "an image is wanted here"},
		{none + " " + url, "no such file"},
		{junk + " " + url, junk + ": not a whole file of export-diff: it does not begin with"},
		{cut + " " + url, cut + ": not a whole file of export-diff: it ends before its end"},
		{next + " " + url, "the diff leads to the snapshot s1: there is a snapshot of that name already: see lsdctl snap ls " + url},
		{next + " " + store + "/other", "the diff begins with the snapshot s0: no such snapshot: see lsdctl snap ls " + store + "/other"},
		{full + " " + store + "/used", "the image is not what the diff begins with: it does not begin with a snapshot, and there is data in the image: see lsdctl snap rollback; --force applies it all the same"},
		{next + " " + store + "/written", "it has been written to since the snapshot s0"},
		{full + " " + store + "/busy", store + "/busy: it is attached by busy: lsdctl del it there first"},
	} {
		out, err := lsdctl(t, append([]string{"import-diff"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || out != "" {
			t.Errorf("import-diff %s: %q, %v", c.args, out, err)
		}
	}
	if got := snapNames(t, store+"/other"); len(got) > 0 {
		t.Errorf("snapshots: %q", got)
	}
	testImportDiffCut(t, store, full, b)
	must(t, "import-diff", next, store+"/written", "--force")
}

// testImportDiffCut: standard input that is cut off is noticed late, which is said.
func testImportDiffCut(t *testing.T, store, full string, next []byte) {
	t.Helper()
	url := store + "/other"
	must(t, "import-diff", full, url)
	before := contentsOf(t, url)
	withStdin(t, next[:len(next)-1], func() {
		_, err := lsdctl(t, "import-diff", "-", url)
		if err == nil || !strings.HasPrefix(err.Error(), url+" holds part of standard input: not a whole file of export-diff: ") ||
			!strings.HasSuffix(err.Error(), ": lsdctl snap rollback "+url+"@s0 brings it back, or apply all of it with --force") {
			t.Errorf("import-diff: %v", err)
		}
	})
	must(t, "snap", "rollback", url+"@s0")
	if !bytes.Equal(contentsOf(t, url), before) {
		t.Error("it was not brought back")
	}
	withStdin(t, next, func() { must(t, "import-diff", "-", url) })
}

// TestImportDiffBesideCommand: an image to which another command writes is refused.
func TestImportDiffBesideCommand(t *testing.T) {
	store := newStore(t)
	url := store + "/vm1"
	must(t, "create", url, "--size", "1M")
	must(t, "snap", "create", url+"@s0")
	file := t.TempDir() + "/diff"
	must(t, "export-diff", url+"@s0", file)
	must(t, "create", store+"/vm2", "--size", "1M")
	st := opened(t, store)
	id, err := backend.Lookup(t.Context(), st, "vm2")
	if err != nil {
		t.Fatal(err)
	}
	im, err := inproc.Open(t.Context(), st, id, inproc.Options{URL: store + "/vm2", Lease: 4 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close(context.Background())
	if _, err := lsdctl(t, "import-diff", file, store+"/vm2"); err == nil || !strings.Contains(err.Error(), "command") || strings.Contains(err.Error(), "\n") {
		t.Errorf("import-diff: %v", err)
	}
	var list []engine.Snapshot
	if list, err = engine.Snapshots(t.Context(), st, id); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
}
