package ring

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// A Group serves Conns on one reactor, on which all its methods are called.
//
// In each turn it takes what the clients have submitted, before the turn's hooks, and
// wakes those that sleep and have got completions, after them.
type Group struct {
	r        *reactor.Reactor
	ring     *uring.Ring
	sessions []*session
	left     bool // there is work for the end of a turn
}

// A session is a Conn's time with a Group. What the ring says of its operations reaches
// the session, and what handlers say too: neither touches the Conn after its end.
type session struct {
	g   *Group
	c   *Conn
	h   Handler
	ios []IO

	// ended is set when c is served by nobody, or by another session. It is atomic for
	// those that complete a request at any time after that; nobody does beside it.
	ended atomic.Bool

	leaving  bool // takes no new requests, and ends when none is under way
	dirty    bool // there are completions of which it has not been told
	armed    bool // the client has been asked to wake the reactor
	polling  bool // a poll of the eventfd that wakes the daemon is in flight
	waking   bool // a write to the eventfd that wakes the client is in flight
	again    bool // and must be repeated
	canceled bool // what is in flight has been asked to end
	done     []func()
}

// NewGroup returns a group of the reactor r, on which it is called. There is one for
// each reactor.
func NewGroup(r *reactor.Reactor) *Group {
	g := &Group{r: r, ring: r.Ring()}
	r.AddSource(g)
	return g
}

// A Hooking is a Conn that is to be served, and who handles its requests.
type Hooking struct {
	Conn    *Conn
	Handler Handler
}

// Hook begins to serve Conns. Nobody may be serving them: they have never been hooked, or
// have been unhooked, or the reactor that served them has ended (reactor.Reactor.Done). In
// that case the handlers get what was under way again, before Hook returns: first of all
// Conns the compare and writes that had been decided, which nothing may change the range of
// any more, and then the rest, of each in the order in which it had been submitted.
//
// So the Conns of one image are all hooked at once when its reactor is replaced.
func (g *Group) Hook(all ...Hooking) {
	var again []repeat
	for _, k := range all {
		again = append(again, g.hook(k.Conn, k.Handler)...)
	}
	for _, decided := range []bool{true, false} {
		for _, r := range again {
			if r.decided == decided {
				r.s.start(r.t)
			}
		}
	}
}

// hook is Hook of one, but that it returns what is to be started again.
func (g *Group) hook(c *Conn, h Handler) []repeat {
	if old := c.session; old != nil {
		if old.g == g {
			panic("ring: hooked twice")
		}
		old.ended.Store(true)
	}
	s := &session{g: g, c: c, h: h, ios: make([]IO, c.m.entries)}
	for i := range s.ios {
		s.ios[i].Tag, s.ios[i].s = uint32(i), s
	}
	c.session = s
	g.sessions = append(g.sessions, s)
	// The last reactor may have died after it had taken entries, and before it said so.
	atomic.StoreUint32(c.m.sqHead, c.head)
	s.poll()
	// The last reactor may have told the client to wake up and not come to do it.
	s.wake()
	return s.underWay()
}

// A repeat is a request that was under way when its Conn's last reactor died.
type repeat struct {
	s       *session
	t       *slot
	decided bool // as it was then
}

// underWay returns what was under way when the Conn's last reactor died.
func (s *session) underWay() []repeat {
	c := s.c
	if c.busy == 0 {
		return nil
	}
	var again []repeat
	for i := range c.slots {
		if t := &c.slots[i]; t.phase == taken || t.phase == late {
			again = append(again, repeat{s, t, t.phase == taken && t.decided})
		}
	}
	slices.SortFunc(again, func(a, b repeat) int { return cmp.Compare(a.t.seq, b.t.seq) })
	return again
}

// Unhook lets go of c: nothing more is taken from its ring, and when nothing of it is
// under way any more done is called, on the reactor, once: c can then be hooked
// elsewhere, or its Memory be closed. done may be nil, and may be called before Unhook
// returns, when g does not serve c.
func (g *Group) Unhook(c *Conn, done func()) {
	s := c.session
	if s == nil || s.g != g {
		if done != nil {
			done()
		}
		return
	}
	s.leaving = true
	if done != nil {
		s.done = append(s.done, done)
	}
	g.left = true
}

// Poll implements reactor.Source.
func (g *Group) Poll() {
	for i := 0; i < len(g.sessions); i++ { // handlers may hook others
		g.sessions[i].take()
	}
}

// take takes what the client has submitted.
func (s *session) take() {
	c := s.c
	n, ok := c.waiting()
	if n == 0 || !s.serving() {
		return
	}
	if !ok {
		c.broken(fmt.Errorf("%d entries submitted to a queue of %d", n, c.m.entries))
		return
	}
	for ; n > 0 && s.serving(); n-- {
		t, err := c.take()
		if err != nil {
			c.broken(err)
			return
		}
		s.start(t)
	}
	atomic.StoreUint32(c.m.sqHead, c.head)
}

// serving reports whether requests are taken from the client.
func (s *session) serving() bool { return !s.leaving && s.c.err.Load() == nil }

// start gives the handler a request.
func (s *session) start(t *slot) {
	io := &s.ios[t.tag]
	io.load(t, s.c.m.data)
	if t.phase == late {
		s.h.TakeBack(io)
		return
	}
	s.h.Handle(io)
}

// Tell wakes c's client, if it sleeps, for what Memory.Changed has counted.
func (g *Group) Tell(c *Conn) {
	if s := c.session; s != nil && s.g == g {
		s.dirty, g.left = true, true
	}
}

// EndTurn implements reactor.Source: it wakes clients, and ends sessions.
func (g *Group) EndTurn() {
	if !g.left {
		return
	}
	g.left = false
	for i := 0; i < len(g.sessions); {
		s := g.sessions[i]
		if s.dirty {
			s.dirty = false
			if atomic.LoadUint32(s.c.m.clientSleep) == 1 && atomic.CompareAndSwapUint32(s.c.m.clientSleep, 1, 0) {
				s.wake()
			}
		}
		if !s.leaving || s.c.busy > 0 || !s.retire() {
			i++
			continue
		}
		g.sessions = slices.Delete(g.sessions, i, i+1)
		s.end()
	}
}

// retire takes back what the ring has of the session, and reports whether it has
// nothing any more.
func (s *session) retire() bool {
	if !s.canceled {
		s.canceled = true
		files := s.c.m.files
		if s.polling {
			s.g.ring.CancelFile(files[1])
		}
		if s.waking {
			// It is carried out as it is submitted, before this, unless a client has
			// seen to it that it cannot be.
			s.g.ring.CancelFile(files[2])
		}
	}
	return !s.polling && !s.waking
}

// end ends a session of which nothing is under way.
func (s *session) end() {
	s.ended.Store(true)
	s.c.session = nil
	for _, fn := range s.done {
		fn()
	}
}

// Waiting implements reactor.Source.
func (g *Group) Waiting() bool {
	for _, s := range g.sessions {
		if n, _ := s.c.waiting(); n != 0 && s.serving() {
			return true
		}
	}
	return false
}

// Arm implements reactor.Source.
func (g *Group) Arm() bool {
	work := g.left
	for _, s := range g.sessions {
		if !s.serving() {
			continue
		}
		s.armed = true
		// These are sequentially consistent: either this sees what the client has
		// submitted, or the client, which looks after that, sees the word.
		atomic.StoreUint32(s.c.m.daemonSleep, 1)
		if n, _ := s.c.waiting(); n != 0 {
			work = true
		}
	}
	return work
}

// Disarm implements reactor.Source.
func (g *Group) Disarm() {
	for _, s := range g.sessions {
		if s.armed {
			s.armed = false
			atomic.StoreUint32(s.c.m.daemonSleep, 0)
		}
	}
}

// poll has the reactor woken by the client.
func (s *session) poll() {
	s.polling = true
	s.g.ring.PollIn(s.c.m.files[1], (*poller)(s))
}

// A poller is a session that is told of its poll. What has come is taken in the same
// turn, by Poll; the eventfd's count interests nobody.
type poller session

// Complete implements uring.Completer.
func (p *poller) Complete(res int32, flags uint32) {
	if uring.More(flags) {
		return
	}
	s := (*session)(p)
	s.polling = false
	s.g.left = true
	switch {
	case s.leaving:
	case res < 0:
		s.c.broken(fmt.Errorf("its wake-ups cannot be waited for: %w", unix.Errno(-res)))
	default: // it ends when the ring's completion queue has no room
		s.poll()
	}
}

// one is what is added to an eventfd.
const one = "\x01\x00\x00\x00\x00\x00\x00\x00"

// wake wakes the client. A client can see to it that a write to its eventfd blocks: so
// the kernel does it beside the reactor, and has one such write of a session at most.
func (s *session) wake() {
	if s.waking {
		s.again = true
		return
	}
	s.waking = true
	// Unsafe: the bytes are a constant's, which are not on the Go heap, nor ever move.
	// The kernel only reads them.
	s.g.ring.Write(s.c.m.files[2], unsafe.Slice(unsafe.StringData(one), len(one)), -1, (*waker)(s))
}

// A waker is a session that is told of its write.
type waker session

// Complete implements uring.Completer. That the write failed, for a count that is full,
// is the client's loss.
func (w *waker) Complete(res int32, _ uint32) {
	s := (*session)(w)
	again := s.again && res >= 0
	s.waking, s.again = false, false
	s.g.left = true
	if again {
		s.canceled = false
		s.wake()
	}
}
