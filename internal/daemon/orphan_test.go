package daemon

import (
	"context"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/ublk"
)

// TestOrphan: a device that no record knows goes only if nobody serves it, and
// only with force.
func TestOrphan(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	w.kernel.put(ublk.Params{ID: 7, SizeBytes: 1 << 20}, ublk.StateQuiesced, -1)
	w.kernel.put(ublk.Params{ID: 8, SizeBytes: 1 << 20}, ublk.StateLive, 4711)
	tests := []struct {
		id    int
		force bool
		want  string // in the error; "" for none
	}{
		{7, false, "--force"},
		{8, true, "4711"},
		{9, true, "not attached"},
		{7, true, ""},
		{7, true, "not attached"},
	}
	for _, tt := range tests {
		_, err := h.removeOrphan(context.Background(), tt.id, tt.force)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("device %d, force %v: %v, want %q", tt.id, tt.force, err, tt.want)
		}
	}
}
