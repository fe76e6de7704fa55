package engine

import (
	"slices"

	"github.com/lsd-ceph/lsd/cache/writelog"
)

// tail knows where in the log's memory the data of the objects accepted last is,
// as long as it is there, so that what was written a moment ago is not read from
// the store. The log's memory bounds it. The reactor owns it.
type tail struct {
	batches []*batch // of the last objects, oldest first, numbers without gaps
}

// read copies what is at a location of the object map to dst and returns true, if
// all of it is in the log's memory.
func (t *tail) read(l *writelog.Log, loc uint64, dst []byte) bool {
	if len(t.batches) == 0 {
		return false
	}
	i := refOf(loc).seq() - t.batches[0].object // wraps around for older objects
	if i >= uint64(len(t.batches)) {
		return false
	}
	pieces := t.batches[i].pieces
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
	b.header = nil
	t.batches = append(t.batches, b)
	for len(t.batches) > 0 && !im.log.Remembers(t.batches[0].end) {
		old := t.batches[0]
		t.batches = append(t.batches[:0], t.batches[1:]...)
		old.pieces = nil
		if !old.cleaned() && len(im.spare) < 2*im.window {
			im.spare = append(im.spare, old)
		}
	}
}
