package engine

// sharedOf returns what images of h's process share, nil if h is nil.
func (h *simHost) sharedOf() *Shared {
	if h == nil {
		return nil
	}
	return h.shared
}

// readOnly opens the image read-only on another host while its owner goes on. What can
// be read of it is the state after some number of writes, at least those in the store
// when it was opened: the owner deletes objects that it refers to.
func (w *world) readOnly() {
	w.count(countReadOnly, true)
	m, floor := w.owner.m, w.owner.m.stored
	c := w.newHost()
	c.leaveCache() // by which its process may die
	c.readOnly = true
	w.acting = true
	if err := c.open(w.id, false); err != nil {
		w.fail("open read-only: %v", err)
	}
	w.amid(w.rng.IntN(100))
	got := c.readAll("a read-only image")
	for _, v := range got {
		w.count(countReadOnlyCells, v != unread)
	}
	if m.match(got, floor) < 0 {
		w.fail("a read-only image is not the state after any %d or more of the %d writes: %s", floor, len(m.history), m.describe(got))
	}
	c.im.Close(func(error) {})
	w.until(c, func() bool { return c.im.Quiet() && c.env.idle() }, "close a read-only image")
	c.kill()
	w.drop(c)
}

// neighbour opens another image in the owner's process: they share memory, and nothing
// else. It goes on while the store of the owner's image is away, and ends with the
// process, or before.
func (w *world) neighbour() {
	w.count(countNeighbours, true)
	h := w.owner
	id := w.create("other")
	c := w.newHost()
	c.leaveCache() // by which its process may die
	c.beside, c.offset, c.skew = h, h.offset, h.skew
	if err := c.open(id, false); err != nil {
		w.fail("open another image: %v", err)
	}
	w.recovered(c, newModel(make([]uint64, w.cells())), 0, false, "another new image")
	w.run(w.rng.IntN(300))
	if away := h.faults; !h.dead && w.rng.IntN(2) == 0 {
		h.faults = simFaults{outage: true}
		w.amid(w.rng.IntN(200))
		w.settle(c)
		done := false
		c.im.Destage(func(error) { done = true })
		w.until(c, func() bool { return done }, "destage beside an image whose store is away")
		w.count(countNeighboursAlone, true)
		h.faults = away
	}
	m := c.m
	if h.dead || w.rng.IntN(2) == 0 { // the process ends
		c.kill()
		w.crash()
		c.beside = w.owner
		c.faults = simFaults{}
		if err := c.open(id, false); err != nil {
			w.fail("open another image again: %v", err)
		}
		w.recovered(c, m, m.acked, true, "another image of a process that was killed")
	}
	w.settle(c)
	c.close()
	w.drop(c)
	for len(w.late) > 0 { // what comes later would be nobody's
		w.lateEffect(0)
	}
	if err := removeWhole(w.inner, "other", RemoveOptions{URL: "mem:/other"}); err != nil {
		w.fail("remove another image: %v", err)
	}
}
