package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

// nudgeTimeout bounds the attempt to have this host's daemon look at a store at once: it
// does so by itself a little later.
const nudgeTimeout = 5 * time.Second

func (a *app) snapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snap",
		Short: "Make and look after snapshots",
		Args:  noSuchCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.snapCreateCommand(), a.snapLsCommand(), a.snapRmCommand(), a.snapRenameCommand(), a.snapRollbackCommand())
	return cmd
}

// parseSnapshot parses the URL of a snapshot in a store that outlives this process.
func parseSnapshot(s string) (u backend.URL, image, snap string, err error) {
	u, image, snap, err = backend.ParseSnapshot(s)
	return u, image, snap, notMem(u, err)
}

// within returns a context that ends after a time, and says so.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%v are over", d))
}

func (a *app) snapCreateCommand() *cobra.Command {
	var mount string
	timeout := time.Minute
	cmd := &cobra.Command{
		Use:   "create STORE/IMAGE@SNAPSHOT",
		Short: "Make a snapshot of an image",
		Long: `Make a snapshot of an image as it is now, whether it is attached or not, from any
host. It holds all writes that were acknowledged before, and takes no space until
the image is written to again. If another host has the image attached, that one
makes the snapshot when it renews its lease, which is within 5 seconds, or a quarter of
a shorter lease; on this host it is made at once.

What a file system has only in the page cache is not in it, and what is looks as
after a power cut. With --freeze the file system on the image is brought to rest
around it: everything is in the snapshot, which needs no recovery. Writes to the
file system wait meanwhile, for --timeout at most.`,
		Example: `  lsdctl snap create rados://rbd/vm2@monday
  lsdctl snap create rados://rbd/vm2@monday --freeze /mnt/vm2 --timeout 10s`,
		Args: exactArgs("STORE/IMAGE@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, snap, err := parseSnapshot(args[0])
			switch {
			case err != nil:
				return err
			case timeout <= 0:
				return fmt.Errorf("--timeout %v: it must be longer than 0", timeout)
			case mount == "" && cmd.Flags().Changed("freeze"):
				return errors.New("--freeze needs a mount point")
			}
			return a.snapCreate(cmd.Context(), u, image, snap, mount, timeout)
		},
	}
	cmd.Flags().StringVar(&mount, "freeze", "", "mount point of the image's file system, which takes no writes meanwhile")
	cmd.Flags().DurationVar(&timeout, "timeout", timeout, "how long to wait for the host that has the image attached")
	return a.jsonFlag(cmd)
}

func (a *app) snapCreate(ctx context.Context, u backend.URL, image, snap, mount string, timeout time.Duration) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	id, err := lookNew(ctx, st, u, image, snap)
	if err != nil {
		return err
	}
	var made engine.Snapshot
	create := func(ctx context.Context) (err error) {
		made, err = engine.CreateSnapshot(ctx, st, id, snap, engine.SnapshotOptions{
			Nudge:    a.nudge(id),
			Progress: func(what string) { a.progress.show(api.Progress{What: what}) },
		})
		return err
	}
	if mount == "" {
		ctx, stop := within(ctx, timeout)
		defer stop()
		err = create(ctx)
	} else if err = a.checkFreeze(ctx, u, id, mount); err == nil {
		err = a.whileFrozen(ctx, mount, timeout, create)
	}
	if errors.Is(err, errThawed) {
		err = withdraw(ctx, st, id, snap, err)
	}
	a.progress.end()
	switch {
	case err != nil:
		return notMade(u, image, snap, err)
	case a.json:
		return a.printJSON(made)
	}
	fmt.Fprintf(a.out, "made %s\n", u.Snapshot(image, snap))
	return nil
}

// lookNew returns the id of an image that has no snapshot of that name yet.
func lookNew(ctx context.Context, st backend.Store, u backend.URL, image, snap string) (uuid.UUID, error) {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	info, err := engine.Describe(ctx, st, image)
	if err != nil {
		return uuid.Nil, timedOut(u, noImage(u, image, err))
	}
	for _, s := range info.Snapshots {
		if s.Name == snap {
			return uuid.Nil, snapExists(u, image, snap)
		}
	}
	return info.ID, nil
}

func snapExists(u backend.URL, image, snap string) error {
	return fmt.Errorf("%s exists already: choose another name, or see lsdctl snap ls %s", u.Snapshot(image, snap), u.Image(image))
}

// notMade says why a snapshot was not made.
func notMade(u backend.URL, image, snap string, err error) error {
	if errors.Is(err, engine.ErrSnapshotExists) {
		return snapExists(u, image, snap)
	}
	return fmt.Errorf("%s: %w", u.Snapshot(image, snap), err)
}

// withdraw removes a snapshot that was made too late, because of why.
func withdraw(ctx context.Context, st backend.Store, id uuid.UUID, snap string, why error) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer stop()
	if err := engine.RemoveSnapshot(ctx, st, id, snap); err != nil && !errors.Is(err, engine.ErrNoSnapshot) {
		return fmt.Errorf("%w: it is not what was asked for, and cannot be removed: lsdctl snap rm it: %w", why, err)
	}
	return fmt.Errorf("%w: it is withdrawn", why)
}

// checkFreeze refuses to freeze what has to be written to for a snapshot of the image id to
// be made, and what is not on that image, as far as this host knows.
func (a *app) checkFreeze(ctx context.Context, u backend.URL, id uuid.UUID, mount string) error {
	if u.Scheme == backend.SchemeFile && sameFS(mount, u.Dir) {
		return fmt.Errorf("%s cannot be frozen: the store %s is there", mount, u)
	}
	list, _ := a.attachedHere(ctx)
	disks := disksOf(sysfs, mount)
	for _, im := range list {
		if im.Log != "" && sameFS(mount, im.Log) {
			return fmt.Errorf("%s cannot be frozen: the write log of %s is there", mount, im.URL)
		}
		if im.ImageID == id && !im.ReadOnly && len(disks) > 0 && !slices.Contains(disks, filepath.Base(im.Device)) {
			return fmt.Errorf("%s is on %s, and the image is attached as %s: name a mount point of that", mount, strings.Join(disks, ", "), im.Device)
		}
	}
	return nil
}

// attachedHere returns what is attached here, if a daemon says so soon.
func (a *app) attachedHere(ctx context.Context) ([]api.Image, error) {
	ctx, stop := context.WithTimeout(ctx, nudgeTimeout)
	defer stop()
	return a.client().Images(ctx)
}

// attachment returns the attachment of the image id on this host, or nil.
func (a *app) attachment(ctx context.Context, id uuid.UUID) *api.Image {
	list, _ := a.attachedHere(ctx)
	for i, im := range list {
		if im.ImageID == id && im.Snapshot == uuid.Nil && !im.ReadOnly {
			return &list[i]
		}
	}
	return nil
}

// freeUnused has this host's daemon let go of the image id at once where it is attached for
// programs that speak librbd, and none has it open any more. What keeps it from that shows in
// what is done next.
func (a *app) freeUnused(ctx context.Context, id uuid.UUID) {
	if im := a.attachment(ctx, id); im != nil && im.ID >= api.FirstLibrary && len(im.Clients) == 0 {
		_, _ = a.client().Detach(ctx, im.ID, api.DetachRequest{Timeout: nudgeTimeout}, a.progress.show)
	}
}

// detachFirst says where the image id, which a host has attached, is to be detached.
func (a *app) detachFirst(ctx context.Context, id uuid.UUID, host string) error {
	if im := a.attachment(ctx, id); im != nil {
		return fmt.Errorf("it is attached by %s, here, as %s: lsdctl del %s first", host, im.Device, im.Device)
	}
	return fmt.Errorf("it is attached by %s: lsdctl del it there first", host)
}

// errNotHere says that this host's daemon does not have the image.
var errNotHere = errors.New("the image is not attached here")

// nudge returns what has the image id look at its superblock, and do what that asks for, if
// it is attached here.
func (a *app) nudge(id uuid.UUID) func(context.Context) error {
	elsewhere := false
	return func(ctx context.Context) error {
		if elsewhere {
			return errNotHere
		}
		list, err := a.attachedHere(ctx)
		if err != nil {
			return err
		}
		for _, im := range list {
			if im.ImageID == id && !im.ReadOnly {
				return a.client().Refresh(ctx, im.ID, nil)
			}
		}
		elsewhere = true
		return errNotHere
	}
}

func (a *app) snapLsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls STORE/IMAGE",
		Short: "List the snapshots of an image",
		Long: `List the snapshots of an image, the oldest first. One that is pending has been asked
for, and the host that has the image attached has not made it yet.`,
		Example: `  lsdctl snap ls rados://rbd/vm2
  lsdctl snap ls rados://rbd/vm2 --json`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, err := parseImage(args[0])
			if err != nil {
				return err
			}
			var list []engine.Snapshot
			err = withImage(cmd.Context(), u, image, func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
				list, err = engine.Snapshots(ctx, st, id)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(list)
			}
			return a.table(func(row func(...any)) {
				row("NAME", "SIZE", "CREATED", "STATE")
				for _, s := range list {
					state := "ready"
					if s.Pending {
						state = "pending"
					}
					row(s.Name, bytesize.Human(s.Size), s.Created.Local().Format(time.DateTime), state)
				}
			})
		},
	})
}

// withImage opens the store of an image for a command that looks at it or changes a little
// of it.
func withImage(ctx context.Context, u backend.URL, image string, fn func(context.Context, backend.Store, uuid.UUID) error) error {
	return withStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		id, err := backend.Lookup(ctx, st, image)
		if err == nil {
			err = fn(ctx, st, id)
		}
		return noImage(u, image, err)
	})
}

func (a *app) snapRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm STORE/IMAGE@SNAPSHOT",
		Short: "Remove a snapshot",
		Long: `Remove a snapshot, or withdraw one that is pending. The space that it alone took is
reclaimed by whoever has the image attached, now or next. One that is attached
here is refused; on another host its users would get errors.`,
		Example: "  lsdctl snap rm rados://rbd/vm2@monday",
		Args:    exactArgs("STORE/IMAGE@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, snap, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			return a.snapRm(cmd.Context(), u, image, snap)
		},
	}
}

func (a *app) snapRm(ctx context.Context, u backend.URL, image, snap string) error {
	var nudge func(context.Context) error
	err := withImage(ctx, u, image, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		all, err := engine.Snapshots(ctx, st, id)
		if err != nil {
			return err
		}
		for _, s := range all {
			if s.Name != snap {
				continue
			}
			if err := a.notAttached(ctx, id, s.ID); err != nil {
				return err
			}
		}
		nudge = a.nudge(id)
		return noSnapshot(u, image, engine.RemoveSnapshot(ctx, st, id, snap))
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, nudgeTimeout)
	defer stop()
	_ = nudge(ctx) // the owner sees it by itself, a little later
	return nil
}

// notAttached makes sure that nobody on this host uses a snapshot of the image id; with
// uuid.Nil, any of them. Where no daemon answers nobody does.
func (a *app) notAttached(ctx context.Context, id, snap uuid.UUID) error {
	list, _ := a.attachedHere(ctx)
	for _, im := range list {
		if im.ImageID == id && im.Snapshot != uuid.Nil && (im.Snapshot == snap || snap == uuid.Nil) {
			return fmt.Errorf("the snapshot %s is attached as %s: lsdctl del %s first", im.URL, im.Device, im.Device)
		}
	}
	return nil
}

// noSnapshot says where there are others.
func noSnapshot(u backend.URL, image string, err error) error {
	if errors.Is(err, engine.ErrNoSnapshot) {
		return fmt.Errorf("%w: see lsdctl snap ls %s", err, u.Image(image))
	}
	return err
}

func (a *app) snapRenameCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rename STORE/IMAGE@SNAPSHOT NEW",
		Short: "Give a snapshot another name",
		Long:  "Give a snapshot another name: NEW, or STORE/IMAGE@NEW.",
		Example: `  lsdctl snap rename rados://rbd/vm2@monday last-monday
  lsdctl snap rename rados://rbd/vm2@monday rados://rbd/vm2@last-monday`,
		Args: exactArgs("STORE/IMAGE@SNAPSHOT", "NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, from, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			to, err := parseNewSnapshot(u, image, args[1])
			if err != nil {
				return err
			}
			return withImage(cmd.Context(), u, image, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
				err := engine.RenameSnapshot(ctx, st, id, from, to)
				return noSnapshot(u, image, err)
			})
		},
	}
}

// parseNewSnapshot returns the name of a snapshot of an image in the store u, which may be
// given as a URL.
func parseNewSnapshot(u backend.URL, image, s string) (string, error) {
	if !isURL(s) {
		return s, backend.CheckSnapshotName(s)
	}
	v, other, name, err := parseSnapshot(s)
	if err == nil && (v != u || other != image) {
		err = fmt.Errorf("%s is of another image than %s: a snapshot stays with its image, its new name is enough", s, u.Image(image))
	}
	return name, err
}
