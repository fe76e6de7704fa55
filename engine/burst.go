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
	// burstPayback is how much is destaged, after a burst, for each byte of log that is written:
	// so much more than that as what has gathered shrinks, and hardly more, for destaging that has
	// the processors and the disks to itself leaves a tenth of them to writes.
	burstPayback = 1.125
	// burstCredit bounds how much more may be destaged for what has been written, and how much may
	// have been without that, bytes.
	burstCredit = 64 << 20
	// burstLook is in what time at the latest what is written by then is looked at, for its credit.
	burstLook = 5 * time.Millisecond
)

// burst holds destaging back while writes come in a burst, which then have the processors and
// the disks to themselves: the log takes them at several times the speed that there is beside
// destaging. The reactor owns it.
//
// A burst begins with the first write after a calm. It is over when the oldest of what has gathered
// is BatchAge old, when it takes too much of the log, or when somebody waits for it: a snapshot, a
// detach. Nothing new is held back then until there is a calm again. What has gathered is paid back:
// while writes go on, it is destaged at their speed and a little more (burstPayback), and as fast as
// the store takes it when they pause, when it is twice BatchAge old, or when the log is so full that
// they are slowed down. So writes that never end fall from the speed of a burst to that beside
// destaging, and not below it; those of less than burstRate do not notice.
type burst struct {
	over   bool
	seq    uint64        // of the log, when it was last looked at
	moved  time.Duration // since when it has been that, as far as is known
	last   time.Duration // when a batch was started
	size   time.Duration // and how long that takes at burstRate; 0: none was
	head   uint64        // of the log, when the credit was last reckoned
	credit float64       // bytes of log that may be destaged before more is written
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
	must := im.mustDestage(now)
	if !x.over && (must || im.burstEnds(now)) {
		x.over, x.head, x.credit = true, im.log.Head(), 0
	}
	switch {
	case must || quiet >= burstPause:
		return 0
	case !x.over:
		return min(max(x.last+x.size-now, 0), burstPause)
	case im.paidBack() || x.earn(im.log.Head()):
		return 0
	}
	return burstLook
}

// mustDestage reports whether nothing may be held back, whatever is written.
func (im *Image) mustDestage(now time.Duration) bool {
	return im.state != Active || len(im.waiters) > 0 || im.clean.lags() || im.cfg.Burst < 0 ||
		float64(im.log.Used()) > im.cfg.PaceFrom*float64(im.log.Size()) || im.oldest(now) >= 2*im.cfg.BatchAge
}

// burstEnds reports whether a burst has become too long.
func (im *Image) burstEnds(now time.Duration) bool {
	share := min(burstShare, im.cfg.PaceFrom/2) * float64(im.log.Size())
	return float64(im.log.Used()) > min(share, float64(im.cfg.Burst)) || im.oldest(now) >= im.cfg.BatchAge
}

// oldest returns for how long the first write of the oldest batch has been waiting.
func (im *Image) oldest(now time.Duration) time.Duration {
	if len(im.queue) == 0 {
		return 0
	}
	return now - im.queue[0].began
}

// paidBack reports whether what is next to be destaged would be in memory if the log had been lent
// none: no more has gathered than there is at all times.
func (im *Image) paidBack() bool {
	for _, b := range im.queue {
		if b.state == batchSealed && !b.cleaned() {
			return im.log.Head()-b.start <= im.log.OwnMemory()
		}
	}
	return true
}

// earn adds what the log's head has moved by to the credit, and reports whether there is any.
func (x *burst) earn(head uint64) bool {
	x.credit = min(x.credit+burstPayback*float64(head-x.head), burstCredit)
	x.head = head
	return x.credit > 0
}

// started notes that b is on its way.
func (x *burst) started(b *batch, now time.Duration) {
	x.last, x.size = now, time.Duration(float64(b.sectors*SectorSize)/burstRate*float64(time.Second))
	x.credit = max(x.credit-float64(b.end-b.start), -burstCredit)
}
