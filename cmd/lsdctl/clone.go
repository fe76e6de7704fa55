package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

// parseSource parses the URL of an image or a snapshot in a store that outlives this
// process. The snapshot's name is empty if it is an image's.
func parseSource(s string) (u backend.URL, image, snap string, err error) {
	u, image, snap, err = backend.ParseSource(s)
	return u, image, snap, notMem(u, err)
}

// cloned is what clone --json prints.
type cloned struct {
	Name     string    `json:"name"`
	ID       uuid.UUID `json:"id"`
	Parent   uuid.UUID `json:"parent"`
	Snapshot string    `json:"snapshot,omitempty"`
}

func (a *app) cloneCommand() *cobra.Command {
	timeout := time.Minute
	cmd := &cobra.Command{
		Use:   "clone STORE/IMAGE[@SNAPSHOT] STORE/NEW",
		Short: "Make a new image that begins as another one is",
		Long: `Make a new image in the same store, NEW or STORE/NEW, that begins as a snapshot of
another image, or as that image is now, whether it is attached or not. It copies
nothing, takes the same time whatever is in the image, and takes space as it is
written to. Both can be written to, and neither sees what is written to the other.

The image and its snapshots may be removed while there are clones: what these
need of it stays until they need it no longer.

Without a snapshot it is as with lsdctl snap create: if another host has the image
attached, that one has to bring it to a state that can be cloned, for which
--timeout is the limit; and what a file system has only in the page cache is not in
it.`,
		Example: `  lsdctl clone rados://rbd/debian@installed rados://rbd/vm2
  lsdctl clone rados://rbd/vm2 vm2-try`,
		Args: exactArgs("STORE/IMAGE[@SNAPSHOT]", "STORE/NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, snap, err := parseSource(args[0])
			if err != nil {
				return err
			}
			name, err := parseNewImage(u, args[1])
			switch {
			case err != nil:
				return err
			case timeout <= 0:
				return fmt.Errorf("--timeout %v: it must be longer than 0", timeout)
			}
			ctx, stop := within(cmd.Context(), timeout)
			defer stop()
			err = a.clone(ctx, u, image, snap, name)
			a.progress.end()
			return err
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", timeout, "how long to wait for the host that has the image attached")
	return a.jsonFlag(cmd)
}

func (a *app) clone(ctx context.Context, u backend.URL, image, snap, name string) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	parent, err := lookUp(ctx, st, u, image)
	if err != nil {
		return err
	}
	id, err := engine.Clone(ctx, st, parent, name, engine.CloneOptions{
		Snapshot: snap,
		SnapshotOptions: engine.SnapshotOptions{
			Nudge:    a.nudge(parent),
			Progress: func(what string) { a.progress.show(api.Progress{What: what}) },
		},
	})
	a.progress.end()
	switch {
	case errors.Is(err, backend.ErrExists):
		return imageExists(u, name)
	case err != nil:
		return noImage(u, image, noSnapshot(u, image, lostNames(u, err)))
	case a.json:
		return a.printJSON(cloned{name, id, parent, snap})
	}
	fmt.Fprintf(a.out, "made %s: attach it with lsdctl add %s\n", u.Image(name), u.Image(name))
	return nil
}

// lookUp returns the id of an image, bounded in time.
func lookUp(ctx context.Context, st backend.Store, u backend.URL, image string) (uuid.UUID, error) {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	id, err := backend.Lookup(ctx, st, image)
	return id, timedOut(u, noImage(u, image, err))
}

func imageExists(u backend.URL, name string) error {
	return fmt.Errorf("%s exists already: choose another name, or see lsdctl info", u.Image(name))
}

// child is a clone of an image, as children --json prints it.
type child struct {
	Name    string    `json:"name,omitempty"` // now
	ID      uuid.UUID `json:"id"`
	MadeAs  string    `json:"made_as"`
	Created time.Time `json:"created"`
	Size    uint64    `json:"size_bytes"` // of the image then
	// Removed says that it has no name any more: clones of it still need the image, or its
	// space is not reclaimed yet.
	Removed bool `json:"removed,omitempty"`
	// Pending says that the image's owner has not yet come to what it begins as.
	Pending bool `json:"pending,omitempty"`
}

func (a *app) childrenCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "children STORE/IMAGE",
		Short: "List the clones of an image",
		Long: `List the clones of an image: the name that each has now, and the one that it was
made under. One that has been removed is listed while clones of it need the image, or
its space is not reclaimed yet.`,
		Example: `  lsdctl children rados://rbd/debian
  lsdctl children rados://rbd/debian --json`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, err := parseImage(args[0])
			if err != nil {
				return err
			}
			list := []child{}
			err = withStore(cmd.Context(), u, func(ctx context.Context, st backend.Store) error {
				info, err := engine.Describe(ctx, st, image)
				if err != nil {
					return noImage(u, image, err)
				}
				list, err = children(ctx, st, info.Clones)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(list)
			}
			return a.printChildren(list)
		},
	})
}

// children returns what there is to be told of clones.
func children(ctx context.Context, st backend.Store, clones []engine.Snapshot) ([]child, error) {
	list := make([]child, 0, len(clones))
	if len(clones) == 0 {
		return list, nil
	}
	names, err := namesByID(ctx, st)
	if err != nil {
		return nil, err
	}
	for _, c := range clones {
		name := names[c.ID]
		list = append(list, child{
			Name: name, ID: c.ID, MadeAs: c.Name, Created: c.Created, Size: c.Size, Removed: name == "" && !c.Pending, Pending: c.Pending,
		})
	}
	return list, nil
}

// namesByID returns the names of the images of a store.
func namesByID(ctx context.Context, st backend.Store) (map[uuid.UUID]string, error) {
	list, err := backend.Names(ctx, st)
	if err != nil {
		return nil, err
	}
	names := make(map[uuid.UUID]string, len(list))
	for _, n := range list {
		names[n.ID] = n.Name
	}
	return names, nil
}

func (a *app) printChildren(list []child) error {
	return a.table(func(row func(...any)) {
		row("NAME", "SIZE", "CREATED", "MADE AS")
		for _, c := range list {
			name := c.Name
			switch {
			case c.Pending:
				name = "pending"
			case c.Removed:
				name = "removed"
			case backend.InTrash(name):
				name += " (in the trash)"
			}
			row(name, bytesize.Human(c.Size), c.Created.Local().Format(time.DateTime), c.MadeAs)
		}
	})
}

// relatives returns the rows of info about what an image was cloned from, and its clones.
func relatives(u backend.URL, i described) (rows [][2]string) {
	switch {
	case i.Parent == uuid.Nil:
	case i.ParentName != "":
		rows = append(rows, [2]string{"cloned from", u.Image(i.ParentName)})
	default:
		rows = append(rows, [2]string{"cloned from", fmt.Sprintf("%s, removed", i.Parent)})
	}
	if n := len(i.Clones); n > 0 {
		rows = append(rows, [2]string{"clones", fmt.Sprintf("%d: see lsdctl children %s", n, u.Image(i.Name))})
	}
	return rows
}
