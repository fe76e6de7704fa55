package daemon

import (
	"syscall"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/uring"
)

const (
	// edgeBuffers is how many writes that do not begin or end with a sector are completed at
	// one time; others wait.
	edgeBuffers = 16
	// edgeSize is for one sector, aligned as the engine wants it.
	edgeSize = 4096
)

// changes orders what library clients change in an image, and its block device where that is
// shared with them, so that a write of theirs may begin and end at any byte. Such a write reads the sectors at its edges, and writes them with its own bytes
// in them; one that compares first (librarycompare.go) reads all of them. Until it has ended no
// other change of the same sectors may begin, and it begins when
// those before it have ended: the sectors would be without what these write. Its reads may have to
// wait for the store, so changes of other sectors do not wait for it.
//
// The reactor owns it. Nobody else may change the image.
type changes struct {
	image   *engine.Image
	mem     *uring.Arena // of the edges; made when it is first needed
	free    [][]byte     // parts of it for two edges each
	under   *change      // the first of those that have begun, linked both ways
	waiting changeQueue  // those that have to wait, in the order in which they came
	edged   int          // of under, those that read their edges or write with them
	pumping bool
	ended   bool // something has since startWaiting began
}

// A change is a request that changes sectors, of a library client or of the block device.
type change struct {
	req        engine.Request
	slot       *librarySlot // whose it is; nil: the block device's, which is of whole sectors
	edges      []byte       // see librarySlot
	prev, next *change      // in one of the lists of changes
}

// edged reports whether it needs the sectors that it changes: see librarySlot.edged.
func (c *change) edged() bool { return c.slot != nil && c.slot.edged() }

// touches reports whether two changes have sectors in common.
func (c *change) touches(o *change) bool {
	return c.req.Sector < o.req.Sector+uint64(o.req.Sectors) && o.req.Sector < c.req.Sector+uint64(c.req.Sectors)
}

// changeQueue is a queue of changes, linked through them both ways.
type changeQueue struct{ head, tail *change }

func (q *changeQueue) push(s *change) {
	s.prev, s.next = q.tail, nil
	if q.tail == nil {
		q.head = s
	} else {
		q.tail.next = s
	}
	q.tail = s
}

func (q *changeQueue) remove(s *change) {
	if s.prev == nil {
		q.head = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next == nil {
		q.tail = s.prev
	} else {
		s.next.prev = s.prev
	}
	s.prev, s.next = nil, nil
}

// begin starts a change, or has it wait for those that it must not overtake.
func (c *changes) begin(s *change) {
	if !c.mayBegin(s) || c.mustFollow(s, nil) {
		c.waiting.push(s)
		return
	}
	c.start(s)
}

// mustFollow reports whether a change has sectors with one in common that waits, before end.
func (c *changes) mustFollow(s, end *change) bool {
	for o := c.waiting.head; o != end; o = o.next {
		if o.touches(s) {
			return true
		}
	}
	return false
}

// mayBegin reports whether a change has to wait for none that has begun.
func (c *changes) mayBegin(s *change) bool {
	if !s.edged() {
		return c.edged == 0 || !c.overlaps(s, true)
	}
	return (c.mem == nil || len(c.free) > 0) && !c.overlaps(s, false)
}

// overlaps reports whether a change has sectors with one in common that has begun; or, where
// edged says so, with one of those that have edges.
func (c *changes) overlaps(s *change, edged bool) bool {
	for o := c.under; o != nil; o = o.next {
		if (!edged || o.edges != nil) && o.touches(s) {
			return true
		}
	}
	return false
}

// start begins a change.
func (c *changes) start(s *change) {
	s.prev, s.next = nil, c.under
	if s.next != nil {
		s.next.prev = s
	}
	c.under = s
	if !s.edged() {
		c.image.Submit(&s.req)
		return
	}
	if err := c.takeEdges(s); err != 0 {
		s.req.Err = err
		s.slot.RequestDone(&s.req)
		return
	}
	if s.slot.compare.wanted {
		s.slot.compareOn()
		return
	}
	s.slot.readEdges()
}

// takeEdges gives a change memory for its edges.
func (c *changes) takeEdges(s *change) syscall.Errno {
	if c.mem == nil {
		mem, err := uring.NewArena(edgeBuffers * 2 * edgeSize)
		if err != nil {
			return syscall.ENOMEM
		}
		c.mem = mem
		for b := mem.Bytes(); len(b) > 0; b = b[2*edgeSize:] {
			c.free = append(c.free, b[:2*edgeSize:2*edgeSize])
		}
	}
	last := len(c.free) - 1
	s.edges, c.free = c.free[last], c.free[:last]
	c.edged++
	return 0
}

// end notes the end of a change, after which others may begin.
func (c *changes) end(s *change) {
	if s.edges != nil {
		c.free = append(c.free, s.edges)
		s.edges = nil
		c.edged--
	}
	if s.prev == nil {
		c.under = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	}
	s.prev, s.next = nil, nil
	if c.ended = true; c.pumping {
		return // one that ends within start
	}
	c.pumping = true
	for c.ended = true; c.ended; { // also what ends within start
		c.ended = false
		c.startWaiting()
	}
	c.pumping = false
}

// startWaiting starts the changes that need not wait any more.
func (c *changes) startWaiting() {
	for s := c.waiting.head; s != nil; {
		next := s.next
		if c.mayBegin(s) && !c.mustFollow(s, s) {
			c.waiting.remove(s)
			c.start(s)
		}
		s = next
	}
}

// close frees the memory; nothing may be under way.
func (c *changes) close() error {
	if c.mem == nil {
		return nil
	}
	return c.mem.Close()
}
