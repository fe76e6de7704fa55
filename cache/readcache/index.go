package readcache

import (
	"math/bits"
	"sync/atomic"
)

// A place is a block's number in the file's segments: segment × segmentBlocks +
// block in the segment. The first blocks of a segment are its header, so no
// block of data has place 0.
type place uint32

// nowhere is no block's place.
const nowhere place = 0

func (p place) segment() uint32 { return uint32(p) / segmentBlocks }
func (p place) block() int      { return int(p % segmentBlocks) }

func placeOf(segment uint32, block int) place { return place(segment*segmentBlocks + uint32(block)) }

// index finds the places of blocks by hash. Readers take no lock: what they find
// may be out of date or, with a probability of 2^-27, another block's. Both show
// when the data is verified against its key, which every reader does.
//
// A word of the table holds a block: 30 bits of its hash, 2 bits that count its
// uses, 32 bits of its place. Each block may be in two buckets of eight words,
// which are a cache line each.
type index struct {
	words   []atomic.Uint64 // written under Cache.mu, but for the counts of uses
	sums    []atomic.Uint32 // by place; written under Cache.mu before the word
	buckets uint64
	count   int // words in use; guarded by Cache.mu
}

const (
	bucketWords = 8
	maxUses     = 3
	useShift    = 32
	useMask     = maxUses << useShift
	tagShift    = 34
	tagBits     = 64 - tagShift
)

func (x *index) init(segments int) {
	blocks := uint64(segments) * segmentBlocks
	// Three quarters full when the cache is: a block then finds both buckets
	// full about once in 10,000 times, and is not cached.
	x.buckets = blocks*4/3/bucketWords + 1
	x.words = make([]atomic.Uint64, x.buckets*bucketWords)
	x.sums = make([]atomic.Uint32, blocks)
}

func word(h uint64, uses int, p place) uint64 {
	return h<<tagShift | uint64(uses)<<useShift | uint64(p)
}

func placeIn(w uint64) place { return place(w) }
func usesIn(w uint64) int    { return int(w >> useShift & maxUses) }

// bucket returns the first word of one of the two buckets of hash h.
func (x *index) bucket(h uint64, second bool) int {
	if second {
		h = (h ^ h>>32) * 0x9e3779b97f4a7c15
	}
	i, _ := bits.Mul64(h, x.buckets)
	return int(i) * bucketWords
}

// find returns the word of hash h and where it is, or -1.
func (x *index) find(h uint64) (w uint64, at int) {
	for _, second := range [2]bool{false, true} {
		at := x.bucket(h, second)
		for i := at; i < at+bucketWords; i++ {
			if w := x.words[i].Load(); w != 0 && (w>>tagShift) == h&(1<<tagBits-1) {
				return w, i
			}
		}
	}
	return 0, -1
}

// used counts a use of the word w at index at.
func (x *index) used(w uint64, at int) {
	if w&useMask != useMask {
		x.words[at].CompareAndSwap(w, w+1<<useShift) // lost to another use, or to a change: no matter
	}
}

// at returns the word of hash h if it says place p, and its index.
func (x *index) at(h uint64, p place) (uint64, int) {
	if w, i := x.find(h); i >= 0 && placeIn(w) == p {
		return w, i
	}
	return 0, -1
}

// insert enters a block that is not there and reports whether there was room.
// The caller holds Cache.mu.
func (x *index) insert(h uint64, uses int, p place, sum uint32) bool {
	best, most := -1, 0
	for _, second := range [2]bool{false, true} {
		free, at := 0, x.bucket(h, second)
		slot := -1
		for i := at; i < at+bucketWords; i++ {
			if x.words[i].Load() == 0 {
				free, slot = free+1, i
			}
		}
		if free > most {
			best, most = slot, free
		}
	}
	if best < 0 {
		return false
	}
	x.sums[p].Store(sum)
	x.words[best].Store(word(h, uses, p))
	x.count++
	return true
}

// remove takes out the word of hash h if it says place p, and returns it. The
// caller holds Cache.mu.
func (x *index) remove(h uint64, p place) (uint64, bool) {
	for {
		w, i := x.at(h, p)
		if i < 0 {
			return 0, false
		}
		if x.words[i].CompareAndSwap(w, 0) {
			x.count--
			return w, true
		}
	}
}

// purge takes out all that is in a segment whose entries cannot be read, by
// looking at every word. The caller holds Cache.mu.
func (x *index) purge(segment uint32) {
	for i := range x.words {
		for {
			w := x.words[i].Load()
			if w == 0 || placeIn(w).segment() != segment {
				break
			}
			if x.words[i].CompareAndSwap(w, 0) {
				x.count--
				break
			}
		}
	}
}

// hasher makes hashes of blocks. Its seeds are the process's own, so that nobody
// can prepare blocks that collide.
type hasher struct{ a, b uint64 }

func (s hasher) mix(x, y uint64) uint64 {
	hi, lo := bits.Mul64(x^s.a, y^s.b)
	return hi ^ lo
}

// object returns the hash of an object, from which those of its blocks come.
func (s hasher) object(o *Object) uint64 {
	u := func(b []byte) (v uint64) {
		for i, c := range b {
			v |= uint64(c) << (8 * i)
		}
		return v
	}
	return s.mix(s.mix(u(o.Image[:8]), u(o.Image[8:])), s.mix(o.Number, o.Epoch+0x2545f4914f6cdd1d))
}

// block returns the hash of a block of the object with hash o.
func (s hasher) block(o uint64, block uint32) uint64 {
	return s.mix(o, (uint64(block)+1)*0xd6e8feb86659fd93)
}

// ghost remembers the hashes of as many blocks as the cache has room for, that
// were let go of without a second use: buckets of eight fingerprints, newest first,
// of which the oldest is replaced. Guarded by Cache.mu.
type ghost struct {
	prints  []uint32
	buckets uint64
}

func (g *ghost) init(segments int) {
	g.buckets = max(uint64(segments)*segmentBlocks/bucketWords, 1)
	g.prints = make([]uint32, g.buckets*bucketWords)
}

// bucket returns the bucket of hash h, which is half a cache line, and its
// fingerprint.
func (g *ghost) bucket(h uint64) (b *[bucketWords]uint32, print uint32) {
	i, _ := bits.Mul64(h, g.buckets)
	return (*[bucketWords]uint32)(g.prints[i*bucketWords:]), uint32(h) | 1
}

func (g *ghost) add(h uint64) {
	b, print := g.bucket(h)
	copy(b[1:], b[:])
	b[0] = print
}

// take reports whether the ghost has h, and forgets it.
func (g *ghost) take(h uint64) bool {
	b, print := g.bucket(h)
	for i := range b {
		if b[i] == print {
			b[i] = 0
			return true
		}
	}
	return false
}
