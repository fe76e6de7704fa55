//go:build mutate

package engine

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"testing"

	"github.com/lsd-ceph/lsd/internal/mutate"
)

var mutationSeeds = flag.Uint64("sim.mutation-seeds", 3000, "number of seeds within which every planted bug must be found")

// TestMutations plants one bug after another and lets the simulation look for it.
// A bug that it does not find is a hole in the simulation. The test binary runs
// itself, since a bug is planted for the whole life of a process.
func TestMutations(t *testing.T) {
	if os.Getenv(mutate.Env) != "" {
		t.Fatalf("%s is set: this test sets it itself", mutate.Env)
	}
	failed := regexp.MustCompile(`seed (\d+): ([^\n]*)`)
	for _, bug := range mutate.All() {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSimulation$", "-test.timeout=0", fmt.Sprint("-sim.seeds=", *mutationSeeds))
		cmd.Env = append(os.Environ(), mutate.Env+"="+string(bug))
		out, err := cmd.CombinedOutput()
		found := failed.FindSubmatch(out)
		var exit *exec.ExitError
		switch {
		case err == nil:
			t.Errorf("%-22s survives %d seeds", bug, *mutationSeeds)
		case !errors.As(err, &exit) || found == nil:
			t.Errorf("%s: %v\n%s", bug, err, out)
		default:
			t.Logf("%-22s seed %4s: %.160s", bug, found[1], found[2])
		}
	}
}

func TestMutationIsKnown(t *testing.T) {
	seen := map[mutate.Bug]bool{"": true}
	for _, bug := range mutate.All() {
		if seen[bug] {
			t.Errorf("bug %q is there twice, or has no name", bug)
		}
		seen[bug] = true
	}
	if bug := mutate.Bug(os.Getenv(mutate.Env)); !seen[bug] {
		t.Errorf("%s=%s names no bug", mutate.Env, bug)
	}
}
