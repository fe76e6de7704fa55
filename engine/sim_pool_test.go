package engine

import "github.com/lsd-ceph/lsd/cache/writelog"

// A simLogPool lends the log of a host's process more memory, or does not.
type simLogPool struct {
	h    *simHost
	all  [][]byte
	free [][]byte // of these
}

// begin gives a new process what the last one had: it finds in it what that has left.
func (p *simLogPool) begin(h *simHost) {
	p.h = h
	p.free = append(p.free[:0], p.all...)
}

// Lend implements writelog.Pool.
func (p *simLogPool) Lend() []byte {
	w := p.h.w
	if len(p.all)-len(p.free) >= w.plan.extras.lent || w.lends.IntN(3) == 0 {
		return nil
	}
	if len(p.free) == 0 {
		p.more()
	}
	n := len(p.free) - 1
	b := p.free[n]
	p.free = p.free[:n]
	w.count(countLent, true)
	return b
}

// more takes a segment of the memory that there is for all worlds.
func (p *simLogPool) more() {
	m := p.h.w.memory
	b := []byte(nil)
	if n := len(m.segments); n > 0 {
		b, m.segments = m.segments[n-1], m.segments[:n-1]
	} else {
		b = make([]byte, writelog.SegmentSize)
	}
	p.all, p.free = append(p.all, b), append(p.free, b)
}

// Return implements writelog.Pool. Whoever reads on in it finds something else there.
func (p *simLogPool) Return(b []byte) {
	for i := 0; i < len(b); i += SectorSize {
		b[i] ^= 0xff
	}
	p.free = append(p.free, b)
	p.h.w.count(countReturned, true)
}
