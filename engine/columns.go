package engine

import "github.com/lsd-ceph/lsd/internal/bitpack"

// columnExtents is the most extents whose numbers are packed together: few enough that one
// which is far from the others costs little, many enough that how they are packed does.
const columnExtents = 128

// unitShift returns the unit of stored numbers of sectors, as a shift: a block of 4 KiB if
// all of them, of which all is the bitwise or, are multiples of that, else a sector.
func unitShift(all uint64) uint8 {
	if all&7 == 0 {
		return 3
	}
	return 0
}

// validShift reports whether unitShift returns such a unit.
func validShift(shift uint8) bool { return shift == 0 || shift == 3 }

// runColumns are some runs of sectors, ascending, as they are stored: gaps and lengths in a
// column each. Of random writes the lengths are all the same then, and take nothing. The
// numbers are in units of a shift, see unitShift.
type runColumns struct {
	n             int
	gaps, lengths [columnExtents]uint64 // since the end of the run before; twice the length, and 1 for a hole
}

// holeBit is the bit of a length that says that the run is mapped to nothing.
const holeBit = 1

// full reports whether there is no room for another run.
func (c *runColumns) full() bool { return c.n == columnExtents }

// add adds a run.
func (c *runColumns) add(gap, length uint64, hole bool) {
	c.gaps[c.n], c.lengths[c.n] = gap, length<<1
	if hole {
		c.lengths[c.n] |= holeBit
	}
	c.n++
}

// flush appends the runs to b, and goes on without any.
func (c *runColumns) flush(b []byte) []byte {
	if c.n > 0 {
		b = bitpack.Append(bitpack.Append(b, c.gaps[:c.n]), c.lengths[:c.n])
	}
	c.n = 0
	return b
}

// read reads n runs from the front of b, and returns what follows them. Nothing is checked
// but that they are there.
func (c *runColumns) read(b []byte, n int) (rest []byte, ok bool) {
	c.n = n
	if rest, ok = bitpack.Read(b, c.gaps[:n]); ok {
		rest, ok = bitpack.Read(rest, c.lengths[:n])
	}
	return rest, ok
}

// run returns what run i is.
func (c *runColumns) run(i int) (gap, length uint64, hole bool) {
	return c.gaps[i], c.lengths[i] >> 1, c.lengths[i]&holeBit != 0
}

// extentColumns are some extents of a segment as they are stored: their runs, and in two more
// columns the places of those that are not holes. Places of random writes take as many bits
// as there are places.
type extentColumns struct {
	runs          runColumns
	places        int
	refs, offsets [columnExtents]uint64
	ref, offset   uint64 // place that would go on from the extents before
}

// How a column of places is packed: the numbers, or their differences from the place that
// would go on from the extent before.
const (
	refsDiffer    = 1 << 0
	offsetsDiffer = 1 << 1
)

// add adds an extent. The place of a hole does not count.
func (c *extentColumns) add(gap, length uint64, hole bool, ref objectRef, offset uint64) {
	c.runs.add(gap, length, hole)
	if !hole {
		c.refs[c.places], c.offsets[c.places] = uint64(ref), offset
		c.places++
	}
}

// flush appends the extents to b, and goes on without any.
func (c *extentColumns) flush(b []byte) []byte {
	if c.runs.n == 0 {
		return b
	}
	var refs, offsets [columnExtents]uint64 // differences
	c.eachPlace(func(p int) {
		refs[p], offsets[p] = zigzag(c.refs[p]-c.ref), zigzag(c.offsets[p]-c.offset)
	})
	r, o, how := c.refs[:c.places], c.offsets[:c.places], byte(0)
	if d := refs[:c.places]; bitpack.Size(d) < bitpack.Size(r) {
		r, how = d, how|refsDiffer
	}
	if d := offsets[:c.places]; bitpack.Size(d) < bitpack.Size(o) {
		o, how = d, how|offsetsDiffer
	}
	b = append(c.runs.flush(b), how)
	c.places = 0
	return bitpack.Append(bitpack.Append(b, r), o)
}

// eachPlace calls fn for each place, with the place that would go on before it in c.
func (c *extentColumns) eachPlace(fn func(p int)) {
	p := 0
	for i := range c.runs.n {
		if _, length, hole := c.runs.run(i); !hole {
			fn(p)
			c.ref, c.offset = c.refs[p], c.offsets[p]+length
			p++
		}
	}
}

// read reads n extents from the front of b, and returns what follows them. Nothing is
// checked but that they are there.
func (c *extentColumns) read(b []byte, n int) (rest []byte, ok bool) {
	if rest, ok = c.runs.read(b, n); !ok || len(rest) == 0 || rest[0]&^(refsDiffer|offsetsDiffer) != 0 {
		return nil, false
	}
	how := rest[0]
	c.places = 0
	for i := range n {
		if _, _, hole := c.runs.run(i); !hole {
			c.places++
		}
	}
	if rest, ok = bitpack.Read(rest[1:], c.refs[:c.places]); ok {
		rest, ok = bitpack.Read(rest, c.offsets[:c.places])
	}
	if !ok {
		return nil, false
	}
	c.eachPlace(func(p int) {
		if how&refsDiffer != 0 {
			c.refs[p] = c.ref + unzigzag(c.refs[p])
		}
		if how&offsetsDiffer != 0 {
			c.offsets[p] = c.offset + unzigzag(c.offsets[p])
		}
	})
	return rest, true
}

// zigzag returns a difference as a number that is small if the difference is, whatever its
// sign. unzigzag returns the difference.
func zigzag(d uint64) uint64   { return d<<1 ^ uint64(int64(d)>>63) }
func unzigzag(z uint64) uint64 { return z>>1 ^ -(z & 1) }
