package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/backend/storetest"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// TestCheckStatus: the exit status says whether something is wrong, or could not
// be looked at.
func TestCheckStatus(t *testing.T) {
	dir := t.TempDir()
	store := "file://" + dir + "/store"
	for _, name := range []string{"whole", "orphan", "broken"} {
		must(t, "create", store+"/"+name, "--size", "1G")
	}
	super := func(name string) string {
		t.Helper()
		var info engine.Info
		if err := json.Unmarshal([]byte(must(t, "info", store+"/"+name, "--json")), &info); err != nil {
			t.Fatal(err)
		}
		found, err := filepath.Glob(filepath.Join(dir, "store/objects", info.ID.String(), "super*"))
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		return found[0]
	}
	if err := os.WriteFile(super("broken"), []byte("not a superblock"), 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := backend.ParseStore(store)
	if err != nil {
		t.Fatal(err)
	}
	st, err := open.Store(context.Background(), u)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	orphan := filepath.Base(filepath.Dir(super("orphan"))) + "/d/00000007.1"
	if err := st.Put(context.Background(), orphan, []byte("x")); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		args   string
		status int
		want   string // in the output, or in the error
	}{
		{store + "/whole", 0, "/whole: clean"},
		{store + "/whole --deep --rate 1M", 0, "clean"},
		{store + "/whole --json", 0, `"errors": []`},
		{store, 0, "3 images"},
		{store + "/broken", 1, "error: "},
		{store + "/broken --repair", 1, "bring it back"},
		{store + "/orphan", 1, "/d/00000007.1: orphan"},
		{store + "/orphan", 1, "lsdctl check --repair would see to 1 object"},
		{store + "/orphan --json", 1, `"problem": "orphan`},
		{store + "/orphan --repair", 0, "repaired: "},
		{store + "/orphan", 0, "clean"},
		{store + "/none", 2, "neither an image nor a store"},
		{"file://" + dir + "/nowhere/x", 2, "neither"},
		{store + " --deep", 2, "for an image"},
		{"vm1", 2, "not a URL"},
		{"rados://rbd/a?conf=" + dir + "/none", 2, "conf"},
		{"", 2, "STORE/IMAGE is missing"},
		{store + "/whole twice", 2, "too much"},
		{store + "/whole --rate 1M", 2, "--deep"},
		{store + "/whole --rate x", 2, "not a size"},
		{store + "/whole --colour", 2, "unknown flag"},
	} {
		out, err := lsdctl(t, append([]string{"check"}, strings.Fields(x.args)...)...)
		if got := status(err); got != x.status {
			t.Errorf("check %s: status %d (%v), want %d: %s", x.args, got, err, x.status, out)
		}
		text := out
		if x.status == statusFailed {
			text = api.OneLine(err)
		} else if err != nil && err.Error() != "" {
			t.Errorf("check %s: %v beside its report", x.args, err)
		}
		if !strings.Contains(text, x.want) {
			t.Errorf("check %s: %q does not say %q", x.args, text, x.want)
		}
	}
	if _, err := st.Stat(context.Background(), orphan); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("the orphan after its repair: %v", err)
	}
}

// TestCheckDirectory: damage of the directory is one clear error, of the store and of
// each image; a place where nothing of lsd is cannot be checked.
func TestCheckDirectory(t *testing.T) {
	for _, x := range []struct {
		name   string
		damage func(path string) error
		what   string
		ls     string
	}{
		{"missing", os.Remove, "directory: the directory of names is missing", "there are images: see lsdctl check"},
		{"empty", func(path string) error { return os.Truncate(path, 0) }, "directory: the directory of names is damaged", "corrupt"},
		{"flipped", func(path string) error {
			b, err := os.ReadFile(path)
			if err == nil {
				b[len(b)-1] ^= 1
				err = os.WriteFile(path, b, 0o600)
			}
			return err
		}, "directory: the directory of names is damaged", "corrupt"},
	} {
		t.Run(x.name, func(t *testing.T) {
			dir := t.TempDir()
			store := "file://" + dir + "/store"
			must(t, "create", store+"/vm1", "--size", "1G")
			var info engine.Info
			if err := json.Unmarshal([]byte(must(t, "info", store+"/vm1", "--json")), &info); err != nil {
				t.Fatal(err)
			}
			if err := x.damage(filepath.Join(dir, "store/objects/directory+mut")); err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				args string
				want []string
			}{
				{store, []string{"note: image " + info.ID.String() + " is there: made as vm1", "lsdctl check STORE --repair makes it anew", "1 error"}},
				{store + " --json", []string{info.ID.String()}},
				{store + "/vm1", []string{"lsdctl check STORE --repair makes it anew", "1 error"}},
				{store + "/vm1 --deep --repair", []string{"lsdctl check STORE --repair", "1 error"}},
				{store + "/none", []string{"lsdctl check STORE --repair", "1 error"}},
			} {
				out, err := lsdctl(t, append([]string{"check"}, strings.Fields(c.args)...)...)
				if status(err) != statusErrors || err.Error() != "" {
					t.Errorf("check %s: status %d, %v", c.args, status(err), err)
				}
				if n := strings.Count(out, "error: "); n != 1 && !strings.Contains(c.args, "--json") {
					t.Errorf("check %s: %d errors: %s", c.args, n, out)
				}
				for _, want := range append(c.want, strings.TrimPrefix(x.what, "directory: ")) {
					if !strings.Contains(out, want) {
						t.Errorf("check %s: %q does not say %q", c.args, out, want)
					}
				}
			}
			for _, args := range []string{"create " + store + "/vm2 --size 1G", "create " + store + "/vm1 --size 1G"} {
				out, err := lsdctl(t, strings.Fields(args)...)
				if line := api.OneLine(err); out != "" || status(err) != 1 || !strings.Contains(line, x.ls) {
					t.Errorf("%s: %v, %q", args, err, out)
				}
			}
			out, err := lsdctl(t, "ls", store)
			if line := api.OneLine(err); out != "" || status(err) != 1 || !strings.Contains(line, x.ls) || strings.Contains(line, "\n") {
				t.Errorf("ls: %v, %q", err, out)
			}
			if out := must(t, "check", store, "--repair"); !strings.Contains(out, "repaired: "+info.ID.String()+"/super: give the image the name vm1\n") || !strings.Contains(out, ": clean, ") {
				t.Errorf("the repair: %s", out)
			}
			if out := must(t, "check", store+"/vm1"); !strings.Contains(out, ": clean, ") {
				t.Errorf("the image after the repair: %s", out)
			}
		})
	}
	dir := t.TempDir()
	must(t, "create", "file://"+dir+"/empty/vm1", "--size", "1G")
	if err := os.RemoveAll(dir + "/empty/objects"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/nothing", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{dir + "/empty", dir + "/empty/vm1", dir + "/nothing", dir + "/nothing/vm1", dir + "/nowhere", dir + "/nowhere/vm1"} {
		out, err := lsdctl(t, "check", "file://"+url)
		if status(err) != statusFailed || out != "" || !strings.Contains(err.Error(), "file://"+url+" is n") {
			t.Errorf("check of %s, where nothing is: %v, %q", url, err, out)
		}
	}
	if out, err := lsdctl(t, "ls", "file://"+dir+"/empty"); err != nil || strings.Count(out, "\n") != 1 {
		t.Errorf("ls of an empty store: %v, %q", err, out)
	}
}

// TestReadOnlyStore: what only looks works on a store that cannot be changed.
func TestReadOnlyStore(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	must(t, "create", "file://"+dir+"/vm1", "--size", "1G")
	st, err := open.Store(ctx, backend.URL{Scheme: backend.SchemeFile, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	id, err := backend.Lookup(ctx, st, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	store := "file://" + storetest.ReadOnly(t, dir)
	for _, args := range [][]string{{"ls", store}, {"info", store + "/vm1"}, {"check", store}, {"check", store + "/vm1"}, {"check", store + "/vm1", "--deep", "--repair"}} {
		if out := must(t, args...); !strings.Contains(out, "vm1") && !strings.Contains(out, "clean") {
			t.Errorf("lsdctl %q: %s", args, out)
		}
	}
	if os.Geteuid() != 0 {
		return // for the store's owner, too, it is read-only now
	}
	if err := st.Put(ctx, id.String()+"/d/00000007.1", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if out, err := lsdctl(t, "check", store+"/vm1"); status(err) != statusErrors || !strings.Contains(out, "orphan") {
		t.Errorf("check: %v, %s", err, out)
	}
	if out, err := lsdctl(t, "check", store+"/vm1", "--repair"); status(err) != statusFailed || !strings.Contains(api.OneLine(err), "read-only file system") {
		t.Errorf("check --repair: %v, %s", err, out)
	}
}
