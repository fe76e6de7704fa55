package main

import (
	"strings"
	"testing"
	"time"
)

func TestLongestWait(t *testing.T) {
	for _, x := range []struct {
		name, log string
		ended     int64 // ms
		wait      time.Duration
		fails     bool
	}{
		{"one", "1795971811287, 120000, 1, 4096, 0, 0\n", 1795971811287, 120 * time.Microsecond, false},
		{"in the middle", "1000, 120000, 1, 4096, 0, 0\n1500, 499000000, 1, 4096, 4096, 0\n1501, 130000, 1, 4096, 0, 0\n", 1500, 499 * time.Millisecond, false},
		{"nothing", "", 0, 0, true},
		{"something else", "fio: no space left\n", 0, 0, true},
	} {
		ended, wait, err := longestWait(strings.NewReader(x.log))
		if (err != nil) != x.fails {
			t.Errorf("%s: error %v", x.name, err)
		}
		if err == nil && (ended.UnixMilli() != x.ended || wait != x.wait) {
			t.Errorf("%s: %v until %d, want %v until %d", x.name, wait, ended.UnixMilli(), x.wait, x.ended)
		}
	}
}

func TestTakenUp(t *testing.T) {
	const begun = `time=2026-11-29T16:59:45.474Z level=INFO msg="taking up what was attached" device=lib0 image=rados://rbd/x/i phase=attached` + "\n"
	const done = `time=2026-11-29T16:59:45.853Z level=INFO msg="taken up" device=lib0 image=rados://rbd/x/i took=380ms` + "\n"
	const other = `time=2026-11-29T16:59:45.500Z level=INFO msg="lsdd serves" socket=s` + "\n"
	for _, x := range []struct {
		name, log string
		took      time.Duration
		fails     bool
	}{
		{"both", begun + other + done, 379 * time.Millisecond, false},
		{"not yet", begun + other, 0, true},
		{"nothing", "", 0, true},
	} {
		b, d, err := takenUp(strings.NewReader(x.log))
		if (err != nil) != x.fails {
			t.Errorf("%s: error %v", x.name, err)
		}
		if err == nil && d.Sub(b) != x.took {
			t.Errorf("%s: %v, want %v", x.name, d.Sub(b), x.took)
		}
	}
}
