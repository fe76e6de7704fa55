package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// Salvage makes a new image dstName, in the store dst, of what the log in file
// holds: the image src as it was when the log's ownership ended in the store, and
// on top of it everything in the log that never got there. It reads the image's
// data objects from the first on, and copies all live data. Neither the log nor
// the image src is changed. progress, if not nil, is told how many sectors of how
// many are written.
func Salvage(ctx context.Context, file writelog.File, src backend.Store, srcID uuid.UUID, dst backend.Store, dstName string, progress func(done, total uint64)) (uuid.UUID, error) {
	sb, _, err := loadSuperblock(ctx, src, srcID)
	if err != nil {
		return uuid.Nil, err
	}
	o := OpenOptions{ReadOnly: true, URL: dstName}
	im := newImage(ctx, src, sb, &o)
	defer im.cancel()
	if err := im.branchPoint(ctx, sb, file); err != nil {
		return uuid.Nil, err
	}
	if progress == nil {
		progress = func(uint64, uint64) {}
	}
	w := &copier{im: im, v: newView(im, uuid.Nil, im.parallel), dst: dst, progress: progress}
	size := im.sectors * SectorSize // then
	id, err := CreatePartial(ctx, dst, dstName, CreateOptions{Size: size, BlockSize: sb.BlockSize, ObjectSize: max(sb.ObjectSize, leastObjectSize(size))})
	if err != nil {
		return uuid.Nil, err
	}
	if err = w.copyAll(ctx, id); err == nil {
		err = Finish(ctx, dst, dstName, id, 0)
	}
	if err != nil {
		return uuid.Nil, Abort(ctx, dst, id, err)
	}
	return id, nil
}

// branchPoint builds the map as it was after the last object that the log's
// ownership put, and lays the log's own records over it.
func (im *Image) branchPoint(ctx context.Context, sb *superblock, file writelog.File) error {
	log, err := writelog.Open(file)
	if err != nil {
		return err
	}
	h := log.Header()
	if h.Image != im.id {
		return fmt.Errorf("%w: %s (%s)", ErrForeignLog, h.ImageURL, h.Image)
	}
	im.log, im.logID = log, h.Log
	im.takeSuper(sb, "")
	if err := im.branchFrom(ctx, sb, &h, file); err != nil {
		lost := errors.Is(err, errMisfit) || errors.Is(err, backend.ErrNotFound)
		if lost && h.Epoch < sb.Epoch && !slices.ContainsFunc(sb.Points, func(p cutOff) bool { return p.Log == h.Log }) {
			err = fmt.Errorf("the image does not keep its state for this log any more: %w", err)
		}
		return err
	}
	return nil
}

// branchFrom is branchPoint for a log that is the image's, with the header h.
func (im *Image) branchFrom(ctx context.Context, sb *superblock, h *writelog.Header, file writelog.File) error {
	for i := range sb.Points {
		if p := &sb.Points[i]; p.Log == h.Log && p.Sectors > 0 {
			sb = sb.clone()
			sb.setSectors(p.Sectors)
			im.takeSuper(sb, "")
		}
	}
	base, end := im.branchOf(sb, h)
	if err := im.recoverPoint(ctx, sb, &point{Object: end, Settled: end != maxObjectSeq, Checkpoint: base}); err != nil {
		return err
	}
	_, err := im.recoverLog(ctx, &OpenOptions{Log: file})
	return err
}

// branchOf returns the checkpoint and the last data object that give the image as
// it was when the log's ownership ended.
func (im *Image) branchOf(sb *superblock, h *writelog.Header) (base *checkpointRef, end uint64) {
	for _, p := range sb.Points {
		switch {
		case p.Log != h.Log:
		case p.Settled:
			return p.Checkpoint, p.Object
		default: // nobody has looked yet where it ended: nothing was put after it
			return p.Checkpoint, maxObjectSeq
		}
	}
	for _, e := range sb.Epochs {
		if e.Epoch > h.Epoch {
			end = e.Object - 1
			// The last checkpoint serves if it is not past that point; else all
			// objects must be there, from the first on.
			if sb.Checkpoint != nil && sb.pathTo(end).has(sb.Checkpoint.Object) {
				base = sb.Checkpoint
			}
			return base, end
		}
	}
	return sb.Checkpoint, maxObjectSeq
}

// copier writes a salvaged image.
type copier struct {
	im       *Image // whose log there is
	v        *View  // of what the store has of it
	dst      backend.Store
	progress func(done, total uint64)
	total    uint64 // sectors to write, at most
	done     uint64 // sectors written
	limit    int    // bytes of data in an object

	header objectHeader
	data   []byte
	alive  time.Time // when the superblock last said so
}

// copyAll writes everything that im's maps hold as data objects of the image id,
// as an owner would have, in an epoch of its own.
func (c *copier) copyAll(ctx context.Context, id uuid.UUID) error {
	sb, _, err := changeSuperblock(ctx, c.dst, id, func(sb *superblock) error {
		sb.Epoch++
		sb.Epochs = append(sb.Epochs, epochStart{Epoch: sb.Epoch, Object: 1, Seq: 1})
		return nil
	})
	if err != nil {
		return err
	}
	c.alive = time.Now()
	c.header = objectHeader{image: id, epoch: sb.Epoch, seq: 1, firstSeq: 1, lastSeq: 1}
	c.limit = int(sb.ObjectSize)
	c.total = c.im.table.live + c.im.dirtySectors()
	for i := range segmentsOf(c.im.sectors) {
		if err := c.copySegment(ctx, i); err != nil {
			return err
		}
	}
	if len(c.data) > 0 {
		err = c.put(ctx)
	}
	c.progress(c.done, c.done) // what the log overwrites was counted twice
	return err
}

// copySegment copies what a segment of the image holds.
func (c *copier) copySegment(ctx context.Context, i uint32) error {
	im := c.im
	span, err := c.v.segment(ctx, i)
	if err != nil {
		return err
	}
	start := segmentStart(i)
	for _, r := range im.runs(span, start, min(start+segmentSectors, im.sectors)) {
		for r.N > 0 {
			n := min(r.N, 256, uint32((c.limit-len(c.data))/SectorSize))
			if err := c.add(ctx, r, n); err != nil {
				return err
			}
			r.Sector, r.N, r.Loc = r.Sector+uint64(n), r.N-n, r.Loc+uint64(n)
			c.done += uint64(n)
			if len(c.data) == c.limit {
				if err := c.put(ctx); err != nil {
					return err
				}
				c.progress(c.done, max(c.total, c.done))
			}
		}
	}
	return nil
}

// dirtySectors returns how many sectors the log holds data for.
func (im *Image) dirtySectors() (n uint64) {
	for s := uint64(0); ; {
		e, ok := im.dirty.Next(s, im.sectors)
		if !ok {
			return n
		}
		if e.Loc&extmap.Fixed == 0 {
			n += uint64(e.N)
		}
		s = e.End()
	}
}

// run is an extent and which map it is from.
type run struct {
	extmap.Extent
	dirty bool
}

// runs returns the data of [s, end), the log's over the store's, which span has, in
// ascending order.
func (im *Image) runs(span *extmap.Span, s, end uint64) []run {
	var list []run
	for s < end {
		d, ok := im.dirty.Next(s, end)
		stop := end
		if ok {
			stop = d.Sector
		}
		for s < stop {
			e, ok := nextIn(span, s, stop)
			if !ok {
				break
			}
			list = append(list, run{e, false})
			s = e.End()
		}
		if !ok {
			break
		}
		if d.Loc&extmap.Fixed == 0 {
			list = append(list, run{d, true})
		}
		s = d.End()
	}
	return list
}

// add appends the first n sectors of r to the object being built.
func (c *copier) add(ctx context.Context, r run, n uint32) error {
	k := len(c.data)
	c.data = slices.Grow(c.data, int(n)*SectorSize)[:k+int(n)*SectorSize]
	var err error
	if r.dirty {
		err = c.im.log.ReadBlocking(c.data[k:], r.Loc, c.im.log.Buffer(int(n)*SectorSize+2*writelog.BlockSize))
	} else {
		var part viewPart
		if part, err = c.v.part(r.Loc, c.data[k:]); err == nil {
			err = c.v.readObject(ctx, part.info, part.off, part.dst)
		}
	}
	if err != nil {
		return err
	}
	c.header.extents = append(c.header.extents, objectExtentInfo{sector: r.Sector, n: n})
	return ctx.Err()
}

// put writes the object that has been built, and begins the next.
func (c *copier) put(ctx context.Context) error {
	h := &c.header
	if now := time.Now(); now.Sub(c.alive) >= touchEvery {
		if err := touch(ctx, c.dst, h.image); err != nil {
			return err
		}
		c.alive = now
	}
	h.data = len(c.data)
	h.pack()
	b := append(make([]byte, h.header), c.data...)
	h.encode(b)
	if err := c.dst.Put(ctx, dataKey(h.image, h.seq, h.epoch), b); err != nil {
		return err
	}
	h.seq, h.firstSeq, h.lastSeq = h.seq+1, h.firstSeq+1, h.lastSeq+1
	h.extents, c.data = h.extents[:0], c.data[:0]
	return nil
}
