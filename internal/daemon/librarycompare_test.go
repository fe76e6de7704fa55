package daemon

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// putCompare submits a compare and write whose data is from the data area's beginning on.
func (c *libraryClient) putCompare(flags uint8, off uint64, old, data []byte) {
	sectors := (off%512 + uint64(len(old)) + 511) / 512 * 512
	copy(c.Data[off%512:], data)
	copy(c.Data[(sectors+4095)/4096*4096+off%512:], old)
	c.Submit(ringtest.Request{Op: ringtest.CompareAndWrite, Flags: flags, Offset: off, Length: uint64(len(old)), Data: off % 512})
}

// compare makes a compare and write.
func (c *libraryClient) compare(flags uint8, off uint64, old, data []byte) (syscall.Errno, uint64) {
	c.t.Helper()
	c.putCompare(flags, off, old, data)
	done := c.await()
	return syscall.Errno(-done.Res), done.At
}

// TestLibraryCompareAndWrite: ranges of all kinds are written if they are as they are to be, and
// else the first byte that is not is told, and nothing is written.
func TestLibraryCompareAndWrite(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	rng := rand.New(rand.NewPCG(1, 2))
	image := make([]byte, 3<<20)
	for i := range 300 {
		n := 1 + rng.IntN([]int{1, 512, 8192, 20000, 255*4096 - 511}[i%5])
		off := rng.IntN(len(image) - n)
		old, data := bytes.Clone(image[off:off+n]), make([]byte, n)
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		at := -1
		if i%3 == 0 {
			for range 1 + rng.IntN(3) {
				bad := rng.IntN(n)
				old[bad] = image[off+bad] + 1
				if at < 0 || bad < at {
					at = bad
				}
			}
		}
		err, told := c.compare(uint8(i%2), uint64(off), old, data)
		switch {
		case at < 0 && (err != 0 || told != 0), at >= 0 && (err != unix.EILSEQ || told != uint64(at)):
			t.Fatalf("%d bytes at %d: %v at %d, want a mismatch at %d", n, off, err, told, at)
		case at < 0:
			copy(image[off:], data)
		}
	}
	got := make([]byte, 1<<20)
	for off := 0; off < len(image); off += len(got) {
		if err := c.do(ringtest.Read, uint64(off), got); err != 0 || !bytes.Equal(got, image[off:off+len(got)]) {
			t.Fatalf("what is from %d on is not what was written: %v", off, err)
		}
	}
	if err, _ := c.compare(0, 64<<20, make([]byte, 512), make([]byte, 512)); err != unix.EINVAL {
		t.Errorf("beyond the end: %v", err)
	}
	if err, _ := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly}).compare(0, 0, make([]byte, 512), make([]byte, 512)); err != unix.EROFS {
		t.Errorf("through a handle that only reads: %v", err)
	}
}

// increment adds 1 to the number at off, once it has been faster than all others.
func (c *libraryClient) increment(off uint64) {
	var old, next [8]byte
	for {
		if err := c.do(ringtest.Read, off, old[:]); err != 0 {
			c.t.Errorf("read: %v", err)
			return
		}
		binary.LittleEndian.PutUint64(next[:], binary.LittleEndian.Uint64(old[:])+1)
		switch err, _ := c.compare(0, off, old[:], next[:]); err {
		case 0:
			return
		case unix.EILSEQ:
		default:
			c.t.Errorf("compare and write: %v", err)
			return
		}
	}
}

// TestLibraryCompareTogether: clients count together, in two sectors, and others write beside the
// number, while reactors die. Each success has counted once.
func TestLibraryCompareTogether(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	const off, each = 508, 100
	var all, beside sync.WaitGroup
	for range 4 {
		c := h.handle(wire.OpenRequest{})
		all.Go(func() {
			for range each {
				c.increment(off)
			}
		})
	}
	over := make(chan struct{})
	b := h.handle(wire.OpenRequest{})
	beside.Go(func() {
		for i := byte(0); len(over) == 0; i++ {
			select {
			case <-over:
				return
			default:
				b.write(400, 108, i)
				b.write(516, 1000, i)
			}
		}
	})
	for range 5 {
		time.Sleep(10 * time.Millisecond)
		if dk := h.door().getDisk(); dk != nil {
			dk.reactor.Post(func() { panic("test") })
		}
	}
	all.Wait()
	close(over)
	beside.Wait()
	var got [8]byte
	if err := b.do(ringtest.Read, off, got[:]); err != 0 {
		t.Fatal(err)
	}
	if n := binary.LittleEndian.Uint64(got[:]); n != 4*each {
		t.Errorf("counted to %d, want %d", n, 4*each)
	}
}

// TestLibraryCompareFirst: a reactor dies between the decision of a compare and write and its end,
// with another one's that waits for it. It has its effect before that is done, whoever's turn it is.
func TestLibraryCompareFirst(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	const off = 508
	number := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	first, second := h.handle(wire.OpenRequest{}), h.handle(wire.OpenRequest{})
	between := 0
	for v := uint64(1); v < 14; v += 2 { // each death has the next reactor come later
		if err := first.do(ringtest.Write, off, number(v)); err != 0 { // in the log's memory: it is read at once
			t.Fatal(err)
		}
		r, ready, submitted := h.door().getDisk().reactor, make(chan struct{}), make(chan struct{})
		r.Post(func() { // the turn that this is in takes what the first one submits
			<-ready
			r.Post(func() { // and the next one what the second one does
				second.putCompare(0, off, number(v+1), number(v+2))
				if first.Decided(0) && atomic.LoadUint32(first.Word(ringtest.CQTail)) == atomic.LoadUint32(first.Word(ringtest.CQHead)) {
					between++
				}
				close(submitted)
				r.Post(func() { panic("test") })
			})
		})
		first.putCompare(0, off, number(v), number(v+1))
		close(ready)
		<-submitted
		for i, c := range []*libraryClient{first, second} {
			if done := c.await(); done.Res != 0 {
				t.Fatalf("%d: %d: %v", v, i, syscall.Errno(-done.Res))
			}
		}
	}
	if between == 0 {
		t.Error("none died between decision and end: this tests nothing")
	}
}

// TestLibraryCompareAgain: what had been decided when a daemon died is done if it was not, and
// goes well if it was; what had not is judged as if for the first time.
func TestLibraryCompareAgain(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	c := h.handle(wire.OpenRequest{})
	old, data, other := bytes.Repeat([]byte{1}, 20000), bytes.Repeat([]byte{2}, 20000), bytes.Repeat([]byte{3}, 20000)
	const off = 1000
	put := func(b []byte) {
		if err := c.do(ringtest.Write, off, b); err != 0 {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name  string
		is    []byte
		flags uint8
		want  syscall.Errno
		at    uint64
		then  byte
	}{
		{"not done", old, ringtest.Decided, 0, 0, 2},
		{"done", data, ringtest.Decided | ringtest.FUA, 0, 0, 2},
		{"something else", other, ringtest.Decided, unix.EIO, 0, 3},
		{"half of it", append(bytes.Clone(data[:10000]), old[10000:]...), ringtest.Decided, unix.EIO, 0, 0},
		{"not decided", old, 0, 0, 0, 2},
		{"not decided, and as it would be", data, 0, unix.EILSEQ, 0, 2},
	} {
		put(tt.is)
		if err, at := c.compare(tt.flags, off, old, data); err != tt.want || at != tt.at {
			t.Errorf("%s: %v at %d", tt.name, err, at)
		}
		if tt.then != 0 {
			c.check(off, 20000, tt.then)
		}
	}
}

// TestLibraryCompareDeath: daemons die amid what clients count together. Who comes back does what
// had no end again, as the C library does, and each success has counted once.
func TestLibraryCompareDeath(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.share()
	const off, clients = 508, 3
	again := wire.OpenRequest{Flags: wire.OpenAgain}
	var cs [clients]*libraryClient
	for i := range cs {
		cs[i] = h.handle(wire.OpenRequest{})
	}
	again.ID = cs[0].opened.ID
	var count uint64
	for round := range 6 {
		var old, next [clients][8]byte
		for i := range cs {
			binary.LittleEndian.PutUint64(old[i][:], count)
			// What each writes is its own.
			binary.LittleEndian.PutUint64(next[i][:], count+1+uint64(i)<<32)
			cs[i].putCompare(0, off, old[i][:], next[i][:])
		}
		time.Sleep(time.Duration(round*100) * time.Microsecond)
		h.crash()
		var flags [clients]uint8
		var ended [clients]bool
		won := -1
		for i, c := range cs {
			if done, ok := c.Take(); ok {
				if ended[i] = true; done.Res == 0 {
					won = i
				}
			} else if c.Decided(0) {
				flags[i] = ringtest.Decided
			}
		}
		h.start()
		for i := range cs {
			n := h.handle(again)
			cs[i].leave()
			cs[i] = n
		}
		for i, c := range cs {
			if ended[i] {
				continue
			}
			switch err, _ := c.compare(flags[i], off, old[i][:], next[i][:]); {
			case err == 0 && won < 0:
				won = i
			case err == 0:
				t.Fatalf("round %d: %d has won, and so has %d", round, won, i)
			case err == unix.EIO && flags[i] != 0: // not done, and another came back before it
			case err != unix.EILSEQ:
				t.Fatalf("round %d: %v", round, err)
			}
		}
		var got [8]byte
		if err := cs[0].do(ringtest.Read, off, got[:]); err != 0 || won < 0 || got != next[won] {
			t.Fatalf("round %d: %d has won, the number is % x: %v", round, won, got, err)
		}
		count = binary.LittleEndian.Uint64(got[:])
	}
}

// TestLibraryReturn: a client that has lost its connection, and not the daemon, finds in its last ring
// the end of all that was taken from that, and does what was not with another one. Each of its compare
// and writes takes effect once.
func TestLibraryReturn(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	again := wire.OpenRequest{Flags: wire.OpenAgain | wire.OpenInstead, ID: c.opened.ID}
	const off, each = 508, 12
	number := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	var count uint64
	for round := range 20 {
		var all []ringtest.Request
		for i := range uint64(each) { // each counts on from the one before it
			at := i*16384 + off%512
			copy(c.Data[at:], number(count+i+1))
			copy(c.Data[at+4096:], number(count+i))
			all = append(all, ringtest.Request{Op: ringtest.CompareAndWrite, Tag: uint32(i), Offset: off, Length: 8, Data: at})
		}
		before := atomic.LoadUint32(c.Word(ringtest.SQHead)) // what was done again in the round before
		c.Submit(all...)
		time.Sleep(time.Duration(round*20) * time.Microsecond)
		last := c
		last.conn.Close()
		again.Instead = last.opened.Number
		c = h.handle(again)
		ended := uint64(0)
		for done, ok := last.Take(); ok; done, ok = last.Take() {
			if done.Res != 0 || uint64(done.Tag) != ended {
				t.Errorf("round %d: %+v, and %d before it", round, done, ended)
			}
			ended++
		}
		if taken := atomic.LoadUint32(last.Word(ringtest.SQHead)) - before; uint64(taken) != ended {
			t.Errorf("round %d: %d have been taken, and %d have ended", round, taken, ended)
		}
		last.leave()
		for i := ended; i < each; i++ {
			if err, at := c.compare(0, off, number(count+i), number(count+i+1)); err != 0 {
				t.Fatalf("round %d: %d of %d, the first one again is %d: %v at %d", round, i, each, ended, err, at)
			}
		}
		count += each
	}
	if n := len(h.door().clients()); n != 1 {
		t.Errorf("%d handles", n)
	}
}

// TestLibraryVersions: a client and a daemon of different releases speak the older one's language.
func TestLibraryVersions(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	for _, tt := range []struct{ low, high, want uint32 }{{1, 1, 1}, {1, 2, 2}, {2, 2, 2}, {1, 9, 2}} {
		c := h.dial()
		var hello wire.HelloResult
		if err := c.call(wire.Hello, &wire.HelloRequest{Low: tt.low, High: tt.high}, &hello); err != nil || hello.Version != tt.want {
			t.Errorf("%d to %d: %+v, %v", tt.low, tt.high, hello, err)
		}
		if err := c.open(wire.OpenRequest{}); err != nil {
			t.Fatal(err)
		}
		if c.Version != tt.want {
			t.Errorf("%d to %d: the ring has version %d", tt.low, tt.high, c.Version)
		}
		if tt.want == 1 {
			c.putCompare(0, 0, make([]byte, 512), make([]byte, 512))
			c.ended()
		}
	}
	errnoIs(t, h.dial().call(wire.Hello, &wire.HelloRequest{Low: 2, High: 1}, nil), unix.EINVAL)
	errnoIs(t, h.dial().call(wire.Hello, &wire.HelloRequest{}, nil), unix.EINVAL)
}

// TestLibraryChanges: what changes of an image is counted for all its clients, who are woken.
func TestLibraryChanges(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	c := h.handle(wire.OpenRequest{})
	other := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	told := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for _, c := range []*libraryClient{c, other} {
			if c.Client == nil {
				continue
			}
			if err := c.Woken(clientTimeout); err != nil || c.Changes() == 0 {
				t.Errorf("%s: %d changes: %v", what, c.Changes(), err)
			}
			c.Sleep()
		}
	}
	c.Sleep()
	other.Sleep()
	c.Wake()
	if c.Woken(20*time.Millisecond) == nil || c.Changes() != 0 {
		t.Error("woken for nothing")
	}
	var size wire.SizeResult
	told("resize", c.call(wire.Resize, &wire.ResizeRequest{Size: 65 << 20}, &size))
	told("snapshot", c.call(wire.Snapshot, &wire.SnapshotRequest{Name: "a"}, nil))
	told("rename", c.call(wire.RenameSnapshot, &wire.RenameSnapshotRequest{Snapshot: "a", Name: "b"}, nil))
	before := c.Changes()
	errnoIs(t, c.call(wire.Snapshot, &wire.SnapshotRequest{Name: "b"}, nil), unix.EEXIST)
	if c.Changes() != before {
		t.Error("what failed is a change")
	}
	other.leave()
	deadline := time.Now().Add(clientTimeout)
	for len(h.door().clients()) > 1 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	told("rollback", c.call(wire.RollBack, &wire.SnapshotRequest{Name: "b"}, &size))
	told("remove", c.call(wire.RemoveSnapshot, &wire.SnapshotRequest{Name: "b"}, nil))
	if c.Changes() <= before {
		t.Errorf("%d changes, were %d", c.Changes(), before)
	}
}
