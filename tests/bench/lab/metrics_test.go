package lab

import (
	"maps"
	"strings"
	"testing"
)

func TestParseMetrics(t *testing.T) {
	const text = `# HELP go_memstats_mallocs_total Total number of heap objects allocated.
# TYPE go_memstats_mallocs_total counter
go_memstats_mallocs_total 51754
go_memstats_alloc_bytes_total 3.63527992e+08
go_gc_duration_seconds{quantile="0"} 5.357e-05
go_gc_duration_seconds_sum 0.25 1700000000
go_broken x
`
	for _, x := range []struct {
		names []string
		want  map[string]float64 // nil: an error
	}{
		{nil, map[string]float64{}},
		{[]string{"go_memstats_mallocs_total", "go_memstats_alloc_bytes_total"}, map[string]float64{"go_memstats_mallocs_total": 51754, "go_memstats_alloc_bytes_total": 363527992}},
		{[]string{"go_gc_duration_seconds_sum"}, map[string]float64{"go_gc_duration_seconds_sum": 0.25}},
		{[]string{"go_gc_duration_seconds"}, nil},
		{[]string{"go_broken"}, nil},
	} {
		got, err := parseMetrics(strings.NewReader(text), x.names)
		if (err != nil) != (x.want == nil) || err == nil && !maps.Equal(got, x.want) {
			t.Errorf("%v: %v, %v; want %v", x.names, got, err, x.want)
		}
	}
}
