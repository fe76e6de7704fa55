package engine

// Data that is soon overwritten is best kept apart from data that lasts: an object of
// the first kind is soon dead as a whole, and one of the second need not be moved for
// the sake of what has died in it. So a batch that holds much of both becomes a group of
// two objects, of which all but the last are joined to the next: they count together or
// not at all, since only together they hold whole records.

// maxGroup is how many objects a batch becomes, at most.
const maxGroup = 2

const (
	// lastingAge is the age of data from which on what overwrites it is taken to last as
	// well, in percent of the image's objects that live, counted in objects.
	//
	// Data is overwritten again after about as long as it has lived so far. Tried in a
	// model of the cleaner on self-similar and two-zoned writes, a quarter to a half of
	// the time in which all of an image is written once do equally well.
	lastingAge = 40
	// splitShare is the part of an object's size that each kind must have: less is not
	// worth an object.
	splitShare = 8
)

// lasts reports whether a write at a sector is likely to stay: what it overwrites has
// been there for long, or there is nothing. A map that is not in memory does not say;
// it is of places where little happens.
func (im *Image) lasts(s uint64) bool {
	if _, ok := im.dirty.Next(s, s+1); ok {
		return false
	}
	if !im.objs.ready(segmentOf(s)) {
		return true
	}
	e, ok := im.objs.Next(s, s+1)
	if !ok {
		return true
	}
	o := im.table.find(refOf(e.Loc).seq())
	return o == nil || (im.sealed.object-uint64(o.born))*100 > uint64(im.table.alive)*lastingAge
}

// split returns how many objects the batch becomes.
func (im *Image) split(b *batch) int {
	least := im.object / splitShare
	fits := maxGroup <= im.window && maxGroup <= im.cfg.CheckpointEvery
	if fits && b.stays >= least && b.sectors-b.stays >= least {
		return maxGroup
	}
	return 1
}

// parted returns those pieces that last, and the others, in their order.
func parted(pieces []piece) (lasting, others []piece) {
	for _, p := range pieces {
		if p.lasts && !p.zero {
			lasting = append(lasting, p)
		} else {
			others = append(others, p)
		}
	}
	return lasting, others
}
