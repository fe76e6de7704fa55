package extmap

// A Span holds the extents of some consecutive pages outside of a map: to be put
// into one, or copied or taken out of one. One goroutine at a time may use it; any number may
// read one that nobody changes.
type Span struct {
	first uint64 // page
	pages []*page
}

// NewSpan returns an empty span over n pages from sector s on, which begins a page.
func NewSpan(s uint64, n int) *Span {
	if s%PageSectors != 0 {
		panic("extmap: a span begins inside a page")
	}
	return &Span{first: s >> pageShift, pages: make([]*page, n)}
}

// Insert maps the n sectors from s to loc.
func (x *Span) Insert(s, n, loc uint64) {
	for n > 0 {
		off := int(s & (PageSectors - 1))
		k := min(n, uint64(PageSectors-off))
		i := s>>pageShift - x.first
		switch p := x.pages[i]; {
		case p == nil:
			x.pages[i] = new(page)
		case p.shared():
			x.pages[i] = p.clone()
		}
		x.pages[i].replace(off, off+int(k), loc, nil)
		s, n, loc = s+k, n-k, advance(loc, k)
	}
}

// Remove unmaps the n sectors from s.
func (x *Span) Remove(s, n uint64) {
	for n > 0 {
		off := int(s & (PageSectors - 1))
		k := min(n, uint64(PageSectors-off))
		if p := &x.pages[s>>pageShift-x.first]; *p != nil {
			if (*p).shared() {
				*p = (*p).clone()
			}
			if (*p).replace(off, off+int(k), 0, nil); (*p).empty() {
				*p = nil
			}
		}
		s, n = s+k, n-k
	}
}

// Next returns the first extent that meets [s, end of the span), cut to it, and
// true; or false when nothing there is mapped.
func (x *Span) Next(s uint64) (Extent, bool) {
	for i := s>>pageShift - x.first; i < uint64(len(x.pages)); i++ {
		base := (x.first + i) << pageShift
		if p := x.pages[i]; p != nil {
			if e, ok := p.next(int(max(s, base)-base), PageSectors); ok {
				e.Sector += base
				return e, true
			}
		}
	}
	return Extent{}, false
}

// Attach puts the span's pages into the map, which must hold none of them, and
// takes them over.
func (m *Map) Attach(x *Span) {
	for i, p := range x.pages {
		if p == nil {
			continue
		}
		if m.page(x.first+uint64(i)) != nil {
			panic("extmap: a span is put where pages are")
		}
		if !p.shared() {
			p.trim(2)
		}
		m.put(x.first+uint64(i), p)
	}
	x.pages = nil
}

// Detach takes the n pages from sector s on out of the map, without a word to
// Replaced.
func (m *Map) Detach(s uint64, n int) {
	for i := s >> pageShift; i < s>>pageShift+uint64(n); i++ {
		if i>>blockShift < uint64(len(m.dir)) && m.page(i) != nil {
			m.take(i)
		}
	}
}

// Copy returns a copy of the n pages from sector s on, which another goroutine may
// read. It copies no page: the map copies each when it first changes it.
func (m *Map) Copy(s uint64, n int) *Span {
	x := NewSpan(s, n)
	for i := range x.pages {
		at := x.first + uint64(i)
		if at>>blockShift >= uint64(len(m.dir)) {
			break
		}
		if p := m.page(at); p != nil {
			p.dense.shared = true
			x.pages[i] = p
		}
	}
	return x
}

// Compact gives back memory that the n pages from sector s on have come to need no
// more. Pages that have not changed since they were copied are left as they are.
func (m *Map) Compact(s uint64, n int) {
	m.eachPage(s, min(uint64(n)<<pageShift, m.sectors-s), func(_ uint64, p *page, _, _ int) {
		if p.shared() {
			return
		}
		before := p.bytes()
		p.compact()
		m.bytes += p.bytes() - before
	})
}

// SpanBytes returns the memory that the n pages from sector s on take.
func (m *Map) SpanBytes(s uint64, n int) int {
	bytes := 0
	for i := s >> pageShift; i < s>>pageShift+uint64(n) && i>>blockShift < uint64(len(m.dir)); i++ {
		if p := m.page(i); p != nil {
			bytes += p.bytes()
		}
	}
	return bytes
}
