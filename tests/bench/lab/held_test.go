package lab

import (
	"os"
	"testing"
)

func TestParseStatus(t *testing.T) {
	for _, x := range []struct {
		name, text string
		want       Held
		fails      bool
	}{
		{"a process", "Name:\tfio\nVmHWM:\t  123 kB\nVmRSS:\t   2048 kB\nThreads:\t17\n", Held{2 << 20, 17}, false},
		{"a thread of the kernel", "Name:\tkthreadd\nThreads:\t1\n", Held{0, 1}, false},
		{"nonsense", "VmRSS:\tmuch\n", Held{}, true},
	} {
		got, err := parseStatus(x.text)
		if (err != nil) != x.fails || got != x.want {
			t.Errorf("%s: %v, %v; want %v", x.name, got, err, x.want)
		}
	}
	if h, err := HeldBy(os.Getpid()); err != nil || h.Memory == 0 || h.Threads == 0 {
		t.Errorf("this process: %v, %v", h, err)
	}
}
