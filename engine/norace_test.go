//go:build !race

package engine

const defaultSeeds = 60

// raceEnabled: figures of memory say something.
const raceEnabled = false
