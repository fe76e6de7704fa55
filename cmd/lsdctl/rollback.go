package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

func (a *app) snapRollbackCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rollback STORE/IMAGE@SNAPSHOT",
		Short: "Make an image what it was at a snapshot",
		Long: `Make an image what it was at a snapshot, its size included. It copies nothing. All
snapshots and clones stay. What was written since the last snapshot is gone: make
one first if it may be wanted. An image that is attached is refused.`,
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
	err := withImage(ctx, u, image, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		list, err := engine.Snapshots(ctx, st, id)
		if err != nil {
			return err
		}
		for _, s := range list {
			if s.Name == snap {
				to = s
			}
		}
		err = engine.Rollback(ctx, st, id, snap, engine.RollbackOptions{URL: u.Image(image)})
		var owned *engine.OwnedError
		if errors.As(err, &owned) && !owned.Command {
			return a.detachFirst(ctx, id, owned.Host)
		}
		return noSnapshot(u, image, err)
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "%s is now what it was at %s, made on %s: %s\n", u.Image(image), snap, to.Created.Local().Format(time.DateTime), bytesize.Human(to.Size))
	return nil
}

// detachFirst says where the image id, which a host has attached, is to be detached.
func (a *app) detachFirst(ctx context.Context, id uuid.UUID, host string) error {
	if im := a.attachment(ctx, id); im != nil {
		return fmt.Errorf("it is attached by %s, here, as %s: lsdctl del %s first", host, im.Device, im.Device)
	}
	return fmt.Errorf("it is attached by %s: lsdctl del it there first", host)
}
