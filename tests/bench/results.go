// Package bench compares lsd with its peers, side by side: in one run, taking
// turns, as a ratio of medians. `make bench-engine` runs what needs no ublk.
package bench

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// Results is one comparison: figures of which more is better.
type Results struct {
	Title   string `json:"title"`
	Unit    string `json:"unit"`
	Ours    string `json:"ours"`
	Peer    string `json:"peer"`
	Command string `json:"command"`
	Rows    []Row  `json:"rows"`
}

// Row holds the figures of all turns of one case.
type Row struct {
	Name string    `json:"name"`
	Ours []float64 `json:"ours"`
	Peer []float64 `json:"peer"`
}

// Median returns the median of x, which is not empty.
func Median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}

// Write writes the results to a file as JSON.
func (r *Results) Write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// Table returns the results as a Markdown table.
func (r *Results) Table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %s | %s, %s (min–max) | %s (min–max) | ratio |\n| --- | --- | --- | --- |\n", "case", r.Ours, r.Unit, r.Peer)
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "| %s | %s | %s | **%.2f** |\n", row.Name, spread(row.Ours), spread(row.Peer), Median(row.Ours)/Median(row.Peer))
	}
	return b.String()
}

func spread(x []float64) string {
	return fmt.Sprintf("%.0f (%.0f–%.0f)", Median(x), slices.Min(x), slices.Max(x))
}

// SVG returns the results as a bar chart of medians, with the spread as lines.
func (r *Results) SVG() string {
	const width, bar, gap, right, top = 720, 20, 18, 140, 64
	highest, left := 0.0, 90
	for _, row := range r.Rows {
		highest = math.Max(highest, math.Max(slices.Max(row.Ours), slices.Max(row.Peer)))
		left = max(left, 18+7*len(row.Name))
	}
	x := func(v float64) float64 { return float64(left) + v/highest*float64(width-left-right) }
	height := top + len(r.Rows)*(2*bar+gap) + 30
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="10" y="22" font-size="15" font-weight="bold">%s</text>`+"\n", r.Title)
	fmt.Fprintf(&b, `<text x="10" y="44" fill="#1f6f8b">■ %s</text><text x="90" y="44" fill="#b0b0b0">■ %s</text><text x="420" y="44" fill="#555">%s, medians, spread as lines</text>`+"\n", r.Ours, r.Peer, r.Unit)
	for i, row := range r.Rows {
		y := float64(top + i*(2*bar+gap))
		fmt.Fprintf(&b, `<text x="10" y="%.0f">%s</text>`+"\n", y+bar+5, row.Name)
		for k, side := range []struct {
			v     []float64
			color string
			note  string
		}{{row.Ours, "#1f6f8b", fmt.Sprintf(" (%.2f ×)", Median(row.Ours)/Median(row.Peer))}, {row.Peer, "#b0b0b0", ""}} {
			yy := y + float64(k*bar)
			m := Median(side.v)
			fmt.Fprintf(&b, `<rect x="%d" y="%.0f" width="%.1f" height="%d" fill="%s"/>`, left, yy, x(m)-float64(left), bar-3, side.color)
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%.0f" y2="%.0f" stroke="#333" stroke-width="1.5"/>`, x(slices.Min(side.v)), x(slices.Max(side.v)), yy+bar/2-2, yy+bar/2-2)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.0f">%.0f%s</text>`+"\n", x(math.Max(m, slices.Max(side.v)))+6, yy+bar-6, m, side.note)
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}
