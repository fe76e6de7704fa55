package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// A View is one state of an image, opened to be read: a snapshot, or the image as the store
// had it then. It takes no ownership, changes nothing, and needs no reactor: what a
// checkpoint has stored of the map does not change, nor what has changed since. It keeps
// some segments of the map in memory, and the checksums of some objects. Any number of
// goroutines may use it at once.
type View struct {
	im       *Image        // not started; nothing changes it any more but for what it keeps of checksums
	snapshot uuid.UUID     // uuid.Nil: the image itself
	parallel int           // reads of the store under way at one time
	places   chan struct{} // one for each of them

	mu       sync.Mutex
	segments map[uint32]*viewSegment // that are in memory, or are being read; guarded by mu
	order    []uint32                // in which they came; guarded by mu
}

// viewSegment is a segment of a view's map.
type viewSegment struct {
	loaded chan struct{} // closed when what follows is set
	span   *extmap.Span  // nobody changes it
	err    error
}

const (
	// viewParallel is how many reads of the store a view has under way at one time: they are
	// of as many objects, most likely, and so keep as many of its disks busy.
	viewParallel = 32
	// viewSegments is how many segments of the map a view has in memory: 6 MiB of an image
	// that is written at random in blocks of 4 KiB, and 50 MiB of one in blocks of 512 bytes.
	viewSegments = 64
	// viewSums bounds the checksums that a view has at hand: 64 MiB, of 64 GiB of data. To
	// read in the order of the image comes back to each object again and again.
	viewSums = 16 << 20
	// viewPatience is how many times the timeout of a call of the store a read may take.
	viewPatience = 6
	// viewGap is up to how far apart two pieces of an object may be, in sectors, to be read
	// together with what is between them, and viewRead how much is read together, in bytes.
	viewGap  = 32
	viewRead = 4 << 20
)

// ErrOvertaken is matched by errors that say that a state cannot be read any more: its image
// has been removed, or its snapshot, or the image's owner has gone on and removed what the
// image was when it was opened. A snapshot stays what it is.
var ErrOvertaken = errors.New("what was being read is not there any more")

// ViewOptions says how a state of an image is opened.
type ViewOptions struct {
	// Snapshot is the id of a snapshot; uuid.Nil means the image as the store has it now.
	Snapshot uuid.UUID
	// Parallel is how many reads of the store are under way at one time; 0 means a default.
	Parallel int
	Clock    Clock // nil means Real{}
	// Progress is told in a few words what takes time; may be nil.
	Progress func(string)
	Config   Config
}

// OpenView opens a state of the image id. Of an image that is attached that is what has
// reached the store. It is to be closed.
func OpenView(ctx context.Context, st backend.Store, id uuid.UUID, o ViewOptions) (*View, error) {
	n := cmp.Or(o.Parallel, viewParallel)
	as := &OpenOptions{ReadOnly: true, Snapshot: o.Snapshot, Clock: o.Clock, Parallel: n, Progress: o.Progress, Config: o.Config}
	recovery, sb, err := as.lookAt(ctx, st, id)
	if err != nil {
		return nil, err
	}
	as.Config.StoreTimeout *= viewPatience
	im, err := openAsIs(ctx, recovery, sb, as)
	if err != nil {
		return nil, err
	}
	return newView(im, o.Snapshot, n), nil
}

// newView makes a view of an image that has been recovered and not started, which it takes
// over.
func newView(im *Image, snapshot uuid.UUID, n int) *View {
	im.sums.init()
	im.sums.most = viewSums
	im.objs.leave()
	im.objs.Map = nil // each segment is made anew of what is stored and its changes
	return &View{im: im, snapshot: snapshot, parallel: n, places: make(chan struct{}, n), segments: map[uint32]*viewSegment{}}
}

// Close ends the use of the view. Nobody may read it any more.
func (v *View) Close() { v.im.cancel() }

// Size returns the bytes that the image has in this state.
func (v *View) Size() uint64 { return v.im.sectors * SectorSize }

// BlockSize returns the bytes of a logical block of the image.
func (v *View) BlockSize() uint32 { return v.im.super.sb.BlockSize }

// ReadAt reads from the byte off on into p. Both are whole sectors inside the image. What it
// needs of several objects it reads side by side. It fails with ErrOvertaken if the state is
// not there any more.
func (v *View) ReadAt(ctx context.Context, p []byte, off uint64) error {
	if off%SectorSize != 0 || len(p)%SectorSize != 0 || off > v.Size() || uint64(len(p)) > v.Size()-off {
		return fmt.Errorf("read of %d bytes at %d: the image has %d, in sectors of %d", len(p), off, v.Size(), SectorSize)
	}
	parts, err := v.parts(ctx, nil, p, off/SectorSize)
	if err != nil {
		return err
	}
	return v.read(ctx, parts)
}

// viewPart is a part of a read: what an object has.
type viewPart struct {
	info objectInfo
	off  int // in the object's data, in sectors
	dst  []byte
}

// sectors returns how many it has.
func (x *viewPart) sectors() int { return len(x.dst) / SectorSize }

// parts appends to list what p, which begins at sector s, is to be read from, and zeroes the
// rest of it.
func (v *View) parts(ctx context.Context, list []viewPart, p []byte, s uint64) ([]viewPart, error) {
	for len(p) > 0 {
		i := segmentOf(s)
		end := min(s+uint64(len(p)/SectorSize), segmentStart(i+1))
		span, err := v.segment(ctx, i)
		if err != nil {
			return nil, err
		}
		for s < end {
			e, ok := nextIn(span, s, end)
			to := end
			if ok {
				to = e.Sector
			}
			clear(p[:(to-s)*SectorSize])
			if p, s = p[(to-s)*SectorSize:], to; !ok {
				break
			}
			n := int(e.N) * SectorSize
			part, err := v.part(e.Loc, p[:n])
			if err != nil {
				return nil, err
			}
			list = append(list, part)
			p, s = p[n:], e.End()
		}
	}
	return list, nil
}

// part returns the part of a read that has dst from a location of the map on.
func (v *View) part(loc uint64, dst []byte) (viewPart, error) {
	x := viewPart{off: offsetOf(loc), dst: dst}
	info := v.im.table.find(refOf(loc).seq())
	if info == nil || x.off+x.sectors() > int(info.sectors) {
		return x, fmt.Errorf("%w: the map refers to what data object %d does not have", ErrCorrupt, refOf(loc).seq())
	}
	x.info = *info
	return x, nil
}

// read reads parts, those that are near to each other in an object together.
func (v *View) read(ctx context.Context, parts []viewPart) error {
	slices.SortFunc(parts, func(a, b viewPart) int {
		return cmp.Or(cmp.Compare(a.info.number, b.info.number), cmp.Compare(a.off, b.off))
	})
	var groups [][]viewPart
	for k := 0; k < len(parts); {
		n := k + 1
		for n < len(parts) && near(&parts[k], &parts[n-1], &parts[n]) {
			n++
		}
		groups = append(groups, parts[k:n])
		k = n
	}
	return parallel.Each(v.parallel, len(groups), func(k int) error { return v.readGroup(ctx, groups[k]) })
}

// near reports whether the part next is to be read together with those from first to last,
// which come before it.
func near(first, last, next *viewPart) bool {
	return next.info.number == first.info.number && next.off <= last.off+last.sectors()+viewGap &&
		next.off+next.sectors()-first.off <= viewRead/SectorSize
}

// readGroup reads parts of one object, ascending, that are near to each other.
func (v *View) readGroup(ctx context.Context, parts []viewPart) error {
	first, last := &parts[0], &parts[len(parts)-1]
	if len(parts) == 1 {
		return v.readObject(ctx, first.info, first.off, first.dst)
	}
	b := make([]byte, (last.off+last.sectors()-first.off)*SectorSize)
	err := v.readObject(ctx, first.info, first.off, b)
	if errors.Is(err, ErrCorrupt) { // perhaps only what is between them is damaged
		for k := range parts {
			if err := v.readObject(ctx, first.info, parts[k].off, parts[k].dst); err != nil {
				return err
			}
		}
		return nil
	}
	if err != nil {
		return err
	}
	for k := range parts {
		copy(parts[k].dst, b[(parts[k].off-first.off)*SectorSize:])
	}
	return nil
}

func (v *View) readObject(ctx context.Context, info objectInfo, off int, dst []byte) error {
	return v.ask(ctx, func() error { return v.im.readObject(ctx, info, off, dst) })
}

// ask has a read of the store made when there is a place for it.
func (v *View) ask(ctx context.Context, read func() error) error {
	select {
	case v.places <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := read()
	<-v.places
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return v.overtaken(ctx, err)
}

// overtaken tells what it means that the store does not have what the view needs.
func (v *View) overtaken(ctx context.Context, err error) error {
	if !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	now, _, lerr := loadSuperblock(ctx, v.im.store, v.im.id)
	switch {
	case errors.Is(lerr, backend.ErrNotFound) || lerr == nil && now.Removed:
		return fmt.Errorf("%w: the image has been removed", ErrOvertaken)
	case lerr != nil:
		return lerr
	case v.snapshot != uuid.Nil && now.snapshotOf(v.snapshot) == nil:
		return fmt.Errorf("%w: the snapshot has been removed", ErrOvertaken)
	case !sameFor(v.snapshot, v.im.super.sb, now):
		return fmt.Errorf("%w: the image has gone on meanwhile: make a snapshot, and read that", ErrOvertaken)
	}
	return missingPart(err)
}

// segment returns segment i of the map, nil if nothing is there. Nobody may change it.
func (v *View) segment(ctx context.Context, i uint32) (*extmap.Span, error) {
	if v.im.objs.empty(i) && !v.im.objs.changed.has(i) {
		return nil, nil
	}
	for {
		s, mine := v.join(i)
		if mine {
			v.load(ctx, i, s)
			return s.span, s.err
		}
		select {
		case <-s.loaded:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if s.err == nil {
			return s.span, nil
		}
		// The other one may have been told to stop.
	}
}

// join returns segment i, which is in memory, or being read; mine says that the caller is to
// do that.
func (v *View) join(i uint32) (s *viewSegment, mine bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := v.segments[i]; s != nil {
		return s, false
	}
	s = &viewSegment{loaded: make(chan struct{})}
	v.segments[i] = s
	if v.order = append(v.order, i); len(v.order) > viewSegments {
		delete(v.segments, v.order[0])
		v.order = append(v.order[:0], v.order[1:]...)
	}
	return s, true
}

// load reads segment i for all who want it.
func (v *View) load(ctx context.Context, i uint32, s *viewSegment) {
	s.err = errors.New("the read of a map segment did not come to its end") // if it panics
	defer func() {
		if s.err != nil {
			v.drop(i, s)
		}
		close(s.loaded)
	}()
	s.err = v.ask(ctx, func() (err error) {
		im := v.im
		s.span, err = readSegment(ctx, im.store, im.line, im.objs.places(i), i, im.span.Load())
		return err
	})
	if s.err == nil {
		s.span = v.enterChanges(i, s.span)
	}
}

// drop forgets a segment that could not be read.
func (v *View) drop(i uint32, s *viewSegment) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.segments[i] == s {
		delete(v.segments, i)
		v.order = slices.DeleteFunc(v.order, func(k uint32) bool { return k == i })
	}
}

// enterChanges returns segment i, of which span is what is stored, with all that has changed
// since.
func (v *View) enterChanges(i uint32, span *extmap.Span) *extmap.Span {
	p, start := v.im.objs, segmentStart(i)
	c := p.changes[i]
	if c == nil {
		return span
	}
	m := extmap.New(start + segmentSectors)
	m.Attach(span)
	for _, x := range c.list {
		base := uint64(0)
		if x.off&changeMoves != 0 {
			base = p.bases[x.object]
		}
		enterObject(m, uint64(x.object), base, x.off&changeZeroes != 0, start+uint64(x.at), uint64(x.n), int(x.off&^(changeZeroes|changeMoves)))
	}
	return m.Copy(start, segmentPages)
}

// nextIn returns the first extent of a span, which may be nil, that meets [s, end), cut to
// it, and true; or false when nothing there is mapped.
func nextIn(span *extmap.Span, s, end uint64) (extmap.Extent, bool) {
	if span == nil || s >= end {
		return extmap.Extent{}, false
	}
	e, ok := span.Next(s)
	if !ok || e.Sector >= end {
		return extmap.Extent{}, false
	}
	e.N = uint32(min(e.End(), end) - e.Sector)
	return e, true
}
