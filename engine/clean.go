package engine

import (
	"cmp"
	"errors"
	"maps"
	"math"
	"slices"
	"sort"
	"time"
)

const (
	// cleanObjects is about how many objects of live data one cleaning moves: so
	// many that they can be told apart by age, so few that they fit memory.
	cleanObjects = 4
	// cleanSlack is how many objects of dead data an image may have in any case.
	cleanSlack = 2
	// cleanLag is the part of the live data by which the space may exceed the ratio before
	// clients' objects wait.
	cleanLag = 16
	// cleanGap is the dead data that is read along rather than left out: an OSD reads each
	// range by itself.
	cleanGap = 16 << 10 // bytes
	// cleanFull is the share of live data, in percent, from which on an object is
	// not worth cleaning.
	cleanFull = 97
	// minMerge is by how many a cleaning of small objects reduces their number.
	minMerge = 16
	// maxVictims bounds the objects of one cleaning.
	maxVictims = 512
	// cleanTries is how often in a row a victim is tried to be read, and cleanLater for
	// how long it is left alone then.
	cleanTries = 5
	cleanLater = 15 * time.Minute
	// cleanFailures is how many victims in a row may be such: then it is the store that
	// cannot be read, and the cleaning ends with what it has.
	cleanFailures = 2
)

// cleaner moves what lives out of mostly dead objects, so that they can go. The
// reactor owns it.
//
// A cleaning chooses victims by cost and benefit (see benefit). It asks the map what
// of each victim lives, reads that, and puts it into new objects, sorted by age
// into as many as there are, and by place inside each: so cold data leaves the hot
// behind, and what was written here and there is in sequence again.
//
// The new objects take their places in the order of objects before the batches of which
// nothing is built, so that a full log does not keep them waiting. They hold no records.
// Each says up to which object the map had been followed when its data was read: where a
// later one has changed the map, what it holds is not entered. Recovery repeats that from the
// headers alone.
type cleaner struct {
	im      *Image
	search  *search  // for the victims of the next one
	aimed   cleanAim // of the last search
	running *cleaning
	bad     map[uint32]bool          // victims that are damaged
	later   map[uint32]time.Duration // those that cannot be read now, and when to try again
	// fading has those of which all that still lives is about to be replaced by what was in the
	// log, up to that record: to look at them again would find nothing to be moved.
	fading map[uint32]uint64
	timer  Timer
	turn   cleaningTurn
	waits  bool   // for its turn
	held   bool   // clients' objects wait for that as well: until the next renewal
	moved  uint64 // bytes, since the image was opened
	vain   bool   // the last cleaning has freed no more than it has moved
	credit int64  // sectors of clients' objects that go on while others wait for the cleaner
	// Sectors of the objects that points need, or that cannot be read, and what lives
	// of them, when victims were last chosen.
	heldSpace, heldLive uint64
}

// cleaning is one run of the cleaner.
type cleaning struct {
	aim     cleanAim
	base    uint64 // the last object accepted when it began
	victims []objectInfo
	next    int // victim
	pieces  []movedPiece
	buffers [][]byte        // that the pieces' data is in, as far as they are to be given back
	objects int             // sealed and not yet accepted
	moved   uint64          // sectors in all that were sealed
	emptied map[uint32]bool // victims of which everything is moved
	place   bool            // it has one of Shared's
	writing bool            // all victims have been read

	gain     int64 // sectors that it frees beyond those that it moves, as far as is known
	granted  int64 // of it, for which clients' objects have got credit
	read     int   // victims that have been read
	accepted int   // objects of moved data

	ahead    []*victim // whose headers are being read, or have been
	looking  *victim   // is being looked through, or nil
	fetching int       // victims whose data is being read
	failing  int       // reads of victims whose last try has failed
	failed   int       // victims in a row that could not be read
}

// stuck reports whether what the cleaning waits for has failed, so that it is not known
// whether it ever comes.
func (r *cleaning) stuck() bool {
	return r.failing > 0 || r.looking != nil && r.looking.load != nil && r.looking.load.tries > 0
}

// movedPiece is a run of sectors and its data.
type movedPiece struct {
	sector uint64
	n      uint32
	born   uint32
	data   []byte
}

// debt returns by how many sectors the objects that live, that can be cleaned and have not
// been, exceed the space that they may hold.
func (c *cleaner) debt() int64 {
	t := &c.im.table
	space, live := t.space-min(t.movedSpace+c.heldSpace, t.space), t.live-min(t.movedLive+c.heldLive, t.live)
	return int64(space) - int64(float64(live)*c.im.cfg.SpaceRatio) - cleanSlack*int64(c.im.object)
}

// scattered reports whether the live data lies in many more objects than it needs.
func (c *cleaner) scattered() bool {
	t := &c.im.table
	return uint64(t.alive-t.movedAlive) > 64+4*((t.live-t.movedLive)/c.im.object)
}

// due reports whether there is something to be cleaned.
func (c *cleaner) due() bool { return c.debt() > 0 || c.scattered() || c.im.flatten.moves() }

// maybe begins a cleaning if one is due.
func (c *cleaner) maybe() {
	im := c.im
	c.takeUp()
	if c.running != nil || c.search != nil || c.waits {
		return
	}
	if im.state != Active || !im.leased() || im.stats.failing != 0 || im.usedUp() || !c.due() {
		c.leaveTurn()
		return
	}
	c.search = c.newSearch()
	c.choose()
}

func (c *cleaner) newSearch() *search {
	s := &search{list: victimList{limit: cleanObjects * c.im.object}}
	switch {
	case c.im.flatten.moves() && !(c.exceeds() && c.aimed == cleanAncestors):
		s.aim = cleanAncestors
	case c.debt() > 0:
		s.aim = cleanSpace
	default:
		s.aim = cleanSmall
	}
	c.aimed = s.aim
	return s
}

// takeUp makes those objects victims again whose time has come.
func (c *cleaner) takeUp() {
	n, now := len(c.later), c.im.env.Now()
	maps.DeleteFunc(c.later, func(_ uint32, at time.Duration) bool { return at <= now })
	if len(c.later) < n {
		c.heldSpace, c.heldLive = 0, 0
	}
}

// begin begins the cleaning of victims.
func (c *cleaner) begin(victims []objectInfo, aim cleanAim) {
	im := c.im
	if len(victims) == 0 || !im.leased() {
		c.leaveTurn()
		return
	}
	if !im.shared.cleaning.take(&c.turn) {
		c.waits, c.held = true, true
		return
	}
	c.held = false
	r := &cleaning{aim: aim, base: im.accepted.object, victims: victims, emptied: make(map[uint32]bool), place: true}
	if aim != cleanAncestors {
		for _, v := range victims {
			r.gain += int64(v.sectors) - int64(v.live)
		}
	}
	c.running = r
	c.goOn()
}

// grant gives clients' objects credit for the part of the gain that the cleaning has worked for:
// half of the work is to read, and the other half to put.
func (c *cleaner) grant() {
	r := c.running
	if r.gain == 0 {
		return
	}
	done := float64(r.read) / float64(len(r.victims)) / 2
	if r.accepted > 0 {
		done += float64(r.accepted) / float64(r.accepted+r.objects) / 2
	}
	c.grantUpTo(int64(done * float64(r.gain)))
}

// grantUpTo gives credit for that much of the gain, in sectors. With as much the debt would
// stay as it is; the larger it is, the less they get, but half of it in any case: so it falls, and
// writes go on meanwhile.
func (c *cleaner) grantUpTo(gain int64) {
	r := c.running
	most, debt := float64(c.mostDebt()), float64(c.debt()+c.im.underWay())
	c.credit += int64(float64(gain-r.granted) * max(min(most/max(debt, 1), 1), 0.5))
	r.granted = gain
}

// turnComes says that there is a place for a cleaning. Its victims are chosen anew.
func (c *cleaner) turnComes() {
	c.waits = false
	if c.maybe(); c.search == nil && c.running == nil {
		c.im.pumpNow() // objects may have waited for it
	}
}

// leaveTurn gives the turn to others.
func (c *cleaner) leaveTurn() {
	c.waits, c.held = false, false
	c.im.shared.cleaning.leave(&c.turn)
}

// lags reports whether so much is dead that more of the clients' objects should wait for the
// cleaner: else, where clients write faster than the store takes it for ever, what it frees
// would be little beside what they put meanwhile. They do not wait while it is not known
// whether what it wants to move can be read, nor after a cleaning that has freed nothing.
// As much of them as half of what a cleaning gains goes on in any case, as it comes along: so
// both go on side by side, not in turns. They wait for the cleaner's turn as well, but not for
// long: it may be another store that keeps it. What is moved out of ancestors frees nothing.
func (c *cleaner) lags() bool {
	r := c.running
	works := c.search != nil && c.search.aim != cleanAncestors || c.waits && c.held && c.aimed != cleanAncestors || r != nil && r.aim != cleanAncestors && !r.stuck()
	return works && !c.vain && c.im.state == Active && c.exceeds()
}

// exceeds reports whether more is dead, or would be with what is on its way, than the cleaner lets
// come to be while it can help it.
func (c *cleaner) exceeds() bool {
	return c.debt()+c.im.underWay() > c.mostDebt()
}

// mostDebt returns the debt up to which clients' objects do not wait, with as many of them
// counted as may be on their way.
func (c *cleaner) mostDebt() int64 {
	return int64(c.im.table.live)/cleanLag + (2*cleanSlack+maxPuts)*int64(c.im.object)
}

// search goes through the image's objects for the best victims, as many at a time
// as a turn may: there may be a hundred thousand.
type search struct {
	aim    cleanAim
	next   uint32 // objects below have been looked at
	list   victimList
	unread *objectInfo // one that is left out because it cannot be read; kept for cleanAncestors
	// Sectors of the objects seen so far that points need, or that cannot be read, and
	// what lives of them.
	heldSpace, heldLive uint64
	live                [maxGroup]uint64 // sectors that live of objects, by the kind of their age
	fading              int64            // by how many sectors the debt falls when those of cleaner.fading have died
}

// cleanAim is what objects a cleaning moves data out of.
type cleanAim int

const (
	cleanSpace     cleanAim = iota // those of which much is dead
	cleanSmall                     // those in which little lives
	cleanAncestors                 // those of ancestors
)

// choose goes on with the search, and begins the cleaning at its end.
func (c *cleaner) choose() {
	s := c.search
	switch {
	case c.im.state != Active:
		c.search = nil
		c.im.pumpNow() // objects may have waited for it
	case !c.weighSome(s):
		c.im.env.AfterFunc(0, c.choose)
	default:
		c.search = nil
		c.heldSpace, c.heldLive = s.heldSpace, s.heldLive
		c.im.hazards.judge(s.live)
		maps.DeleteFunc(c.fading, func(_ uint32, seq uint64) bool { return seq <= c.im.accepted.seq })
		found := len(s.list.victims()) > 0
		victims := c.chosen(s)
		c.begin(victims, s.aim)
		switch {
		case len(victims) > 0:
		case s.aim != cleanAncestors:
			c.im.flatten.step() // the next one is for that
		case found:
			c.maybe() // they have died since the search came by them: there may be others
		default:
			c.im.flatten.moved(s.unread)
		}
		if c.running == nil {
			c.im.pumpNow() // objects may have waited for it
		}
	}
}

// weighSome goes on with the search, by some objects at least, and reports whether it has
// come to its end.
func (c *cleaner) weighSome(s *search) bool {
	im := c.im
	list := im.table.list
	first := im.table.index(uint64(s.next))
	for i := first; i < len(list); i++ {
		if i%stintObjects == 0 {
			if s.next = list[i].number; i > first && im.stint.over() {
				return false
			}
			im.stint.spend(1)
		}
		c.weigh(s, &list[i])
	}
	return true
}

// weigh offers an object to the search.
func (c *cleaner) weigh(s *search, o *objectInfo) {
	im := c.im
	if !o.gone {
		s.live[im.kindOf(o)] += uint64(o.live)
	}
	if o.gone || o.live == 0 || o.moved || uint64(o.number) > im.accepted.object {
		return // the last one may not be in the map yet
	}
	own, unread := im.line.own(uint64(o.number)), c.bad[o.number] || c.later[o.number] > 0
	held := unread || !own || im.super.holds.object(uint64(o.number), 0)
	if held {
		s.heldSpace, s.heldLive = s.heldSpace+uint64(o.sectors), s.heldLive+uint64(o.live)
	}
	switch {
	case s.aim == cleanAncestors && !own && unread:
		left := *o
		s.unread = &left
	case s.aim == cleanAncestors && !own:
		s.list.offer(o, -float64(o.number)) // in the order in which they were written
	}
	if held || s.aim == cleanAncestors {
		return
	}
	if im.accepted.seq < c.fading[o.number] && !c.exceeds() {
		s.fading += int64(o.sectors) - int64(float64(o.live)*im.cfg.SpaceRatio)
		return
	}
	u := float64(o.live) / float64(o.sectors)
	if u*100 > cleanFull && !(s.aim == cleanSmall && uint64(o.live) < im.object/2) {
		return
	}
	score := benefit(u, float64(im.accepted.object-uint64(o.number))+1)
	if s.aim == cleanSmall {
		score = 1 / float64(o.live)
	}
	s.list.offer(o, score)
}

// chosen returns the victims that the search has found, best first, as they are
// now.
func (c *cleaner) chosen(s *search) []objectInfo {
	im := c.im
	best := s.list.victims()
	victims, total := best[:0], uint64(0)
	for _, o := range best {
		if now := im.table.find(uint64(o.number)); now != nil && now.live > 0 && (s.aim == cleanAncestors || !im.super.holds.object(uint64(o.number), 0)) {
			victims = append(victims, *now)
			total += uint64(now.live)
		}
	}
	switch fewer := len(victims) - int((total+im.object-1)/im.object); {
	case s.aim == cleanSmall && fewer < minMerge, s.aim == cleanSpace && c.debt() <= s.fading:
		return nil // nothing is gained: what there is to gain is held, or comes by itself
	}
	return victims
}

// victimList keeps the best victims of those that it is offered, as many as one
// cleaning takes: an image may have far more objects than a turn could sort.
type victimList struct {
	limit  uint64 // sectors that live
	total  uint64 // of the best
	best   []objectInfo
	scores []float64 // descending
}

func (l *victimList) offer(o *objectInfo, score float64) {
	k := len(l.best)
	if k > 0 && score <= l.scores[k-1] && (l.total > l.limit || k == maxVictims) {
		return
	}
	at := sort.Search(k, func(i int) bool { return l.scores[i] < score })
	l.best, l.scores = slices.Insert(l.best, at, *o), slices.Insert(l.scores, at, score)
	l.total += uint64(o.live)
	for k = len(l.best) - 1; k > 0 && (l.total-uint64(l.best[k].live) > l.limit || k >= maxVictims); k-- {
		l.total -= uint64(l.best[k].live)
		l.best, l.scores = l.best[:k], l.scores[:k]
	}
}

// victims returns the best ones that together keep the limit.
func (l *victimList) victims() []objectInfo {
	if k := len(l.best); k > 0 && l.total > l.limit {
		return l.best[:k-1]
	}
	return l.best
}

// benefit says how good a victim is an object of which the share u lives, and that
// was put age objects ago.
//
// Say that what lives of an object dies at the rate r, and that as much as dies is
// written anew, so that the objects of its kind are cleaned at some u, for ever.
// For each unit that lives they take -ln(u)/(1-u) of space, and the cleaner writes
// r u/(1-u) in a unit of time. Space is best divided among kinds of objects where
// a little more of it saves the same writes in each: where the derivatives by u
// have the same ratio, which is ((1-u)/u + ln u) / r. Objects above the others
// are cleaned too late. What an object has lost so far tells r: -ln(u)/age. With
// one rate for all data this chooses the object with the least that lives; and
// cold data is cleaned when more of it lives than of hot data.
func benefit(u, age float64) float64 {
	l := -math.Log(u)
	return age * ((1-u)/(u*l) - 1)
}

// ends reports whether the cleaning has to be given up.
func (c *cleaner) ends() bool {
	if c.im.state == Active {
		return false
	}
	c.end()
	return true
}

// end ends the cleaning and lets another image have its place.
func (c *cleaner) end() {
	if r := c.running; r != nil {
		c.yield()
		c.markEmptied()
		if r.aim != cleanAncestors {
			gain := int64(c.freed()) - int64(r.moved)
			c.vain = gain <= 0
			c.credit = min(c.credit, 0)
			c.grantUpTo(max(gain, 0))
		}
		c.running = nil
		if r.moved > 0 {
			c.maybe() // before objects go on that would wait for the next one
		}
		c.im.flatten.step()
	}
	if c.im.state != Active {
		c.leaveTurn()
	}
	c.im.pumpNow() // they may have waited for this one, or for a search
}

// markEmptied tells the table of the victims of which all that lived has been moved. It may
// have yet to be told of the moves: of a part of the map that is not in memory it is later.
// Till then they would be victims again, and those who write faster than is cleaned be let
// go on for what they free each time.
func (c *cleaner) markEmptied() {
	if c.im.state != Active {
		return // it was given up
	}
	for number := range c.running.emptied {
		o := c.im.table.find(uint64(number))
		if o == nil || o.live == 0 || o.moved {
			continue
		}
		if c.running.aim == cleanAncestors { // those are held
			c.heldSpace -= min(uint64(o.sectors), c.heldSpace)
			c.heldLive -= min(uint64(o.live), c.heldLive)
		}
		c.im.table.empty(o)
	}
	c.im.checkpoint.maybe()
}

// freed returns how many sectors of the victims' objects can go by now, or can when the table
// has been told of all that was moved.
func (c *cleaner) freed() (sectors uint64) {
	for _, v := range c.running.victims {
		if o := c.im.table.find(uint64(v.number)); o == nil || o.live == 0 || o.moved {
			sectors += uint64(v.sectors)
		}
	}
	return sectors
}

// yield lets another image have the cleaning's place.
func (c *cleaner) yield() {
	if c.running.place {
		c.running.place = false
		c.im.shared.cleaning.give()
	}
}

// watch is called at each renewal of the lease. It puts off a victim that waits for a part of
// the map that cannot be read, and keeps no place from images whose stores work while this one's
// does not. One that had to wait for its store begins.
func (c *cleaner) watch() {
	r := c.running
	if c.held {
		c.held = false // others' stores may be slow
		c.im.pumpNow()
	}
	if r == nil {
		if c.debt() > 0 || c.im.flatten.moves() {
			c.maybe()
		}
		return
	}
	if v := r.looking; v != nil && v.load != nil && v.load.tries >= cleanTries && !c.ends() {
		v.load = nil
		c.putOff(v, errors.New("part of the map cannot be read"))
	}
	if c.running != nil && c.im.stats.failing != 0 {
		c.yield()
	}
}

// write puts what was read into new objects. There may be many thousand pieces: a
// worker sorts them.
func (c *cleaner) write() {
	r := c.running
	if len(r.pieces) == 0 {
		c.end()
		return
	}
	c.im.spawn(func() {
		slices.SortFunc(r.pieces, func(a, b movedPiece) int {
			return cmp.Or(cmp.Compare(a.born, b.born), cmp.Compare(a.sector, b.sector))
		})
	}, func() {
		if c.running == r && !c.ends() {
			c.seal()
		}
	})
}

// seal gives the new objects their places, in the order of their age.
func (c *cleaner) seal() {
	r, im := c.running, c.im
	if newest := r.pieces[len(r.pieces)-1].born; uint64(newest) > r.base {
		panic("engine: the cleaner has moved data that is newer than what it knows of") // no reader would take the header
	}
	limit := int(im.object)
	for pieces := r.pieces; len(pieces) > 0; {
		n, sectors := 0, 0
		for n < len(pieces) && n < maxBatchExtents && sectors+int(pieces[n].n) <= limit {
			sectors += int(pieces[n].n)
			n++
		}
		if n == 0 { // longer than an object: of an image whose objects were larger
			rest := pieces[0]
			pieces[0].n, pieces[0].data = uint32(limit), rest.data[:limit*SectorSize]
			rest.sector, rest.n, rest.data = rest.sector+uint64(limit), rest.n-uint32(limit), rest.data[limit*SectorSize:]
			pieces = slices.Insert(pieces, 1, rest)
			continue
		}
		im.sealCleaned(pieces[:n:n], r.base)
		r.objects++
		r.moved += uint64(sectors)
		c.moved += uint64(sectors) * SectorSize
		pieces = pieces[n:]
	}
	r.pieces = nil
	im.pumpNow()
}

// beginEmpty has the cleaner, which is idle, put an object with nothing in it: after that there
// may be a checkpoint although there is nothing new.
func (c *cleaner) beginEmpty() {
	c.running = &cleaning{aim: cleanAncestors, base: c.im.accepted.object, writing: true, objects: 1}
	c.im.sealCleaned(nil, c.running.base)
	c.im.pumpNow()
}

// built says that one of the cleaner's objects has been built: when all are, nobody needs what
// was read any more. Of a cleaning that was given up the garbage collector takes it.
func (c *cleaner) built() {
	r := c.running
	if r == nil || slices.ContainsFunc(c.im.queue, func(b *batch) bool { return b.moved != nil }) {
		return
	}
	for _, b := range r.buffers {
		c.im.shared.buffers.give(b)
	}
	r.buffers = nil
}

// accepted says that one of the cleaner's objects has been accepted.
func (c *cleaner) accepted() {
	if r := c.running; r != nil {
		r.accepted, r.objects = r.accepted+1, r.objects-1
		c.grant()
		if r.objects == 0 {
			c.end()
		}
	}
}

// sealCleaned gives an object of moved data its place in the order of objects: before the
// batches of which nothing is built, for a full log has very many of them.
func (im *Image) sealCleaned(pieces []movedPiece, base uint64) {
	if im.sealed.object++; im.sealed.object > maxObjectSeq {
		panic("engine: the image has used up its object numbers")
	}
	k := len(im.queue)
	for k > 0 && im.queue[k-1].state == batchSealed && !im.queue[k-1].cleaned() {
		k--
	}
	at := im.accepted
	switch {
	case k > 0:
		at = im.queue[k-1].at()
	case im.apply.b != nil:
		at = im.apply.b.at()
	}
	b := &batch{
		object: at.object + 1, objects: 1, firstSeq: at.seq + 1, lastSeq: at.seq, start: at.logEnd, end: at.logEnd,
		began: im.env.Now(), state: batchSealed, moved: pieces, base: base,
	}
	im.queue = slices.Insert(im.queue, k, b)
	for _, later := range im.queue[k+1:] {
		later.object++
	}
	for i := range im.waiters {
		if w := &im.waiters[i]; w.object >= b.object {
			w.object++
		}
	}
}

// buildMoved makes the object of a batch of moved data.
func (b *batch) buildMoved(h *objectHeader, buffer func(int) []byte) []byte {
	slices.SortFunc(b.moved, func(x, y movedPiece) int { return cmp.Compare(x.sector, y.sector) })
	h.base, h.born = b.base, 0
	h.extents, h.data = nil, 0
	for _, p := range b.moved {
		h.born = max(h.born, p.born)
		h.data += len(p.data)
		if k := len(h.extents) - 1; k >= 0 && h.extents[k].sector+uint64(h.extents[k].n) == p.sector {
			h.extents[k].n += p.n
			continue
		}
		h.extents = append(h.extents, objectExtentInfo{sector: p.sector, n: p.n})
	}
	h.pack()
	buf := buffer(h.header + h.data)
	at := h.header
	for _, p := range b.moved {
		at += copy(buf[at:], p.data)
	}
	h.encode(buf)
	return buf
}
