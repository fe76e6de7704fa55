//go:build race

package racetest

// Enabled: figures of memory and of time say nothing, and work on one goroutine takes ten times
// as long as it would.
const Enabled = true
