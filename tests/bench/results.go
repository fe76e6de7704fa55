// Package bench has the figures of comparisons: side by side, in one run, taking turns, as
// ratios of medians. Package beside, below, measures them; the benchmarks here are those of
// single parts, which have no peers.
package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// Report is what one comparison has found.
type Report struct {
	Name    string   `json:"name"` // of its file, and of its place in docs/benchmarks.md
	Title   string   `json:"title"`
	Date    string   `json:"date"` // as 2006-01-02
	Command string   `json:"command"`
	Machine []string `json:"machine"` // facts, a line each
	Turns   int      `json:"turns"`   // that each side took
	Tables  []Table  `json:"tables"`
}

// Table has one kind of figure of all sides.
type Table struct {
	Name  string   `json:"name"` // of its plot
	Title string   `json:"title"`
	Unit  string   `json:"unit"`
	Less  bool     `json:"less,omitempty"`  // is better
	Plot  bool     `json:"plot,omitempty"`  // drawn, too
	Sides []string `json:"sides"`           // the first one is lsd, unless there is no peer
	Alone bool     `json:"alone,omitempty"` // the sides are all lsd: there is nothing to compare
	Rows  []Row    `json:"rows"`
}

// Row has the figures of one case, those of a side one for each turn. A side that has no part
// in the case has none.
type Row struct {
	Name  string      `json:"name"`
	Sides [][]float64 `json:"sides"`
}

// Median returns the median of x, which is not empty.
func Median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}

// Read reads a report from a file, and checks it.
func Read(path string) (*Report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(Report)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return r, nil
}

// check returns an error unless the tables can be drawn.
func (r *Report) check() error {
	if len(r.Tables) == 0 {
		return errors.New("it has no tables")
	}
	for _, t := range r.Tables {
		if len(t.Sides) == 0 || len(t.Rows) == 0 {
			return fmt.Errorf("table %q is empty", t.Name)
		}
		for _, row := range t.Rows {
			if len(row.Sides) != len(t.Sides) {
				return fmt.Errorf("table %q, row %q: figures of %d sides, not of %d", t.Name, row.Name, len(row.Sides), len(t.Sides))
			}
			if len(row.Sides[0]) == 0 {
				return fmt.Errorf("table %q, row %q has no figures of %s", t.Name, row.Name, t.Sides[0])
			}
		}
	}
	return nil
}

// Write writes the report to a file as JSON, after the checks of Read.
func (r *Report) Write(path string) error {
	if err := r.check(); err != nil {
		return fmt.Errorf("figures of %s: %w", r.Name, err)
	}
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// Markdown returns the report as it stands in docs/benchmarks.md; plots are looked for in dir.
func (r *Report) Markdown(dir string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "`%s`, %s, %s: medians (least–most).\n", r.Command, r.Date, turns(r.Turns))
	for _, m := range r.Machine {
		fmt.Fprintf(&b, "%s.\n", m)
	}
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "\n**%s**, %s:\n\n%s", t.Title, t.unit(), t.Markdown())
		if t.Plot {
			fmt.Fprintf(&b, "\n![%s](%s/%s)\n", t.Title, dir, r.PlotName(&t))
		}
	}
	return b.String()
}

func turns(n int) string {
	if n == 1 {
		return "one turn of each side"
	}
	return fmt.Sprintf("%d turns of each side", n)
}

// PlotName returns the name of the file of a table's plot.
func (r *Report) PlotName(t *Table) string { return r.Name + "-" + t.Name + ".svg" }

func (t *Table) unit() string {
	if t.Less {
		return t.Unit + ", less is better"
	}
	return t.Unit
}

// Markdown returns the table, with the ratios of the first side to each of the others.
func (t *Table) Markdown() string {
	var b strings.Builder
	columns, compared := 1+len(t.Sides), len(t.Sides) > 1 && !t.Alone
	fmt.Fprintf(&b, "| case | %s |", strings.Join(t.Sides, " | "))
	if compared {
		columns++
		fmt.Fprintf(&b, " %s to each |", t.Sides[0])
	}
	b.WriteString("\n|" + strings.Repeat(" --- |", columns) + "\n")
	for _, row := range t.Rows {
		fmt.Fprintf(&b, "| %s |", row.Name)
		for _, x := range row.Sides {
			fmt.Fprintf(&b, " %s |", spread(x))
		}
		if compared {
			fmt.Fprintf(&b, " %s |", row.ratios())
		}
		b.WriteString("\n")
	}
	return b.String()
}

// ratios returns the first side's median divided by that of each of the others.
func (row *Row) ratios() string {
	var all []string
	for _, x := range row.Sides[1:] {
		if s, ok := ratio(row.Sides[0], x); ok {
			all = append(all, "**"+s+"**")
		} else {
			all = append(all, "–")
		}
	}
	return strings.Join(all, ", ")
}

// ratio returns the quotient of two medians, if there is one.
func ratio(ours, peer []float64) (string, bool) {
	if len(ours) == 0 || len(peer) == 0 || Median(peer) == 0 {
		return "", false
	}
	q := Median(ours) / Median(peer)
	if q > 0 && q < 0.1 {
		return "1/" + number(1/q), true
	}
	return number(q), true
}

// number returns a figure with as many digits as say something.
func number(x float64) string {
	switch {
	case x == 0:
		return "0"
	case x >= 100 || x <= -100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10 || x <= -10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func spread(x []float64) string {
	switch len(x) {
	case 0:
		return ""
	case 1:
		return number(x[0])
	}
	return fmt.Sprintf("%s (%s–%s)", number(Median(x)), number(slices.Min(x)), number(slices.Max(x)))
}
