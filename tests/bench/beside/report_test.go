package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/tests/bench"
)

func TestFill(t *testing.T) {
	const text = "before\n<!-- figures: a -->\nold\n<!-- end of figures -->\nbetween\n<!-- figures: b -->\n<!-- end of figures -->\nafter\n"
	for _, c := range []struct{ name, text, want, err string }{
		{"a", text, "before\n<!-- figures: a -->\nnew\n<!-- end of figures -->\nbetween\n<!-- figures: b -->\n<!-- end of figures -->\nafter\n", ""},
		{"b", text, "before\n<!-- figures: a -->\nold\n<!-- end of figures -->\nbetween\n<!-- figures: b -->\nnew\n<!-- end of figures -->\nafter\n", ""},
		{"c", text, "", "no place for the figures of c"},
		{"a", strings.ReplaceAll(text, "<!-- end of figures -->", ""), "", "has no end"},
	} {
		got, err := fill(c.text, c.name, "new\n")
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}

// TestReport: figures of a directory become tables of a text, and plots.
func TestReport(t *testing.T) {
	dir := t.TempDir()
	doc, figures := filepath.Join(dir, "doc.md"), filepath.Join(dir, "figures")
	if err := os.Mkdir(figures, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := report(figures, doc); err == nil {
		t.Error("a report of nothing")
	}
	r := bench.Report{Name: "x", Tables: []bench.Table{{Name: "rate", Title: "Rates", Plot: true, Sides: []string{"lsd"}, Rows: []bench.Row{{Name: "only", Sides: [][]float64{{7}}}}}}}
	if err := r.Write(filepath.Join(figures, "x.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(doc, []byte("<!-- figures: x -->\n<!-- end of figures -->\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := report(figures, doc); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(doc)
	if err != nil || !strings.Contains(string(text), "| only | 7.00 |") || !strings.Contains(string(text), "(figures/x-rate.svg)") {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := os.Stat(filepath.Join(figures, "x-rate.svg")); err != nil {
		t.Error(err)
	}
}

// TestPlaces: docs/benchmarks.md has a place for the figures of each comparison, once.
func TestPlaces(t *testing.T) {
	text, err := os.ReadFile("../../../docs/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, c := range comparisons() {
		if seen[c.name] || c.title == "" || c.run == nil {
			t.Errorf("%q, %q is twice there, or lacks something", c.name, c.title)
		}
		seen[c.name] = true
		if n := strings.Count(string(text), "<!-- figures: "+c.name+" -->\n"); n != 1 {
			t.Errorf("%d places for the figures of %s", n, c.name)
		}
	}
}

// TestBadFlags: what cannot be is said in one line before anything is started.
func TestBadFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"run", "--only", "nosuch"}, "no such comparison"},
		{[]string{"run", "--only", "("}, "--only"},
		{[]string{"run", "--cases", "("}, "--cases"},
		{[]string{"run", "--turns", "-1"}, "--turns"},
		{[]string{"run", "--root", t.TempDir()}, "make build"},
		{[]string{"run", "more"}, "unknown command"},
		{[]string{"report", "--figures", t.TempDir()}, "no figures"},
	} {
		cmd := command()
		cmd.SetArgs(c.args)
		if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: %v, want %q", c.args, err, c.want)
		}
	}
}
