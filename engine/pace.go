package engine

import "time"

const (
	// paceWindow is over what time the speed of destaging is measured.
	paceWindow = 500 * time.Millisecond
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
// down to none, and besides at a speed that would fill what is left in paceFill, or
// at paceFloor: so a log whose store is away fills more and more slowly. Where demand
// never ends, the log settles at about three quarters.
type pacer struct {
	timer  Timer
	credit float64       // bytes that may be admitted; negative: admitted before their time
	at     time.Duration // when the credit was last reckoned

	speed   float64 // of destaging, bytes a second
	trimmed uint64  // bytes of log freed since
	since   time.Duration
}

// admits reports whether a write of n bytes may go into the log now, and arranges
// for another try if not.
func (im *Image) admits(n int) bool {
	p := &im.pace
	size, used := float64(im.log.Size()), float64(im.log.Used())
	if used < size*im.cfg.PaceFrom || im.cfg.PaceFrom >= 1 {
		p.credit = paceBurst // the most there is, however long ago that was
		return true
	}
	now := im.env.Now()
	free := max(size-used, 0)
	rate := p.measured(now)*2*free/(size*(1-im.cfg.PaceFrom)) + max(free/paceFill.Seconds(), paceFloor)
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

// trimmedLog notes that n bytes of the log have become free.
func (p *pacer) trimmedLog(n uint64) { p.trimmed += n }

// measured returns the speed of destaging.
func (p *pacer) measured(now time.Duration) float64 {
	d := now - p.since
	if d < paceWindow {
		return p.speed
	}
	last := float64(p.trimmed) / d.Seconds()
	if d > 4*paceWindow {
		p.speed = last // nobody has asked for long
	} else {
		p.speed = (p.speed + last) / 2
	}
	p.trimmed, p.since = 0, now
	return p.speed
}
