package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// sizedBranches is branches whose size changes as well.
type sizedBranches struct {
	*branches
	blocks uint64            // of the image now
	sizes  map[string]uint64 // of its snapshots, in blocks
}

// stretch returns one of the blocks from which on n of them can be written, or false.
func (b *sizedBranches) stretch(n uint64) (first uint64, ok bool) {
	first = b.blockAt()
	return first, first+n <= b.blocks
}

func (b *sizedBranches) step() {
	n := 1 + b.rng.Uint64N(60)
	first, ok := b.stretch(n)
	switch k := b.rng.IntN(20); {
	case k < 8 && ok:
		for k := range n {
			b.value++
			b.mustWrite(first+k, b.value)
			b.now[first+k] = b.value
		}
	case k < 9 && ok:
		b.mustDiscard(first, n)
		for k := range n {
			delete(b.now, first+k)
		}
	case k < 11:
		b.mustDestage()
	case k < 12:
		b.mustCheckpoint()
	case k < 13:
		for range 80 { // as many objects, which the cleaner puts together
			n, ok := b.stretch(1)
			if !ok {
				continue
			}
			b.value++
			b.mustWrite(n, b.value)
			b.now[n] = b.value
			b.mustDestage()
		}
		b.run(3 * leftoverGrace)
	case k < 16:
		b.resize(b.blockAt())
	case k < 18 && len(b.states) < 8:
		name := fmt.Sprint("s", b.value, "-", b.blocks)
		if b.states[name] == nil {
			b.ids[name] = mustSnap(b.t, b.st, b.id, name, b.host).ID
			b.states[name], b.sizes[name] = maps.Clone(b.now), b.blocks
		}
	case k < 19 && len(b.states) > 0:
		to := b.some()
		b.reopen(to)
		b.blocks = b.sizes[to]
	default:
		b.reopen("")
	}
}

// resize gives the image so many blocks.
func (b *sizedBranches) resize(blocks uint64) {
	switch {
	case blocks < b.blocks:
		b.mustShrink(blocks * objectBlock)
		maps.DeleteFunc(b.now, func(k, _ uint64) bool { return k >= blocks })
	case blocks > b.blocks && b.rng.IntN(2) == 0:
		b.reopen("")
		b.mustClose()
		mustGrow(b.t, b.st, b.id, blocks*objectBlock, nil)
		b.mustAttach(b.id)
		b.settings()
	case blocks > b.blocks:
		mustGrow(b.t, b.st, b.id, blocks*objectBlock, b.host)
	}
	b.blocks = blocks
}

// TestDiffRandomSizes is TestDiffRandom of an image whose size changes: what the first state
// has beyond the end of the second is cut off, and beyond its own end it has nothing.
func TestDiffRandomSizes(t *testing.T) {
	seeds := 10
	if testing.Short() {
		seeds = 1
	}
	for seed := range uint64(seeds) {
		st := mem.New()
		const blocks = 300 << 20 / objectBlock
		h, id := attached(t, st, CreateOptions{Size: blocks * objectBlock, ObjectSize: MinObjectSize}, nil)
		b := &sizedBranches{branches: &branches{host: h, t: t, rng: rand.New(rand.NewPCG(seed, 10)), id: id, now: map[uint64]uint64{},
			states: map[string]map[uint64]uint64{}, ids: map[string]uuid.UUID{}}, blocks: blocks, sizes: map[string]uint64{}}
		b.settings()
		for range 100 + b.rng.IntN(100) {
			b.step()
		}
		b.mustDestage()
		views := map[string]*View{"": nil, "now": mustView(t, st, id, uuid.Nil)}
		b.states["now"], b.sizes["now"] = b.now, b.blocks
		for name, id := range b.ids {
			views[name] = mustView(t, st, b.id, id)
		}
		for from, a := range views {
			for to, z := range views {
				if z == nil {
					continue
				}
				if z.Size() != b.sizes[to]*objectBlock {
					t.Fatalf("seed %d: %s has %d bytes, want %d", seed, to, z.Size(), b.sizes[to]*objectBlock)
				}
				was := maps.Clone(b.states[from])
				maps.DeleteFunc(was, func(k, _ uint64) bool { return k >= b.sizes[to] })
				b.compare(a, z, was, b.states[to])
			}
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
