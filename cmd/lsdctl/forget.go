package main

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

func (a *app) logForgetCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "forget STORE/IMAGE [LOG-ID]",
		Short: "Give up what an image keeps for a write log that is lost",
		Long: `After a forced take-over an image keeps its state as it was then, so that the
write log of the host that was cut off can be salvaged when it turns up: lsdctl
info tells which. When that log is salvaged, or lost for good, forget it: the
space is reclaimed by whoever has the image attached, now or next.`,
		Example: `  lsdctl info rados://rbd/vm2
  lsdctl log forget rados://rbd/vm2 8f8c1d0e-5d0c-4d0b-9f0a-6f3f0d9a1b2c
  lsdctl log forget rados://rbd/vm2 --all`,
		Args: cmdline.Args(1, "STORE/IMAGE", "LOG-ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := uuid.Nil
			switch {
			case all == (len(args) == 2):
				return errors.New("name one log, or say --all: see lsdctl info")
			case !all:
				var err error
				if id, err = uuid.Parse(args[1]); err != nil || id == uuid.Nil {
					return fmt.Errorf("%s is not the id of a log: see lsdctl info", args[1])
				}
			}
			return a.forget(cmd, args[0], id)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "forget all logs that were cut off")
	return cmd
}

func (a *app) forget(cmd *cobra.Command, image string, log uuid.UUID) error {
	u, name, err := parseImage(image)
	if err != nil {
		return err
	}
	st, err := openStore(cmd.Context(), u)
	if err != nil {
		return err
	}
	defer st.Close()
	id, err := backend.Lookup(cmd.Context(), st, name)
	if err != nil {
		return noImage(u, name, err)
	}
	n, err := engine.ForgetLogs(cmd.Context(), st, id, log)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", u.Image(name), err)
	case n == 0:
		return fmt.Errorf("%s keeps nothing for such a log: see lsdctl info", u.Image(name))
	}
	fmt.Fprintf(a.out, "forgot %s\n", plural.Count(n, "log"))
	return nil
}
