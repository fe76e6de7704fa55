package extmap

import "slices"

// A page has one of two forms: a list of extents, or an array over blocks of 4 KiB,
// units, with the pieces of those that are not one piece by the side of it. A list goes
// on to where the array that can take its place is not larger; an array goes on until
// a list is much smaller.
const (
	unitShift   = 3
	unitSectors = 1 << unitShift
	pageUnits   = PageSectors >> unitShift

	// Entries of a list that is as large as the smallest array, and as the largest
	// without odd units.
	maxNarrow = pageUnits * packedBytes / entryBytes
	maxWide   = pageUnits * wideBytes / entryBytes

	// Memory, as Bytes counts it.
	entryBytes  = 16
	packedBytes = 6
	wideBytes   = 8
	pageBytes   = 64 // what the allocator has for it
	oddHead     = 320
	blockBytes  = blockPages*8 + 8

	// manyPieces is how many pieces of odd units make it worth while to see whether
	// units should begin elsewhere.
	manyPieces = pageUnits / 4
	// leanLook is after how many changes a few units are looked at for that.
	leanLook = 64
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
	look  uint16  // changes until the form of a long list, or the array's phase, is looked at again
}

// shared reports whether a Map and a Span have this page, or had: then nobody changes
// it any more.
func (p *page) shared() bool { return p.dense.shared }

// clone returns a copy that nobody else has.
func (p *page) clone() *page {
	return &page{ext: slices.Clone(p.ext), dense: p.dense.clone(), look: p.look}
}

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

// replace maps [from, to) to loc, or unmaps it if loc is 0, calls replaced, if
// it is not nil, for what was mapped there, and reports whether from was mapped.
func (p *page) replace(from, to int, loc uint64, replaced func(uint64, uint32)) (was bool) {
	if !p.isArray() {
		return p.replaceList(from, to, loc, replaced)
	}
	was = p.dense.has(from)
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
	p.dense.replace(from, to, loc)
	switch {
	case loc == 0 && p.dense.sparse():
		p.toList()
	case p.dense.odd != nil && p.dense.odd.pieces >= manyPieces:
		p.reviewPhase()
	}
	return was
}

// replaceList is replace for a list.
func (p *page) replaceList(from, to int, loc uint64, replaced func(uint64, uint32)) (was bool) {
	i := p.search(from)
	was = i < len(p.ext) && int(p.ext[i].off) <= from
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
	return was
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
	switch n += d; {
	case n > maxNarrow:
		p.review()
	case n < cap(p.ext)/4:
		p.trim(maxFreeCap)
	}
	if n <= maxNarrow {
		p.look = 0
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
	default:
		c = n + n/8
	}
	ext := make([]entry, len(p.ext), c)
	copy(ext, p.ext)
	p.ext = ext
}

// trim gives back a list's spare capacity, if it is more than an eighth and a few
// entries.
func (p *page) trim(few int) {
	if n := len(p.ext); cap(p.ext) > n+n/8+few {
		p.ext = append(make([]entry, 0, n), p.ext...)
	}
}

// review changes a list, which is longer than maxNarrow, to an array where that is not
// larger. Since it takes a pass over the list to see that, it does so only once in so
// many changes as can make the list little larger than the array.
func (p *page) review() {
	if p.look > 0 {
		p.look--
		return
	}
	n := len(p.ext)
	d, phase, pieces := p.demand()
	c := d.coding()
	size := arrayBytes(c, oddBytes(c, pieces))
	if size <= n*entryBytes {
		p.toArray(c, phase, pieces)
		return
	}
	// A change adds no more than two entries.
	p.look = uint16(max(min(n/8, (size/entryBytes-n)/2), (n-maxWide)/32))
}

// reviewPhase changes where the array's units begin, if that saves a quarter of it. Since
// it takes a pass over the array to see that, it does so only where a look at a few units
// speaks for it and, if in vain, not again for as many changes as there are pieces.
func (p *page) reviewPhase() {
	if p.look > 0 {
		p.look--
		return
	}
	d := &p.dense
	if !d.leans() {
		p.look = leanLook
		return
	}
	var x phases
	for at := 0; ; {
		e, ok := d.next(at, PageSectors)
		if !ok {
			break
		}
		at = int(e.End())
		x.add(int(e.Sector), at)
	}
	if _, pieces := x.best(d.phase); arrayBytes(d.coding, oddBytes(d.coding, pieces)) > d.bytes()*3/4 {
		p.look = uint16(d.odd.pieces)
		return
	}
	p.toList()
	want, phase, pieces := p.demand()
	p.toArray(want.coding(), phase, pieces)
}

// demand returns what the list demands of an array's coding, with which phase it has the
// fewest pieces in odd units, and how many.
func (p *page) demand() (d demand, phase uint8, pieces int) {
	var x phases
	for _, e := range p.ext {
		d.add(e.loc, uint64(e.n))
		x.add(int(e.off), e.end())
	}
	phase, pieces = x.best(0)
	d.odd = pieces > 0
	return d, phase, pieces
}

// phases counts the pieces that odd units would have with each phase of an array.
type phases struct {
	all int              // with any phase
	of  [unitSectors]int // more than that
}

// add counts the extent [from, to).
func (x *phases) add(from, to int) {
	const in = unitSectors - 1
	if to-from >= unitSectors {
		// A piece before the first unit that it has all of, and one after the last.
		x.all += 2
		x.of[from&in]--
		x.of[to&in]--
		return
	}
	x.all++
	for s := from + 1; s < to; s++ {
		x.of[s&in]++ // a unit that begins here cuts it
	}
}

// best returns the phase with the fewest pieces, and how many these are: the given one,
// if no other has fewer.
func (x *phases) best(phase uint8) (best uint8, pieces int) {
	best = phase
	for i := range x.of {
		if x.of[i] < x.of[best] {
			best = uint8(i)
		}
	}
	return best, x.all + x.of[best]
}

// toArray changes the page's form to an array with the given coding and phase and, in its
// odd units, at most so many pieces.
func (p *page) toArray(c coding, phase uint8, pieces int) {
	a := makeArray(c, phase)
	if pieces > 0 {
		a.odd = &odd{pool: makePool(c, poolFor(pieces))}
	}
	// Pieces are gathered until their unit is complete, so that each gets its
	// place once.
	var s [unitSectors]uint64
	unit := -1
	flush := func() {
		if unit >= 0 {
			a.setSectors(unit, &s)
			unit = -1
		}
	}
	for _, e := range p.ext {
		for off, end := int(e.off), e.end(); off < end; {
			at := (off - int(phase)) & (PageSectors - 1)
			u, i := at>>unitShift, at&(unitSectors-1)
			if u != unit {
				flush()
			}
			n := min(unitSectors-i, end-off)
			loc := e.tail(off).loc
			if n == unitSectors {
				a.set(u, loc)
			} else {
				if u != unit {
					unit, s = u, a.sectors(u) // the last one has the page's first sectors already
				}
				for k := range n {
					s[i+k] = advance(loc, uint64(k))
				}
			}
			off += n
		}
	}
	flush()
	if a.odd != nil && a.odd.units == 0 {
		a.odd = nil // the page's last sectors and its first ones are one piece
	}
	p.ext, p.dense, p.look = nil, a, 0
}

// toList changes the page's form from an array to a list.
func (p *page) toList() {
	ext := make([]entry, 0, p.dense.extents(PageSectors)+2)
	for at := 0; ; {
		e, ok := p.next(at, PageSectors)
		if !ok {
			break
		}
		ext = append(ext, entry{loc: e.Loc, off: uint16(e.Sector), n: uint16(e.N)})
		at = int(e.End())
	}
	p.ext, p.dense, p.look = ext, array{}, 0
}

// compact gives the page the form, or the array the coding, that is the smallest, but
// an array stays one unless a list takes half of it, and a pool may have a quarter to
// spare: checkpoints call it while requests wait.
func (p *page) compact() {
	if !p.isArray() {
		p.trim(len(p.ext) + 8)
		if p.look = 0; len(p.ext) > maxNarrow {
			p.review()
		}
		return
	}
	d := &p.dense
	if few := d.bytes() / 2 / entryBytes; d.extents(few) < few {
		p.toList()
		return
	}
	if c := d.best(); c != d.coding {
		d.convert(c)
	}
	if o := d.odd; o != nil && o.cap() > poolFor(o.pieces)*5/4 {
		d.pack(0)
	}
}

// next returns the first extent that meets [at, end), cut to it, with its sector
// counted from the page's start.
func (p *page) next(at, end int) (Extent, bool) {
	if p.isArray() {
		if p.dense.phase == 0 {
			return p.dense.nextUnits(at, end) // as next does: a call less
		}
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
