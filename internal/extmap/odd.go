package extmap

import (
	"math/bits"
	"slices"
)

// An odd holds the units of an array that are odd: mapped, but not as one piece. The
// pieces of a unit lie together, in any place. A unit that comes to have more of them
// gets another place, at the end; when there is none left, all pieces are packed anew,
// with a sixteenth to spare. So a piece takes about as much as a location.
type odd struct {
	has    [pageUnits / 64]uint64 // a bit for each unit
	units  int                    // that are odd
	pieces int                    // of them
	pool
}

// A pool holds the locations of pieces: in wide if the array's coding is asIs, else in
// narrow, in sectors.
type pool struct {
	narrow []packed
	wide   []uint64
}

// A ref says where the pieces of an odd unit are in the pool (refBits), at which
// sectors of the unit pieces begin, a bit for each, and above them which sectors are
// mapped.
type ref uint32

const (
	refBits = 16
	// minPool is the capacity of a pool at least.
	minPool = 8
)

func makeRef(at int, begin, mapped uint8) ref {
	return ref(at) | ref(begin)<<refBits | ref(mapped)<<(refBits+unitSectors)
}

func (r ref) at() int       { return int(r & (1<<refBits - 1)) }
func (r ref) begin() uint8  { return uint8(r >> refBits) }
func (r ref) mapped() uint8 { return uint8(r >> (refBits + unitSectors)) }
func (r ref) pieces() int   { return bits.OnesCount8(r.begin()) }

// poolFor returns the capacity of a pool that is packed to hold n pieces.
func poolFor(n int) int { return n + n/16 + minPool }

// oddBytes returns the memory of the odd units of an array with n pieces in them,
// when they have just been packed.
func oddBytes(c coding, n int) int {
	if n == 0 {
		return 0
	}
	if c == asIs {
		return oddHead + poolFor(n)*wideBytes
	}
	return oddHead + poolFor(n)*packedBytes
}

func makePool(c coding, n int) pool {
	if c == asIs {
		return pool{wide: make([]uint64, 0, n)}
	}
	return pool{narrow: make([]packed, 0, n)}
}

func (p *pool) len() int { return len(p.narrow) + len(p.wide) }
func (p *pool) cap() int { return cap(p.narrow) + cap(p.wide) }

// at returns the location of piece i.
func (p *pool) at(i int) uint64 {
	if p.wide != nil {
		return p.wide[i]
	}
	return inSectors.loc(&p.narrow[i])
}

func (p *pool) set(i int, loc uint64) {
	if p.wide != nil {
		p.wide[i] = loc
	} else {
		p.narrow[i] = inSectors.pack(loc)
	}
}

// extend makes room for n pieces, for which there is capacity, and returns where.
func (p *pool) extend(n int) int {
	at := p.len()
	if p.wide != nil {
		p.wide = p.wide[:at+n]
	} else {
		p.narrow = p.narrow[:at+n]
	}
	return at
}

// bytes returns the memory that o, which may be nil, takes.
func (o *odd) bytes() int {
	if o == nil {
		return 0
	}
	return oddHead + cap(o.narrow)*packedBytes + cap(o.wide)*wideBytes
}

// wasteful reports whether the pool is much larger than o needs, with more pieces.
func (o *odd) wasteful(more int) bool { return o.cap() > 4*poolFor(o.pieces+more) }

func (o *odd) clone() *odd {
	c := *o
	c.pool = pool{} // of the same capacity: Clone would round it up
	if o.wide != nil {
		c.wide = append(make([]uint64, 0, cap(o.wide)), o.wide...)
	} else {
		c.narrow = append(make([]packed, 0, cap(o.narrow)), o.narrow...)
	}
	return &c
}

// convert returns o, which may be nil, for an array with another coding.
func (o *odd) convert(c coding) *odd {
	if o == nil {
		return nil
	}
	b := *o
	b.pool = makePool(c, o.cap())
	b.extend(o.len())
	for i := range o.len() {
		b.set(i, o.at(i))
	}
	return &b
}

// isOdd reports whether unit u is odd.
func (a *array) isOdd(u int) bool { return a.odd != nil && a.odd.has[u>>6]&(1<<(u&63)) != 0 }

// ref returns where the pieces of the odd unit u are.
func (a *array) ref(u int) ref {
	if a.narrow != nil {
		return ref(a.narrow[u].word())
	}
	return ref(a.wide[u])
}

func (a *array) setRef(u int, r ref) {
	if a.narrow != nil {
		a.narrow[u] = packWord(uint64(r))
	} else {
		a.wide[u] = uint64(r)
	}
}

// sectors returns the location of each sector of unit u.
func (a *array) sectors(u int) (s [unitSectors]uint64) {
	if !a.isOdd(u) {
		if loc := a.at(u); loc != 0 {
			for i := range s {
				s[i] = advance(loc, uint64(i))
			}
		}
		return s
	}
	r := a.ref(u)
	k, loc := r.at(), uint64(0)
	for i := range s {
		switch bit := uint8(1) << i; {
		case r.mapped()&bit == 0:
			continue
		case r.begin()&bit != 0:
			loc = a.odd.at(k)
			k++
		default:
			loc = advance(loc, 1)
		}
		s[i] = loc
	}
	return s
}

// setPart maps the n sectors from i of unit u to loc, or unmaps them if loc is 0.
func (a *array) setPart(u, i, n int, loc uint64) {
	s := a.sectors(u)
	for k := range n {
		s[i+k] = loc
		if loc != 0 {
			loc = advance(loc, 1)
		}
	}
	a.setSectors(u, &s)
}

// pieces returns at which of a unit's sectors pieces begin, and which are mapped.
func pieces(s *[unitSectors]uint64) (begin, mapped uint8) {
	for i, loc := range s {
		if loc == 0 {
			continue
		}
		mapped |= 1 << i
		if i == 0 || s[i-1] == 0 || loc != advance(s[i-1], 1) {
			begin |= 1 << i
		}
	}
	return begin, mapped
}

// onePiece reports whether a unit with such pieces is not odd.
func onePiece(begin, mapped uint8) bool {
	return mapped == 0 || mapped == 1<<unitSectors-1 && begin == 1
}

// setSectors gives each sector of unit u its location.
func (a *array) setSectors(u int, s *[unitSectors]uint64) {
	begin, mapped := pieces(s)
	if onePiece(begin, mapped) {
		a.set(u, s[0])
		return
	}
	a.count(a.isOdd(u) || a.at(u) != 0, true)
	k := a.place(u, bits.OnesCount8(begin))
	a.setRef(u, makeRef(k, begin, mapped))
	for i, loc := range s {
		if begin&(1<<i) != 0 {
			a.odd.set(k, loc)
			k++
		}
	}
}

// place makes unit u odd, if it is not, and returns a place in the pool for n pieces
// of it.
func (a *array) place(u, n int) int {
	if a.odd == nil {
		a.odd = &odd{pool: makePool(a.coding, minPool)}
	}
	o := a.odd
	if a.isOdd(u) {
		r := a.ref(u)
		o.pieces -= r.pieces()
		if n <= r.pieces() && !o.wasteful(n) {
			o.pieces += n
			return r.at()
		}
		o.has[u>>6] &^= 1 << (u & 63) // what it has is not to be packed
		if o.wasteful(n) {
			a.pack(n)
		}
	} else {
		o.units++
	}
	if o.len()+n > o.cap() {
		a.pack(n)
	}
	o.has[u>>6] |= 1 << (u & 63)
	o.pieces += n
	return o.extend(n)
}

// dropOdd makes the odd unit u one that is not; what is mapped there is for the
// caller to say.
func (a *array) dropOdd(u int) {
	o := a.odd
	o.has[u>>6] &^= 1 << (u & 63)
	o.units--
	o.pieces -= a.ref(u).pieces()
	switch {
	case o.units == 0:
		a.odd = nil
	case o.wasteful(0):
		a.pack(0)
	}
}

// leans reports whether nearly all units are odd and, in those that are looked at, most pieces
// that begin inside a unit do so at the same sector of it: units might begin there.
func (a *array) leans() bool {
	if 6*a.odd.units < 5*int(a.used) {
		return false
	}
	var begins [unitSectors]int
	all := 0
	for w, word := range a.odd.has {
		if word == 0 {
			continue
		}
		u := w<<6 + bits.TrailingZeros64(word)
		for b := a.ref(u).begin() &^ 1; b != 0; b &= b - 1 {
			begins[bits.TrailingZeros8(b)]++
			all++
		}
	}
	return 2*slices.Max(begins[:]) > all
}

// pack packs the pieces anew, with room for more of them.
func (a *array) pack(more int) {
	o := a.odd
	was := o.pool
	o.pool = makePool(a.coding, poolFor(o.pieces+more))
	for w, word := range o.has {
		for ; word != 0; word &= word - 1 {
			u := w<<6 + bits.TrailingZeros64(word)
			r := a.ref(u)
			at, n := r.at(), r.pieces()
			a.setRef(u, makeRef(o.len(), r.begin(), r.mapped()))
			if was.wide != nil {
				o.wide = append(o.wide, was.wide[at:at+n]...)
			} else {
				o.narrow = append(o.narrow, was.narrow[at:at+n]...)
			}
		}
	}
}

// piece returns the location of a sector, 0 if it is not mapped, and where what is
// mapped as one piece with it, or not mapped either, ends in its unit.
func (a *array) piece(at int) (loc uint64, end int) {
	u, i := at>>unitShift, at&(unitSectors-1)
	if !a.isOdd(u) {
		if loc = a.at(u); loc != 0 {
			loc = advance(loc, uint64(i))
		}
		return loc, (u + 1) << unitShift
	}
	r := a.ref(u)
	if mapped := r.mapped() >> i; mapped&1 == 0 {
		return 0, at + min(bits.TrailingZeros8(mapped), unitSectors-i)
	}
	before := r.begin() & (2<<i - 1) // pieces that begin here or before
	loc = a.odd.at(r.at() + bits.OnesCount8(before) - 1)
	loc = advance(loc, uint64(i-(bits.Len8(before)-1)))
	stops := (r.begin() | ^r.mapped()) >> i >> 1
	return loc, at + min(1+bits.TrailingZeros8(stops), unitSectors-i)
}

// nextPieces is next for an array with odd units.
func (a *array) nextPieces(at, end int) (Extent, bool) {
	loc, stop := uint64(0), at
	for at < end {
		if loc, stop = a.piece(at); loc != 0 {
			break
		}
		at = stop
	}
	if at >= end {
		return Extent{}, false
	}
	want := advance(loc, uint64(stop-at))
	for stop < end {
		l, s := a.piece(stop)
		if l != want {
			break
		}
		want = advance(want, uint64(s-stop))
		stop = s
	}
	return Extent{Sector: uint64(at), N: uint32(min(stop, end) - at), Loc: loc}, true
}

// countPieces is extents for an array with odd units.
func (a *array) countPieces(most int) int {
	if a.odd.pieces-a.odd.units >= most {
		return most // all pieces of a unit but the first begin an extent
	}
	n, want := 0, uint64(0)
	for at := 0; at < PageSectors && n < most; {
		loc, end := a.piece(at)
		if loc != 0 && loc != want {
			n++
		}
		if want = 0; loc != 0 {
			want = advance(loc, uint64(end-at))
		}
		at = end
	}
	return n
}

// oddInvariants panics unless the odd units are well formed.
func (a *array) oddInvariants() {
	o := a.odd
	units, held := 0, 0
	taken := make([]bool, o.len())
	for u := range pageUnits {
		if !a.isOdd(u) {
			continue
		}
		r := a.ref(u)
		units++
		held += r.pieces()
		for k := range r.pieces() {
			if taken[r.at()+k] || o.at(r.at()+k) == 0 {
				panic("extmap: bad place of a unit's pieces")
			}
			taken[r.at()+k] = true
		}
		s := a.sectors(u)
		begin, mapped := pieces(&s)
		if onePiece(begin, mapped) || begin != r.begin() || mapped != r.mapped() {
			panic("extmap: a unit is odd that needs not be, or has more pieces than it needs")
		}
	}
	if units != o.units || held != o.pieces || units == 0 {
		panic("extmap: wrong count of odd units")
	}
	if o.wasteful(0) || o.cap() > 1<<refBits {
		panic("extmap: a pool is too large")
	}
}
