package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

func (a *app) snapRollbackCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rollback STORE/IMAGE@SNAPSHOT",
		Short: "Make an image what it was at a snapshot",
		Long: `Make an image what it was at a snapshot, its size included. It copies nothing. All
snapshots and clones stay. What was written since the last snapshot is gone: make
one first if it may be wanted.

An image that is attached here is rolled back if nothing has its device open: that
vanishes, and comes back with what the snapshot has. One that another host has
attached is refused.`,
		Example: `  lsdctl snap rollback rados://rbd/vm2@monday
  lsdctl snap create rados://rbd/vm2@before && lsdctl snap rollback rados://rbd/vm2@monday`,
		Args: exactArgs("STORE/IMAGE@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, snap, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			return a.rollBack(cmd.Context(), u, image, snap)
		},
	}
}

func (a *app) rollBack(ctx context.Context, u backend.URL, image, snap string) error {
	var to engine.Snapshot
	var here *api.Image
	err := withImage(ctx, u, image, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		list, err := engine.Snapshots(ctx, st, id)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(s engine.Snapshot) bool { return s.Name == snap })
		if i < 0 {
			return noSnapshot(u, image, fmt.Errorf("%w: %s", engine.ErrNoSnapshot, snap))
		}
		to = list[i]
		if here = a.attachment(ctx, id); here != nil {
			return nil
		}
		err = engine.Rollback(ctx, st, id, snap, engine.RollbackOptions{URL: u.Image(image)})
		var owned *engine.OwnedError
		if errors.As(err, &owned) && !owned.Command {
			return a.detachFirst(ctx, id, owned.Host)
		}
		return noSnapshot(u, image, err)
	})
	if err == nil && here != nil {
		_, err = a.client().RollBack(ctx, here.ID, api.RollbackRequest{Snapshot: snap}, a.progress.show)
		a.progress.end()
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "%s is now what it was at %s, made on %s: %s\n", u.Image(image), snap, to.Created.Local().Format(time.DateTime), bytesize.Human(to.Size))
	return nil
}
