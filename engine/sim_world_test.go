package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// world is one run of the simulation: hosts, a store that they share, a clock,
// and the model of what the image must be. Everything in it follows from the
// seed.
type world struct {
	rng   *rand.Rand
	plan  simPlan
	inner *mem.Store
	id    uuid.UUID
	now   time.Duration // the clock that all hosts' clocks derive from
	trace uint64        // hash of everything that has happened

	hosts []*simHost
	gone  int      // hosts that were there
	owner *simHost // whose client the world is about
	epoch uint64   // of the image

	acting       bool // clients submit requests
	nextWrite    uint64
	late         []func() // effects on the store that have not come yet
	effectIsLate bool
	strays       map[string]bool // objects that were put by such
	memory       *simMemory
	caches       []*simdisk.Disk // of hosts that are gone
	counts       simCounts
	recent       []simPlace // of reads
	next         uint64     // cell that a sequential run of reads comes to
	regions      []simRegion
	rivals       []*simRival // open the image at this time
	snaps        []*simSnapshot
	maybe        []string // names of snapshots that there may be, or not
	nextSnap     int      // of snapshots and clones
	cloned       []*simClone
	removed      []*simClone // of what these were made of something may be left
	half         []string    // names of clones that there may be, or not
	frozen       bool        // one of them goes on: the others do not
	lends        *rand.Rand  // whether logs are lent memory
}

// simRegion is a part of the image that the world uses.
type simRegion struct{ start, sectors uint64 }

const (
	simSectors = 1 << 22 // 2 GiB, of most images
	simLarge   = 3072    // sectors: 1.5 MiB
	simSmall   = 128
)

// simRegions returns three large regions, at the beginning of the image, across a
// border of its map's segments and at its end, and small ones all over it: so many
// segments of the map are in use.
func simRegions(sectors uint64) []simRegion {
	list := []simRegion{{0, simLarge}, {segmentSectors - simLarge/2, simLarge}, {sectors - simLarge, simLarge}}
	for i := uint64(1); i < 25; i++ {
		list = append(list, simRegion{sectors/26*i/8*8 + extmap.PageSectors, simSmall})
	}
	return list
}

// cells returns the number of the model's cells.
func (w *world) cells() (n uint64) {
	for _, r := range w.regions {
		n += r.sectors / w.plan.cell
	}
	return n
}

// regionOf returns the region of a cell, and the cell that the region begins with.
func (w *world) regionOf(cell uint64) (r simRegion, first uint64) {
	for _, r = range w.regions {
		n := r.sectors / w.plan.cell
		if cell < first+n {
			return r, first
		}
		first += n
	}
	panic("the image has no such cell")
}

// sectorOf returns where a cell is in the image.
func (w *world) sectorOf(cell uint64) uint64 {
	r, first := w.regionOf(cell)
	return r.start + (cell-first)*w.plan.cell
}

// cellsFrom returns how many cells, at most n, follow from a cell on in its region.
func (w *world) cellsFrom(cell, n uint64) uint64 {
	r, first := w.regionOf(cell)
	return min(n, first+r.sectors/w.plan.cell-cell)
}

// within makes a run of cells one that lies in one region.
func (w *world) within(cell, n uint64) (uint64, uint64) {
	r, first := w.regionOf(cell)
	n = min(n, r.sectors/w.plan.cell)
	return min(cell, first+r.sectors/w.plan.cell-n), n
}

// simMemory is the large memory of worlds that run one after the other: to get it
// anew from the operating system takes longer than all else.
type simMemory struct {
	logs     [][]byte // of logs, free
	segments [][]byte // that logs can be lent, free
	scratch  []byte   // see simFile.Buffer
	counts   simCounts
}

const simLogMemory = 2 * writelog.SegmentSize // at most

// take returns n bytes for the memory of a log.
func (m *simMemory) take(n int) []byte {
	if k := len(m.logs); k > 0 {
		p := m.logs[k-1]
		m.logs = m.logs[:k-1]
		clear(p[:n])
		return p[:n]
	}
	return make([]byte, n, simLogMemory)
}

func newWorld(seed uint64, memory *simMemory) *world {
	rng := rand.New(rand.NewPCG(seed, 42))
	plan := newPlan(rng)
	plan.quick = !plan.stormy && seed%3 == 1
	plan.extras = newExtras(rand.New(rand.NewPCG(seed, 43)))
	w := &world{rng: rng, plan: plan, inner: mem.New(), memory: memory, nextWrite: 1, strays: map[string]bool{}, lends: rand.New(rand.NewPCG(seed, 44))}
	w.regions = simRegions(plan.extras.sectors)
	w.id = w.create("disk")
	return w
}

// create makes an image.
func (w *world) create(name string) uuid.UUID {
	id, err := Create(context.Background(), w.inner, name, CreateOptions{
		Size: w.plan.extras.sectors * SectorSize, BlockSize: uint32(w.plan.cell * SectorSize), ObjectSize: w.plan.extras.object,
	})
	if err != nil {
		w.fail("create: %v", err)
	}
	return id
}

// simFailure is how a world ends in which a promise was broken.
type simFailure string

func (w *world) fail(format string, args ...any) { panic(simFailure(fmt.Sprintf(format, args...))) }

// note adds what happens to the trace.
func (w *world) note(what string, values ...uint64) {
	if *simLog {
		fmt.Fprintln(os.Stderr, w.now, what, values)
	}
	w.hash(hashString(what))
	w.hash(uint64(w.now))
	for _, v := range values {
		w.hash(v)
	}
}

func (w *world) hash(v uint64) { w.trace = (w.trace ^ v) * 0x9e3779b97f4a7c15 >> 1 }

func hashString(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

func (w *world) uuid() (id uuid.UUID) {
	binary.LittleEndian.PutUint64(id[:], w.rng.Uint64())
	id[15] = 1
	return id
}

// step lets one host do one thing, or time pass until one can, but not beyond
// limit. It reports false if there is nothing before limit.
func (w *world) step(limit time.Duration) bool {
	if n := len(w.late); n > 0 && w.rng.IntN(30) == 0 {
		w.lateEffect(w.rng.IntN(n))
	}
	if w.rng.IntN(60) == 0 && w.tick(limit) {
		return true
	}
	if len(w.rivals) > 0 && w.rng.IntN(2) == 0 && w.rivalGoesOn() {
		return true
	}
	n := len(w.hosts)
	first := w.rng.IntN(n)
	for i := range n {
		h := w.hosts[(first+i)%n]
		if !h.runs() {
			continue
		}
		h.env.now = max(h.env.now, h.Now())
		if w.acting && h.m != nil && w.rng.IntN(2) == 0 {
			w.act(h)
		}
		if h.step() {
			return true
		}
	}
	return w.rivalGoesOn() || w.tick(limit)
}

func (w *world) lateEffect(i int) {
	w.count(countLate, true)
	effect := w.late[i]
	w.late = slices.Delete(w.late, i, i+1)
	w.effectIsLate = true
	effect()
	w.effectIsLate = false
}

// tick moves the clock to when a host can do something that it cannot do now.
func (w *world) tick(limit time.Duration) bool {
	first := w.rivalWakes()
	for _, h := range w.hosts {
		if h.im == nil || h.dead || h.opening {
			continue
		}
		if at, ok := h.env.nextEvent(); ok {
			first = min(first, max(h.world(at), h.paused))
		}
	}
	if first > limit || first == math.MaxInt64 {
		return false
	}
	w.now = max(w.now, first)
	return true
}

// passFor lets time pass until at, while h, which waits, does nothing.
func (w *world) passFor(h *simHost, at time.Duration) {
	if h.yield != nil {
		for w.now < at {
			h.yield(at)
		}
		return
	}
	if h.opening {
		for range 400 {
			if w.now >= at || !w.step(at) {
				break
			}
		}
	}
	w.now = max(w.now, at)
}

// elsewhere lets the other hosts go on while h is in the middle of opening the
// image.
func (w *world) elsewhere(h *simHost) {
	if !h.opening || len(w.hosts) == 1 {
		return
	}
	if h.yield != nil {
		w.stopRival(h)
		return
	}
	if h.readOnly && w.rng.IntN(8) == 0 {
		w.passFor(h, w.now+time.Duration(w.rng.Int64N(int64(w.plan.lease)))) // it may take as long as it likes
	}
	for range w.rng.IntN(4) {
		w.step(w.now)
	}
}

// until runs, without new requests, until cond is true.
func (w *world) until(h *simHost, cond func() bool, what string) {
	acting := w.acting
	w.acting = false
	for i := 0; !cond(); i++ {
		if i > 100_000 || !w.step(math.MaxInt64) {
			w.fail("%s: %s: nothing moves: %+v", h.name, what, h.im.Stats())
		}
		if h.dead {
			w.fail("%s died during %s", h.name, what)
		}
	}
	w.acting = acting
}

// run lets clients submit requests for a while. It ends early when the process
// of the owner dies.
func (w *world) run(steps int) {
	w.acting = true
	for range steps {
		if w.rng.IntN(100) == 0 {
			w.weather(w.owner)
		}
		w.step(math.MaxInt64)
		if w.owner.dead {
			break
		}
	}
	w.acting = false
}

// weather begins or ends a lasting fault of the store.
func (w *world) weather(h *simHost) {
	h.cacheWeather()
	x := &h.faults
	switch w.rng.IntN(4) {
	case 0:
		x.outage = !x.outage
		w.count(countOutages, x.outage)
	case 1:
		x.full = !x.full
		w.count(countFulls, x.full)
	case 2:
		x.refused = []string{"/d/", "/c/", "/m/", "/super", "", "", "", ""}[w.rng.IntN(8)]
		w.count(countRefusals, x.refused != "")
	default:
		x.outage, x.full, x.refused = false, false, ""
	}
	if w.plan.extras.stuck {
		x.stuck = w.newStuck()
	}
}

// count counts something if it happened.
func (w *world) count(kind int, happened bool) {
	if happened {
		w.counts[kind]++
	}
}

// act submits a request.
func (w *world) act(h *simHost) {
	if len(h.out) > 24 || h.im.Sectors() != w.plan.extras.sectors { // its clients know nothing of another size
		return
	}
	switch k := w.rng.IntN(20); {
	case k < 11:
		w.actWrite(h)
	case k < 17:
		h.read(w.readPlace())
	case k == 17:
		h.flush()
	case k == 18 && w.rng.IntN(8) == 0:
		h.destage()
	case k == 19 && w.plan.extras.leaves && h.im.state == Evicting && len(h.out) == 0 && h.left == nil:
		w.count(countLeavesEvicted, true)
		h.leave()
	}
}

// place draws where a request for n cells, or as many as fit there, is.
func (w *world) place(n uint64) (cell, cells uint64) {
	large := simLarge / w.plan.cell
	switch w.rng.IntN(4) {
	case 0: // across a border of segments
		return w.within(large+large/2-w.rng.Uint64N(n+1), n)
	case 1, 2: // hot
		return w.within(w.rng.Uint64N(64), n)
	}
	return w.within(w.rng.Uint64N(w.cells()), n)
}

// simPlace is a run of cells.
type simPlace struct{ cell, cells uint64 }

// readPlace draws where a read is: anywhere, where one was not long ago, or at the
// next step of a sequential run.
func (w *world) readPlace() (cell, cells uint64) {
	switch k := w.rng.IntN(8); {
	case k < 3 && len(w.recent) > 0:
		p := w.recent[w.rng.IntN(len(w.recent))]
		return p.cell, p.cells
	case k < 5:
		if w.rng.IntN(16) == 0 || w.next >= w.cells() {
			w.next, _ = w.place(1)
		}
		cell, cells = w.next, w.cellsFrom(w.next, 8+w.rng.Uint64N(24))
		w.next += cells
		return cell, cells
	}
	cell, cells = w.place(1 + w.rng.Uint64N(24))
	if p := (simPlace{cell, cells}); len(w.recent) < 8 {
		w.recent = append(w.recent, p)
	} else {
		w.recent[w.rng.IntN(len(w.recent))] = p
	}
	return cell, cells
}

func (w *world) actWrite(h *simHost) {
	if w.plan.quick {
		cell, n := w.place(8 / w.plan.cell)
		h.write(cell, n, Write, false)
		return
	}
	n := 1 + w.rng.Uint64N(8)
	op, fua := Write, w.rng.IntN(20) == 0
	switch r := w.rng.Float64(); {
	case w.plan.stormy && r < 0.9, r < w.plan.large:
		n = (1 + w.rng.Uint64N(simLarge)) / w.plan.cell // up to 1.5 MiB: several records
	case r < w.plan.large+w.plan.trims:
		n, op = 1+w.rng.Uint64N(simLarge/w.plan.cell/2), Discard
		if w.rng.IntN(2) == 0 {
			op = WriteZeroes
		}
		fua = fua && op == WriteZeroes
	case w.rng.IntN(2) == 0:
		n = 1 + w.rng.Uint64N(64/w.plan.cell)
	}
	cell, n := w.place(max(n, 1))
	h.write(cell, n, op, fua)
}

// settle ends all faults and waits until nothing of h is in flight.
func (w *world) settle(h *simHost) {
	h.faults = simFaults{}
	w.until(h, func() bool { return len(h.out) == 0 && h.env.idle() }, "settle")
	h.badReads = false
}

// recovered reads the image on h, which has just been opened, from the store and,
// if local is set, from the log that the writes of m went to. It must be the state
// after at least floor of these. It returns how many it is.
func (w *world) recovered(h *simHost, m *model, floor int, local bool, what string) int {
	faults := h.faults
	h.faults = simFaults{}
	got := h.readAll("the image")
	h.faults = faults
	k := m.match(got, floor)
	if k < 0 {
		w.fail("%s: what was recovered is not the state after any %d or more of the %d writes (%d acknowledged, %d flushed, %d destaged): %s",
			what, floor, len(m.history), m.acked, m.durable, m.stored, m.describe(got))
	}
	if h.m = newModel(got); local {
		h.m = m.recovered(k)
	}
	h.faults.on = true
	return k
}

// reopen opens the image on the owner's host, perhaps with a new SSD, after its
// process has ended. It must have at least floor writes, or, if power was cut, those that were flushed.
func (w *world) reopen(floor int, newDisk, force bool, what string) {
	h, m, out, disk := w.owner, w.owner.m, w.owner.out, w.owner.disk
	if newDisk {
		h.newDisk()
	}
	cut, err := w.start(h, force)
	if err != nil {
		w.fail("%s: open: %v", what, err)
	}
	if cut {
		floor = min(floor, max(m.durable, m.stored))
	}
	w.recovered(h, m, floor, h.disk == disk, what)
	if w.plan.reissues {
		w.reissue(h, m, out)
	}
}

// reissue submits again what was in flight when the process died, in any order,
// as the kernel does; whether it had taken effect is not known.
func (w *world) reissue(h *simHost, m *model, out []*simRequest) {
	w.rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	for _, o := range out {
		switch o.Op {
		case Read:
			h.read(o.cell, uint64(len(o.want)))
		case Flush:
			h.flush()
		default:
			r := &simRequest{first: len(h.m.history), cell: o.cell}
			r.Op, r.FUA, r.Sector, r.Sectors, r.Buf = o.Op, o.FUA, o.Sector, o.Sectors, o.Buf
			for i := o.first; i <= o.last; i++ {
				again := m.history[i]
				again.done = false
				r.last = h.m.add(again)
			}
			h.submit(r)
		}
	}
}

// simulate runs a whole world and returns the hash of its trace.
func simulate(seed uint64, memory *simMemory) uint64 {
	w := newWorld(seed, memory)
	w.owner = w.newHost()
	if _, err := w.start(w.owner, false); err != nil {
		w.fail("open: %v", err)
	}
	w.recovered(w.owner, newModel(make([]uint64, w.cells())), 0, false, "a new image")
	for range w.plan.phases {
		w.run(w.plan.steps/2 + w.rng.IntN(w.plan.steps))
		if w.plan.extras.snaps && w.serving() && w.rng.IntN(4) > 0 {
			w.snapshots()
		}
		if w.plan.extras.clones && w.serving() && w.rng.IntN(4) > 0 {
			w.cloning()
		}
		if w.plan.extras.resizes && w.serving() && w.rng.IntN(4) > 0 {
			w.resize()
		}
		w.disturb()
	}
	w.run(w.plan.steps)
	w.finish()
	for len(w.hosts) > 0 {
		w.drop(w.hosts[0])
	}
	memory.counts.add(&w.counts)
	return w.trace
}

// disturb ends a phase with one of the failures that an image must survive.
func (w *world) disturb() {
	h := w.owner
	w.note("disturb", uint64(len(h.m.history)), uint64(h.m.acked))
	if !h.dead && h.im.state == Active {
		if w.trouble() {
			return
		}
		switch w.rng.IntN(10) {
		case 0:
			w.detach()
			return
		case 1:
			w.logFails()
		case 2:
			w.logDamaged()
			return
		case 3, 4:
			w.takeover()
			return
		case 5:
			if w.plan.stormy {
				w.logFull()
			}
			w.secondHost()
		}
	}
	w.crash()
	if w.plan.quick {
		w.crashQuickly()
	}
}

// crashQuickly ends the owner's process again and again after a few writes.
func (w *world) crashQuickly() {
	for range w.rng.IntN(4) {
		h := w.owner
		if h.dead || h.broken || h.im.state != Active {
			return
		}
		w.settle(h)
		w.acting = true
		for range w.rng.IntN(12) {
			w.step(math.MaxInt64)
			if h.dead {
				break
			}
		}
		w.acting = false
		w.crash()
	}
}

// destage brings everything into the store.
func (w *world) destage() {
	h := w.owner
	if h.dead || h.broken || h.im.state != Active || h.im.log.Err() != nil {
		return
	}
	w.settle(h)
	done := false
	h.im.Destage(func(error) { done = true })
	w.until(h, func() bool { return done && h.env.idle() || h.im.state != Active }, "destage before a crash")
	w.count(countQuiet, true)
}

// crash ends the owner's process in one of the ways of the failure table and
// opens the image again.
func (w *world) crash() {
	if w.plan.quick && w.rng.IntN(2) == 0 {
		w.destage()
	}
	h := w.owner
	switch w.rng.IntN(4) {
	case 0, 1:
		h.kill()
		w.reopen(h.m.acked, false, false, "daemon killed")
	case 2:
		h.cutPower()
		w.reopen(max(h.m.durable, h.m.stored), false, false, "power cut")
	default:
		w.count(countLostSSDs, true)
		h.kill()
		w.reopen(h.m.stored, true, true, "SSD lost")
	}
}

// detach closes the image in an orderly way and opens it again, with the same
// log or a new one.
func (w *world) detach() {
	w.count(countDetaches, true)
	h := w.owner
	w.settle(h)
	m := h.m
	h.close()
	m.stored = len(m.history)
	if w.plan.extras.snaps {
		for range w.rng.IntN(4) {
			w.snapshots()
		}
	}
	if w.plan.extras.clones {
		for range w.rng.IntN(4) {
			w.cloning()
		}
	}
	w.reopen(h.m.stored, w.rng.IntN(2) == 0, false, "detached and attached again")
}

// logFails makes the SSD fail. Nothing that is not in the log is acknowledged
// from then on; what can be read is.
func (w *world) logFails() {
	w.count(countSSDErrors, true)
	h := w.owner
	if w.rng.IntN(2) == 0 {
		h.faults.failWrite = true
	} else {
		h.faults.failSync = true
	}
	w.run(w.rng.IntN(200))
	if h.dead {
		return
	}
	w.settle(h)
}

// logDamaged flips a bit of the log. What was damaged is found or not needed: it
// is never served.
func (w *world) logDamaged() {
	h := w.owner
	if w.rng.IntN(2) == 0 { // a new process has nothing of the log in memory
		h.kill()
		w.reopen(h.m.acked, false, false, "daemon killed")
		h.faults.full = true
		w.run(w.rng.IntN(50))
		if h.dead || h.im.state != Active {
			w.crash()
			return
		}
	}
	used, head := h.im.log.Used(), h.im.log.Head()
	off := w.rng.Int64N(2 * writelog.BlockSize) // in one of the headers
	if used > 0 && w.rng.IntN(6) > 0 {
		off = writelog.DataOffset + int64((head-1-w.rng.Uint64N(used))%h.im.log.Size())
	}
	w.count(countDamages, true)
	h.disk.Damage(off)
	h.badReads = true
	w.run(w.rng.IntN(100))
	m := h.m
	floor := max(m.stored, m.proved)
	if used > 0 && w.plan.extras.damage {
		w.rot(h, head, used)
		floor = m.stored // what proves the loss may be lost as well
	}
	h.kill()
	// The power stays on: a loss of power may take the proof along.
	dieOpen := w.plan.dieOpen
	w.plan.dieOpen = 0
	_, err := w.start(h, false)
	w.plan.dieOpen = dieOpen
	switch {
	case errors.Is(err, writelog.ErrCorrupt):
		w.reopen(m.stored, true, true, "refused a damaged log")
	case err != nil:
		w.fail("open with a damaged log: %v", err)
	default:
		w.recovered(h, m, floor, true, "a log that was damaged")
	}
}

// rot flips more bits of the log's records while clients go on.
func (w *world) rot(h *simHost, head, used uint64) {
	for range w.rng.IntN(4) {
		for range 1 << w.rng.IntN(4) {
			h.disk.Damage(writelog.DataOffset + int64((head-1-w.rng.Uint64N(used))%h.im.log.Size()))
		}
		if w.run(w.rng.IntN(100)); h.dead {
			return
		}
	}
}

// logFull fills the log while the store takes no objects: writes wait, reads go
// on, and everything goes on by itself when the store takes objects again.
func (w *world) logFull() {
	h := w.owner
	h.faults = simFaults{full: true}
	w.acting = true
	for range 2000 {
		w.step(math.MaxInt64)
		if h.im.blocked.n > 0 && h.im.log.Used() > h.im.log.Size()/2 {
			break
		}
	}
	w.acting = false
	if h.dead || h.im.state != Active || h.im.log.Err() != nil {
		return
	}
	w.count(countFullLogs, h.im.blocked.n > 0)
	r := h.read(w.place(4))
	w.until(h, func() bool { return r.ended }, "a read while the log is full")
	w.settle(h)
}

// secondHost tries to attach the image beside its owner.
func (w *world) secondHost() {
	w.count(countSeconds, true)
	c := w.newHost()
	var owned *OwnedError
	if err := c.open(w.id, false); !errors.As(err, &owned) {
		w.fail("a second host opened the image: %v", err)
	}
	w.drop(c)
}

// drop forgets a host.
func (w *world) drop(h *simHost) {
	i := slices.Index(w.hosts, h)
	w.hosts = slices.Delete(w.hosts, i, i+1)
	h.leaveCache()
	if h.memory != nil {
		w.memory.logs = append(w.memory.logs, h.memory)
	}
	w.memory.segments = append(w.memory.segments, h.pool.all...)
	w.gone++
}

// takeover lets a second host take the image with force while the first one is
// alive, or is stopped for a while.
func (w *world) takeover() {
	a, b := w.owner, w.newHost()
	b.faults.stuck = a.faults.stuck
	if w.rng.IntN(3) > 0 {
		a.paused = w.now + time.Duration(w.rng.Int64N(int64(4*w.plan.lease)))
	}
	w.count(countStopped, a.paused > 0)
	w.count(countTakeovers, a.paused == 0)
	m := a.m
	w.acting = true
	_, err := w.start(b, true)
	if err != nil {
		w.fail("takeover: %v", err)
	}
	w.acting = false
	floor := m.stored
	if a.im != nil && !a.dead && a.im.state == Released && a.im.accepted.seq == a.im.log.Seq() {
		floor = max(floor, m.acked)
	}
	// The first host does not run while the image is read: what is read must not
	// depend on it.
	paused := a.paused
	a.paused = math.MaxInt64
	m.kept = w.recovered(b, m, floor, false, "taken over")
	a.paused = paused
	if err := m.checkLate("a write was acknowledged"); err != nil {
		w.fail("%s: %v", a.name, err)
	}
	w.owner = b
	w.run(w.rng.IntN(200))
	a.paused = 0
	if !b.dead {
		w.run(w.rng.IntN(200))
	}
	w.staleLog(a, a.m.acked)
}

// staleLog checks what becomes of the log of a host that has lost the image. The log
// must have so many writes, or the store.
func (w *world) staleLog(a *simHost, has int) {
	m := a.m
	if w.rng.IntN(3) == 0 {
		has = min(has, m.durable)
		a.cutPower()
	} else {
		a.kill()
	}
	a.faults = simFaults{}
	if has > m.kept && w.rng.IntN(2) == 0 {
		w.salvage(a, has)
	}
	var stale *StaleLogError
	var owned *OwnedError
	switch err := a.open(w.id, false); {
	case errors.As(err, &stale):
		if stale.Records == 0 || stale.Epoch >= w.epoch {
			w.fail("stale log: %+v", stale)
		}
	case errors.As(err, &owned):
		if has > m.kept {
			w.fail("%s holds writes %d to %d that no other host has, but its log was not refused", a.name, m.kept, has)
		}
	default:
		w.fail("%s, whose log is stale, opened the image beside its owner: %v", a.name, err)
	}
	w.drop(a)
}

// salvage brings back what a stale log holds as a new image.
func (w *world) salvage(a *simHost, has int) {
	w.count(countSalvages, true)
	ctx := context.Background()
	id, err := Salvage(ctx, a.disk, w.inner, w.id, w.inner, "saved", nil)
	if err != nil {
		w.fail("salvage: %v", err)
	}
	a.leaveCache() // to be shared with the new image, whose objects have numbers of their own
	c := w.newHost()
	if err := c.open(id, false); err != nil {
		w.fail("open what was salvaged: %v", err)
	}
	got := c.readAll("the salvaged image")
	if a.m.match(got, has) < 0 {
		w.fail("what was salvaged is not the state after any %d or more of the %d writes: %s", has, len(a.m.history), a.m.describe(got))
	}
	c.kill()
	w.drop(c)
	if err := removeWhole(w.inner, "saved", RemoveOptions{URL: "mem:/saved", Force: true}); err != nil {
		w.fail("remove what was salvaged: %v", err)
	}
}

// finish detaches the image, opens it elsewhere, and looks at what is left in
// the store.
func (w *world) finish() {
	if w.owner.dead || w.owner.broken || w.owner.im.state != Active {
		w.crash()
	}
	h := w.owner
	h.faults.on = false
	w.settle(h)
	h.close()
	for w.plan.extras.snaps && w.rng.IntN(2) == 0 {
		w.snapshots()
	}
	m := h.m
	w.flushLate()
	w.collect()
	c := w.newHost()
	c.faults.on = false
	if err := c.open(w.id, false); err != nil {
		w.fail("detached and attached elsewhere: %v", err)
	}
	w.recovered(c, m, len(m.history), false, "detached and attached elsewhere")
	c.faults.on = false
	w.awaitForgotten(c)
	c.close()
	w.settleSnapshots()
	w.settleClones()
	w.checkStore()
	if w.rng.IntN(2) == 0 {
		w.dropSnapshots()
	}
	if w.rng.IntN(4) == 0 {
		w.damageStore()
		return
	}
	if w.plan.extras.forced {
		w.removeAttached(c.m)
	}
	w.dropClones()
}
