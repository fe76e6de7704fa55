package lab

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/lsd-ceph/lsd/tests/bench"
)

// Case is one row: what all sides do.
type Case[T any] struct {
	Name string
	Do   T
}

// Side is one of those that are compared.
type Side[T any] struct {
	Name string
	// Turn does it once. Nil without an error: the side has no part in this case.
	Turn func(ctx context.Context, do T) (Figures, error)
}

// Figures are what one turn has given.
type Figures map[Metric]float64

// Metric is the name of one kind of figure.
type Metric string

// Measured is what all turns have given.
type Measured struct {
	cases   []string
	sides   []string
	figures [][][]Figures // by case, side, turn
}

// Turns has the sides do each case once, and that h.Turns times: each side has its turn near
// those of the others, and not always at the same place. What comes is told at once.
func Turns[T any](ctx context.Context, h *Host, cases []Case[T], sides []Side[T]) (*Measured, error) {
	chosen, err := regexp.Compile(h.Cases)
	if err != nil {
		return nil, fmt.Errorf("--cases: %w", err)
	}
	m := new(Measured)
	for _, s := range sides {
		m.sides = append(m.sides, s.Name)
	}
	var todo []Case[T]
	for _, c := range cases {
		if chosen.MatchString(c.Name) {
			todo = append(todo, c)
			m.cases = append(m.cases, c.Name)
			m.figures = append(m.figures, make([][]Figures, len(sides)))
		}
	}
	for turn := range h.Turns {
		for c := range todo {
			for i := range sides {
				s := (i + turn) % len(sides)
				f, err := sides[s].Turn(ctx, todo[c].Do)
				if err != nil {
					return nil, fmt.Errorf("%s: %s: %w", sides[s].Name, todo[c].Name, err)
				}
				if f == nil {
					continue
				}
				m.figures[c][s] = append(m.figures[c][s], f)
				h.Say("turn %d of %d: %s: %s: %s", turn+1, h.Turns, todo[c].Name, sides[s].Name, f)
			}
		}
	}
	return m, nil
}

// String returns the figures in one line.
func (f Figures) String() string {
	var parts []string
	for _, m := range slices.Sorted(maps.Keys(f)) {
		parts = append(parts, fmt.Sprintf("%.4g %s", f[m], m))
	}
	return strings.Join(parts, ", ")
}

// Table returns the figures of one metric, of the sides that have any. Title, unit and so on
// are those of t.
func (m *Measured) Table(of Metric, t bench.Table) bench.Table {
	of64 := func(c, s int) (x []float64) {
		for _, f := range m.figures[c][s] {
			if v, ok := f[of]; ok {
				x = append(x, v)
			}
		}
		return x
	}
	var has []int // sides
	for s, name := range m.sides {
		for c := range m.cases {
			if len(of64(c, s)) > 0 {
				has = append(has, s)
				t.Sides = append(t.Sides, name)
				break
			}
		}
	}
	for c, name := range m.cases {
		row := bench.Row{Name: name}
		any := false
		for _, s := range has {
			x := of64(c, s)
			any = any || len(x) > 0
			row.Sides = append(row.Sides, x)
		}
		if any {
			t.Rows = append(t.Rows, row)
		}
	}
	return t
}

// Parts returns the figures of several metrics of the first side, a row for each that was ever
// above 0, and a column for each case. Title, unit and so on are those of t.
func (m *Measured) Parts(of []Metric, t bench.Table) bench.Table {
	t.Sides, t.Alone = m.cases, true
	for _, metric := range of {
		row := bench.Row{Name: string(metric)}
		any := false
		for c := range m.cases {
			var x []float64
			for _, f := range m.figures[c][0] {
				x = append(x, f[metric])
				any = any || f[metric] > 0
			}
			row.Sides = append(row.Sides, x)
		}
		if any {
			t.Rows = append(t.Rows, row)
		}
	}
	return t
}
