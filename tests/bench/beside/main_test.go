package main

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

// TestEachOf: a comparison that fails is told of, and leaves the others their turn; the end of the
// context does not.
func TestEachOf(t *testing.T) {
	all := []comparison{{name: "one"}, {name: "two"}, {name: "three"}}
	for _, x := range []struct {
		name      string
		fails     []string // names
		stops     string   // in the middle of this one
		measured  []string
		told, err string
	}{
		{name: "all well", measured: []string{"one", "two", "three"}},
		{name: "one fails", fails: []string{"two"}, measured: []string{"one", "two", "three"}, told: "two has failed: it broke", err: "1 of 3 comparisons have failed: two"},
		{name: "all fail", fails: []string{"one", "two", "three"}, measured: []string{"one", "two", "three"}, told: "three has failed: it broke", err: "3 of 3 comparisons have failed: one, two, three"},
		{name: "stopped", stops: "two", fails: []string{"two"}, measured: []string{"one", "two"}, err: "two: it broke"},
		{name: "stopped at its end", stops: "one", measured: []string{"one"}, err: "one: context canceled"},
	} {
		ctx, stop := context.WithCancel(t.Context())
		var measured []string
		var told bytes.Buffer
		err := eachOf(ctx, all, &told, func(_ context.Context, c comparison) error {
			measured = append(measured, c.name)
			if c.name == x.stops {
				stop()
			}
			if slices.Contains(x.fails, c.name) {
				return errors.New("it broke")
			}
			return nil
		})
		stop()
		if !slices.Equal(measured, x.measured) || !strings.Contains(told.String(), x.told) || (told.Len() > 0) != (x.told != "") ||
			(err == nil) != (x.err == "") || err != nil && err.Error() != x.err {
			t.Errorf("%s: %v measured, %q told, %v", x.name, measured, told.String(), err)
		}
	}
}
