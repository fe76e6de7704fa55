package lab

import (
	"context"
	"errors"
	"reflect"
	"testing"

	"github.com/lsd-ceph/lsd/tests/bench"
)

// TestTurns: each side has as many turns as asked for, and another one is first in each; a side
// without a part in a case, or without a kind of figure, has no place there.
func TestTurns(t *testing.T) {
	var order []string
	side := func(name string, not int) Side[int] {
		return Side[int]{Name: name, Turn: func(_ context.Context, n int) (Figures, error) {
			if n == not {
				return nil, nil
			}
			order = append(order, name)
			f := Figures{"rate": float64(n)}
			if name == "lsd" {
				f["cpu"] = 1
			}
			return f, nil
		}}
	}
	h := &Host{Effort: Effort{Turns: 2, Cases: "one|two"}}
	m, err := Turns(context.Background(), h, []Case[int]{{"one", 1}, {"two", 2}, {"three", 3}}, []Side[int]{side("lsd", 0), side("peer", 2)})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"lsd", "peer", "lsd", "peer", "lsd", "lsd"}; !reflect.DeepEqual(order, want) {
		t.Errorf("the order was %v, want %v", order, want)
	}
	rate := m.Table("rate", bench.Table{Name: "rate"})
	if want := (bench.Table{Name: "rate", Sides: []string{"lsd", "peer"}, Rows: []bench.Row{
		{Name: "one", Sides: [][]float64{{1, 1}, {1, 1}}}, {Name: "two", Sides: [][]float64{{2, 2}, nil}},
	}}); !reflect.DeepEqual(rate, want) {
		t.Errorf("got %+v, want %+v", rate, want)
	}
	if cpu := m.Table("cpu", bench.Table{}); !reflect.DeepEqual(cpu.Sides, []string{"lsd"}) {
		t.Errorf("CPU is of %v", cpu.Sides)
	}
	failing := Side[int]{Name: "peer", Turn: func(context.Context, int) (Figures, error) { return nil, errors.New("no disk") }}
	if _, err := Turns(context.Background(), h, []Case[int]{{"one", 1}}, []Side[int]{failing}); err == nil || err.Error() != "peer: one: no disk" {
		t.Errorf("a side that fails: %v", err)
	}
}
