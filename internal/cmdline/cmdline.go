// Package cmdline says in one line what is wrong with a command line.
package cmdline

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// FlagError is for cobra's SetFlagErrorFunc: it names the flag, what it should be, and
// where that is told.
func FlagError(c *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	if errors.As(err, &bad) {
		err = invalid(bad)
	}
	return fmt.Errorf("%w: see %s --help", err, c.CommandPath())
}

// invalid says what the value of a flag should be.
func invalid(bad *pflag.InvalidValueError) error {
	f, want := bad.GetFlag(), ""
	switch f.Value.Type() {
	case "bool":
		want = "it is true or false"
	case "int":
		want = "it is a whole number"
	case "float64":
		want = "it is a number"
	case "duration":
		want = "it is a time: write 500ms, 30s, 10m or 1h"
	default:
		return fmt.Errorf("--%s: %w", f.Name, bad.Unwrap())
	}
	return fmt.Errorf("--%s %q: %s", f.Name, bad.GetValue(), want)
}

// Args wants at least the first so many of the named arguments, and no more than all.
func Args(least int, names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return fmt.Errorf("%s is missing: see %s --help", names[len(args)], c.CommandPath())
		case len(args) > len(names):
			return fmt.Errorf("%q is too much: see %s --help", args[len(names)], c.CommandPath())
		}
		return nil
	}
}
