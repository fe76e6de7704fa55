package engine

import (
	"context"
	"iter"
	"math"
	"slices"
	"time"
)

// simRival is a host that opens the image while others do. What it does of that
// between two operations of the store is a step of the world.
type simRival struct {
	h    *simHost
	next func() (struct{}, bool)
	wake time.Duration // it waits until then, by the world's clock
	err  error         // how it ended
	cut  bool          // its power was cut meanwhile
}

// rival lets h begin to open the image.
func (w *world) rival(h *simHost, force bool) *simRival {
	r := &simRival{h: h}
	r.next, _ = iter.Pull(func(yield func(struct{}) bool) {
		h.yield = func(until time.Duration) {
			r.wake = until
			yield(struct{}{})
		}
		var cut bool
		cut, r.err = w.start(h, force)
		r.cut = r.cut || cut
		h.yield = nil
		if r.err == nil {
			w.took(h, r.cut)
		}
	})
	w.rivals = append(w.rivals, r)
	return r
}

// rivalGoesOn lets one of those that open the image do so, up to their next operation of
// the store, and reports whether one could.
func (w *world) rivalGoesOn() bool {
	n := len(w.rivals)
	if n == 0 || w.frozen {
		return false
	}
	first := w.rng.IntN(n)
	for i := range n {
		r := w.rivals[(first+i)%n]
		if r.wake > w.now {
			continue
		}
		w.frozen = true
		_, more := r.next()
		w.frozen = false
		if !more {
			w.rivals = slices.DeleteFunc(w.rivals, func(x *simRival) bool { return x == r })
		}
		return true
	}
	return false
}

// stopRival lets the world go on while h, one of those that open the image, stands
// still: for a moment, or for longer than a lease.
func (w *world) stopRival(h *simHost) {
	if w.rng.IntN(12) == 0 {
		w.passFor(h, w.now+time.Duration(w.rng.Int64N(int64(4*w.plan.lease))))
	}
	for range w.rng.IntN(4) {
		h.yield(0)
	}
}

// rivalWakes returns when one of those that open the image can go on.
func (w *world) rivalWakes() time.Duration {
	first := time.Duration(math.MaxInt64)
	if !w.frozen {
		for _, r := range w.rivals {
			first = min(first, r.wake)
		}
	}
	return first
}

// took makes h, which has just opened the image, its owner, unless another one has taken
// it since. What it has recovered is checked while all others stand still. cut says that
// h is the owner so far, and has lost power.
func (w *world) took(h *simHost, cut bool) {
	if h.im.super.sb.Epoch != w.epoch {
		if h == w.owner {
			h.kill() // what its client knows is not what this process has
		}
		return
	}
	w.count(countTaken, true)
	var paused []time.Duration
	for _, o := range w.hosts {
		paused = append(paused, o.paused)
		if o != h {
			o.paused = math.MaxInt64
		}
	}
	a, m := w.owner, w.owner.m
	floor := m.stored
	switch {
	case a == h && cut:
		floor = max(floor, m.durable)
	case a == h, a.im != nil && !a.dead && a.im.state == Released && a.im.accepted.seq == a.im.log.Seq():
		floor = max(floor, m.acked)
	}
	w.count(countOwnLog, a == h)
	h.taking = true
	k := w.recovered(h, m, floor, a == h && h.im.logID == h.logID, "taken in a contest")
	h.taking = false
	if a != h {
		m.kept = k
		if err := m.checkLate("a write was acknowledged"); err != nil {
			w.fail("%s: %v", a.name, err)
		}
	}
	w.owner = h
	for i, o := range w.hosts {
		o.paused = paused[i]
	}
}

// contest lets two hosts take the image at once: two others, or another one and the
// owner's itself, with its log, whose process has ended.
func (w *world) contest() {
	w.count(countContests, true)
	a := w.owner
	a.logID = a.im.logID
	b := w.newHost()
	rivals := []*simRival{w.rival(b, true)}
	if w.rng.IntN(2) == 0 {
		rivals = append(rivals, w.rival(w.newHost(), true))
		if w.rng.IntN(2) == 0 {
			a.paused = w.now + time.Duration(w.rng.Int64N(int64(4*w.plan.lease)))
		}
	} else {
		r := w.rival(a, w.rng.IntN(2) == 0)
		if r.cut = w.rng.IntN(2) == 0; r.cut {
			a.cutPower()
		} else {
			a.kill()
		}
		rivals = append(rivals, r)
	}
	w.acting = true
	for i := 0; len(w.rivals) > 0; i++ {
		if i > 1_000_000 || !w.step(math.MaxInt64) {
			w.fail("a contest for the image does not end")
		}
	}
	w.acting = false
	if rivals[0].err != nil && rivals[1].err != nil {
		w.fail("nobody has won the image: %v; %v", rivals[0].err, rivals[1].err)
	}
	if !w.owned() {
		x := w.newHost()
		if _, err := w.start(x, true); err != nil {
			w.fail("takeover after a contest: %v", err)
		}
		w.took(x, false)
	}
	w.run(w.rng.IntN(200))
	for _, r := range rivals {
		w.lost(r.h, r.cut && r.h == a)
	}
	if rivals[1].h != a {
		w.lost(a, false)
	}
}

// owned reports whether the host that opened the image last in a contest still has it,
// and nobody wants it.
func (w *world) owned() bool {
	h := w.owner
	if h.im == nil || h.m.lost || h.im.state != Active {
		return false
	}
	sb, _, err := loadSuperblock(context.Background(), w.inner, w.id)
	if err != nil {
		w.fail("%v", err)
	}
	return sb.Owner != nil && sb.Owner.Log == h.im.logID && sb.Evict == nil
}

// lost ends a host that was in a contest, unless it has won.
func (w *world) lost(h *simHost, cut bool) {
	switch {
	case h == w.owner:
	case h.m == nil: // it never had the image, or not for long enough to have a client
		h.kill()
		w.drop(h)
	case cut:
		w.staleLog(h, h.m.durable)
	default:
		w.staleLog(h, h.m.acked)
	}
}
