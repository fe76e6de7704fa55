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
