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

// modelRun is one kind of run against the model: how many operations, how long,
// and what they are aligned to.
type modelRun struct {
	name  string
	seeds uint64
	steps int
	spread,
	length uint64 // sectors
	align uint64
}

// TestAgainstModel drives pages through all their forms.
func TestAgainstModel(t *testing.T) {
	for _, k := range []modelRun{
		{"few", 40, 400, 600, 64, 1},
		{"blocks", 4, 9000, PageSectors, 16, 8},
		{"sectors", 2, 30000, PageSectors, 3, 1},
		{"blocks, then sectors", 4, 9000, PageSectors, 16, 0},
	} {
		for seed := range k.seeds {
			t.Run(fmt.Sprint(k.name, " ", seed), func(t *testing.T) { againstModel(t, k, seed) })
		}
	}
}

// place returns where the operation of a step is.
func (k *modelRun) place(r *rand.Rand, step int, size uint64) (s, n uint64) {
	align := k.align
	if align == 0 {
		align = 8
		if step > k.steps*4/5 {
			align = 1
		}
	}
	n = (1 + r.Uint64N(k.length)) * align
	if r.IntN(k.steps/20) == 0 {
		n = 1 + r.Uint64N(size/2)
	}
	base := uint64(0)
	if r.IntN(2) == 0 {
		base = PageSectors - 200 // around a page's edge, where extents meet
	}
	s = min(base+r.Uint64N(k.spread), size-n)
	if k.align != 1 && align == 8 {
		s, n = s&^7, max(n&^7, 8)
	}
	return s, n
}

func againstModel(t *testing.T, k modelRun, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	size := uint64(2*PageSectors + 128)
	x, m := New(size), &model{loc: make([]uint64, size)}
	var live int
	x.Replaced = func(_ uint64, n uint32) { live -= int(n) }
	next := uint64(1)
	for step := range k.steps {
		s, n := k.place(r, step, size)
		switch r.IntN(12) {
		case 0:
			x.Remove(s, n)
			for i := range n {
				m.loc[s+i] = 0
			}
		case 1:
			lo := r.Uint64N(next + 1)
			hi := lo + r.Uint64N(2000)
			x.RemoveRange(s, n, lo, hi)
			for i := s; i < s+n; i++ {
				if l := m.loc[i] &^ Fixed; m.loc[i] != 0 && l >= lo && l < hi {
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
		if step%(k.steps/20) == 0 {
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
}

func count(m *Map) (n int) {
	for s := uint64(0); ; n++ {
		e, ok := m.Next(s, m.Sectors())
		if !ok {
			return n
		}
		s = e.End()
	}
}

func TestMerge(t *testing.T) {
	m := New(1 << 20)
	for i := range uint64(100) {
		m.Insert(1000+8*i, 8, 5000+8*i)
	}
	if n := count(m); n != 1 {
		t.Errorf("100 adjoining extents became %d, want 1", n)
	}
	m.Insert(1008, 8, 5008) // as it was
	if n := count(m); n != 1 {
		t.Errorf("rewriting in place left %d extents, want 1", n)
	}
}

// TestMemory holds the map to 8 bytes for each 4 KiB, and a little for each page.
func TestMemory(t *testing.T) {
	const pages = 64
	r := rand.New(rand.NewPCG(7, 7))
	m := New(pages * PageSectors)
	blocks := r.Perm(pages * PageSectors / 8)
	for i, b := range blocks {
		m.Insert(uint64(b)*8, 8, uint64(i+1)*9)
		if i%5000 == 0 {
			checkMemory(t, m, pages)
		}
	}
	checkMemory(t, m, pages)
	for i := range uint64(pages * PageSectors / 8) {
		m.Insert(i*8, 8, i*8+1) // in sequence: one extent a page
	}
	m.Compact(0, pages)
	m.Invariants()
	if m.Bytes() > pages*(pageBytes+4*entryBytes)+blockBytes {
		t.Errorf("%d pages of one extent each take %d bytes", pages, m.Bytes())
	}
}

func checkMemory(t *testing.T, m *Map, pages int) {
	t.Helper()
	if limit := pages*(pageBytes+PageSectors) + blockBytes; m.Bytes() > limit {
		t.Fatalf("%d bytes, more than 8 for each 4 KiB (%d)", m.Bytes(), limit)
	}
}

// TestSpan takes pages out of a map, copies them, and puts them back.
func TestSpan(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	size := uint64(8 * PageSectors)
	x, m := New(size), &model{loc: make([]uint64, size)}
	for i := range uint64(20000) {
		s, n := r.Uint64N(size/8)*8, uint64(8)
		if i%100 == 0 {
			s, n = min(s+3, size-77), 77
		}
		x.Insert(s, n, 1+i*100)
		m.insert(s, n, 1+i*100)
	}
	for at := uint64(0); at < size; at += 2 * PageSectors {
		span := x.Copy(at, 2)
		built := NewSpan(at, 2)
		for s := at; ; {
			e, ok := span.Next(s)
			if !ok {
				break
			}
			built.Insert(e.Sector, uint64(e.N), e.Loc)
			s = e.End()
		}
		x.Detach(at, 2)
		x.Invariants()
		if e, ok := x.Next(at, at+2*PageSectors); ok {
			t.Fatalf("%+v is there after Detach", e)
		}
		x.Attach(built)
		m.check(t, x)
	}
	for at := uint64(0); at < size; at += 2 * PageSectors {
		x.Detach(at, 2)
	}
	if x.Bytes() != 0 {
		t.Errorf("an empty map holds %d bytes", x.Bytes())
	}
}

func TestNoAllocation(t *testing.T) {
	m := New(1 << 24)
	r := rand.New(rand.NewPCG(1, 2))
	f := func() {
		s := r.Uint64N(1<<15) * 8
		m.Insert(s, 8, 1+r.Uint64N(1<<40))
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
		m.Insert(r.Uint64N(m.Sectors()/8)*8, 8, uint64(i+1)*9)
	}
}

// full returns a map of 16 GiB over all of which blocks have been written at random,
// so that each page is an array.
func full() *Map {
	m := New(16 << 30 / 512)
	r := rand.New(rand.NewPCG(1, 2))
	for i, b := range r.Perm(int(m.Sectors() / 8)) {
		m.Insert(uint64(b)*8, 8, uint64(i+1)*16)
	}
	return m
}

func BenchmarkInsertFull(b *testing.B) {
	m, r := full(), rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		m.Insert(r.Uint64N(m.Sectors()/8)*8, 8, i*16)
	}
}

func BenchmarkLookupFull(b *testing.B) {
	m, r := full(), rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for b.Loop() {
		s := r.Uint64N(m.Sectors()/8) * 8
		if _, ok := m.Next(s, s+8); !ok {
			b.Fatal("a block is not mapped")
		}
	}
}

// BenchmarkScanFull goes over the extents of a page.
func BenchmarkScanFull(b *testing.B) {
	m, r := full(), rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for b.Loop() {
		s := r.Uint64N(m.Sectors()/PageSectors) * PageSectors
		for end := s + PageSectors; s < end; {
			e, _ := m.Next(s, end)
			s = e.End()
		}
	}
}
