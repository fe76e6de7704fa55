package extmap

// The forms of a page: a list of extents up to maxList of them, then an array
// over blocks if all extents are whole blocks, else a list up to maxMixed, then an
// array over sectors. Each is where the next form is not larger.
const (
	unitShift = 3 // sectors in a block of the array form, 4 KiB
	maxList   = PageSectors >> unitShift / 2
	maxMixed  = PageSectors / 2

	// Memory, as Bytes counts it.
	entryBytes = 16
	unitBytes  = 8
	pageBytes  = 56
	blockBytes = blockPages*8 + 8
)

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
	e.loc = advance(e.loc, uint64(d))
	return e
}

// page holds the extents of PageSectors sectors, in one of two forms.
type page struct {
	ext []entry // sorted by off, not overlapping, neighbours merged where they can be

	// dense, if not nil, is used instead: the location of each unit of 1<<shift
	// sectors, 0 where none is mapped.
	dense []uint64
	shift uint8
	used  uint16 // units that are mapped
}

// bytes returns the memory that the page takes.
func (p *page) bytes() int { return pageBytes + cap(p.ext)*entryBytes + cap(p.dense)*unitBytes }

func (p *page) empty() bool { return len(p.ext) == 0 && p.used == 0 }

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

// replace maps [from, to) to loc, or unmaps it if loc is 0, and calls replaced, if
// it is not nil, for what was mapped there.
func (p *page) replace(from, to int, loc uint64, replaced func(uint64, uint32)) {
	if p.dense != nil && (from|to)&(1<<p.shift-1) != 0 {
		p.toList()
	}
	if p.dense != nil {
		p.replaceDense(from, to, loc, replaced)
		return
	}
	p.replaceList(from, to, loc, replaced)
}

func (p *page) replaceDense(from, to int, loc uint64, replaced func(uint64, uint32)) {
	unit := uint64(1) << p.shift
	if replaced != nil {
		for at := from; at < to; {
			e, ok := p.next(at, to)
			if !ok {
				break
			}
			replaced(e.Loc, e.N)
			at = int(e.End())
		}
	}
	for u := from >> p.shift; u < to>>p.shift; u++ {
		switch {
		case p.dense[u] == 0 && loc != 0:
			p.used++
		case p.dense[u] != 0 && loc == 0:
			p.used--
		}
		p.dense[u] = loc
		if loc != 0 {
			loc = advance(loc, unit)
		}
	}
}

func (p *page) replaceList(from, to int, loc uint64, replaced func(uint64, uint32)) {
	i := p.search(from)
	j := i
	var put [3]entry // left rest, the new one, right rest
	k := 0
	for j < len(p.ext) && int(p.ext[j].off) < to {
		old := p.ext[j]
		if int(old.off) < from {
			left := old
			left.n = uint16(from - int(old.off))
			put[k], k = left, k+1
		}
		if replaced != nil {
			a, b := max(int(old.off), from), min(old.end(), to)
			replaced(old.tail(a).loc, uint32(b-a))
		}
		j++
	}
	var right entry
	hasRight := j > i && p.ext[j-1].end() > to
	if hasRight {
		right = p.ext[j-1].tail(to)
	}
	if loc != 0 {
		e := entry{loc: loc, off: uint16(from), n: uint16(to - from)}
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
	p.splice(i, j, put[:k])
}

// removeRange unmaps, in [from, to), what has a location from lo to hi.
func (p *page) removeRange(from, to int, lo, hi uint64, replaced func(uint64, uint32)) {
	for at := from; at < to; {
		e, ok := p.next(at, to)
		if !ok {
			return
		}
		at = int(e.End())
		a, b := uint64(0), uint64(e.N) // the part of e to be unmapped
		if l := e.Loc &^ Fixed; e.Loc&Fixed != 0 {
			if l < lo || l >= hi {
				continue
			}
		} else {
			a, b = max(lo, l)-l, min(max(hi, l)-l, b)
		}
		if a < b {
			p.replace(int(e.Sector+a), int(e.Sector+b), 0, replaced)
		}
	}
}

// follows reports whether b goes on where a ends, in sectors and location.
func follows(a, b entry) bool {
	return a.end() == int(b.off) && advance(a.loc, uint64(a.n)) == b.loc
}

// splice replaces p.ext[i:j] by put, and changes the page's form if the list
// becomes too long.
func (p *page) splice(i, j int, put []entry) {
	d := len(put) - (j - i)
	n := len(p.ext)
	switch {
	case d > 0:
		p.grow(n + d)
		p.ext = p.ext[:n+d]
		copy(p.ext[j+d:], p.ext[j:n])
	case d < 0:
		copy(p.ext[j+d:], p.ext[j:])
		p.ext = p.ext[:n+d]
	}
	copy(p.ext[i:], put)
	if n+d > maxMixed {
		p.toArray(0)
	} else if n+d > maxList && n <= maxList && p.wholeUnits() {
		p.toArray(unitShift)
	}
}

// grow makes room for n entries. It grows by a quarter only: half the memory of a
// map would be spare room otherwise.
func (p *page) grow(n int) {
	if n <= cap(p.ext) {
		return
	}
	c := n + n/4 + 2
	if n <= maxList {
		c = min(c, maxList)
	}
	ext := make([]entry, len(p.ext), c)
	copy(ext, p.ext)
	p.ext = ext
}

// wholeUnits reports whether all extents are whole blocks.
func (p *page) wholeUnits() bool {
	var all uint16
	for _, e := range p.ext {
		all |= e.off | e.n
	}
	return all&(1<<unitShift-1) == 0
}

// toArray changes the page's form to an array over units of 1<<shift sectors.
func (p *page) toArray(shift uint8) {
	ext := p.ext
	p.ext, p.dense, p.shift, p.used = nil, make([]uint64, PageSectors>>shift), shift, 0
	for _, e := range ext {
		p.replaceDense(int(e.off), e.end(), e.loc, nil)
	}
}

// toList changes the page's form from an array to a list.
func (p *page) toList() {
	ext := make([]entry, 0, p.count()+2)
	for at := 0; ; {
		e, ok := p.next(at, PageSectors)
		if !ok {
			break
		}
		ext = append(ext, entry{loc: e.Loc, off: uint16(e.Sector), n: uint16(e.N)})
		at = int(e.End())
	}
	p.ext, p.dense, p.shift, p.used = ext, nil, 0, 0
}

// compact changes an array back to a list where that is much smaller.
func (p *page) compact() {
	if p.dense != nil && p.count()*entryBytes < len(p.dense)*unitBytes/4 {
		p.toList()
	}
}

// count returns the number of extents.
func (p *page) count() int {
	if p.dense == nil {
		return len(p.ext)
	}
	n := 0
	for at := 0; ; n++ {
		e, ok := p.next(at, PageSectors)
		if !ok {
			return n
		}
		at = int(e.End())
	}
}

// next returns the first extent that meets [at, end), cut to it, with its sector
// counted from the page's start.
func (p *page) next(at, end int) (Extent, bool) {
	if p.dense != nil {
		return p.nextDense(at, end)
	}
	k := p.search(at)
	if k == len(p.ext) || int(p.ext[k].off) >= end {
		return Extent{}, false
	}
	e := p.ext[k]
	x := Extent{Sector: uint64(e.off), N: uint32(e.n), Loc: e.loc}
	if int(e.off) < at {
		x = x.from(uint64(at))
	}
	x.N = min(x.N, uint32(end)-uint32(x.Sector))
	return x, true
}

func (p *page) nextDense(at, end int) (Extent, bool) {
	u := at >> p.shift
	for u < len(p.dense) && p.dense[u] == 0 {
		u++
	}
	if u<<p.shift >= end {
		return Extent{}, false
	}
	unit := uint64(1) << p.shift
	e := Extent{Sector: uint64(u) << p.shift, Loc: p.dense[u]}
	want := e.Loc
	for u < len(p.dense) && u<<p.shift < end && p.dense[u] == want {
		want = advance(want, unit)
		u++
	}
	e.N = uint32(u<<p.shift - int(e.Sector))
	if int(e.Sector) < at {
		e = e.from(uint64(at))
	}
	e.N = min(e.N, uint32(end)-uint32(e.Sector))
	return e, true
}

// invariants panics unless the page is well formed and lies inside its first
// limit sectors.
func (p *page) invariants(limit int) {
	if p.empty() {
		panic("extmap: an empty page is held")
	}
	used := uint16(0)
	for u, loc := range p.dense {
		if loc != 0 {
			used++
			if (u+1)<<p.shift > limit {
				panic("extmap: bad unit")
			}
		}
	}
	if used != p.used || p.dense != nil && p.ext != nil {
		panic("extmap: wrong count of units")
	}
	for k, e := range p.ext {
		if e.n == 0 || e.loc == 0 || e.end() > limit {
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
