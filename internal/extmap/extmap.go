// Package extmap maps runs of sectors to locations.
//
// The address space is cut into pages of PageSectors sectors. A page is held only
// where something is mapped, as a sorted list of extents or, where that would be
// larger, as an array with a location for each block of 4 KiB, and by the side of it
// the pieces of those blocks that do not lie in one piece. Blocks begin in each page
// where most of its extents do. So an insertion's cost is bounded by what one page can
// hold, and a page needs no more than 6 bytes for each block of it, or 8 if locations
// are very large (see packed), and as much and a sixteenth for each of the pieces. A list
// takes 16 bytes for each extent, and less than that array, or not much more; Compact
// makes a list of an array that is twice as large as the list. A directory of two levels
// finds pages. Runs of pages can be taken out of a map, copied and put in as a Span, for
// a map that is written out, loaded and evicted in pieces.
//
// A Map is not safe for concurrent use: the reactor of its image owns it.
package extmap

const (
	// PageSectors is the span of one page: 8 MiB.
	PageSectors = 1 << pageShift
	pageShift   = 14

	blockShift = 9 // pages in one block of the directory
	blockPages = 1 << blockShift
)

// Fixed marks a location that stands for its whole extent: it does not advance
// with the sector, as that of data does.
const Fixed = 1 << 63

// An Extent is a run of sectors and the location of the first. Unless Loc has
// the bit Fixed, sector Sector+i is at Loc+i. No sector of a map has the
// location 0.
type Extent struct {
	Sector uint64
	N      uint32 // sectors, > 0, never across a page's end
	Loc    uint64
}

// End returns the first sector after the extent.
func (e Extent) End() uint64 { return e.Sector + uint64(e.N) }

// from returns the part of e that begins at sector s, which is inside e.
func (e Extent) from(s uint64) Extent {
	d := s - e.Sector
	e.Sector, e.N = s, e.N-uint32(d)
	e.Loc = advance(e.Loc, d)
	return e
}

// advance returns the location n sectors after loc.
func advance(loc, n uint64) uint64 {
	if loc&Fixed != 0 {
		return loc
	}
	return loc + n
}

// block is a part of the directory.
type block struct {
	pages [blockPages]*page
	held  int // pages that are there
}

// A Map holds the extents of one address space.
type Map struct {
	sectors uint64
	dir     []*block
	bytes   int     // of the pages and directory blocks held
	free    []*page // empty pages, kept with their capacity so that steady state does not allocate

	// Replaced, if set, is called for each run of data whose mapping is
	// overwritten or removed. It must not use the map.
	Replaced func(loc uint64, n uint32)
}

// maxFree bounds the empty pages that a map keeps, and maxFreeCap their capacity.
const (
	maxFree    = 1024
	maxFreeCap = 64
)

// New returns an empty map for an image of the given number of sectors.
func New(sectors uint64) *Map {
	span := uint64(PageSectors * blockPages)
	return &Map{sectors: sectors, dir: make([]*block, (sectors+span-1)/span)}
}

// Grow makes the address space one of so many sectors, which are not fewer than it has.
func (m *Map) Grow(sectors uint64) {
	if sectors < m.sectors {
		panic("extmap: a map cannot shrink")
	}
	m.sectors = sectors
	m.dir = append(m.dir, New(sectors).dir[len(m.dir):]...)
}

// Sectors returns the size of the address space.
func (m *Map) Sectors() uint64 { return m.sectors }

// Bytes returns the memory that the map's pages and directory hold.
func (m *Map) Bytes() int { return m.bytes }

func (m *Map) page(i uint64) *page {
	b := m.dir[i>>blockShift]
	if b == nil {
		return nil
	}
	return b.pages[i&(blockPages-1)]
}

// put makes p the page i, which is not there.
func (m *Map) put(i uint64, p *page) {
	b := m.dir[i>>blockShift]
	if b == nil {
		b = new(block)
		m.dir[i>>blockShift] = b
		m.bytes += blockBytes
	}
	b.pages[i&(blockPages-1)] = p
	b.held++
	m.bytes += p.bytes()
}

// take removes the page i, which is there.
func (m *Map) take(i uint64) *page {
	b := m.dir[i>>blockShift]
	p := b.pages[i&(blockPages-1)]
	b.pages[i&(blockPages-1)] = nil
	m.bytes -= p.bytes()
	if b.held--; b.held == 0 {
		m.dir[i>>blockShift] = nil
		m.bytes -= blockBytes
	}
	return p
}

// drop takes an emptied page out of the map. Small ones are kept for reuse; the
// capacity of one that was large goes back to the collector.
func (m *Map) drop(i uint64) {
	p := m.take(i)
	if cap(p.ext) <= maxFreeCap && !p.isArray() && len(m.free) < maxFree {
		m.free = append(m.free, p)
	}
}

// pageForInsert returns the page i, made if it is not there, to be changed.
func (m *Map) pageForInsert(i uint64) *page {
	p := m.page(i)
	if p != nil {
		return m.own(i, p)
	}
	if k := len(m.free); k > 0 {
		p, m.free = m.free[k-1], m.free[:k-1]
	} else {
		p = new(page)
	}
	m.put(i, p)
	return p
}

// own returns the page i, which is p, to be changed: a copy if a Span has it too.
func (m *Map) own(i uint64, p *page) *page {
	if !p.shared() {
		return p
	}
	c := p.clone()
	m.dir[i>>blockShift].pages[i&(blockPages-1)] = c
	m.bytes += c.bytes() - p.bytes()
	return c
}

// check panics unless the n sectors from s lie inside the map: every caller has
// checked a request or decoded an object by then.
func (m *Map) check(s, n uint64) {
	if n > m.sectors || s > m.sectors-n {
		panic("extmap: range outside the map")
	}
}

// Insert maps the n sectors from s to loc, in place of what was mapped there, and reports
// whether sector s was mapped: to look it up before costs about as much as to insert. It is
// false if n is 0.
func (m *Map) Insert(s, n, loc uint64) (was bool) {
	m.check(s, n)
	for first := true; n > 0; first = false {
		off := int(s & (PageSectors - 1))
		k := min(n, uint64(PageSectors-off))
		p := m.pageForInsert(s >> pageShift)
		before := p.bytes()
		had := p.replace(off, off+int(k), loc, m.Replaced)
		was = was || first && had
		m.bytes += p.bytes() - before
		s, n, loc = s+k, n-k, advance(loc, k)
	}
	return was
}

// Remove unmaps the n sectors from s.
func (m *Map) Remove(s, n uint64) {
	m.check(s, n)
	m.eachPage(s, n, func(i uint64, p *page, from, to int) {
		p = m.own(i, p)
		before := p.bytes()
		p.replace(from, to, 0, m.Replaced)
		m.changed(i, p, before)
	})
}

// RemoveRange unmaps, of the n sectors from s, those whose location without the
// bit Fixed is at least lo and less than hi.
func (m *Map) RemoveRange(s, n, lo, hi uint64) {
	m.check(s, n)
	m.eachPage(s, n, func(i uint64, p *page, from, to int) {
		p = m.own(i, p)
		before := p.bytes()
		p.removeRange(from, to, lo, hi, m.Replaced)
		m.changed(i, p, before)
	})
}

// changed accounts for a change of page i, which had the given size before.
func (m *Map) changed(i uint64, p *page, before int) {
	m.bytes += p.bytes() - before
	if p.empty() {
		m.drop(i)
	}
}

// eachPage calls fn for every page that is held and meets the n sectors from s,
// with the range of offsets in it, skipping blocks of the directory that are
// not there. fn does not escape, so this does not allocate.
func (m *Map) eachPage(s, n uint64, fn func(i uint64, p *page, from, to int)) {
	end := s + n
	for s < end {
		i := s >> pageShift
		if m.dir[i>>blockShift] == nil {
			s = (i>>blockShift + 1) << (blockShift + pageShift)
			continue
		}
		next := min((i+1)<<pageShift, end)
		if p := m.page(i); p != nil {
			from := int(s & (PageSectors - 1))
			fn(i, p, from, from+int(next-s))
		}
		s = next
	}
}

// Next returns the first extent that meets [s, end), cut to it, and true; or
// false when nothing there is mapped. It does not allocate.
func (m *Map) Next(s, end uint64) (Extent, bool) {
	end = min(end, m.sectors)
	for s < end {
		i := s >> pageShift
		if m.dir[i>>blockShift] == nil {
			s = (i>>blockShift + 1) << (blockShift + pageShift)
			continue
		}
		next := (i + 1) << pageShift
		if p := m.page(i); p != nil {
			if e, ok := p.next(int(s&(PageSectors-1)), int(min(end, next)-i<<pageShift)); ok {
				e.Sector += i << pageShift
				return e, true
			}
		}
		s = next
	}
	return Extent{}, false
}

// Invariants panics unless the map is well formed. It costs time in proportion
// to the map; tests call it.
func (m *Map) Invariants() {
	bytes := 0
	for bi, b := range m.dir {
		if b == nil {
			continue
		}
		held := 0
		for pi, p := range b.pages {
			if p == nil {
				continue
			}
			held++
			bytes += p.bytes()
			base := uint64(bi)<<(blockShift+pageShift) + uint64(pi)<<pageShift
			p.invariants(int(min(m.sectors-base, PageSectors)))
		}
		if held != b.held || held == 0 {
			panic("extmap: wrong count of pages")
		}
		bytes += blockBytes
	}
	if bytes != m.bytes {
		panic("extmap: wrong count of bytes")
	}
}
