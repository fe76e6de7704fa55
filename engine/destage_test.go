package engine

import (
	"context"
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
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// openLargeLog returns a host that has the image open, with a log of 32 segments, which pool lends memory.
func openLargeLog(t *testing.T, st backend.Store, id uuid.UUID, pool *lender) *host {
	t.Helper()
	return openLog(t, st, id, pool, 32)
}

// openLog opens an image with a log of so many segments.
func openLog(t *testing.T, st backend.Store, id uuid.UUID, pool *lender, segments int64) *host {
	t.Helper()
	h := newHost(t, "alpha", st, 1)
	h.pool = pool
	h.disk = simdisk.New(writelog.DataOffset+segments*writelog.SegmentSize, rand.New(rand.NewPCG(1, 1)))
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestBatchBeyondMemory: a batch that the log's memory does not hold is read from the SSD,
// and not before the last of its records is there; all of it gets into the store, also what
// lies across the end of what is read at one time.
func TestBatchBeyondMemory(t *testing.T) {
	const memory = 2 * writelog.SegmentSize // as open has it
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 64 << 20, ObjectSize: MaxObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	h := openLargeLog(t, st, id, &lender{})
	write := func(at uint64) {
		r := &Request{Op: Write, Sector: at * 128, Sectors: 128, Buf: make([]byte, 64<<10), Done: doneFunc(func(*Request) {})}
		for i := range uint64(16) {
			fill(r.Buf[i*4096:][:4096], 1+at, at*128+i*8)
		}
		h.im.Submit(r)
	}
	for n := range uint64(memory / (64 << 10)) {
		write(n)
		h.run(0)
	}
	write(0)
	h.im.Destage(func(error) {})
	if b := h.im.queue[0]; b.end-b.start <= memory || h.im.log.Completed() >= b.lastSeq {
		t.Fatal("this tests nothing")
	}
	for h.env.runJob() || h.env.tellDone() { // workers are faster than the SSD
	}
	h.run(time.Minute)
	if s := h.im.Stats(); s.StoreErrors > 0 || h.im.accepted != h.im.sealed {
		t.Errorf("accepted %v, sealed %v: %+v", h.im.accepted, h.im.sealed, s)
	}
	h.mustReopen(id)
	for block := range uint64(memory / 4096) {
		h.mustRead(block, 1+block/16)
	}
}

// TestSmallWritesFill: blocks of 4 KiB that lie apart fill an object of any size.
func TestSmallWritesFill(t *testing.T) {
	for _, size := range []uint32{MinObjectSize, DefaultObjectSize, MaxObjectSize} {
		st := mem.New()
		id, err := Create(t.Context(), st, "disk", CreateOptions{Size: 1 << 30, ObjectSize: size})
		if err != nil {
			t.Fatal(err)
		}
		h := openLog(t, st, id, &lender{}, 64)
		buf := make([]byte, 4096)
		for n := range uint64(size/4096) + 1 {
			h.im.Submit(&Request{Op: Write, Sector: n * 16, Sectors: 8, Buf: buf, Done: doneFunc(func(*Request) {})})
			if n%32 == 0 {
				h.run(0)
			}
		}
		h.mustDestage()
		if got := h.im.Stats().Objects; got != 2 {
			t.Errorf("objects of %d bytes: %d of them hold what fills one, and a block", size, got)
		}
		h.mustClose()
	}
}

// lender is a writelog.Pool of so many segments.
type lender struct {
	most, lent int
	free       [][]byte
}

func (p *lender) Lend() []byte {
	if p.lent == p.most {
		return nil
	}
	p.lent++
	if len(p.free) == 0 {
		return make([]byte, writelog.SegmentSize)
	}
	b := p.free[0]
	p.free = p.free[1:]
	return b
}

func (p *lender) Return(b []byte) {
	clear(b) // whoever reads on in it finds nothing
	p.lent--
	p.free = append(p.free, b)
}

// TestLentMemory: while the store is away the log is lent memory for what its own does not hold, and
// none of that is read back from the SSD when the store is there again; what is not lent is.
func TestLentMemory(t *testing.T) {
	const blocks = 7 * writelog.SegmentSize / 8192 // of 4 KiB, each a record of 8 KiB
	for _, tt := range []struct {
		segments int // to be lent
		read     bool
	}{{0, true}, {2, true}, {5, false}, {9, false}} {
		st, away := mem.New(), true
		id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize})
		if err != nil {
			t.Fatal(err)
		}
		put := func(op faultstore.Op) bool { return away && op.Method == faultstore.Put }
		pool := &lender{most: tt.segments}
		h := openLargeLog(t, faultstore.New(st, faultstore.If(put, faultstore.Fault{Before: backend.ErrTemporary})), id, pool)
		reads := 0
		h.disk.Fail = func(op simdisk.Op) bool {
			if op.Kind == simdisk.Read {
				reads++
			}
			return false
		}
		for n := range uint64(blocks) {
			h.mustWrite(n, 1+n)
		}
		if want := min(tt.segments, 5); pool.lent != want {
			t.Errorf("%d segments to be lent: %d are, want %d", tt.segments, pool.lent, want)
		}
		away = false
		h.run(time.Minute)
		h.mustDestage()
		if (reads > 0) != tt.read || pool.lent > 2 {
			t.Errorf("%d segments to be lent: %d reads of the SSD, %d are lent still", tt.segments, reads, pool.lent)
		}
		for n := uint64(0); n < blocks; n += 17 {
			h.mustRead(n, 1+n)
		}
		h.run(time.Minute)
		if !h.im.Rest() || pool.lent > 0 {
			t.Errorf("%d segments to be lent: %d are, to an image at rest", tt.segments, pool.lent)
		}
		h.mustClose()
		mustBeClean(t, st)
	}
}

// TestFailedLogIsDestaged: the SSD fails. What was acknowledged is in memory, goes into
// the store, and the image can be let go of.
func TestFailedLogIsDestaged(t *testing.T) {
	for _, kind := range []simdisk.Kind{simdisk.Write, simdisk.Sync} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			st := mem.New()
			id := newImageIn(t, st)
			a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustWrite(1, 1)
			a.disk.Fail = func(op simdisk.Op) bool { return op.Kind == kind }
			var ended []syscall.Errno
			submit := func(op Op, block uint64) {
				r := &Request{Op: op, Sector: block * 8, Sectors: 8, Buf: make([]byte, 4096)}
				if op == Flush {
					r.Sectors, r.Buf = 0, nil
				}
				r.Done = doneFunc(func(r *Request) { ended = append(ended, r.Err) })
				a.im.Submit(r)
			}
			submit(Write, 2)
			a.im.EndTurn()
			submit(Flush, 0)
			submit(Write, 3) // into a record that is open when the log fails
			for a.disk.Step() {
			}
			a.run(0)
			if a.im.log.Err() == nil || len(ended) != 3 || !slices.Contains(ended, syscall.EIO) {
				t.Fatalf("log: %v, ended %v: this tests nothing", a.im.log.Err(), ended)
			}
			a.mustRead(1, 1)
			a.mustClose()
			if err := b.open(id, false); err != nil {
				t.Fatal(err)
			}
			b.mustRead(1, 1)
			b.mustClose()
			mustBeClean(t, st)
		})
	}
}

// TestUnderWay: of the batches that wait, a few are built at one time, more are put, and no more
// are built than can be put soon; those numbers are reached, also with a store that is away, and
// all get into the store when it is back.
func TestUnderWay(t *testing.T) {
	inner, down := mem.New(), true
	st := faultstore.New(inner, faultstore.If(func(op faultstore.Op) bool { return down && op.Method == faultstore.Put }, faultstore.Fault{Before: backend.ErrTemporary}))
	id, err := Create(context.Background(), inner, "disk", CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	h := openLargeLog(t, st, id, &lender{})
	for block := range uint64(5 * maxUnderWay << 8) {
		r := &Request{Op: Write, Sector: block % 4096 * blockSectors, Sectors: blockSectors, Buf: make([]byte, 4096), Done: doneFunc(func(*Request) {})}
		fill(r.Buf, 1+block, block%4096*blockSectors)
		h.im.Submit(r)
		if block%64 == 63 {
			h.im.EndTurn()
			for h.disk.Step() {
			}
		}
	}
	h.im.Destage(func(error) {})
	var most [batchDurable + 1]int
	all := 0
	look := func() {
		n := inState(h.im.queue)
		for state := range n {
			most[state] = max(most[state], n[state])
		}
		all = max(all, n[batchBuilding]+n[batchBuilt]+n[batchPutting])
		if held := h.im.memory / int64(h.im.bufferSize()); held > maxUnderWay {
			t.Fatalf("%d objects' memory", held)
		}
	}
	h.env.delay = func() time.Duration { return time.Second } // longer than the first pauses between attempts
	for range 300 {                                           // the store is away
		look()
		if !h.env.step() {
			h.run(time.Second / 10)
		}
	}
	if len(h.im.queue) < 2*maxUnderWay || all != maxUnderWay || h.im.stats.objects > 0 {
		t.Errorf("%d of %d under way, %d in the store: this tests nothing", all, len(h.im.queue), h.im.stats.objects)
	}
	down, h.env.delay = false, nil
	for end := h.env.now + time.Minute; h.env.now < end && len(h.im.queue) > 0; look() {
		if !h.env.step() {
			h.run(time.Second / 10)
		}
	}
	if most[batchBuilding] != maxBuilds || most[batchPutting] != maxPuts || all != maxUnderWay {
		t.Errorf("%d built at one time, %d put, %d in all", most[batchBuilding], most[batchPutting], all)
	}
	if len(h.im.queue) > 0 || h.im.accepted != h.im.sealed {
		t.Errorf("%d batches are not in the store: accepted %v, sealed %v", len(h.im.queue), h.im.accepted, h.im.sealed)
	}
	h.mustReopen(id)
	for block := range uint64(5*maxUnderWay<<8 - 3*4096) {
		h.mustRead(block, 1+block+3*4096)
	}
}
