package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/spf13/cobra"
)

func (a *app) renameCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rename STORE/IMAGE NEW",
		Short: "Give an image another name",
		Long: `Give an image another name in its store: NEW, or STORE/NEW. Whoever has it attached
goes on, under the name that it had when it was attached.`,
		Example: `  lsdctl rename rados://rbd/vm2 vm2-old
  lsdctl rename rados://rbd/vm2 rados://rbd/vm2-old`,
		Args: exactArgs("STORE/IMAGE", "NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, from, err := parseImage(args[0])
			if err != nil {
				return err
			}
			to, err := parseNewImage(u, args[1])
			if err != nil {
				return err
			}
			return renameImage(cmd.Context(), u, from, to)
		},
	}
}

// isURL reports whether what may be a name or a URL is one: no name has a slash.
func isURL(s string) bool { return strings.Contains(s, "/") }

// parseNewImage returns the name of an image in the store u, which may be given as a URL.
func parseNewImage(u backend.URL, s string) (string, error) {
	if !isURL(s) {
		return s, backend.CheckImageName(s)
	}
	v, name, err := parseImage(s)
	if err == nil && v != u {
		err = fmt.Errorf("%s is another store than %s: both must be in the same store", v, u)
	}
	return name, err
}

func renameImage(ctx context.Context, u backend.URL, from, to string) error {
	return withStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		err := engine.Rename(ctx, st, from, to)
		if errors.Is(err, backend.ErrExists) {
			return imageExists(u, to)
		}
		return noImage(u, from, err)
	})
}
