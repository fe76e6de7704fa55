package engine

import (
	"context"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

const (
	maxStreams = 8
	// maxAheads bounds the fetches of an image's read-ahead under way.
	maxAheads = 64
	// aheadUnit is the most that one of them fetches, in sectors: 1 MiB.
	aheadUnit = 1 << 20 / SectorSize
	// A stream is read ahead of by minAhead sectors at first, four times as many each
	// time, up to anyAhead: 128 KiB to 8 MiB. That is one object, of one OSD, which
	// reads it piece by piece; where there is memory a long stream is read ahead of by up
	// to maxAhead, 24 MiB, which keeps several of them busy. See grow.
	minAhead = 128 << 10 / SectorSize
	anyAhead = 8 << 20 / SectorSize
	maxAhead = 24 << 20 / SectorSize
	// streamSlack is how far from its end, in sectors, a stream may go on: many
	// requests at one time arrive in any order.
	streamSlack = 64 << 10 / SectorSize
	// streamSteps is how many requests in a row make a stream.
	streamSteps = 3
	// longStream is after how many sectors, 8 MiB, the blocks of a stream are not
	// worth the SSD's wear, unless they have been seen not long ago.
	longStream = 8 << 20 / SectorSize
)

// A stream is a client's sequential reading.
type stream struct {
	next   uint64 // sector after the last one read
	ahead  uint64 // sector after the last one read ahead
	window uint64 // sectors
	length uint64 // sectors read so far
	sums   uint32 // the last object whose checksums were fetched ahead
	steps  int
	used   uint64 // streams.clock of the last request
	gathered
}

// streams are the sequential streams of an image. The reactor owns them.
type streams struct {
	list  [maxStreams]stream
	clock uint64 // requests
}

// note takes note of a read and returns the stream that it belongs to, nil if it
// is not, or not yet, part of one.
func (t *streams) note(s uint64, n uint32) *stream {
	t.clock++
	end, slack := s+uint64(n), max(streamSlack, 2*uint64(n))
	oldest := &t.list[0]
	for i := range t.list {
		st := &t.list[i]
		if st.used < oldest.used {
			oldest = st
		}
		if st.steps == 0 || s+slack < st.next || s > st.next+slack {
			continue
		}
		st.used = t.clock
		if end > st.next {
			st.length += end - st.next
			st.next = end
			st.steps++
		}
		if st.steps < streamSteps {
			return nil
		}
		return st
	}
	*oldest = stream{next: end, ahead: end, length: uint64(n), steps: 1, used: t.clock, gathered: oldest.gathered.empty()}
	return nil
}

// how returns how a stream's blocks are read.
func (st *stream) how() readcache.How {
	if st == nil {
		return readcache.Keep
	}
	return st.howAhead(st.next)
}

// howAhead returns how the stream's blocks before a sector are read.
func (st *stream) howAhead(before uint64) readcache.How {
	if st.length+before > longStream+st.next {
		return readcache.KeepKnown
	}
	return readcache.Keep
}

// readAhead fetches what the client of a stream will probably ask for next, from a sector
// on if that has not been done.
func (im *Image) readAhead(st *stream, from uint64) {
	im.fetchSpans(st)
	st.ahead = max(st.ahead, from)
	end := min(st.next+st.window, im.sectors)
	if len(st.spans) > 0 || st.ahead+st.step() > end && end < im.sectors || st.ahead >= im.sectors {
		return // it is far enough
	}
	st.grow(im.reads.AheadRoom())
	im.loadAhead(st)
	im.gather(st, min(st.next+st.window, im.sectors))
	im.fetchSpans(st)
	im.fetchSumsAhead(st)
}

// step returns by how many sectors at least a stream is read ahead further: more at a time
// where the data is scattered, of which an object has more then in one place.
func (st *stream) step() uint64 {
	if st.scattered {
		return st.window / 2
	}
	return min(st.window/2, aheadUnit)
}

// grow sets by how much the stream is read ahead of from now on: by no more than anyAhead
// and as much as it has come, for it may end, and half of the room that there is, in
// bytes, so that there is some for a stream that begins.
func (st *stream) grow(room int) {
	more := min(st.length, uint64(room)/2/SectorSize)
	st.window = min(max(4*st.window, minAhead), maxAhead, anyAhead+more)
}

// loadAhead loads the segment of the map that a stream comes to soon: it reads ahead no
// further than the map is in memory, and a load has to wait behind all that was asked of
// the store for data.
func (im *Image) loadAhead(st *stream) {
	at := st.ahead + 2*st.window
	if at >= im.sectors {
		return
	}
	if i := segmentOf(at); !im.ready(i) && im.objs.loads[i] == nil {
		im.withSegment(i, func(error) {})
	}
}

// fetchSumsAhead fetches the checksums of the object that a stream comes to next:
// its data waits for them.
func (im *Image) fetchSumsAhead(st *stream) {
	at := st.ahead + anyAhead
	e, ok := im.nextInObject(at, min(at+aheadUnit, im.sectors))
	if !ok {
		return
	}
	if info := im.table.find(refOf(e.Loc).seq()); info != nil && info.number != st.sums {
		st.sums = info.number
		im.fetchSums(info)
	}
}

// fetchSums fetches an object's checksums, if they are neither at hand nor under
// way: whoever reads its data gets them beside it, and does not wait for one after
// the other.
func (im *Image) fetchSums(info *objectInfo) {
	if im.sums.get(info.number) != nil {
		return
	}
	k, blocks := im.sumsKey(info)
	o := im.newAhead(k, info, readcache.Keep)
	o.src = &o.sums
	o.fetch(readcache.Want{First: sumsBlock, N: blocks, Asked: blocks})
}

// nextInObject returns the next run from s on, before end, that a read would get
// from an object.
func (im *Image) nextInObject(s, end uint64) (extmap.Extent, bool) {
	for s < end {
		stop := end
		d, ok := im.dirty.Next(s, end)
		if ok {
			stop = d.Sector
		}
		if s < stop {
			if e, ok := im.objs.Next(s, stop); ok {
				return e, true
			}
		}
		if !ok {
			break
		}
		s = d.End()
	}
	return extmap.Extent{}, false
}

// aheadRead is a fetch of read-ahead, on a worker.
type aheadRead struct {
	im    *Image
	key   readcache.Key
	data  objectSource
	sums  sumsSource
	src   readcache.Source // data or sums
	claim readcache.Claim
	how   readcache.How
	err   error
	// waiting are the parts of requests that it has. The reactor owns them.
	waiting []waitingPart
	// The functions for Env.Spawn, made once.
	work, done func()
}

func (im *Image) newAhead(k readcache.Key, info *objectInfo, how readcache.How) *aheadRead {
	var o *aheadRead
	if l := len(im.aheadOps); l > 0 {
		o, im.aheadOps = im.aheadOps[l-1], im.aheadOps[:l-1]
	} else {
		o = &aheadRead{im: im}
		o.work, o.done = o.run, o.finished
	}
	o.key, o.data, o.sums, o.how, o.err = k, objectSource{im, *info}, sumsSource{im, *info}, how, nil
	o.src = &o.data
	return o
}

// fetch claims what w says for o and has it fetched, as readcache.Client.Claim has it. o is free
// again if there is nothing to fetch.
func (o *aheadRead) fetch(w readcache.Want) (seen uint32, claimed bool) {
	im := o.im
	w.By = o
	if o.claim, seen, claimed = im.reads.Claim(&o.key, w); !claimed {
		im.aheadOps = append(im.aheadOps, o)
		return seen, false
	}
	im.aheads++
	im.env.Spawn(o.work, o.done)
	return seen, true
}

// A waitingPart is a part of a read that is on its way.
type waitingPart struct {
	r      *Request
	sector uint64
	n      uint32
}

// run fetches, on a worker.
func (o *aheadRead) run() {
	ctx, stop := context.WithTimeout(o.im.ctx, o.im.cfg.StoreTimeout)
	defer stop()
	o.err = o.im.reads.Fly(ctx, o.claim, &o.key, o.src, o.how)
}

// finished takes the result, on the reactor, lets those go on that have waited for it, and goes on
// with what is gathered. An error ends all streams: whoever reads there for its own sake will tell
// of it.
func (o *aheadRead) finished() {
	im := o.im
	im.aheads--
	if o.err != nil || im.state != Active {
		im.streams = streams{}
	}
	for _, w := range o.waiting {
		im.readRange(w.r, w.sector, uint64(w.n))
		im.partDone(w.r, 0)
	}
	clear(o.waiting)
	o.waiting = o.waiting[:0]
	im.aheadOps = append(im.aheadOps, o)
	for i := range im.streams.list {
		im.fetchSpans(&im.streams.list[i])
	}
	im.maintainCache()
}
