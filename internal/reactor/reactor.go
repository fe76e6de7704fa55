// Package reactor is an event loop: one goroutine, locked to its OS thread,
// with one io_uring, that owns whatever state its functions touch.
//
// A turn of the loop is: completions, posted functions, timers, what its sources
// have, turn hooks, then one system call that submits what all of these queued and,
// if nothing is left to do, waits. Everything in a turn runs on the reactor's goroutine, so
// state that only a reactor touches needs no lock. Nothing in a turn may block;
// what must block goes to [Reactor.Spawn].
//
// A panic in a turn ends that reactor and no other: see [Config.OnPanic].
package reactor

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/internal/boottime"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// Errors of [Reactor.Call].
var (
	// ErrStopped says that the reactor has stopped.
	ErrStopped = errors.New("reactor: stopped")
	// ErrOwnThread says that a reactor was asked to wait for itself.
	ErrOwnThread = errors.New("reactor: Call from the reactor's own goroutine")
)

// slice is how long a reactor's thread with a priority of its own wants to run at a
// time, the least that Linux 6.12 and later take: they run a thread the sooner the
// less it asks for (EEVDF). Older ones go by the priority alone.
const slice = 100 * time.Microsecond

// threadTimeout bounds the wait for the thread of a reactor that has ended.
const threadTimeout = 10 * time.Second

// Config of [New].
type Config struct {
	// Entries is the size of the ring's submission queue (uring.Options). 0
	// means its default.
	Entries uint32

	// Name says in logs and errors which reactor it is.
	Name string

	// Nice is the nice value of the reactor's thread, from -20 to 19, which then also
	// asks for the shortest slice (sched_setattr(2)); 0 leaves both as they are. If
	// the process may not set it, the log says so, and the reactor runs without.
	Nice int

	// Spin is for how long at most the reactor looks for work before it sleeps, in which it gives
	// its processor to others that want it; 0: not at all. It does so only while what comes has
	// come within that time: see idle.
	Spin time.Duration

	// Logger receives what the reactor has to say; nil means slog.Default().
	Logger *slog.Logger

	// OnPanic is called when a handler panicked, with the reactor's name and
	// the panic's value as the error; the stack is in the log. It runs on the
	// dying goroutine when posting already fails, and before Done, for which
	// it must not wait. It may be nil.
	OnPanic func(err error)
}

// A Reactor is an event loop. Only Post, Call, Stop, Done and Err may be
// called from other goroutines; everything else is for functions that run on
// the reactor.
type Reactor struct {
	name    string
	log     *slog.Logger
	onPanic func(error)
	tid     int
	base    time.Time // zero of the timers' clock
	done    chan struct{}

	// Set by Post, cleared by the reactor.
	mu     sync.Mutex
	inbox  []func() // guarded by mu
	ended  bool     // guarded by mu: the inbox takes no more
	posted atomic.Bool

	sleeping atomic.Bool // the reactor waits, or is about to: it needs a wake-up
	stopping atomic.Bool

	// The rest is the reactor's own.
	ring  *uring.Ring
	waker *uring.Waker
	spare []func() // the inbox's other half
	hooks []func()
	// sources are looked at in each turn.
	sources []Source
	timers  timerHeap
	ticks   time.Duration // the timers' clock, when it was read in this turn
	timed   bool          // it has been
	spin    time.Duration // Config.Spin
	busy    bool          // the last time that there was nothing to do was shorter, and a client had asked for something
	asked   time.Time     // when the last turn ended in which a client's work had come, by the ring or a source
	served  bool          // it has since then

	err error // why it ended; written before done is closed
}

// New starts a reactor. It returns an error when the kernel gives no ring.
func New(c Config) (*Reactor, error) {
	r := &Reactor{
		name:    c.Name,
		spin:    c.Spin,
		log:     c.Logger,
		onPanic: c.OnPanic,
		base:    time.Now(),
		done:    make(chan struct{}),
	}
	if r.log == nil {
		r.log = slog.Default()
	}
	if c.Name != "" {
		r.log = r.log.With("reactor", c.Name)
	}
	ready := make(chan error)
	onOwnThread(func() { r.run(c.Entries, c.Nice, ready) })
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("reactor %s: %w", c.Name, err)
	}
	return r, nil
}

// onOwnThread runs fn on a new goroutine whose thread is its own and ends with
// it: the kernel frees what it holds for a thread (ublk queues, the ring's work)
// when the thread ends. The process's main thread never ends in Go, so it is
// kept away from fn.
func onOwnThread(fn func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Start from here while this thread is taken, then give it back.
			other := make(chan struct{})
			go func() {
				runtime.LockOSThread()
				close(other)
				fn()
			}()
			<-other
			runtime.UnlockOSThread()
			return
		}
		fn()
	}()
}

// run is the reactor's goroutine.
func (r *Reactor) run(entries uint32, nice int, ready chan<- error) {
	// Not unlocked: the thread ends with the goroutine, see onOwnThread.
	r.tid = unix.Gettid()
	r.setNice(nice)
	if err := r.open(entries); err != nil {
		ready <- err
		return
	}
	close(ready)

	err := r.loop()

	r.mu.Lock()
	r.ended = true
	r.inbox = nil
	r.mu.Unlock()
	derr := r.ring.Drain()
	r.err = err
	go r.release(derr)
	if err != nil && r.onPanic != nil {
		r.reportPanic(err)
	}
}

// setNice sets the priority of the calling thread, the reactor's. None inherits it
// but the ring's: the runtime starts its threads from another one when this is locked
// to a goroutine.
func (r *Reactor) setNice(nice int) {
	if nice == 0 {
		return
	}
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: int32(nice), Runtime: uint64(slice.Nanoseconds())}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		r.log.Warn("the thread that serves the disk gets no priority: requests wait when the processors are busy", "nice", nice, "err", err)
	}
}

// reportPanic calls OnPanic, which must not take the process down either.
func (r *Reactor) reportPanic(err error) {
	defer func() {
		if v := recover(); v != nil {
			r.log.Error("panic in OnPanic", "panic", v, "stack", string(debug.Stack()))
		}
	}()
	r.onPanic(err)
}

// release frees the ring once the reactor's thread is gone, and closes done.
//
// The order matters for ublk commands in flight. When their thread ends, the
// kernel cancels them on that thread, which serializes this with the delivery
// of requests. When their ring is closed first, a kernel worker does it beside
// the thread: Linux 6.12 then completes some of them twice and crashes.
func (r *Reactor) release(derr error) {
	gone := func() bool { return unix.Tgkill(unix.Getpid(), r.tid, 0) == unix.ESRCH }
	for deadline := time.Now().Add(threadTimeout); !gone(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.log.Error("the reactor's thread does not end")
			break
		}
	}
	if derr != nil {
		// The waker's and others' buffers stay mapped.
		r.log.Error("ring does not drain", "err", derr)
	} else if err := r.waker.Close(); err != nil {
		r.log.Error("waker does not close", "err", err)
	}
	if err := r.ring.Close(); err != nil {
		r.log.Error("ring does not close", "err", err)
	}
	close(r.done)
}

func (r *Reactor) open(entries uint32) error {
	ring, err := uring.New(uring.Options{Entries: entries})
	if err != nil {
		return err
	}
	waker, err := uring.NewWaker(ring)
	if err != nil {
		ring.Close()
		return err
	}
	r.ring, r.waker = ring, waker
	return nil
}

// loop runs turns until Stop or a panic, which it returns.
func (r *Reactor) loop() (err error) {
	// A fault on mapped memory (a truncated file) becomes a panic too.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("reactor %s: panic: %v", r.name, v)
			if e, ok := v.(error); ok {
				err = fmt.Errorf("reactor %s: panic: %w", r.name, e)
			}
			r.log.Error("panic in the reactor", "panic", v, "stack", string(debug.Stack()))
		}
	}()
	for {
		r.timed = false
		woken := r.waker.Woken()
		reaped := r.ring.Reap()
		r.served = r.served || reaped > int(r.waker.Woken()-woken)
		r.runInbox()
		r.runTimers()
		for _, s := range r.sources {
			r.served = r.served || s.Waiting()
			s.Poll()
		}
		for _, fn := range r.hooks {
			fn()
		}
		for _, s := range r.sources {
			s.EndTurn()
		}
		if r.stopping.Load() && !r.posted.Load() {
			return nil
		}
		if err := r.submit(); err != nil {
			panic(err)
		}
	}
}

// submit ends a turn with one system call, and sleeps in it if there is nothing
// to do.
func (r *Reactor) submit() error {
	if r.ring.Ready() || r.posted.Load() {
		return r.ring.SubmitAndWait(0)
	}
	if r.spin == 0 {
		return r.sleep()
	}
	return r.idle()
}

// askedSpins is for how long, in times of Config.Spin, a client that has asked for something is
// expected to do so again, whatever else there is to do meanwhile.
const askedSpins = 10

// idle waits for work. To sleep and to be woken takes a processor longer than many a thing that is
// waited for, and much longer where the processor is a virtual one, which then goes to sleep itself:
// so while the work comes fast the reactor looks for it first. This is what KVM does for its guests
// (Documentation/virt/kvm/halt-polling.rst). What workers post, and timers, say nothing of when the
// next request comes, and nobody waits for most of it: destaging alone had the reactor look for work
// for longer than all that it does takes.
func (r *Reactor) idle() error {
	began := time.Now()
	if r.served {
		r.asked, r.served = began, false
	}
	defer func() {
		now := time.Now()
		r.busy = now.Sub(began) <= r.spin && now.Sub(r.asked) <= askedSpins*r.spin
	}()
	for r.busy && time.Since(began) <= r.spin {
		if err := r.ring.SubmitAndWait(0); err != nil {
			return err
		}
		if r.ring.Ready() || r.posted.Load() || r.waiting() {
			return r.waker.Err()
		}
		unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	return r.sleep()
}

// waiting reports whether a source has something.
func (r *Reactor) waiting() bool {
	for _, s := range r.sources {
		if s.Waiting() {
			return true
		}
	}
	return false
}

// sleep submits what is queued and waits until there is something to do.
func (r *Reactor) sleep() error {
	timeout := time.Duration(-1)
	if len(r.timers) != 0 {
		r.timed = false
		timeout = max(r.timers[0].when-r.tick(), 0)
	}
	// Post looks at sleeping after it has set posted, the reactor at posted
	// after it has set sleeping: one of the two sees the other.
	r.sleeping.Store(true)
	if r.posted.Load() {
		timeout = 0
	}
	// The same holds between a source and those that bring it work.
	for _, s := range r.sources {
		if s.Arm() {
			timeout = 0
		}
	}
	err := r.ring.SubmitAndWait(timeout)
	for _, s := range r.sources {
		s.Disarm()
	}
	r.sleeping.Store(false)
	if err == nil {
		err = r.waker.Err()
	}
	return err
}

// runInbox runs the functions posted before its call; those posted meanwhile
// have their turn in the next round, so that completions are not starved.
func (r *Reactor) runInbox() {
	if !r.posted.Load() {
		return
	}
	r.mu.Lock()
	fns := r.inbox
	r.inbox = r.spare[:0]
	r.posted.Store(false)
	r.mu.Unlock()
	for i, fn := range fns {
		fns[i] = nil
		fn()
	}
	r.spare = fns[:0]
}

func (r *Reactor) runTimers() {
	if len(r.timers) == 0 {
		return
	}
	now := r.tick()
	r.ticks++ // a timer that a function sets to fire at once fires in the next turn
	for len(r.timers) != 0 && r.timers[0].when <= now {
		t := r.timers[0]
		r.timers.remove(t)
		t.fn()
	}
}

// Post makes fn run on the reactor, in a later turn than the current one when
// it is called on the reactor itself. Functions posted by one goroutine run in
// order. Once the reactor has ended, fn is dropped. Any goroutine may call Post;
// it does not block, and allocates nothing while the inbox does not grow.
func (r *Reactor) Post(fn func()) { r.TryPost(fn) }

// TryPost is Post that reports whether the reactor has not ended yet.
func (r *Reactor) TryPost(fn func()) bool {
	r.mu.Lock()
	if r.ended {
		r.mu.Unlock()
		return false
	}
	r.inbox = append(r.inbox, fn)
	r.posted.Store(true)
	// Under the lock, so that the waker is not closed meanwhile.
	if r.sleeping.Load() && r.sleeping.CompareAndSwap(true, false) {
		r.waker.Wake()
	}
	r.mu.Unlock()
	return true
}

// Call runs fn on the reactor and returns when it has run. It fails with
// ErrStopped when the reactor ended without having run it to its end, and with
// ErrOwnThread on the reactor itself. Any other goroutine may call it.
func (r *Reactor) Call(fn func()) error {
	if unix.Gettid() == r.tid {
		return ErrOwnThread
	}
	ran := make(chan struct{})
	if !r.TryPost(func() { fn(); close(ran) }) {
		return ErrStopped
	}
	select {
	case <-ran:
		return nil
	case <-r.done:
	}
	select {
	case <-ran: // it ran in the last turn
		return nil
	default:
		return ErrStopped
	}
}

// Stop makes the reactor end after it has run what was posted before. It does
// not wait: see Done. Operations in flight are cancelled, and their Completers
// are not called any more, so the owner first lets its work come to an end. Any
// goroutine may call Stop.
func (r *Reactor) Stop() {
	r.stopping.Store(true)
	r.Post(func() {})
}

// Done returns a channel that is closed when the reactor has ended and its
// thread is gone.
func (r *Reactor) Done() <-chan struct{} { return r.done }

// Err returns the panic that ended the reactor, nil after Stop. It is valid
// after Done.
func (r *Reactor) Err() error { return r.err }

// Now returns the time on the host's clock that goes on while it is suspended:
// leases are counted by it. It is read anew at each call.
func (r *Reactor) Now() time.Duration { return boottime.Now() }

// tick returns the time since the reactor was made, on the monotonic clock, by
// which timers go: io_uring_enter waits by it too. It is read at most once in a
// turn, so it can be as old as the turn.
func (r *Reactor) tick() time.Duration {
	if !r.timed {
		r.ticks = time.Since(r.base)
		r.timed = true
	}
	return r.ticks
}

// AfterFunc makes fn run on the reactor d from now.
func (r *Reactor) AfterFunc(d time.Duration, fn func()) *Timer {
	t := &Timer{r: r, fn: fn, pos: -1}
	t.Reset(d)
	return t
}

// OnTurn makes fn run at the end of each turn, after the turn's completions,
// posted functions and timers, and before the operations that they and fn
// queued are submitted. Hooks run in the order in which they were added.
func (r *Reactor) OnTurn(fn func()) { r.hooks = append(r.hooks, fn) }

// Spawn runs work on a goroutine of its own, where it may block, and then done
// on the reactor. A panic in work becomes one of the reactor. done may be nil;
// it is not run when the reactor has ended.
func (r *Reactor) Spawn(work func(), done func()) {
	go func() {
		defer func() {
			if v := recover(); v != nil {
				r.log.Error("panic in spawned work", "panic", v, "stack", string(debug.Stack()))
				r.Post(func() { panic(v) })
			}
		}()
		work()
		if done != nil {
			r.Post(done)
		}
	}()
}

// Ring returns the reactor's ring, which only the reactor may use.
func (r *Reactor) Ring() *uring.Ring { return r.ring }
