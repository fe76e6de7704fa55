package main

import "testing"

// TestRadosBench: what rados bench says is read, and nothing is made up where it does not.
func TestRadosBench(t *testing.T) {
	for _, x := range []struct {
		said      string
		rate, mib float64 // 0: an error
	}{
		{"Total time run:         5.06\nTotal writes made:      52\nWrite size:             8388608\nBandwidth (MB/sec):     82.0836\n\nStddev Bandwidth:       1.5\n", 82.0836, 416},
		{"Total writes made:      52\nBandwidth (MB/sec):     \n", 0, 0},
		{"Total writes made:      52\n", 0, 0},
		{"Bandwidth (MB/sec):     82.0836\n", 0, 0},
		{"Total writes made:      many\nBandwidth (MB/sec):     82.0836\n", 0, 0},
	} {
		b, err := parseRadosBench(x.said)
		if (err != nil) != (x.mib == 0) || err == nil && (b.rate != x.rate || b.mib != x.mib) {
			t.Errorf("%q: %+v, %v; want %v and %v", x.said, b, err, x.rate, x.mib)
		}
	}
}
