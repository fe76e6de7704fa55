package extmap

import "slices"

// The forms of a page: a list of extents, then an array over blocks if all extents
// are whole blocks, a narrow one if all locations fit it, else an array over
// sectors. A list goes on to where the array that can take its place is not larger.
const (
	unitShift = 3 // sectors in a block of the array form, 4 KiB
	pageUnits = PageSectors >> unitShift

	maxNarrow = pageUnits * packedBytes / entryBytes
	maxWide   = pageUnits * wideBytes / entryBytes
	maxMixed  = PageSectors * wideBytes / entryBytes

	// Memory, as Bytes counts it.
	entryBytes  = 16
	packedBytes = 6
	wideBytes   = 8
	pageBytes   = 64
	blockBytes  = blockPages*8 + 8
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
	ext   []entry // sorted by off, not overlapping, neighbours merged where they can be
	dense array   // if there is one, it is used instead
}

// shared reports whether a Map and a Span have this page, or had: then nobody changes
// it any more.
func (p *page) shared() bool { return p.dense.shared }

// clone returns a copy that nobody else has.
func (p *page) clone() *page { return &page{ext: slices.Clone(p.ext), dense: p.dense.clone()} }

// bytes returns the memory that the page takes.
func (p *page) bytes() int {
	return pageBytes + cap(p.ext)*entryBytes + p.dense.bytes()
}

func (p *page) empty() bool { return len(p.ext) == 0 && p.dense.used == 0 }

// isArray reports which form the page has.
func (p *page) isArray() bool { return p.dense.narrow != nil || p.dense.wide != nil }

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
	if p.isArray() && (from|to)&(1<<p.dense.shift-1) != 0 {
		p.toList()
	}
	if p.isArray() {
		p.replaceDense(from, to, loc, replaced)
		return
	}
	p.replaceList(from, to, loc, replaced)
}

func (p *page) replaceDense(from, to int, loc uint64, replaced func(uint64, uint32)) {
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
	d := &p.dense
	if d.narrow != nil && !runFits(loc, uint64(to-from)) {
		d.convert(false)
	}
	for u := from >> d.shift; u < to>>d.shift; u++ {
		d.set(u, loc)
		if loc != 0 {
			loc = advance(loc, 1<<d.shift)
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
	// Whether the extents would do for an array over blocks is looked at only
	// where one becomes no larger than the list: it takes a pass over them.
	switch n, was := n+d, n; {
	case n > maxMixed:
		p.toArray(0, false)
	case n > maxWide && was <= maxWide && p.wholeUnits():
		p.toArray(unitShift, p.fit())
	case n > maxNarrow && was <= maxNarrow && p.wholeUnits() && p.fit():
		p.toArray(unitShift, true)
	}
}

// grow makes room for n entries. It grows by a quarter only: half the memory of a
// map would be spare room otherwise.
func (p *page) grow(n int) {
	if n <= cap(p.ext) {
		return
	}
	c := n + n/4 + 2
	switch {
	case n <= maxNarrow:
		c = min(c, maxNarrow)
	case n <= maxWide:
		c = min(c, maxWide)
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

// fit reports whether the locations of all extents, which are whole blocks, can be
// packed.
func (p *page) fit() bool {
	for _, e := range p.ext {
		if !runFits(e.loc, uint64(e.n)) {
			return false
		}
	}
	return true
}

// toArray changes the page's form to an array over units of 1<<shift sectors.
func (p *page) toArray(shift uint8, narrow bool) {
	ext := p.ext
	p.ext, p.dense = nil, makeArray(shift, narrow)
	for _, e := range ext {
		p.replaceDense(int(e.off), e.end(), e.loc, nil)
	}
}

// toList changes the page's form from an array to a list.
func (p *page) toList() {
	ext := make([]entry, 0, p.dense.count(PageSectors)+2)
	for at := 0; ; {
		e, ok := p.next(at, PageSectors)
		if !ok {
			break
		}
		ext = append(ext, entry{loc: e.Loc, off: uint16(e.Sector), n: uint16(e.N)})
		at = int(e.End())
	}
	p.ext, p.dense = ext, array{}
}

// compact changes an array back to a list where that is much smaller, or to a
// narrow one where all locations have come to fit. It looks no further than it takes
// to see that it is not worth it.
func (p *page) compact() {
	d := &p.dense
	few := d.bytes() / 4 / entryBytes
	switch {
	case !p.isArray():
	case d.count(few) < few:
		p.toList()
	case d.wide != nil && d.shift == unitShift && d.fit():
		d.convert(true)
	}
}

// next returns the first extent that meets [at, end), cut to it, with its sector
// counted from the page's start.
func (p *page) next(at, end int) (Extent, bool) {
	if p.isArray() {
		return p.dense.next(at, end)
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

// invariants panics unless the page is well formed and lies inside its first
// limit sectors.
func (p *page) invariants(limit int) {
	if p.empty() {
		panic("extmap: an empty page is held")
	}
	if p.isArray() {
		p.dense.invariants(limit)
	}
	if p.isArray() && p.ext != nil {
		panic("extmap: a page has two forms")
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
