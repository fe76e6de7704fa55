package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

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
	h := newHost(t, "alpha", st, 1)
	h.disk = simdisk.New(writelog.DataOffset+32*writelog.SegmentSize, rand.New(rand.NewPCG(1, 1)))
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
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
