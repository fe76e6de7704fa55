package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// shrinkTo makes the image, which the host has open, smaller.
func (h *host) shrinkTo(size uint64) error {
	err := errors.New("not ended")
	h.im.Shrink(size, nil, func(e error) { err = e })
	h.run(0)
	return err
}

func (h *host) mustShrink(size uint64) {
	h.t.Helper()
	if err := h.shrinkTo(size); err != nil {
		h.t.Fatalf("shrink to %d bytes: %v", size, err)
	}
}

// mustGrow makes the image larger; the host has it open, if it is not nil.
func mustGrow(t testing.TB, st backend.Store, id uuid.UUID, size uint64, h *host) {
	t.Helper()
	if err := Grow(context.Background(), st, id, size); err != nil {
		t.Fatal(err)
	}
	if h != nil {
		if err := h.nudge(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// mustEnd makes sure that the image has so many blocks, and none beyond.
func (h *host) mustEnd(blocks uint64) {
	h.t.Helper()
	if have := h.im.Sectors() / 8; have != blocks {
		h.t.Fatalf("the image has %d blocks, want %d", have, blocks)
	}
	if err, _, _ := h.do(Read, blocks, 0, 0); err != syscall.EINVAL {
		h.t.Errorf("a block beyond the end is read: %v", err)
	}
	if err, _, _ := h.do(Write, blocks, 1, 0); err != syscall.EINVAL {
		h.t.Errorf("a block beyond the end is written: %v", err)
	}
	if err, _, _ := h.do(Read, blocks-1, 0, 0); err != 0 {
		h.t.Errorf("the last block: %v", err)
	}
}

// TestResizeLarger: an image grows while it is attached, more than once, and what is written beyond
// its old end is there after whatever may come; so it is with one that is not attached.
func TestResizeLarger(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: 10 * 4096}, nil)
	h.mustWrite(9, 9)
	last := uint64(9)
	for i, blocks := range []uint64{11, 1000, 1 << 20, 1 << 28, 1 << 34} { // up to 64 TiB
		told := uint64(0)
		h.im.cfg.Resized = func(sectors uint64) { told = sectors }
		mustGrow(t, st, id, blocks*4096, h)
		if told != blocks*8 {
			t.Errorf("told of %d sectors, want %d", told, blocks*8)
		}
		h.mustEnd(blocks)
		h.mustRead(blocks-1, 0)
		h.mustWrite(blocks-1, blocks-1)
		switch i {
		case 1:
			h.mustCheckpoint()
		case 2:
			h.mustDestage()
			h.im.Abandon()
			h.mustAttach(id)
		case 3:
			h.mustReopen(id)
		}
		h.mustRead(last, last)
		last = blocks - 1
		h.mustRead(last, last)
	}
	h.mustClose()
	mustBeSound(t, st, "disk")
	h.mustAttach(id)
	for _, n := range []uint64{9, 10, 999, 1<<20 - 1, 1<<28 - 1, 1<<34 - 1} {
		h.mustRead(n, n)
	}
	if sb := h.im.super.sb; sb.Span != 0 || sb.version() != superOld {
		t.Errorf("an image that has only grown has span %d and version %d", sb.Span, sb.version())
	}
}

// TestEmpty: an image of 0 bytes is opened, closed and recovered like others, nothing is made of it
// until it is larger, and when it is it has nothing new to earlier releases.
func TestEmpty(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		for round := range 4 {
			ctx, st := t.Context(), mem.New()
			h, id := attached(t, st, CreateOptions{Empty: true, BlockSize: block}, nil)
			if n := h.im.Sectors(); n != 0 || h.im.super.sb.version() != superVersion {
				t.Fatalf("%d sectors, version %d", n, h.im.super.sb.version())
			}
			for _, op := range []Op{Read, Write, Discard, WriteZeroes} {
				if err, _, _ := h.do(op, 0, 0, 0); err != syscall.EINVAL {
					t.Errorf("operation %d: %v", op, err)
				}
			}
			if _, err := CreateSnapshot(ctx, st, id, "s", SnapshotOptions{}); !errors.Is(err, ErrEmpty) {
				t.Errorf("snapshot: %v", err)
			}
			if _, err := Clone(ctx, st, id, "clone", CloneOptions{}); !errors.Is(err, ErrEmpty) {
				t.Errorf("clone: %v", err)
			}
			switch round {
			case 1:
				h.mustClose()
				mustBeSound(t, st, "disk")
				h.mustAttach(id)
			case 2:
				h.mustDestage()
				h.im.Abandon()
				h.mustAttach(id)
			case 3:
				h.mustReopen(id)
			}
			mustGrow(t, st, id, 16*4096, h)
			h.mustEnd(16)
			h.mustWrite(0, 16)
			h.mustDestage()
			h.im.Abandon()
			h.mustAttach(id)
			h.mustRead(0, 16)
			if err := h.shrinkTo(0); err == nil {
				t.Error("made smaller than a block")
			}
			if sb := h.im.super.sb; sb.Span != 0 || sb.version() != superOld {
				t.Errorf("span %d and version %d", sb.Span, sb.version())
			}
			h.mustClose()
			if _, err := CreateSnapshot(ctx, st, id, "s", SnapshotOptions{}); err != nil {
				t.Error(err)
			}
			mustBeSound(t, st, "disk")
		}
	}
	if _, err := Create(t.Context(), mem.New(), "disk", CreateOptions{}); err == nil {
		t.Error("made without a size, by one who does not mean it")
	}
}

// TestGrowElsewhere: the owner finds that somebody else has made the image larger when it
// renews its lease.
func TestGrowElsewhere(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	mustGrow(t, st, id, 2*smallImage().Size, nil)
	h.run(h.im.renewEvery() + time.Second)
	h.mustEnd(2 * smallImage().Size / 4096)
}

// TestGrowWhileStoring: a checkpoint that has begun before an image grows goes on.
func TestGrowWhileStoring(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: 4096, ObjectSize: MinObjectSize}, nil)
	h.mustWrite(0, 1)
	h.mustDestage()
	mustGrow(t, st, id, 1<<40, nil) // which the checkpoint's first change of the superblock finds
	r := &Request{Op: Write, Sector: (1<<28 - 1) * 8, Sectors: 8, Buf: make([]byte, 4096)}
	fill(r.Buf, 2, r.Sector)
	written, stored := false, false
	r.Done = doneFunc(func(r *Request) { written = r.Err == 0 })
	h.im.cfg.Resized = func(uint64) {
		if h.im.checkpoint.running == nil {
			t.Error("no checkpoint is running")
		}
		h.im.Submit(r)
	}
	h.im.checkpoint.now(func(err error) { stored = err == nil })
	h.run(time.Minute)
	h.mustWrite(0, 3)
	if !stored || !written {
		t.Errorf("the checkpoint has ended: %v, and the write: %v", stored, written)
	}
	h.mustReopen(id)
	h.mustRead(1<<28-1, 2)
	h.mustRead(0, 3)
}

// TestResizeSmaller: what was beyond the new end is gone, also when the image grows again; snapshots
// and clones keep their size and what they had.
func TestResizeSmaller(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	full := smallImage().Size / 4096
	h.mustFill(1000)
	h.mustWrite(full-1, 77)
	snap := mustSnap(t, st, id, "full", h)
	clone := mustClone(t, st, id, "", "clone", h)
	h.mustWrite(40, 4000) // in the log alone
	h.mustShrink(20 * 4096)
	h.mustEnd(20)
	small := mustSnap(t, st, id, "small", h)
	if snap.Size != full*4096 || small.Size != 20*4096 {
		t.Errorf("snapshots have %d and %d bytes", snap.Size, small.Size)
	}
	smaller := mustClone(t, st, id, "small", "smaller", nil)
	h.mustReopen(id)
	h.mustEnd(20)
	mustGrow(t, st, id, 2*full*4096, h)
	for _, n := range []uint64{20, 40, 63, full - 1, full} {
		h.mustRead(n, 0)
	}
	h.mustRead(19, 1019)
	h.mustWrite(21, 2100)
	h.mustReopen(id)
	h.mustRead(20, 0)
	h.mustRead(21, 2100)
	h.mustClose()

	mustShow(t, st, id, snap, 1000)
	r, err := openSnapshot(t, st, id, small.ID)
	if err != nil {
		t.Fatal(err)
	}
	r.mustRead(19, 1019)
	if err, _, _ := r.do(Read, 20, 0, 0); err != syscall.EINVAL {
		t.Errorf("a snapshot is read beyond its end: %v", err)
	}
	c := mustOpen(t, st, clone, 5)
	c.mustHave(1000)
	c.mustRead(full-1, 77)
	c.mustShrink(30 * 4096) // smaller than its parent's state, in the midst of what that has
	mustGrow(t, st, clone, 4*full*4096, c)
	c.mustRead(29, 1029)
	c.mustRead(30, 0)
	c.mustRead(full-1, 0)
	c.mustWrite(4*full-1, 5)
	c.mustClose()
	d := mustOpen(t, st, smaller, 6)
	d.mustEnd(20)
	mustGrow(t, st, smaller, full*4096, d) // larger than the parent's state, which had more before
	d.mustRead(19, 1019)
	d.mustRead(20, 0)
	d.mustRead(full-1, 0)
	d.mustClose()
	mustBeSound(t, st, "disk", "clone", "smaller")

	h.mustRollBack(id, "full")
	h.mustEnd(full)
	h.mustHave(1000)
	h.mustClose()
	h.mustRollBack(id, "small")
	h.mustEnd(20)
	h.mustClose()
	mustBeSound(t, st, "disk", "clone", "smaller")
	for _, name := range []string{"disk", "smaller", "clone"} {
		mustRemove(t, st, name)
	}
	if _, err := GC(ctx, st, GCOptions{}); err != nil {
		t.Fatal(err)
	}
	mustBeEmpty(t, st)
}

// TestShrinkIsCutShort: an image that was being made smaller when its host died has its old
// size, and goes on; and so has one of which another host takes the ownership.
func TestShrinkIsCutShort(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	full := smallImage().Size / 4096
	h.mustFill(1000)
	h.mustDestage()
	var why error
	h.im.Shrink(20*4096, nil, func(err error) { why = err })
	if h.im.Sectors() != 160 {
		t.Errorf("the image has %d sectors while it is being made smaller", h.im.Sectors())
	}
	h.im.Shrink(10*4096, nil, func(err error) {
		if !errors.Is(err, errShrunk) {
			t.Errorf("another one at the same time: %v", err)
		}
	})
	h.im.Abandon()
	if why == nil {
		t.Error("an image that has died has been made smaller")
	}
	h.mustAttach(id)
	h.mustEnd(full)
	h.mustRead(19, 1019)
	why = nil
	h.im.Shrink(20*4096, nil, func(err error) { why = err })
	h.im.Close(func(error) {})
	h.run(time.Minute)
	if why == nil {
		t.Error("an image that was closed meanwhile has been made smaller")
	}
	h.mustAttach(id)
	h.mustEnd(full)
	h.mustShrink(20 * 4096)
	h.mustClose()
	mustBeSound(t, st, "disk")
}

// TestShrinkEndsWithOwnership: an image that has become smaller with the change of the superblock
// that gave it up has become smaller.
func TestShrinkEndsWithOwnership(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.im.super.renew = true
	h.im.updateSuper() // what comes while this runs goes with the next one
	err := errors.New("not ended")
	h.im.Shrink(20*4096, nil, func(e error) { err = e })
	h.im.release(func(error) {})
	h.run(time.Second)
	info, derr := Describe(t.Context(), st, "disk")
	if derr != nil || info.ID != id || info.Owner != nil || info.Size != 20*4096 {
		t.Fatalf("%+v, %v", info, derr)
	}
	if err != nil {
		t.Errorf("it has become smaller, and its owner was told: %v", err)
	}
}

// TestShrinkSalvage: a log that was cut off is salvaged with the size that the image had, also
// if an earlier lsd has cut it off, which did not note that.
func TestShrinkSalvage(t *testing.T) {
	for _, earlier := range []bool{false, true} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustFill(1000)
		h.mustDestage()
		h.mustWrite(63, 6300) // in the log alone
		h.im.Abandon()
		next := newHost(t, "beta", st, 2)
		next.env.now = h.env.now
		if err := next.open(id, true); err != nil {
			t.Fatal(err)
		}
		if earlier {
			if _, _, err := changeSuperblock(t.Context(), st, id, func(sb *superblock) error { sb.Points[0].Sectors = 0; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		next.mustShrink(20 * 4096)
		next.mustClose()
		dst := mem.New()
		saved, err := Salvage(context.Background(), h.disk, st, id, dst, "saved", nil)
		if err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, dst, saved, 3)
		r.mustEnd(smallImage().Size / 4096)
		r.mustRead(62, 1062)
		r.mustRead(63, 6300)
	}
}

// TestWrongSizes: what cannot be is refused, and changes nothing.
func TestWrongSizes(t *testing.T) {
	ctx, st := context.Background(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	for _, size := range []uint64{0, 1, 4095, smallImage().Size + 512, MaxSize + 4096, 1<<64 - 4096} {
		if err := Grow(ctx, st, id, size); err == nil || size < smallImage().Size && !errors.Is(err, ErrShrinks) {
			t.Errorf("grow to %d bytes: %v", size, err)
		}
		if err := h.shrinkTo(size); err == nil {
			t.Errorf("shrink to %d bytes", size)
		}
	}
	if err := h.shrinkTo(smallImage().Size); err == nil {
		t.Error("shrunk to the size that it has")
	}
	if err := Grow(ctx, st, id, smallImage().Size); err != nil {
		t.Errorf("grown to the size that it has: %v", err)
	}
	if err := Grow(ctx, st, uuid.New(), 4096); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("an image that is not there: %v", err)
	}
	h.mustEnd(smallImage().Size / 4096)
	small := mem.New()
	other, err := Create(ctx, small, "disk", CreateOptions{Size: 1 << 30, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	if err := Grow(ctx, small, other, MaxSize); err != nil != (leastObjectSize(MaxSize) > MinObjectSize) {
		t.Errorf("grown to what its objects are too small for: %v", err)
	}
	for _, sb := range []superblock{{Sectors: 8, Span: 8}, {Sectors: 8, Span: 1}, {Sectors: 8, Span: MaxSize/SectorSize + 1}} {
		sb.Image, sb.BlockSize, sb.ObjectSize, sb.Window = id, 4096, MinObjectSize, 1
		if _, err := decodeSuperblock(sb.encode(), id); err == nil {
			t.Errorf("span %d of %d sectors is taken", sb.Span, sb.Sectors)
		}
	}
	for _, sectors := range []uint64{MaxSize/SectorSize + 1, 1<<55 + 8} {
		sb := superblock{Image: id, Sectors: 8, BlockSize: 4096, ObjectSize: MinObjectSize, Window: 1, Points: []cutOff{{Sectors: sectors}}}
		if _, err := decodeSuperblock(sb.encode(), id); err == nil {
			t.Errorf("a log of an image of %d sectors is taken", sectors)
		}
	}
}

// TestShrinkBesideBlockedWrites: a write beyond the new end that waits for room in the log when
// the image is made smaller does not come back when that grows.
func TestShrinkBesideBlockedWrites(t *testing.T) {
	outage := faultstore.NewSwitch()
	st := faultstore.New(mem.New(), faultstore.If(outage.On, faultstore.Fault{Before: backend.ErrTemporary}))
	h, id := attached(t, st, smallImage(), nil)
	full := smallImage().Size / 4096
	outage.Set(true)
	ended := 0
	for n := uint64(0); h.im.blocked.n == 0; n++ {
		r := &Request{Op: Write, Sector: n % 20 * 8, Sectors: 8, Buf: make([]byte, 4096), Done: doneFunc(func(*Request) { ended++ })}
		fill(r.Buf, n+1, r.Sector)
		h.im.Submit(r)
		h.im.EndTurn()
	}
	r := &Request{Op: Write, Sector: (full - 1) * 8, Sectors: 8, Buf: make([]byte, 4096), Done: doneFunc(func(*Request) {})}
	fill(r.Buf, 7, r.Sector)
	h.im.Submit(r)
	err := errors.New("not ended")
	h.im.Shrink(20*4096, nil, func(e error) { err = e })
	h.run(time.Second)
	outage.Set(false)
	h.run(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	mustGrow(t, st, id, full*4096, h)
	h.mustRead(full-1, 0)
	h.mustReopen(id)
	h.mustRead(full-1, 0)
	h.mustClose()
	mustBeSound(t, st, "disk")
}

// TestResizeSectors: an image of blocks of one sector becomes larger and smaller by any number
// of them, at random, and goes on to have what was written and zeroes elsewhere.
func TestResizeSectors(t *testing.T) {
	n := 5
	if testing.Short() {
		n = 2
	}
	for seed := range uint64(n) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { resizeSectors(t, seed) })
	}
}

func resizeSectors(t *testing.T, seed uint64) {
	const most = 3*segmentSectors + 1001
	rng := rand.New(rand.NewPCG(seed, 9))
	st := mem.New()
	sectors := 1 + rng.Uint64N(most)
	h, id := attached(t, st, CreateOptions{Size: sectors * SectorSize, BlockSize: SectorSize, ObjectSize: MinObjectSize}, nil)
	has := map[uint64]uint64{} // by sector
	near := func() uint64 {    // a sector at a border of something, or anywhere
		at := []uint64{sectors, segmentSectors, 2 * segmentSectors, extmap.PageSectors, rng.Uint64N(most)}[rng.IntN(5)]
		return min(max(at+rng.Uint64N(40), 20)-20, most)
	}
	check := func() {
		t.Helper()
		if h.im.Sectors() != sectors {
			t.Fatalf("it has %d sectors, want %d", h.im.Sectors(), sectors)
		}
		for s, want := range has {
			if s >= sectors {
				continue
			}
			r := h.request(Read, s, 1)
			if got, err := stamp(r.Buf, s); r.Err != 0 || err != nil || got != want {
				t.Fatalf("sector %d of %d reads as %d (%v, %v), want %d", s, sectors, got, r.Err, err, want)
			}
		}
	}
	for value := uint64(1); value < 150; value++ {
		switch rng.IntN(9) {
		case 0, 1, 2, 3:
			s := near()
			if s >= sectors {
				continue
			}
			r := h.request(Write, s, uint32(min(1+rng.Uint64N(20), sectors-s)), value)
			if r.Err != 0 {
				t.Fatal(r.Err)
			}
			for k := range uint64(r.Sectors) {
				has[s+k] = value
			}
		case 4, 5, 6:
			to := max(near(), 1)
			if to < sectors {
				h.mustShrink(to * SectorSize)
				for s := range has {
					if s >= to {
						has[s] = 0
					}
				}
			} else {
				mustGrow(t, st, id, to*SectorSize, h)
			}
			sectors = to
		case 7:
			h.mustCheckpoint()
		case 8:
			if rng.IntN(2) == 0 {
				h.mustReopen(id)
			} else {
				h.im.Abandon()
				h.mustAttach(id)
			}
		}
		if rng.IntN(8) == 0 {
			check()
		}
	}
	check()
	mustGrow(t, st, id, most*2*SectorSize, h)
	sectors = most * 2
	check()
	h.mustClose()
	mustBeSound(t, st, "disk")
}

// request makes a request for sectors, which is filled with a number if it is a write.
func (h *host) request(op Op, sector uint64, sectors uint32, n ...uint64) *Request {
	h.t.Helper()
	ended := false
	r := &Request{Op: op, Sector: sector, Sectors: sectors, Buf: make([]byte, sectors*SectorSize), Done: doneFunc(func(*Request) { ended = true })}
	if op == Write {
		fill(r.Buf, n[0], sector)
	}
	h.im.Submit(r)
	h.run(0)
	if !ended {
		h.t.Fatal("a request has not ended")
	}
	return r
}

// TestResizeUnderLoad: an image becomes larger and smaller at random while requests are under
// way, more than the log has room for, the store comes and goes, and hosts die.
func TestResizeUnderLoad(t *testing.T) {
	n := 20
	if testing.Short() {
		n = 2
	}
	ended := 0
	for seed := range uint64(n) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { ended += resizeUnderLoad(t, seed) })
	}
	if ended == 0 {
		t.Error("nothing has become smaller: this tests nothing")
	}
}

// apart is how far the blocks of a load are apart, in blocks: a quarter of a segment of the map.
const apart = segmentSectors / 8 / 4

// load is an image of which it is known what its blocks may read as.
type load struct {
	*host
	id     uuid.UUID
	rng    *rand.Rand
	away   *faultstore.Switch
	blocks [64]writes
	value  uint64
	shrunk int // times
}

// writes are what has been written to a block, in order: it reads as the last one that was
// acknowledged, or a later one.
type writes struct {
	values []uint64
	acked  int // of them
	crash  int // counts what makes acknowledgements mean nothing
}

func resizeUnderLoad(t *testing.T, seed uint64) int {
	away := faultstore.NewSwitch()
	st := faultstore.New(mem.New(), faultstore.If(away.On, faultstore.Fault{Before: backend.ErrTemporary}))
	h, id := attached(t, st, CreateOptions{Size: 64 * apart * 4096, ObjectSize: MinObjectSize}, nil)
	l := &load{host: h, id: id, rng: rand.New(rand.NewPCG(seed, 11)), away: away}
	for b := range l.blocks {
		l.blocks[b].values = []uint64{0}
	}
	for range 60 {
		switch l.rng.IntN(10) {
		case 0, 1:
			away.Set(l.rng.IntN(2) == 0)
		case 2, 3:
			l.run(time.Duration(l.rng.IntN(3)) * time.Second)
		case 4, 5:
			l.shrinkNow()
		case 6:
			if !away.On(faultstore.Op{}) {
				l.grow(uint64(l.rng.IntN(64))*apart*4096, nil)
			}
		case 7:
			if l.rng.IntN(3) == 0 {
				l.crash()
			}
		default:
			for range l.rng.IntN(1 + 3000*l.rng.IntN(2)) {
				l.write()
			}
		}
		for range l.rng.IntN(50) {
			l.im.EndTurn()
			_ = l.disk.Step() || l.env.runJob() || l.env.tellDone()
		}
	}
	away.Set(false)
	l.run(time.Minute)
	if l.im.shrink != nil || l.im.blocked.n > 0 {
		t.Fatal("something is still under way")
	}
	l.grow(64*apart*4096, h)
	l.look()
	l.mustReopen(id)
	l.look()
	l.mustClose()
	mustBeSound(t, st, "disk")
	return l.shrunk
}

// write writes a block, and does not wait.
func (l *load) write() {
	b := l.rng.IntN(64)
	l.value++
	w, value := &l.blocks[b], l.value
	r := &Request{Op: Write, Sector: uint64(b) * apart * 8, Sectors: 8, Buf: make([]byte, 4096)}
	fill(r.Buf, value, r.Sector)
	at, crash := len(w.values), w.crash
	if uint64(b) < l.im.Sectors()/8/apart {
		w.values = append(w.values, value)
	}
	r.Done = doneFunc(func(r *Request) {
		switch {
		case r.Err == 0 && w.crash == crash:
			w.acked = max(w.acked, at)
		case r.Err == syscall.EINVAL && at < len(w.values) && w.values[at] == value:
			l.t.Errorf("block %d is beyond the end", b)
		}
	})
	l.im.Submit(r)
	l.im.EndTurn()
}

// shrinkNow begins to make the image smaller, unless that is under way.
func (l *load) shrinkNow() {
	to := uint64(1 + l.rng.IntN(60))
	if l.im.shrink != nil || to >= l.im.Sectors()/8/apart {
		return
	}
	crash := l.blocks[0].crash
	for b := to; b < 64; b++ {
		l.blocks[b].values = append(l.blocks[b].values, 0)
	}
	l.im.Shrink(to*apart*4096, nil, func(err error) {
		if err != nil || l.blocks[0].crash != crash {
			return // any part of it may be there
		}
		l.shrunk++
		for b := to; b < 64; b++ {
			w := &l.blocks[b]
			for w.acked = len(w.values) - 1; w.values[w.acked] != 0; w.acked-- {
			}
		}
	})
}

// grow makes the image larger by so many bytes.
func (l *load) grow(n uint64, h *host) {
	l.t.Helper()
	info, err := Describe(l.t.Context(), l.st, "disk")
	if err != nil {
		l.t.Fatal(err)
	}
	mustGrow(l.t, l.st, l.id, info.Size+n, h)
}

// crash ends the process, and begins another one, which reads what is there.
func (l *load) crash() {
	for b := range l.blocks {
		l.blocks[b].crash++
	}
	l.disk.Kill()
	l.away.Set(false)
	l.again()
	if err := l.open(l.id, false); err != nil {
		l.t.Fatal(err)
	}
	l.look()
}

// look reads all there is.
func (l *load) look() {
	l.t.Helper()
	for b := range l.blocks {
		w := &l.blocks[b]
		if uint64(b) >= l.im.Sectors()/8/apart {
			continue
		}
		err, ended, v := l.do(Read, uint64(b)*apart, 0, time.Minute)
		if err != 0 || !ended || !slices.Contains(w.values[w.acked:], v) {
			l.t.Fatalf("block %d reads as %d (%v, ended %v), want one of %v", b, v, err, ended, w.values[w.acked:])
		}
		w.values, w.acked, w.crash = []uint64{v}, 0, w.crash+1
	}
}
