package extmap

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// model maps each sector by itself.
type model struct {
	loc []uint64 // 0: unmapped
}

func (m *model) insert(s, n, loc uint64) {
	for i := range n {
		m.loc[s+i] = loc
		if loc&Fixed == 0 {
			m.loc[s+i] += i
		}
	}
}

func (m *model) check(t *testing.T, x *Map) {
	t.Helper()
	x.Invariants()
	s := uint64(0)
	for s < x.Sectors() {
		e, ok := x.Next(s, x.Sectors())
		stop := x.Sectors()
		if ok {
			stop = e.Sector
		}
		for ; s < stop; s++ {
			if m.loc[s] != 0 {
				t.Fatalf("sector %d unmapped, want %#x", s, m.loc[s])
			}
		}
		if !ok {
			return
		}
		for ; s < e.End(); s++ {
			want := e.Loc
			if want&Fixed == 0 {
				want += s - e.Sector
			}
			if m.loc[s] != want {
				t.Fatalf("sector %d at %#x, want %#x", s, want, m.loc[s])
			}
		}
	}
}

func TestAgainstModel(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			size := uint64(2*PageSectors + 100)
			x, m := New(size), &model{loc: make([]uint64, size)}
			var live int
			x.Replaced = func(_ uint64, n uint32) { live -= int(n) }
			next := uint64(1)
			for step := range 400 {
				n := 1 + r.Uint64N(64)
				if r.IntN(20) == 0 {
					n = 1 + r.Uint64N(size/2)
				}
				base := uint64(0)
				if r.IntN(2) == 0 {
					base = PageSectors - 200 // around a page's edge, where extents meet
				}
				s := min(base+r.Uint64N(600), size-n)
				switch r.IntN(8) {
				case 0:
					x.Remove(s, n)
					for i := range n {
						m.loc[s+i] = 0
					}
				case 1:
					lo := r.Uint64N(next + 1)
					hi := lo + r.Uint64N(2000)
					// The range is judged at extents' starts, so the model does it through Next.
					var cut []Extent
					for a := s; a < s+n; {
						e, ok := x.Next(a, s+n)
						if !ok {
							break
						}
						full, _ := x.Next(e.Sector&^(PageSectors-1), size) // start of page
						for full.End() <= e.Sector {
							full, _ = x.Next(full.End(), size)
						}
						if l := full.Loc &^ Fixed; l >= lo && l < hi {
							cut = append(cut, e)
						}
						a = e.End()
					}
					x.RemoveRange(s, n, lo, hi)
					for _, e := range cut {
						for i := e.Sector; i < e.End(); i++ {
							m.loc[i] = 0
						}
					}
				case 2:
					x.Insert(s, n, Fixed|next)
					m.insert(s, n, Fixed|next)
					live += int(n)
				default:
					x.Insert(s, n, next)
					m.insert(s, n, next)
					live += int(n)
				}
				if r.IntN(3) > 0 { // else the next one goes on where this one ended
					next += n + 1
				} else {
					next += n
				}
				if step%20 == 0 {
					m.check(t, x)
				}
			}
			m.check(t, x)
			held := 0
			for _, l := range m.loc {
				if l != 0 {
					held++
				}
			}
			if held != live {
				t.Errorf("Replaced accounts for %d live sectors, want %d", live, held)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	m := New(1 << 20)
	for i := range uint64(100) {
		m.Insert(1000+8*i, 8, 5000+8*i)
	}
	if m.Len() != 1 {
		t.Errorf("100 adjoining extents became %d, want 1", m.Len())
	}
	m.Insert(1008, 8, 5008) // as it was
	if m.Len() != 1 {
		t.Errorf("rewriting in place left %d extents, want 1", m.Len())
	}
}

func TestNoAllocation(t *testing.T) {
	m := New(1 << 24)
	r := rand.New(rand.NewPCG(1, 2))
	f := func() {
		s := r.Uint64N(1<<15) * 8
		m.Insert(s, 8, r.Uint64N(1<<40))
		m.Next(s, s+64)
		m.RemoveRange(r.Uint64N(1<<15)*8, 8, 0, 1<<39)
	}
	for range 300000 {
		f()
	}
	if n := testing.AllocsPerRun(10000, f); n != 0 {
		t.Errorf("%v allocations each", n)
	}
}

func BenchmarkInsertRandom4K(b *testing.B) {
	m := New(64 << 30 / 512)
	r := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		m.Insert(r.Uint64N(m.Sectors()/8)*8, 8, uint64(i)*9)
	}
}
