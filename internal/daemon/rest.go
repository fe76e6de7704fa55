package daemon

import (
	"context"
	"time"

	"github.com/lsd-ceph/lsd/engine"
)

// restAfter is how long a disk must have been idle to give its memory back.
const restAfter = 10 * time.Second

// rest gives memory back that an idle image holds: the log's mirror, the buffers
// of the block device, what the engine keeps at hand. Memory is locked, so the
// kernel would never take it. Any of it is taken again when it is needed. It
// reports whether it has done that now. watch calls it, about once a second, with
// what the image has done so far.
func (d *disk) rest(ctx context.Context, now time.Time, s *engine.Stats) (bool, error) {
	if n := s.Reads + s.Writes + s.Flushes + s.Discards; n != d.requests || d.busySince.IsZero() {
		d.requests, d.busySince, d.rested = n, now, false
	}
	if s.PutCount != d.puts { // by the cleaner, which needs no requests for that
		d.puts, d.rested = s.PutCount, false
	}
	if d.rested || now.Sub(d.busySince) < restAfter {
		return false, nil
	}
	var rested bool
	var err error
	if cerr := call(ctx, d.reactor, func() { rested, err = d.restNow() }); cerr != nil {
		return false, cerr // it may run later
	}
	d.rested = rested
	return rested, err
}

// restNow is rest, on the reactor. It reports false when something is under way.
func (d *disk) restNow() (bool, error) {
	if !d.image.Rest() && d.mem != nil {
		return false, nil
	}
	if d.mem != nil {
		if err := d.mem.Release(); err != nil {
			return false, err
		}
	}
	if d.dev == nil {
		return true, nil
	}
	return d.dev.Rest()
}
