//go:build mutate

package mutate

import "os"

// Env is the environment variable that names the bug to plant.
const Env = "LSD_MUTATION"

var planted = Bug(os.Getenv(Env))

// On reports whether the bug is planted.
func On(b Bug) bool { return b == planted }
