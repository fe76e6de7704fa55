package extmap

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"unsafe"
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
	for s := uint64(0); s+5 < x.Sectors(); s += 13 { // from inside extents, and to there
		if e, ok := x.Next(s, s+5); ok && (e.Sector < s || e.End() > s+5 || m.loc[e.Sector] != e.Loc) || !ok && m.loc[s] != 0 {
			t.Fatalf("%+v, %v where sector %d is at %#x", e, ok, s, m.loc[s])
		}
	}
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
// what they are aligned to, and where they are mapped to.
type modelRun struct {
	name  string
	seeds uint64
	steps int
	large int // operations on up to half of the map
	spread,
	length uint64 // sectors
	align uint64
	base  uint64 // locations begin there
	odd   int    // one of that many does not begin a block; 0: it is left to chance
}

// beyond is the first location, but for Fixed, that is too high to be packed.
const beyond = (packedMask + 1<<unitShift) &^ Fixed

// TestAgainstModel drives pages through all their forms.
func TestAgainstModel(t *testing.T) {
	hit := map[[2]string]int{}
	for _, k := range []modelRun{
		{"few", 40, 400, 20, 600, 64, 1, 0, 0},
		{"blocks", 4, 9000, 20, PageSectors, 16, 8, 0, 0},
		{"sectors", 2, 30000, 20, PageSectors, 3, 1, 0, 0},
		{"single sectors", 2, 60000, 3, PageSectors, 1, 1, 0, 0},
		{"blocks, then sectors", 4, 9000, 20, PageSectors, 16, 0, 0, 0},
		{"blocks of blocks", 4, 9000, 20, PageSectors, 16, 8, 0, 4000},
		{"blocks of blocks, then sectors", 4, 9000, 20, PageSectors, 16, 0, 0, 9000},
		{"small blocks of blocks", 4, 9000, 20, PageSectors, 2, 8, 0, 2000},
		{"locations grow too high", 4, 9000, 20, PageSectors, 16, 8, beyond - 9000*60, 1 << 20},
		{"as high as can be", 2, 9000, 20, PageSectors, 16, 8, 1<<62 - 1<<30, 1 << 20},
	} {
		for seed := range k.seeds {
			t.Run(fmt.Sprint(k.name, " ", seed), func(t *testing.T) { againstModel(t, k, seed, hit) })
		}
	}
	for _, want := range [][2]string{
		{"list", "narrow"}, {"list", "wide"}, {"list", "sectors"},
		{"narrow", "wide"}, {"wide", "narrow"},
		{"narrow", "list"}, {"wide", "list"}, {"sectors", "list"},
	} {
		if hit[want] == 0 {
			t.Errorf("no page went from %s to %s", want[0], want[1])
		}
	}
}

// form names a page's form.
func (p *page) form() string {
	switch d := &p.dense; {
	case p.empty():
		return "empty"
	case !p.isArray():
		return "list"
	case d.narrow != nil:
		return "narrow"
	case d.shift == unitShift:
		return "wide"
	}
	return "sectors"
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
	if r.IntN(k.steps/k.large) == 0 {
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

// location returns where data goes of which the last went up to next.
func (k *modelRun) location(r *rand.Rand, next uint64) uint64 {
	if k.odd != 0 {
		next = (next + 7) &^ 7
		if r.IntN(k.odd) == 0 {
			next += 1 + r.Uint64N(7)
		}
	}
	return next
}

func againstModel(t *testing.T, k modelRun, seed uint64, hit map[[2]string]int) {
	r := rand.New(rand.NewPCG(seed, 1))
	size := uint64(2*PageSectors + 128)
	x, m := New(size), &model{loc: make([]uint64, size)}
	var live int
	x.Replaced = func(_ uint64, n uint32) { live -= int(n) }
	var forms [3]string
	note := func() {
		for i := range forms {
			form := "empty"
			if p := x.page(uint64(i)); p != nil {
				form = p.form()
			}
			hit[[2]string{forms[i], form}]++
			forms[i] = form
		}
	}
	next := k.base + 1
	for step := range k.steps {
		s, n := k.place(r, step, size)
		loc := k.location(r, next)
		switch r.IntN(12) {
		case 0:
			x.Remove(s, n)
			for i := range n {
				m.loc[s+i] = 0
			}
		case 1:
			lo := k.base + r.Uint64N(next-k.base+1)
			hi := lo + r.Uint64N(2000)
			x.RemoveRange(s, n, lo, hi)
			for i := s; i < s+n; i++ {
				if l := m.loc[i] &^ Fixed; m.loc[i] != 0 && l >= lo && l < hi {
					m.loc[i] = 0
				}
			}
		case 2:
			x.Insert(s, n, Fixed|loc)
			m.insert(s, n, Fixed|loc)
			live += int(n)
		default:
			x.Insert(s, n, loc)
			m.insert(s, n, loc)
			live += int(n)
		}
		next = loc + n
		if r.IntN(3) > 0 { // else the next one goes on where this one ended
			next++
		}
		if r.IntN(k.steps/10) == 0 {
			x.Compact(0, len(forms))
		}
		note()
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
	x.Insert(0, size, k.base+8) // in place of all
	m.insert(0, size, k.base+8)
	x.Compact(0, len(forms))
	note()
	m.check(t, x)
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

// TestPacked has locations that can just be packed, and just not, go into a narrow
// array.
func TestPacked(t *testing.T) {
	for _, k := range []struct {
		loc, n uint64
		narrow bool
	}{
		{8, 8, true},
		{beyond - 8, 8, true},
		{beyond - 80, 80, true},
		{beyond - 80, 88, false},
		{beyond, 8, false},
		{Fixed, 8, true},
		{Fixed | 8, 80, true},
		{Fixed | beyond - 8, 80, true},
		{Fixed | beyond, 8, false},
		{Fixed | 1, 8, false},
		{1, 8, false},
		{12, 80, false},
		{beyond - 1, 8, false},
		{Fixed - 8, 8, false},
		{Fixed | (Fixed - 8), 8, false},
	} {
		x, m := New(PageSectors), &model{loc: make([]uint64, PageSectors)}
		insert := func(s, n, loc uint64) {
			x.Insert(s, n, loc)
			m.insert(s, n, loc)
		}
		for i := range uint64(pageUnits) {
			insert(i*8, 8, (pageUnits-i)*16)
		}
		if form := x.page(0).form(); form != "narrow" {
			t.Fatalf("a page of blocks became %s", form)
		}
		insert(160, k.n, k.loc)
		if form := x.page(0).form(); (form == "narrow") != k.narrow {
			t.Errorf("%d sectors at %#x make a %s page", k.n, k.loc, form)
		}
		m.check(t, x)
		insert(160, k.n, 1<<30)
		x.Compact(0, 1)
		if form := x.page(0).form(); form != "narrow" {
			t.Errorf("a page that has had %d sectors at %#x stays %s", k.n, k.loc, form)
		}
		m.check(t, x)
	}
}

// TestMemory holds the map to 8 bytes for each 4 KiB: with whole blocks of data, its
// own structures included, and with any locations but for a little for each page.
func TestMemory(t *testing.T) {
	if got := int(unsafe.Sizeof(page{})); got != pageBytes {
		t.Errorf("a page has %d bytes, not %d", got, pageBytes)
	}
	t.Run("blocks", func(t *testing.T) { testMemory(t, 16, 0) })
	t.Run("any", func(t *testing.T) { testMemory(t, 9, pageBytes+blockBytes/blockPages+1) })
}

// testMemory fills a map with locations that are step sectors apart.
func testMemory(t *testing.T, step uint64, more int) {
	const pages = blockPages // a block of the directory is full
	r := rand.New(rand.NewPCG(7, 7))
	m := New(pages * PageSectors)
	check := func() {
		t.Helper()
		// The block of the directory is there before its pages are.
		held := m.dir[0].held
		if limit := held*(PageSectors+more) + blockBytes*(pages-held)/pages; m.Bytes() > limit {
			t.Fatalf("%d bytes, more than 8 for each 4 KiB (%d)", m.Bytes(), limit)
		}
	}
	for i, b := range r.Perm(pages * pageUnits) {
		m.Insert(uint64(b)*8, 8, uint64(i+1)*step)
		if i%5000 == 0 {
			check()
		}
	}
	check()
	t.Logf("%.3f bytes for each 4 KiB", float64(m.Bytes())/(pages*pageUnits))
	for i := range uint64(pages * pageUnits) {
		m.Insert(i*8, 8, i*8+1) // in sequence: one extent a page
	}
	m.Compact(0, pages)
	m.Invariants()
	if m.Bytes() > pages*(pageBytes+4*entryBytes)+blockBytes {
		t.Errorf("%d pages of one extent each take %d bytes", pages, m.Bytes())
	}
}

// ofAllForms returns the i-th of many runs by which the first half of a map's pages
// become narrow arrays, the next quarter wide ones, and the last lists.
func ofAllForms(r *rand.Rand, size, i uint64) (s, n, loc uint64) {
	s, n, loc = r.Uint64N(size/8)*8, 8, 8+i*96
	switch {
	case s >= size*3/4:
		s, n = min(s+3, size-77), 77
	case s >= size/2:
		loc++
	}
	return s, n, loc
}

// TestSpan takes pages out of a map, copies them, and puts them back.
func TestSpan(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	size := uint64(8 * PageSectors)
	x, m := New(size), &model{loc: make([]uint64, size)}
	for i := range uint64(50000) {
		s, n, loc := ofAllForms(r, size, i)
		x.Insert(s, n, loc)
		m.insert(s, n, loc)
	}
	for i, want := range []string{"narrow", "narrow", "narrow", "narrow", "wide", "wide", "list", "list"} {
		if form := x.page(uint64(i)).form(); form != want {
			t.Errorf("page %d is %s, not %s", i, form, want)
		}
	}
	for at := uint64(0); at < size; at += 2 * PageSectors {
		span := x.Copy(at, 2)
		x.Insert(at, 2*PageSectors, 1<<40) // of which the copy knows nothing
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

// TestCopy reads copies on other goroutines while the map changes a little here and
// there in all ways: each copy stays what the map was.
func TestCopy(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	size := uint64(8 * PageSectors)
	x, m := New(size), &model{loc: make([]uint64, size)}
	change := func(i uint64) {
		s, n, loc := ofAllForms(r, size, i)
		switch r.IntN(10) {
		case 0:
			x.Remove(s, n)
			clear(m.loc[s : s+n])
		case 1:
			x.RemoveRange(s, n, 0, 1<<62)
			clear(m.loc[s : s+n])
		case 2:
			x.Compact(s&^(PageSectors-1), 1)
		default:
			x.Insert(s, n, loc)
			m.insert(s, n, loc)
		}
	}
	for i := range uint64(40000) {
		change(i)
	}
	var readers sync.WaitGroup
	for round := range uint64(5) {
		span, was := x.Copy(0, 8), slices.Clone(m.loc)
		readers.Go(func() {
			for s := uint64(0); s < size; {
				e, ok := span.Next(s)
				if !ok {
					e = Extent{Sector: size}
				}
				for ; s < e.Sector; s++ {
					if was[s] != 0 {
						t.Errorf("copy %d has lost sector %d", round, s)
						return
					}
				}
				for ; s < e.End() && s < size; s++ {
					if got := advance(e.Loc, s-e.Sector); got != was[s] {
						t.Errorf("copy %d has sector %d at %d, it was at %d", round, s, got, was[s])
						return
					}
				}
			}
		})
		for i := range uint64(2000) {
			change(1<<20 + round<<16 + i)
		}
		x.Invariants()
		m.check(t, x)
	}
	readers.Wait()
}

func TestNoAllocation(t *testing.T) {
	t.Run("blocks", func(t *testing.T) { testNoAllocation(t, 8) })
	t.Run("any", func(t *testing.T) { testNoAllocation(t, 1) })
}

// testNoAllocation uses locations that are multiples of align.
func testNoAllocation(t *testing.T, align uint64) {
	m := New(1 << 24)
	r := rand.New(rand.NewPCG(1, 2))
	f := func() {
		s := r.Uint64N(1<<15) * 8
		m.Insert(s, 8, align+r.Uint64N(1<<40)&^(align-1))
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

// BenchmarkCopy copies 32 dense pages, a segment of the engine's, of each of which a
// block has changed since, and changes a block of each.
func BenchmarkCopy(b *testing.B) {
	m, loc := New(32*PageSectors), uint64(8)
	change := func(s uint64) {
		m.Insert(s, 8, loc)
		loc += 88
	}
	for i := range uint64(32 * pageUnits) {
		change(i * 8)
	}
	changeAll := func() {
		for i := range uint64(32) {
			change(i * PageSectors)
		}
	}
	b.Run("copy", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			changeAll()
			b.StartTimer()
			m.Compact(0, 32)
			m.Copy(0, 32)
		}
	})
	b.Run("change", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			m.Copy(0, 32)
			b.StartTimer()
			changeAll()
		}
	})
}
