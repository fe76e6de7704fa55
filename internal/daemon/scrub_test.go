package daemon

import (
	"context"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// TestScrub: a damaged object is found without anybody reading it, and shows in
// status, advice, metrics and log.
func TestScrub(t *testing.T) {
	w := newWorld(t)
	w.scrub = 1 << 30
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 7)
	if err := h.find(id).getDisk().destage(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	var key string
	err := w.store.List(context.Background(), "", func(k string) error {
		if strings.Contains(k, "/d/") {
			key = k
		}
		return nil
	})
	if err != nil || key == "" {
		t.Fatal(key, err)
	}
	b := make([]byte, 1<<20)
	n, err := w.store.Get(context.Background(), key, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	b[n-1] ^= 1
	if err := w.store.Delete(context.Background(), key); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Put(context.Background(), key, b[:n]); err != nil {
		t.Fatal(err)
	}
	var im api.Image
	for deadline := time.Now().Add(30 * time.Second); im.Stats == nil || im.Stats.Scrub.Passes == 0; time.Sleep(10 * time.Millisecond) {
		if im = h.await(id, api.StateActive); time.Now().After(deadline) {
			t.Fatalf("no pass has ended: %+v", im.Stats.Scrub)
		}
	}
	if s := im.Stats.Scrub; s.Errors != 1 || s.Bad != key {
		t.Errorf("%+v, and %s is damaged", s, key)
	}
	if advice := strings.Join(im.Advice, " "); !strings.Contains(advice, key) {
		t.Errorf("the advice %q does not name %s", advice, key)
	}
	if log := w.log.String(); !strings.Contains(log, "damaged object") || !strings.Contains(log, key) {
		t.Errorf("the log does not name %s", key)
	}
	rec := httptest.NewRecorder()
	h.metrics().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	text, err := io.ReadAll(rec.Result().Body)
	if err != nil || !strings.Contains(string(text), `lsd_image_scrub_errors_total{device="0",image="mem:vm1"} 1`) {
		t.Errorf("metrics: %v", err)
	}
}
