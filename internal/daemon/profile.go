package daemon

import (
	"errors"
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
)

// Of waits the runtime notes one for each blockRate nanoseconds that goroutines are blocked, and
// of those for locks one in mutexRate.
const (
	blockRate = 10_000
	mutexRate = 10
)

// waitProfile serves a profile of what goroutines wait for, over the seconds that a request gives:
// what the runtime notes for it costs too much to be noted at all times.
type waitProfile struct {
	name string         // of runtime/pprof
	set  func(rate int) // has the runtime note waits; 0: not
	rate int

	mu    sync.Mutex
	asked int // requests that are being served; guarded by mu
}

func newBlockProfile() *waitProfile {
	return &waitProfile{name: "block", set: runtime.SetBlockProfileRate, rate: blockRate}
}

func newMutexProfile() *waitProfile {
	set := func(rate int) { runtime.SetMutexProfileFraction(rate) }
	return &waitProfile{name: "mutex", set: set, rate: mutexRate}
}

// ServeHTTP implements http.Handler.
func (p *waitProfile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.FormValue("seconds") == "" {
		refuse(w, http.StatusBadRequest, errors.New("waits are only noted while somebody asks: say for how long, as in ?seconds=10"))
		return
	}
	p.count(1)
	defer p.count(-1)
	pprof.Handler(p.name).ServeHTTP(w, r)
}

// count changes the number of requests, with the first of which the noting begins, and ends with
// the last.
func (p *waitProfile) count(by int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.asked
	p.asked += by
	switch {
	case before == 0:
		p.set(p.rate)
	case p.asked == 0:
		p.set(0)
	}
}
