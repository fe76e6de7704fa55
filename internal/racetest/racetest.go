// Package racetest tells tests whether they run under the race detector.
package racetest

import "testing"

// Slow leaves to a run without the race detector a test that has nothing to show to it: one of
// much work on one goroutine, or one more of many that have the same goroutines do the same. It
// is skipped under the race detector in the short form, and only there. make unit looks for the
// packages that call it, and runs all of their tests without the race detector as well; make
// race runs everything with it.
func Slow(t testing.TB) {
	t.Helper()
	if Enabled && testing.Short() {
		t.Skip("without the race detector, or not with -short")
	}
}
