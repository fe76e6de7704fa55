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
