package main

import (
	"fmt"
	"slices"

	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/spf13/cobra"
)

func (a *app) featuresCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "features",
		Short:   "Tell what this kernel's ublk driver can do, and what lsd uses of it",
		Example: "  lsdctl features --json",
		Args:    exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			mask, err := features()
			if err != nil {
				return err
			}
			f := daemon.Features(mask)
			if a.json {
				return a.printJSON(f)
			}
			fmt.Fprintf(a.out, "Linux %s, ublk features %#x\n\n", f.Kernel, f.Mask)
			return a.table(func(row func(...any)) {
				row("FEATURE", "KERNEL", "LSD")
				for _, n := range f.Names {
					uses := "-"
					if slices.Contains(f.Used, n) {
						uses = "uses it"
					}
					row(n, "yes", uses)
				}
				for _, n := range f.Missing {
					row(n, "no", "would use it")
				}
			})
		},
	})
}
