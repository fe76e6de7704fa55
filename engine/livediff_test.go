package engine

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// mustMapParts returns what is of interest in the image's map by block: 1, data; 2, zeroes.
func (h *host) mustMapParts(o MapPartOptions) map[uint64]int {
	h.t.Helper()
	got := map[uint64]int{}
	for at, end := uint64(0), h.im.Sectors()*SectorSize; at < end; {
		var part *MapPart
		err := errors.New("it has not ended")
		h.im.MapPart(at, end, o, func(p *MapPart, e error) { part, err = p, e })
		h.run(time.Second)
		if err != nil {
			h.t.Fatal(err)
		}
		if part.Start != at || part.End <= at || part.Size != end {
			h.t.Fatalf("a part from %d to %d of %d, from %d on", part.Start, part.End, part.Size, at)
		}
		err = part.Diff(h.t.Context(), func(r Range) error {
			if r.Offset < part.Start || r.Offset+r.Length > part.End {
				h.t.Errorf("%+v is not in the part from %d to %d", r, part.Start, part.End)
			}
			for b := r.Offset / objectBlock; b < (r.Offset+r.Length)/objectBlock; b++ {
				got[b] = 1
				if r.Zero {
					got[b] = 2
				}
				if part.HasData(b*objectBlock, (b+1)*objectBlock) == r.Zero {
					h.t.Errorf("block %d: %+v, and the contrary", b, r)
				}
			}
			return nil
		})
		if err != nil {
			h.t.Fatal(err)
		}
		at = part.End
	}
	return got
}

// TestMapPartsRandom: the map of a running image tells of all that was acknowledged, and of
// nothing else, wherever that is: in the log, in objects that a checkpoint knows or not, in
// segments that are in memory or not. So it does of what has changed since a snapshot.
func TestMapPartsRandom(t *testing.T) {
	t.Parallel()
	const segment, blocks = segmentSectors / 8, 3*segmentSectors/8 + 1000
	for seed := range uint64(4) {
		rng, st := rand.New(rand.NewPCG(seed, 1)), mem.New()
		h, id := attached(t, st, CreateOptions{Size: blocks * objectBlock, ObjectSize: MinObjectSize}, nil)
		var from *View
		now, touched := map[uint64]bool{}, map[uint64]bool{} // since from
		value := uint64(0)
		place := func() uint64 { return uint64(rng.IntN(4))*segment + uint64(rng.IntN(60)) }
		for range 150 {
			switch k := rng.IntN(24); {
			case k < 12:
				value++
				b := place()
				h.mustWrite(b, value)
				now[b], touched[b] = true, true
			case k < 16:
				b := place()
				h.mustDiscard(b, 1)
				if now[b] {
					delete(now, b)
					touched[b] = true
				}
			case k < 18:
				h.mustDestage()
			case k < 19:
				h.mustCheckpoint()
			case k < 20:
				h.mustClose()
				h.mustAttach(id)
			case k < 21:
				s := mustSnap(t, st, id, "s"+uuid.NewString(), h)
				from = mustView(t, st, id, s.ID)
				clear(touched)
			}
			got := h.mustMapParts(MapPartOptions{})
			for b := range uint64(blocks) {
				if want := now[b]; want != (got[b] == 1) || got[b] == 2 {
					t.Fatalf("seed %d: block %d: %d, data is %t", seed, b, got[b], want)
				}
			}
			if from == nil {
				continue
			}
			got = h.mustMapParts(MapPartOptions{From: from})
			for b := range touched {
				if x, ok := got[b]; ok && now[b] != (x == 1) || !ok && now[b] {
					t.Fatalf("seed %d: block %d has changed since the snapshot: %d, data is %t", seed, b, x, now[b])
				}
			}
			for b := range got {
				if !touched[b] {
					t.Fatalf("seed %d: block %d has not changed since the snapshot", seed, b)
				}
			}
		}
		h.mustClose()
	}
}

// TestMapPartsOwn: what a clone has of its ancestors can be left out.
func TestMapPartsOwn(t *testing.T) {
	t.Parallel()
	st := mem.New()
	a, id := attached(t, st, smallImage(), nil)
	a.mustWrite(1, 1)
	a.mustWrite(2, 2)
	clone := mustClone(t, st, id, "", "clone", a)
	h := mustOpen(t, st, clone, 3)
	h.mustWrite(2, 3)
	h.mustWrite(3, 4)
	for range 2 {
		if got := h.mustMapParts(MapPartOptions{Own: true}); len(got) != 2 || got[2] != 1 || got[3] != 1 {
			t.Errorf("its own: %v", got)
		}
		if got := h.mustMapParts(MapPartOptions{}); len(got) != 3 || got[1] != 1 {
			t.Errorf("all: %v", got)
		}
		h.mustCheckpoint()
	}
	h.mustClose()
}

// TestMapPartsStop: who has heard enough is told no more.
func TestMapPartsStop(t *testing.T) {
	t.Parallel()
	h, _ := attached(t, mem.New(), smallImage(), nil)
	for b := range uint64(20) {
		h.mustWrite(2*b, b+1)
	}
	calls, enough := 0, errors.New("enough")
	h.im.MapPart(0, 1<<20, MapPartOptions{}, func(p *MapPart, err error) {
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Diff(t.Context(), func(Range) error { calls++; return enough }); err != enough || calls != 1 {
			t.Errorf("%d calls, %v", calls, err)
		}
	})
}

// TestMapPartsEnded: an image that is not owned any more tells nothing.
func TestMapPartsEnded(t *testing.T) {
	t.Parallel()
	h, _ := attached(t, mem.New(), smallImage(), nil)
	h.mustWrite(1, 1)
	h.mustClose()
	var err error
	h.im.MapPart(0, 1<<20, MapPartOptions{}, func(_ *MapPart, e error) { err = e })
	if err == nil {
		t.Error("it tells what it was")
	}
}
