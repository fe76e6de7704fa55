package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/ublk"
)

const (
	// libraryLinger is for how long an image that was attached for library clients stays so
	// without any: the next one that comes in that time need not wait for it.
	libraryLinger = 10 * time.Second
	// returnLinger is the same where an earlier daemon had attached it: its clients come back.
	returnLinger = 2 * time.Minute
	// pauseTimeout bounds the wait for what a client has under way.
	pauseTimeout = 30 * time.Second
)

// A handle is an image, or a snapshot, that a library client has open: a ring that the reactor
// of an attachment serves. It stays when the reactor is replaced.
type handle struct {
	who      string // the process, for people
	number   uint64 // unlike those of other handles
	sock     io.Closer
	readOnly bool
	shared   bool // it writes, and a block device that says so too may write beside it
	mem      *ring.Memory
	conn     *ring.Conn
	refs     atomic.Int32 // who uses mem: the handle itself, and each disk that it is hooked to

	// at is what the handle is one of, nil before that. Who changes it holds the mu of both that it
	// was one of and of what it is one of from then on.
	at atomic.Pointer[attachment]

	aside bool // guarded by the attachment's mu: it does not count among those who use it
}

// newHandle makes a handle that nobody serves yet.
func newHandle(who string, sock io.Closer, readOnly, shared bool, version, entries uint32, data uint64) (*handle, error) {
	mem, err := ring.NewMemory(version, entries, data)
	if err != nil {
		return nil, err
	}
	h := &handle{who: who, number: rand.Uint64(), sock: sock, readOnly: readOnly, shared: shared && !readOnly, mem: mem}
	h.conn = ring.NewConn(mem, func(error) { h.sock.Close() })
	h.refs.Store(1)
	return h, nil
}

// put gives up one use of the ring's memory.
func (h *handle) put() error {
	if h.refs.Add(-1) > 0 {
		return nil
	}
	return h.conn.Close()
}

// hook has the reactor serve the rings of handles. What they had under way elsewhere is done again;
// all that had are to be hooked together (ring.Group.Hook).
func (d *disk) hook(handles ...*handle) {
	for _, h := range handles {
		d.hooked.add(h)
	}
	// If the reactor has ended, or does before it comes to this, the handles are hooked to the next
	// one, and the use ends with the disk.
	d.reactor.Post(func() {
		if d.rings == nil {
			d.rings = ring.NewGroup(d.reactor)
		}
		all := make([]ring.Hooking, 0, len(handles))
		for _, h := range handles {
			if d.image != nil {
				h.mem.SetSize(d.image.Sectors() * engine.SectorSize)
			}
			all = append(all, ring.Hooking{Conn: h.conn, Handler: newLibraryFront(d, int(h.mem.Entries()), h.readOnly)})
		}
		d.rings.Hook(all...)
	})
}

// tell wakes the client of a handle, for what its ring's header says. If the handle is hooked to
// another reactor before that, it is woken by that.
func (d *disk) tell(h *handle) {
	d.reactor.Post(func() {
		if d.rings != nil && d.hooked.has(h) {
			d.rings.Tell(h.conn)
		}
	})
}

// hookedHandles are the handles whose memory a disk may use. It has a use of each of them.
type hookedHandles struct {
	mu  sync.Mutex
	set map[*handle]struct{} // guarded by mu
}

func (s *hookedHandles) add(h *handle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.set[h]; ok {
		return
	}
	if s.set == nil {
		s.set = make(map[*handle]struct{})
	}
	s.set[h] = struct{}{}
	h.refs.Add(1)
}

// any reports whether there are any.
func (s *hookedHandles) any() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.set) > 0
}

func (s *hookedHandles) has(h *handle) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.set[h]
	return ok
}

// put ends the use of a handle, if there is one.
func (s *hookedHandles) put(h *handle) error {
	s.mu.Lock()
	_, ok := s.set[h]
	delete(s.set, h)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	return h.put()
}

// putAll ends the use of all.
func (s *hookedHandles) putAll() error {
	s.mu.Lock()
	set := s.set
	s.set = nil
	s.mu.Unlock()
	var errs []error
	for h := range set {
		errs = append(errs, h.put())
	}
	return errors.Join(errs...)
}

// closeAll has the clients find that their handles have ended.
func (s *hookedHandles) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for h := range s.set {
		h.sock.Close()
	}
}

// unhook has the reactor leave a handle's ring once nothing of it is under way any more. It returns
// when that is so, or ctx ends.
func (d *disk) unhook(ctx context.Context, h *handle) error {
	done := make(chan struct{})
	d.reactor.Post(func() {
		if !d.hooked.has(h) || d.deaf { // when that ends so does its use of the memory
			close(done)
			return
		}
		end := func() {
			err := d.hooked.put(h)
			close(done)
			if err != nil {
				d.logger.Error("free the ring of a library client", "err", err)
			}
		}
		d.rings.Unhook(h.conn, end)
	})
	select {
	case <-done:
		return nil
	case <-d.reactor.Done():
		return d.died()
	case <-ctx.Done():
		return fmt.Errorf("what the client has under way does not end: %w", context.Cause(ctx))
	}
}

// addHandle makes a handle one of the attachment's, which serves it from now on.
func (a *attachment) addHandle(h *handle) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h.at.Store(a)
	a.handles[h] = struct{}{}
	if a.disk != nil {
		a.disk.hook(h)
	}
}

// lock returns what the handle is one of, with its mu taken.
func (h *handle) lock() *attachment {
	for {
		a := h.at.Load()
		a.mu.Lock()
		if h.at.Load() == a {
			return a
		}
		a.mu.Unlock() // it has moved meanwhile
	}
}

// end ends a handle whose client is gone, or has closed it: then nothing is under way.
func (h *handle) end() {
	a := h.lock()
	delete(a.handles, h)
	if len(a.handles) == 0 {
		a.unused = time.Now()
	}
	dk := a.disk
	a.mu.Unlock()
	if dk != nil {
		// What is under way ends by itself, or the disk does. The ring says how, for a client that
		// has lost its connection alone.
		_ = dk.unhook(context.Background(), h)
	}
	if err := h.put(); err != nil {
		a.logger.Error("free the ring of a library client", "err", err)
	}
}

// closeHandles has the clients find that their handles have ended.
func (a *attachment) closeHandles() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for h := range a.handles {
		h.sock.Close()
	}
}

// tellSize tells library clients the size of the image in bytes.
func (a *attachment) tellSize(size uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for h := range a.handles {
		h.mem.SetSize(size)
	}
	a.tellChangeLocked()
}

// tellChange tells library clients that the image has another size, other contents after a
// rollback, or other snapshots.
func (a *attachment) tellChange() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tellChangeLocked()
}

// tellChangeLocked is tellChange for who holds mu.
func (a *attachment) tellChangeLocked() {
	for h := range a.handles {
		h.mem.Changed()
		if a.disk != nil {
			a.disk.tell(h)
		}
	}
}

// clients returns the processes that have the image open through the library.
func (a *attachment) clients() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []string
	for h := range a.handles {
		if !h.aside {
			list = append(list, h.who)
		}
	}
	return list
}

// clientsOf returns the library clients of the attachment of a number.
func (d *Daemon) clientsOf(id int) []string {
	if a := d.find(id); a != nil {
		return a.clients()
	}
	return nil
}

// holders returns who uses the attachment.
func (a *attachment) holders(k kernel) []string {
	if a.id >= firstDoor {
		return k.Holders(a.id)
	}
	return append(k.Holders(a.id), a.clients()...)
}

// pause has a handle's ring be left alone once nothing of it is under way, until it is hooked to
// a disk again.
func (a *attachment) pause(ctx context.Context, dk *disk, h *handle) error {
	ctx, stop := context.WithTimeout(ctx, pauseTimeout)
	defer stop()
	err := dk.unhook(ctx, h)
	if err != nil && ctx.Err() != nil {
		h.sock.Close() // it opens the image again, and has all of it done anew
	}
	return err
}

// setAside says whether a handle does not count among those who use the attachment: it has asked
// for what nobody else may be in the way of.
func (a *attachment) setAside(h *handle, aside bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h.aside = aside
}

// letGoUnused detaches an image that was attached for library clients, if it has had none for a
// while.
func (a *attachment) letGoUnused(now time.Time) {
	a.mu.Lock()
	linger := libraryLinger
	if a.found {
		linger = returnLinger
	}
	unused := a.id >= firstDoor && len(a.handles) == 0 && now.Sub(a.unused) >= linger && (a.state == api.StateActive || a.state == api.StateFailed)
	a.mu.Unlock()
	if unused && a.leaving.CompareAndSwap(false, true) {
		go func() {
			defer a.leaving.Store(false)
			a.detachUnused()
		}()
	}
}

// detachUnused detaches an image that nobody uses. If that cannot be done now it is tried again
// later.
func (a *attachment) detachUnused() {
	_, err := a.detach(a.d.serving, api.DetachRequest{}, func(api.Progress) {})
	var busy *ublk.BusyError
	if err == nil || a.d.serving.Err() != nil || errors.As(err, &busy) { // somebody has come
		return
	}
	a.logger.Warn("nobody uses it any more, and it could not be detached", "err", err)
	a.mu.Lock()
	a.unused = time.Now()
	a.mu.Unlock()
}
