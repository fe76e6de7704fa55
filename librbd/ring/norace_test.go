//go:build !race

package ring

// raceEnabled: what is allocated says something.
const raceEnabled = false
