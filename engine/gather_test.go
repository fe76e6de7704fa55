package engine

import (
	"reflect"
	"testing"

	"github.com/lsd-ceph/lsd/internal/extmap"
)

// TestGatheredSpans: runs of an object become one span if there is little between them, and
// none becomes larger than one fetch may be.
func TestGatheredSpans(t *testing.T) {
	const gap, unit = gatherGap * blockSectors, aheadUnit
	type run struct{ object, off, n int } // off and n in sectors
	type span struct{ object, first, n, pieces int }
	for name, c := range map[string]struct {
		runs []run
		want []span
	}{
		"one":                     {[]run{{1, 8, 8}}, []span{{1, 1, 1, 1}}},
		"not whole blocks":        {[]run{{1, 9, 8}}, []span{{1, 1, 2, 1}}},
		"one after the other":     {[]run{{1, 0, 8}, {1, 8, 16}}, []span{{1, 0, 3, 2}}},
		"in one block":            {[]run{{1, 0, 2}, {1, 2, 2}}, []span{{1, 0, 1, 2}}},
		"two objects in turn":     {[]run{{1, 0, 8}, {2, 80, 8}, {1, 8, 8}, {2, 88, 8}}, []span{{1, 0, 2, 2}, {2, 10, 2, 2}}},
		"a gap":                   {[]run{{1, 0, 8}, {1, 8 + gap, 8}}, []span{{1, 0, 2 + gatherGap, 2}}},
		"a gap that is too large": {[]run{{1, 0, 8}, {1, 16 + gap, 8}}, []span{{1, 0, 1, 1}, {1, 2 + gatherGap, 1, 1}}},
		"backwards":               {[]run{{1, 80, 8}, {1, 0, 8}, {1, 8, 8}}, []span{{1, 10, 1, 1}, {1, 0, 2, 2}}},
		"inside of another":       {[]run{{1, 0, 80}, {1, 16, 8}}, []span{{1, 0, 10, 2}}},
		"as much as goes":         {[]run{{1, 0, unit - 8}, {1, unit - 8, 8}}, []span{{1, 0, unit / blockSectors, 2}}},
		"more than goes":          {[]run{{1, 0, unit - 8}, {1, unit - 8, 16}}, []span{{1, 0, unit/blockSectors - 1, 1}, {1, unit/blockSectors - 1, 2, 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			var g gathered
			for range 2 { // once more, with what the first time has left
				g = g.empty()
				of := map[objectRef]int{}
				for i, r := range c.runs {
					g.add(of, extmap.Extent{Sector: uint64(i) * 1000, N: uint32(r.n), Loc: refOfSeq(uint64(r.object)).loc(r.off)}, 1)
				}
				var got []span
				for _, s := range g.spans {
					got = append(got, span{int(s.ref.seq()), int(s.first), int(s.n), int(s.runs)})
					if s.asked != s.runs || s.last%1000 == 0 {
						t.Errorf("span %+v", s)
					}
				}
				if !reflect.DeepEqual(got, c.want) {
					t.Errorf("got %v, want %v", got, c.want)
				}
			}
		})
	}
}
