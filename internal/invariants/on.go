//go:build invariants

package invariants

// Enabled reports whether costly checks are compiled in.
const Enabled = true
