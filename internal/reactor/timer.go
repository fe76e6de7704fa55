package reactor

import "time"

// A Timer calls a function on its reactor once a time has come. It belongs to
// the reactor: all its methods are called on the reactor's goroutine.
type Timer struct {
	r    *Reactor
	fn   func()
	when time.Duration // of the reactor's tick
	pos  int           // index in the heap, -1 while not pending
}

// Stop keeps the timer from firing. It reports whether the timer was pending.
func (t *Timer) Stop() bool {
	if t.pos < 0 {
		return false
	}
	t.r.timers.remove(t)
	return true
}

// Reset makes the timer fire once more, d from now, whether it is pending or
// not. It does not allocate.
func (t *Timer) Reset(d time.Duration) {
	t.Stop()
	t.when = t.r.tick() + max(d, 0)
	t.r.timers.add(t)
}

// timerHeap is a binary heap, earliest first. Unlike container/heap it boxes
// nothing, and each timer knows where it is.
type timerHeap []*Timer

func (h *timerHeap) add(t *Timer) {
	t.pos = len(*h)
	*h = append(*h, t)
	h.up(t.pos)
}

func (h *timerHeap) remove(t *Timer) {
	i, last := t.pos, len(*h)-1
	t.pos = -1
	moved := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	if i == last {
		return
	}
	(*h)[i] = moved
	moved.pos = i
	h.up(i)
	h.down(moved.pos)
}

func (h timerHeap) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if h[parent].when <= h[i].when {
			return
		}
		h.swap(i, parent)
		i = parent
	}
}

func (h timerHeap) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if right := child + 1; right < len(h) && h[right].when < h[child].when {
			child = right
		}
		if h[i].when <= h[child].when {
			return
		}
		h.swap(i, child)
		i = child
	}
}

func (h timerHeap) swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].pos, h[j].pos = i, j
}
