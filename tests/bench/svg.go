package bench

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// SVG returns the table as a bar chart of medians, with the spread as lines.
func (t *Table) SVG() string {
	const width, bar, gap, right, top = 760, 17, 16, 150, 46
	// Light to dark, so that it is read without colors, too; the first one stands out.
	colors := []string{"#1f6f8b", "#b9b9b9", "#8f8f8f", "#d8c9a3", "#c4a484", "#9db39a"}
	highest, left := 0.0, 90
	for _, row := range t.Rows {
		for _, x := range row.Sides {
			if len(x) > 0 {
				highest = math.Max(highest, slices.Max(x))
			}
		}
		left = max(left, 18+7*len(row.Name))
	}
	if highest == 0 {
		highest = 1 // all is 0: no bars
	}
	x := func(v float64) float64 { return float64(left) + v/highest*float64(width-left-right) }
	var body strings.Builder
	y := top + 18*len(t.Sides) + 12
	for _, row := range t.Rows {
		fmt.Fprintf(&body, `<text x="10" y="%d">%s</text>`+"\n", y+bar-4, html.EscapeString(row.Name))
		for i, figures := range row.Sides {
			if len(figures) == 0 {
				continue
			}
			m, note := Median(figures), ""
			if q, ok := ratio(row.Sides[0], figures); ok && i > 0 {
				note = fmt.Sprintf(" (× %s)", q)
			}
			fmt.Fprintf(&body, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, left, y, x(m)-float64(left), bar-3, colors[i%len(colors)])
			mid := float64(y) + float64(bar-3)/2
			fmt.Fprintf(&body, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#333" stroke-width="1.5"/>`, x(slices.Min(figures)), x(slices.Max(figures)), mid, mid)
			fmt.Fprintf(&body, `<text x="%.1f" y="%d" font-size="12">%s%s</text>`+"\n", x(slices.Max(figures))+6, y+bar-5, number(m), note)
			y += bar
		}
		y += gap
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", width, y, width, y)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, y)
	fmt.Fprintf(&b, `<text x="10" y="22" font-size="15" font-weight="bold">%s</text>`+"\n", html.EscapeString(t.Title))
	fmt.Fprintf(&b, `<text x="10" y="42" fill="#555">%s; medians, spread as lines; in brackets what %s has for each of the other's</text>`+"\n", html.EscapeString(t.unit()), html.EscapeString(t.Sides[0]))
	for i, s := range t.Sides {
		fmt.Fprintf(&b, `<text x="10" y="%d" fill="%s">■</text><text x="26" y="%d">%s</text>`+"\n", top+18*(i+1), colors[i%len(colors)], top+18*(i+1), html.EscapeString(s))
	}
	b.WriteString(body.String())
	b.WriteString("</svg>\n")
	return b.String()
}
