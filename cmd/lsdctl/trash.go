package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

func (a *app) trashCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trash",
		Short: "Move images out of the way, and back",
		Long: `Move images out of the way, so that they can be had back. An image in the trash has
no name: its own is free for another one. It has its id, its data, its snapshots and
its clones, and takes the space that it took. STORE/~ID names it to what reads an
image, or makes a block device of it: add, clone, copy, diff and export.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.trashMvCommand(), a.trashLsCommand(), a.trashRestoreCommand(), a.trashRmCommand(), a.trashPurgeCommand())
	return cmd
}

func (a *app) trashMvCommand() *cobra.Command {
	var o engine.TrashOptions
	cmd := &cobra.Command{
		Use:   "mv STORE/IMAGE",
		Short: "Move an image to the trash",
		Long: `Move an image to the trash. For the time that --for says it is removed from there
with --force alone. One that is attached is refused; with --force its users go on.`,
		Example: `  lsdctl trash mv rados://rbd/vm2
  lsdctl trash mv rados://rbd/vm2 --for 168h`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, name, err := parseImage(args[0])
			if err != nil {
				return err
			}
			return a.trashMv(cmd.Context(), u, name, o)
		},
	}
	cmd.Flags().DurationVar(&o.Keep, "for", 0, "how long it is to be kept")
	cmd.Flags().BoolVar(&o.Attached, "force", false, "also an image that is attached")
	return a.jsonFlag(cmd)
}

func (a *app) trashMv(ctx context.Context, u backend.URL, name string, o engine.TrashOptions) error {
	o.URL = u.Image(name)
	var t engine.Trashed
	err := withStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		if id, err := backend.Lookup(ctx, st, name); err == nil {
			a.freeUnused(ctx, id)
		}
		id, err := engine.MoveToTrash(ctx, st, name, o)
		var owned *engine.OwnedError
		if errors.As(err, &owned) && !owned.Command {
			return fmt.Errorf("%s is attached by %s: detach it there with lsdctl del; --force moves it all the same", o.URL, owned.Host)
		}
		if err == nil {
			t, err = engine.InTrash(ctx, st, id)
		}
		return noImage(u, name, err)
	})
	switch {
	case err != nil:
		return err
	case a.json:
		return a.printJSON(t)
	}
	fmt.Fprintf(a.out, "moved %s to the trash: lsdctl trash restore %s gives it its name back\n", o.URL, u.Image(t.ID.String()))
	return nil
}

func (a *app) trashLsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls STORE",
		Short: "List the images in the trash",
		Example: `  lsdctl trash ls rados://rbd
  lsdctl trash ls rados://rbd --json`,
		Args: exactArgs("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := parseStore(args[0])
			if err != nil {
				return err
			}
			var list []engine.Trashed
			err = withStore(cmd.Context(), u, func(ctx context.Context, st backend.Store) error {
				if list, err = engine.Trash(ctx, st); err == nil && len(list) == 0 {
					err = noNames(ctx, st, u)
				}
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(list)
			}
			return a.printTrash(list)
		},
	})
}

func (a *app) printTrash(list []engine.Trashed) error {
	return a.table(func(row func(...any)) {
		row("ID", "NAME", "SIZE", "MOVED", "KEPT UNTIL", "ATTACHED BY")
		for _, t := range list {
			if t.Error != "" {
				row(t.ID, orDash(t.Name), "?", "?", "?", "error: "+t.Error)
				continue
			}
			row(t.ID, t.Name, bytesize.Human(t.Size), t.Since.Local().Format(time.DateTime), t.Until.Local().Format(time.DateTime), orDash(t.Owner))
		}
	})
}

// parseTrashed parses the URL of an image in the trash: STORE/ID, STORE/~ID or STORE/NAME.
func parseTrashed(s string) (u backend.URL, which string, err error) {
	u, which, snap, err := parseSource(s)
	if err == nil && snap != "" {
		err = fmt.Errorf("%s is a snapshot's URL, and an image in the trash is wanted", s)
	}
	return u, strings.TrimPrefix(which, "~"), err
}

// inTrash finds an image in the trash by its id, or by the name that it had.
func inTrash(ctx context.Context, st backend.Store, u backend.URL, which string) (engine.Trashed, error) {
	if id, err := uuid.Parse(which); err == nil {
		t, err := engine.InTrash(ctx, st, id)
		if !errors.Is(err, backend.ErrNotFound) || errors.Is(err, engine.ErrRemoved) {
			t.ID = id
			return t, trashError(u, which, err)
		}
	}
	list, err := engine.Trash(ctx, st)
	if err != nil {
		return engine.Trashed{}, err
	}
	var found engine.Trashed
	var ids []string
	for _, t := range list {
		if t.Name == which {
			found = t
			ids = append(ids, t.ID.String())
		}
	}
	switch len(ids) {
	case 0:
		return found, trashError(u, which, backend.ErrNotFound)
	case 1:
		return found, nil
	}
	return found, fmt.Errorf("%d images in the trash of %s were called %s: say which one, by its id: %s", len(ids), u, which, strings.Join(ids, ", "))
}

// trashError says which image is not in the trash, or what is wrong with it.
func trashError(u backend.URL, which string, err error) error {
	var owned *engine.OwnedError
	switch {
	case err == nil, errors.Is(err, engine.ErrRemoved):
		return nil
	case errors.Is(err, backend.ErrNotFound):
		return fmt.Errorf("%s is not in the trash of %s: see lsdctl trash ls %s", which, u, u)
	case errors.As(err, &owned) && !owned.Command:
		return fmt.Errorf("%s in the trash of %s is attached by %s: detach it there with lsdctl del; if that host is gone for good, lsdctl trash restore it, and lsdctl rm --force", which, u, owned.Host)
	}
	return fmt.Errorf("%s in the trash of %s: %w", which, u, err)
}

func (a *app) trashRestoreCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "restore STORE/ID|STORE/NAME [NEW]",
		Short: "Bring an image back from the trash",
		Long: `Bring an image back from the trash, with the name that it had, or with another one,
NEW or STORE/NEW. It is named by its id, or by the name that it had if no other one
in the trash had that.`,
		Example: `  lsdctl trash restore rados://rbd/vm2
  lsdctl trash restore rados://rbd/2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0 vm2-old`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return exactArgs("STORE/ID")(cmd, args)
			}
			return exactArgs("STORE/ID", "NEW")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			u, which, err := parseTrashed(args[0])
			if err != nil {
				return err
			}
			name := ""
			if len(args) > 1 {
				if name, err = parseNewImage(u, args[1]); err != nil {
					return err
				}
			}
			return a.trashRestore(cmd.Context(), u, which, name)
		},
	}
}

func (a *app) trashRestore(ctx context.Context, u backend.URL, which, name string) error {
	err := withStore(ctx, u, func(ctx context.Context, st backend.Store) error {
		t, err := inTrash(ctx, st, u, which)
		if err != nil {
			return err
		}
		to, err := engine.RestoreFromTrash(ctx, st, t.ID, name)
		switch {
		case errors.Is(err, backend.ErrExists) && name == "":
			return fmt.Errorf("there is another %s now: give the image another name, lsdctl trash restore %s NEW", t.Name, u.Image(t.ID.String()))
		case errors.Is(err, backend.ErrExists):
			return imageExists(u, name)
		case errors.Is(err, engine.ErrRemoved):
			return fmt.Errorf("%s: %w", which, engine.ErrRemoved)
		}
		name = to
		return trashError(u, which, err)
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "%s is back\n", u.Image(name))
	return nil
}

func (a *app) trashRmCommand() *cobra.Command {
	var o rmOptions
	cmd := &cobra.Command{
		Use:   "rm STORE/ID|STORE/NAME",
		Short: "Remove an image that is in the trash",
		Long: `Remove an image that is in the trash, for good, as lsdctl rm does. One that is to be
kept still is refused, unless --force is given; one that has snapshots, unless
--snapshots says that they go with it; and one that is attached always.`,
		Example: `  lsdctl trash rm rados://rbd/vm2
  lsdctl trash rm rados://rbd/2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0 --force --snapshots`,
		Args: exactArgs("STORE/ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, which, err := parseTrashed(args[0])
			switch {
			case err != nil:
				return err
			case o.wait && o.noWait:
				return errors.New("--wait and --no-wait: give one of them")
			}
			return a.trashRm(cmd.Context(), u, which, o)
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "also an image that is to be kept still, or damaged")
	cmd.Flags().BoolVar(&o.Snapshots, "snapshots", false, "also an image that has snapshots: they go with it")
	cmd.Flags().BoolVar(&o.wait, "wait", false, "reclaim its space before the command ends")
	cmd.Flags().BoolVar(&o.noWait, "no-wait", false, "leave its space to lsdctl gc")
	return a.jsonFlag(cmd)
}

func (a *app) trashRm(ctx context.Context, u backend.URL, which string, o rmOptions) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	find, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	t, err := inTrash(find, st, u, which)
	if err != nil {
		return timedOut(u, err)
	}
	r := removedImage{Name: t.Name, ID: t.ID}
	err = a.removeTrashed(ctx, u, st, &r, o, time.Time{})
	if a.json && r.Space != "" {
		return errors.Join(a.printJSON(r), err)
	}
	if err == nil {
		fmt.Fprintf(a.out, "removed %s\n%s\n", r.called(), r.remark(u))
	}
	return err
}

// called returns what the image is called in messages.
func (r *removedImage) called() string {
	if r.Name == "" {
		return r.ID.String()
	}
	return fmt.Sprintf("%s, %s,", r.Name, r.ID)
}

// removeTrashed removes an image in the trash, and sees to its space. What is to be kept until at
// or less need not be kept any more; zero is now.
func (a *app) removeTrashed(ctx context.Context, u backend.URL, st backend.Store, r *removedImage, o rmOptions, at time.Time) error {
	o.URL = u.Image(backend.TrashName(r.ID))
	a.freeUnused(ctx, r.ID)
	if o.Snapshots {
		if err := a.notAttached(ctx, r.ID, uuid.Nil); err != nil {
			return err
		}
	}
	err := engine.RemoveFromTrash(ctx, st, r.ID, engine.RemoveTrashedOptions{
		URL: o.URL, Force: o.Force, At: at, Snapshots: o.Snapshots, Progress: func(_, _ int) { r.Objects++ },
	})
	if err != nil {
		return trashError(u, r.ID.String(), err)
	}
	why := a.space(ctx, u, st, r, o)
	a.progress.end()
	if why != nil {
		return fmt.Errorf("%s is removed, but its space is not all reclaimed: %w: lsdctl gc %s --remove does the rest", o.URL, why, u)
	}
	return nil
}

func (a *app) trashPurgeCommand() *cobra.Command {
	var ahead time.Duration
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "purge STORE",
		Short: "Remove what need not be kept any more from the trash",
		Long: `Remove the images in the trash that need not be kept any more, for good; with --within
also those that need not be in that time. Those that are attached or have snapshots
are left, and named; --dry-run shows what would be removed, and changes nothing.`,
		Example: `  lsdctl trash purge rados://rbd --dry-run
  lsdctl trash purge rados://rbd --within 24h`,
		Args: exactArgs("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := parseStore(args[0])
			switch {
			case err != nil:
				return err
			case ahead < 0:
				return fmt.Errorf("--within %v: it must be 0 or more", ahead)
			}
			return a.trashPurge(cmd.Context(), u, time.Now().Add(ahead), dryRun)
		},
	}
	cmd.Flags().DurationVar(&ahead, "within", 0, "also what need not be kept any more in this time")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "change nothing")
	return a.jsonFlag(cmd)
}

func (a *app) trashPurge(ctx context.Context, u backend.URL, at time.Time, dryRun bool) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	look, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	due, err := engine.DueInTrash(look, st, at)
	switch {
	case err != nil:
		return timedOut(u, err)
	case dryRun && a.json:
		return a.printJSON(due)
	case dryRun:
		err = a.printTrash(due)
		fmt.Fprintf(a.out, "nothing was changed: without --dry-run %s would be removed\n", plural.Count(len(due), "image"))
		return err
	}
	removed, left := []removedImage{}, 0
	for _, t := range due {
		r := removedImage{Name: t.Name, ID: t.ID}
		if err := a.removeTrashed(ctx, u, st, &r, rmOptions{}, at); err != nil {
			left++
			r.Error = err.Error()
		}
		if removed = append(removed, r); !a.json {
			fmt.Fprintln(a.out, r.purged())
		}
		if ctx.Err() != nil {
			break
		}
	}
	if a.json {
		err = a.printJSON(removed)
	} else {
		fmt.Fprintf(a.out, "removed %s from the trash\n", plural.Count(len(removed)-left, "image"))
	}
	if left > 0 {
		err = errors.Join(err, fmt.Errorf("%s could not be removed", plural.Count(left, "image")))
	}
	return err
}

// purged tells what a purge has done with the image.
func (r *removedImage) purged() string {
	if r.Error != "" {
		return fmt.Sprintf("left %s: %s", r.called(), r.Error)
	}
	return fmt.Sprintf("removed %s", strings.TrimSuffix(r.called(), ","))
}
