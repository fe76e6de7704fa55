package engine

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
)

// simExtras are troubles that some worlds have besides. They are drawn from numbers of
// their own: a world that has none of them is what it would be if there were none.
type simExtras struct {
	stuck    bool    // some objects of the store fail for as long as it takes
	leaves   bool    // images are detached amid faults
	damage   bool    // objects and logs are damaged while clients go on
	contests bool    // several hosts take the image at once
	hang     float64 // chance that an operation on the store is given up after the timeout
	timeout  time.Duration
	sectors  uint64 // of the image
	object   uint32 // most data in its data objects, in bytes
	beside   bool   // others have images beside the owner's
	snaps    bool   // there are snapshots
	clones   bool   // there are clones
	resizes  bool   // the image becomes smaller, and larger again
	forced   bool   // the image is removed under its owner in the end
	lostMap  bool   // images are detached of which parts of the map are lost
	stands   bool   // that owner stands still for longer than anybody waits for what it puts
	lent     int    // segments that a log may be lent at one time
	warm     int    // segments that a read cache may have in memory
}

func newExtras(rng *rand.Rand) simExtras {
	x := simExtras{
		stuck: rng.IntN(8) == 0, leaves: rng.IntN(8) == 0, damage: rng.IntN(8) == 0, contests: rng.IntN(8) == 0,
		timeout: time.Duration(1+rng.IntN(20)) * time.Second,
	}
	if rng.IntN(8) == 0 {
		x.hang = 0.05 * rng.Float64()
	}
	if x.sectors, x.object = simSectors, MinObjectSize; rng.IntN(8) == 0 {
		x.sectors, x.object = simSectors<<rng.IntN(6), MinObjectSize+4096*uint32(rng.IntN(512))
	}
	x.beside = rng.IntN(8) == 0
	x.snaps = rng.IntN(4) == 0
	x.clones = rng.IntN(4) == 0
	x.resizes = rng.IntN(6) == 0
	x.forced = rng.IntN(4) == 0
	x.lostMap = rng.IntN(8) == 0
	x.stands = rng.IntN(2) == 0
	if rng.IntN(2) == 0 {
		x.lent = 1 + rng.IntN(3)
	}
	if rng.IntN(2) == 0 {
		x.warm = 1 + rng.IntN(4)
	}
	return x
}

// trouble ends a phase with one of the world's extras, or reports that it has not.
func (w *world) trouble() bool {
	x := &w.plan.extras
	var list []func()
	if x.stuck {
		list = append(list, w.stuckObjects)
	}
	if x.leaves {
		list = append(list, w.detachAmidFaults)
	}
	if x.damage {
		list = append(list, w.damageInUse)
	}
	if x.lostMap {
		list = append(list, w.detachLost)
	}
	if x.contests {
		list = append(list, w.contest)
	}
	if x.beside {
		list = append(list, w.readOnly, w.neighbour)
	}
	if x.snaps || x.clones {
		list = append(list, w.detach)
	}
	if len(list) == 0 || w.rng.IntN(2) == 0 {
		return false
	}
	list[w.rng.IntN(len(list))]()
	return true
}

// active reports whether the owner serves, and all of its host is well.
func (w *world) active() bool {
	h := w.owner
	return !h.dead && !h.broken && h.im.state == Active && h.im.log.Err() == nil
}

// amid lets clients of the owner go on under the faults that there are.
func (w *world) amid(steps int) {
	w.acting = true
	for range steps {
		if w.step(math.MaxInt64); w.owner.dead {
			break
		}
	}
	w.acting = false
}

// simStuck are objects of the store that some operations fail for while all else works:
// those of one kind, or some of them. nil has none.
type simStuck struct {
	methods   []string
	kind      string // in their keys
	of, which uint64 // one in so many, and which
	lost      error  // what those of them that are parts of the map are read with, nil: as the others
}

func (w *world) newStuck() *simStuck {
	if w.rng.IntN(3) == 0 {
		return nil
	}
	s := &simStuck{
		methods: [][]string{{faultstore.Delete}, {faultstore.Get, faultstore.Stat}, {faultstore.Put}, {faultstore.Get, faultstore.Delete}}[w.rng.IntN(4)],
		kind:    []string{"/d/", "/d/", "/m/", "/c/", "/"}[w.rng.IntN(5)],
		of:      1 << w.rng.IntN(4),
	}
	s.which = w.rng.Uint64N(s.of)
	w.count(countStuck, true)
	return s
}

// hits reports whether an operation fails.
func (s *simStuck) hits(method, key string) bool {
	return s != nil && slices.Contains(s.methods, method) && strings.Contains(key, s.kind) &&
		hashString(key[min(len(key), len(uuid.Nil.String())):])>>16%s.of == s.which
}

// stuckObjects lets some objects fail while clients go on. What has nothing to do with
// them goes on too, and comes to its end.
func (w *world) stuckObjects() {
	h := w.owner
	if w.destage(); !w.active() {
		return
	}
	s := w.newStuck()
	h.faults = simFaults{stuck: s} // all that is put from now on has not been tried before
	if w.amid(50 + w.rng.IntN(300)); !w.active() {
		return
	}
	for range 8 {
		w.readBeside(s)
	}
	r := h.flush()
	w.until(h, func() bool { return r.ended }, "a flush while some objects are stuck")
	if !s.hitsAny(faultstore.Put) {
		w.letGoBeside(s)
	}
	w.owner.faults.on = true
}

// hitsAny reports whether there may be objects for which an operation fails.
func (s *simStuck) hitsAny(method string) bool { return s != nil && slices.Contains(s.methods, method) }

// hitsKind reports whether objects with kind in their keys may be among those that fail.
func (s *simStuck) hitsKind(kind string) bool { return s != nil && strings.HasPrefix(kind, s.kind) }

// readBeside reads somewhere. What needs no object that is stuck ends.
func (w *world) readBeside(s *simStuck) {
	h := w.owner
	r := h.read(w.place(1 + w.rng.Uint64N(24)))
	w.until(h, func() bool { return r.ended || w.needs(&r.Request, s) }, "a read beside objects that are stuck")
	w.count(countStuckReads, s != nil && r.ended)
}

// needs reports whether a read may need an object that cannot be read, as the map is now.
func (w *world) needs(r *Request, s *simStuck) bool {
	if !s.hitsAny(faultstore.Get) {
		return false
	}
	im := w.owner.im
	for at, end := r.Sector, r.Sector+uint64(r.Sectors); at < end; {
		i := segmentOf(at)
		to := min(end, segmentStart(i+1))
		if !im.ready(i) {
			stored := im.objs.places(i)
			if s.kind != "/m/" || slices.ContainsFunc(stored[:], func(p place) bool {
				return p.size > 0 && s.hits(faultstore.Get, mapKey(im.id, p.object.at, p.object.part))
			}) {
				return true // what the segment refers to is not known
			}
			at = to
			continue
		}
		e, ok := im.objs.Next(at, to)
		if !ok {
			at = to
			continue
		}
		if o := im.table.find(refOf(e.Loc).seq()); s.hits(faultstore.Get, dataKey(im.id, uint64(o.number), uint64(o.epoch))) {
			return true
		}
		at = e.End()
	}
	return false
}

// letGoBeside brings everything into the store, and perhaps detaches the image, while
// objects cannot be read or deleted.
func (w *world) letGoBeside(s *simStuck) {
	h := w.owner
	done := false
	h.im.Destage(func(error) { done = true })
	// Where the map cannot be read there is no checkpoint, and the next batch, which may
	// be several objects, waits for one, unless the image is let go of.
	waits := func() bool { return len(h.im.queue) > 0 && h.im.checkpoint.behind(h.im.queue[0].objects) }
	w.until(h, func() bool { return done || waits() && s.hitsAny(faultstore.Get) }, "destage while some objects are stuck")
	w.until(h, func() bool { return len(h.out) == 0 || s.hitsAny(faultstore.Get) }, "requests while some objects are stuck")
	unread := s.hitsAny(faultstore.Get) && s.hitsKind("/m/")
	if !done && !unread || len(h.out) > 0 || w.rng.IntN(2) == 0 {
		return
	}
	w.count(countStuckDetaches, s != nil)
	m := h.m
	// A detach waits for a checkpoint, and that for each part of the map that has changed: until
	// it can be read, if the store does not answer, and only for a while if it is lost.
	if unread && w.rng.IntN(2) == 0 {
		w.leaveBeside()
	} else {
		if unread {
			s.lost = w.lostError()
		}
		h.close()
	}
	if s != nil {
		s.lost = nil
	}
	m.stored = len(m.history)
	w.reopen(m.stored, w.rng.IntN(2) == 0, false, "detached while some objects were stuck")
}

// leaveBeside detaches the image while parts of its map cannot be read, and has them read again
// before it is told that this has ended, if it has to wait for them.
func (w *world) leaveBeside() {
	h := w.owner
	l := h.leave()
	for range w.rng.IntN(400) {
		w.step(math.MaxInt64)
	}
	h.faults = simFaults{}
	w.until(h, func() bool { return l.told > 0 && h.im.Quiet() && h.env.idle() }, "detach when all of the map can be read again")
	h.kill()
}

// lostError returns what a read of something fails with that is lost.
func (w *world) lostError() error {
	return []error{backend.ErrNotFound, backend.ErrPermanent, syscall.EIO}[w.rng.IntN(3)]
}

// detachLost lets clients go on while parts of the map are lost, and detaches the image. That
// comes to its end, with a checkpoint or without. Who attaches the image then reads what was
// written, as far as it can be read, and all of it when the parts have been brought back.
func (w *world) detachLost() {
	h := w.owner
	if w.destage(); !w.active() {
		return
	}
	s := &simStuck{methods: []string{faultstore.Get}, kind: "/m/", of: 1 << w.rng.IntN(2), lost: backend.ErrNotFound}
	s.which = w.rng.Uint64N(s.of)
	h.faults = simFaults{stuck: s}
	if w.amid(50 + w.rng.IntN(300)); !w.active() {
		return
	}
	// While there is no checkpoint the log may become full.
	w.until(h, func() bool { return len(h.out) == 0 || h.im.blocked.n > 0 }, "requests while parts of the map are lost")
	if len(h.out) > 0 {
		w.settle(h)
		return
	}
	s.lost = w.lostError()
	m := h.m
	h.close()
	m.stored = len(m.history)
	newDisk := w.rng.IntN(2) == 0
	if !newDisk && w.rng.IntN(2) == 0 {
		s.lost = backend.ErrNotFound
		if err := h.open(w.id, false); err != nil {
			w.fail("open an image of which parts of the map are lost: %v", err)
		}
		h.m = m
		w.readDamaged(h)
		h.kill()
	}
	h.faults = simFaults{}
	w.reopen(m.stored, newDisk, false, "detached while parts of the map were lost")
}

// simLeave is how an image's client let go of it.
type simLeave struct {
	told int // how often it was told that it has, or why it could not
	err  error
}

// leave closes the image, of which no request is in flight.
func (h *simHost) leave() *simLeave {
	w, m, n := h.w, h.m, h.m.acked
	l := new(simLeave)
	h.left = l
	h.im.Close(func(err error) {
		l.told++
		l.err = err
		switch {
		case l.told > 1:
			w.fail("%s: who closed the image was told twice", h.name)
		case err == nil:
			m.stored = max(m.stored, n)
			if err := m.promised(n, "a detach was acknowledged"); err != nil {
				w.fail("%s: %v", h.name, err)
			}
		case !m.lost && !h.im.super.gaveUp:
			w.fail("%s: close: %v", h.name, err)
		}
	})
	return l
}

// detachAmidFaults closes the image while faults go on. It comes to its end when they
// have ended, unless the host dies before, or another one takes the image over.
func (w *world) detachAmidFaults() {
	h, faults := w.owner, w.owner.faults
	if w.settle(h); !w.active() {
		return
	}
	w.count(countLeaves, true)
	m := h.m
	h.faults = faults
	h.faults.on = true
	if w.rng.IntN(2) == 0 {
		h.destage()
	}
	l := h.leave()
	for range w.rng.IntN(400) {
		if w.rng.IntN(50) == 0 {
			w.weather(h)
		}
		if w.step(math.MaxInt64); h.dead {
			break
		}
	}
	switch k := w.rng.IntN(6); {
	case k == 0 && !h.dead:
		w.takeover()
		return
	case k == 1:
		h.cutPower()
		w.reopen(max(m.durable, m.stored), false, false, "power cut in a detach")
		return
	case k > 2 && !h.dead:
		h.faults = simFaults{}
		w.until(h, func() bool { return l.told > 0 && h.im.Quiet() && h.env.idle() }, "detach amid faults")
	}
	h.kill()
	lost := m.stored >= m.acked && w.rng.IntN(2) == 0
	w.reopen(m.acked, lost, lost, "daemon ended in a detach, or after it")
}

// damageInUse damages an object at rest under clients that go on, and mends it when
// they have, or when another process of the owner has come upon it.
func (w *world) damageInUse() {
	w.count(countUsedDamages, true)
	h := w.owner
	key, mend := w.damageOne()
	h.badReads = true
	w.run(50 + w.rng.IntN(300))
	if h.dead || h.im.state != Active || w.rng.IntN(2) == 0 {
		m := h.m
		h.kill()
		w.openDamaged(m, key)
		mend()
		w.reopen(m.acked, false, false, "daemon killed, with a damaged object")
		return
	}
	mend()
	w.settle(h)
}

// damageOne damages any object of the image, and returns its key and what mends it if
// it is still there.
func (w *world) damageOne() (key string, mend func()) {
	ctx := context.Background()
	keys := w.keys()
	key = keys[w.rng.IntN(len(keys))]
	whole := w.contents(key)
	if err := damage(ctx, w.inner, key, w.corrupt); err != nil {
		w.fail("damage: %v", err)
	}
	damaged := w.contents(key)
	return key, func() {
		if now := w.contents(key); now == nil || !bytes.Equal(now, damaged) {
			return
		}
		if err := replaceObject(ctx, w.inner, key, whole); err != nil {
			w.fail("mend: %v", err)
		}
	}
}

// contents returns what an object of either kind holds, nil if it is not there.
func (w *world) contents(key string) []byte {
	ctx := context.Background()
	b, _, err := w.inner.Load(ctx, key)
	if err != nil {
		b, err = readWhole(ctx, w.inner, key)
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		w.fail("read %s: %v", key, err)
	}
	return slices.Clone(b)
}

// openDamaged lets a new process of the owner open the image, of which m is the model,
// with a damaged object: it names that, or whatever it reads is right.
func (w *world) openDamaged(m *model, key string) {
	h := w.owner
	h.faults = simFaults{}
	if err := h.open(w.id, false); err != nil {
		if !names(err, key) {
			w.fail("open with a damaged object %s: %v, which does not name it", key, err)
		}
		h.kill()
		return
	}
	h.m = m
	w.readDamaged(h)
	h.kill()
}
