package main

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

func (a *app) dfCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "df STORE",
		Short: "Tell what takes the space of a store",
		Long: `Tell what takes the space of a store, for each image and in all, in bytes of data in
the store:

  PROVISIONED  the size of the disk
  LIVE         data that the image, as it is now, refers to
  SNAPSHOTS    other data: what only its snapshots refer to, or what it began with if
               it is a clone, or states that are kept for write logs that were cut off
  SHARED       of LIVE and SNAPSHOTS, what other images refer to as well
  ALONE        of LIVE and SNAPSHOTS, the rest: about what its removal would free
  RECLAIMABLE  what nothing refers to: overwritten data that the cleaner has not come
               to, and what is left of images that were removed
  METADATA     headers of objects, maps, checkpoints, superblocks

The first four are counted for whoever refers to the data, the last two where it
lies. In the total each byte is counted once: LIVE, SNAPSHOTS, RECLAIMABLE and
METADATA are all that the store holds, and ALONE and SHARED are LIVE and SNAPSHOTS.
Images in the trash count as others do.

It reads no data and no maps, but what checkpoints say of them: the figures are as
of each image's last checkpoint, what was written since counts as LIVE, and where
two images have each overwritten parts of the same data, SHARED is more than it is
by what they do not have in common, and RECLAIMABLE too.`,
		Example: `  lsdctl df rados://rbd
  lsdctl df file:///var/lib/lsd/store --json`,
		Args: exactArgs("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := parseStore(args[0])
			if err != nil {
				return err
			}
			st, err := openStore(cmd.Context(), u)
			if err != nil {
				return err
			}
			defer st.Close()
			usage, err := a.measure(cmd.Context(), u, st, uuid.Nil)
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(usage)
			}
			return a.printUsage(usage)
		},
	})
}

// measure measures a store, or what is related to an image of it.
func (a *app) measure(ctx context.Context, u backend.URL, st backend.Store, of uuid.UUID) (*engine.StoreUsage, error) {
	usage, err := engine.MeasureStore(ctx, st, engine.UsageOptions{
		Of:       of,
		Progress: func(what string) { a.progress.show(api.Progress{What: what}) },
	})
	a.progress.end()
	return usage, timedOut(u, err)
}

// shownName returns an image's name for a table.
func shownName(im engine.ImageUsage) string {
	name := im.Name
	if name == "" {
		name = im.ID.String()
	}
	switch {
	case im.Removed:
		name += " (removed)"
	case im.Trash:
		name += " (in the trash)"
	}
	return name
}

func (a *app) printUsage(u *engine.StoreUsage) error {
	err := a.table(func(row func(...any)) {
		row("NAME", "PROVISIONED", "LIVE", "SNAPSHOTS", "SHARED", "ALONE", "RECLAIMABLE", "METADATA")
		line := func(name string, s engine.Space) {
			cells := []any{name}
			for _, n := range []uint64{s.Provisioned, s.Live, s.Snapshots, s.Shared, s.Alone, s.Reclaimable, s.Metadata} {
				cells = append(cells, bytesize.Human(n))
			}
			row(cells...)
		}
		for _, im := range u.Images {
			line(shownName(im), im.Space)
		}
		line("TOTAL", u.Total)
	})
	fmt.Fprintf(a.out, "the store holds %s in %s\n", bytesize.Human(u.Stored), plural.Count(u.Objects, "object"))
	if u.Unknown > 0 {
		fmt.Fprintf(a.out, "of %s of these it is not known whether anything needs them: see lsdctl check\n", bytesize.Human(u.Unknown))
	}
	if u.Strange > 0 {
		fmt.Fprintf(a.out, "%s that lsd has not made are not counted\n", plural.Count(u.Strange, "object"))
	}
	for _, im := range u.Images {
		if im.Error != "" {
			fmt.Fprintf(a.out, "what %s needs is not known: %s\n", shownName(im), im.Error)
		}
	}
	return err
}
