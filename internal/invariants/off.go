//go:build !invariants

// Package invariants says whether this build checks what is costly to check: the
// build tag "invariants", which tests turn on. Checks that are cheap are always
// made.
package invariants

// Enabled reports whether costly checks are compiled in.
const Enabled = false
