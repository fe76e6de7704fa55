package engine

import (
	"sync"
	"time"
)

// maxKeptBuffers bounds what keptBuffers keep, in bytes: as many objects' as one image has under way,
// if they have the default size.
const maxKeptBuffers = maxUnderWay * (DefaultObjectSize + objectHeadroom)

// keptBuffers are large buffers, kept for the next use of their kind: those that data objects have
// been built in, or read into to be cleaned, or that the log has been read back into. The garbage
// collector takes what a sync.Pool has, and then the kernel must find and clear each page again: a
// sixth of the time that building takes. Any goroutine may use them.
type keptBuffers struct {
	mu   sync.Mutex
	free [][]byte // guarded by mu, as all that follows; the one used last is taken first
	kept int      // bytes of them
	used time.Time
}

// take returns a buffer of at least n bytes, or nil if there is none.
func (p *keptBuffers) take(n int) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
	for i := len(p.free) - 1; i >= 0; i-- {
		if b := p.free[i]; cap(b) >= n {
			p.free = append(p.free[:i], p.free[i+1:]...)
			p.kept -= cap(b)
			return b[:n]
		}
	}
	return nil
}

// give takes a buffer back, which nobody may use any more.
func (p *keptBuffers) give(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
	for len(p.free) > 0 && p.kept+cap(b) > maxKeptBuffers { // those that nobody has taken for longest
		p.kept -= cap(p.free[0])
		p.free = append(p.free[:0], p.free[1:]...)
	}
	if cap(b) <= maxKeptBuffers {
		p.free = append(p.free, b)
		p.kept += cap(b)
	}
}

// DropBuffers lets go of the memory that is kept for the next data objects, if nobody has used it
// for some time.
func (s *Shared) DropBuffers(unused time.Duration) {
	s.buffers.drop(unused)
}

// drop lets go of what is kept, if nobody has used it for some time.
func (p *keptBuffers) drop(unused time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.used) >= unused {
		p.free, p.kept = nil, 0
	}
}
