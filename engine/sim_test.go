package engine

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"
)

var (
	simSeeds    = flag.Uint64("sim.seeds", defaultSeeds, "number of seeds of the simulation")
	simFirst    = flag.Uint64("sim.first", 0, "first seed of the simulation")
	simLog      = flag.Bool("sim.log", false, "log what happens in the simulation, to standard error")
	simProgress = flag.Bool("sim.progress", false, "tell how far the simulation is")
)

// simRegressions are seeds that have found a bug once. What a seed means changes
// with the simulation: each bug has a test of its own, too.
var simRegressions = []uint64{34, 58, 218, 219, 225, 201993, 213819, 229406, 234469, 910889, 2002943, 369, 759, 10080, 20688, 60239, 50734, 51392}

// enoughSeeds is how many show all that can happen.
const enoughSeeds = 500

// TestSimulation drives the real engine, write log and recovery through worlds in
// which everything fails, one for each seed; docs/reliability.md says what they
// are like and how to replay one.
func TestSimulation(t *testing.T) {
	t.Parallel()
	for _, seed := range simRegressions {
		if testing.Short() {
			break // these are for the long form, without the race detector
		}
		if _, err := runSeed(seed, new(simMemory)); err != nil {
			report(t, seed, err)
		}
	}
	counts, seed, err := runSeeds(*simFirst, *simSeeds)
	if err != nil {
		report(t, seed, err)
	}
	if *simProgress {
		fmt.Fprintf(os.Stderr, "sim: %v\n", &counts)
	}
	t.Log(&counts)
	if what := counts.idle(); what != "" && *simSeeds >= enoughSeeds {
		t.Errorf("no %s in %d seeds", what, *simSeeds)
	}
}

func report(t *testing.T, seed uint64, err error) {
	t.Fatalf("seed %d: %v\nto replay it: make sim SEED=%d", seed, err, seed)
}

// TestSimulationReplays: two runs of a seed do the same, so that a seed that
// failed fails again.
func TestSimulationReplays(t *testing.T) {
	t.Parallel()
	for seed := range uint64(min(20, defaultSeeds)) {
		first, err := runSeed(seed, new(simMemory))
		if err != nil {
			report(t, seed, err)
		}
		second, err := runSeed(seed, new(simMemory))
		if err != nil {
			report(t, seed, err)
		}
		if first != second {
			t.Errorf("seed %d: two runs have traces %x and %x", seed, first, second)
		}
	}
}

// runSeed runs one world and returns the hash of its trace; an error says which
// promise it broke.
func runSeed(seed uint64, memory *simMemory) (trace uint64, err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case simFailure:
			err = fmt.Errorf("%s", string(p))
		default:
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return simulate(seed, memory), nil
}

// runSeeds runs n seeds from first on, on all processors, and returns how often
// what happened and the smallest seed that failed, of those that were
// begun, if any did.
func runSeeds(first, n uint64) (counts simCounts, failed uint64, err error) {
	var mu sync.Mutex
	next, done, began := first, uint64(0), time.Now()
	told := began
	take := func() (uint64, bool) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil || next >= first+n {
			return 0, false
		}
		next++
		return next - 1, true
	}
	finish := func(seed uint64, e error) {
		mu.Lock()
		defer mu.Unlock()
		done++
		if e != nil && (err == nil || seed < failed) {
			failed, err = seed, e
		}
		if *simProgress && (time.Since(told) > 5*time.Second || done == n) {
			told = time.Now()
			rate := float64(done) / time.Since(began).Seconds()
			left := time.Duration(float64(n-done)/rate) * time.Second
			fmt.Fprintf(os.Stderr, "sim: %d of %d seeds, %.0f a second, %v left\n", done, n, rate, left)
		}
	}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			memory := new(simMemory)
			for {
				seed, ok := take()
				if !ok {
					break
				}
				_, err := runSeed(seed, memory)
				finish(seed, err)
			}
			mu.Lock()
			defer mu.Unlock()
			counts.add(&memory.counts)
		})
	}
	wg.Wait()
	return counts, failed, err
}
