package engine

// Data that is soon overwritten is best kept apart from data that lasts: an object of
// the first kind is soon dead as a whole, and one of the second need not be moved for
// the sake of what has died in it. So a batch that holds much of several kinds becomes a
// group of objects, of which all but the last are joined to the next: they count together
// or not at all, since only together they hold whole records.

// maxGroup is how many objects a batch becomes, at most.
const maxGroup = 3

// dataKind says how long data is likely to last: 0 is soon overwritten.
type dataKind uint8

const lasting dataKind = maxGroup - 1

// kindAges are the ages of data from which on what overwrites it is of the next kind:
// in percent of the image's objects that live, counted in objects.
//
// Data is overwritten again after about as long as it has lived so far. Of what was tried
// (docs/benchmarks.md, write amplification) these do best, for self-similar writes and for
// two zones: about a sixth and two thirds of the time in which as much is written as the
// image holds.
var kindAges = [maxGroup - 1]uint64{30, 120}

// splitShare is the part of an object's size that each object of a group must have: less
// is not worth one.
const splitShare = 8

// hazards say whether the age of data tells how soon it is overwritten: where all is written
// alike it does not, and a batch is better one object than three small ones. The reactor owns them.
type hazards struct {
	// overwritten has the sectors of live data that clients have overwritten, by the kind of
	// its age: those since the search before the last one count in full, older ones less and less.
	overwritten [maxGroup]uint64
	// alike says that data of kind k is overwritten about as soon as that of the next kind, as
	// far as has been seen.
	alike [maxGroup - 1]bool
}

// hazardApart is how many times as much of data of one kind as of the next kind must be overwritten
// in a time, in percent, for them to be worth an object each.
const hazardApart = 150

// judge is told how many sectors live of each kind.
func (h *hazards) judge(live [maxGroup]uint64) {
	for k := range h.alike {
		h.alike[k] = h.overwritten[k]*live[k+1]*100 <= h.overwritten[k+1]*live[k]*hazardApart
	}
	for k := range h.overwritten {
		h.overwritten[k] /= 2
	}
}

// kindAt returns the kind of what is written at a sector that is not in the dirty map, by
// the age of what it overwrites: what is there is soon overwritten. Where there is nothing,
// over is false, and it is likely to last. A map that is not in memory does not say; it is of
// places where little happens.
func (im *Image) kindAt(s uint64) (k dataKind, over bool) {
	if !im.ready(segmentOf(s)) {
		return lasting, false
	}
	e, ok := im.objs.Next(s, s+1)
	if !ok {
		return lasting, false
	}
	o := im.table.find(refOf(e.Loc).seq())
	if o == nil {
		return lasting, false
	}
	return im.kindOf(o), true
}

// kindOf returns the kind of the age of an object's data.
func (im *Image) kindOf(o *objectInfo) (k dataKind) {
	age := (im.sealed.object - uint64(o.born)) * 100
	for k < lasting && age > uint64(im.table.alive)*kindAges[k] {
		k++
	}
	return k
}

// split decides how many objects the batch becomes, and which of them gets each kind of
// data: what lasts longest comes first. A kind of which there is little, or that has turned
// out to last as long as the next one, goes with that.
func (im *Image) split(b *batch) {
	b.objects, b.place = 1, [maxGroup]uint8{}
	// Two batches at least must be under way at one time, and recovery keep its bound.
	if 2*maxGroup > im.window || maxGroup > im.cfg.CheckpointEvery {
		return
	}
	least := im.object / splitShare
	sum, rest := uint64(0), b.sectors
	for k := lasting; ; k-- {
		b.place[k] = uint8(b.objects - 1)
		if k == 0 {
			return
		}
		sum, rest = sum+b.kinds[k], rest-b.kinds[k]
		if sum >= least && rest >= least && !im.hazards.alike[k-1] {
			b.objects++
			sum = 0
		}
	}
}
