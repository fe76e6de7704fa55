package daemon

import (
	"log/slog"
	"sync"
	"time"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/uring"
)

const (
	// poolPause is for how long no log may have asked for memory before much more is made: the
	// kernel takes long to find and clear pages, and writes have the processors first.
	poolPause = 3 * time.Second
	// How many segments are made at one time then, and while logs go on asking.
	poolStep, poolBusyStep = 16, 2
	// poolKept is for how long memory that no log has asked for is kept.
	poolKept = 5 * time.Minute
)

// A logPool lends memory to the logs of images that are written to faster than the store takes it, so
// that what is to be destaged need not be read back from the SSD. It lends only what it has, whose
// pages are there: a page that is touched for the first time can take longer than to read it back.
// Where it was asked for more than that it makes more, up to its bound, bit by bit. Any goroutine may
// use it.
type logPool struct {
	most   int // segments
	logger *slog.Logger

	mu    sync.Mutex
	all   map[*byte]*uring.Arena // guarded by mu, as all that follows; by their first byte
	free  [][]byte               // of these; the one used last is lent first
	asked time.Time              // when last
	want  int                    // segments that could not be lent, less those that were made since
}

// newLogPool returns a pool of at most so many bytes; none if they are not enough for a segment.
func newLogPool(bytes int64, logger *slog.Logger) *logPool {
	return &logPool{most: int(max(bytes, 0) / writelog.SegmentSize), logger: logger, all: map[*byte]*uring.Arena{}}
}

// lend returns a segment that is free, or nil.
func (p *logPool) lend() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = time.Now()
	n := len(p.free) - 1
	if n < 0 {
		p.want++
		return nil
	}
	b := p.free[n]
	p.free = p.free[:n]
	return b
}

// takeBack makes a segment free that was lent.
func (p *logPool) takeBack(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, b)
}

// bytes returns how much memory there is, and how much of it is lent.
func (p *logPool) bytes() (all, lent int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := int64(len(p.all))
	return n * writelog.SegmentSize, (n - int64(len(p.free))) * writelog.SegmentSize
}

// tend makes some of the memory that was asked for in vain, or lets go of what nobody has asked for
// in a long time. One goroutine calls it, about once a second.
func (p *logPool) tend(now time.Time) {
	more, old := p.due(now)
	for _, a := range old {
		if err := a.Close(); err != nil {
			p.logger.Error("free memory that was lent to write logs", "err", err)
		}
	}
	for range more {
		if !p.make() {
			return
		}
	}
}

// due returns how many segments are to be made, and takes those out of the pool that are to go.
func (p *logPool) due(now time.Time) (more int, old []*uring.Arena) {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := now.Sub(p.asked)
	if idle >= poolKept {
		for _, b := range p.free {
			old = append(old, p.all[&b[0]])
			delete(p.all, &b[0])
		}
		p.free, p.want = nil, 0
	}
	step := poolStep
	if idle < poolPause {
		step = poolBusyStep
	}
	p.want = min(p.want, p.most-len(p.all))
	return min(p.want, step), old
}

// make makes memory for a segment, and reports whether it could.
func (p *logPool) make() bool {
	a, err := uring.NewArena(writelog.SegmentSize)
	if err == nil {
		err = a.Populate()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.want = 0 // until it is asked for again
		p.logger.Warn("there is no memory to lend to the write logs: they read more back from their SSD", "err", err)
		return false
	}
	b := a.Bytes()
	p.all[&b[0]] = a
	p.free = append(p.free, b)
	p.want--
	return true
}

// A borrower has what of a logPool is lent to one log: it is the log's Pool. Its methods are called
// on the log's reactor, and giveBack when that has ended, and nothing uses the log's memory any more.
type borrower struct {
	pool *logPool
	lent map[*byte][]byte // by their first byte
}

// Lend implements writelog.Pool.
func (b *borrower) Lend() []byte {
	p := b.pool.lend()
	if p != nil {
		b.lent[&p[0]] = p
	}
	return p
}

// Return implements writelog.Pool.
func (b *borrower) Return(p []byte) {
	if _, ok := b.lent[&p[0]]; !ok {
		panic("daemon: a log returns memory that it was not lent")
	}
	delete(b.lent, &p[0])
	b.pool.takeBack(p)
}

// giveBack returns all that is lent.
func (b *borrower) giveBack() {
	for _, p := range b.lent {
		b.pool.takeBack(p)
	}
	b.lent = nil
}
