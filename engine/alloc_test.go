package engine

import (
	"context"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// instantDevice ends each operation when complete is called. It moves no data:
// reads leave the buffer as it is.
type instantDevice struct {
	c   []aio.Completer
	res []int32
}

func (d *instantDevice) add(c aio.Completer, n int) {
	d.c, d.res = append(d.c, c), append(d.res, int32(n))
}
func (d *instantDevice) ReadAt(p []byte, _ int64, c aio.Completer)  { d.add(c, len(p)) }
func (d *instantDevice) WriteAt(p []byte, _ int64, c aio.Completer) { d.add(c, len(p)) }
func (d *instantDevice) Sync(c aio.Completer)                       { d.add(c, 0) }
func (d *instantDevice) complete() {
	for i := range d.c {
		d.c[i].Complete(d.res[i], 0)
	}
	d.c, d.res = d.c[:0], d.res[:0]
}

// stillEnv has a clock that stands and runs nothing.
type stillEnv struct{}

type stillTimer struct{}

func (stillTimer) Stop() bool                          { return false }
func (stillTimer) Reset(time.Duration)                 {}
func (stillEnv) LeaseUntil(time.Duration)              {}
func (stillEnv) Now() time.Duration                    { return time.Second }
func (stillEnv) Post(func())                           {}
func (stillEnv) Spawn(_, _ func())                     {}
func (stillEnv) AfterFunc(time.Duration, func()) Timer { return stillTimer{} }

type countDone int

func (c *countDone) RequestDone(*Request) { *c++ }

// newStill returns an image whose log takes writes at once and whose store is
// never reached.
func newStill(tb testing.TB) (*Image, *instantDevice) {
	st := mem.New()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 64 << 20, ObjectSize: MaxObjectSize})
	if err != nil {
		tb.Fatal(err)
	}
	im, err := Open(context.Background(), st, id, OpenOptions{Log: simdisk.New(writelog.MinSize, nil), Config: Config{Logger: quiet}})
	if err != nil {
		tb.Fatal(err)
	}
	d := &instantDevice{}
	im.Start(stillEnv{}, d, make([]byte, 4*writelog.SegmentSize))
	im.super.until = time.Hour
	return im, d
}

// recycle makes the log empty again, as destaging would, without a store.
func (im *Image) recycle() {
	if im.log.Used() < im.log.Size()/4 {
		return
	}
	if im.open != nil {
		im.sealAt(im.log.Seq(), im.log.Head())
	}
	for _, b := range im.queue {
		if b.state == batchBuilding {
			im.log.Unpin(b.start)
		}
		for _, e := range b.extents {
			im.dirty.RemoveRange(e.Sector, uint64(e.N), b.start/SectorSize, b.end/SectorSize)
		}
		im.log.Trim(b.end)
		im.spare = append(im.spare, b)
	}
	im.queue = im.queue[:0]
}

func TestRequestsDoNotAllocate(t *testing.T) {
	im, d := newStill(t)
	var done countDone
	buf := make([]byte, 4096)
	n := uint64(0)
	turn := func(op Op) func() {
		r := &Request{Op: op, Sectors: 8, Buf: buf, Done: &done}
		return func() {
			n += 7919
			r.Sector = n % 8192 * 8
			im.Submit(r)
			im.EndTurn()
			d.complete()
			im.EndTurn()
			if op == Write {
				im.recycle()
			}
		}
	}
	write := turn(Write)
	for range 40000 { // until maps and queues have their size
		write()
	}
	if a := testing.AllocsPerRun(20000, write); a != 0 {
		t.Errorf("%v allocations for each 4 KiB write", a)
	}
	im.log.Commit()
	d.complete()
	im.EndTurn()
	if a := testing.AllocsPerRun(8192, turn(Read)); a != 0 {
		t.Errorf("%v allocations for each 4 KiB read", a)
	}
	if want := countDone(n / 7919); done != want {
		t.Errorf("%d of %d requests ended", done, want)
	}
}

func BenchmarkWrite4K(b *testing.B) {
	im, d := newStill(b)
	var done countDone
	var requests [32]Request // that many are in flight
	for i := range requests {
		requests[i] = Request{Op: Write, Sectors: 8, Buf: make([]byte, 4096), Done: &done}
	}
	b.SetBytes(4096)
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		if i >= 32 && int(done) < i-32 {
			b.Fatal("requests do not end")
		}
		r := &requests[i%32]
		r.Sector = uint64(i) * 7919 % 16384 * 8
		im.Submit(r)
		if i%32 == 31 {
			im.EndTurn()
			d.complete()
			im.EndTurn()
			im.recycle()
		}
	}
}

func BenchmarkRead4KFromMemory(b *testing.B) {
	im, d := newStill(b)
	var done countDone
	r := &Request{Op: Write, Sectors: 8, Buf: make([]byte, 4096), Done: &done}
	for i := range uint64(1024) {
		r.Sector = i * 8
		im.Submit(r)
		im.EndTurn()
		d.complete()
		im.EndTurn()
	}
	r.Op = Read
	b.SetBytes(4096)
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		r.Sector = uint64(i) % 1024 * 8
		im.Submit(r)
	}
}
