package lab

import (
	"strings"
	"testing"
	"time"
)

func TestParseFio(t *testing.T) {
	const dir = `{"iops": 100.5, "bw_bytes": 4096, "total_ios": 201, "runtime": 2000, "clat_ns": {"max": 9000000, "percentile": {"50.000000": 1000, "99.000000": 2000, "99.900000": 3000}}}`
	const none = `{"iops": 0, "bw_bytes": 0, "total_ios": 0, "runtime": 0, "clat_ns": {"max": 0}}`
	job := func(read, write, more string) string {
		return `{"jobs": [{"error": 0, "read": ` + read + `, "write": ` + write + `}` + more + `]}`
	}
	want := Fio{Rate: 100.5, Bytes: 4096, Ops: 201, Took: 2 * time.Second, P50: 1000, P99: 2000, P999: 3000, Longest: 9 * time.Millisecond}
	both := want
	both.Rate, both.Bytes, both.Ops = 201, 8192, 402
	for _, c := range []struct {
		text string
		want Fio
		err  string
	}{
		{job(dir, none, ""), want, ""},
		{job(none, dir, ""), want, ""},
		{job(dir, dir, ""), both, ""},
		{"fio: it has something to say\n" + job(dir, none, ""), want, ""},
		{job(none, none, ""), Fio{}, "nothing"},
		{strings.Replace(job(dir, none, ""), `"error": 0`, `"error": 5`, 1), Fio{}, "fio says"},
		{job(dir, none, `, {"error": 0}`), Fio{}, "fio says"},
		{"", Fio{}, "fio says"},
		{"fio: no such engine", Fio{}, "fio says"},
	} {
		got, err := parseFio(c.text)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s:\n%+v, %v", c.text, got, err)
		}
	}
}
