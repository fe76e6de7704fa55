package main

import (
	"maps"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

func TestMercyFigures(t *testing.T) {
	before := mercyEffort{OSD: lab.OSD{CPU: time.Second, Writes: 10, Reads: 1, WriteBytes: 1 << 20, Metadata: 5 << 20}, disk: 7 << 20, asked: map[string]float64{"put data": 5, "stat data": 3}}
	after := mercyEffort{OSD: lab.OSD{CPU: 3 * time.Second, Writes: 110, Reads: 21, WriteBytes: 513 << 20, ReadBytes: 1 << 20, Metadata: 6 << 20}, disk: 1031 << 20, own: 2 << 20, asked: map[string]float64{"put data": 10, "stat data": 4, "list other": 1}}
	got := mercyFigures(before, after, 1<<17, 1<<29)
	maps.Copy(got, mercyDaemon(before, after, 1<<29))
	wanted := lab.Figures{
		"operations for 1,000 writes": 120. / (1 << 17) * 1000,
		"operations for a GiB":        240,
		"µs CPU for a write":          2e6 / (1 << 17),
		"s CPU for a GiB":             4,
		"MiB of traffic":              1026,
		"MiB of metadata":             2,
		"MiB to disk":                 2048,
		"MiB to own disk":             4,
		"put data":                    10,
		mercyRest:                     4,
	}
	if len(got) != len(wanted) {
		t.Errorf("%v, want %v", got, wanted)
	}
	for metric, want := range wanted {
		if got[metric] != want {
			t.Errorf("%s: %v, want %v", metric, got[metric], want)
		}
	}
}
