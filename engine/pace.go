package engine

import "time"

const (
	// paceWindow is over what time the speed of destaging is measured, and paceWindows how
	// many of these it is the mean of: what is put comes out of the log in lumps, for a store
	// that is slow takes several objects at a time, and now and then the cleaner goes first.
	paceWindow  = 500 * time.Millisecond
	paceWindows = 16
	// paceFill is in what time, at that speed alone, writes may fill what is left of
	// the log.
	paceFill = 5 * time.Second
	// paceFloor is the least speed, bytes a second: a log whose store is away does
	// become full.
	paceFloor = 1 << 20
	// paceBurst is how much may be admitted at once after a pause.
	paceBurst = 256 << 10 // bytes
	paceMin   = 500 * time.Microsecond
	paceMax   = 50 * time.Millisecond
)

// pacer slows writes down as the log fills, so that clients that write faster than
// the store takes it come to its speed by many short waits, and not to a wall. The
// reactor owns it.
//
// Below Config.PaceFrom, half of the log, nothing waits. From there on bytes are
// admitted at twice the speed of destaging, and less of it the fuller the log is,
// down to none; or at a speed that would fill what is left in paceFill, or at
// paceFloor, whichever is most: so a log whose store is away fills more and more
// slowly. Where demand never ends, the log settles at about three quarters.
//
// The log is trimmed in lumps, and writes are not to come in such: so how full it is,
// is the mean of as long as what is left would take to fill at the speed that there is.
// Only where next to nothing is left does that count at once.
type pacer struct {
	timer  Timer
	credit float64       // bytes that may be admitted; negative: admitted before their time
	at     time.Duration // when the credit was last reckoned
	free   float64       // bytes of log that are free, the mean of a while

	speed   float64 // of destaging, bytes a second
	windows float64 // that it is the mean of
	trimmed uint64  // bytes of log freed in the current one
	since   time.Duration
}

// admits reports whether a write of n bytes may go into the log now, and arranges
// for another try if not.
func (im *Image) admits(n int) bool {
	p := &im.pace
	size, used := float64(im.log.Size()), float64(im.log.Used())
	if used < size*im.cfg.PaceFrom || im.cfg.PaceFrom >= 1 {
		p.credit = paceBurst // the most there is, however long ago that was
		p.free = size - used // or a mean of before would hold up what comes next
		return true
	}
	now := im.env.Now()
	rate := p.rate(now, max(size-used, 0), size*(1-im.cfg.PaceFrom))
	p.credit = min(p.credit+rate*(now-p.at).Seconds(), paceBurst)
	p.at = now
	if p.credit > 0 {
		p.credit -= float64(n)
		return true
	}
	wait := time.Duration((1 - p.credit) / rate * float64(time.Second))
	p.timer.Reset(min(max(wait, paceMin), paceMax))
	return false
}

// rate returns how many bytes a second may be admitted, where free bytes are left of part, the
// bytes of log in which that is bounded.
func (p *pacer) rate(now time.Duration, free, part float64) float64 {
	speed := p.measured(now)
	while := min(part/(2*speed), paceFill.Seconds())
	p.free += (free - p.free) * min((now-p.at).Seconds()/while, 1)
	left := min(p.free, 2*free)
	return max(speed*2*left/part, left/paceFill.Seconds(), paceFloor)
}

// trimmedLog notes that n bytes of the log have become free. The speed is measured while half as
// much is in use as slows writes down, or more.
func (im *Image) trimmedLog(n uint64) {
	p, now := &im.pace, im.env.Now()
	if p.trimmed += n; float64(im.log.Used()) < float64(im.log.Size())*im.cfg.PaceFrom/2 {
		p.windows = min(p.windows, 1) // what was before says little of what comes then
		p.trimmed, p.since = 0, now
		return
	}
	p.measured(now)
}

// measured returns the speed of destaging.
func (p *pacer) measured(now time.Duration) float64 {
	if d := now - p.since; d >= paceWindow {
		p.windows = min(p.windows+1, paceWindows)
		p.speed += (float64(p.trimmed)/d.Seconds() - p.speed) / p.windows
		p.trimmed, p.since = 0, now
	}
	return p.speed
}
