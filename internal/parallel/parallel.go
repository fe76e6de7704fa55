// Package parallel runs functions side by side so that a panic in one of them is its
// caller's, who may know how to contain it: one in a goroutine of its own ends the process.
package parallel

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// A Panicked is a panic that was caught in a helper goroutine.
type Panicked struct {
	Value any
	Stack []byte
}

func (p *Panicked) Error() string {
	return fmt.Sprintf("panic: %v, in a helper:\n%s", p.Value, p.Stack)
}

// Catch calls fn and returns its error, or a *Panicked if it panics.
func Catch(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Panicked{v, debug.Stack()}
		}
	}()
	return fn()
}

// Throw panics if err is a panic that was caught.
func Throw(err error) {
	if p := (*Panicked)(nil); errors.As(err, &p) {
		panic(p)
	}
}

// Each calls fn for 0 to n-1, up to limit at a time, waits for all of them, and returns the
// first error. If any has panicked, it panics. With a limit of 1 it calls them in order, on
// the caller's goroutine, and ends at the first error.
func Each(limit, n int, fn func(int) error) error {
	if limit == 1 || n < 2 {
		for k := range n {
			if err := fn(k); err != nil {
				return err
			}
		}
		return nil
	}
	errs := make(chan error, n)
	places := make(chan struct{}, limit)
	for k := range n {
		places <- struct{}{}
		go func() {
			errs <- Catch(func() error { return fn(k) })
			<-places
		}()
	}
	var first, panicked error
	for range n {
		err := <-errs
		if p := (*Panicked)(nil); errors.As(err, &p) {
			panicked = err
		} else if first == nil {
			first = err
		}
	}
	Throw(panicked)
	return first
}
