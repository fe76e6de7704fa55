package daemon

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/api"
)

// TestReadCacheFile: whatever is wrong with the read cache's file, there is a
// cache, which says what is wrong.
func TestReadCacheFile(t *testing.T) {
	logger := slog.New(slog.NewTextHandler(io.Discard, nil))
	dir := t.TempDir()
	path := filepath.Join(dir, "cache", "read-cache")
	rc := openReadCache(path, 2*readcache.MinSize, 0, logger)
	rc.load(context.Background())
	if v := rc.describe(); v.State != readcache.StateOn || v.Error != "" || v.Size == 0 || v.Path != path {
		t.Errorf("a new cache: %+v", v)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 2*readcache.MinSize {
		t.Errorf("its file: %v, %v", st, err)
	}
	for name, c := range map[string]struct {
		path string
		size int64
		want string
	}{
		"none":     {path, 0, ""},
		"locked":   {path, readcache.MinSize, "in use"},
		"a device": {"/dev/null", readcache.MinSize, "regular file"},
		"too big":  {filepath.Join(dir, "other"), readcache.MaxSize, "read cache"},
	} {
		t.Run(name, func(t *testing.T) {
			rc := openReadCache(c.path, c.size, 0, logger)
			rc.load(context.Background())
			v := rc.describe()
			if v.State != readcache.StateOff || !strings.Contains(v.Error, c.want) || c.want == "" && v.Error != "" {
				t.Errorf("%+v, want off: %q", v, c.want)
			}
			if rc.device(nil) != nil {
				t.Error("it has a device")
			}
			rc.Close()
		})
	}
	rc.Close()
	rc.file.Close()
}

// TestReadCacheIsShared: the images of a daemon have its cache, and it shows in
// status and metrics.
func TestReadCacheIsShared(t *testing.T) {
	cache := openReadCache(filepath.Join(t.TempDir(), "read-cache"), readcache.MinSize, 0, slog.New(slog.NewTextHandler(io.Discard, nil)))
	t.Cleanup(func() { cache.file.Close() }) // after the host has ended
	cache.load(context.Background())
	w := newWorld(t)
	h := w.newHost()
	h.readCache = cache
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 7)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	id = h.add(api.AttachRequest{ID: -1})
	for range 3 {
		w.kernel.check(t, id, 8, 7)
	}
	im := h.await(id, api.StateActive)
	if s := im.Stats.ReadCache; s.Misses == 0 || s.Hits == 0 {
		t.Errorf("the image's use of the cache: %+v", s)
	}
	if s := cache.Stats(); s.Hits == 0 || s.Filled == 0 {
		t.Errorf("the cache: %+v", s)
	}
}
