package main

import (
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

func (a *app) cacheCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "cache",
		Short:   "Tell what the read cache that all images share holds and has done",
		Example: "  lsdctl cache --json",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var v api.ReadCache
			err := ask(cmd.Context(), func(ctx context.Context) (err error) {
				v, err = a.client().ReadCache(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(v)
			}
			return a.table(func(row func(...any)) { printCache(row, v) })
		},
	})
}

func printCache(row func(...any), v api.ReadCache) {
	human := bytesize.Human
	row("file", v.Path)
	row("state", v.State)
	if v.Error != "" {
		row("why", v.Error)
	}
	row("holds", fmt.Sprintf("%s of %s; %s of memory, %s of it for what is read most", human(v.Used), human(v.Size), human(v.Memory), human(v.Warm)))
	hits := 0.0
	if all := v.HitBytes + v.MissBytes; all > 0 {
		hits = 100 * float64(v.HitBytes) / float64(all)
	}
	row("reads", fmt.Sprintf("%s found, %s not (%.1f%% found)", human(v.HitBytes), human(v.MissBytes), hits))
	row("store", fmt.Sprintf("%s read; %s of it ahead, %s of that used; %s missed came with another's read", human(v.Fetched), human(v.Ahead), human(v.AheadUsed), human(v.Joined)))
	row("SSD", fmt.Sprintf("%s written; %s new, %s moved, %s evicted, %s deleted, %s not kept", human(v.Written), human(v.Filled), human(v.Moved), human(v.Evicted), human(v.Forgotten), human(v.Dropped)))
	row("errors", fmt.Sprintf("%d of the SSD, %d failed checksums", v.Errors, v.Mismatches))
}
