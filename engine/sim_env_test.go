package engine

import (
	"math/rand/v2"
	"time"

	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// simEnv is the reactor of one image: it does one thing at a time, in an order
// that the seed chooses, on a clock that somebody else moves.
type simEnv struct {
	rng    *rand.Rand
	now    time.Duration
	jobs   []simJob // not yet run
	done   []simJob // run; the reactor has not been told
	timers []*simTimer
	disk   *simdisk.Disk
	cache  *simdisk.Disk // of the read cache, or nil
	until  time.Duration // of the lease, as the image has said
	// delay, if not nil, says how long a job waits to be run, and then to be told.
	delay func() time.Duration
}

type simJob struct {
	work, done func()
	at         time.Duration // not before
}

type simTimer struct {
	env    *simEnv
	at     time.Duration
	fn     func()
	set    bool
	listed bool
}

// Stop implements Timer.
func (t *simTimer) Stop() bool {
	was := t.set
	t.set = false
	return was
}

// Reset implements Timer.
func (t *simTimer) Reset(d time.Duration) {
	t.at, t.set = t.env.now+max(d, 0), true
	if !t.listed {
		t.listed = true
		t.env.timers = append(t.env.timers, t)
	}
}

// Now implements Env.
func (e *simEnv) Now() time.Duration { return e.now }

// Post implements Env. All of a simulation is one goroutine.
func (e *simEnv) Post(fn func()) { e.done = append(e.done, simJob{done: fn}) }

// Spawn implements Env.
func (e *simEnv) Spawn(work, done func()) {
	e.jobs = append(e.jobs, simJob{work, done, e.later()})
}

func (e *simEnv) later() time.Duration {
	if e.delay == nil {
		return 0
	}
	return e.now + e.delay()
}

// AfterFunc implements Env.
func (e *simEnv) AfterFunc(d time.Duration, fn func()) Timer {
	t := &simTimer{env: e, fn: fn}
	t.Reset(d)
	return t
}

// LeaseUntil implements Env.
func (e *simEnv) LeaseUntil(t time.Duration) { e.until = t }

// step does one thing that can be done now, and reports whether there was one.
func (e *simEnv) step() bool {
	kinds := [4]func() bool{e.disk.Step, e.stepCache, e.runJob, e.tellDone}
	e.rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	for _, k := range kinds {
		if k() {
			return true
		}
	}
	return false
}

func (e *simEnv) stepCache() bool { return e.cache != nil && e.cache.Step() }

// take removes one of the jobs whose time has come, the first or any.
func (e *simEnv) take(jobs *[]simJob, first bool) (simJob, bool) {
	list := *jobs
	if len(list) == 0 {
		return simJob{}, false
	}
	at := 0
	if !first {
		at = e.rng.IntN(len(list))
	}
	for k := range list {
		i := (at + k) % len(list)
		if j := list[i]; j.at <= e.now {
			*jobs = append(list[:i], list[i+1:]...)
			return j, true
		}
	}
	return simJob{}, false
}

func (e *simEnv) runJob() bool {
	j, ok := e.take(&e.jobs, false)
	if ok {
		j.work()
		j.at = e.later()
		e.done = append(e.done, j)
	}
	return ok
}

func (e *simEnv) tellDone() bool {
	j, ok := e.take(&e.done, true)
	if ok {
		j.done()
	}
	return ok
}

// next returns the timer that fires next, or nil.
func (e *simEnv) next() *simTimer {
	var first *simTimer
	kept := e.timers[:0]
	for _, t := range e.timers {
		if t.set {
			kept = append(kept, t)
			if first == nil || t.at < first.at {
				first = t
			}
		} else {
			t.listed = false
		}
	}
	e.timers = kept
	return first
}

// nextEvent returns when something can be done that cannot be done now.
func (e *simEnv) nextEvent() (at time.Duration, ok bool) {
	if t := e.next(); t != nil {
		at, ok = t.at, true
	}
	for _, jobs := range [2][]simJob{e.jobs, e.done} {
		for _, j := range jobs {
			if !ok || j.at < at {
				at, ok = j.at, true
			}
		}
	}
	return at, ok
}

// fire moves the clock to the next timer.
func (e *simEnv) fire() bool {
	t := e.next()
	if t == nil {
		return false
	}
	e.now = max(e.now, t.at)
	t.set = false
	t.fn()
	return true
}

// fireDue fires a timer whose time has come.
func (e *simEnv) fireDue() bool {
	if t := e.next(); t == nil || t.at > e.now {
		return false
	}
	return e.fire()
}

// idle reports whether nothing but timers is left.
func (e *simEnv) idle() bool {
	return len(e.jobs)+len(e.done)+e.disk.InFlight() == 0 && (e.cache == nil || e.cache.InFlight() == 0)
}
