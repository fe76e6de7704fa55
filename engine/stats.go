package engine

import (
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/cache/readcache"
)

// Stats is what an image is doing, at one moment.
type Stats struct {
	State     string    `json:"state"`
	Why       string    `json:"why,omitempty"` // why it is not active
	Image     uuid.UUID `json:"image_id"`
	Size      uint64    `json:"size_bytes"`
	BlockSize uint32    `json:"block_size"`
	ReadOnly  bool      `json:"read_only"`
	Epoch     uint64    `json:"epoch"`

	LogID         uuid.UUID `json:"log_id"`
	LogSize       uint64    `json:"log_size_bytes"`
	LogUsed       uint64    `json:"log_used_bytes"`
	LogError      string    `json:"log_error,omitempty"`
	Dirty         uint64    `json:"dirty_bytes"` // written, overwritten included, and not yet in the store
	Lag           float64   `json:"destage_lag_seconds"`
	DestageMemory int64     `json:"destage_memory_bytes"` // memory of data objects that are being built and put
	Puts          int       `json:"objects_in_flight"`
	Queued        int       `json:"objects_queued"`
	Objects       uint64    `json:"objects"`           // accepted, over the image's life
	MapBytes      int64     `json:"map_bytes"`         // memory of the object map
	MapLoads      uint64    `json:"map_segment_loads"` // since it was opened
	MapEvicts     uint64    `json:"map_segment_evictions"`
	LiveBytes     uint64    `json:"live_bytes"`  // in the store, referred to by the map
	DataBytes     uint64    `json:"space_bytes"` // data of the objects that hold them
	DeadCount     int       `json:"dead_objects"`
	Cleaned       uint64    `json:"cleaned_bytes"`   // moved by the cleaner since it was opened
	Deleted       uint64    `json:"deleted_objects"` // since it was opened
	LeaseLeft     float64   `json:"lease_seconds"`

	InFlight  int     `json:"requests_in_flight"` // writes and flushes
	Waiting   int     `json:"requests_waiting"`   // for room in the log
	Stalled   float64 `json:"stalled_seconds"`    // how long they have been
	Stalls    uint64  `json:"stalls"`
	Reads     uint64  `json:"reads"`
	Writes    uint64  `json:"writes"`
	Flushes   uint64  `json:"flushes"`
	Discards  uint64  `json:"discards"`
	ReadBytes uint64  `json:"read_bytes"`
	WriteByts uint64  `json:"write_bytes"`
	PutBytes  uint64  `json:"put_bytes"`
	PutCount  uint64  `json:"puts"`
	ReadIOPS  float64 `json:"read_iops"` // since the call before
	WriteIOPS float64 `json:"write_iops"`

	ReadCache readcache.ClientStats `json:"read_cache"`

	Scrub ScrubStats `json:"scrub"`

	// MapError says which part of the map cannot be read, in one line that names its object, where
	// there is no checkpoint for that; of an image that was let go of: where there was none.
	MapError string `json:"map_error,omitempty"`

	StoreErrors    uint64  `json:"store_errors"`
	StoreDown      bool    `json:"store_down"`
	LastStoreError string  `json:"last_store_error,omitempty"`
	LastErrorAge   float64 `json:"last_store_error_age_seconds,omitempty"`
	ReadErrors     uint64  `json:"read_errors"`
}

// StoreFails returns the last error of the store if that fails at present, and nil if it
// works, as far as is known. It is called on the reactor.
func (im *Image) StoreFails() error {
	if !im.stats.storeDown {
		return nil
	}
	return im.stats.lastStoreErr
}

// Stats returns what the image is doing. Rates are since the last call that was
// at least half a second ago.
func (im *Image) Stats() Stats {
	c := &im.stats
	now := im.env.Now()
	if d := now - c.sampledAt; d >= time.Second/2 {
		c.readRate = float64(c.reads-c.reads0) / d.Seconds()
		c.writeRate = float64(c.writes-c.writes0) / d.Seconds()
		c.reads0, c.writes0, c.sampledAt = c.reads, c.writes, now
	}
	s := Stats{
		State: im.state.String(), Image: im.id, Size: im.sectors * SectorSize, BlockSize: im.super.sb.BlockSize,
		ReadOnly: im.readOnly, Epoch: im.super.sb.Epoch, Objects: im.accepted.object, MapBytes: im.objs.charged, DestageMemory: im.memory,
		MapLoads: im.objs.loaded, MapEvicts: im.objs.evictions, LiveBytes: im.table.live * SectorSize, DataBytes: im.table.space * SectorSize,
		DeadCount: len(im.table.dead) + len(im.table.kept), Cleaned: im.clean.moved, Deleted: im.reaper.deleted,
		Reads: c.reads, Writes: c.writes, Flushes: c.flushes, Discards: c.discards,
		ReadBytes: c.readBytes, WriteByts: c.writeBytes, PutBytes: c.objectBytes, PutCount: c.objects,
		ReadIOPS: c.readRate, WriteIOPS: c.writeRate,
		StoreErrors: c.storeErrors, StoreDown: c.storeDown, ReadErrors: c.readErrors + c.mapErrors,
		InFlight: im.late.n + im.acks.n + im.flushes.n, Waiting: im.blocked.n, Stalls: c.stalls,
		ReadCache: im.reads.Stats(),
	}
	if im.why != nil {
		s.Why = im.why.Error()
	}
	if c.lastStoreErr != nil {
		s.LastStoreError, s.LastErrorAge = c.lastStoreErr.Error(), (now - c.lastStoreErrAt).Seconds()
	}
	if c.stalledSince > 0 && im.blocked.n > 0 {
		s.Stalled = (now - c.stalledSince).Seconds()
	}
	if u := im.checkpoint.unread(); u != nil {
		s.MapError = u.err.Error()
	} else if err := im.checkpoint.leftOut; err != nil {
		s.MapError = err.Error()
	}
	if !im.readOnly {
		s.Scrub = im.scrub.stats(now)
		im.logStats(&s, now)
	}
	return s
}

func (im *Image) logStats(s *Stats, now time.Duration) {
	s.LogID, s.LogSize, s.LogUsed = im.logID, im.log.Size(), im.log.Used()
	if err := im.log.Err(); err != nil {
		s.LogError = err.Error()
	}
	if left := im.super.until - now; left > 0 && im.state != Fenced && im.state != Released {
		s.LeaseLeft = left.Seconds()
	}
	oldest := im.open
	queue := im.queue
	if im.apply.b != nil {
		queue = append([]*batch{im.apply.b}, queue...)
	}
	for i := len(queue) - 1; i >= 0; i-- {
		b := queue[i]
		s.Dirty += b.sectors * SectorSize
		switch b.state {
		case batchPutting:
			s.Puts += b.putting
		case batchSealed, batchBuilding, batchBuilt:
			s.Queued += b.objects
		}
		oldest = b
	}
	if im.open != nil {
		s.Dirty += im.open.sectors * SectorSize
	}
	if oldest != nil {
		s.Lag = (now - oldest.began).Seconds()
	}
}
