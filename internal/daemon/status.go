package daemon

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/parallel"
	"github.com/lsd-ceph/lsd/internal/reactor"
)

const (
	// statsTimeout bounds the wait for a reactor: one that does not answer shows
	// as hung.
	statsTimeout = 2 * time.Second
	watchEvery   = time.Second
	// freeAfter is when the heap is cleaned up for the sake of an image that has
	// come to rest: once for all that do so until then.
	freeAfter = 5 * time.Second
	// stallNotice is how long writes must have waited to be worth a log line.
	stallNotice = 5 * time.Second
)

// describe returns what the attachment is and does.
func (a *attachment) describe(ctx context.Context) api.Image {
	a.mu.Lock()
	rec, dk := a.rec, a.disk
	im := api.Image{
		ID: a.id, Device: a.name(), URL: rec.URL, ImageID: rec.ImageID, Snapshot: rec.Snapshot, Size: rec.Size, BlockSize: rec.BlockSize,
		State: a.state, Since: a.since, ReadOnly: rec.ReadOnly, Shared: rec.Shared, Null: rec.Null, Log: rec.Log,
		Queues: rec.Queues, Depth: rec.Depth, Restarts: a.restarts,
	}
	for h := range a.handles {
		im.Clients = append(im.Clients, h.who)
	}
	slices.Sort(im.Clients)
	if a.err != nil {
		im.Error = api.OneLine(a.err)
	}
	if !a.storeDown.IsZero() {
		t := a.storeDown
		im.StoreDownSince = &t
	}
	a.mu.Unlock()
	if dk != nil {
		im.LogMemory = dk.memory
		ctx, stop := context.WithTimeout(ctx, statsTimeout)
		defer stop()
		s, err := dk.stats(ctx)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			im.State, im.Error = api.StateHung, "the image's reactor does not answer"
		case errors.Is(err, reactor.ErrStopped):
			im.State = api.StateRecovering
		case s != nil:
			im.Stats = s
			if im.State == api.StateActive && s.State != engine.Active.String() {
				im.State = s.State
			}
			if im.Error == "" {
				im.Error = s.Why
			}
		}
	}
	im.Advice = advise(im)
	return im
}

// describeAll describes all attachments. Reactors that do not answer are waited for side by
// side.
func (d *Daemon) describeAll(ctx context.Context) []api.Image {
	all := d.all()
	list := make([]api.Image, len(all))
	_ = parallel.Each(len(all), len(all), func(i int) error {
		list[i] = all[i].describe(ctx)
		return nil
	})
	return list
}

// advise says what a person can do about what is wrong.
func advise(im api.Image) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch im.State {
	case engine.Fenced.String(), engine.Released.String():
		add("another host has the image: every request fails; unmount it here and: lsdctl del %d", im.ID)
	case engine.Evicting.String():
		add("another host has asked for the image: new writes fail; what was acknowledged is being written to the store")
	case api.StateRecovering:
		add("its users wait, they get no errors; it is tried again until it works: see the error above")
	case api.StateFailed:
		add("its users get errors; its write log is kept: unmount it and: lsdctl del %d", im.ID)
	case api.StateGone:
		add("remove what is left: lsdctl del %d", im.ID)
	case api.StateHung:
		add("look at the daemon's log; kill -9 of lsdd is safe: the next one takes everything up")
	}
	s := im.Stats
	if s == nil {
		return out
	}
	if text := sizeAdvice(im); text != "" {
		add("%s", text)
	}
	if s.StoreDown && s.LeaseLeft == 0 && !im.ReadOnly && im.State == api.StateActive {
		add("the lease has run out, since the store does not answer (%s): writes wait until it is renewed, for another host may take the image; see to the store; a longer --lease lasts longer", s.LastStoreError)
	} else if s.StoreDown {
		add("the store does not take writes (%s): they go on until the write log is full, then wait; nothing is lost; see to the store", s.LastStoreError)
	}
	switch {
	case s.Waiting > 0 && s.LogUsed < s.LogSize/10*9:
		add("the write log is filling: writes are slowed down to what the store takes, %d wait their turn", s.Waiting)
	case s.Waiting > 0:
		add("the write log is full: %d writes wait for room since %.0f s; it is freed as the store takes objects; a larger --log-size (del, then add) takes longer bursts", s.Waiting, s.Stalled)
	}
	if s.MapError != "" {
		rest := "until it can there is no checkpoint, and in the end the write log fills and writes wait; lsdctl del works without one"
		if im.State == api.StateDetaching {
			rest = fmt.Sprintf("if it does not come within %v the image is let go of without a checkpoint; everything acknowledged is in the store then", engine.MapPatience)
		}
		add("part of the map cannot be read (%s): bring that object back from a copy of the pool; lsdctl check lists all that is damaged; %s", s.MapError, rest)
	}
	if s.ReadErrors > 0 {
		add("%d reads have failed since it was opened: the daemon's log names the objects", s.ReadErrors)
	}
	if s.Scrub.Errors > 0 {
		add("the scrub has found %d damaged objects since it was opened, the last one %s: bring them back from a copy of the pool; lsdctl check --deep lists them all", s.Scrub.Errors, s.Scrub.Bad)
	}
	if s.LogError != "" {
		add("the write log's disk has failed: unmount, and lsdctl del %d, which brings what is in memory into the store (--force if it cannot), then add with another --cache", im.ID)
	}
	return out
}

// watch looks at all images once a second: so rates are over a second, and what
// lasts is logged.
func (d *Daemon) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	var free time.Time
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-t.C:
			free = d.look(time.Now(), free)
		}
	}
}

// look is one look of watch. free is when the heap is to be cleaned up, zero if it
// need not be; look returns the same for the next time.
func (d *Daemon) look(now, free time.Time) time.Time {
	if !free.IsZero() && !now.Before(free) {
		// Nothing else would: an idle process makes no garbage, so it is not
		// collected, and what it was is locked. Pools let go at the second time.
		d.shared.engine.DropBuffers(0)
		runtime.GC()
		debug.FreeOSMemory()
		free = time.Time{}
	}
	d.shared.engine.DropBuffers(freeAfter)
	d.shared.logPool.tend(now)
	d.readCache.tend(now)
	d.guard.refresh()
	for _, a := range d.all() {
		a.letGoUnused(now)
		dk := a.getDisk()
		if dk == nil {
			continue
		}
		ctx, stop := context.WithTimeout(d.ctx, statsTimeout)
		if s, err := dk.stats(ctx); err == nil && s != nil {
			a.note(s)
			rested, err := dk.rest(ctx, now, s)
			if err != nil {
				a.logger.Debug("an idle image keeps its memory", "err", err)
			}
			if rested && free.IsZero() {
				free = now.Add(freeAfter)
			}
		}
		stop()
	}
	return free
}

// note keeps what the engine does not, and logs stalls.
func (a *attachment) note(s *engine.Stats) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !s.StoreDown:
		a.storeDown = time.Time{}
	case a.storeDown.IsZero():
		a.storeDown = time.Now()
	}
	stalled := s.Waiting > 0 && s.Stalled > stallNotice.Seconds()
	if stalled && !a.stalled {
		a.logger.Warn("writes wait for room in the write log", "waiting", s.Waiting, "log used", s.LogUsed, "log size", s.LogSize,
			"store down", s.StoreDown, "store error", s.LastStoreError)
	}
	if !stalled && a.stalled {
		a.logger.Info("writes go on")
	}
	a.stalled = stalled
}
