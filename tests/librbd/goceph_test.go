//go:build lab

package librbd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestGoCeph: a Go program on go-ceph, whose runtime has threads and signals of its own.
func TestGoCeph(t *testing.T) {
	goceph := filepath.Join(t.TempDir(), "goceph")
	if out, err := exec.Command("go", "build", "-tags", "pacific", "-o", goceph, "./goceph").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	onStores(t, func(t *testing.T, h *host) {
		out, err := h.runs(goceph, h.pool, os.Getenv("CEPH_CONF"))
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}
