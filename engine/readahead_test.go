package engine

import "testing"

func TestStreams(t *testing.T) {
	type req struct {
		sector uint64
		n      uint32
	}
	for name, c := range map[string]struct {
		reqs []req
		want uint64 // length of the stream that the last one belongs to; 0: none
	}{
		"three in a row":           {[]req{{100, 8}, {108, 8}, {116, 8}}, 24},
		"two in a row":             {[]req{{100, 8}, {108, 8}}, 0},
		"the same again and again": {[]req{{100, 8}, {100, 8}, {100, 8}, {100, 8}}, 0},
		"out of order":             {[]req{{0, 8}, {16, 8}, {8, 8}, {32, 8}, {24, 8}, {40, 8}}, 48},
		"far apart":                {[]req{{0, 8}, {10000, 8}, {20000, 8}, {30000, 8}}, 0},
		"backwards":                {[]req{{10000, 8}, {9000, 8}, {8000, 8}, {7000, 8}}, 0},
		"large, out of order":      {[]req{{0, 2048}, {4096, 2048}, {2048, 2048}, {6144, 2048}}, 8192},
		"two streams":              {[]req{{0, 8}, {1 << 20, 8}, {8, 8}, {1<<20 + 8, 8}, {16, 8}, {1<<20 + 16, 8}}, 24},
		"random ones between": {[]req{{0, 8}, {1 << 20, 8}, {8, 8}, {1 << 21, 8}, {16, 8}, {1 << 22, 8},
			{1 << 23, 8}, {24, 8}}, 32},
		"too many random ones between": {[]req{{0, 8}, {8, 8}, {16, 8}, {1 << 20, 8}, {2 << 20, 8}, {3 << 20, 8},
			{4 << 20, 8}, {5 << 20, 8}, {6 << 20, 8}, {7 << 20, 8}, {8 << 20, 8}, {24, 8}}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var s streams
			var st *stream
			for _, r := range c.reqs {
				st = s.note(r.sector, r.n)
			}
			if st == nil && c.want != 0 || st != nil && st.length != c.want {
				t.Errorf("stream %+v, want one of %d sectors", st, c.want)
			}
		})
	}
}

// TestGrow: a stream that goes on is read ahead of by more and more, as far as there is
// memory, and gives some of it back when there is less.
func TestGrow(t *testing.T) {
	const mib = 1 << 20 / SectorSize
	st := new(stream)
	for i, k := range []struct {
		length uint64
		room   int // bytes
		want   uint64
	}{
		{mib, 64 << 20, mib / 8},
		{mib, 64 << 20, mib / 2},
		{mib, 64 << 20, 2 * mib},
		{2 * mib, 64 << 20, 8 * mib},
		{3 * mib, 64 << 20, 11 * mib},
		{12 * mib, 64 << 20, 20 * mib},
		{40 * mib, 64 << 20, 24 * mib},
		{60 * mib, 40 << 20, 24 * mib},
		{80 * mib, 16 << 20, 16 * mib},
		{90 * mib, 0, 8 * mib},
		{99 * mib, 12 << 20, 14 * mib},
	} {
		st.length = k.length
		if st.grow(k.room); st.window != k.want {
			t.Errorf("%d: after %d sectors, with room for %d bytes, a stream is read ahead of by %d sectors, want %d", i, k.length, k.room, st.window, k.want)
		}
	}
}
