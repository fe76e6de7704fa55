package engine

import (
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// Data that was written in another order than it is read in is scattered: what a stream comes
// to next lies in many objects, some of it in each. But an object has its data in order of
// sectors, so that all that a part of the stream needs of it is in one place there, or nearly.
// So what is to be read ahead is gathered by object first, and fetched then, in the order in
// which the stream comes to it. The same goes for a single large request.

const (
	// maxGathered bounds how many runs are looked up at one time, for the reactor has
	// other work: 16 MiB of data in blocks of 4 KiB.
	maxGathered = 4096
	// gatherGap is the most that is fetched between two runs of an object, for nothing, rather
	// than to fetch one after the other, in blocks: 32 KiB.
	gatherGap = 32 << 10 / objectBlock
	// scatteredRun is the mean length of runs, in sectors, below which data is scattered: 64 KiB.
	scatteredRun = 64 << 10 / SectorSize
)

// A gatheredSpan is what is to be read of one place of an object.
type gatheredSpan struct {
	ref      objectRef
	first, n uint32 // blocks
	asked    uint32 // of them, that will be read to their end
	runs     uint32 // that it will be read in
	last     uint64 // sector after what will be read of it last
}

// gathered is what is to be read and is not being fetched yet. The reactor owns it.
type gathered struct {
	spans     []gatheredSpan // in the order in which they will be read
	scattered bool           // what was gathered last is
}

// empty returns g without what it holds, for another use.
func (g gathered) empty() gathered { return gathered{spans: g.spans[:0]} }

// gather collects what the stream comes to from st.ahead on, before end, and moves st.ahead.
func (im *Image) gather(st *stream, end uint64) {
	st.ahead = im.collect(&st.gathered, st.ahead, end)
	if st.ahead < end && !im.ready(segmentOf(st.ahead)) {
		im.withSegment(segmentOf(st.ahead), func(error) {})
	}
}

// gatherOwn has what a large request asks for in n sectors from s on fetched object by object, if
// it is scattered: whoever reads it finds it on its way.
func (im *Image) gatherOwn(r *Request, s, n uint64) {
	if n < 2*scatteredRun || im.aheads >= maxAheads {
		return
	}
	g := im.own.empty()
	im.collect(&g, s, s+n)
	if im.own = g; !g.scattered {
		return
	}
	r.stream = true
	for i := range g.spans {
		if !im.fetchSpan(&g.spans[i], r.how) {
			return
		}
	}
}

// collect adds what is in objects from a sector on, before end, and returns the sector that it has
// come to: it ends early where the map is not in memory, or where there is too much.
func (im *Image) collect(g *gathered, from, end uint64) uint64 {
	if im.spanOf == nil {
		im.spanOf = map[objectRef]int{}
	}
	at, runs := from, uint64(0)
	for at < end && runs < maxGathered && im.ready(segmentOf(at)) {
		to := min(end, segmentStart(segmentOf(at)+1))
		e, ok := im.nextInObject(at, to)
		if !ok {
			at = to
			continue
		}
		e.N = min(e.N, aheadUnit)
		g.add(im.spanOf, e, im.blocksRead(e))
		at = e.End()
		runs++
	}
	clear(im.spanOf)
	g.scattered = runs*scatteredRun > at-from
	return at
}

// blocksRead returns how many blocks of an object are read to their end with an extent.
func (im *Image) blocksRead(e extmap.Extent) uint32 {
	off := uint32(offsetOf(e.Loc))
	n := (off+e.N)/blockSectors - off/blockSectors
	if info := im.table.find(refOf(e.Loc).seq()); info != nil && off+e.N == info.sectors && info.sectors%blockSectors != 0 {
		n++ // its last one is shorter
	}
	return n
}

// add adds a run of an object, of which so many blocks are read to their end. of has the last span
// of each object.
func (g *gathered) add(of map[objectRef]int, e extmap.Extent, asked uint32) {
	off := uint32(offsetOf(e.Loc))
	first, last := off/blockSectors, (off+e.N+blockSectors-1)/blockSectors
	if i, ok := of[refOf(e.Loc)]; ok {
		s := &g.spans[i]
		if first >= s.first && first <= s.first+s.n+gatherGap && last-s.first <= aheadUnit/blockSectors {
			s.n = max(s.n, last-s.first)
			s.asked += asked
			s.runs++
			s.last = e.End()
			return
		}
	}
	of[refOf(e.Loc)] = len(g.spans)
	g.spans = append(g.spans, gatheredSpan{refOf(e.Loc), first, last - first, asked, 1, e.End()})
}

// fetchSpans has fetched what was gathered, as far as there is memory and not too much under way.
func (im *Image) fetchSpans(st *stream) {
	n := 0
	for ; n < len(st.spans); n++ {
		if s := &st.spans[n]; s.last > st.next && !im.fetchSpan(s, st.howAhead(s.last)) {
			break
		}
	}
	if n > 0 {
		st.spans = st.spans[:copy(st.spans, st.spans[n:])]
	}
}

// fetchSpan has a span fetched, and reports whether it has seen to all of it: else the rest has
// to wait.
func (im *Image) fetchSpan(s *gatheredSpan, how readcache.How) bool {
	info := im.table.find(s.ref.seq())
	if info == nil || uint64(s.first+s.n) > uint64(sumCount(info)) {
		return true // who reads there for its own sake will tell of it
	}
	k := im.key(info)
	for s.n > 0 {
		if im.aheads >= maxAheads {
			return false
		}
		o := im.newAhead(k, info, how)
		seen, claimed := o.fetch(readcache.Want{First: s.first, N: s.n, Asked: s.asked, Pieces: s.runs > 1})
		if claimed {
			im.fetchSums(info) // beside the data, where fetchSumsAhead was not soon enough
		}
		if seen == 0 {
			return false
		}
		s.first, s.n, s.asked = s.first+seen, s.n-seen, s.asked-min(s.asked, seen)
	}
	return true
}
