package extmap

// An array holds a location for each unit of a page, a block of unitSectors sectors, 0
// where nothing of it is mapped: in narrow, or in wide if locations are too large for
// that. If both are nil, there is no array. Of a unit that is mapped, but not as one
// piece, it holds where odd has the unit's pieces: a ref.
//
// Units begin at the page's sector phase, so that blocks of a disk whose partitions are
// not aligned are units too. The array counts sectors from there, and around: the last
// unit has the page's last sectors and its first ones. Page and array meet in replace,
// next and invariants; the rest goes by the array's own count.
type array struct {
	narrow *[pageUnits]packed
	wide   *[pageUnits]uint64
	odd    *odd // nil if there are no such units
	coding coding
	phase  uint8  // less than unitSectors
	shared bool   // the page's, see page.shared; it is here since it takes no room here
	used   uint16 // units of which something is mapped
}

// A coding is how an array holds locations: as packed numbers of sectors or of blocks,
// then it is the shift by which these lose bits, or as they are.
type coding uint8

const (
	inSectors coding = 0
	inBlocks  coding = unitShift // there are no odd units then
	asIs      coding = 255
)

// packed is a number of packedBits bits, and Fixed above them. In sectors, that is all
// locations below 1<<47; in blocks it is those below 1<<50 that begin a block, as they
// do while data is written in whole blocks.
//
// It is made of words, not of bytes or an integer, so that an array of them has no
// padding and the compiler loads one in two parts.
type packed [3]uint16

const packedBits = 47

func packWord(v uint64) packed { return packed{uint16(v), uint16(v >> 16), uint16(v >> 32)} }

func (p *packed) word() uint64 {
	return uint64(p[0]) | uint64(p[1])<<16 | uint64(p[2])<<32
}

// pack packs loc, which the coding fits.
func (c coding) pack(loc uint64) packed {
	return packWord(loc>>(c&63) | loc>>63<<packedBits) // what is above them is cut off
}

// loc returns the location that the coding has packed.
func (c coding) loc(p *packed) uint64 {
	v := p.word()
	return v&(1<<packedBits-1)<<(c&63) | v>>packedBits<<63
}

// A demand is what the contents of a page, or of a part of it, demand of a coding.
type demand struct {
	begins uint64 // all bits that are set where a block begins
	all    uint64 // all bits that are set anywhere
	odd    bool   // there are odd units
}

// add adds n sectors at loc.
func (d *demand) add(loc, n uint64) {
	d.begins |= loc | advance(loc, (n-1)&^(unitSectors-1))
	d.all |= loc | advance(loc, n-1)
}

// met reports whether a coding does for what has been added.
func (d *demand) met(c coding) bool {
	switch c {
	case inSectors:
		return d.all&^(1<<packedBits-1|Fixed) == 0
	case inBlocks:
		return d.begins&^((1<<packedBits-1)<<unitShift|Fixed) == 0 && !d.odd
	}
	return true
}

// coding returns the coding to choose. Sectors come first: blocks would have to go
// when there is an odd unit.
func (d *demand) coding() coding {
	switch {
	case d.met(inSectors):
		return inSectors
	case d.met(inBlocks):
		return inBlocks
	}
	return asIs
}

// makeArray returns an array with nothing mapped.
func makeArray(c coding, phase uint8) array {
	if c == asIs {
		return array{wide: new([pageUnits]uint64), coding: c, phase: phase}
	}
	return array{narrow: new([pageUnits]packed), coding: c, phase: phase}
}

// arrayBytes returns the memory that an array takes, besides itself.
func arrayBytes(c coding, odds int) int {
	if c == asIs {
		return pageUnits*wideBytes + odds
	}
	return pageUnits*packedBytes + odds
}

// bytes returns the memory that the array takes, besides itself.
func (a *array) bytes() int {
	if a.narrow == nil && a.wide == nil {
		return 0
	}
	return arrayBytes(a.coding, a.odd.bytes())
}

// clone returns a copy of the array, which is not shared.
func (a *array) clone() array {
	c := *a
	c.shared = false
	if a.narrow != nil {
		n := *a.narrow
		c.narrow = &n
	}
	if a.wide != nil {
		w := *a.wide
		c.wide = &w
	}
	if a.odd != nil {
		c.odd = a.odd.clone()
	}
	return c
}

// at returns the location of unit u, which is not odd.
func (a *array) at(u int) uint64 {
	if a.narrow != nil {
		return a.coding.loc(&a.narrow[u])
	}
	return a.wide[u]
}

// set makes loc, which the coding fits, the location of all of unit u.
func (a *array) set(u int, loc uint64) {
	if a.isOdd(u) {
		a.dropOdd(u)
	}
	if a.narrow != nil {
		p := a.coding.pack(loc)
		a.count(a.narrow[u] != packed{}, loc != 0)
		a.narrow[u] = p
		return
	}
	a.count(a.wide[u] != 0, loc != 0)
	a.wide[u] = loc
}

// count keeps used right when a unit that was mapped, or not, becomes so, or not.
func (a *array) count(was, is bool) {
	switch {
	case !was && is:
		a.used++
	case was && !is:
		a.used--
	}
}

// has reports whether the page's sector s is mapped.
func (a *array) has(s int) bool {
	s = (s - int(a.phase)) & (PageSectors - 1)
	u := s >> unitShift
	if a.isOdd(u) {
		return a.ref(u).mapped()&(1<<(s&(unitSectors-1))) != 0
	}
	return a.at(u) != 0
}

// replace maps the page's sectors [from, to) to loc, or unmaps them if loc is 0.
func (a *array) replace(from, to int, loc uint64) {
	p := int(a.phase)
	if from < p {
		mid := min(to, p)
		a.replaceUnits(from-p+PageSectors, mid-p+PageSectors, loc)
		if mid == to {
			return
		}
		if loc != 0 {
			loc = advance(loc, uint64(mid-from))
		}
		from = mid
	}
	a.replaceUnits(from-p, to-p, loc)
}

// replaceUnits is replace for sectors as the array counts them.
func (a *array) replaceUnits(from, to int, loc uint64) {
	a.recode(from, to, loc)
	for from < to {
		u, i := from>>unitShift, from&(unitSectors-1)
		n := min(unitSectors-i, to-from)
		if n == unitSectors {
			a.set(u, loc)
		} else {
			a.setPart(u, i, n, loc)
		}
		if loc != 0 {
			loc = advance(loc, uint64(n))
		}
		from += n
	}
}

// recode changes the coding to one that fits when [from, to) has come to loc, if that
// of now does not.
func (a *array) recode(from, to int, loc uint64) {
	d := demand{odd: (from|to)&(unitSectors-1) != 0}
	if loc != 0 {
		d.add(loc, uint64(to-from))
	}
	if d.met(a.coding) {
		return
	}
	for u := range pageUnits {
		a.addUnit(&d, u)
	}
	a.convert(d.coding())
}

// addUnit adds what unit u demands to d.
func (a *array) addUnit(d *demand, u int) {
	if !a.isOdd(u) {
		if loc := a.at(u); loc != 0 {
			d.add(loc, unitSectors)
		}
		return
	}
	d.odd = true
	s := a.sectors(u)
	for _, loc := range s {
		d.all |= loc
	}
}

// best returns the coding that the array's contents would have by themselves, if it
// is smaller, or the array's. It looks no further than it takes to see that there is
// none.
func (a *array) best() coding {
	if a.coding != asIs {
		return a.coding
	}
	var d demand
	for u := 0; u < pageUnits && d.coding() != asIs; u++ {
		a.addUnit(&d, u)
	}
	return d.coding()
}

// convert changes the coding to c, which fits.
func (a *array) convert(c coding) {
	b := makeArray(c, a.phase)
	b.odd, b.used = a.odd.convert(c), a.used
	for u := range pageUnits {
		if a.isOdd(u) {
			b.setRef(u, a.ref(u))
		} else if b.narrow != nil {
			b.narrow[u] = c.pack(a.at(u))
		} else {
			b.wide[u] = a.at(u)
		}
	}
	*a = b
}

// next returns the first extent that meets the page's sectors [at, end), cut to it.
func (a *array) next(at, end int) (Extent, bool) {
	p := int(a.phase)
	if at < p {
		if e, ok := a.nextUnits(at-p+PageSectors, min(end, p)-p+PageSectors); ok {
			e.Sector -= uint64(PageSectors - p)
			if int(e.End()) == p && p < end {
				if f, ok := a.nextUnits(0, end-p); ok && f.Sector == 0 && f.Loc == advance(e.Loc, uint64(e.N)) {
					e.N += f.N
				}
			}
			return e, true
		}
		at = p
	}
	if at >= end {
		return Extent{}, false // the last unit goes on beyond the page's end
	}
	e, ok := a.nextUnits(at-p, end-p)
	e.Sector += uint64(p)
	return e, ok
}

// nextUnits is next for sectors as the array counts them.
func (a *array) nextUnits(at, end int) (Extent, bool) {
	if a.odd != nil {
		return a.nextPieces(at, end)
	}
	u, stop := at>>unitShift, (end-1)>>unitShift+1
	for u < stop && a.at(u) == 0 {
		u++
	}
	if u >= stop {
		return Extent{}, false
	}
	e := Extent{Sector: uint64(u) * unitSectors, Loc: a.at(u)}
	want := advance(e.Loc, unitSectors)
	for u++; u < stop && a.at(u) == want; u++ {
		want = advance(want, unitSectors)
	}
	e.N = uint32(uint64(u)*unitSectors - e.Sector)
	if int(e.Sector) < at {
		e = e.from(uint64(at))
	}
	e.N = min(e.N, uint32(end)-uint32(e.Sector))
	return e, true
}

// extents returns the number of extents, or most if there are more. It may be one less or
// more where the array's count begins, and ends.
func (a *array) extents(most int) int {
	if a.odd != nil {
		return a.countPieces(most)
	}
	n, want := 0, uint64(0)
	for u := 0; u < pageUnits && n < most; u++ {
		loc := a.at(u)
		if loc == 0 {
			want = 0
			continue
		}
		if loc != want {
			n++
		}
		want = advance(loc, unitSectors)
	}
	return n
}

// sparse reports whether a list would be much smaller, whatever the locations are.
func (a *array) sparse() bool {
	n := int(a.used)
	if a.odd != nil {
		n += a.odd.pieces
	}
	return n < a.bytes()/4/entryBytes
}

// invariants panics unless the array is well formed and maps nothing beyond its
// first limit sectors.
func (a *array) invariants(limit int) {
	if (a.narrow != nil) != (a.coding != asIs) || (a.wide != nil) != (a.coding == asIs) || a.coding == inBlocks && a.odd != nil || a.phase >= unitSectors {
		panic("extmap: bad form of an array")
	}
	used, d := uint16(0), demand{}
	for u := range pageUnits {
		s := a.sectors(u)
		for i, loc := range s {
			if loc != 0 && (u<<unitShift+i+int(a.phase))%PageSectors >= limit {
				panic("extmap: bad unit")
			}
		}
		if s != [unitSectors]uint64{} {
			used++
			a.addUnit(&d, u)
		}
	}
	if used != a.used {
		panic("extmap: wrong count of units")
	}
	if !d.met(a.coding) {
		panic("extmap: a coding that does not fit")
	}
	if a.odd != nil {
		a.oddInvariants()
	}
}
