package engine

import (
	"slices"

	"github.com/lsd-ceph/lsd/cache/writelog"
)

// tail knows where in the log's memory the data of the objects accepted last is,
// as long as it is there, so that what was written a moment ago is not read from
// the store. The log's memory bounds it. The reactor owns it.
type tail struct {
	first   uint64 // number of the first of the objects
	objects []tailed
}

// tailed is one of the last objects that were accepted.
type tailed struct {
	pieces []piece
	end    uint64 // log position after its records
	batch  *batch // of which it is the last object, or nil
}

// read copies what is at a location of the object map to dst and returns true, if
// all of it is in the log's memory.
func (t *tail) read(l *writelog.Log, loc uint64, dst []byte) bool {
	i := refOf(loc).seq() - t.first // wraps around for older objects
	if i >= uint64(len(t.objects)) {
		return false
	}
	pieces := t.objects[i].pieces
	off := offsetOf(loc) * SectorSize
	k, _ := slices.BinarySearchFunc(pieces, off, func(p piece, off int) int {
		if p.at+p.bytes() <= off {
			return -1
		}
		return 1
	})
	for ; len(dst) > 0; k++ {
		if k == len(pieces) || pieces[k].at > off {
			return false
		}
		p := pieces[k]
		n := min(p.at+p.bytes()-off, len(dst))
		if n == 0 {
			continue // zeroes
		}
		m := l.Memory(p.pos+uint64(off-p.at)/SectorSize, uint32(n/SectorSize))
		if m == nil {
			return false
		}
		copy(dst, m)
		dst, off = dst[n:], off+n
	}
	return true
}

// retire keeps an accepted batch for as long as its data is in memory, and then
// for its capacity.
func (im *Image) retire(b *batch) {
	t := &im.tail
	if len(t.objects) == 0 {
		t.first = b.object
	}
	for _, o := range b.built {
		t.objects = append(t.objects, tailed{pieces: o.pieces, end: b.end})
	}
	t.objects[len(t.objects)-1].batch = b
	b.built = nil
	gone := 0
	for ; gone < len(t.objects) && !im.log.Remembers(t.objects[gone].end); gone++ {
		if old := t.objects[gone].batch; old != nil && !old.cleaned() && len(im.spare) < 2*im.window {
			im.spare = append(im.spare, old)
		}
	}
	t.first += uint64(gone)
	t.objects = slices.Delete(t.objects, 0, gone)
}
