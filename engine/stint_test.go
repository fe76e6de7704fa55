package engine

import "testing"

// TestStint enters an object while clients make a number of requests in each turn:
// no turn does more than its share, and the object keeps up with them.
func TestStint(t *testing.T) {
	const extents = 2000
	for _, requests := range []int{0, 1, 32} {
		im, _ := newStill(t)
		h := &objectHeader{image: im.id, seq: 1, data: extents * objectBlock}
		for i := range uint64(extents) {
			h.extents = append(h.extents, objectExtentInfo{sector: i * 16, n: 8})
		}
		h.pack()
		buf := make([]byte, h.header+h.data)
		h.encode(buf)
		im.beginApply(h)

		share := stintBase + stintPerRequest*requests
		turn := func() (done bool) {
			before := im.apply.next
			done = im.applySome()
			if n := im.apply.next - before; n > share {
				t.Errorf("%d requests in a turn: the next one entered %d extents, more than %d", requests, n, share)
			}
			var told countDone
			var r [32]Request
			for i := range requests {
				r[i] = Request{Op: Flush, Done: &told}
				im.Submit(&r[i])
			}
			im.EndTurn()
			return done
		}
		turns := 1
		for ; !turn(); turns++ {
			if turns > extents {
				t.Fatalf("%d requests in a turn: %d extents entered in %d turns", requests, im.apply.next, turns)
			}
		}
		im.endApply()
		if most := extents/share + 3; turns > most { // the first has nothing, and the second what its requests allow
			t.Errorf("%d requests in a turn: %d turns, want %d at the most", requests, turns, most)
		}
	}
}
