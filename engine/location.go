package engine

import (
	"fmt"

	"github.com/google/uuid"
)

// SectorSize is the unit of all addresses: 512 bytes.
const SectorSize = 512

// A location in the object map is
//
//	bits 0..17   offset in the object's data, in sectors
//	bits 18..49  number of the object
//	bits 50..62  zero
//	bit  63      zero (extmap.Fixed, which the object map never holds)
//
// No object has the number 0, so no location is 0.
const (
	locOffsetBits = 18
	locObjectBits = 32
	maxObjectSeq  = 1<<locObjectBits - 1
	maxObjectRef  = 1<<(63-locOffsetBits) - 1
	// lastWritten is the number from which on an image takes no changes any more: what is
	// in its log still gets numbers.
	lastWritten = maxObjectSeq - 1<<20
)

// objectRef names an object in a map: its number, which says whose it is as well (see
// lineage).
type objectRef uint64

func refOf(loc uint64) objectRef       { return objectRef(loc >> locOffsetBits) }
func (r objectRef) loc(off int) uint64 { return uint64(r)<<locOffsetBits | uint64(off) }
func (r objectRef) seq() uint64        { return uint64(r) & maxObjectSeq }
func offsetOf(loc uint64) int          { return int(loc & (1<<locOffsetBits - 1)) }
func refOfSeq(seq uint64) objectRef    { return objectRef(seq) }

// possible reports whether there can be such an object: a map whose checksums are right can
// say anything.
func (r objectRef) possible() bool { return r <= maxObjectSeq }

// Keys of an image's objects in its store.

// SuperblockKey returns the key of an image's superblock.
func SuperblockKey(id uuid.UUID) string { return id.String() + "/super" }

func dataKey(id uuid.UUID, seq, epoch uint64) string {
	return fmt.Sprintf("%s/d/%08x.%x", id, seq, epoch)
}

// manifestKey names part of a checkpoint's manifest; most have part 0 only.
func manifestKey(id uuid.UUID, c checkpointRef, part int) string {
	return fmt.Sprintf("%s/c/%08x.%x.%x", id, c.Object, c.Epoch, part)
}

// mapKey names a map object.
func mapKey(id uuid.UUID, c checkpointRef, part uint32) string {
	return fmt.Sprintf("%s/m/%08x.%x.%x", id, c.Object, c.Epoch, part)
}
