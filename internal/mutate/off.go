//go:build !mutate

package mutate

// On reports whether the bug is planted.
func On(Bug) bool { return false }
