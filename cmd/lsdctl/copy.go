package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/lsd-ceph/lsd/internal/transfer"
	"github.com/spf13/cobra"
)

// copied is what copy --json prints.
type copied struct {
	Name      string    `json:"name"`
	ID        uuid.UUID `json:"id"`
	Source    uuid.UUID `json:"source"`
	Size      uint64    `json:"size_bytes"`
	Snapshots int       `json:"snapshots"`
	Data      uint64    `json:"data_bytes"` // written this time
	Resumed   bool      `json:"resumed,omitempty"`
}

func (a *app) copyCommand() *cobra.Command {
	var headOnly bool
	cmd := &cobra.Command{
		Use:   "copy STORE/IMAGE STORE/NEW",
		Short: "Copy an image with its snapshots, to another store or the same",
		Long: `Make a new image that is what another one is now, with all its snapshots. The store of
the new one, which may be the same, must be there. The image may be attached, and go on
being written to. The copy has all data of its own, also that of a clone: to take no
space, clone the image. Its snapshots have the same names, and the time of the copy.

It can be interrupted at any time: the same command goes on where it was. Until then
what there is of the copy has no name, and the image keeps a snapshot whose name begins
with lsdctl-copy-, which is what the copy is of. To give the copy up, remove that with
lsdctl snap rm, and lsdctl gc on the other store removes the rest, once it is older than
its --age. If snapshots that have been copied are removed or renamed meanwhile, the copy
begins anew.`,
		Example: `  lsdctl copy rados://rbd/vm2 rados://backup/vm2
  lsdctl copy file:///srv/lsd/vm1 rados://rbd/vm1 --no-snapshots`,
		Args: exactArgs("STORE/IMAGE", "STORE/NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, err := parseImage(args[0])
			if err != nil {
				return err
			}
			to, name, err := parseImage(args[1])
			if err != nil {
				return err
			}
			err = a.copyImage(cmd.Context(), u, image, to, name, headOnly)
			a.progress.end()
			return err
		},
	}
	cmd.Flags().BoolVar(&headOnly, "no-snapshots", false, "copy what the image is now alone")
	return a.jsonFlag(cmd)
}

func (a *app) copyImage(ctx context.Context, u backend.URL, image string, to backend.URL, name string, headOnly bool) error {
	src, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer src.Close()
	source, err := lookUp(ctx, src, u, image)
	if err != nil {
		return err
	}
	dst, err := openStore(ctx, to)
	if err != nil {
		return err
	}
	defer dst.Close()
	made, err := transfer.Copy(ctx, src, source, dst, name, transfer.CopyOptions{
		Options: a.transferOptions(to, name), HeadOnly: headOnly,
		Snapshot: engine.SnapshotOptions{
			Nudge:    a.nudge(source),
			Progress: func(what string) { a.progress.show(api.Progress{What: what}) },
		},
	})
	a.progress.end()
	var owned *engine.OwnedError
	var begun *transfer.Unfinished
	switch {
	case errors.Is(err, backend.ErrExists):
		return imageExists(to, name)
	case errors.As(err, &owned):
		return err
	case errors.As(err, &begun):
		return fmt.Errorf("copy %s to %s: %w: the same command goes on where it was; to give it up, lsdctl snap rm %s, and lsdctl gc %s --remove later",
			u.Image(image), to.Image(name), storeFull(to, begun.Err), u.Snapshot(image, begun.Snapshot), to)
	case err != nil:
		return fmt.Errorf("copy %s to %s: %w", u.Image(image), to.Image(name), lostNames(to, storeFull(to, err)))
	case a.json:
		return a.printJSON(copied{name, made.ID, source, made.Size, made.Snapshots, made.Data, made.Resumed})
	}
	with := ""
	if !headOnly {
		with = ", with " + plural.Count(made.Snapshots, "snapshot")
	}
	fmt.Fprintf(a.out, "made %s of %s%s, of which %s were written: attach it with lsdctl add %s\n",
		to.Image(name), bytesize.Human(made.Size), with, bytesize.Human(made.Data), to.Image(name))
	return nil
}
