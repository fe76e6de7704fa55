package reactor

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/uring"
)

// A counter is a Source to which any goroutine brings things, and what it does is
// written down as letters.
type counter struct {
	brought  atomic.Int64
	sleeping atomic.Bool
	taken    atomic.Int64
	waker    *uring.Waker
	work     bool   // what Arm says, once
	log      []byte // if not nil
	armed    bool
	t        testing.TB
}

func newCounter(t testing.TB, r *Reactor) *counter {
	c := &counter{t: t}
	call(t, r, func() {
		var err error
		if c.waker, err = uring.NewWaker(r.Ring()); err != nil {
			t.Error(err)
			return
		}
		r.AddSource(c)
	})
	t.Cleanup(func() {
		r.Stop()
		waitDone(t, r)
		c.waker.Close()
	})
	return c
}

func (c *counter) bring() {
	c.brought.Add(1)
	if c.sleeping.Load() && c.sleeping.CompareAndSwap(true, false) {
		c.waker.Wake()
	}
}

func (c *counter) note(b byte) {
	if c.log != nil {
		c.log = append(c.log, b)
	}
}

func (c *counter) Poll() {
	c.note('p')
	if c.armed {
		c.t.Error("Poll while it is armed")
	}
	c.taken.Store(c.brought.Load())
}

func (c *counter) EndTurn() { c.note('e') }

func (c *counter) Waiting() bool { return c.brought.Load() != c.taken.Load() }

func (c *counter) Arm() bool {
	c.note('a')
	c.armed = true
	c.sleeping.Store(true)
	work := c.work
	c.work = false
	return work || c.brought.Load() != c.taken.Load()
}

func (c *counter) Disarm() {
	c.note('d')
	if !c.armed {
		c.t.Error("Disarm without Arm")
	}
	c.armed = false
	c.sleeping.Store(false)
}

// TestSourceWakes brings a reactor work at moments when it is about to sleep. Were one
// wake-up lost, nothing would end its sleep.
func TestSourceWakes(t *testing.T) {
	for _, spin := range []time.Duration{0, 20 * time.Microsecond} {
		t.Run(spin.String(), func(t *testing.T) { sourceWakes(t, newReactor(t, Config{Spin: spin})) })
	}
}

func sourceWakes(t *testing.T, r *Reactor) {
	sources := []*counter{newCounter(t, r), newCounter(t, r)}
	const each = 2000
	var wg sync.WaitGroup
	for _, c := range sources {
		wg.Go(func() {
			for i := int64(1); i <= each; i++ {
				c.bring()
				for deadline := time.Now().Add(10 * time.Second); c.taken.Load() < i; {
					if time.Now().After(deadline) {
						t.Errorf("the reactor sleeps, and has taken %d of %d", c.taken.Load(), i)
						return
					}
				}
				for range rand.N(2000) { // to meet it at any moment
					c.sleeping.Load()
				}
			}
		})
	}
	wg.Wait()
}

// TestSourceOrder looks at the order of a turn.
func TestSourceOrder(t *testing.T) {
	r := newReactor(t, Config{})
	c := newCounter(t, r)
	call(t, r, func() {
		r.OnTurn(func() { c.note('h') })
		c.log = []byte{}
		c.work = true // so that there is one more turn
	})
	for !c.sleeping.Load() {
		time.Sleep(time.Millisecond)
	}
	var log string
	call(t, r, func() { log = string(c.log); c.log = nil })
	// A turn after which something is left to do has no sleep at its end.
	if !regexp.MustCompile(`^(phe(ad)?)*$`).MatchString(log) || strings.Count(log, "phead") < 2 {
		t.Errorf("%q", log)
	}
}

// TestSourceSleeps: a reactor with a source that has nothing takes no turns.
func TestSourceSleeps(t *testing.T) {
	r := newReactor(t, Config{})
	newCounter(t, r)
	turns := 0
	call(t, r, func() { r.OnTurn(func() { turns++ }) })
	var before, after int
	call(t, r, func() { before = turns })
	time.Sleep(50 * time.Millisecond)
	call(t, r, func() { after = turns })
	if after-before > 4 {
		t.Errorf("%d turns", after-before)
	}
}

// TestSpin: a reactor to which clients' work comes fast looks for it before it sleeps, and one to
// which it comes slowly, or other work does, does not.
func TestSpin(t *testing.T) {
	r := newReactor(t, Config{Spin: time.Hour})
	c := newCounter(t, r)
	for i := int64(1); i <= 6; i++ {
		if i <= 3 { // it finds out
			c.bring()
		} else {
			c.brought.Add(1) // nobody wakes it
		}
		for deadline := time.Now().Add(10 * time.Second); c.taken.Load() < i; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("it has taken %d of %d", c.taken.Load(), i)
			}
		}
	}
	slow := newReactor(t, Config{Spin: time.Millisecond})
	c = newCounter(t, slow)
	for range 3 {
		time.Sleep(20 * time.Millisecond)
		for deadline := time.Now().Add(10 * time.Second); !c.sleeping.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not sleep")
			}
		}
		c.bring()
	}
	r = newReactor(t, Config{Spin: time.Hour})
	c = newCounter(t, r)
	for range 3 {
		r.Post(func() { r.AfterFunc(time.Millisecond, func() {}) })
		time.Sleep(10 * time.Millisecond)
		for deadline := time.Now().Add(10 * time.Second); !c.sleeping.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not sleep while nothing but posts and timers come")
			}
		}
	}
}
