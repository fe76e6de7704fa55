package engine

import (
	"fmt"
	"sort"

	"github.com/google/uuid"
)

// SectorSize is the unit of all addresses: 512 bytes.
const SectorSize = 512

// A location in the object map is
//
//	bits 0..17   offset in the object's data, in sectors
//	bits 18..49  number of the object
//	bits 50..62  source: whose object it is; 0 is the image itself. Others are
//	             for clones, whose maps refer to the objects of their ancestors.
//	bit  63      zero (extmap.Fixed, which the object map never holds)
const (
	locOffsetBits = 18
	locObjectBits = 32
	maxObjectSeq  = 1<<locObjectBits - 1
)

// objectRef names an object in a map: source and number, without the offset.
type objectRef uint64

func refOf(loc uint64) objectRef          { return objectRef(loc >> locOffsetBits) }
func (r objectRef) loc(off int) uint64    { return uint64(r)<<locOffsetBits | uint64(off) }
func (r objectRef) seq() uint64           { return uint64(r) & maxObjectSeq }
func offsetOf(loc uint64) int             { return int(loc & (1<<locOffsetBits - 1)) }
func refOfSeq(seq uint64) objectRef       { return objectRef(seq) }
func (r objectRef) source() int           { return int(r >> locObjectBits) }
func (r objectRef) less(o objectRef) bool { return r < o }

// Keys of an image's objects in its store.

// SuperblockKey returns the key of an image's superblock.
func SuperblockKey(id uuid.UUID) string { return id.String() + "/super" }

func dataKey(id uuid.UUID, seq, epoch uint64) string {
	return fmt.Sprintf("%s/d/%08x.%x", id, seq, epoch)
}

func manifestKey(id uuid.UUID, seq, epoch uint64) string {
	return fmt.Sprintf("%s/c/%08x.%x", id, seq, epoch)
}

func segmentKey(id uuid.UUID, index uint32, seq, epoch uint64) string {
	return fmt.Sprintf("%s/m/%06x.%08x.%x", id, index, seq, epoch)
}

// objectInfo is what the image knows of one of its data objects.
type objectInfo struct {
	ref     objectRef
	epoch   uint64
	header  uint32 // bytes before the data
	sectors uint32 // of data
	live    uint32 // sectors of data that the map refers to
}

// objectTable holds the data objects that a map may refer to, in order of ref.
// The reactor owns it.
type objectTable struct {
	list []objectInfo
}

// find returns the object's entry, or nil. It is good until the next add.
func (t *objectTable) find(ref objectRef) *objectInfo {
	i := sort.Search(len(t.list), func(i int) bool { return !t.list[i].ref.less(ref) })
	if i < len(t.list) && t.list[i].ref == ref {
		return &t.list[i]
	}
	return nil
}

// add appends an object, whose ref is above all others.
func (t *objectTable) add(o objectInfo) {
	if n := len(t.list); n > 0 && !t.list[n-1].ref.less(o.ref) {
		panic("engine: objects added out of order")
	}
	t.list = append(t.list, o)
}
