package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/reactor"
)

// env is a reactor as the engine wants it. It counts the workers: after the
// reactor's panic nobody else knows when the last of them is done with the
// image's memory.
type env struct {
	r       *reactor.Reactor
	workers sync.WaitGroup
	lease   time.Duration // until when it lasts; the reactor's
}

var _ engine.Env = (*env)(nil)

// Now implements engine.Env.
func (e *env) Now() time.Duration { return e.r.Now() }

// Post implements engine.Env.
func (e *env) Post(fn func()) { e.r.Post(fn) }

// Spawn implements engine.Env.
func (e *env) Spawn(work, done func()) {
	e.workers.Add(1)
	e.r.Spawn(func() {
		defer e.workers.Done()
		work()
	}, done)
}

// AfterFunc implements engine.Env.
func (e *env) AfterFunc(d time.Duration, fn func()) engine.Timer { return e.r.AfterFunc(d, fn) }

// LeaseUntil implements engine.Env: answers go through the reactor's ring, or tell the time to
// library clients.
func (e *env) LeaseUntil(t time.Duration) {
	e.lease = t
	e.r.Ring().SetDeadline(t)
}

// wait waits until no worker runs, or ctx ends, and reports which.
func (e *env) wait(ctx context.Context) bool {
	done := make(chan struct{})
	go func() {
		e.workers.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// call runs fn on the reactor and waits for it, unlike Reactor.Call at most as
// long as ctx lasts: fn may run later then.
func call(ctx context.Context, r *reactor.Reactor, fn func()) error {
	ran := make(chan struct{})
	r.Post(func() { fn(); close(ran) })
	why := reactor.ErrStopped
	select {
	case <-ran:
		return nil
	case <-r.Done():
	case <-ctx.Done():
		why = context.Cause(ctx)
	}
	select {
	case <-ran: // in the last turn, or just now: of two that are ready either is taken above
		return nil
	default:
		return why
	}
}
