package bench

import (
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/aio"
)

// loop is a reactor that does one thing after the other, in the order in which
// they were asked for, on a clock that only turns move: what a run does depends on
// nothing but its seed.
type loop struct {
	now    time.Duration
	jobs   []loopJob
	timers []*loopTimer
	disk   *ramDisk
}

type loopJob struct{ work, done func() }

type loopTimer struct {
	l      *loop
	at     time.Duration
	fn     func()
	set    bool
	listed bool
}

// Now implements engine.Env.
func (l *loop) Now() time.Duration { return l.now }

// Spawn implements engine.Env.
func (l *loop) Spawn(work, done func()) { l.jobs = append(l.jobs, loopJob{work, done}) }

// Post implements engine.Env.
func (l *loop) Post(fn func()) { l.jobs = append(l.jobs, loopJob{func() {}, fn}) }

// LeaseUntil implements engine.Env.
func (*loop) LeaseUntil(time.Duration) {}

// AfterFunc implements engine.Env.
func (l *loop) AfterFunc(d time.Duration, fn func()) engine.Timer {
	t := &loopTimer{l: l, fn: fn}
	t.Reset(d)
	return t
}

// Stop implements engine.Timer.
func (t *loopTimer) Stop() bool {
	was := t.set
	t.set = false
	return was
}

// Reset implements engine.Timer.
func (t *loopTimer) Reset(d time.Duration) {
	t.at, t.set = t.l.now+max(d, 0), true
	if !t.listed {
		t.listed = true
		t.l.timers = append(t.l.timers, t)
	}
}

// turn ends a turn of the image and does everything that can be done then: the
// disk's operations, up to the given number of jobs, the timers that are due.
func (l *loop) turn(im *engine.Image, jobs int) {
	im.EndTurn()
	l.disk.complete()
	for ; jobs > 0 && len(l.jobs) > 0; jobs-- {
		j := l.jobs[0]
		l.jobs = append(l.jobs[:0], l.jobs[1:]...)
		j.work()
		j.done()
	}
	l.now += time.Millisecond
	var due []func()
	kept := l.timers[:0]
	for _, t := range l.timers {
		if t.set && t.at <= l.now {
			t.set = false
			due = append(due, t.fn)
		}
		if t.listed = t.set; t.set {
			kept = append(kept, t)
		}
	}
	l.timers = kept
	for _, fn := range due {
		fn()
	}
}

// ramDisk is a write log's file in memory, which nothing happens to.
type ramDisk struct {
	b       []byte
	pending []func()
}

func newRAMDisk(size int64) *ramDisk { return &ramDisk{b: make([]byte, size)} }

// ReadAt implements writelog.File.
func (d *ramDisk) ReadAt(p []byte, off int64) (int, error) { return copy(p, d.b[off:]), nil }

// WriteAt implements writelog.File.
func (d *ramDisk) WriteAt(p []byte, off int64) (int, error) { return copy(d.b[off:], p), nil }

// Sync implements writelog.File.
func (d *ramDisk) Sync() error { return nil }

// Size implements writelog.File.
func (d *ramDisk) Size() int64 { return int64(len(d.b)) }

// Close implements writelog.File.
func (d *ramDisk) Close() error { return nil }

// Buffer implements writelog.File.
func (d *ramDisk) Buffer(n int) []byte { return make([]byte, n) }

// complete ends the operations that were queued.
func (d *ramDisk) complete() {
	list := d.pending
	d.pending = nil
	for _, fn := range list {
		fn()
	}
}

// ramDevice is the disk as an aio.Device.
type ramDevice struct{ *ramDisk }

// ReadAt implements aio.Device.
func (d ramDevice) ReadAt(p []byte, off int64, c aio.Completer) {
	d.pending = append(d.pending, func() { c.Complete(int32(copy(p, d.b[off:])), 0) })
}

// WriteAt implements aio.Device.
func (d ramDevice) WriteAt(p []byte, off int64, c aio.Completer) {
	d.pending = append(d.pending, func() { c.Complete(int32(copy(d.b[off:], p)), 0) })
}

// Sync implements aio.Device.
func (d ramDevice) Sync(c aio.Completer) {
	d.pending = append(d.pending, func() { c.Complete(0, 0) })
}
