package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/reactor"
)

// DefaultReadCacheSize is the size of the read cache unless it is said.
const DefaultReadCacheSize = 1 << 30

// cacheReaders is how many headers are read at one time at a start.
const cacheReaders = 16

// cacheRests is how long it is from one look for memory that nobody reads to the next.
const cacheRests = time.Minute

// readCache is the read cache that all images of the daemon share. It never
// keeps the daemon from starting: without its file the store serves all reads.
type readCache struct {
	*readcache.Cache
	path   string
	file   *readcache.OSFile // nil: there is none
	err    error             // why there is none
	rested time.Time         // when Rest was called; of whoever calls tend
	logger *slog.Logger
}

// openReadCache opens the cache at path, of size bytes, 0 for none, with so much memory for what is
// read most.
func openReadCache(path string, size, memory int64, logger *slog.Logger) *readCache {
	o := readcache.Options{Readers: cacheReaders, Memory: max(memory, 0), Logger: logger}
	rc := &readCache{path: path, logger: logger}
	if size > 0 {
		if rc.err = rc.open(size, o); rc.err == nil {
			return rc
		}
		logger.Error("no read cache: reads go to the store", "err", rc.err)
	}
	rc.Cache = readcache.None(o)
	return rc
}

func (rc *readCache) open(size int64, o readcache.Options) error {
	if err := os.MkdirAll(filepath.Dir(rc.path), 0o700); err != nil {
		return fmt.Errorf("make the cache directory: %w", err)
	}
	// A daemon that was killed may have a write in flight.
	ctx, stop := context.WithTimeout(context.Background(), 2*time.Second)
	defer stop()
	f, err := readcache.OpenFile(ctx, rc.path, size)
	if err != nil {
		return err
	}
	c, err := readcache.Open(f, o)
	if err != nil {
		f.Close()
		return fmt.Errorf("%s: %w", rc.path, err)
	}
	rc.Cache, rc.file = c, f
	return nil
}

// load finds what the cache holds from before.
func (rc *readCache) load(ctx context.Context) {
	if rc.file == nil {
		return
	}
	began := time.Now()
	if err := rc.Load(ctx); err != nil {
		rc.logger.Warn("the read cache is not loaded", "err", err)
		return
	}
	s := rc.Stats()
	rc.logger.Info("read cache", "path", rc.path, "size", s.Size, "used", s.Used, "took", time.Since(began).Round(time.Millisecond))
}

// tend lets go of memory for what nobody has read in minutes. One goroutine calls it, now and then.
func (rc *readCache) tend(now time.Time) {
	if now.Sub(rc.rested) >= cacheRests {
		rc.rested = now
		rc.Rest()
	}
}

// device returns the cache's file on the ring of r, nil if there is no file.
func (rc *readCache) device(r *reactor.Reactor) aio.Device {
	if rc.file == nil {
		return nil
	}
	return r.File(rc.file.Fd())
}

// describe returns what the cache is and does.
func (rc *readCache) describe() api.ReadCache {
	v := api.ReadCache{Path: rc.path, Stats: rc.Stats()}
	if rc.err != nil {
		v.Error = api.OneLine(rc.err)
	}
	return v
}
