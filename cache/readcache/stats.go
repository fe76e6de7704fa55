package readcache

// States of a cache.
const (
	StateOn      = "on"
	StateLoading = "loading" // what is on the SSD is found, but nothing is kept yet
	StateOff     = "off"     // there is no file, or it has failed
)

// Stats is what a cache holds and has done since it was opened.
type Stats struct {
	State  string `json:"state"`
	Size   uint64 `json:"size_bytes"`
	Used   uint64 `json:"used_bytes"`   // by blocks
	Memory uint64 `json:"memory_bytes"` // index, ghost, buffers, read-ahead, and what is warm
	Warm   uint64 `json:"warm_bytes"`   // segments that are read much, in memory as well

	ClientStats

	Warmed     uint64 `json:"warmed_bytes"`  // taken into memory since they were read much
	Written    uint64 `json:"written_bytes"` // to the SSD: its wear
	Filled     uint64 `json:"filled_bytes"`  // kept, of what was fetched
	Moved      uint64 `json:"moved_bytes"`   // written again, since it was used
	Evicted    uint64 `json:"evicted_bytes"`
	Forgotten  uint64 `json:"forgotten_bytes"` // of objects that are no more
	Dropped    uint64 `json:"dropped_bytes"`   // not kept, since the SSD was behind
	Mismatches uint64 `json:"mismatches"`      // blocks and headers that failed their checksum
	Errors     uint64 `json:"errors"`          // of the SSD
}

// ClientStats is what clients of a cache have done.
type ClientStats struct {
	Hits      uint64 `json:"hits"` // runs of blocks
	HitBytes  uint64 `json:"hit_bytes"`
	Misses    uint64 `json:"misses"`
	MissBytes uint64 `json:"miss_bytes"`
	Fetched   uint64 `json:"fetched_bytes"` // from the store, for misses, ahead of them, and headers
	Ahead     uint64 `json:"ahead_bytes"`   // of these, read ahead
	AheadUsed uint64 `json:"ahead_used"`    // of these, asked for from memory since
	Joined    uint64 `json:"joined_bytes"`  // misses that another's fetch served
}

// clientCounts are the counts of clients that are gone.
type clientCounts struct{ ClientStats }

func (t *clientCounts) add(u *Client) {
	s := u.Stats()
	t.Hits += s.Hits
	t.HitBytes += s.HitBytes
	t.Misses += s.Misses
	t.MissBytes += s.MissBytes
	t.Fetched += s.Fetched
	t.Ahead += s.Ahead
	t.AheadUsed += s.AheadUsed
	t.Joined += s.Joined
}

// Stats returns what the client has done.
func (u *Client) Stats() ClientStats {
	return ClientStats{
		Hits: u.hits.Load(), HitBytes: u.hitBytes.Load(), Misses: u.misses.Load(), MissBytes: u.missed.Load(),
		Fetched: u.fetched.Load(), Ahead: u.ahead.Load(), AheadUsed: u.aheadHit.Load(), Joined: u.joined.Load(),
	}
}

// Stats returns what the cache holds and has done.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	total := c.gone
	for u := range c.users {
		total.add(u)
	}
	n := &c.counts
	s := Stats{
		State: StateOn, Size: uint64(len(c.segments)) * SegmentSize, Used: uint64(c.index.count) * BlockSize,
		Memory:      c.memory(),
		Warm:        c.warmBytes(),
		ClientStats: total.ClientStats,
		Warmed:      c.warm.taken.Load() * uint64(c.segmentBytes()),
		Written:     n.written, Filled: n.filled * BlockSize, Moved: n.moved * BlockSize,
		Evicted: n.evicted * BlockSize, Forgotten: n.forgotten * BlockSize, Dropped: n.dropped * BlockSize,
		Mismatches: c.errs.mismatches.Load(), Errors: c.errs.failed.Load(),
	}
	switch {
	case c.off.Load():
		s.State = StateOff
	case !c.loaded:
		s.State = StateLoading
	}
	return s
}

// memory returns the bytes of memory that read-ahead holds.
func (fs *flights) memory() uint64 { return uint64(fs.held.Load()) }

// memory returns the bytes of memory that the cache holds. The caller holds mu.
func (c *Cache) memory() uint64 {
	n := len(c.index.words)*8 + len(c.index.sums)*4 + len(c.ghost.prints)*4 + len(c.segments)*32
	return uint64(n+c.made*c.segmentBytes()) + c.flights.memory() + c.warmBytes()
}

// warmBytes returns the bytes of memory that warm segments take.
func (c *Cache) warmBytes() uint64 { return uint64(c.warm.count.Load()) * uint64(c.segmentBytes()) }
