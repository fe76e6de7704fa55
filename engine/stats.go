package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
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

	StoreErrors    uint64  `json:"store_errors"`
	StoreDown      bool    `json:"store_down"`
	LastStoreError string  `json:"last_store_error,omitempty"`
	LastErrorAge   float64 `json:"last_store_error_age_seconds,omitempty"`
	ReadErrors     uint64  `json:"read_errors"`
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
		DeadCount: len(im.table.dead), Cleaned: im.clean.moved, Deleted: im.reaper.deleted,
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

// Info is what a store says of an image.
type Info struct {
	Name       string    `json:"name"`
	ID         uuid.UUID `json:"id"`
	Size       uint64    `json:"size_bytes"`
	BlockSize  uint32    `json:"block_size"`
	ObjectSize uint32    `json:"object_size"`
	Created    time.Time `json:"created"`
	Epoch      uint64    `json:"epoch"`
	Owner      *Holder   `json:"owner,omitempty"`
	Evicting   string    `json:"evict_asked_by,omitempty"`
	Checkpoint uint64    `json:"checkpoint_object,omitempty"`
	CutOff     []Branch  `json:"cut_off,omitempty"`
}

// Branch is a state of an image that is kept for a write log that was cut off by a
// forced take-over, and may hold more.
type Branch struct {
	Log   uuid.UUID `json:"log_id"`
	Host  string    `json:"host"`
	Since time.Time `json:"since"` // of that host's ownership
	Epoch uint64    `json:"epoch"`
}

// Holder is the owner of an image.
type Holder struct {
	Host    string        `json:"host"`
	Log     uuid.UUID     `json:"log_id"`
	Since   time.Time     `json:"since"`
	Lease   time.Duration `json:"lease_ns"`
	Renewal uint64        `json:"renewals"`
}

// Describe returns what the store says of the image of that name.
func Describe(ctx context.Context, st backend.Store, name string) (Info, error) {
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		return Info{}, err
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return Info{}, err
	}
	info := Info{
		Name: name, ID: id, Size: sb.Sectors * SectorSize, BlockSize: sb.BlockSize, ObjectSize: sb.ObjectSize,
		Created: sb.Created, Epoch: sb.Epoch,
	}
	info.Owner = sb.holder()
	if sb.Evict != nil {
		info.Evicting = sb.Evict.By
	}
	if sb.Checkpoint != nil {
		info.Checkpoint = sb.Checkpoint.Object
	}
	for _, p := range sb.Points {
		info.CutOff = append(info.CutOff, Branch{Log: p.Log, Host: p.Host, Since: p.Since, Epoch: p.Epoch})
	}
	return info, nil
}

// OwnerOf returns the owner of the image id, nil if it has none.
func OwnerOf(ctx context.Context, st backend.Store, id uuid.UUID) (*Holder, error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return nil, err
	}
	return sb.holder(), nil
}

func (s *superblock) holder() *Holder {
	if s.Owner == nil {
		return nil
	}
	return &Holder{Host: s.Owner.Host, Log: s.Owner.Log, Since: s.Owner.Since, Lease: s.Owner.Lease, Renewal: s.Owner.Renewal}
}

// Remove removes the image of that name and all its objects. An image that has
// an owner is refused with an OwnedError unless force is set; url names it in
// messages. progress, if set, is told how many objects are gone.
func Remove(ctx context.Context, st backend.Store, name, url string, force bool, progress func(done int)) error {
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		return err
	}
	sb, _, err := loadSuperblock(ctx, st, id)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		// A removal that did not get to its end: go on with it.
	case err != nil && !force:
		return err
	case err == nil && sb.Owner != nil && !force:
		return &OwnedError{Image: url, Host: sb.Owner.Host, Since: sb.Owner.Since, Lease: sb.Owner.Lease}
	}
	// The name comes last, so that a removal that was interrupted can be repeated.
	if err := removeObjects(ctx, st, id, progress); err != nil {
		return fmt.Errorf("remove image %s: %w", name, err)
	}
	return backend.Unlink(ctx, st, name, id)
}

// removeObjects removes all objects of an image. The superblock goes first, so that
// nobody attaches an image whose objects are on their way out.
func removeObjects(ctx context.Context, st backend.Store, id uuid.UUID, progress func(done int)) error {
	if err := st.Delete(ctx, SuperblockKey(id)); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	var keys []string
	if err := st.List(ctx, id.String()+"/", func(key string) error { keys = append(keys, key); return nil }); err != nil {
		return err
	}
	for i, k := range keys {
		if err := st.Delete(ctx, k); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		if progress != nil {
			progress(i + 1)
		}
	}
	return nil
}
