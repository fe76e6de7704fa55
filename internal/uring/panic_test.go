package uring

import (
	"testing"
	"time"
)

// A panicker is a Completer that panics.
type panicker struct{}

func (panicker) Complete(int32, uint32) { panic("test") }

// TestDrainAfterPanic: a Completer panics, and others of its batch are not called any
// more. The ring knows that their operations have ended.
func TestDrainAfterPanic(t *testing.T) {
	r, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	r.Nop(panicker{})
	r.Nop(nop{})
	if err := r.SubmitAndWait(time.Second); err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() { recover() }()
		r.Reap()
		t.Error("no panic")
	}()
	began := time.Now()
	if err := r.Drain(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %v", d)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
