package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// storedAlone is a segment that checkpoints write, each of them into a map object of its
// own, and what these take.
type storedAlone struct {
	t       *testing.T
	st      *mem.Store
	id      uuid.UUID
	m       *extmap.Map // as it is now
	changes []change    // since the last checkpoint
	stored  places
	object  uint64
	put     int // bytes
	wholes  int
}

func newStoredAlone(t *testing.T) *storedAlone {
	return &storedAlone{t: t, st: mem.New(), id: uuid.New(), m: extmap.New(segmentSectors)}
}

// change maps n sectors from at to a place of their own, which is anywhere as places of
// random writes are, or to nothing.
func (s *storedAlone) change(at, n uint64, hole bool) {
	s.object++
	if hole {
		s.m.Remove(at, n)
	} else {
		s.m.Insert(at, n, refOfSeq(1+s.object*7919%(1<<17)).loc(int(s.object*977%1000)*8))
	}
	s.changes = append(s.changes, change{object: uint32(s.object), at: uint32(at), n: uint32(n)})
}

// checkpoint writes the segment, reads it again, and returns how many bytes were put.
func (s *storedAlone) checkpoint() int {
	s.t.Helper()
	ctx := context.Background()
	e := mapEncoder{partReader: partReader{st: s.st, line: &lineage{image: s.id}, timeout: time.Minute}, sectors: segmentSectors, deltaFrom: deltaFrom}
	e.encode(ctx, []copiedSegment{{span: s.m.Copy(0, segmentPages), changes: s.changes, stored: s.stored}})
	s.changes = nil
	w := e.segments[0]
	o := mapObject{at: checkpointRef{s.object, 1}, size: uint32(len(e.b))}
	if err := s.st.Put(ctx, mapKey(s.id, o.at, 0), e.b); err != nil {
		s.t.Fatal(err)
	}
	if w.kind == kindWhole {
		s.stored[kindDelta] = place{}
		s.wholes++
	}
	s.stored[w.kind] = place{o, w.at.offset, w.at.size}
	span, err := readSegment(ctx, s.st, &lineage{image: s.id}, s.stored, 0, segmentSectors)
	if err != nil {
		s.t.Fatal(err)
	}
	got := extmap.New(segmentSectors)
	got.Attach(span)
	for at := uint64(0); ; {
		a, ok := s.m.Next(at, segmentSectors)
		b, same := got.Next(at, segmentSectors)
		if a != b || ok != same {
			s.t.Fatalf("from sector %d a load finds %+v, want %+v", at, b, a)
		}
		if !ok {
			break
		}
		at = a.End()
	}
	s.put += len(e.b)
	return len(e.b)
}

// TestDeltaOfAnything: what is loaded of a segment is what was written, whatever has
// changed, and in however many checkpoints.
func TestDeltaOfAnything(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		s := newStoredAlone(t)
		unit := []uint64{1, 8}[seed%2]
		deltas := 0
		for range 40 {
			for range 1 + rng.IntN(200) {
				n := unit * (1 + rng.Uint64N(64))
				at := rng.Uint64N((segmentSectors-n)/unit) * unit
				s.change(at, n, rng.IntN(4) == 0)
			}
			was := s.wholes
			s.checkpoint()
			if s.wholes == was {
				deltas++
			}
		}
		if deltas == 0 || s.wholes < 2 {
			t.Errorf("seed %d: %d deltas, %d wholes: this tests nothing", seed, deltas, s.wholes)
		}
		s.change(0, segmentSectors, true)
		if n := s.checkpoint(); n != 0 {
			t.Errorf("seed %d: %d bytes of a segment that has become empty", seed, n)
		}
	}
}

// TestDeltaPays: what checkpoints of few changes put is a small part of what the segment
// would be each time, and no more where deltas are of no use.
func TestDeltaPays(t *testing.T) {
	racetest.Slow(t)
	const blocks, rounds = segmentSectors / 8, 200
	for _, x := range []struct {
		name    string
		changes int                                           // for each checkpoint
		block   func(rng *rand.Rand, n, k int) (block uint64) // k of checkpoint n
		most    float64                                       // of the whole, for each checkpoint
		wholes  int                                           // at most
	}{
		{"a few anywhere", 32, func(rng *rand.Rand, _, _ int) uint64 { return rng.Uint64N(blocks) }, 0.08, rounds / 20},
		{"many anywhere", 1000, func(rng *rand.Rand, _, _ int) uint64 { return rng.Uint64N(blocks) }, 0.5, rounds / 3},
		{"the same again", 500, func(_ *rand.Rand, _, k int) uint64 { return uint64(k) * 7 }, 0.06, 1},
		{"all", blocks, func(_ *rand.Rand, _, k int) uint64 { return uint64(k) }, 1.1, rounds + 1},
		{"one after another", 200, func(_ *rand.Rand, n, k int) uint64 { return uint64(n*200+k) % blocks }, 0.25, rounds / 8},
	} {
		t.Run(x.name, func(t *testing.T) {
			s, rng := newStoredAlone(t), rand.New(rand.NewPCG(1, 1))
			for b := range uint64(blocks) {
				s.change(b*8, 8, false)
			}
			whole := s.checkpoint()
			s.put = 0
			for n := range rounds {
				for k := range x.changes {
					s.change(x.block(rng, n, k)*8, 8, false)
				}
				s.checkpoint()
			}
			part := float64(s.put) / float64(whole) / rounds
			t.Logf("%.3f of the whole for each checkpoint, %d wholes", part, s.wholes)
			if part > x.most || s.wholes > x.wholes {
				t.Errorf("%.3f of the whole for each checkpoint, want %v at most; %d wholes, want %d at most", part, x.most, s.wholes, x.wholes)
			}
		})
	}
}

// TestDeltaIsReadBeside: whoever reads a place of which nothing is in memory waits for the
// segment and for its delta side by side, and has what the delta says.
func TestDeltaIsReadBeside(t *testing.T) {
	h, _ := attached(t, mem.New(), smallImage(), nil)
	h.im.objs.deltaFrom = 1
	h.storeInNoOrder()
	h.mustWrite(0, 99)
	h.mustCheckpoint()
	h.dropSegment(0)
	told := false
	r := &Request{Op: Read, Sectors: 8, Buf: make([]byte, 4096), Done: doneFunc(func(*Request) { told = true })}
	h.im.Submit(r)
	h.im.EndTurn()
	if n := len(h.env.jobs); n != 2 {
		t.Errorf("%d reads of the store are under way, want 2", n)
	}
	h.run(0)
	if got, err := stamp(r.Buf, 0); !told || r.Err != 0 || err != nil || got != 99 {
		t.Errorf("block 0 is %d, %v; told %v, %v", got, err, told, r.Err)
	}
	h.mustRead(2, 1)
}

// storeInNoOrder writes every other block of the first thousand, in no order, so that their
// places take some room, and has the map stored. Block n then holds n/2.
func (h *host) storeInNoOrder() {
	h.t.Helper()
	const blocks = 500
	for k := range uint64(blocks) {
		b := k * 211 % blocks
		h.mustWrite(2*b, b)
	}
	h.mustCheckpoint()
}

// TestDamagedDelta: check names a delta that is damaged; nothing of its segment is read,
// until a checkpoint of a segment that is in memory makes it whole.
func TestDamagedDelta(t *testing.T) {
	for _, inMemory := range []bool{false, true} {
		t.Run(fmt.Sprintf("in memory %v", inMemory), func(t *testing.T) {
			st := faultstore.New(mem.New())
			h, id := attached(t, st, smallImage(), nil)
			h.im.objs.deltaFrom = 1
			h.storeInNoOrder()
			h.mustWrite(0, 99)
			h.mustCheckpoint()
			at := h.im.objs.place(kindDelta, 0)
			if at.size == 0 {
				t.Fatal("there is no delta: this tests nothing")
			}
			key := mapKey(id, at.object.at, at.object.part)
			if err := damage(context.Background(), st, key, flipLast); err != nil {
				t.Fatal(err)
			}
			rep, err := checkImage(context.Background(), st, id, "mem:", CheckOptions{})
			if err != nil || len(rep.Errors) != 1 || rep.Errors[0].Object != key || !strings.Contains(rep.Errors[0].Problem, "delta of map segment 0") {
				t.Errorf("check finds %v, %v", rep, err)
			}
			if !inMemory {
				h.dropSegment(0)
				for _, block := range []uint64{0, 2} {
					if errno, ended, _ := h.do(Read, block, 0, 0); errno == 0 || !ended {
						t.Errorf("block %d is read although its place is not known", block)
					}
				}
				return
			}
			h.mustWrite(4, 77)
			h.mustCheckpoint()
			if h.im.objs.place(kindDelta, 0).size > 0 {
				t.Error("the damaged delta is still needed")
			}
			h.mustClose()
			mustBeClean(t, st)
			h.again()
			if err := h.open(id, false); err != nil {
				t.Fatal(err)
			}
			h.mustRead(0, 99)
			h.mustRead(2, 1)
			h.mustRead(4, 77)
		})
	}
}

// TestDamagedDeltaMoves: a damaged delta that is to leave its map object is replaced by the
// whole where the segment is in memory.
func TestDamagedDeltaMoves(t *testing.T) {
	s := newStoredAlone(t)
	for b := range uint64(2000) {
		s.change(b*8, 8, false)
	}
	s.checkpoint()
	s.change(0, 8, true)
	s.checkpoint()
	at := s.stored[kindDelta]
	if at.size == 0 {
		t.Fatal("there is no delta: this tests nothing")
	}
	if err := damage(context.Background(), s.st, mapKey(s.id, at.object.at, 0), flipLast); err != nil {
		t.Fatal(err)
	}
	p := segmentPart{kind: kindDelta}
	for _, x := range []struct {
		span    *extmap.Span
		written []segmentPart
		left    int
	}{
		{s.m.Copy(0, segmentPages), []segmentPart{{0, kindWhole}}, 0},
		{nil, nil, 1},
	} {
		e := mapEncoder{partReader: partReader{st: s.st, line: &lineage{image: s.id}, timeout: time.Minute}, sectors: segmentSectors}
		e.encode(context.Background(), []copiedSegment{{segmentPart: p, span: x.span, stored: s.stored}})
		var got []segmentPart
		for _, w := range e.segments {
			got = append(got, w.segmentPart)
		}
		if fmt.Sprint(got) != fmt.Sprint(x.written) || len(e.left) != x.left {
			t.Errorf("in memory %v: %v is written, %v left", x.span != nil, got, e.left)
		}
	}
}

// TestDeltaOfWhatHasShrunk: a segment of which little is left, because it was written over
// in one piece, is written whole: what is stored of it would stay, and be read, for ever.
func TestDeltaOfWhatHasShrunk(t *testing.T) {
	s := newStoredAlone(t)
	for b := range uint64(segmentSectors / 8) {
		s.change(b*8, 8, false)
	}
	whole := s.checkpoint()
	for at := uint64(0); at < segmentSectors; at += 2048 {
		s.change(at, 2048, false)
	}
	s.checkpoint()
	stored := 0
	for _, p := range s.stored {
		stored += int(p.size)
	}
	if stored > whole/20 {
		t.Errorf("%d bytes are stored of 64 extents, where there were %d of %d", stored, whole, segmentSectors/8)
	}
}
