//go:build race

package ring

// raceEnabled: what is allocated says nothing.
const raceEnabled = true
