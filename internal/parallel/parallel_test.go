package parallel

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
)

// TestEach: the first error is returned when all have ended.
func TestEach(t *testing.T) {
	for _, limit := range []int{1, 3, 20} {
		var ended, running, most atomic.Int32
		err := Each(limit, 10, func(k int) error {
			most.Store(max(most.Load(), running.Add(1)))
			defer running.Add(-1)
			ended.Add(1)
			if k == 9 {
				return errors.New("the last")
			}
			return nil
		})
		if err == nil || err.Error() != "the last" || ended.Load() != 10 || int(most.Load()) > limit {
			t.Errorf("%d at a time: %v after %d of 10, %d at one time", limit, err, ended.Load(), most.Load())
		}
	}
}

// TestPanic: a panic of a helper is the caller's, after all have ended.
func TestPanic(t *testing.T) {
	for _, limit := range []int{1, 3} {
		var ended atomic.Int32
		err := Catch(func() error {
			return Each(limit, 10, func(k int) error {
				if k == 4 {
					panic("this one")
				}
				ended.Add(1)
				return errors.New("not this one")
			})
		})
		p := (*Panicked)(nil)
		switch {
		case limit == 1 && (err == nil || ended.Load() != 1):
			t.Errorf("one at a time: %v after %d", err, ended.Load())
		case limit > 1 && (!errors.As(err, &p) || !strings.Contains(fmt.Sprint(p.Value), "this one") || ended.Load() != 9):
			t.Errorf("%d at a time: %v after %d", limit, err, ended.Load())
		}
	}
	Throw(nil)
	Throw(errors.New("none"))
}
