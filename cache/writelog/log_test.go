package writelog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

const testSectors = 1 << 22

// client counts what the log tells it.
type client struct {
	completed, durable uint64
	space              int
	err                error
}

func (c *client) LogCompleted(seq uint64) { c.completed = seq }
func (c *client) LogDurable(seq uint64)   { c.durable = seq }
func (c *client) LogSpace()               { c.space++ }
func (c *client) LogFailed(err error)     { c.err = err }

func newDisk(t *testing.T, rng *rand.Rand) *simdisk.Disk {
	t.Helper()
	d := simdisk.New(MinSize, rng)
	if err := Create(d, Header{Log: uuid.New(), Image: uuid.New(), Epoch: 1, FirstSeq: 1, ImageURL: "mem:x"}); err != nil {
		t.Fatal(err)
	}
	return d
}

// start opens, recovers and starts the log of d.
func start(t *testing.T, d *simdisk.Disk, c *client, from Start, visit func(Record) error) *Log {
	t.Helper()
	l, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	if visit == nil {
		visit = func(Record) error { return nil }
	}
	if err := l.Recover(context.Background(), from, RecoverOptions{Sectors: testSectors, ReadAhead: true}, visit); err != nil {
		t.Fatal(err)
	}
	if err := l.Adopt(l.Header().Epoch+1, 1, uuid.New()); err != nil {
		t.Fatal(err)
	}
	l.Start(d.Device(), c, make([]byte, 2*SegmentSize), nil, 8)
	return l
}

// write is one write of the test, stamped with its number in every sector.
type written struct {
	n      uint64
	sector uint64
	count  uint32
	zero   bool
	seq    uint64
}

func (w written) data() []byte {
	p := make([]byte, int(w.count)*Sector)
	for s := 0; s < len(p); s += Sector {
		copy(p[s:], pattern[:])
		binary.LittleEndian.PutUint64(p[s:], w.n)
	}
	return p
}

var pattern = func() (p [Sector]byte) {
	for i := range p {
		p[i] = byte(i * 7)
	}
	return p
}()

// TestCrashes writes, syncs, trims and crashes, over and over, and checks after
// each crash that what recovery finds is a prefix of what was appended, which
// holds everything that was durable, or completed if only the process died.
func TestCrashes(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			if seed > 0 {
				racetest.Slow(t)
			}
			crashes(t, seed)
		})
	}
}

func crashes(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	d := newDisk(t, rng)
	var all []written // everything that is in the log now, in order
	from := Start{Pos: 0, Seq: 1}
	next := uint64(1)
	c := &client{}
	l := start(t, d, c, from, nil)
	for range 6 {
		trimTo := map[uint64]uint64{} // seq -> position after its record, as far as known
		for range 200 + rng.IntN(600) {
			w := written{n: next, count: 1 + rng.Uint32N(64), zero: rng.IntN(10) == 0}
			if rng.IntN(50) == 0 {
				w.count = MaxData / Sector
			}
			w.sector = rng.Uint64N(testSectors - uint64(w.count))
			var st Status
			var pos uint64
			if w.zero {
				_, st = l.AppendZeroes(w.sector, w.count)
			} else {
				pos, st = l.Append(w.sector, w.data())
			}
			if st == Appended {
				next++
				w.seq = l.Seq()
				all = append(all, w)
				if !w.zero && !bytes.Equal(l.Memory(pos, w.count), w.data()) {
					t.Fatal("memory does not hold what was just appended")
				}
			}
			if rng.IntN(4) == 0 || st != Appended {
				l.Commit()
				trimTo[l.nextSeq-1] = l.head
			}
			for range rng.IntN(4) {
				d.Step()
			}
			if rng.IntN(30) == 0 && l.completed > c.durable {
				l.Sync(c.durable + 1 + rng.Uint64N(l.completed-c.durable))
			}
			if rng.IntN(50) == 0 || st == Full {
				for seq := l.completed; seq >= from.Seq; seq-- {
					if pos, ok := trimTo[seq]; ok {
						l.Trim(pos)
						from = Start{Pos: pos, Seq: seq + 1}
						for len(all) > 0 && all[0].seq <= seq {
							all = all[1:]
						}
						break
					}
				}
			}
		}
		floor := c.completed
		if rng.IntN(2) == 0 {
			d.Kill()
		} else {
			d.CutPower()
			floor = c.durable
		}
		i := 0
		c = &client{}
		var pos []uint64
		l = start(t, d, c, from, func(r Record) error {
			for _, e := range r.Extents {
				if i >= len(all) || all[i].seq != r.Seq || all[i].sector != e.Sector || all[i].count != e.N || all[i].zero != e.Zero {
					t.Fatalf("record %d holds something that was not appended there", r.Seq)
				}
				pos = append(pos, e.Pos)
				i++
			}
			if i < len(all) && all[i].seq == r.Seq {
				t.Fatalf("record %d lacks a write", r.Seq)
			}
			return nil
		})
		if l.completed < floor {
			t.Fatalf("record %d was promised, the log ends at %d", floor, l.completed)
		}
		all = all[:i]
		scratch := make([]byte, MaxData+2*BlockSize)
		for i, w := range all {
			p := make([]byte, w.count*Sector)
			if w.zero {
				continue
			}
			if err := l.ReadBlocking(p, pos[i], scratch); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, w.data()) {
				t.Fatalf("write %d reads back wrong after the crash", w.n)
			}
		}
		c.completed, c.durable = l.completed, l.durable
	}
}

func TestReadBack(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	d := newDisk(t, rng)
	c := &client{}
	l := start(t, d, c, Start{Seq: 1}, nil)
	type at struct {
		w   written
		pos uint64
	}
	var list []at
	for n := uint64(1); ; n++ {
		w := written{n: n, count: 1 + rng.Uint32N(100)}
		pos, st := l.Append(0, w.data())
		if st == Full {
			break
		}
		if st == Busy {
			d.Step()
			n--
			continue
		}
		list = append(list, at{w, pos})
		if n%5 == 0 {
			l.Commit()
		}
	}
	l.Commit()
	for d.Step() {
	}
	scratch := make([]byte, MaxData)
	inMemory := 0
	for _, a := range list {
		p := make([]byte, int(a.w.count)*Sector)
		if err := l.ReadBlocking(p, a.pos, scratch); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, a.w.data()) {
			t.Fatalf("write %d reads back wrong", a.w.n)
		}
		if m := l.Memory(a.pos, a.w.count); m != nil {
			inMemory++
			if !bytes.Equal(m, p) {
				t.Fatalf("memory holds another write %d than the disk", a.w.n)
			}
		}
		if a.w.count >= 8 && a.pos%8 != 0 {
			t.Fatalf("write of %d sectors at position %d, which is not a block's", a.w.count, a.pos)
		}
	}
	if inMemory == 0 || inMemory == len(list) {
		t.Errorf("%d of %d writes in memory; some but not all expected", inMemory, len(list))
	}
	d.Damage(l.offset(list[3].pos * Sector))
	if err := l.ReadBlocking(make([]byte, Sector), list[3].pos, scratch); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a flipped bit read as %v, want ErrCorrupt", err)
	}
}

// TestDamageBeforeFlush: a damaged record of which a later one knows that it had
// been flushed must not pass for the end of the log.
func TestDamageBeforeFlush(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		d := newDisk(t, rand.New(rand.NewPCG(2, 2)))
		c := &client{}
		l := start(t, d, c, Start{Seq: 1}, nil)
		var off int64
		for n := uint64(1); n <= 4; n++ {
			w := written{n: n, count: 8}
			pos, _ := l.Append(0, w.data())
			if n == 2 {
				off = l.offset(pos * Sector)
			}
			l.Commit()
			for d.Step() {
			}
			if flushed && n == 3 {
				l.Sync(3)
				d.Step()
			}
		}
		d.Damage(off)
		l, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		err = l.Recover(context.Background(), Start{Seq: 1}, RecoverOptions{Sectors: testSectors, ReadAhead: true}, func(Record) error { found++; return nil })
		if flushed != errors.Is(err, ErrCorrupt) || err != nil && !flushed {
			t.Errorf("flushed=%v: Recover says %v", flushed, err)
		}
		if found != 1 {
			t.Errorf("%d records before the damaged one, want 1", found)
		}
	}
}

// TestDamagedHeader: either copy of the header can be damaged, and the log is
// still known as what it is.
func TestDamagedHeader(t *testing.T) {
	for copyNo := range int64(2) {
		d := newDisk(t, rand.New(rand.NewPCG(4, 4)))
		want := start(t, d, &client{}, Start{Seq: 1}, nil).Header()
		d.Damage(copyNo*BlockSize + 50)
		got, _, err := ReadHeader(d)
		if err != nil || got.Epoch != want.Epoch || got.FirstSeq != want.FirstSeq || got.Boot != want.Boot {
			t.Errorf("copy %d damaged: %+v, %v; want %+v", copyNo, got, err, want)
		}
	}
}

// TestCreateOverOldLog: a process that dies while it makes a log of what was one
// before leaves the old log or the new one, and no mixture.
func TestCreateOverOldLog(t *testing.T) {
	for i := range 4 {
		writes, opens := i%2, 1+i/2 // of two writes; either copy was written last
		d := newDisk(t, rand.New(rand.NewPCG(5, 5)))
		var old Header
		for range opens {
			old = start(t, d, &client{}, Start{Seq: 1}, nil).Header()
		}
		made := Header{Log: uuid.New(), Image: uuid.New()}
		left := writes
		d.Fail = func(o simdisk.Op) bool {
			if o.Kind == simdisk.Write {
				left--
			}
			return left < 0
		}
		if err := Create(d, made); err == nil {
			t.Fatalf("Create does not fail with write %d", writes)
		}
		d.Fail = nil
		got, _, err := ReadHeader(d)
		isOld := got.Log == old.Log && got.Epoch == old.Epoch && got.FirstSeq == old.FirstSeq
		isNew := got.Log == made.Log && got.Epoch == 0
		if err != nil || !isOld && !isNew {
			t.Errorf("opened %d times, failed after %d writes: %+v, %v", opens, writes, got, err)
		}
	}
}

func TestHoldKeepsSegment(t *testing.T) {
	racetest.Slow(t)
	d := newDisk(t, rand.New(rand.NewPCG(3, 3)))
	l := start(t, d, &client{}, Start{Seq: 1}, nil)
	w := written{n: 1, count: MaxData / Sector}
	first, _ := l.Append(0, w.data())
	l.Commit()
	const readers = 1 << 16 // two requests of 1 MiB have 4096, of one sector each
	for range readers {
		l.Hold(first)
	}
	full := func() bool {
		for range 1000 {
			switch _, st := l.Append(0, w.data()); st {
			case Full:
				return true
			case Busy:
				l.Commit()
				for d.Step() {
				}
			}
			l.Commit()
			for d.Step() {
			}
			l.Trim(l.head)
		}
		return false
	}
	if !full() {
		t.Fatal("the log went round over a segment that is being read")
	}
	for range readers {
		l.Release(first)
	}
	if full() {
		t.Fatal("the log is full although everything is trimmed")
	}
}

func TestSSDFailure(t *testing.T) {
	d := newDisk(t, rand.New(rand.NewPCG(4, 4)))
	c := &client{}
	l := start(t, d, c, Start{Seq: 1}, nil)
	d.Fail = func(o simdisk.Op) bool { return o.Kind == simdisk.Write }
	l.Append(0, make([]byte, 4096))
	l.Commit()
	d.Step()
	if c.err == nil || c.completed != 0 {
		t.Fatalf("a failed write: err %v, completed %d", c.err, c.completed)
	}
	if _, st := l.Append(0, make([]byte, 4096)); st != Failed {
		t.Fatalf("append after failure: %v", st)
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	d := newDisk(t, rand.New(rand.NewPCG(5, 5)))
	l := start(t, d, &client{}, Start{Seq: 1}, nil)
	l.dev = nullDevice{}
	p := make([]byte, 4096)
	n := testing.AllocsPerRun(1000, func() {
		if _, st := l.Append(8, p); st != Appended {
			t.Fatal(st)
		}
		l.Commit()
		f := &l.ring[l.first%MaxInFlight]
		f.Complete(int32(len(f.buf)), 0)
		l.Trim(l.head)
	})
	if n != 0 {
		t.Errorf("%v allocations for each append", n)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	id := uuid.New()
	b := make([]byte, BlockSize)
	putExtent(b, 0, 8, 8, 0, false)
	r := record{seq: 1, data: BlockSize, extents: 1}
	encodeRecord(b, &id, &r)
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= BlockSize { // get past the checksum
			copy(b[8:], id[:])
			binary.LittleEndian.PutUint32(b, recordMagic)
			b = b[:BlockSize]
			binary.LittleEndian.PutUint32(b[4:], 0)
			binary.LittleEndian.PutUint32(b[4:], sum(b))
		}
		r, ok := decodeRecord(b, &id, testSectors)
		if !ok {
			return
		}
		for i := range r.extents {
			e, off := getExtent(b, i)
			if e.N == 0 || e.Sector+uint64(e.N) > testSectors || !e.Zero && int(off+e.N)*Sector > r.data {
				t.Fatalf("extent %+v at %d passed", e, off)
			}
		}
		for i := range r.data / BlockSize {
			r.blockSum(b, i)
		}
	})
}

func FuzzDecodeHeader(f *testing.F) {
	h := Header{Log: uuid.New(), Size: SegmentSize, FirstSeq: 1, ImageURL: "file:///x/y"}
	f.Add(h.encode(), false)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= 16 {
			binary.LittleEndian.PutUint32(b[12:], 0)
			binary.LittleEndian.PutUint32(b[12:], sum(b))
		}
		if h, err := decodeHeader(b); err == nil && (len(h.ImageURL) > maxImageURL || h.Size%SegmentSize != 0) {
			t.Fatalf("%+v passed", h)
		}
	})
}
