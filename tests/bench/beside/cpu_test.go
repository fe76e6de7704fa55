package main

import (
	"math"
	"strings"
	"testing"
)

func TestCollected(t *testing.T) {
	const one = "gc 1 @0.012s 2%: 0.026+0.39+0.10 ms clock, 0.21+0.88/0.52/0+0.84 ms cpu, 4->4->0 MB, 4 MB goal, 0 MB stacks, 0 MB globals, 8 P\n"
	const forced = "gc 12 @101.312s 0%: 0.1+1+0.2 ms clock, 0.5+0/1.5/2+1 ms cpu, 24->24->10 MB, 25 MB goal, 0 MB stacks, 0 MB globals, 8 P (forced)\n"
	const other = `time=2026-11-29T16:59:45.500Z level=INFO msg="lsdd serves" socket=s` + "\n"
	for _, x := range []struct {
		name, log string
		want      float64 // µs
	}{
		{"none", other, 0},
		{"one", other + one, 2450},
		{"two", one + other + forced, 7450},
	} {
		got, err := collected(strings.NewReader(x.log))
		if err != nil || math.Abs(got-x.want) > 0.01 {
			t.Errorf("%s: %v, %v; want %v", x.name, got, err, x.want)
		}
	}
}
