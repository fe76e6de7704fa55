package daemon

import (
	"math"
	"os"
	"path/filepath"
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

// TestCgroupLimit: the least limit around a process counts.
func TestCgroupLimit(t *testing.T) {
	root := t.TempDir()
	for dir, limit := range map[string]string{"a": "4096\n", "a/b": "max\n", "a/b/c": "8192\n", "d": "1024", "e": "much"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, dir, "memory.max"), []byte(limit), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for self, want := range map[string]uint64{
		"0::/a/b/c\n":            4096,
		"1:memory:/d\n0::/a/b\n": 4096,
		"0::/d\n":                1024,
		"0::/e":                  math.MaxUint64,
		"0::/":                   math.MaxUint64,
		"0::/none/at/all\n":      math.MaxUint64,
		"0::/../../d\n":          1024,
		"12:memory:/d\n":         math.MaxUint64,
		"":                       math.MaxUint64,
	} {
		if got := cgroupLimit(root, []byte(self)); got != want {
			t.Errorf("%q: %d, want %d", self, got, want)
		}
	}
	if n := DefaultBurstMemory(); n <= 0 || n > 2<<30 {
		t.Errorf("the default is %d bytes", n)
	}
	if n := DefaultReadCacheMemory(); n <= 0 || n > 1<<30 {
		t.Errorf("that of the read cache is %d bytes", n)
	}
}
