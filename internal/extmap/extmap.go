// Package extmap maps runs of sectors to locations.
//
// The address space is cut into pages of PageSectors sectors. A page is a
// sorted list of extents, held only where something is mapped; a directory of
// two levels finds it. This keeps an insertion's cost bounded by what one page
// can hold, whatever the size of the image, and makes the page the unit in
// which a map can be written out, loaded and evicted.
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
// the bit Fixed, sector Sector+i is at Loc+i.
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
	if e.Loc&Fixed == 0 {
		e.Loc += d
	}
	return e
}

// entry is an extent inside a page. Its two offsets fit 16 bits because a page
// has no more than 1<<14 sectors.
type entry struct {
	loc    uint64
	off, n uint16
}

func (e entry) end() int { return int(e.off) + int(e.n) }

// tail returns the part of e from off on, which is inside e.
func (e entry) tail(off int) entry {
	d := off - int(e.off)
	e.off, e.n = uint16(off), e.n-uint16(d)
	if e.loc&Fixed == 0 {
		e.loc += uint64(d)
	}
	return e
}

type page struct {
	ext []entry // sorted by off, not overlapping, neighbours merged where they can be
}

type block [blockPages]*page

// A Map holds the extents of one address space.
type Map struct {
	sectors uint64
	dir     []*block
	extents int
	free    []*page // empty pages, kept with their capacity so that steady state does not allocate

	// Replaced, if set, is called for each run of data whose mapping is
	// overwritten or removed. It must not use the map.
	Replaced func(loc uint64, n uint32)
}

// New returns an empty map for an image of the given number of sectors.
func New(sectors uint64) *Map {
	span := uint64(PageSectors * blockPages)
	return &Map{sectors: sectors, dir: make([]*block, (sectors+span-1)/span)}
}

// Sectors returns the size of the address space.
func (m *Map) Sectors() uint64 { return m.sectors }

// Len returns the number of extents; one that crosses pages counts once a page.
func (m *Map) Len() int { return m.extents }

func (m *Map) page(i uint64) *page {
	b := m.dir[i>>blockShift]
	if b == nil {
		return nil
	}
	return b[i&(blockPages-1)]
}

func (m *Map) pageForInsert(i uint64) *page {
	b := m.dir[i>>blockShift]
	if b == nil {
		b = new(block)
		m.dir[i>>blockShift] = b
	}
	p := b[i&(blockPages-1)]
	if p == nil {
		if k := len(m.free); k > 0 {
			p, m.free = m.free[k-1], m.free[:k-1]
		} else {
			p = new(page)
		}
		b[i&(blockPages-1)] = p
	}
	return p
}

// drop takes an emptied page out of the directory. Small ones are kept for
// reuse; the capacity of one that was large goes back to the collector.
func (m *Map) drop(i uint64, p *page) {
	m.dir[i>>blockShift][i&(blockPages-1)] = nil
	if cap(p.ext) <= 256 && len(m.free) < 1024 {
		m.free = append(m.free, p)
	}
}

// check panics unless the n sectors from s lie inside the map: every caller has
// checked a request or decoded an object by then.
func (m *Map) check(s, n uint64) {
	if n > m.sectors || s > m.sectors-n {
		panic("extmap: range outside the map")
	}
}

// Insert maps the n sectors from s to loc, in place of what was mapped there.
func (m *Map) Insert(s, n, loc uint64) {
	m.check(s, n)
	for n > 0 {
		off := int(s & (PageSectors - 1))
		k := min(n, uint64(PageSectors-off))
		m.replace(m.pageForInsert(s>>pageShift), off, off+int(k), entry{loc: loc, off: uint16(off), n: uint16(k)}, true)
		s, n = s+k, n-k
		if loc&Fixed == 0 {
			loc += k
		}
	}
}

// Remove unmaps the n sectors from s.
func (m *Map) Remove(s, n uint64) {
	m.check(s, n)
	m.eachPage(s, n, func(i uint64, p *page, from, to int) {
		m.replace(p, from, to, entry{}, false)
		if len(p.ext) == 0 {
			m.drop(i, p)
		}
	})
}

// RemoveRange unmaps, of the n sectors from s, those whose location without the
// bit Fixed was, at the start of their extent, at least lo and less than hi.
func (m *Map) RemoveRange(s, n, lo, hi uint64) {
	m.check(s, n)
	m.eachPage(s, n, func(i uint64, p *page, from, to int) {
		k := p.search(from)
		for k < len(p.ext) && int(p.ext[k].off) < to {
			e := p.ext[k]
			if l := e.loc &^ Fixed; l < lo || l >= hi {
				k++
				continue
			}
			a, b := max(int(e.off), from), min(e.end(), to)
			before := len(p.ext)
			m.replace(p, a, b, entry{}, false)
			// What is left of e on either side stays at k; go past it.
			k += 1 + len(p.ext) - before
		}
		if len(p.ext) == 0 {
			m.drop(i, p)
		}
	})
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

// search returns the index of the first entry that ends after off.
func (p *page) search(off int) int {
	lo, hi := 0, len(p.ext)
	for lo < hi {
		h := int(uint(lo+hi) >> 1)
		if p.ext[h].end() <= off {
			lo = h + 1
		} else {
			hi = h
		}
	}
	return lo
}

// replace removes from p what is mapped in [from, to) and, if insert, puts e,
// which covers just that, in its place, merged with its neighbours if they go on
// from one another.
func (m *Map) replace(p *page, from, to int, e entry, insert bool) {
	i := p.search(from)
	j := i
	var put [3]entry // left rest, e, right rest
	k := 0
	for j < len(p.ext) && int(p.ext[j].off) < to {
		old := p.ext[j]
		if int(old.off) < from {
			left := old
			left.n = uint16(from - int(old.off))
			put[k], k = left, k+1
		}
		if m.Replaced != nil {
			a, b := max(int(old.off), from), min(old.end(), to)
			m.Replaced(old.tail(a).loc, uint32(b-a))
		}
		j++
	}
	var right entry
	hasRight := j > i && p.ext[j-1].end() > to
	if hasRight {
		right = p.ext[j-1].tail(to)
	}
	if insert {
		// Merge to the left: with the rest just cut, or the entry before.
		switch {
		case k == 1 && follows(put[0], e):
			put[0].n += e.n
		case k == 0 && i > 0 && follows(p.ext[i-1], e):
			i--
			put[0], k = p.ext[i], 1
			put[0].n += e.n
		default:
			put[k], k = e, k+1
		}
		// Merge to the right.
		last := &put[k-1]
		switch {
		case hasRight && follows(*last, right):
			last.n += right.n
			hasRight = false
		case !hasRight && j < len(p.ext) && follows(*last, p.ext[j]):
			last.n += p.ext[j].n
			j++
		}
	}
	if hasRight {
		put[k], k = right, k+1
	}
	m.extents += k - (j - i)
	p.splice(i, j, put[:k])
}

// follows reports whether b goes on where a ends, in sectors and location.
func follows(a, b entry) bool {
	if a.end() != int(b.off) || (a.loc^b.loc)&Fixed != 0 {
		return false
	}
	if a.loc&Fixed != 0 {
		return a.loc == b.loc
	}
	return a.loc+uint64(a.n) == b.loc
}

// splice replaces p.ext[i:j] by put.
func (p *page) splice(i, j int, put []entry) {
	d := len(put) - (j - i)
	n := len(p.ext)
	switch {
	case d > 0:
		for range d {
			p.ext = append(p.ext, entry{})
		}
		copy(p.ext[j+d:], p.ext[j:n])
	case d < 0:
		copy(p.ext[j+d:], p.ext[j:])
		p.ext = p.ext[:n+d]
	}
	copy(p.ext[i:], put)
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
			off := int(s & (PageSectors - 1))
			if k := p.search(off); k < len(p.ext) {
				e := p.ext[k]
				x := Extent{Sector: i<<pageShift + uint64(e.off), N: uint32(e.n), Loc: e.loc}
				if x.Sector >= end {
					return Extent{}, false
				}
				if x.Sector < s {
					x = x.from(s)
				}
				if x.End() > end {
					x.N = uint32(end - x.Sector)
				}
				return x, true
			}
		}
		s = next
	}
	return Extent{}, false
}

// Invariants panics unless the map is well formed. It costs time in proportion
// to the map; tests call it.
func (m *Map) Invariants() {
	total := 0
	for bi, b := range m.dir {
		if b == nil {
			continue
		}
		for pi, p := range b {
			if p == nil {
				continue
			}
			total += len(p.ext)
			for k, e := range p.ext {
				at := uint64(bi)<<(blockShift+pageShift) + uint64(pi)<<pageShift + uint64(e.end())
				if e.n == 0 || e.end() > PageSectors || at > m.sectors {
					panic("extmap: bad entry")
				}
				if k > 0 && p.ext[k-1].end() > int(e.off) {
					panic("extmap: entries overlap or are out of order")
				}
				if k > 0 && follows(p.ext[k-1], e) {
					panic("extmap: entries not merged")
				}
			}
		}
	}
	if total != m.extents {
		panic("extmap: wrong count")
	}
}
