package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/spf13/cobra"
)

func (a *app) metaCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "meta",
		Short: "Look after the metadata of an image",
		Args:  noSuchCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.metaLsCommand(), a.metaGetCommand(), a.metaSetCommand(), a.metaRmCommand())
	return cmd
}

// onImage parses the URL of an image and does something with it in its store.
func onImage(ctx context.Context, url string, fn func(context.Context, backend.Store, uuid.UUID) error) error {
	u, image, err := parseImage(url)
	if err != nil {
		return err
	}
	return withImage(ctx, u, image, fn)
}

func (a *app) metaLsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls STORE/IMAGE",
		Short: "List the metadata of an image",
		Long: `List the metadata of an image, by key: what those who use it keep with it, as
librbd's metadata. lsd makes nothing of it. Clones and copies begin with it. Values
are quoted where they have more than one line, or what cannot be printed.`,
		Example: `  lsdctl meta ls rados://rbd/vm2
  lsdctl meta ls rados://rbd/vm2 --json`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			list := []engine.Metadatum{}
			err := onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) error {
				found, err := engine.Metadata(ctx, st, id)
				list = append(list, found...)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(list)
			}
			return a.table(func(row func(...any)) {
				row("KEY", "VALUE")
				for _, m := range list {
					row(printable(m.Key), printable(m.Value))
				}
			})
		},
	})
}

// printable returns s as it is, or quoted where it would spoil a table.
func printable(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

func (a *app) metaGetCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "get STORE/IMAGE KEY",
		Short:   "Print a piece of the metadata of an image",
		Long:    "Print what an image has under a key, as it is, and a newline.",
		Example: "  lsdctl meta get rados://rbd/vm2 owner",
		Args:    exactArgs("STORE/IMAGE", "KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			m := engine.Metadatum{Key: args[1]}
			err := onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
				m.Value, err = engine.MetadataOf(ctx, st, id, m.Key)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(m)
			}
			fmt.Fprintln(a.out, m.Value)
			return nil
		},
	})
}

func (a *app) metaSetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "set STORE/IMAGE KEY VALUE",
		Short: "Set a piece of the metadata of an image",
		Long: `Set what an image has under a key, in place of what it had. A key has up to 255 bytes,
a value up to 64K, and all of an image's together up to 1M. The image may be attached
anywhere.`,
		Example: "  lsdctl meta set rados://rbd/vm2 owner 'the database people'",
		Args:    exactArgs("STORE/IMAGE", "KEY", "VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) error {
				return engine.SetMetadata(ctx, st, id, args[1], args[2])
			})
		},
	}
}

func (a *app) metaRmCommand() *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:   "rm STORE/IMAGE KEY",
		Short: "Remove a piece of the metadata of an image, or all",
		Long: `Remove what an image has under a key, or with --all all its metadata. If it is
damaged, which lsdctl check says, --all is the way to go on without it; the locks of
lsdctl lock, which are kept beside it, go with it then.`,
		Example: `  lsdctl meta rm rados://rbd/vm2 owner
  lsdctl meta rm rados://rbd/vm2 --all`,
		Args: func(cmd *cobra.Command, args []string) error {
			if all {
				return cmdline.Args(1, "STORE/IMAGE")(cmd, args)
			}
			return exactArgs("STORE/IMAGE", "KEY")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) error {
				if all {
					return engine.ClearMetadata(ctx, st, id)
				}
				return engine.RemoveMetadata(ctx, st, id, args[1])
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove all metadata, also where it is damaged")
	return cmd
}

func (a *app) lockCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lock",
		Short: "Look after the advisory locks of an image",
		Long: `Look after the advisory locks of an image, which librbd's programs take and which keep
nobody from anything but from such locks. They stay when a program dies. Which host
has an image attached is another matter: lsdctl info says it.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.lockLsCommand(), a.lockBreakCommand())
	return cmd
}

func (a *app) lockLsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls STORE/IMAGE",
		Short: "List the advisory locks of an image",
		Long: `List the advisory locks of an image, in the order in which they were taken. The address
is HOST:0/PID of the process that took the lock.`,
		Example: `  lsdctl lock ls rados://rbd/vm2
  lsdctl lock ls rados://rbd/vm2 --json`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var l engine.Locks
			err := onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) (err error) {
				l, err = engine.LocksOf(ctx, st, id)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				l.Lockers = append([]engine.Locker{}, l.Lockers...)
				return a.printJSON(l)
			}
			return a.printLocks(&l)
		},
	})
}

func (a *app) printLocks(l *engine.Locks) error {
	kind := "shared"
	switch {
	case l.Exclusive:
		kind = "exclusive"
	case l.Tag != "":
		kind = "shared, " + printable(l.Tag)
	}
	return a.table(func(row func(...any)) {
		row("CLIENT", "COOKIE", "ADDRESS", "SINCE", "KIND")
		for _, o := range l.Lockers {
			row(printable(o.Client), printable(o.Cookie), printable(o.Address), o.Since.Local().Format("2006-01-02 15:04:05"), kind)
		}
	})
}

func (a *app) lockBreakCommand() *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:   "break STORE/IMAGE CLIENT COOKIE",
		Short: "Take away an advisory lock of an image",
		Long: `Take away an advisory lock of an image, as lsdctl lock ls has it, or with --all each of
them. Its holder is not told, and goes on: make sure that it is gone.`,
		Example: `  lsdctl lock break rados://rbd/vm2 client.6212070821514244 c1
  lsdctl lock break rados://rbd/vm2 --all`,
		Args: func(cmd *cobra.Command, args []string) error {
			if all {
				return cmdline.Args(1, "STORE/IMAGE")(cmd, args)
			}
			return exactArgs("STORE/IMAGE", "CLIENT", "COOKIE")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return onImage(cmd.Context(), args[0], func(ctx context.Context, st backend.Store, id uuid.UUID) error {
				if all {
					return breakAll(ctx, st, id)
				}
				return engine.Unlock(ctx, st, id, args[1], args[2])
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "take away all locks that there are now")
	return cmd
}

// breakAll takes away the locks that an image has now.
func breakAll(ctx context.Context, st backend.Store, id uuid.UUID) error {
	l, err := engine.LocksOf(ctx, st, id)
	for _, o := range l.Lockers {
		if err == nil {
			err = engine.Unlock(ctx, st, id, o.Client, o.Cookie)
		}
		if errors.Is(err, engine.ErrNoLock) {
			err = nil // its holder has given it up
		}
	}
	return err
}
