package parallel

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// TestQueue: results come in order, whichever is there first, and no more than the limit
// are under way.
func TestQueue(t *testing.T) {
	for _, limit := range []int{0, 1, 3, 100} {
		var got []int
		var running, most atomic.Int32
		q := NewQueue(limit, func(k int) error { got = append(got, k); return nil })
		for k := range 40 {
			err := q.Add(func() (int, error) {
				n := running.Add(1)
				defer running.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
				return k, nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := q.End(); err != nil || len(got) != 40 || !slices.IsSorted(got) {
			t.Errorf("%d at a time: %v, %v", limit, got, err)
		}
		if m := int(most.Load()); m > max(limit, 1) || limit > 1 && m < 2 {
			t.Errorf("%d at a time: there were %d", limit, m)
		}
		q.Wait()
	}
}

// TestQueueError: an error, of a function or of what takes its result, comes when it is its
// turn; Wait waits for the rest, of which nothing is taken.
func TestQueueError(t *testing.T) {
	bad := errors.New("bad")
	for _, of := range []string{"function", "take"} {
		taken := 0
		var ended atomic.Int32
		q := NewQueue(4, func(k int) error {
			if taken++; of == "take" && k == 2 {
				return bad
			}
			return nil
		})
		var err error
		added := 0
		for k := 0; k < 100 && err == nil; k++ {
			err = q.Add(func() (int, error) {
				defer ended.Add(1)
				if of == "function" && k == 2 {
					return 0, bad
				}
				return k, nil
			})
			if err == nil {
				added++
			}
		}
		q.Wait()
		if err != bad || added != 6 || int(ended.Load()) != added || taken != map[string]int{"function": 2, "take": 3}[of] {
			t.Errorf("%s: %v after %d were added, %d ended, %d taken", of, err, added, ended.Load(), taken)
		}
	}
}

// TestQueuePanic: a panic of a function is that of its user.
func TestQueuePanic(t *testing.T) {
	q := NewQueue(2, func(int) error { return nil })
	if err := q.Add(func() (int, error) { panic("this one") }); err != nil {
		t.Fatal(err)
	}
	if p := (*Panicked)(nil); !errors.As(Catch(q.End), &p) {
		t.Error("no panic")
	}
}
