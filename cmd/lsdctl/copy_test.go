package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
)

// TestCopyCommand: a copy has all snapshots, and needs nothing of what it was copied from.
func TestCopyCommand(t *testing.T) {
	from, to := newStore(t), newStore(t)
	path, _ := diskFile(t, 10<<20)
	must(t, "import", path, from+"/base")
	must(t, "clone", from+"/base", "vm1")
	url := from + "/vm1"
	must(t, "snap", "create", url+"@s0")
	alter(t, url, 1, 3<<20, "s1")
	alter(t, url, 2, 5<<20, "s2")
	must(t, "snap", "rollback", url+"@s0")
	alter(t, url, 3, 6<<20, "s3")
	got := printed[copied](t, "copy", url, to+"/vm1")
	if got.Name != "vm1" || got.Size != 10<<20 || got.Snapshots != 4 || got.Data < 1<<20 || got.Resumed {
		t.Errorf("copy --json: %+v", got)
	}
	if i := printed[described](t, "info", to+"/vm1"); i.ID != got.ID || len(i.Snapshots) != 4 || i.Owner != nil {
		t.Errorf("info: %+v", i)
	}
	if got := snapNames(t, url); !slices.Equal(got, []string{"s0", "s1", "s2", "s3"}) {
		t.Errorf("snapshots: %q", got)
	}
	if out := must(t, "check", to+"/vm1", "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
	for _, snap := range []string{"", "s2", "s1", "s3", "s0"} {
		if snap != "" {
			must(t, "snap", "rollback", url+"@"+snap)
			must(t, "snap", "rollback", to+"/vm1@"+snap)
		}
		if !bytes.Equal(contentsOf(t, url), contentsOf(t, to+"/vm1")) {
			t.Errorf("they differ at %q", snap)
		}
	}
	out := must(t, "copy", url, from+"/vm2", "--no-snapshots")
	if !strings.HasPrefix(out, "made "+from+"/vm2 of 10 MiB, of which ") || len(snapNames(t, from+"/vm2")) > 0 {
		t.Errorf("copy: %q", out)
	}
	for _, c := range []struct{ args, want string }{
		{"", "STORE/IMAGE is missing"},
		{url, "STORE/NEW is missing"},
		{url + "@s0 " + to + "/x", "an image is wanted here"},
		{url + " " + to + "/x@y", "an image is wanted here"},
		{url + " vm2", "not a URL"},
		{url + " mem:x", "tests"},
		{url + " " + to + "/vm1", to + "/vm1 exists already: choose another name"},
		{url + " " + url, url + " exists already"},
		{from + "/none " + to + "/x", from + "/none: no such image"},
		{url + " file://" + t.TempDir() + "/none/x", "no store"},
		{"file://" + t.TempDir() + "/none/x " + url, "no store"},
	} {
		out, err := lsdctl(t, append([]string{"copy"}, strings.Fields(c.args)...)...)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || out != "" {
			t.Errorf("copy %s: %q, %v", c.args, out, err)
		}
	}
	if got := printed[[]engine.Garbage](t, "gc", to, "--age", "1ns"); len(got) != 0 {
		t.Errorf("gc: %+v", got)
	}
}

// TestCopyInterrupted: a store that fails in the middle ends a copy with what to do; the same
// command goes on.
func TestCopyInterrupted(t *testing.T) {
	from, to := newStore(t), newStore(t)
	path, _ := diskFile(t, 10<<20)
	url := from + "/vm1"
	must(t, "import", path, url)
	must(t, "snap", "create", url+"@s0")
	want := contentsOf(t, url)
	var hidden []string // data objects of the source are not there for a while
	id := printed[described](t, "info", url).ID.String()
	root := strings.TrimPrefix(from, "file://")
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(p, id) && strings.Contains(p, "/d/") {
			hidden = append(hidden, p)
		}
		return err
	})
	if err != nil || len(hidden) == 0 {
		t.Fatalf("no data objects: %v", err)
	}
	for _, p := range hidden {
		if err := os.Rename(p, p+"~"); err != nil {
			t.Fatal(err)
		}
	}
	_, err = lsdctl(t, "copy", url, to+"/vm1")
	if err == nil || !strings.HasPrefix(err.Error(), "copy "+url+" to "+to+"/vm1: ") || strings.Contains(err.Error(), "\n") ||
		!strings.Contains(err.Error(), ": the same command goes on where it was; to give it up, lsdctl snap rm "+url+"@lsdctl-copy-") {
		t.Errorf("copy: %v", err)
	}
	for _, p := range hidden {
		if err := os.Rename(p+"~", p); err != nil {
			t.Fatal(err)
		}
	}
	if got := snapNames(t, url); len(got) != 2 || !strings.HasPrefix(got[1], "lsdctl-copy-") {
		t.Errorf("snapshots: %q", got)
	}
	if got := printed[copied](t, "copy", url, to+"/vm1"); !got.Resumed || got.Snapshots != 1 {
		t.Errorf("copy --json: %+v", got)
	}
	if !bytes.Equal(contentsOf(t, to+"/vm1"), want) {
		t.Error("wrong data")
	}
	if got := snapNames(t, url); !slices.Equal(got, []string{"s0"}) {
		t.Errorf("snapshots: %q", got)
	}
}

// TestCopyStopped: a copy that is told to stop at once leaves nothing that the next one does
// not use or remove.
func TestCopyStopped(t *testing.T) {
	from, to := newStore(t), newStore(t)
	url := from + "/vm1"
	must(t, "create", url, "--size", "1M")
	ctx, stop := context.WithCancel(context.Background())
	stop()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd := newApp(io.Discard, null).command()
	cmd.SetArgs([]string{"copy", url, to + "/vm1", "--socket", filepath.Join(t.TempDir(), "sock")})
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("copy: %v", err)
	}
	must(t, "copy", url, to+"/vm1")
	if got := snapNames(t, url); len(got) > 0 {
		t.Errorf("snapshots: %q", got)
	}
}
