package plural

import "testing"

func TestCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 map segments", 1: "1 map segment", 2: "2 map segments", 31: "31 map segments"} {
		if got := Count(n, "map segment"); got != want {
			t.Errorf("Count(%d) = %q, want %q", n, got, want)
		}
	}
}
