package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
)

// seqSource has, at each position, the position.
type seqSource struct {
	last   uint64
	summed int // blocks whose checksums it has given
}

func (s *seqSource) read(dst []byte, pos uint64, sums []uint32) error {
	if pos < s.last {
		return errors.New("positions are not read in order")
	}
	if len(sums) > 0 && (pos%blockSectors != 0 || len(dst) != len(sums)*objectBlock) {
		return errors.New("checksums of what are not whole blocks")
	}
	s.last = pos
	for i := 0; i < len(dst); i += SectorSize {
		binary.LittleEndian.PutUint64(dst[i:], pos+uint64(i/SectorSize))
	}
	for i := range sums {
		sums[i] = crc32.Checksum(dst[i*objectBlock:][:objectBlock], castagnoli)
	}
	s.summed += len(sums)
	return nil
}

// TestBuildSums builds batches of writes of all lengths, at all sectors and over one another: each
// block of an object has its own checksum, wherever that comes from.
func TestBuildSums(t *testing.T) {
	for _, unit := range []int{1, 4, blockSectors} {
		t.Run(fmt.Sprintf("of %d sectors", unit), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(7, uint64(unit)))
			blocks, src := 0, &seqSource{}
			for range 200 {
				b := &batch{object: 7, objects: 1}
				for pos := uint64(8); len(b.extents) < 40; {
					n := uint32(unit * (1 + rng.IntN(64/unit)))
					b.extents = append(b.extents, writelog.Extent{Sector: uint64(unit * rng.IntN(1000/unit)), N: n, Pos: pos})
					b.kind = append(b.kind, 0)
					pos += uint64(n) + uint64(unit*rng.IntN(3))
				}
				src.last = 0
				_, built, err := b.build(objectHeader{image: uuid.New(), epoch: 3, firstSeq: 5, lastSeq: 9, logEnd: 1 << 20}, src, func(n int) []byte { return make([]byte, n) })
				if err != nil {
					t.Fatal(err)
				}
				o := &built[0]
				h, err := decodeObjectHeader(o.bytes[:o.header.header], 2000)
				if err != nil {
					t.Fatal(err)
				}
				if err := verifyBlocks(o.bytes[h.header:], h.sums, 0); err != nil {
					t.Fatal(err)
				}
				blocks += len(h.sums)
			}
			if all := src.summed == blocks; all != (unit == blockSectors) || src.summed == 0 {
				t.Errorf("the log has given the checksums of %d blocks of %d", src.summed, blocks)
			}
		})
	}
}

// TestBuildGroup builds a batch as two objects: together they hold what one would, each
// sector's newest write where it belongs.
func TestBuildGroup(t *testing.T) {
	b := &batch{object: 7, objects: 2, extents: []writelog.Extent{
		{Sector: 100, N: 16, Pos: 10},
		{Sector: 50, N: 8, Pos: 40},
		{Sector: 104, N: 4, Pos: 60}, // over a part of the first one
		{Sector: 200, N: 8, Pos: 70, Zero: true},
		{Sector: 58, N: 8, Pos: 80},
	}, kind: []dataKind{lasting, lasting, 0, 0, lasting}, place: [maxGroup]uint8{1, 1, 0}}
	id := uuid.New()
	buf, built, err := b.build(objectHeader{image: id, epoch: 3, firstSeq: 5, lastSeq: 9, logEnd: 1 << 20}, &seqSource{}, func(n int) []byte { return make([]byte, n) })
	if err != nil || len(built) != 2 {
		t.Fatalf("%d objects, %v", len(built), err)
	}
	if n := len(built[0].bytes) + len(built[1].bytes); n != len(buf) {
		t.Errorf("the objects have %d bytes, the buffer %d", n, len(buf))
	}
	want := [2]map[uint64]uint64{{}, {}}
	for s := range uint64(16) {
		want[0][50+s] = 40 + s%8 + s/8*40
		want[0][100+s] = 10 + s
	}
	for s := range uint64(4) {
		delete(want[0], 104+s)
		want[1][104+s] = 60 + s
	}
	for i, o := range built {
		h, err := decodeObjectHeader(o.bytes[:o.header.header], 1000)
		if err != nil {
			t.Fatal(err)
		}
		if h.seq != 7+uint64(i) || h.joined != (i == 0) || h.firstSeq != 5 || h.lastSeq != 9 || h.logEnd != 1<<20 || h.image != id {
			t.Errorf("object %d: %+v", i, h)
		}
		data, zeroes := o.bytes[h.header:], uint32(0)
		for _, e := range h.extents {
			if e.zero {
				zeroes += e.n
				continue
			}
			for s := e.sector; s < e.sector+uint64(e.n); s++ {
				if got, ok := want[i][s]; !ok || got != binary.LittleEndian.Uint64(data) {
					t.Errorf("object %d: sector %d from position %d, want %d, %v", i, s, binary.LittleEndian.Uint64(data), got, ok)
				}
				delete(want[i], s)
				data = data[SectorSize:]
			}
		}
		if len(data) > 0 || len(want[i]) > 0 || zeroes != 8*uint32(i) {
			t.Errorf("object %d: %d bytes too many, sectors missing %v, %d of zeroes", i, len(data), want[i], zeroes)
		}
	}
}

// mustGroup writes what becomes a group of two objects: new blocks, and one block over
// and over. It leaves the value n in blocks 1 and 1000 n to 1000 n + 99.
func (h *host) mustGroup(n uint64) {
	h.t.Helper()
	for i := range uint64(100) {
		h.mustWrite(1000*n+i, n)
		h.mustWrite(1, n)
	}
}

// TestGroupCounts: of a group of objects both count or none does, whatever is missing,
// and with the log nothing is lost.
func TestGroupCounts(t *testing.T) {
	for missing := range 2 {
		for _, logLost := range []bool{false, true} {
			t.Run(fmt.Sprintf("object %d missing, log lost %v", missing+1, logLost), func(t *testing.T) {
				inner := mem.New()
				down := faultstore.NewSwitch()
				refused := ""
				st := faultstore.New(inner, faultstore.If(func(op faultstore.Op) bool { return down.On(op) && op.Method == faultstore.Put && op.Key == refused },
					faultstore.Fault{Before: backend.ErrTemporary}))
				id := newImageIn(t, inner)
				a := newHost(t, "alpha", st, 1)
				if err := a.open(id, false); err != nil {
					t.Fatal(err)
				}
				a.mustGroup(1)
				a.mustDestage()
				if n := a.im.accepted.object; n != 2 || a.im.stats.objects != 2 {
					t.Fatalf("the batch became %d objects, %d are put; want 2", n, a.im.stats.objects)
				}
				refused = dataKey(id, 3+uint64(missing), a.im.super.sb.Epoch)
				down.Set(true)
				a.mustGroup(2)
				a.im.Destage(func(error) {})
				a.run(3 * time.Second)
				other := dataKey(id, 4-uint64(missing), a.im.super.sb.Epoch)
				if _, err := inner.Stat(context.Background(), other); err != nil || a.im.accepted.object != 2 {
					t.Fatalf("object %s: %v; %d objects are accepted, want 2", other, err, a.im.accepted.object)
				}
				a.disk.Kill()
				down.Set(false)

				b := a
				if b.again(); logLost {
					b = newHost(t, "beta", st, 2)
				}
				if err := b.open(id, logLost); err != nil {
					t.Fatal(err)
				}
				b.mustRead(1000, 1)
				if logLost {
					if b.im.accepted.object != 2 {
						t.Errorf("%d objects count, want 2", b.im.accepted.object)
					}
					b.mustRead(1, 1)
					b.mustRead(2000, 0)
				} else {
					b.mustRead(1, 2)
					b.mustRead(2099, 2)
				}
				b.mustGroup(3)
				b.mustClose()
				b.again()
				if err := b.open(id, false); err != nil {
					t.Fatal(err)
				}
				b.mustRead(1, 3)
				b.mustRead(3099, 3)
				b.run(5 * time.Minute)
				if _, err := inner.Stat(context.Background(), other); !errors.Is(err, backend.ErrNotFound) {
					t.Errorf("half of the group is still there: %v", err)
				}
			})
		}
	}
}

// TestCheckNamesMissingOfGroup: of a group that a point needs, the object that is not
// there is the one that is named.
func TestCheckNamesMissingOfGroup(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.im.cfg.CheckpointEvery = 1 << 20
	for n := range uint64(3) {
		a.mustGroup(n + 1)
		a.mustDestage()
	}
	a.mustWrite(9, 9) // in the log alone
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.mustWrite(1, 77)
	b.mustClose()
	last := b.im.super.sb.Points[0].Object
	if c := b.im.super.sb.Points[0].Checkpoint; c != nil && c.Object > last-2 {
		t.Fatalf("checkpoint %v, last object %d: this tests nothing", c, last)
	}
	key := dataKey(id, last, 1)
	if err := st.Delete(context.Background(), key); err != nil {
		t.Fatal(err)
	}
	rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{})
	if err != nil || len(rep.Errors) == 0 {
		t.Fatalf("%v, %+v", err, rep)
	}
	text := fmt.Sprint(rep.Errors)
	if !strings.Contains(text, "object "+key+": not found") || strings.Contains(text, "object "+dataKey(id, last-1, 1)) {
		t.Errorf("%s is missing: %v", key, rep.Errors)
	}
}

// TestGroupIsChecked: objects of different batches are not taken for a group.
func TestGroupIsChecked(t *testing.T) {
	im := &Image{id: uuid.New(), line: &lineage{}}
	at := position{object: 4, seq: 99}
	first := &objectHeader{image: im.id, epoch: 3, seq: 5, firstSeq: 100, lastSeq: 120, log: uuid.New(), logEnd: 1 << 20, joined: true}
	for _, c := range []struct {
		what   string
		change func(*objectHeader)
		ok     bool
	}{
		{"the same batch", func(*objectHeader) {}, true},
		{"another epoch", func(h *objectHeader) { h.epoch++ }, false},
		{"another last record", func(h *objectHeader) { h.lastSeq++ }, false},
		{"another log", func(h *objectHeader) { h.log = uuid.New() }, false},
		{"another end in the log", func(h *objectHeader) { h.logEnd++ }, false},
		{"the next records", func(h *objectHeader) { h.firstSeq, h.lastSeq = 121, 130 }, false},
	} {
		h := *first
		h.seq, h.joined = 6, false
		c.change(&h)
		if err := im.goesOn(at, []*objectHeader{first}, &h); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if err := im.goesOn(at, slices.Repeat([]*objectHeader{first}, maxGroup), first); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a group that is too large: %v", err)
	}
}

// TestSplit: batches with much of both kinds become groups, others do not.
func TestSplit(t *testing.T) {
	h := newHost(t, "alpha", mem.New(), 1)
	if err := h.open(newImageIn(t, h.st), false); err != nil {
		t.Fatal(err)
	}
	const blocks = 2048 // eight objects
	before := uint64(0)
	objects := func() uint64 {
		h.mustDestage()
		n := h.im.accepted.object - before
		before += n
		return n
	}
	for i := range uint64(blocks) {
		h.mustWrite(i, 1)
	}
	if n := objects(); n != 8 {
		t.Errorf("first writes of 8 MiB: %d objects of 1 MiB, want 8", n)
	}
	for i := range uint64(blocks) {
		h.mustWrite(i, 2)
	}
	if n := objects(); n != 8 {
		t.Errorf("in sequence once more: %d objects, want 8", n)
	}
	for i := range uint64(200) {
		h.mustWrite(i, 3) // old ones
	}
	if n := objects(); n != 1 {
		t.Errorf("old blocks: %d objects, want 1", n)
	}
	for i := range uint64(200) {
		h.mustWrite(i, 4) // written a moment ago
	}
	if n := objects(); n != 1 {
		t.Errorf("new blocks: %d objects, want 1", n)
	}
	for i := range uint64(100) {
		h.mustWrite(i, 5)
		h.mustWrite(1000+i, 5)
	}
	if n := objects(); n != 2 {
		t.Errorf("old and new blocks: %d objects, want 2", n)
	}
}

// TestHazards: two kinds of data are worth an object each where one of them is overwritten
// clearly sooner than the other, for what lives of them.
func TestHazards(t *testing.T) {
	for _, x := range []struct {
		what              string
		overwritten, live [maxGroup]uint64
		alike             [maxGroup - 1]bool
	}{
		{"all alike", [maxGroup]uint64{250, 500, 250}, [maxGroup]uint64{1000, 2000, 1000}, [maxGroup - 1]bool{true, true}},
		{"two zones", [maxGroup]uint64{575, 271, 155}, [maxGroup]uint64{198, 208, 594}, [maxGroup - 1]bool{}},
		{"the young alike", [maxGroup]uint64{300, 300, 10}, [maxGroup]uint64{100, 90, 900}, [maxGroup - 1]bool{0: true}},
		{"the old first", [maxGroup]uint64{0, 0, 100}, [maxGroup]uint64{100, 100, 100}, [maxGroup - 1]bool{true, true}},
		{"only the young", [maxGroup]uint64{100, 0, 0}, [maxGroup]uint64{100, 100, 100}, [maxGroup - 1]bool{1: true}},
		{"nothing", [maxGroup]uint64{}, [maxGroup]uint64{100, 100, 100}, [maxGroup - 1]bool{true, true}},
	} {
		h := hazards{overwritten: x.overwritten}
		if h.judge(x.live); h.alike != x.alike {
			t.Errorf("%s: %v, want %v", x.what, h.alike, x.alike)
		}
		if h.overwritten[0] != x.overwritten[0]/2 {
			t.Errorf("%s: %d of %d count the next time", x.what, h.overwritten[0], x.overwritten[0])
		}
	}
}

// TestAlikeIsOneObject: a batch becomes as many objects as there are kinds that are not alike.
func TestAlikeIsOneObject(t *testing.T) {
	im, _ := newStill(t)
	im.window = 2 * maxGroup
	third := im.object / 3
	for _, x := range []struct {
		alike [maxGroup - 1]bool
		place [maxGroup]uint8
		n     uint64
	}{
		{[maxGroup - 1]bool{}, [maxGroup]uint8{2, 1, 0}, 3},
		{[maxGroup - 1]bool{0: true}, [maxGroup]uint8{1, 1, 0}, 2},
		{[maxGroup - 1]bool{1: true}, [maxGroup]uint8{1, 0, 0}, 2},
		{[maxGroup - 1]bool{true, true}, [maxGroup]uint8{}, 1},
	} {
		im.hazards.alike = x.alike
		b := &batch{sectors: 3 * third, kinds: [maxGroup]uint64{third, third, third}}
		if im.split(b); uint64(b.objects) != x.n || b.place != x.place {
			t.Errorf("alike %v: %d objects, places %v; want %d, %v", x.alike, b.objects, b.place, x.n, x.place)
		}
	}
}
