package engine

import (
	"fmt"

	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/invariants"
)

// checkInvariants panics unless maps, table and log fit one another. It costs
// time in proportion to the maps.
func (im *Image) checkInvariants() {
	if !invariants.Enabled {
		return
	}
	im.dirty.Invariants()
	im.objs.Invariants()
	im.checkLive()
	lo, hi := im.accepted.logEnd/SectorSize, im.log.Head()/SectorSize
	for s := uint64(0); ; {
		e, ok := im.dirty.Next(s, im.span.Load())
		if !ok {
			break
		}
		if at := e.Loc &^ extmap.Fixed; at < lo || at >= hi {
			panic(fmt.Sprintf("engine: sector %d is dirty at log position %d, outside of what is not destaged, %d to %d", e.Sector, at, lo, hi))
		}
		s = e.End()
	}
	im.checkQueue()
	if n, most := im.checkpoint.since(), max(uint64(im.cfg.CheckpointEvery), im.recovered); n > most && !im.checkpoint.unbound {
		panic(fmt.Sprintf("engine: recovery would read %d objects, %d are allowed", n, most))
	}
}

// checkLive panics unless the table counts what the map refers to, as far as the
// map is in memory.
func (im *Image) checkLive() {
	live := map[uint32]uint32{}
	for _, i := range im.objs.ring {
		for s, end := segmentStart(i), min(segmentStart(i+1), im.span.Load()); ; {
			e, ok := im.objs.Next(s, end)
			if !ok {
				break
			}
			o := im.table.find(refOf(e.Loc).seq())
			if o == nil || uint32(offsetOf(e.Loc))+e.N > o.sectors {
				panic(fmt.Sprintf("engine: sector %d is mapped to what object %d does not have", e.Sector, refOf(e.Loc).seq()))
			}
			live[o.number] += e.N
			s = e.End()
		}
	}
	whole := true
	for i := range segmentsOf(im.span.Load()) {
		whole = whole && im.objs.here(i)
	}
	for i, c := range im.objs.changes {
		if im.objs.resident.has(i) && c.counted != len(c.list) {
			panic(fmt.Sprintf("engine: of %d changes of segment %d, which is in memory, %d are counted", len(c.list), i, c.counted))
		}
	}
	movedSpace, movedLive, movedAlive := uint64(0), uint64(0), 0
	for _, o := range im.table.list {
		if o.moved {
			movedSpace, movedLive, movedAlive = movedSpace+uint64(o.sectors), movedLive+uint64(o.live), movedAlive+1
		}
		if n := live[o.number]; n > o.live || whole && n != o.live || o.gone && n > 0 {
			panic(fmt.Sprintf("engine: object %d has %d live sectors, its entry says %d", o.number, n, o.live))
		}
	}
	if t := &im.table; movedSpace != t.movedSpace || movedLive != t.movedLive || movedAlive != t.movedAlive {
		panic(fmt.Sprintf("engine: %d objects that have been moved have %d sectors, %d of them live; the table says %d, %d and %d", movedAlive, movedSpace, movedLive, t.movedAlive, t.movedSpace, t.movedLive))
	}
}

// checkQueue panics unless the batches cover the log from the last accepted
// object on, without gaps.
func (im *Image) checkQueue() {
	at, memory := im.accepted, int64(0)
	for _, b := range im.queue {
		memory += b.memory
		if b.object != at.object+1 || b.firstSeq != at.seq+1 || b.start != at.logEnd || b.end < b.start {
			panic(fmt.Sprintf("engine: batch %d does not go on where the one before it ends", b.object))
		}
		at = b.at()
	}
	if memory != im.memory {
		panic(fmt.Sprintf("engine: the queue has %d bytes for objects, the image %d", memory, im.memory))
	}
	if at != im.sealed || im.open != nil && im.open.start != at.logEnd {
		panic("engine: the open batch does not go on where the last sealed one ends")
	}
}
