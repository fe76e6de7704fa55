package engine

import "sort"

// objectInfo is what the image knows of one of its data objects.
type objectInfo struct {
	number  uint32
	epoch   uint32
	sectors uint32 // of data
	live    uint32 // sectors of data that the map refers to
	died    uint32 // the greatest number of an object that has taken from live: the one with which it became 0, once it is
	born    uint32 // number of the object that first held its newest data
	header  uint16 // bytes before the data, in units of objectAlign
	gone    bool   // has been deleted: the entry goes soon
	// moved says that the cleaner has moved all of what lives: the table has yet to be told,
	// of parts of the map that are not in memory.
	moved bool
}

func (o *objectInfo) headerBytes() int { return int(o.header) * objectAlign }

// objectTable holds the data objects that are in the store, in ascending order of
// their numbers, dead ones until they are deleted. The reactor owns it.
type objectTable struct {
	list  []objectInfo
	gone  int    // entries that are gone
	added uint64 // sectors of data of the objects that were added since the table was loaded
	space uint64 // sectors of data of the objects that live
	live  uint64 // sectors of data that the map refers to
	alive int    // objects that live
	// Sectors of data of the objects that live and are moved, what lives of them, and how many
	// they are; sectors of data of all that have become so since the table was loaded.
	movedSpace, movedLive uint64
	movedAlive            int
	emptied               uint64
	// dead lists the numbers of dead objects that have not been deleted, but for those in
	// kept, which points need.
	dead, kept []uint32
}

// reconsider says that points have been given up: what they kept may be needed no more.
func (t *objectTable) reconsider() {
	t.dead = append(t.dead, t.kept...)
	t.kept = t.kept[:0]
}

// index returns the index of the first entry whose number is not below number.
func (t *objectTable) index(number uint64) int {
	return sort.Search(len(t.list), func(i int) bool { return uint64(t.list[i].number) >= number })
}

// find returns the object's entry, or nil. It is good until the next add.
func (t *objectTable) find(number uint64) *objectInfo {
	i := t.index(number)
	if i < len(t.list) && uint64(t.list[i].number) == number && !t.list[i].gone {
		return &t.list[i]
	}
	return nil
}

// add appends an object, whose number is above all others.
func (t *objectTable) add(o objectInfo) {
	if n := len(t.list); n > 0 && t.list[n-1].number >= o.number {
		panic("engine: objects added out of order")
	}
	t.list = append(t.list, o)
	t.added += uint64(o.sectors)
	if o.live == 0 {
		t.dead = append(t.dead, o.number)
		return
	}
	t.space += uint64(o.sectors)
	t.live += uint64(o.live)
	t.alive++
}

// lose says that the map has ceased to refer to n sectors of the object's data, by the
// object of that number. These come in any order.
func (o *objectInfo) lose(n, by uint32) {
	o.live -= n
	o.died = max(o.died, by)
}

// release is lose for an object of the table.
func (t *objectTable) release(o *objectInfo, n, by uint32) {
	o.lose(n, by)
	t.live -= uint64(n)
	if o.moved {
		t.movedLive -= uint64(n)
	}
	if o.live == 0 {
		if o.moved {
			o.moved = false
			t.movedSpace -= uint64(o.sectors)
			t.movedAlive--
		}
		t.space -= uint64(o.sectors)
		t.alive--
		t.dead = append(t.dead, o.number)
	}
}

// empty says that the cleaner has moved all of what lives of an object that lives.
func (t *objectTable) empty(o *objectInfo) {
	if o.live > 0 && !o.moved {
		o.moved = true
		t.movedSpace, t.movedLive = t.movedSpace+uint64(o.sectors), t.movedLive+uint64(o.live)
		t.movedAlive++
		t.emptied += uint64(o.sectors)
	}
}

// remove forgets a dead object, which has been deleted.
func (t *objectTable) remove(number uint64) {
	o := t.find(number)
	if o == nil {
		return
	}
	o.gone = true
	if t.gone++; t.gone > 64+len(t.list)/4 {
		kept := t.list[:0]
		for _, o := range t.list {
			if !o.gone {
				kept = append(kept, o)
			}
		}
		t.list, t.gone = kept, 0
	}
}

// snapshot returns a copy of the entries that are not gone.
func (t *objectTable) snapshot() []objectInfo {
	list := make([]objectInfo, 0, len(t.list)-t.gone)
	for _, o := range t.list {
		if !o.gone {
			list = append(list, o)
		}
	}
	return list
}

// load makes the table hold the entries of a checkpoint.
func (t *objectTable) load(list []objectInfo) {
	*t = objectTable{list: list}
	for _, o := range list {
		if o.live == 0 {
			t.dead = append(t.dead, o.number)
			continue
		}
		t.space += uint64(o.sectors)
		t.live += uint64(o.live)
		t.alive++
	}
}
