package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

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
	im.sums.init()
	if err := im.branchPoint(ctx, sb, file); err != nil {
		return uuid.Nil, err
	}
	if progress == nil {
		progress = func(uint64, uint64) {}
	}
	w := &copier{im: im, dst: dst, progress: progress}
	id, err := Create(ctx, dst, dstName, CreateOptions{Size: im.sectors * SectorSize, BlockSize: sb.BlockSize, ObjectSize: sb.ObjectSize})
	if err != nil {
		return uuid.Nil, err
	}
	if err := w.copyAll(ctx, id); err != nil {
		// Half an image is nobody's.
		if e := Remove(context.WithoutCancel(ctx), dst, dstName, dstName, true, nil); e != nil {
			return uuid.Nil, fmt.Errorf("%w; what was written of image %s could not be removed: %w", err, dstName, e)
		}
		return uuid.Nil, err
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
	im.log, im.logID, im.super.sb = log, h.Log, sb
	im.checkpoint.segments = map[uint32]segmentRef{}
	end := uint64(maxObjectSeq)
	for _, e := range sb.Epochs {
		if e.Epoch > h.Epoch {
			end = e.Object - 1
			break
		}
	}
	// The last checkpoint serves if it is not past that point; else the objects
	// do, from the first on.
	if sb.Checkpoint != nil && sb.Checkpoint.Object <= end {
		if err := im.loadCheckpoint(ctx, sb); err != nil {
			return err
		}
	}
	for im.accepted.object < end {
		oh, err := im.loadHeader(ctx, sb, im.accepted.object+1)
		if errors.Is(err, backend.ErrNotFound) && end == maxObjectSeq {
			break
		}
		if err != nil {
			return fmt.Errorf("data object %d, which the image as it was needs: %w", im.accepted.object+1, err)
		}
		im.accept(oh)
		im.recoveredLog = oh.log
	}
	_, err = im.recoverLog(&OpenOptions{})
	return err
}

// copier writes a salvaged image.
type copier struct {
	im       *Image
	dst      backend.Store
	progress func(done, total uint64)
	total    uint64 // sectors to write

	header objectHeader
	data   []byte
}

// copyAll writes everything that im's maps hold as data objects of the image id,
// as an owner would have, in an epoch of its own.
func (c *copier) copyAll(ctx context.Context, id uuid.UUID) error {
	runs := c.im.runs()
	for _, r := range runs {
		c.total += uint64(r.N)
	}
	sb, _, err := changeSuperblock(ctx, c.dst, id, func(sb *superblock) error {
		sb.Epoch++
		sb.Epochs = append(sb.Epochs, epochStart{Epoch: sb.Epoch, Object: 1, Seq: 1})
		return nil
	})
	if err != nil {
		return err
	}
	c.header = objectHeader{image: id, epoch: sb.Epoch, seq: 1, firstSeq: 1, lastSeq: 1}
	var done uint64
	limit := int(sb.ObjectSize)
	for _, r := range runs {
		for r.N > 0 {
			n := min(r.N, 256, uint32((limit-len(c.data))/SectorSize))
			if err := c.add(ctx, r, n); err != nil {
				return err
			}
			r.Sector, r.N, r.Loc = r.Sector+uint64(n), r.N-n, r.Loc+uint64(n)
			done += uint64(n)
			if len(c.data) == limit {
				if err := c.put(ctx); err != nil {
					return err
				}
				c.progress(done, c.total)
			}
		}
	}
	if len(c.data) > 0 {
		err = c.put(ctx)
	}
	c.progress(done, c.total)
	return err
}

// run is an extent and which map it is from.
type run struct {
	extmap.Extent
	dirty bool
}

// runs returns all data of the image, the log's over the store's, in ascending
// order.
func (im *Image) runs() []run {
	var list []run
	for s := uint64(0); s < im.sectors; {
		d, ok := im.dirty.Next(s, im.sectors)
		stop := im.sectors
		if ok {
			stop = d.Sector
		}
		for s < stop {
			e, ok := im.objs.Next(s, stop)
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
		err = c.im.readObject(*c.im.table.find(refOf(r.Loc)), offsetOf(r.Loc), c.data[k:])
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
	h.data = len(c.data)
	h.header = headerSize(len(h.extents), h.data)
	b := append(make([]byte, h.header), c.data...)
	h.encode(b)
	if err := c.dst.Put(ctx, dataKey(h.image, h.seq, h.epoch), b); err != nil {
		return err
	}
	h.seq, h.firstSeq, h.lastSeq = h.seq+1, h.firstSeq+1, h.lastSeq+1
	h.extents, c.data = h.extents[:0], c.data[:0]
	return nil
}
