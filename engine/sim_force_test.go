package engine

import (
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// removeAttached attaches the image, which is as m, and removes it while its owner serves. That
// goes on to put objects until it finds that out, and what it had begun comes later still; the
// image is reclaimed meanwhile, now and then. In the end nothing is left of it but what clones
// need, also of what has come last.
func (w *world) removeAttached(m *model) {
	w.count(countForced, true)
	h := w.newHost()
	if _, err := w.start(h, false); err != nil {
		w.fail("attach an image that is to be removed: %v", err)
	}
	w.owner = h
	w.recovered(h, m, len(m.history), false, "attached to be removed")
	w.run(w.rng.IntN(300))
	w.removeForced()
	h.m.lost = true
	_, _, err := loadSuperblock(context.Background(), w.inner, w.id)
	unreadable := errors.Is(err, backend.ErrNotFound) // each answer was damaged: nothing says what may come
	w.acting = true
	reclaimed := false
	now := time.Now
	if w.plan.extras.stands {
		now = afterAll
	}
	for range w.rng.IntN(400) {
		if w.rng.IntN(100) == 0 {
			w.reclaimForced(now)
			reclaimed = true
		}
		if w.step(math.MaxInt64); h.dead {
			break
		}
	}
	w.acting = false
	before := len(w.keys())
	if h.faults = (simFaults{}); !h.dead {
		w.until(h, func() bool { return h.im.state == Fenced && h.im.Quiet() && h.env.idle() }, "the owner of a removed image")
	}
	h.kill()
	w.drop(h)
	w.flushLate()
	w.count(countForcedLate, reclaimed && len(w.keys()) > before)
	_, _, err = loadSuperblock(context.Background(), w.inner, w.id)
	remnants := errors.Is(err, backend.ErrNotFound) && len(w.keys()) > 0
	w.count(countRemnants, remnants)
	if remnants && !unreadable && !w.plan.extras.stands {
		w.fail("the superblock of a removed image went before all had come that could: %q", w.keys())
	}
	if w.rng.IntN(2) == 0 {
		w.collect()
	}
	w.collectLater()
	clear(w.strays) // nothing that came late may be there
	for _, key := range w.keys() {
		if len(w.cloned) == 0 {
			w.fail("left over of an image that was removed under its owner: %s", key)
		}
	}
}

// removeForced removes the image, whoever has it, by a host whose process may die at that.
func (w *world) removeForced() {
	c := w.caller()
	defer w.drop(c)
	o := RemoveOptions{URL: "mem:/disk", Force: true, Snapshots: true}
	var err error
	if w.call(c, func() { _, err = Remove(context.Background(), c.store, "disk", o) }) || err != nil {
		if c.injected == 0 && err != nil {
			w.fail("remove an image under its owner: %v", err)
		}
		w.flushLate()
		if _, err := backend.Lookup(context.Background(), w.inner, "disk"); err != nil {
			return // but for the answer
		}
		if _, err := Remove(context.Background(), w.inner, "disk", o); err != nil {
			w.fail("remove an image under its owner: %v", err)
		}
	}
}

// reclaimForced reclaims what there is of the image at a time.
func (w *world) reclaimForced(now func() time.Time) {
	c := w.caller()
	defer w.drop(c)
	var err error
	r := reclamation{patient{c.store, c}, now, reclaimBatch, nil}
	if died := w.call(c, func() { _, err = r.image(context.Background(), w.id) }); !died && err != nil && c.injected == 0 {
		w.fail("reclaim an image under its owner: %v", err)
	}
}

// collectLater removes what is left of images that nobody has when nothing can come for them any
// more: only of those that somebody had shortly before they were removed is there a superblock, or
// what came when that had gone.
func (w *world) collectLater() {
	found, err := GC(context.Background(), w.inner, GCOptions{Age: time.Nanosecond, Now: afterAll})
	if err != nil {
		w.fail("gc: %v", err)
	}
	again, err := GC(context.Background(), w.inner, GCOptions{Age: time.Nanosecond, Now: afterAll, DryRun: true})
	if err != nil || len(again) > 0 {
		w.fail("gc has found %+v, and finds %+v, %v", found, again, err)
	}
	for _, g := range found {
		if strings.Contains(g.What, "the name") || strings.Contains(g.What, "its name") {
			w.fail("gc finds %+v", g)
		}
	}
}

// mustWait fails if there is anything in the store, which has no image, but superblocks of those
// for which something may come still.
func (w *world) mustWait() {
	ctx := context.Background()
	err := w.inner.List(ctx, "", func(key string) error {
		id, err := uuid.Parse(key[:strings.IndexByte(key+"/", '/')])
		if err != nil || w.strays[key] {
			return nil
		}
		sb, _, err := loadSuperblock(ctx, w.inner, id)
		if err != nil || key != SuperblockKey(id) || !sb.Removed || sb.lateFor(time.Now()) == 0 {
			w.fail("left over of images that were reclaimed: %s", key)
		}
		return nil
	})
	if err != nil {
		w.fail("list: %v", err)
	}
}
