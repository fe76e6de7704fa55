package daemon

import (
	"net/http"
	"slices"
	"strconv"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metric is one figure of an image.
type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*engine.Stats) float64
}

// collector makes metrics of what the images are doing when it is asked.
type collector struct {
	d       *Daemon
	up      *prometheus.Desc
	down    *prometheus.Desc
	reclaim *prometheus.Desc
	burst   [2]*prometheus.Desc // of logPool.bytes
	ops     [2]*prometheus.Desc // of storeOps.each
	metrics []metric
	cache   []cacheMetric
}

// cacheMetric is one figure of the read cache.
type cacheMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*readcache.Stats) float64
}

// cacheMetrics returns the figures of the read cache.
func cacheMetrics() []cacheMetric {
	gauge := func(name, help string, v func(*readcache.Stats) uint64) cacheMetric {
		return cacheMetric{
			desc:  prometheus.NewDesc("lsd_read_cache_"+name, help, nil, nil),
			kind:  prometheus.GaugeValue,
			value: func(s *readcache.Stats) float64 { return float64(v(s)) },
		}
	}
	counter := func(name, help string, v func(*readcache.Stats) uint64) cacheMetric {
		m := gauge(name+"_total", help, v)
		m.kind = prometheus.CounterValue
		return m
	}
	return []cacheMetric{
		gauge("up", "1 if it finds and keeps blocks.", func(s *readcache.Stats) uint64 {
			if s.State == readcache.StateOn {
				return 1
			}
			return 0
		}),
		gauge("size_bytes", "Size of its segments.", func(s *readcache.Stats) uint64 { return s.Size }),
		gauge("used_bytes", "In blocks that are found.", func(s *readcache.Stats) uint64 { return s.Used }),
		gauge("memory_bytes", "Memory for its index, ghost and buffers, for what is read ahead, and for what is read most.", func(s *readcache.Stats) uint64 { return s.Memory }),
		gauge("warm_bytes", "Of that, what is read most and need not be read from the SSD.", func(s *readcache.Stats) uint64 { return s.Warm }),
		counter("hits", "Runs of blocks that it had.", func(s *readcache.Stats) uint64 { return s.Hits }),
		counter("hit_bytes", "Bytes that it had.", func(s *readcache.Stats) uint64 { return s.HitBytes }),
		counter("misses", "Runs of blocks that it did not have.", func(s *readcache.Stats) uint64 { return s.Misses }),
		counter("miss_bytes", "Bytes that it did not have.", func(s *readcache.Stats) uint64 { return s.MissBytes }),
		counter("fetched_bytes", "Bytes read from stores: for misses, ahead of them, and headers.", func(s *readcache.Stats) uint64 { return s.Fetched }),
		counter("ahead_bytes", "Of these, read ahead.", func(s *readcache.Stats) uint64 { return s.Ahead }),
		counter("ahead_used_bytes", "Of these, asked for from memory since.", func(s *readcache.Stats) uint64 { return s.AheadUsed }),
		counter("joined_bytes", "Bytes missed that another read's fetch served.", func(s *readcache.Stats) uint64 { return s.Joined }),
		counter("warmed_bytes", "Bytes taken into memory since they were read much.", func(s *readcache.Stats) uint64 { return s.Warmed }),
		counter("written_bytes", "Bytes written to the SSD: its wear.", func(s *readcache.Stats) uint64 { return s.Written }),
		counter("filled_bytes", "Bytes of blocks that were kept.", func(s *readcache.Stats) uint64 { return s.Filled }),
		counter("moved_bytes", "Bytes of blocks written again, since they were in use.", func(s *readcache.Stats) uint64 { return s.Moved }),
		counter("evicted_bytes", "Bytes of blocks that were evicted.", func(s *readcache.Stats) uint64 { return s.Evicted }),
		counter("forgotten_bytes", "Bytes of blocks of objects that were deleted.", func(s *readcache.Stats) uint64 { return s.Forgotten }),
		counter("dropped_bytes", "Bytes of blocks not kept since the SSD was behind.", func(s *readcache.Stats) uint64 { return s.Dropped }),
		counter("mismatches", "Blocks and headers that failed their checksum.", func(s *readcache.Stats) uint64 { return s.Mismatches }),
		counter("errors", "Errors of the SSD.", func(s *readcache.Stats) uint64 { return s.Errors }),
	}
}

// metrics returns the handler of /metrics.
func (d *Daemon) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(newCollector(d), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

func imageDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("lsd_image_"+name, help, []string{"device", "image"}, nil)
}

func storeOpLabels() []string { return []string{"operation", "object"} }

func newCollector(d *Daemon) *collector {
	gauge := func(name, help string, v func(*engine.Stats) float64) metric {
		return metric{imageDesc(name, help), prometheus.GaugeValue, v}
	}
	counter := func(name, help string, v func(*engine.Stats) float64) metric {
		return metric{imageDesc(name, help), prometheus.CounterValue, v}
	}
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	return &collector{
		d:       d,
		cache:   cacheMetrics(),
		up:      prometheus.NewDesc("lsd_image_up", "1 if the image serves.", []string{"device", "image", "state"}, nil),
		down:    imageDesc("reactor_restarts_total", "Times that the image's reactor was replaced."),
		reclaim: prometheus.NewDesc("lsd_reclaims", "Removed images of which what they were made of is not reclaimed yet.", nil, nil),
		burst: [2]*prometheus.Desc{
			prometheus.NewDesc("lsd_burst_memory_bytes", "Memory that there is to be lent to write logs in bursts.", nil, nil),
			prometheus.NewDesc("lsd_burst_memory_lent_bytes", "What of it is lent.", nil, nil),
		},
		ops: [2]*prometheus.Desc{
			prometheus.NewDesc("lsd_store_operations_total", "What stores were asked for, for the images.", storeOpLabels(), nil),
			prometheus.NewDesc("lsd_store_operation_bytes_total", "Bytes that went there and came back by that.", storeOpLabels(), nil),
		},
		metrics: []metric{
			gauge("size_bytes", "Size of the image.", func(s *engine.Stats) float64 { return float64(s.Size) }),
			gauge("epoch", "Epoch of the ownership.", func(s *engine.Stats) float64 { return float64(s.Epoch) }),
			gauge("lease_seconds", "What is left of the lease.", func(s *engine.Stats) float64 { return s.LeaseLeft }),
			gauge("log_size_bytes", "Size of the write log.", func(s *engine.Stats) float64 { return float64(s.LogSize) }),
			gauge("log_used_bytes", "What of it cannot be overwritten yet.", func(s *engine.Stats) float64 { return float64(s.LogUsed) }),
			gauge("dirty_bytes", "Written, and not in the store yet.", func(s *engine.Stats) float64 { return float64(s.Dirty) }),
			gauge("destage_lag_seconds", "Age of the oldest write that is not in the store yet.", func(s *engine.Stats) float64 { return s.Lag }),
			gauge("objects_in_flight", "Data objects being put.", func(s *engine.Stats) float64 { return float64(s.Puts) }),
			gauge("destage_memory_bytes", "Memory of data objects that are built and put.", func(s *engine.Stats) float64 { return float64(s.DestageMemory) }),
			gauge("requests_in_flight", "Writes and flushes under way.", func(s *engine.Stats) float64 { return float64(s.InFlight) }),
			gauge("requests_waiting", "Writes that wait for room in the log.", func(s *engine.Stats) float64 { return float64(s.Waiting) }),
			gauge("stalled_seconds", "How long they have been waiting.", func(s *engine.Stats) float64 { return s.Stalled }),
			gauge("store_down", "1 while the store does not take writes.", func(s *engine.Stats) float64 { return flag(s.StoreDown) }),
			gauge("map_damaged", "1 while there is no checkpoint because part of the map cannot be read.", func(s *engine.Stats) float64 { return flag(s.MapError != "") }),
			gauge("map_bytes", "Memory of the object map.", func(s *engine.Stats) float64 { return float64(s.MapBytes) }),
			counter("map_segment_loads_total", "Map segments loaded from the store.", func(s *engine.Stats) float64 { return float64(s.MapLoads) }),
			counter("map_segment_evictions_total", "Map segments taken out of memory.", func(s *engine.Stats) float64 { return float64(s.MapEvicts) }),
			gauge("live_bytes", "In the store and referred to by the map.", func(s *engine.Stats) float64 { return float64(s.LiveBytes) }),
			gauge("space_bytes", "Data of the objects that hold the live bytes.", func(s *engine.Stats) float64 { return float64(s.DataBytes) }),
			gauge("dead_objects", "Data objects that nothing refers to, not yet deleted.", func(s *engine.Stats) float64 { return float64(s.DeadCount) }),
			counter("cleaned_bytes_total", "Live bytes that the cleaner has moved.", func(s *engine.Stats) float64 { return float64(s.Cleaned) }),
			counter("deleted_objects_total", "Dead data objects deleted.", func(s *engine.Stats) float64 { return float64(s.Deleted) }),
			counter("stalls_total", "Writes that had to wait for room in the log.", func(s *engine.Stats) float64 { return float64(s.Stalls) }),
			counter("reads_total", "Reads.", func(s *engine.Stats) float64 { return float64(s.Reads) }),
			counter("writes_total", "Writes.", func(s *engine.Stats) float64 { return float64(s.Writes) }),
			counter("flushes_total", "Flushes.", func(s *engine.Stats) float64 { return float64(s.Flushes) }),
			counter("discards_total", "Discards and write-zeroes.", func(s *engine.Stats) float64 { return float64(s.Discards) }),
			counter("read_bytes_total", "Bytes read.", func(s *engine.Stats) float64 { return float64(s.ReadBytes) }),
			counter("written_bytes_total", "Bytes written.", func(s *engine.Stats) float64 { return float64(s.WriteByts) }),
			counter("puts_total", "Data objects put.", func(s *engine.Stats) float64 { return float64(s.PutCount) }),
			counter("put_bytes_total", "Bytes in them.", func(s *engine.Stats) float64 { return float64(s.PutBytes) }),
			counter("scrub_read_bytes_total", "Bytes of data objects that the scrub has verified.", func(s *engine.Stats) float64 { return float64(s.Scrub.Bytes) }),
			counter("scrub_errors_total", "Damaged data objects that the scrub has found.", func(s *engine.Stats) float64 { return float64(s.Scrub.Errors) }),
			counter("scrub_passes_total", "Passes of the scrub over all data objects.", func(s *engine.Stats) float64 { return float64(s.Scrub.Passes) }),
			counter("store_errors_total", "Errors of the store, all tried again.", func(s *engine.Stats) float64 { return float64(s.StoreErrors) }),
			counter("read_cache_hit_bytes_total", "Bytes read from the read cache.", func(s *engine.Stats) float64 { return float64(s.ReadCache.HitBytes) }),
			counter("read_cache_miss_bytes_total", "Bytes that the read cache did not have.", func(s *engine.Stats) float64 { return float64(s.ReadCache.MissBytes) }),
			counter("read_cache_fetched_bytes_total", "Bytes read from the store.", func(s *engine.Stats) float64 { return float64(s.ReadCache.Fetched) }),
			counter("read_errors_total", "Reads that failed.", func(s *engine.Stats) float64 { return float64(s.ReadErrors) }),
		},
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.up
	ch <- c.down
	ch <- c.reclaim
	for _, d := range slices.Concat(c.burst[:], c.ops[:]) {
		ch <- d
	}
	for _, m := range c.metrics {
		ch <- m.desc
	}
	for _, m := range c.cache {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	cache := c.d.readCache.Stats()
	for _, m := range c.cache {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(&cache))
	}
	ch <- prometheus.MustNewConstMetric(c.reclaim, prometheus.GaugeValue, float64(c.d.reclaim.len()))
	all, lent := c.d.shared.logPool.bytes()
	for i, n := range [2]int64{all, lent} {
		ch <- prometheus.MustNewConstMetric(c.burst[i], prometheus.GaugeValue, float64(n))
	}
	c.d.shared.storeOps.each(func(op, object string, n, bytes uint64) {
		for i, v := range [2]uint64{n, bytes} {
			ch <- prometheus.MustNewConstMetric(c.ops[i], prometheus.CounterValue, float64(v), op, object)
		}
	})
	for _, im := range c.d.describeAll(c.d.ctx) {
		dev := strconv.Itoa(im.ID)
		up := 0.0
		if im.State == api.StateActive {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(c.up, prometheus.GaugeValue, up, dev, im.URL, im.State)
		ch <- prometheus.MustNewConstMetric(c.down, prometheus.CounterValue, float64(im.Restarts), dev, im.URL)
		if im.Stats == nil {
			continue
		}
		for _, m := range c.metrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(im.Stats), dev, im.URL)
		}
	}
}
