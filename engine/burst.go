package engine

import "time"

const (
	// burstRate is the speed of destaging while it is held back, bytes a second.
	burstRate = 32 << 20
	// burstShare is how much of the log may be filled meanwhile, if that is less than
	// Config.Burst.
	burstShare = 0.25
	// burstPause is how long no write may come before what is held back goes on its way.
	burstPause = 50 * time.Millisecond
	// burstCalm is how long no write may come, with nothing left to destage, before those
	// that come then are a burst again.
	burstCalm = time.Second
)

// burst holds destaging back while writes come in a burst, which then have the processors and
// the disks to themselves: the log takes them at several times the speed that there is beside
// destaging. The reactor owns it.
//
// A burst begins with the first write after a calm. It is over, and what has gathered is destaged
// as fast as the store takes it until there is a calm again, when the oldest of that is BatchAge old
// (no write waits longer than one whose batch does not fill), when it takes too much of the log, or
// when somebody waits for it: a snapshot, a detach. So writes that never end find nothing held back
// after that, and those of less than burstRate do not notice.
type burst struct {
	over  bool
	seq   uint64        // of the log, when it was last looked at
	moved time.Duration // since when it has been that, as far as is known
	last  time.Duration // when a batch was started
	size  time.Duration // and how long that takes at burstRate; 0: none was
}

// holdBack returns for how long the next batch must wait: 0, it may go.
func (im *Image) holdBack(now time.Duration) time.Duration {
	x := &im.burst
	if seq := im.log.Seq(); seq != x.seq {
		x.seq, x.moved = seq, now
	}
	quiet := now - x.moved
	if x.over && len(im.queue) == 0 && quiet >= burstCalm {
		x.over = false
	}
	x.over = x.over || im.mustDestage(now)
	if x.over || quiet >= burstPause {
		return 0
	}
	return min(max(x.last+x.size-now, 0), burstPause)
}

// mustDestage reports whether nothing may be held back.
func (im *Image) mustDestage(now time.Duration) bool {
	share := min(burstShare, im.cfg.PaceFrom/2) * float64(im.log.Size())
	return im.state != Active || len(im.waiters) > 0 || im.clean.lags() ||
		float64(im.log.Used()) > max(min(share, float64(im.cfg.Burst)), 0) ||
		len(im.queue) > 0 && now-im.queue[0].began >= im.cfg.BatchAge
}

// started notes that b is on its way.
func (x *burst) started(b *batch, now time.Duration) {
	x.last, x.size = now, time.Duration(float64(b.sectors*SectorSize)/burstRate*float64(time.Second))
}
