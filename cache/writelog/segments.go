package writelog

import (
	"context"
	"fmt"
	"sync"

	"github.com/lsd-ceph/lsd/internal/parallel"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// segmentsAhead is how many segments are read before they are asked for: one while the one
// before it is worked on, and another so that the disk does not wait for who asks.
const segmentsAhead = 2

// segments reads a log's segments, by the number of the position that they begin at, in ascending
// order for the most part. It may read some before they are asked for: these are read in order, one
// at a time, and what comes of it is told only to who asks for them. The goroutine that it was made
// on owns it; the one that reads, if there is one, uses ctx, log and todo, which stay as they are, and
// slots that are lent to it.
type segments struct {
	ctx   context.Context // looked at before each read
	log   *Log
	slots []slot // segment n is in slots[n%len(slots)], or in none
	ahead uint64 // segments that are read before they are asked for
	next  uint64 // the segment to be read next
	end   uint64 // it and those behind it are not read before they are asked for
	close func()
	todo  chan *slot // to the goroutine that reads; nil: there is none
}

// A slot is room for a segment. It is lent to the goroutine that reads from when it is sent to it
// until something is received from ended: buf and err are that goroutine's then, and nobody changes
// seg. All else is always the owner's of segments.
type slot struct {
	buf   []byte
	seg   uint64
	full  bool // it has, or is to have, the segment seg
	lent  bool
	err   error // of the read
	ended chan struct{}
}

// newSegments returns what reads the segments of a log, from the one with the number first on. With
// end > 0 a goroutine reads ahead, up to the segment before end; without, it is the caller that
// reads, one segment after the other. The caller calls close in the end, which waits for the read
// under way: nothing that get has returned is valid then.
func newSegments(ctx context.Context, l *Log, first, end uint64) (*segments, error) {
	s := &segments{log: l, next: first, end: end}
	if end == 0 {
		s.ctx, s.close = ctx, func() {}
		s.slots = []slot{{buf: l.file.Buffer(SegmentSize)}}
		return s, nil
	}
	// Behind those ahead, the one that is worked on, and the one before: who finds that
	// a record is not in the one goes back to where it is missing, in the other.
	s.ahead = segmentsAhead
	s.slots = make([]slot, segmentsAhead+2)
	// What direct I/O reads is cut where memory is not in one piece: a virtual disk has taken
	// three times as long for segments in pages of 4 KiB.
	mem, err := uring.NewArena(len(s.slots) * SegmentSize)
	if err != nil {
		return nil, fmt.Errorf("memory to read the log: %w", err)
	}
	mem.PreferLarge()
	for i := range s.slots {
		s.slots[i].buf, s.slots[i].ended = mem.Bytes()[i*SegmentSize:][:SegmentSize], make(chan struct{}, 1)
	}
	ctx, stop := context.WithCancel(ctx)
	s.ctx, s.todo = ctx, make(chan *slot, len(s.slots))
	var reading sync.WaitGroup
	reading.Go(s.readAhead)
	s.close = func() {
		stop()
		close(s.todo)
		reading.Wait()
		_ = mem.Close()
	}
	return s, nil
}

// readAhead reads what it is sent, in order. It runs on a goroutine of its own.
func (s *segments) readAhead() {
	for t := range s.todo {
		t.err = parallel.Catch(func() error { return s.read(t) })
		t.ended <- struct{}{}
	}
}

func (s *segments) read(t *slot) error {
	if err := s.ctx.Err(); err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if _, err := s.log.file.ReadAt(t.buf, s.log.offset(t.seg*SegmentSize)); err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	return nil
}

// get returns the contents of segment n, which are the caller's until it asks for another one.
func (s *segments) get(n uint64) ([]byte, error) {
	t := s.slot(n)
	if !t.full || t.seg != n {
		s.ask(n)
	}
	for s.next <= n+s.ahead && s.next < s.end {
		s.ask(s.next)
	}
	s.take(t)
	if t.err != nil {
		t.full = false
		parallel.Throw(t.err)
		return nil, t.err
	}
	if err := s.ctx.Err(); err != nil {
		return nil, fmt.Errorf("read the log: %w", err)
	}
	return t.buf, nil
}

func (s *segments) slot(n uint64) *slot { return &s.slots[n%uint64(len(s.slots))] }

// ask has segment n read, and after it the one behind it.
func (s *segments) ask(n uint64) {
	t := s.slot(n)
	s.take(t) // of a segment that nobody has asked for
	t.seg, t.full, s.next = n, true, n+1
	if s.todo == nil {
		t.err = s.read(t)
		return
	}
	t.lent = true
	s.todo <- t
}

// take waits until nobody reads into t.
func (s *segments) take(t *slot) {
	if t.lent {
		<-t.ended
		t.lent = false
	}
}
