package extmap

import (
	"fmt"
	"math"
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

// into inserts into the model and into the map, which must say what was there.
func (m *model) into(t testing.TB, x *Map, s, n, loc uint64) {
	t.Helper()
	want := n > 0 && m.loc[s] != 0
	if got := x.Insert(s, n, loc); got != want {
		t.Fatalf("sectors [%d, %d): the first one was mapped: %v, want %v", s, s+n, got, want)
	}
	m.insert(s, n, loc)
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
// what they are on, and where they are mapped to.
type modelRun struct {
	name  string
	seeds uint64
	steps int
	large int // operations on up to half of the map
	spread,
	length uint64 // sectors, or blocks
	sectors float64 // share of the operations that are on sectors, not on blocks
	base    uint64  // locations begin there
	odd     int     // one of that many does not begin a block; 0: it is left to chance
	shift   uint64  // blocks begin that many sectors after those of the map; see shiftsLater
}

// shiftsLater, added to a shift, is for blocks that are shifted in the second half only.
const shiftsLater = 8

// blocksFirst is a share that is 0 at first, and 1 in the end.
const blocksFirst = -1

// The first locations, but for Fixed, that are too high to be packed in sectors, and
// in blocks.
const (
	beyondSectors = 1 << packedBits
	beyond        = beyondSectors << unitShift
)

// TestAgainstModel drives pages through all their forms.
func TestAgainstModel(t *testing.T) {
	hit := map[[2]string]int{}
	for _, k := range []modelRun{
		{"few", 40, 400, 20, 600, 64, 1, 0, 0, 0},
		{"blocks", 4, 9000, 20, PageSectors, 16, 0, 0, 0, 0},
		{"sectors", 2, 30000, 20, PageSectors, 3, 1, 0, 0, 0},
		{"single sectors", 2, 60000, 3, PageSectors, 1, 1, 0, 0, 0},
		{"blocks, then sectors", 4, 9000, 20, PageSectors, 16, blocksFirst, 0, 0, 0},
		{"blocks of blocks", 4, 9000, 20, PageSectors, 16, 0, 0, 4000, 0},
		{"blocks of blocks, then sectors", 4, 9000, 20, PageSectors, 16, blocksFirst, 0, 9000, 0},
		{"small blocks of blocks", 4, 9000, 20, PageSectors, 2, 0, 0, 2000, 0},
		{"few sectors among blocks", 4, 9000, 20, PageSectors, 4, 0.003, 0, 0, 0},
		{"many sectors among blocks", 4, 20000, 5, PageSectors, 2, 0.5, 0, 0, 0},
		{"past what is packed in sectors", 4, 9000, 5, PageSectors, 2, 0, beyondSectors - 9000*8, 1 << 20, 0},
		{"the same, few sectors", 4, 9000, 5, PageSectors, 2, 0.003, beyondSectors - 9000*8, 4000, 0},
		{"the same, but not in blocks", 4, 9000, 5, PageSectors, 2, 0, beyondSectors - 9000*8, 4, 0},
		{"past what is packed in blocks", 4, 9000, 5, PageSectors, 2, 0, beyond - 9000*8, 1 << 20, 0},
		{"high blocks, then sectors", 4, 9000, 5, PageSectors, 2, blocksFirst, beyondSectors, 1 << 20, 0},
		{"few sectors, high", 4, 9000, 5, PageSectors, 2, 0.003, beyond, 0, 0},
		{"single sectors, high", 2, 60000, 3, PageSectors, 1, 1, beyond, 0, 0},
		{"as high as can be", 2, 9000, 5, PageSectors, 2, 0, 1<<62 - 1<<30, 1 << 20, 0},
		{"blocks, shifted", 4, 9000, 20, PageSectors, 2, 0, 0, 0, 3},
		{"single blocks, shifted", 8, 12000, 5, PageSectors, 1, 0, 0, 0, 5},
		{"blocks, shifted, then sectors", 4, 9000, 20, PageSectors, 2, blocksFirst, 0, 0, 7},
		{"blocks, shifted later", 4, 20000, 5, PageSectors, 1, 0, 0, 0, shiftsLater + 1},
		{"blocks of blocks, shifted", 4, 9000, 5, PageSectors, 2, 0, 0, 4000, 4},
		{"blocks of blocks, shifted, high", 4, 9000, 5, PageSectors, 2, 0, beyondSectors, 1 << 20, 4},
		{"blocks, shifted, high", 4, 9000, 5, PageSectors, 1, 0, beyond, 0, 2},
		{"past what is packed in sectors, shifted", 4, 9000, 5, PageSectors, 1, 0, beyondSectors - 6000*8, 4, 6},
	} {
		for seed := range k.seeds {
			t.Run(fmt.Sprint(k.name, " ", seed), func(t *testing.T) { againstModel(t, k, seed, hit) })
		}
	}
	for _, want := range [][2]string{
		{"list", "sectors"}, {"list", "blocks"}, {"list", "wide"}, {"list", "odd sectors"}, {"list", "odd wide"},
		{"sectors", "list"}, {"blocks", "list"}, {"wide", "list"}, {"odd sectors", "list"}, {"odd wide", "list"},
		{"sectors", "odd sectors"}, {"odd sectors", "sectors"}, {"wide", "odd wide"}, {"odd wide", "wide"},
		{"sectors", "blocks"}, {"sectors", "wide"}, {"sectors", "odd wide"}, {"odd sectors", "odd wide"},
		{"blocks", "wide"}, {"blocks", "odd wide"}, {"blocks", "odd sectors"},
		{"wide", "sectors"}, {"wide", "blocks"}, {"odd wide", "odd sectors"},
		{"list", "shifted sectors"}, {"list", "shifted odd sectors"}, {"list", "shifted odd wide"},
		{"shifted odd sectors", "shifted odd wide"},
		{"odd sectors", "shifted odd sectors"}, {"shifted odd sectors", "odd sectors"}, {"shifted odd sectors", "list"},
	} {
		if hit[want] == 0 {
			t.Errorf("no page went from %s to %s", want[0], want[1])
		}
	}
}

// form names a page's form.
func (p *page) form() string {
	if p.empty() {
		return "empty"
	}
	if !p.isArray() {
		return "list"
	}
	name := map[coding]string{inSectors: "sectors", inBlocks: "blocks", asIs: "wide"}[p.dense.coding]
	if p.dense.odd != nil {
		name = "odd " + name
	}
	if p.dense.phase != 0 {
		name = "shifted " + name
	}
	return name
}

// place returns where the operation of a step is.
func (k *modelRun) place(r *rand.Rand, step int, size uint64) (s, n uint64) {
	share := k.sectors
	if share == blocksFirst && step <= k.steps*4/5 {
		share = 0
	}
	align := uint64(unitSectors)
	if r.Float64() < math.Abs(share) {
		align = 1
	}
	n = (1 + r.Uint64N(k.length)) * align
	if r.IntN(k.steps/k.large) == 0 {
		n = align + r.Uint64N(size/2)
	}
	base := uint64(0)
	if r.IntN(2) == 0 {
		base = PageSectors - 200 // around a page's edge, where extents meet
	}
	s = min(base+r.Uint64N(k.spread), size-n)
	s, n = s&^(align-1), n&^(align-1)
	if align > 1 && (k.shift < shiftsLater || step > k.steps/2) {
		s = min(s+k.shift%shiftsLater, size-n)
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
	var copied *Span
	var was []uint64
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
			m.into(t, x, s, n, Fixed|loc)
			live += int(n)
		default:
			m.into(t, x, s, n, loc)
			live += int(n)
		}
		if k.shift > 0 && r.IntN(300) == 0 { // both ends of a page, as one
			for _, s := range []uint64{PageSectors, 2*PageSectors - unitSectors} {
				m.into(t, x, s, unitSectors, Fixed|loc)
				live += unitSectors
			}
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
			if at, same := uint64(0), true; copied != nil {
				if at, same = differs(copied, was); !same {
					t.Fatalf("sector %d of a copy has changed", at)
				}
			}
			copied, was = x.Copy(0, len(forms)), slices.Clone(m.loc)
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
	insert := func(s, n, loc uint64) {
		m.into(t, x, s, n, loc)
		note()
	}
	compact := func() {
		x.Compact(0, len(forms))
		note()
		m.check(t, x)
	}
	// From all forms to one extent, or by what can be packed in any way to sectors.
	if seed%3 == 2 {
		insert(0, size, k.base+8)
		compact()
	}
	for s := uint64(0); s < size; s += 8 {
		insert(s, 8, 8+s*2)
	}
	if seed%3 == 1 {
		insert(PageSectors-1, 2, 4)
	}
	compact()
	insert(PageSectors-3, 5, beyond)
	m.check(t, x)
	insert(0, size, k.base+8)
	compact()
}

// TestAroundTheEnd: the last unit of a page whose blocks are shifted has the page's last
// sectors and its first ones, and may be in one piece. It was one for discards of both in
// one record, and the page, when it was to become a list, had no end.
func TestAroundTheEnd(t *testing.T) {
	for shift := uint64(1); shift < unitSectors; shift++ {
		for _, both := range [][2]uint64{{Fixed | 77, Fixed | 77}, {1 << 30, 1<<30 + unitSectors - shift}} {
			size := uint64(3 * PageSectors)
			x, m := New(size), &model{loc: make([]uint64, size)}
			insert := func(s, n, loc uint64) {
				m.into(t, x, s, n, loc)
			}
			for i := range uint64(1000) {
				insert(PageSectors+8+shift+16*i, 8, 1<<20+9*i)
			}
			rest := unitSectors - shift
			insert(2*PageSectors-rest, rest, both[0])
			insert(PageSectors, shift, both[1])
			p := x.page(1)
			if form := p.form(); form != "shifted sectors" {
				t.Fatalf("shift %d: the page is %s", shift, form)
			}
			m.check(t, x)
			x.RemoveRange(0, size, 1<<20, 1<<20+9*1000)
			for i := range m.loc {
				if l := m.loc[i]; l >= 1<<20 && l < 1<<20+9*1000 {
					m.loc[i] = 0
				}
			}
			if form := p.form(); form != "list" {
				t.Errorf("shift %d: the page is %s, emptied", shift, form)
			}
			m.check(t, x)
		}
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
	for i := range uint64(100) {
		m.Insert(3000-8*i, 8, 9000-8*i)
	}
	if n := count(m); n != 2 {
		t.Errorf("100 more, from the last to the first, made it %d, want 2", n)
	}
	m.Insert(1008, 8, 5008) // as it was
	if n := count(m); n != 2 {
		t.Errorf("rewriting in place left %d extents, want 2", n)
	}
}

// TestPacked has locations that can just be packed, and just not, go into a narrow
// array.
func TestPacked(t *testing.T) {
	for _, k := range []struct {
		loc, n uint64
		form   string
	}{
		{1, 8, "sectors"},
		{12, 80, "sectors"},
		{beyondSectors - 8, 8, "sectors"},
		{beyondSectors - 80, 80, "sectors"},
		{beyondSectors - 80, 88, "blocks"},
		{beyondSectors - 7, 8, "wide"},
		{beyondSectors, 8, "blocks"},
		{beyond - 8, 8, "blocks"},
		{beyond - 80, 80, "blocks"},
		{beyond - 80, 88, "wide"},
		{beyond - 7, 8, "wide"},
		{beyond - 1, 8, "wide"},
		{beyond, 8, "wide"},
		{Fixed, 8, "sectors"},
		{Fixed | 1, 8, "sectors"},
		{Fixed | 8, 80, "sectors"},
		{Fixed | beyondSectors - 1, 8, "sectors"},
		{Fixed | beyondSectors, 8, "blocks"},
		{Fixed | beyondSectors + 1, 8, "wide"},
		{Fixed | beyond - 8, 80, "blocks"},
		{Fixed | beyond, 8, "wide"},
		{Fixed - 8, 8, "wide"},
		{Fixed | (Fixed - 8), 8, "wide"},
		{8, 5, "odd sectors"},
		{beyondSectors - 5, 5, "odd sectors"},
		{beyondSectors - 4, 5, "odd wide"},
		{beyondSectors, 5, "odd wide"},
		{Fixed | (Fixed - 8), 5, "odd wide"},
	} {
		x, m := New(PageSectors), &model{loc: make([]uint64, PageSectors)}
		insert := func(s, n, loc uint64) {
			m.into(t, x, s, n, loc)
		}
		for i := range uint64(pageUnits) {
			insert(i*8, 8, (pageUnits-i)*16)
		}
		if form := x.page(0).form(); form != "sectors" {
			t.Fatalf("a page of blocks became %s", form)
		}
		insert(160, k.n, k.loc)
		if form := x.page(0).form(); form != k.form {
			t.Errorf("%d sectors at %#x make a page of the form %s, not %s", k.n, k.loc, form, k.form)
		}
		m.check(t, x)
		insert(160, k.n, 1<<30)
		x.Compact(0, 1)
		if form := x.page(0).form(); form == "wide" {
			t.Errorf("a page that has had %d sectors at %#x stays %s", k.n, k.loc, form)
		}
		m.check(t, x)
	}
}

// memoryPages are the pages of TestMemory.
const memoryPages = 16

// fill writes to a map that has memoryPages; next is called for the location of each
// run.
type fill func(r *rand.Rand, m *Map, next func() uint64)

// runs returns a fill that writes all runs of n sectors, beginning at sector first and
// step sectors apart, in random order.
func runs(n, step, first uint64) fill {
	return func(r *rand.Rand, m *Map, next func() uint64) {
		for _, k := range r.Perm(int(m.Sectors() / step)) {
			s := uint64(k)*step + first
			m.Insert(s, min(n, m.Sectors()-s), next())
		}
	}
}

// unmap returns a fill that unmaps the first n of each step sectors.
func unmap(n, step uint64) fill {
	return func(_ *rand.Rand, m *Map, _ func() uint64) {
		for s := uint64(0); s < m.Sectors(); s += step {
			m.Remove(s, n)
		}
	}
}

// TestMemory holds the map to 8 bytes for each 4 KiB that is written as one, wherever it
// begins, and 8 more for each piece of a block that does not lie in one piece.
func TestMemory(t *testing.T) {
	if got := int(unsafe.Sizeof(page{})); got > pageBytes {
		t.Errorf("a page has %d bytes, not %d", got, pageBytes)
	}
	blocks, sectors := runs(8, 8, 0), runs(1, 1, 0)
	odd := runs(1, PageSectors, 5*8+3) // a sector of each page
	whole := runs(8, PageSectors, 5*8) // its block
	tenth := runs(1, 80, 3)            // a sector of each tenth block
	halves := runs(1, 2, 0)            // every other sector
	shifted := runs(8, 8, 3)           // as of a partition that does not begin at a block
	for _, k := range []struct {
		name      string
		base      uint64 // locations begin there
		step      uint64
		fills     []fill
		most, end float64 // bytes for each 4 KiB: at any time, and after Compact
	}{
		{"blocks", 0, 16, []fill{blocks}, 6.1, 6.1},
		{"blocks, not at blocks of objects", 0, 9, []fill{blocks}, 6.1, 6.1},
		{"blocks, high", beyondSectors, 16, []fill{blocks}, 6.1, 6.1},
		{"blocks, not at blocks, high", beyondSectors, 9, []fill{blocks}, 8.1, 8.1},
		{"a sector of each page, then blocks", 0, 9, []fill{odd, blocks}, 6.7, 6.1},
		{"blocks, then a sector of each page", 0, 9, []fill{blocks, odd}, 6.3, 6.3},
		{"and its block again", 0, 9, []fill{blocks, odd, whole}, 6.3, 6.1},
		{"the same, high", beyondSectors, 9, []fill{blocks, odd, whole}, 8.4, 8.1},
		{"blocks, then a sector of each tenth", 0, 9, []fill{blocks, tenth}, 8.4, 8.4},
		{"every other sector", 0, 9, []fill{halves}, 6.2 + 4*6.6, 6.2 + 4*6.6},
		{"sectors", 0, 3, []fill{sectors}, 8 * 8, 8 * 8},
		{"sectors, high", beyondSectors, 3, []fill{sectors}, 8 + 8*8.6, 8 + 8*8.6},
		{"sectors, then blocks", 0, 9, []fill{sectors, blocks}, 8 * 8, 6.1},
		{"sectors, then most of each block", 0, 9, []fill{sectors, runs(7, 8, 0)}, 8 * 8, 6.3 + 2*6.4},
		{"sectors, then nine blocks in ten", 0, 9, []fill{sectors, runs(72, 80, 0)}, 8 * 8, 6.2 + 0.8*6.8},
		{"sectors, of which one in eight is left", 0, 9, []fill{sectors, unmap(7, 8)}, 8 * 8, 6.2 + 6.8},
		{"blocks, then long runs not at blocks", 0, 9, []fill{blocks, runs(32, 32, 3)}, 10, 4.3},
		{"blocks not at blocks of the disk", 0, 9, []fill{shifted}, 6.5, 6.3},
		{"the same, high", beyondSectors, 9, []fill{shifted}, 8.5, 8.3},
		{"and then at these", 0, 9, []fill{shifted, blocks}, 24, 6.1},
		{"blocks, and then not at these", 0, 9, []fill{blocks, shifted}, 24, 6.3},
	} {
		t.Run(k.name, func(t *testing.T) { testMemory(t, k.base, k.step, k.fills, k.most, k.end) })
	}
}

func testMemory(t *testing.T, base, step uint64, fills []fill, most, end float64) {
	r := rand.New(rand.NewPCG(7, 7))
	m := New(memoryPages * PageSectors)
	peak := 0
	// The pages have their share of a block of the directory that is full.
	each := func(bytes int) float64 {
		return float64(bytes-blockBytes+blockBytes*memoryPages/blockPages) / (memoryPages * pageUnits)
	}
	loc := base
	for _, write := range fills {
		write(r, m, func() uint64 {
			peak = max(peak, m.Bytes())
			loc += step
			return loc
		})
	}
	peak = max(peak, m.Bytes())
	m.Invariants()
	m.Compact(0, memoryPages)
	m.Invariants()
	t.Logf("%6.3f bytes for each 4 KiB, at most %6.3f before; %.2f MiB for each GiB that is mapped",
		each(m.Bytes()), each(peak), float64(m.Bytes()-blockBytes+blockBytes*memoryPages/blockPages)/(1<<20)/mappedGiB(m))
	if each(peak) > most || each(m.Bytes()) > end {
		t.Errorf("that is more than %.3f, or %.3f before", end, most)
	}
	for i := range m.Sectors() / 8 {
		m.Insert(i*8, 8, i*8+1) // in sequence: one extent a page
	}
	m.Compact(0, memoryPages)
	m.Invariants()
	if m.Bytes() > memoryPages*(pageBytes+10*entryBytes)+blockBytes {
		t.Errorf("%d pages of one extent each take %d bytes", memoryPages, m.Bytes())
	}
}

// mappedGiB returns how much of a map is mapped.
func mappedGiB(m *Map) (gib float64) {
	for s := uint64(0); ; {
		e, ok := m.Next(s, m.Sectors())
		if !ok {
			return gib
		}
		gib += float64(e.N) * 512 / (1 << 30)
		s = e.End()
	}
}

// TestEmptied has arrays become lists, and these short, as they are emptied.
func TestEmptied(t *testing.T) {
	m := New(memoryPages * PageSectors)
	r := rand.New(rand.NewPCG(8, 8))
	loc := uint64(0)
	next := func() uint64 { loc += 9; return loc }
	runs(8, 8, 0)(r, m, next)
	runs(1, 80, 3)(r, m, next)
	for k, b := range r.Perm(int(m.Sectors() / 8)) {
		m.Remove(uint64(b)*8, 8)
		if left := int(m.Sectors()/8) - k; m.Bytes() > 5*entryBytes*left+memoryPages*(pageBytes+(maxFreeCap+4)*entryBytes)+blockBytes {
			t.Fatalf("%d bytes for %d blocks that are left", m.Bytes(), left)
		}
	}
	if m.Bytes() != 0 {
		t.Errorf("%d bytes for nothing", m.Bytes())
	}
}

// ofAllForms returns the i-th of many runs by which the eighths of a map's pages
// become arrays of sectors (two), these with odd units (two), wide ones (one), with odd
// units (one), and lists (two).
func ofAllForms(r *rand.Rand, size, i uint64) (s, n, loc uint64) {
	s, n, loc = r.Uint64N(size/8)*8, 8, 8+i*96
	eighth := s * 8 / size
	switch eighth {
	case 4, 5:
		loc += beyond
	case 6, 7:
		s, n = min(s+3, size-77), 77
	}
	if (eighth == 2 || eighth == 3 || eighth == 5) && r.IntN(20) == 0 {
		s, n = s+2, 1+r.Uint64N(6)
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
		m.into(t, x, s, n, loc)
	}
	for i, want := range []string{"sectors", "sectors", "odd sectors", "odd sectors", "wide", "odd wide", "list", "list"} {
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

// differs returns the first sector, if there is one, that is elsewhere in a span than
// in a model's list of locations, and whether there is none.
func differs(span *Span, want []uint64) (at uint64, same bool) {
	for s := uint64(0); s < uint64(len(want)); {
		e, ok := span.Next(s)
		if !ok {
			e = Extent{Sector: uint64(len(want))}
		}
		for ; s < e.Sector; s++ {
			if want[s] != 0 {
				return s, false
			}
		}
		for ; s < e.End() && s < uint64(len(want)); s++ {
			if advance(e.Loc, s-e.Sector) != want[s] {
				return s, false
			}
		}
	}
	return 0, true
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
			m.into(t, x, s, n, loc)
		}
	}
	for i := range uint64(40000) {
		change(i)
	}
	var readers sync.WaitGroup
	for round := range uint64(5) {
		span, was := x.Copy(0, 8), slices.Clone(m.loc)
		readers.Go(func() {
			if s, same := differs(span, was); !same {
				t.Errorf("copy %d differs at sector %d from what was copied", round, s)
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
	t.Run("blocks", func(t *testing.T) { testNoAllocation(t, 8, 8) })
	t.Run("any", func(t *testing.T) { testNoAllocation(t, 1, 8) })
	t.Run("sectors", func(t *testing.T) { testNoAllocation(t, 1, 1) })
}

// testNoAllocation uses locations that are multiples of align, and runs of n sectors.
func testNoAllocation(t *testing.T, align, n uint64) {
	m := New(1 << 24)
	r := rand.New(rand.NewPCG(1, 2))
	f := func() {
		s := r.Uint64N(1<<18/n) * n
		m.Insert(s, n, align+r.Uint64N(1<<40)&^(align-1))
		m.Next(s, s+64)
		m.RemoveRange(r.Uint64N(1<<18/n)*n, n, 0, 1<<39)
	}
	for range 3000000 / n {
		f()
	}
	if n := testing.AllocsPerRun(10000, f); n != 0 {
		t.Errorf("%v allocations each", n)
	}
}

// FuzzMap does what it is told to a map and to a model of it. Four bytes are an
// operation: which, on how much, and where.
func FuzzMap(f *testing.F) {
	comb := []byte{5, 255, 0, 0, 5, 255, 32, 0, 5, 255, 64, 0, 5, 255, 96, 0}
	f.Add(append(slices.Clone(comb), 1, 3, 7, 77, 0, 1, 7, 77, 7, 0, 0, 0))
	f.Add(append(slices.Clone(comb), 9, 3, 7, 77, 3, 255, 0, 9, 6, 0, 0, 0, 8, 200, 1, 1, 6, 0, 0, 0))
	f.Add([]byte{2, 9, 0, 3, 4, 200, 0, 0, 7, 0, 0, 0, 3, 3, 0, 5})
	f.Fuzz(func(t *testing.T, ops []byte) {
		x, m := New(PageSectors+100), &model{loc: make([]uint64, PageSectors+100)}
		var copied *Span
		var was []uint64
		next := uint64(8)
		insert := func(s, n, loc uint64) {
			n = min(n, x.Sectors()-s)
			m.into(t, x, s, n, loc)
			next += n + 8
		}
		for ; len(ops) >= 4 && next < 1<<20; ops = ops[4:] {
			n := uint64(ops[1]) + 1
			s := min((uint64(ops[2])<<8|uint64(ops[3]))%x.Sectors(), x.Sectors()-n)
			switch high := uint64(ops[0]) / 8 % 3 * beyondSectors; ops[0] % 8 {
			case 0: // blocks
				insert(s&^7, n&^7+8, high+next&^7)
			case 1: // sectors
				insert(s, n%8+1, high+next)
			case 2: // one that nothing else has, or one that many have
				loc := high + next
				if ops[0] >= 128 {
					loc = high + 8
				}
				insert(s, n, Fixed|loc)
			case 3:
				x.Remove(s, n)
				clear(m.loc[s : s+n])
			case 4:
				x.RemoveRange(s, n, next/2, next*2)
				for i := s; i < s+n; i++ {
					if l := m.loc[i] &^ Fixed; l >= next/2 && l < next*2 {
						m.loc[i] = 0
					}
				}
			case 5: // many blocks, which may begin anywhere in the map's
				for s = s&^7 + uint64(ops[0])/24%8; n > 0 && s < x.Sectors(); n, s = n-1, s+16 {
					insert(s, 8, high+next&^7)
				}
			case 6:
				copied, was = x.Copy(0, 2), slices.Clone(m.loc)
			case 7:
				x.Compact(0, 2)
			}
			x.Invariants()
		}
		m.check(t, x)
		if copied != nil {
			if s, same := differs(copied, was); !same {
				t.Fatalf("sector %d of a copy has changed", s)
			}
		}
	})
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

func BenchmarkLookupFull(b *testing.B) { benchmarkLookup(b, full()) }

func benchmarkLookup(b *testing.B, m *Map) {
	r := rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for b.Loop() {
		s := r.Uint64N(m.Sectors()/8) * 8
		if _, ok := m.Next(s, s+8); !ok {
			b.Fatal("a block is not mapped")
		}
	}
}

// partlyOdd returns a map of 1 GiB as full is, with sectors written to one in ten blocks.
func partlyOdd() *Map {
	m := New(1 << 30 / 512)
	r := rand.New(rand.NewPCG(1, 2))
	loc := uint64(0)
	next := func() uint64 { loc += 16; return loc }
	runs(8, 8, 0)(r, m, next)
	runs(1, 80, 3)(r, m, next)
	return m
}

func BenchmarkInsertOdd(b *testing.B) {
	m, r := partlyOdd(), rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		if s := r.Uint64N(m.Sectors()/8) * 8; i%10 == 0 {
			m.Insert(s+i%7, 1, i*16)
		} else {
			m.Insert(s, 8, i*16)
		}
	}
}

func BenchmarkLookupOdd(b *testing.B) { benchmarkLookup(b, partlyOdd()) }

// BenchmarkInsertSectors inserts at random sectors of 128 MiB.
func BenchmarkInsertSectors(b *testing.B) {
	m, r := New(1<<27/512), rand.New(rand.NewPCG(3, 4))
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		m.Insert(r.Uint64N(m.Sectors()), 1, i*3)
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
