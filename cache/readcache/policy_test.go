package readcache

import (
	"container/list"
	"math/rand/v2"
	"testing"

	"github.com/lsd-ceph/lsd/internal/racetest"
)

// A trace yields the blocks that are asked for, one after another.
type trace func() uint64

// zipf asks for a few of n blocks most of the time.
func zipf(rng *rand.Rand, n uint64, s float64) trace {
	z := rand.NewZipf(rng, s, 8, n-1)
	return func() uint64 { return z.Uint64() * 0x9e3779b97f4a7c15 % n } // hot ones are everywhere
}

// withScans mixes scans of blocks that nothing else asks for into a trace: length
// blocks in a row, one after each every blocks.
func withScans(t trace, every, length uint64) trace {
	var n, next uint64 = 0, 1 << 32
	return func() uint64 {
		n++
		if n%(every+length) < every {
			return t()
		}
		next++
		return next
	}
}

// loop asks for the same n blocks over and over.
func loop(n uint64) trace {
	var i uint64
	return func() uint64 { i++; return i % n }
}

// lru is the peer: an LRU of whole blocks.
type lru struct {
	size int
	m    map[uint64]*list.Element
	l    *list.List
}

func newLRU(size int) *lru { return &lru{size, map[uint64]*list.Element{}, list.New()} }

// access asks for a block and reports whether it was there.
func (c *lru) access(b uint64) bool {
	if e := c.m[b]; e != nil {
		c.l.MoveToFront(e)
		return true
	}
	c.m[b] = c.l.PushFront(b)
	if len(c.m) > c.size {
		e := c.l.Back()
		delete(c.m, c.l.Remove(e).(uint64))
	}
	return false
}

// ours is the real cache, of which only the choice of what stays matters here.
type ours struct {
	c    *Cache
	data [BlockSize]byte
}

func newOurs(tb testing.TB, segments int) *ours {
	return &ours{c: mustOpen(tb, newMemFile(dataOffset+segments*SegmentSize))}
}

// access asks for a block and reports whether it was there.
func (o *ours) access(b uint64) bool {
	k := o.c.Key(testObject(b/testBlocks), testSize)
	block := uint32(b % testBlocks)
	if o.c.Next(&k, block, 1, true).Cached {
		return true
	}
	o.c.insert(&k, block, o.data[:], Keep)
	if o.c.Wants() {
		o.c.Maintain()
	}
	return false
}

// policySegments is the size of the caches that are compared.
const policySegments = 32

// policyCases are the traces of test and benchmark.
func policyCases(rng *rand.Rand) map[string]trace {
	const blocks = policySegments * maxEntries
	return map[string]trace{
		"zipf 1.1":             zipf(rng, 16*blocks, 1.1),
		"zipf 1.01":            zipf(rng, 8*blocks, 1.01),
		"zipf 1.1 and scans":   withScans(zipf(rng, 16*blocks, 1.1), 2*blocks, 2*blocks),
		"zipf 1.01 and scans":  withScans(zipf(rng, 8*blocks, 1.01), blocks/2, blocks),
		"loop beyond its size": loop(blocks + blocks/4),
		"uniform":              func() uint64 { return rng.Uint64N(4 * blocks) },
	}
}

// hitRatio runs n accesses after as many for warming up.
func hitRatio(n int, t trace, access func(uint64) bool) float64 {
	for range n {
		access(t())
	}
	hits := 0
	for range n {
		if access(t()) {
			hits++
		}
	}
	return float64(hits) / float64(n)
}

// TestBeatsLRU: with scans between, and on loops, S3-FIFO keeps what is used again
// where an LRU of the same size loses it; elsewhere it is as good.
func TestBeatsLRU(t *testing.T) {
	racetest.Slow(t)
	for name, least := range map[string]float64{
		"zipf 1.1":             1.0,
		"zipf 1.01":            1.0,
		"zipf 1.1 and scans":   1.1,
		"zipf 1.01 and scans":  1.1,
		"loop beyond its size": 1.1,
	} {
		t.Run(name, func(t *testing.T) {
			const n = 100_000
			run := func(access func(uint64) bool) float64 {
				return hitRatio(n, policyCases(rand.New(rand.NewPCG(1, 2)))[name], access)
			}
			o := newOurs(t, policySegments)
			a, b := run(o.access), run(newLRU(policySegments*maxEntries).access)
			t.Logf("hits %.3f, LRU %.3f; written %.2f of what was kept", a, b,
				float64(o.c.Stats().Written)/float64(max(o.c.Stats().Filled, 1)))
			if a < b*least {
				t.Errorf("hit ratio %.3f, LRU has %.3f", a, b)
			}
		})
	}
}

// BenchmarkHitRatio prints the table of docs/benchmarks.md.
func BenchmarkHitRatio(b *testing.B) {
	for name := range policyCases(rand.New(rand.NewPCG(1, 2))) {
		b.Run(name, func(b *testing.B) {
			const n = 500_000
			run := func(access func(uint64) bool) float64 {
				return hitRatio(n, policyCases(rand.New(rand.NewPCG(1, 2)))[name], access)
			}
			o := newOurs(b, policySegments)
			b.ReportMetric(run(o.access), "hits")
			b.ReportMetric(run(newLRU(policySegments*maxEntries).access), "LRU-hits")
			s := o.c.Stats()
			b.ReportMetric(float64(s.Written)/float64(s.Filled), "written/kept")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkLookup finds a block in a full cache.
func BenchmarkLookup(b *testing.B) {
	o := newOurs(b, policySegments)
	for n := range uint64(policySegments * maxEntries) {
		o.access(n)
	}
	var at uint64
	b.ReportAllocs()
	for b.Loop() {
		at += 7919
		n := at % (policySegments * maxEntries)
		k := o.c.Key(testObject(n/testBlocks), testSize)
		o.c.Next(&k, uint32(n%testBlocks), 1, true)
	}
}
