//go:build lab

package librbd_test

import (
	"path/filepath"
	"testing"
)

// TestCinder: all that OpenStack's Cinder does with librbd, by python3-rbd; on Ceph, what makes
// more of the store than reading and writing.
func TestCinder(t *testing.T) {
	script, err := filepath.Abs("cinder.py")
	if err != nil {
		t.Fatal(err)
	}
	onStores(t, func(t *testing.T, h *host) {
		args := []string{"/usr/bin/python3", "-B", script, "--lsd", "--pool", h.pool}
		if h.pool == "rbd" {
			args = append(args, "cloned_volumes", "backups_of_clones", "trash_and_clones")
		}
		out, err := h.runs(args...)
		t.Logf("\n%s", out)
		if err != nil {
			t.Error(err)
		}
	})
}
