package writelog

// A Pool lends memory to logs, beyond their own. A log calls it on its reactor, once for each segment
// that it fills or more; it must not block. What is not returned when the log is dropped is the pool's
// again once nothing uses the log's memory.
type Pool interface {
	// Lend returns SegmentSize bytes outside the Go heap, aligned to a page, or nil if there are none
	// now. They may have any contents.
	Lend() []byte
	// Return takes back what Lend has returned, which nobody uses any more.
	Return(b []byte)
}

// maxMirror bounds the segments of one log that are in memory: 4 GiB.
const maxMirror = 512

// mirror is the memory of the log's newest segments; each of them has SegmentSize bytes, or none. The
// reactor owns it.
type mirror struct {
	spare [][]byte // the log's own, that no segment has
	owned int      // segments that the log's own memory is enough for
	pool  Pool     // or nil

	// Segments [first, next) have memory, counted from position 0; that of segment n is at[n%maxMirror].
	// Both are 0 where none has.
	first, next uint64
	at          [maxMirror][]byte
	lent        [maxMirror]bool // by the pool
}

// newMirror returns the mirror of a log. mem, whose length is a multiple of SegmentSize, is its own
// memory.
func newMirror(mem []byte, pool Pool) mirror {
	m := mirror{owned: len(mem) / SegmentSize, pool: pool}
	for ; len(mem) > 0; mem = mem[SegmentSize:] {
		m.spare = append(m.spare, mem[:SegmentSize:SegmentSize])
	}
	return m
}

// bytes returns n bytes from the position pos on, which lie in one segment that has memory.
func (m *mirror) bytes(pos uint64, n int) []byte {
	i := pos % SegmentSize
	return m.segment(pos / SegmentSize)[i : i+uint64(n) : i+uint64(n)]
}

// segment returns the memory of a segment that has some.
func (m *mirror) segment(n uint64) []byte { return m.at[n%maxMirror] }

// has reports whether all that has memory from the position on has: its segment, and those behind it.
func (m *mirror) has(pos uint64) bool { return pos/SegmentSize >= m.first }

// grow gives memory to segment n, which is the next one unless no segment has memory, and reports
// false if there is none. Nobody reads or writes before the position free any more; what is before
// stored is in the store. What is not stays in memory as long as the pool lends more.
func (m *mirror) grow(n, free, stored uint64) bool {
	m.shrink(min(free, stored))
	if m.first == m.next {
		m.first, m.next = n, n
	}
	if n != m.next {
		panic("writelog: memory for a segment behind one that has none")
	}
	var b []byte
	lent := false
	switch k := len(m.spare); {
	case k > 0:
		b, m.spare = m.spare[k-1], m.spare[:k-1]
	case m.pool != nil && m.next-m.first < maxMirror && m.start(m.first+1) > min(free, stored):
		b = m.pool.Lend()
		lent = b != nil
	}
	if b == nil {
		if m.first == m.next || m.start(m.first+1) > free {
			return false
		}
		i := m.first % maxMirror
		b, lent = m.at[i], m.lent[i]
		m.at[i] = nil
		m.first++
	}
	m.at[m.next%maxMirror], m.lent[m.next%maxMirror] = b, lent
	m.next++
	return true
}

// start returns the position at which a segment begins.
func (m *mirror) start(n uint64) uint64 { return n * SegmentSize }

// shrink takes memory from the oldest segments that end before the position, down to as many as the
// log's own is enough for: what is in the store is kept for reads as far as that goes.
func (m *mirror) shrink(before uint64) {
	for m.next-m.first > uint64(m.owned) && m.start(m.first+1) <= before {
		m.drop()
	}
}

// drop takes the memory of the oldest segment.
func (m *mirror) drop() {
	i := m.first % maxMirror
	if m.lent[i] {
		m.pool.Return(m.at[i])
	} else {
		m.spare = append(m.spare, m.at[i])
	}
	m.at[i] = nil
	m.first++
}

// clear takes the memory of all segments: the next one that grow gives some can be any.
func (m *mirror) clear() {
	for m.first < m.next {
		m.drop()
	}
	m.first, m.next = 0, 0
}
