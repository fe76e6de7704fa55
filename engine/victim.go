package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

const (
	// cleanReads is of how many victims headers, and of how many data, are being read at one
	// time: each may be an object's worth of memory for a moment.
	cleanReads = 4
	// cleanLoads is how many segments of the map are being loaded for a victim at one time:
	// each block of it may be in another one, and whoever has a full log waits for it. They
	// take cleanLoadsPart of the memory for maps at most, or would be evicted before they are
	// looked at.
	cleanLoads     = 32
	cleanLoadsPart = 4
)

// victim is an object out of which a cleaning moves what lives.
type victim struct {
	objectInfo
	header *objectHeader // a worker's while it is being read
	known  bool          // the header has been read
	tries  int           // in a row, of a read, that have failed

	// While it is being looked through.
	all    bool // what lives is moved also if there is something newer in the log
	extent int
	off    int          // where the extent's data is in it, in sectors
	done   uint64       // sectors of the extent
	load   *segmentLoad // that is waited for, or nil

	kept int          // sectors that live and are not moved, for there is something newer in the log,
	seq  uint64       // up to that record
	live []movedPiece // of it, in the order of its data
	from []int        // where their data is in the victim, in sectors
	buf  []byte       // where it is when it has been read, if that is to be given back
}

// goOn goes on with the reading of victims: one is looked through, while the data of those
// before it and the headers of those after it are being read, for each waits for the store.
// At the end of all it goes on to the writing.
func (c *cleaner) goOn() {
	r, im := c.running, c.im
	if c.ends() || r.writing {
		return
	}
	for r.next < len(r.victims) && len(r.ahead) < cleanReads {
		v := &victim{objectInfo: r.victims[r.next]}
		r.ahead, r.next = append(r.ahead, v), r.next+1
		c.read(v, func(ctx context.Context) (err error) {
			v.header, err = im.readHeader(ctx, v.objectInfo)
			return err
		}, func() {
			v.known = true
			c.goOn()
		})
	}
	switch {
	case r.looking != nil || r.fetching == cleanReads:
	case len(r.ahead) > 0 && r.ahead[0].known:
		v := r.ahead[0]
		r.looking, r.ahead = v, r.ahead[1:]
		v.all = r.aim == cleanAncestors || c.exceeds()
		c.look(v, nil)
	case len(r.ahead) == 0 && r.fetching == 0:
		r.writing = true
		c.write()
	}
}

// read runs a reading step for a victim on a worker, until it goes through, and then calls
// fn. A victim that cannot be read, now or for good, is left out.
func (c *cleaner) read(v *victim, work func(context.Context) error, fn func()) {
	r, im := c.running, c.im
	im.askStore(work, func(err error) {
		if c.running != r || c.ends() {
			return
		}
		if !retryable(err) {
			if v.tries > 0 {
				r.failing--
			}
			v.tries = 0
			if err != nil {
				c.skip(v, err)
				return
			}
			fn()
			return
		}
		im.countStoreError(err)
		if v.tries++; v.tries == 1 {
			r.failing++
		}
		if v.tries == cleanTries {
			r.failing--
			c.putOff(v, err)
			return
		}
		im.pumpNow() // objects do not wait for this any more
		im.env.AfterFunc(im.backoff(v.tries), func() {
			if c.running == r && !c.ends() {
				c.read(v, work, fn)
			}
		})
	})
}

// skip leaves a victim out.
func (c *cleaner) skip(v *victim, err error) {
	im := c.im
	if x := im.table.find(uint64(v.number)); errors.Is(err, backend.ErrNotFound) && (x == nil || x.live == 0) {
		err = nil // it has died meanwhile
	}
	if errors.Is(err, backend.ErrNotFound) && !im.countsRecovered() {
		err = nil // or had before the image was opened
		c.leave(v.number)
	}
	if err != nil {
		im.logger.Error("an object cannot be cleaned: it keeps its space", "object", im.line.dataKey(uint64(v.number), uint64(v.epoch)), "err", err)
		c.bad[v.number] = true
	}
	c.leftOut(v)
}

// putOff leaves a victim out that cannot be read now.
func (c *cleaner) putOff(v *victim, err error) {
	r, im := c.running, c.im
	im.logger.Warn("an object cannot be read to be cleaned: it keeps its space until it can", "object", im.line.dataKey(uint64(v.number), uint64(v.epoch)), "err", err)
	c.leave(v.number)
	if r.failed++; r.failed == cleanFailures {
		r.victims = r.victims[:r.next]
	}
	c.leftOut(v)
}

// leftOut goes on without a victim.
func (c *cleaner) leftOut(v *victim) {
	r := c.running
	i := slices.Index(r.ahead, v)
	switch {
	case i >= 0:
		r.ahead = slices.Delete(r.ahead, i, i+1)
	case r.looking == v:
		r.looking = nil
	default:
		r.fetching--
	}
	c.goOn()
}

// leave leaves an object alone for a while.
func (c *cleaner) leave(number uint32) {
	if c.later == nil {
		c.later = make(map[uint32]time.Duration)
	}
	c.later[number] = c.im.env.Now() + cleanLater
	c.timer.Reset(cleanLater)
}

// fade leaves a victim alone until what is about to replace the rest of it has done so.
func (c *cleaner) fade(v *victim) {
	if c.fading == nil {
		c.fading = make(map[uint32]uint64)
	}
	c.fading[v.number] = v.seq
}

// look asks the map what of the victim lives, a few extents in a turn.
func (c *cleaner) look(v *victim, err error) {
	r, im := c.running, c.im
	if r == nil || r.looking != v || c.ends() {
		return
	}
	if err != nil {
		c.skip(v, err)
		return
	}
	h := v.header
	for n := 0; v.extent < len(h.extents); n++ {
		// At least one: a segment that was just loaded may not be there in the next turn.
		if n > 0 && im.stint.over() {
			im.env.AfterFunc(0, func() { c.look(v, nil) })
			return
		}
		im.stint.spend(1)
		e := h.extents[v.extent]
		s := e.sector + v.done
		i := segmentOf(s)
		n := min(uint64(e.n)-v.done, segmentStart(i+1)-s)
		if !e.zero {
			if !im.ready(i) {
				c.await(v, i)
				return
			}
			if !c.lookAt(v, s, s+n, v.off+int(v.done)) {
				c.skip(v, fmt.Errorf("%w: the map looks for the data of some of its sectors where it has other data", ErrCorrupt))
				return
			}
		}
		if v.done += n; v.done < uint64(e.n) {
			continue
		}
		if !e.zero {
			v.off += int(e.n)
		}
		v.extent, v.done = v.extent+1, 0
	}
	c.fetch(v)
}

// await goes on with the victim when segment i is in memory, and has those that it will ask
// for next loaded as well.
func (c *cleaner) await(v *victim, i uint32) {
	im := c.im
	im.withSegment(i, func(err error) {
		if r := c.running; r != nil && r.looking == v && v.load != nil { // it was not put off
			v.load = nil
			c.look(v, err)
		}
	})
	v.load = im.objs.loads[i]
	most := int(min(cleanLoads, im.objs.budget.Limit()/(cleanLoadsPart*fullSegment)))
	for k, last := v.extent, i; k < len(v.header.extents) && len(im.objs.loads) < most; k++ {
		e := v.header.extents[k]
		if next := segmentOf(e.sector); !e.zero && next != last {
			last = next
			im.withSegment(next, func(error) {}) // who needs it is told
		}
	}
}

// lookAt notes what of [s, end), whose data is at off in the victim, lives there: the map
// refers to it, and nothing newer is in the log. It reports false if the map looks for it
// somewhere else in the victim: what is read there must not be given a right place.
func (c *cleaner) lookAt(v *victim, s, end uint64, off int) bool {
	im := c.im
	ref, start := refOfSeq(v.header.seq), s
	for s < end {
		x, ok := im.objs.Next(s, end)
		if !ok {
			return true
		}
		s = x.End()
		if refOf(x.Loc) != ref {
			continue
		}
		if offsetOf(x.Loc) != off+int(x.Sector-start) {
			return false
		}
		for at := x.Sector; at < s; {
			d, ok := im.dirty.Next(at, s)
			ok = ok && !v.all
			stop := s
			if ok {
				stop = d.Sector
			}
			if at < stop {
				v.live = append(v.live, movedPiece{sector: at, n: uint32(stop - at), born: v.born})
				v.from = append(v.from, offsetOf(x.Loc)+int(at-x.Sector))
			}
			if !ok {
				break
			}
			v.kept += int(min(d.End(), s) - d.Sector)
			at = d.End()
		}
	}
	return true
}

// fetch reads the live data of a victim, and goes on with the next one meanwhile.
func (c *cleaner) fetch(v *victim) {
	r, im := c.running, c.im
	r.looking = nil
	r.fetching++
	v.seq = c.im.log.Seq()
	sums := v.header.sums
	v.header = nil
	c.read(v, func(ctx context.Context) error { return im.readPieces(ctx, v, sums) }, func() {
		r.pieces = append(r.pieces, v.live...)
		if v.buf != nil {
			r.buffers = append(r.buffers, v.buf)
		}
		if v.kept == 0 {
			r.emptied[v.number] = true
		} else {
			c.fade(v)
		}
		r.failed = 0
		r.fetching--
		r.read++
		c.grant()
		c.im.pumpNow() // clients' objects may have waited for that
		c.goOn()
	})
	c.goOn()
}

// readPieces reads what lives of a victim, as far as the read cache does not have it in one
// operation of the store, and verifies it by the checksums of the victim's header. Workers call it.
func (im *Image) readPieces(ctx context.Context, v *victim, sums []uint32) error {
	spans, size := v.spans()
	buf, kept := im.victimBuffer(size)
	if err := im.readSpans(ctx, v, spans, buf, sums); err != nil {
		if kept {
			im.shared.buffers.give(buf)
		}
		return err
	}
	k := 0
	for i := range v.live {
		p, at := &v.live[i], v.from[i]*SectorSize
		for at >= spans[k].to {
			k++
		}
		p.data = buf[spans[k].at+at-spans[k].from:][:int(p.n)*SectorSize]
	}
	if kept {
		v.buf = buf
	}
	return nil
}

// A liveSpan is a run of whole blocks of a victim's data that is read for what lives there.
type liveSpan struct {
	from, to int // bytes of the data
	at       int // where from is in what is read
}

// spans returns what is to be read of a victim, and its size in bytes.
func (v *victim) spans() (list []liveSpan, size int) {
	data := int(v.sectors) * SectorSize
	for i, p := range v.live {
		from := v.from[i] / blockSectors * objectBlock
		to := min((v.from[i]+int(p.n)+blockSectors-1)/blockSectors*objectBlock, data)
		if k := len(list) - 1; k >= 0 && from-list[k].to <= cleanGap {
			size += to - list[k].to
			list[k].to = to
			continue
		}
		list = append(list, liveSpan{from, to, size})
		size += to - from
	}
	return list, size
}

// victimBuffer returns n bytes for what is read of a victim: in one of the buffers that objects are
// built in, which is to be given back, if that is at least half of one.
func (im *Image) victimBuffer(n int) (buf []byte, kept bool) {
	if n < im.bufferSize()/2 {
		return make([]byte, n), false
	}
	return im.buffer(n), true
}

// readSpans reads spans of a victim into buf.
func (im *Image) readSpans(ctx context.Context, v *victim, spans []liveSpan, buf []byte, sums []uint32) error {
	src, k := objectSource{im, v.objectInfo}, im.key(&v.objectInfo)
	header := int64(v.headerBytes())
	var missing []backend.Range
	for _, s := range spans {
		for at := s.from; at < s.to; {
			p := buf[s.at+at-s.from:][:s.to-at]
			n, ok := im.reads.Lookup(&k, at, p)
			if !ok {
				missing = append(missing, backend.Range{Off: header + int64(at), P: p[:n]})
			}
			at += n
		}
	}
	return src.fetchRanges(ctx, missing, sums)
}

// readHeader reads the header of a data object that the table has.
func (im *Image) readHeader(ctx context.Context, o objectInfo) (*objectHeader, error) {
	key := im.line.dataKey(uint64(o.number), uint64(o.epoch))
	b := make([]byte, o.headerBytes())
	n, err := im.store.Get(ctx, key, b, 0)
	if err != nil {
		return nil, err
	}
	h, err := decodeObjectHeader(b[:n], im.span.Load())
	if err == nil && (h.image != im.line.of(uint64(o.number)) || h.seq != uint64(o.number) || h.epoch != uint64(o.epoch) || h.data != int(o.sectors)*SectorSize) {
		err = fmt.Errorf("%w: it is another object than its name says", ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", key, err)
	}
	return h, nil
}
