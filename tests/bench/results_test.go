package bench

import (
	"encoding/json"
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

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

func report() *Report {
	return &Report{Name: "x", Title: "X", Date: "2026-11-29", Command: "make bench ONLY=x", Machine: []string{"Machine: one"}, Turns: 2, Tables: []Table{
		{Name: "rate", Title: "Rates <of> X", Unit: "IOPS", Plot: true, Sides: []string{"lsd", "a", "b"}, Rows: []Row{
			{Name: "first", Sides: [][]float64{{300, 100}, {50, 150}, {}}},
			{Name: "second", Sides: [][]float64{{1, 2, 3}, {0, 0, 0}, {40000, 20000, 30000}}},
		}},
		{Name: "cpu", Title: "CPU", Unit: "µs", Less: true, Sides: []string{"lsd"}, Rows: []Row{{Name: "first", Sides: [][]float64{{1.5}}}}},
	}}
}

func TestReportMarkdown(t *testing.T) {
	want := "`make bench ONLY=x`, 2026-11-29, 2 turns of each side: medians (least–most).\nMachine: one.\n" +
		"\n**Rates <of> X**, IOPS:\n\n" +
		"| case | lsd | a | b | lsd to each |\n| --- | --- | --- | --- | --- |\n" +
		"| first | 200 (100–300) | 100 (50.0–150) |  | **2.00**, – |\n" +
		"| second | 2.00 (1.00–3.00) | 0 (0–0) | 30000 (20000–40000) | –, **1/15000** |\n" +
		"\n![Rates <of> X](figures/x-rate.svg)\n" +
		"\n**CPU**, µs, less is better:\n\n| case | lsd |\n| --- | --- |\n| first | 1.50 |\n"
	if got := report().Markdown("figures"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestReportFile: what is written is read again, and what cannot be drawn is neither.
func TestReportFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	if err := report().Write(path); err != nil {
		t.Fatal(err)
	}
	got, err := Read(path)
	if err != nil || !reflect.DeepEqual(got, report()) {
		t.Errorf("read %+v: %v", got, err)
	}
	for name, spoil := range map[string]func(*Report){
		"no tables":     func(r *Report) { r.Tables = nil },
		"no rows":       func(r *Report) { r.Tables[1].Rows = nil },
		"a side less":   func(r *Report) { r.Tables[0].Rows[1].Sides = r.Tables[0].Rows[1].Sides[:2] },
		"none of lsd's": func(r *Report) { r.Tables[0].Rows[0].Sides[0] = nil },
	} {
		r := report()
		spoil(r)
		if err := r.Write(path); err == nil {
			t.Errorf("%s: it was written", name)
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
}

// TestSVG: a drawing is XML, has a bar for each figure and none for those that are not there.
func TestSVG(t *testing.T) {
	text := report().Tables[0].SVG()
	bars := 0
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "line" {
			bars++
		}
	}
	if bars != 5 || !strings.Contains(text, "(× 2.00)") || !strings.Contains(text, "Rates &lt;of&gt; X") {
		t.Errorf("%d bars in %s", bars, text)
	}
}
