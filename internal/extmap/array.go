package extmap

import "slices"

// An array holds a location for each unit of 1<<shift sectors of a page, 0 where
// none is mapped: in narrow if the units are blocks and all locations fit, else in
// wide. If both are nil, there is no array.
type array struct {
	narrow *[pageUnits]packed
	wide   []uint64
	shift  uint8
	shared bool   // the page's, see page.shared; it is here since it takes no room here
	used   uint16 // units that are mapped
}

// packed is a location in 6 bytes: packedBits of it from bit unitShift on, and Fixed
// above them. All its other bits must be zero, as they are while data is written in
// whole blocks, so that it lies in whole blocks too, below sector 1<<50.
//
// It is made of words, not of bytes or an integer, so that an array of them has no
// padding and the compiler loads one in two parts.
type packed [3]uint16

const (
	packedBits = 47
	packedMask = (1<<packedBits - 1) << unitShift
)

// fits reports whether loc can be packed.
func fits(loc uint64) bool { return loc&^(packedMask|Fixed) == 0 }

// runFits reports whether the locations of all blocks of an extent of n sectors at
// loc can be packed.
func runFits(loc, n uint64) bool { return fits(loc) && fits(advance(loc, n-1<<unitShift)) }

func pack(loc uint64) packed {
	v := loc>>unitShift | loc>>63<<packedBits // what is above them is cut off
	return packed{uint16(v), uint16(v >> 16), uint16(v >> 32)}
}

func (p *packed) loc() uint64 {
	v := uint64(p[0]) | uint64(p[1])<<16 | uint64(p[2])<<32
	return v<<unitShift&packedMask | v>>packedBits<<63
}

// makeArray returns an array over units of 1<<shift sectors.
func makeArray(shift uint8, narrow bool) array {
	if narrow {
		return array{narrow: new([pageUnits]packed), shift: shift}
	}
	return array{wide: make([]uint64, PageSectors>>shift), shift: shift}
}

// bytes returns the memory that the array takes, besides itself.
func (a *array) bytes() int {
	if a.narrow != nil {
		return pageUnits * packedBytes
	}
	return cap(a.wide) * wideBytes
}

// clone returns a copy of the array, which is not shared.
func (a *array) clone() array {
	c := *a
	if a.narrow != nil {
		n := *a.narrow
		c.narrow = &n
	}
	c.wide, c.shared = slices.Clone(a.wide), false
	return c
}

// units returns the number of units.
func (a *array) units() int { return PageSectors >> a.shift }

// at returns the location of unit u.
func (a *array) at(u int) uint64 {
	if a.narrow != nil {
		return a.narrow[u].loc()
	}
	return a.wide[u]
}

// set makes loc, which fits if the array is narrow, the location of unit u.
func (a *array) set(u int, loc uint64) {
	switch was := a.at(u); {
	case was == 0 && loc != 0:
		a.used++
	case was != 0 && loc == 0:
		a.used--
	}
	if a.narrow != nil {
		a.narrow[u] = pack(loc)
	} else {
		a.wide[u] = loc
	}
}

// convert makes the array, which is over blocks, narrow or wide.
func (a *array) convert(narrow bool) {
	b := makeArray(unitShift, narrow)
	for u := range a.units() {
		b.set(u, a.at(u))
	}
	*a = b
}

// fit reports whether all locations of the array, which is over blocks, can be
// packed.
func (a *array) fit() bool {
	for u := range a.units() {
		if !fits(a.at(u)) {
			return false
		}
	}
	return true
}

// next returns the first extent that meets [at, end), cut to it.
func (a *array) next(at, end int) (Extent, bool) {
	u, stop := at>>a.shift, (end-1)>>a.shift+1
	for u < stop && a.at(u) == 0 {
		u++
	}
	if u >= stop {
		return Extent{}, false
	}
	unit := uint64(1) << a.shift
	e := Extent{Sector: uint64(u) * unit, Loc: a.at(u)}
	want := advance(e.Loc, unit)
	for u++; u < stop && a.at(u) == want; u++ {
		want = advance(want, unit)
	}
	e.N = uint32(uint64(u)*unit - e.Sector)
	if int(e.Sector) < at {
		e = e.from(uint64(at))
	}
	e.N = min(e.N, uint32(end)-uint32(e.Sector))
	return e, true
}

// count returns the number of extents, or most if there are more.
func (a *array) count(most int) int {
	n := 0
	for at := 0; n < most; n++ {
		e, ok := a.next(at, PageSectors)
		if !ok {
			break
		}
		at = int(e.End())
	}
	return n
}

// invariants panics unless the array is well formed and maps nothing beyond its
// first limit sectors.
func (a *array) invariants(limit int) {
	if a.narrow != nil && (a.wide != nil || a.shift != unitShift) || a.narrow == nil && len(a.wide) != a.units() {
		panic("extmap: bad form of an array")
	}
	used := uint16(0)
	for u := range a.units() {
		if a.at(u) != 0 {
			used++
			if (u+1)<<a.shift > limit {
				panic("extmap: bad unit")
			}
		}
	}
	if used != a.used {
		panic("extmap: wrong count of units")
	}
}
