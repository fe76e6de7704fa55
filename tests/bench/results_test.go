package bench

import "testing"

func TestMedian(t *testing.T) {
	for _, x := range []struct {
		of   []float64
		want float64
	}{
		{[]float64{3}, 3},
		{[]float64{4, 1}, 2.5},
		{[]float64{9, 1, 2}, 2},
		{[]float64{9, 1, 2, 4}, 3},
	} {
		first := x.of[0]
		if got := Median(x.of); got != x.want {
			t.Errorf("Median(%v) = %v, want %v", x.of, got, x.want)
		}
		if x.of[0] != first {
			t.Errorf("Median has sorted its caller's %v", x.of)
		}
	}
}
