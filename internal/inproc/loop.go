package inproc

import (
	"sync"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/boottime"
)

// loop is the reactor of one image: a goroutine that runs what it is given, in turns. It is
// an engine.Env.
type loop struct {
	mu    sync.Mutex
	inbox []func()      // guarded by mu
	wake  chan struct{} // holds a token while there may be something in the inbox
	end   bool          // the loop's own

	// timers are those that are going, which the end of the loop stops: some would keep the
	// memory of what they are for, for minutes. The loop's own.
	timers map[*timer]struct{}
}

var _ engine.Env = (*loop)(nil)

func newLoop() *loop {
	return &loop{wake: make(chan struct{}, 1), timers: map[*timer]struct{}{}}
}

// run is the loop: first begin, then turns, each of which ends with endTurn, until stop.
func (l *loop) run(begin, endTurn func()) {
	begin()
	var turn []func()
	for !l.end {
		endTurn()
		<-l.wake
		l.mu.Lock()
		turn, l.inbox = l.inbox, turn[:0]
		l.mu.Unlock()
		for k, fn := range turn {
			fn()
			turn[k] = nil
		}
	}
	for t := range l.timers {
		t.Stop()
	}
}

// stop ends the loop after this turn. What comes later is dropped.
func (l *loop) stop() { l.Post(func() { l.end = true }) }

// Now implements engine.Env.
func (l *loop) Now() time.Duration { return boottime.Now() }

// Post implements engine.Env.
func (l *loop) Post(fn func()) {
	l.mu.Lock()
	l.inbox = append(l.inbox, fn)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Spawn implements engine.Env.
func (l *loop) Spawn(work, done func()) {
	go func() {
		work()
		l.Post(done)
	}()
}

// LeaseUntil implements engine.Env. Nobody is told of the end of a write before the store has
// it, which says itself whether the image was still this process's.
func (l *loop) LeaseUntil(time.Duration) {}

// AfterFunc implements engine.Env.
func (l *loop) AfterFunc(d time.Duration, fn func()) engine.Timer {
	t := &timer{loop: l, fn: fn}
	t.Reset(d)
	return t
}

// timer is a timer of a loop, which owns it.
type timer struct {
	loop  *loop
	fn    func()
	timer *time.Timer
	set   int // how often it was set; one that fires late is none
	going bool
}

// Stop implements engine.Timer.
func (t *timer) Stop() bool {
	was := t.going
	if t.going = false; t.timer != nil {
		t.timer.Stop()
	}
	delete(t.loop.timers, t)
	return was
}

// Reset implements engine.Timer.
func (t *timer) Reset(d time.Duration) {
	t.Stop()
	t.set++
	t.going = true
	t.loop.timers[t] = struct{}{}
	set := t.set
	t.timer = time.AfterFunc(d, func() {
		t.loop.Post(func() {
			if t.going && t.set == set {
				t.going = false
				delete(t.loop.timers, t)
				t.fn()
			}
		})
	})
}
