//go:build lab

package librbd_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstall: the library is installed beside the distribution's, which all programs find as before,
// unless they are to find ours.
func TestInstall(t *testing.T) {
	h := &host{t: t}
	for _, c := range []struct {
		args string
		ours bool
	}{{"", false}, {"SYSTEM=1", true}} {
		root := t.TempDir()
		h.shell("../..", "make -s install-librbd PREFIX=/opt/lsd DESTDIR="+root+" "+c.args)
		lib := filepath.Join(root, "opt/lsd/lib/lsd")
		conf := filepath.Join(root, "etc/ld.so.conf.d/00-lsd-librbd.conf")
		text, err := os.ReadFile(conf)
		if err != nil {
			t.Fatal(err)
		}
		// As on a host of which this directory is the root.
		if err := os.WriteFile(conf, []byte(strings.ReplaceAll(string(text), "/opt/lsd/lib/lsd", lib)), 0o644); err != nil {
			t.Fatal(err)
		}
		all := filepath.Join(root, "ld.so.conf")
		if err := os.WriteFile(all, []byte("include "+root+"/etc/ld.so.conf.d/*.conf\ninclude /etc/ld.so.conf.d/*.conf\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		cache := filepath.Join(root, "cache")
		h.shell(root, "ldconfig -X -f "+all+" -C "+cache)
		found := h.shell(root, "ldconfig -p -C "+cache+" | grep -m 1 'librbd[.]so[.]1 '")
		if strings.Contains(found, lib) != c.ours {
			t.Errorf("make install-librbd %s: programs find %s", c.args, found)
		}
	}
}
