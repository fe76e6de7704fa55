package main

import (
	"slices"
	"testing"
)

func TestHalfSeconds(t *testing.T) {
	for _, x := range []struct {
		name, log string
		want      []float64 // nil: an error
	}{
		{"all there", "500, 10, 1, 0, 0\n1000, 20, 1, 0, 0\n1501, 30, 1, 0, 0\n", []float64{10, 20, 30}},
		{"late, and beyond the end", "508, 10, 1, 0, 0\n1013, 20, 1, 0, 0\n1520, 30, 1, 0, 0\n2020, 40, 1, 0, 0\n", []float64{10, 20, 30}},
		{"one without writes", "499, 10, 1, 0, 0\n1500, 30, 1, 0, 0\n", []float64{10, 0, 30}},
		{"empty", "", []float64{0, 0, 0}},
		{"no rate", "499\n", nil},
		{"no log", "fio: error\n", nil},
	} {
		got, err := halfSeconds(x.log, 3)
		if !slices.Equal(got, x.want) || (err != nil) != (x.want == nil) {
			t.Errorf("%s: %v, %v; want %v", x.name, got, err, x.want)
		}
	}
}

func TestBenchRate(t *testing.T) {
	for _, x := range []struct {
		said string
		want float64 // 0: an error
	}{
		{"Object size:            8388608\nBandwidth (MB/sec):     99.4327\nStddev Bandwidth:       14.6788\n", 99.4327},
		{"Total writes made:      0\n", 0},
		{"Bandwidth (MB/sec):     \n", 0},
	} {
		got, err := benchRate(x.said)
		if got != x.want || (err != nil) != (x.want == 0) {
			t.Errorf("%q: %v, %v; want %v", x.said, got, err, x.want)
		}
	}
}
