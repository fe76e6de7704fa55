package lab

import (
	"maps"
	"net"
	"net/http"
	"path/filepath"
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
lsd_image_up{image="file:/a b"} 1
`
	got, err := parseMetrics(strings.NewReader(text))
	if want := map[string]float64{
		"go_memstats_mallocs_total":            51754,
		"go_memstats_alloc_bytes_total":        363527992,
		`go_gc_duration_seconds{quantile="0"}`: 5.357e-05,
		"go_gc_duration_seconds_sum":           0.25,
		`lsd_image_up{image="file:/a b"}`:      1,
	}; err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"go_broken x", "go_broken", `go_broken{a="b"}`} {
		if got, err := parseMetrics(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

// metricsDaemon returns a daemon that tells these metrics and nothing else.
func metricsDaemon(t *testing.T, text string) *Daemon {
	d := &Daemon{socket: filepath.Join(t.TempDir(), "socket")}
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(text)) })}
	t.Cleanup(func() { s.Close() })
	go s.Serve(l)
	return d
}

func TestMetrics(t *testing.T) {
	d := metricsDaemon(t, "a 1\nb 2\n")
	if got, err := d.Metrics(t.Context(), "b"); err != nil || !maps.Equal(got, map[string]float64{"b": 2}) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := d.Metrics(t.Context(), "a", "c"); err == nil {
		t.Errorf("c is not there: %v", got)
	}
}

func TestStoreOps(t *testing.T) {
	d := metricsDaemon(t, `lsd_store_operations_total{object="data",operation="put"} 3
lsd_store_operations_total{object="map",operation="get_ranges"} 4
lsd_store_operation_bytes_total{object="data",operation="put"} 999
`)
	got, err := d.StoreOps(t.Context())
	if want := map[string]float64{"put data": 3, "get_ranges map": 4}; err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}
