package engine

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"syscall"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/frame"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// full returns the size of the world's images in bytes. What is smaller is made so large
// before it is written to: all that the model knows of the size of an image is that what was
// beyond the end reads as zeroes.
func (w *world) full() uint64 { return w.plan.extras.sectors * SectorSize }

// regrow makes an image as large as it was, whoever has it, unless its superblock is damaged.
func (w *world) regrow(id uuid.UUID) {
	if !w.plan.extras.resizes {
		return
	}
	if err := Grow(context.Background(), w.inner, id, w.full()); err != nil && !errors.Is(err, frame.ErrCorrupt) {
		w.fail("grow: %v", err)
	}
}

// resize makes the image smaller and larger again, while the store and the SSD may fail and
// the owner may die.
func (w *world) resize() {
	w.count(countShrinks, true)
	w.shrinkAndGrow()
	if h := w.owner; h.im != nil && !h.dead && h.im.Sectors() != w.plan.extras.sectors {
		w.crash() // in the midst of it, or because its SSD or its lease is gone
	}
}

func (w *world) shrinkAndGrow() {
	h := w.owner
	w.settleRequests(h)
	if !w.serving() {
		return
	}
	size := w.newSize()
	m := h.m
	first := len(m.history)
	w.cut(m, size)
	if len(m.history) == first {
		return // there is nothing beyond
	}
	last := len(m.history) - 1
	ended, failed := false, error(nil)
	h.im.Shrink(size, nil, func(err error) {
		ended, failed = true, err
		if err != nil {
			return
		}
		if err := m.complete(first, last, false); err != nil {
			w.fail("%s: %v", h.name, err)
		}
		m.stored = max(m.stored, len(m.history))
	})
	if w.awaitShrink(h, &ended); !ended || failed != nil || !w.serving() {
		if ended && failed != nil && w.serving() {
			w.fail("shrink: %v", failed)
		}
		return // the next process finds whatever there is
	}
	w.count(countShrunk, true)
	w.mustEndAt(h, size)
	if w.plan.extras.snaps && w.rng.IntN(2) == 0 {
		w.snapshot()
	}
	if w.serving() {
		w.growBack(size)
	}
}

// settleRequests waits until nothing of h is in flight, unless its process dies.
func (w *world) settleRequests(h *simHost) {
	for i := 0; len(h.out) > 0 && w.serving(); i++ {
		switch i {
		case 3000:
			h.faults = simFaults{}
		case 100_000:
			w.fail("requests before a shrink: nothing moves: %+v", h.im.Stats())
		}
		w.step(math.MaxInt64)
	}
}

// newSize draws a size for the image: it ends somewhere in what the world uses.
func (w *world) newSize() uint64 {
	at := w.sectorOf(w.rng.Uint64N(w.cells()-1) + 1)
	return max(at, w.plan.cell) * SectorSize
}

// cut enters into a model that what is beyond a size becomes zeroes, in the order of the
// image's sectors.
func (w *world) cut(m *model, size uint64) {
	type run struct{ cell, cells, sector uint64 }
	var list []run
	cell := uint64(0)
	for _, r := range w.regions {
		n := r.sectors / w.plan.cell
		if end := size / SectorSize; r.start+r.sectors > end {
			skip := (max(end, r.start) - r.start) / w.plan.cell
			list = append(list, run{cell + skip, n - skip, r.start})
		}
		cell += n
	}
	slices.SortFunc(list, func(a, b run) int { return cmp.Compare(a.sector, b.sector) })
	for _, r := range list {
		m.add(modelWrite{n: w.nextWrite, cell: r.cell, cells: r.cells, zero: true})
		w.nextWrite++
	}
}

// awaitShrink waits until the image has been made smaller, or its owner has come to an end, or
// for a while, after which its process is to die.
// All that is wrong passes in time.
func (w *world) awaitShrink(h *simHost, ended *bool) {
	most := math.MaxInt
	if w.rng.IntN(3) == 0 {
		most = w.rng.IntN(150)
	}
	for i := 0; !*ended && w.serving() && i < most; i++ {
		if w.rng.IntN(200) == 0 && i < 3000 {
			w.weather(h)
		}
		switch i {
		case 3000:
			h.faults = simFaults{}
		case 100_000:
			w.fail("shrink: nothing moves: %+v", h.im.Stats())
		}
		w.step(math.MaxInt64)
	}
}

// mustEndAt makes sure that the image ends at a size.
func (w *world) mustEndAt(h *simHost, size uint64) {
	if have := h.im.Sectors() * SectorSize; have != size {
		w.fail("%s: the image has %d bytes after it was made %d", h.name, have, size)
	}
	cell := uint32(w.plan.cell)
	r := &Request{Op: Read, Sector: size / SectorSize, Sectors: cell, Buf: uring.AlignedBuffer(int(cell) * SectorSize)}
	r.Done = doneFunc(func(*Request) {})
	if h.im.Submit(r); r.Err != syscall.EINVAL {
		w.fail("%s: a read beyond the end: %v", h.name, r.Err)
	}
}

// growBack makes the image as large as it was, from another host, whose process may die.
func (w *world) growBack(size uint64) {
	c := w.caller()
	caller := simCaller{c, w.now + 4*w.plan.lease}
	var err error
	died := w.call(c, func() { err = Grow(context.Background(), c.store, w.id, w.full()) })
	if err != nil && c.injected == 0 {
		w.fail("grow: %v", err)
	}
	if died || err != nil {
		w.flushLate()
		w.regrow(w.id)
	}
	if w.rng.IntN(2) == 0 {
		_ = w.nudge(caller)
	}
	w.drop(c)
	for i := 0; w.serving() && w.owner.im.Sectors() != w.plan.extras.sectors; i++ {
		if i == 3000 {
			w.owner.faults = simFaults{}
		}
		if i == 100_000 {
			w.fail("the owner of an image of %d bytes does not find that it is larger", size)
		}
		w.step(math.MaxInt64)
	}
	w.count(countGrown, w.serving())
}
