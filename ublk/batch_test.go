package ublk

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// newBatchDevice returns a device with one queue, whose driver is a plain file: what is
// submitted is refused, and the test says what the driver has answered.
func newBatchDevice(t *testing.T, depth int, h Handler) (*Device, *batchQueue) {
	t.Helper()
	runtime.LockOSThread() // the ring's
	ring, err := uring.New(uring.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ring.Close() })
	f, err := os.Create(filepath.Join(t.TempDir(), "char"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	c := &Control{features: FeatureBatchIO}
	d, err := c.newDevice(Info{Queues: 1, Depth: depth, MaxIOBytes: 4096, Flags: FeatureBatchIO}, Params{SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.mem.Close(); d.batchMem.Close() })
	for i := range d.tags {
		d.tags[i].desc = make([]byte, sizeofIODesc)
		d.tags[i].desc[0] = byte(OpFlush)
	}
	d.char, d.ring, d.handler = int(f.Fd()), ring, h
	q := d.carriers[0].(*batchQueue)
	if err := q.offer(); err != nil {
		t.Fatal(err)
	}
	d.out++
	return d, q
}

// prepared answers the first command: the tags have been taken.
func (q *batchQueue) prepared(t *testing.T) {
	t.Helper()
	b := q.used()[0]
	if b.op != ioPrepIOCmds || b.n != len(q.tags) {
		t.Fatalf("the first command is %#x for %d tags", uint32(b.op), b.n)
	}
	b.Complete(0, 0)
}

// used returns the batches that are not free.
func (q *batchQueue) used() (list []*batch) {
	free := make(map[*batch]bool)
	for b := q.free; b != nil; b = b.next {
		free[b] = true
	}
	for i := range q.batches {
		if b := &q.batches[i]; !free[b] {
			list = append(list, b)
		}
	}
	return list
}

// request lets the driver give tags requests.
func (q *batchQueue) request(tags ...uint16) {
	var buf []byte
	for _, n := range tags {
		buf = binary.NativeEndian.AppendUint16(buf, n)
	}
	q.arrived(buf, len(buf))
}

// numbers returns the tags of a batch.
func (b *batch) numbers() (tags []uint16) {
	for i := range b.n {
		tags = append(tags, b.tag(i).io.Tag)
	}
	return tags
}

// results is a handler that keeps requests until it is told to complete them.
type results struct {
	here []*IO
	late []uint16
}

func (r *results) Handle(io *IO) { r.here = append(r.here, io) }
func (r *results) Late(io *IO)   { r.late = append(r.late, io.Tag); r.Handle(io) }

// complete ends all requests, with results that say which they are.
func (r *results) complete(inTime bool) {
	here := r.here
	r.here = nil
	for _, io := range here {
		if inTime {
			io.CompleteInTime(int32(io.Tag))
		} else {
			io.Complete(int32(io.Tag))
		}
	}
}

// TestBatchJoin: the results of a turn go in one command, those of the next one in
// another.
func TestBatchJoin(t *testing.T) {
	var h results
	d, q := newBatchDevice(t, 8, &h)
	q.prepared(t)
	if !q.idle() {
		t.Error("a queue without requests is not idle")
	}
	q.request(3, 0, 7)
	if q.idle() || len(h.here) != 3 {
		t.Fatalf("%d requests have come", len(h.here))
	}
	h.complete(false)
	if q.idle() {
		t.Error("idle, with results that the driver has not seen")
	}
	used := q.used()
	if len(used) != 1 || !slices.Equal(used[0].numbers(), []uint16{3, 0, 7}) {
		t.Fatalf("batches: %v", used)
	}
	for i, tag := range []uint32{3, 0, 7} {
		e := used[0].elems[i*sizeofElement:]
		if res, addr := binary.NativeEndian.Uint32(e[4:]), binary.NativeEndian.Uint64(e[8:]); res != tag || addr != d.tags[tag].addr {
			t.Errorf("element of tag %d: result %d, address %#x", tag, res, addr)
		}
	}
	if err := d.ring.Submit(); err != nil {
		t.Fatal(err)
	}
	q.request(1)
	h.complete(false)
	if used = q.used(); len(used) != 2 {
		t.Fatalf("%d batches after a submission, want 2", len(used))
	}
	first := used[slices.IndexFunc(used, func(b *batch) bool { return b.n == 3 })]
	first.Complete(3*sizeofElement, 0)
	q.used()[0].Complete(sizeofElement, 0)
	if !q.idle() || len(q.used()) != 0 || d.tagErr != nil {
		t.Errorf("held %d, %d batches, %v", q.held, len(q.used()), d.tagErr)
	}
}

// TestBatchShort: a result that the driver refuses takes no other along.
func TestBatchShort(t *testing.T) {
	var h results
	d, q := newBatchDevice(t, 8, &h)
	q.prepared(t)
	q.request(0, 1, 2, 3, 4)
	h.complete(false)
	b := q.used()[0]
	b.Complete(2*sizeofElement, 0)
	if !slices.Equal(b.numbers(), []uint16{2, 3, 4}) || d.tagErr != nil {
		t.Fatalf("after two of five: %v left, %v", b.numbers(), d.tagErr)
	}
	b.Complete(-int32(unix.EBUSY), 0)
	if !slices.Equal(b.numbers(), []uint16{3, 4}) || !errors.Is(d.tagErr, unix.EBUSY) || !strings.Contains(d.tagErr.Error(), "0.2") {
		t.Fatalf("after the third was refused: %v left, %v", b.numbers(), d.tagErr)
	}
	b.Complete(2*sizeofElement, 0)
	if !q.idle() || len(q.used()) != 0 {
		t.Errorf("held %d, %d batches", q.held, len(q.used()))
	}
	// More than there were, or none: the driver would have to be broken.
	for _, res := range []int32{9 * sizeofElement, 0} {
		q.request(5)
		h.complete(false)
		q.used()[0].Complete(res, 0)
		if !q.idle() || len(q.used()) != 0 {
			t.Errorf("answer %d: held %d, %d batches", res, q.held, len(q.used()))
		}
	}
}

// TestBatchLate: what comes too late is the handler's again, all of it.
func TestBatchLate(t *testing.T) {
	var h results
	_, q := newBatchDevice(t, 8, &h)
	q.prepared(t)
	q.request(0, 1, 2)
	h.complete(true)
	q.request(3)
	h.complete(false)
	used := q.used()
	if len(used) != 2 {
		t.Fatalf("%d batches, want one in time and another", len(used))
	}
	late := used[slices.IndexFunc(used, func(b *batch) bool { return b.inTime })]
	late.Complete(-int32(unix.ENOENT), 0)
	if !slices.Equal(h.late, []uint16{0, 1, 2}) || q.held != 4 {
		t.Fatalf("late: %v, held %d", h.late, q.held)
	}
	h.complete(true)
	for _, b := range q.used() {
		b.Complete(int32(b.n)*sizeofElement, 0)
	}
	if !q.idle() {
		t.Errorf("held %d", q.held)
	}
}

// TestBatchNoneFree has more batches in flight than there are: results wait and get there.
func TestBatchNoneFree(t *testing.T) {
	var h results
	d, q := newBatchDevice(t, 4*maxBatches, &h)
	q.prepared(t)
	for i := range 2 * maxBatches {
		q.request(uint16(2*i), uint16(2*i+1))
		h.complete(false)
		if err := d.ring.Submit(); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(q.used()); n != maxBatches || q.first == nil {
		t.Fatalf("%d batches in flight, %v waits", n, q.first)
	}
	var got []uint16
	for len(q.used()) != 0 {
		b := q.used()[0]
		got = append(got, b.numbers()...)
		if err := d.ring.Submit(); err != nil {
			t.Fatal(err)
		}
		b.Complete(int32(b.n)*sizeofElement, 0)
	}
	slices.Sort(got)
	if want := len(q.tags); len(slices.Compact(got)) != want || len(got) != want || !q.idle() || q.last != nil {
		t.Errorf("%d results of %d, held %d", len(got), want, q.held)
	}
}

// TestBatchArrivals feeds tags that the driver would not tell.
func TestBatchArrivals(t *testing.T) {
	var h results
	d, q := newBatchDevice(t, 8, &h)
	q.prepared(t)
	for name, give := range map[string]func(){
		"no such tag":         func() { q.request(8) },
		"twice the same":      func() { q.request(1, 1) },
		"half a tag":          func() { q.arrived(make([]byte, 4), 3) },
		"more than there are": func() { q.arrived(make([]byte, 4), 6) },
		"no buffer":           func() { q.Complete(2, 1<<1) },
	} {
		d.tagErr, d.failed, h.here = nil, make(chan struct{}), nil
		give()
		if d.tagErr == nil {
			t.Errorf("%s: no error", name)
		}
		h.complete(false)
	}
}

// TestBatchEnd: a queue ends when the driver has ended the fetch and knows all results.
func TestBatchEnd(t *testing.T) {
	var h results
	d, q := newBatchDevice(t, 8, &h)
	q.prepared(t)
	q.request(2)
	q.Complete(-int32(unix.ENOBUFS), 0) // only sends another fetch
	q.Complete(resAbort, 0)
	h.complete(false)
	select {
	case <-d.drained:
		t.Fatal("ended with a result on its way")
	default:
	}
	q.used()[0].Complete(sizeofElement, 0)
	select {
	case <-d.drained:
	default:
		t.Fatal("not ended")
	}
	if d.tagErr != nil {
		t.Error(d.tagErr)
	}
}

// TestBatchRefused: tags that the driver does not take end the queue.
func TestBatchRefused(t *testing.T) {
	d, q := newBatchDevice(t, 8, Null{})
	q.used()[0].Complete(-int32(unix.EINVAL), 0)
	select {
	case <-d.drained:
	default:
		t.Fatal("not ended")
	}
	if !errors.Is(d.tagErr, unix.EINVAL) {
		t.Error(d.tagErr)
	}
}

// TestBatchAllocs: the way of a result allocates nothing.
func TestBatchAllocs(t *testing.T) {
	d, q := newBatchDevice(t, 8, Null{})
	q.prepared(t)
	if err := d.ring.Submit(); err != nil {
		t.Fatal(err)
	}
	buf := binary.NativeEndian.AppendUint16(nil, 1)
	buf = binary.NativeEndian.AppendUint16(buf, 2)
	n := testing.AllocsPerRun(100, func() {
		q.arrived(buf, len(buf))
		if err := d.ring.Submit(); err != nil {
			t.Fatal(err)
		}
		for i := range q.batches {
			if b := &q.batches[i]; q.open[0] == b {
				b.Complete(int32(b.n)*sizeofElement, 0)
			}
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
