package daemon

import (
	"runtime"
	"testing"
)

func TestSpareProcessors(t *testing.T) {
	n := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(n)
	for _, c := range []struct {
		env        string
		have, want int
	}{{"", 1, 8}, {"", 2, 8}, {"", 6, 9}, {"", 16, 24}, {"16", 16, 16}, {"2", 2, 2}} {
		t.Setenv("GOMAXPROCS", c.env)
		runtime.GOMAXPROCS(c.have)
		SpareProcessors()
		if got := runtime.GOMAXPROCS(0); got != c.want {
			t.Errorf("with GOMAXPROCS=%q and %d: %d, want %d", c.env, c.have, got, c.want)
		}
	}
}
