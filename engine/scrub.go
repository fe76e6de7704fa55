package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

const (
	scrubRead = 256 << 10 // bytes read at one time
	// scrubEvery is the least time from the beginning of one pass over an image to
	// that of the next.
	scrubEvery = 24 * time.Hour
	scrubPause = time.Second // before it is looked again whether clients wait
)

// ScrubRate bounds what the images of a daemon read together to verify what they
// have in the store. Those that are at it have equal shares. Any of them may use it
// at once.
type ScrubRate struct {
	rate   atomic.Int64 // bytes a second; 0: nothing is read
	images atomic.Int64 // that are in a pass
}

// Set sets the rate, in bytes a second; 0 means that nothing is read.
func (r *ScrubRate) Set(rate int64) { r.rate.Store(rate) }

// pause returns how long an image rests after n bytes.
func (r *ScrubRate) pause(n int) time.Duration {
	rate := max(r.rate.Load(), 1)
	return time.Duration(float64(n) * float64(max(r.images.Load(), 1)) / float64(rate) * float64(time.Second))
}

// ScrubStats tells how far the scrub of an image is. Nothing of it outlives the
// daemon.
type ScrubStats struct {
	Running bool    `json:"running"`
	Object  uint64  `json:"object"`  // the one it is at
	Objects uint64  `json:"objects"` // verified in this pass
	Total   uint64  `json:"objects_in_all"`
	Bytes   uint64  `json:"read_bytes"`                // since the image was opened
	Passes  uint64  `json:"passes"`                    // since then
	Last    float64 `json:"last_pass_seconds"`         // how long the last whole pass took
	Age     float64 `json:"last_pass_age_seconds"`     // since its end
	Errors  uint64  `json:"errors"`                    // objects found damaged since the image was opened
	Bad     string  `json:"last_bad_object,omitempty"` // the last of them
}

// scrubber reads the data objects of an image back, slowly, one read at a time, and
// verifies them, so that damage is known while there is a copy to mend it from. It
// rests while clients wait or the store is in trouble. The reactor owns it.
type scrubber struct {
	im      *Image
	timer   Timer
	running bool // in a pass
	began   time.Duration
	ended   time.Duration // of the last pass
	took    time.Duration
	next    uint64 // the object to be looked for next

	// The object that is being read.
	object objectInfo
	header *objectHeader // nil: not read yet
	at     int           // bytes of its data that are verified
	buf    []byte

	objects, bytes, passes, errors, total uint64
	bad                                   string
}

// startScrub begins to scrub, if the daemon does that.
func (im *Image) startScrub() {
	x := &im.scrub
	x.im = im
	if im.shared.Scrub.rate.Load() > 0 {
		x.timer = im.env.AfterFunc(scrubPause, x.step)
	}
}

// step does the next read, or rests.
func (x *scrubber) step() {
	im := x.im
	switch {
	case im.state != Active:
		x.end()
	case im.stats.storeDown || im.blocked.n > 0 || !im.leased():
		x.timer.Reset(scrubPause)
	case !x.running:
		x.begin()
	case !x.find():
		x.pass()
	default:
		x.read()
	}
}

// begin begins a pass.
func (x *scrubber) begin() {
	im := x.im
	if im.table.alive == 0 {
		x.timer.Reset(scrubEvery / 100)
		return
	}
	x.running, x.began, x.next, x.objects, x.total = true, im.env.Now(), 1, 0, uint64(im.table.alive)
	im.shared.Scrub.images.Add(1)
	x.timer.Reset(0)
}

// end ends a pass where it stands.
func (x *scrubber) end() {
	if x.running {
		x.running, x.header, x.buf = false, nil, nil
		x.im.shared.Scrub.images.Add(-1)
	}
}

// pass says that the pass has come to its end.
func (x *scrubber) pass() {
	now := x.im.env.Now()
	x.passes, x.ended, x.took = x.passes+1, now, now-x.began
	x.end()
	x.timer.Reset(max(scrubEvery-x.took, scrubPause))
}

// find makes sure that there is an object to be read, the next one that lives if
// need be, and reports whether there is. One that has died meanwhile is left.
func (x *scrubber) find() bool {
	t := &x.im.table
	if x.object.number > 0 {
		if o := t.find(uint64(x.object.number)); o != nil && o.live > 0 {
			return true
		}
		x.leave()
	}
	for i := t.index(x.next); i < len(t.list); i++ {
		if o := t.list[i]; !o.gone && o.live > 0 {
			x.object, x.at, x.header = o, 0, nil
			x.next = uint64(o.number) + 1
			return true
		}
	}
	return false
}

// leave turns to the next object.
func (x *scrubber) leave() { x.object, x.header, x.at = objectInfo{}, nil, 0 }

// read reads the object's header, or some of its data, on a worker.
func (x *scrubber) read() {
	im, o, h, at := x.im, x.object, x.header, x.at
	n := o.headerBytes()
	if h != nil {
		if x.buf == nil {
			x.buf = make([]byte, scrubRead)
		}
		n = min(h.data-at, scrubRead)
	}
	buf := x.buf[:min(n, len(x.buf))]
	im.askStore(func(ctx context.Context) (err error) {
		if h == nil {
			h, err = im.readHeader(ctx, o)
			return err
		}
		return readBlocks(ctx, im.store, im.line.dataKey(uint64(o.number), uint64(o.epoch)), h, at, buf)
	}, func(err error) { x.done(h, n, err) })
}

// done takes the result of a read of n bytes.
func (x *scrubber) done(h *objectHeader, n int, err error) {
	im := x.im
	switch {
	case im.state != Active:
		x.end()
		return
	case retryable(err) && !errors.Is(err, backend.ErrPermanent):
		x.timer.Reset(max(im.cfg.RetryMax, scrubPause))
		return
	case err == nil:
		if x.header != nil {
			x.at += n
		}
		x.header = h
		x.bytes += uint64(n)
		if x.at >= h.data {
			x.objects++
			x.leave()
		}
	default:
		x.damaged(err)
		x.leave()
	}
	x.timer.Reset(im.shared.Scrub.pause(n))
}

// damaged reports an object that is damaged or missing, unless it was deleted while
// it was being read, or may have been before the image was opened.
func (x *scrubber) damaged(err error) {
	o := x.object
	if now := x.im.table.find(uint64(o.number)); errors.Is(err, backend.ErrNotFound) && (now == nil || now.live == 0 || !x.im.countsRecovered()) {
		return
	}
	x.errors++
	x.bad = x.im.line.dataKey(uint64(o.number), uint64(o.epoch))
	x.im.logger.Error("the scrub has found a damaged object: bring it back from a copy of the pool", "object", x.bad, "err", err)
}

func (x *scrubber) stats(now time.Duration) ScrubStats {
	s := ScrubStats{Running: x.running, Object: uint64(x.object.number), Objects: x.objects, Total: x.total, Bytes: x.bytes, Passes: x.passes, Errors: x.errors, Bad: x.bad}
	if x.passes > 0 {
		s.Last, s.Age = x.took.Seconds(), (now - x.ended).Seconds()
	}
	return s
}
