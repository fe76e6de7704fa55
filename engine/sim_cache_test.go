package engine

import (
	"context"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// simCachePlan says what the read caches of one world are like.
type simCachePlan struct {
	on     bool // hosts have one
	ring   bool // the reactor reads it, else workers
	blocks int  // in a segment: few, so that the cache is soon full
	fail   float64
	flip   float64 // that a bit of what is read of it is flipped
	damage float64 // that bits flip at rest, at a change of the weather
	die    float64 // that the process dies in the middle of its maintenance
}

// simCache is the read cache of a host: a disk, and what the host's process has of
// it. Nothing that happens to it may be seen by a client.
type simCache struct {
	disk   *simdisk.Disk    // nil: the host has none
	cache  *readcache.Cache // of the process; nil: it has not opened it
	loaded bool
}

// newCache gives a new host a cache, often one that another host leaves behind: a
// host that had the image before, and comes back when others have had it.
func (h *simHost) newCache() {
	w := h.w
	if !w.plan.cache.on {
		return
	}
	if n := len(w.caches); n > 0 && w.rng.IntN(4) > 0 {
		h.cache.disk = w.caches[n-1]
		w.caches = w.caches[:n-1]
	} else {
		h.cache.disk = simdisk.New(readcache.MinSize, w.rng)
		h.cache.disk.Aligned = true
	}
	h.cache.disk.Fail, h.cache.disk.Corrupt = h.cacheFails, h.cacheFlips
}

// openCache opens the cache in a new process, as the daemon does before it attaches
// an image: a cache that does not open does not keep it from that.
func (h *simHost) openCache() {
	w, c := h.w, &h.cache
	if c.disk == nil || c.cache != nil {
		return
	}
	o := readcache.Options{
		Seed: 1 + w.rng.Uint64()>>1, SegmentBlocks: w.plan.cache.blocks, Logger: w.plan.config.Logger,
		Memory: int64(w.plan.extras.warm) * readcache.SegmentSize, WarmBlocks: w.plan.cache.blocks,
		Allocate: func(n int) ([]byte, func() error, error) {
			return make([]byte, n), func() error { return nil }, nil // a process that is killed frees nothing
		},
	}
	var err error
	if c.cache, err = readcache.Open(simCacheFile{c.disk, h}, o); err != nil {
		c.cache = readcache.None(o)
	}
	w.note("open cache", class(err))
	if c.loaded = err != nil; !c.loaded && w.rng.IntN(2) == 0 {
		h.loadCache()
	}
}

// loadCache finds what the cache's disk holds: before an image is opened, or beside
// its reads.
func (h *simHost) loadCache() {
	c := &h.cache
	c.loaded = true
	if err := c.cache.Load(context.Background()); err != nil {
		h.w.fail("%s: %v", h.name, err)
	}
	h.w.counts[cacheFound] += c.cache.Stats().Used
}

// configure gives an image that is opened the cache.
func (c *simCache) configure(ring bool, config *Config) {
	if c.cache == nil {
		return
	}
	config.ReadCache = c.cache
	if ring {
		config.ReadCacheDevice = c.disk.Device()
	}
}

// endCache ends what the process has of the cache, in an orderly way or not, and
// counts what it has done.
func (h *simHost) endCache(orderly bool) {
	c := &h.cache
	if c.cache == nil {
		return
	}
	if c.cache.Stats().State == readcache.StateOff {
		h.w.counts[cacheOff]++
	}
	if orderly {
		c.cache.Close()
	}
	s := c.cache.Stats()
	h.w.note("cache", s.HitBytes, s.MissBytes, s.Written, s.Evicted, s.Mismatches, s.Errors)
	h.w.counts.addStats(&s)
	c.cache = nil
}

// leaveCache leaves the cache's disk to hosts that come later.
func (h *simHost) leaveCache() {
	h.endCache(false)
	if h.cache.disk != nil {
		h.cache.disk.Kill()
		h.w.caches = append(h.w.caches, h.cache.disk)
		h.cache.disk = nil
	}
}

// Places on the cache's disk, by its format.
const (
	simCacheSegments = readcache.MinSize/readcache.SegmentSize - 1
	simCacheHeader   = 3 // blocks
)

// cacheFails says which operations of the cache's disk fail.
func (h *simHost) cacheFails(op simdisk.Op) bool {
	w := h.w
	w.note("cache", uint64(op.Kind), uint64(op.Off), uint64(op.Len))
	return h.faults.cache || h.faults.on && w.rng.Float64() < w.plan.cache.fail
}

// cacheFlips flips bits of what is read of the cache's disk.
func (h *simHost) cacheFlips(op simdisk.Op, p []byte) {
	w := h.w
	if op.Off%readcache.SegmentSize != 0 {
		w.counts[cacheReads]++
	}
	if h.faults.on && w.rng.Float64() < w.plan.cache.flip {
		w.counts[cacheFlips]++
		p[w.rng.IntN(len(p))] ^= 1 << w.rng.IntN(8)
	}
}

// cacheWeather damages the cache's disk at rest, and makes all of it fail for a
// while, or until it is given up.
func (h *simHost) cacheWeather() {
	w, p := h.w, &h.w.plan.cache
	if h.cache.disk == nil {
		return
	}
	if p.fail > 0 && w.rng.IntN(4) == 0 {
		h.faults.cache = !h.faults.cache
	}
	if w.rng.Float64() >= p.damage {
		return
	}
	for range 1 << w.rng.IntN(5) {
		block := w.rng.IntN(simCacheHeader + p.blocks)
		off := int64(1+w.rng.IntN(simCacheSegments))*readcache.SegmentSize + int64(block)*readcache.BlockSize
		if w.rng.IntN(64) == 0 {
			off = 0 // the header of all of it
		}
		h.cache.disk.Damage(off + w.rng.Int64N(readcache.BlockSize))
	}
}

// simCacheFile is the blocking view of the disk of a host's cache.
type simCacheFile struct {
	*simdisk.Disk
	h *simHost
}

func (f simCacheFile) ReadAt(p []byte, off int64) (n int, err error) {
	f.h.io()
	f.h.meanwhile(off)
	n, err = f.Disk.ReadAt(p, off)
	f.h.io()
	return n, err
}

func (f simCacheFile) WriteAt(p []byte, off int64) (n int, err error) {
	f.h.io()
	f.h.meanwhile(off)
	if w := f.h.w; w.acting && w.rng.Float64() < w.plan.cache.die {
		f.Disk.WriteAt(p[:w.rng.IntN(len(p)/readcache.BlockSize)*readcache.BlockSize], off)
		panic(simCrash{f.h})
	}
	n, err = f.Disk.WriteAt(p, off)
	f.h.meanwhile(off)
	f.h.io()
	return n, err
}

func (f simCacheFile) Sync() error {
	f.h.io()
	return f.Disk.Sync()
}

// meanwhile lets the host's reactor and its other workers go on while one is in the
// middle of its maintenance of the cache, or loads it: only these two come to the
// beginning of a segment, and nobody waits for them.
func (h *simHost) meanwhile(off int64) {
	if h.im == nil || h.opening || off == 0 || off%readcache.SegmentSize != 0 {
		return
	}
	for range h.w.rng.IntN(3) {
		h.env.step()
		h.im.EndTurn()
		h.hand() // or the log may have failed before the client hears of this turn
	}
}
