//go:build race

package engine

// The simulation runs on one goroutine: under the race detector, which makes it
// ten times slower, a few seeds do.
const defaultSeeds = 4
