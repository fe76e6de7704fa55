package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"sync/atomic"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// viewCheck checks that a view can be read: the map of its checkpoint segment by
// segment, against the headers of the objects that it refers to, and the objects
// after the checkpoint. It needs memory for the table, for the headers of the
// objects after the checkpoint, and for the extents of some of the others: the map
// is gone through again for the next ones.
type viewCheck struct {
	c *checker
	v *view

	// By the object's place in the view; workers add to the counts.
	live []uint32 // sectors that the checkpoint's map refers to
	now  []uint32 // sectors that the map refers to after the view's last object
	died []uint32 // the last object that has taken any from it
	// errs says what is wrong with an object that may be needed; guarded by c.mu
	errs map[int]error

	touched bitset // segments that the objects after the checkpoint change
	first   int    // the objects whose places are known
	places  []dataPlaces
	counted bool // the counts are complete: the map was gone through once
	holes   atomic.Bool
}

// dataPlaces says where the data of sectors is in an object: for each of its
// extents that have data, the first sector and the offset, in sectors, in one
// number.
type dataPlaces struct {
	at    []uint64 // ascending
	total uint64   // sectors of data
	known bool
}

const placeBits = 16 // of the offset: MaxObjectSize has so many sectors

func placesOf(h *objectHeader) dataPlaces {
	p := dataPlaces{known: true}
	for _, e := range h.extents {
		if !e.zero {
			p.at = append(p.at, e.sector<<placeBits|p.total)
			p.total += uint64(e.n)
		}
	}
	return p
}

// holds reports whether the object holds the data of n sectors from s at an
// offset in its data.
func (p dataPlaces) holds(s, n, off uint64) bool {
	for n > 0 {
		i := sort.Search(len(p.at), func(i int) bool { return p.at[i]>>placeBits > s }) - 1
		if i < 0 {
			return false
		}
		start, at, end := p.at[i]>>placeBits, p.at[i]&(1<<placeBits-1), p.total
		if i+1 < len(p.at) {
			end = p.at[i+1] & (1<<placeBits - 1)
		}
		d := s - start
		if d >= end-at || at+d != off {
			return false
		}
		k := min(n, end-at-d)
		s, n, off = s+k, n-k, off+k
	}
	return true
}

// checkView checks one state of the image.
func (c *checker) checkView(ctx context.Context, v *view) error {
	if v.err != nil {
		f := Finding{Object: c.manifestOf(v), Problem: c.of(v, v.err.Error()), Action: "bring that object back from a copy of the pool; this state of the image cannot be read", vanished: errors.Is(v.err, backend.ErrNotFound)}
		c.add(f)
		if v.ref != nil && v.m.at.object == 0 {
			return nil // not even the checkpoint
		}
	}
	x := &viewCheck{
		c: c, v: v, errs: map[int]error{}, touched: newBitset(segmentsOf(c.im.span.Load())),
		live: make([]uint32, v.objects()), now: make([]uint32, v.objects()), died: make([]uint32, v.objects()),
	}
	for _, t := range v.tail {
		t.segments(func(i uint32) bool { x.touched.set(i); return true })
	}
	if err := x.run(ctx); err != nil {
		return err
	}
	if v == c.reach.head {
		c.reach.now, c.reach.died, c.reach.holes = x.now, x.died, x.holes.Load()
	}
	return nil
}

// manifestOf returns the key that stands for a view in findings.
func (c *checker) manifestOf(v *view) string {
	if v.ref != nil {
		return c.im.line.manifestKey(*v.ref, 0)
	}
	return SuperblockKey(c.id)
}

// of adds to a problem which state it is about.
func (c *checker) of(v *view, problem string) string {
	if v.what == "" {
		return problem
	}
	return problem + " (" + v.what + ")"
}

func (x *viewCheck) run(ctx context.Context) error {
	c := x.c
	if err := x.mapObjects(ctx); err != nil {
		return err
	}
	for first := 0; first < len(x.v.m.objects) || !x.counted; {
		n, err := x.loadPlaces(ctx, first)
		if err != nil {
			return err
		}
		if err := x.goThroughMap(ctx); err != nil {
			return err
		}
		x.counted = true
		first += n
	}
	x.places = nil
	// Those after the checkpoint: their headers were read before.
	k := len(x.v.m.objects)
	err := c.each(ctx, len(x.v.tail), func(ctx context.Context, i int) error {
		_, err := x.object(ctx, k+i)
		return err
	})
	if err != nil {
		return err
	}
	x.judgeObjects()
	x.judgeCounts()
	return nil
}

// plan adds up how much there is to read of all views: of data that several have,
// once.
func (c *checker) plan() {
	n, known := 0, maps.Clone(c.sound)
	for _, v := range c.reach.views {
		_, bytes := v.m.held()
		n += bytes
		for i := range v.objects() {
			o := v.info(i)
			if i < len(v.m.objects) && o.live == 0 && !c.reach.holds.object(uint64(o.number), uint64(o.died)) {
				continue // most likely it is gone
			}
			n += o.headerBytes()
			if c.o.Deep && o.live > 0 && !known[o.number] {
				n += int(o.sectors) * SectorSize
				known[o.number] = true
			}
		}
	}
	c.toRead(n)
}

// mapObjects checks that the map objects are there and have their sizes.
func (x *viewCheck) mapObjects(ctx context.Context) error {
	c, list := x.c, x.v.m.maps
	return c.each(ctx, len(list), func(ctx context.Context, i int) error {
		o := list[i]
		key := c.im.line.mapKey(o.at, o.part)
		if o.live == 0 {
			return nil
		}
		is, err := c.st.Stat(ctx, key)
		switch {
		case damaged(err):
		case err != nil:
			return err
		case is.Size != int64(o.size):
			err = fmt.Errorf("%w: it has %d bytes, it should have %d", ErrCorrupt, is.Size, o.size)
		default:
			return nil
		}
		c.add(Finding{Object: key, Problem: c.of(x.v, err.Error()), Action: fromCopy, vanished: errors.Is(err, backend.ErrNotFound)})
		return nil
	})
}

// loadPlaces reads the headers of as many of the checkpoint's objects from first on
// as memory allows, and returns how many these are.
func (x *viewCheck) loadPlaces(ctx context.Context, first int) (n int, err error) {
	c, list := x.c, x.v.m.objects
	x.first, x.places = first, nil
	for used := 0; first+n < len(list) && used < c.o.memory; {
		k := min(len(list)-first-n, 4*c.o.Parallel)
		places := make([]dataPlaces, k)
		err := c.each(ctx, k, func(ctx context.Context, i int) error {
			h, err := x.object(ctx, first+n+i)
			if h != nil {
				places[i] = placesOf(h)
			}
			return err
		})
		if err != nil {
			return n, err
		}
		for _, p := range places {
			used += 8*len(p.at) + 64
		}
		x.places = append(x.places, places...)
		n += k
	}
	return n, nil
}

// object reads the header of the object at place i, and all its data if that is
// wanted and was not done before. It returns nil and notes what is wrong if the
// object is damaged; an error is one of the store.
func (x *viewCheck) object(ctx context.Context, i int) (*objectHeader, error) {
	c, o := x.c, x.v.info(i)
	h, err := c.readObject(ctx, o)
	switch {
	case err == nil:
		return h, nil
	case !damaged(err):
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x.errs[i] = err
	return nil, nil
}

// readObject reads and verifies an object's header, and its data with Deep.
func (c *checker) readObject(ctx context.Context, o objectInfo) (*objectHeader, error) {
	key := c.im.line.dataKey(uint64(o.number), uint64(o.epoch))
	h, err := c.im.readHeader(ctx, o)
	if err != nil {
		return nil, err
	}
	c.read(h.header)
	if born := infoOf(h).born; born != o.born {
		return nil, fmt.Errorf("object %s: %w: its header gives its data the age of object %d, the table of %d", key, ErrCorrupt, born, o.born)
	}
	is, err := c.st.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	if is.Size != int64(h.header+h.data) {
		return nil, fmt.Errorf("object %s: %w: it has %d bytes, it should have %d", key, ErrCorrupt, is.Size, h.header+h.data)
	}
	c.mu.Lock()
	known := c.sound[o.number]
	c.mu.Unlock()
	if !c.o.Deep || known || o.live == 0 {
		return h, nil
	}
	buf := make([]byte, min(h.data, checkRead))
	for at := 0; at < h.data; at += len(buf) {
		buf = buf[:min(len(buf), h.data-at)]
		if err := c.pace.wait(ctx, len(buf)); err != nil {
			return nil, err
		}
		if err := readBlocks(ctx, c.st, key, h, at, buf); err != nil {
			return nil, err
		}
		c.read(len(buf))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sound[o.number] = true
	return h, nil
}

// readBlocks reads data of an object from the store, from a multiple of objectBlock
// on, and verifies it.
func readBlocks(ctx context.Context, st backend.Store, key string, h *objectHeader, at int, buf []byte) error {
	n, err := st.Get(ctx, key, buf, int64(h.header+at))
	if err != nil {
		return err
	}
	if n != len(buf) {
		return fmt.Errorf("object %s: %w: it ends after %d bytes, it should have %d", key, ErrCorrupt, h.header+at+n, h.header+h.data)
	}
	if err := verifyBlocks(buf, h.sums, at/objectBlock); err != nil {
		return fmt.Errorf("object %s: %w", key, err)
	}
	return nil
}

// goThroughMap reads every segment of the view's map.
func (x *viewCheck) goThroughMap(ctx context.Context) error {
	var list []uint32
	for i := range segmentsOf(x.c.im.span.Load()) {
		if !x.v.m.empty(i) || x.touched.has(i) {
			list = append(list, i)
		}
	}
	if x.counted { // it was not foreseen
		_, bytes := x.v.m.held()
		x.c.toRead(bytes)
	}
	return x.c.each(ctx, len(list), func(ctx context.Context, k int) error { return x.segment(ctx, list[k]) })
}

// segment checks one segment of the map.
func (x *viewCheck) segment(ctx context.Context, i uint32) error {
	c := x.c
	span := extmap.NewSpan(segmentStart(i), segmentPages)
	if at := x.v.m.places(i); at[kindWhole].size > 0 {
		var err error
		var wrong *segmentError
		span, err = readSegment(ctx, c.st, c.im.line, at, i, c.im.span.Load())
		switch {
		case errors.As(err, &wrong) && damaged(err):
			if !x.counted {
				x.holes.Store(true)
				c.add(Finding{Object: wrong.key, Problem: c.of(x.v, err.Error()), Action: fmt.Sprintf("%s, of the image's bytes %d to %d", fromCopy, segmentStart(i)*SectorSize, min(segmentStart(i+1), c.im.span.Load())*SectorSize-1), vanished: errors.Is(err, backend.ErrNotFound)})
			}
			return nil
		case err != nil:
			return err
		}
		newest := at[kindWhole]
		for _, p := range at {
			if c.read(int(p.size)); p.size > 0 {
				newest = p
			}
		}
		x.compare(i, c.im.line.mapKey(newest.object.at, newest.object.part), span)
	}
	if !x.counted {
		x.count(i, span)
	}
	return nil
}

// compare checks the extents of a segment against the objects whose places are
// known, and, the first time, against the table. Of each kind of wrong extents it
// reports the first one.
func (x *viewCheck) compare(i uint32, key string, span *extmap.Span) {
	c := x.c
	var strange, misplaced []extmap.Extent
	for s := segmentStart(i); ; {
		e, ok := span.Next(s)
		if !ok {
			break
		}
		s = e.End()
		ref, off := refOf(e.Loc), uint64(offsetOf(e.Loc))
		k := -1
		if ref.possible() && ref.seq() <= x.v.m.at.object {
			k = x.v.find(ref.seq())
		}
		switch p := k - x.first; {
		case k < 0 || off+uint64(e.N) > uint64(x.v.info(k).sectors):
			if !x.counted {
				strange = append(strange, e)
			}
		default:
			if !x.counted {
				atomic.AddUint32(&x.live[k], e.N)
			}
			if p >= 0 && p < len(x.places) && x.places[p].known && !x.places[p].holds(e.Sector, uint64(e.N), off) {
				misplaced = append(misplaced, e)
			}
		}
	}
	report := func(list []extmap.Extent, what string) {
		if len(list) == 0 {
			return
		}
		x.holes.Store(true)
		e := list[0]
		more := ""
		if n := len(list) - 1; n > 0 {
			more = fmt.Sprintf(", and %d more", n)
		}
		problem := fmt.Sprintf("map segment %d: %d sectors from %d are looked for in object %d, at sector %d, %s%s", i, e.N, e.Sector, refOf(e.Loc).seq(), offsetOf(e.Loc), what, more)
		c.add(Finding{Object: key, Problem: c.of(x.v, problem), Action: "bring the object back from a copy of the pool; reads there give errors or wrong data"})
	}
	report(strange, "which the table does not have")
	report(misplaced, "which does not hold them there")
}

// count adds up what the map refers to after the view's last object.
func (x *viewCheck) count(i uint32, span *extmap.Span) {
	next := span.Next
	if x.touched.has(i) {
		m := x.replay(i, span)
		end := min(segmentStart(i+1), x.c.im.span.Load())
		next = func(s uint64) (extmap.Extent, bool) {
			if s >= end {
				return extmap.Extent{}, false
			}
			return m.Next(s, end)
		}
	}
	for s := segmentStart(i); ; {
		e, ok := next(s)
		if !ok {
			return
		}
		s = e.End()
		if k := x.v.find(refOf(e.Loc).seq()); k >= 0 && refOf(e.Loc).possible() {
			atomic.AddUint32(&x.now[k], e.N)
		}
	}
}

// replay returns a map that has segment i as it is after the view's last object.
func (x *viewCheck) replay(i uint32, span *extmap.Span) *extmap.Map {
	lo, hi := segmentStart(i), min(segmentStart(i+1), x.c.im.span.Load())
	m := extmap.New(x.c.im.span.Load())
	m.Attach(span)
	var now uint32
	m.Replaced = func(loc uint64, _ uint32) {
		if k := x.v.find(refOf(loc).seq()); k >= 0 {
			raise(&x.died[k], now)
		}
	}
	for _, t := range x.v.tail {
		now = uint32(t.seq)
		k := sort.Search(len(t.extents), func(k int) bool { return t.extents[k].sector+uint64(t.extents[k].n) > lo })
		for ; k < len(t.extents) && t.extents[k].sector < hi; k++ {
			e := t.extents[k]
			s, end := max(e.sector, lo), min(e.sector+uint64(e.n), hi)
			enterObject(m, t.seq, t.base, e.zero, s, end-s, int(t.offsets[k])+int(s-e.sector))
		}
	}
	return m
}

// raise makes *p at least v.
func raise(p *uint32, v uint32) {
	for {
		old := atomic.LoadUint32(p)
		if old >= v || atomic.CompareAndSwapUint32(p, old, v) {
			return
		}
	}
}

// judgeObjects reports the objects that are damaged and needed.
func (x *viewCheck) judgeObjects() {
	c := x.c
	for i := range x.v.objects() {
		if i < len(x.v.m.objects) && x.now[i] == 0 && x.died[i] == 0 {
			x.died[i] = x.v.m.objects[i].died
		}
		err := x.errs[i]
		if err == nil {
			continue
		}
		// One of a segment that could not be read may be needed there.
		o := x.v.info(i)
		if x.now[i] == 0 && !(x.holes.Load() && o.live > 0) {
			continue
		}
		action := fmt.Sprintf("%s, of the image's data %d KiB", fromCopy, uint64(x.now[i])*SectorSize/1024)
		c.add(Finding{Object: c.im.line.dataKey(uint64(o.number), uint64(o.epoch)), Problem: c.of(x.v, err.Error()), Action: action, vanished: errors.Is(err, backend.ErrNotFound)})
	}
}

// judgeCounts compares the table's counts with those of the map.
func (x *viewCheck) judgeCounts() {
	c, v := x.c, x.v
	if x.holes.Load() {
		return
	}
	if v != c.reach.head && sameRef(v.ref, c.reach.head.ref) {
		return // the table is the head's, and judged
	}
	var wrong []liveCount
	for i, o := range v.m.objects {
		if o.live != x.live[i] || (o.live == 0) != (o.died != 0) {
			wrong = append(wrong, liveCount{o.number, x.live[i]})
		}
	}
	mendable := v == c.reach.head && c.mendable(v)
	if mendable {
		c.counts = wrong
	}
	if len(wrong) == 0 {
		return
	}
	w := wrong[0]
	k := slices.IndexFunc(v.m.objects, func(o objectInfo) bool { return o.number == w.number })
	problem := fmt.Sprintf("the table has %d live sectors for object %d, the map has %d; %d such objects", v.m.objects[k].live, w.number, w.live, len(wrong))
	action := mendCounts
	if !mendable || slices.ContainsFunc(wrong, func(w liveCount) bool { return !x.possible(w) }) {
		action = "bring the checkpoint back from a copy of the pool"
	}
	c.add(Finding{Object: c.manifestOf(v), Problem: c.of(v, problem), Action: action})
}

// mendable reports whether the manifest of the present state can be replaced: it is the
// image's own, and no clone goes back to it.
func (c *checker) mendable(v *view) bool {
	return v.ref != nil && c.im.line.own(v.ref.Object) &&
		!slices.ContainsFunc(c.reach.sb.Clones, func(p snapshot) bool { return sameRef(p.Checkpoint, v.ref) })
}

// possible reports whether an object has as much data as the map refers to.
func (x *viewCheck) possible(w liveCount) bool {
	return w.live <= x.v.info(x.v.find(uint64(w.number))).sectors
}
