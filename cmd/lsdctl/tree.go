package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

func (a *app) treeCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "tree STORE[/IMAGE]",
		Short: "Show which images were cloned from which",
		Long: `Show the images of a store as trees: below each image its clones, and of which
snapshot, or when, they were made; or show the tree that an image is in, which is
marked. What was removed, and is there because its clones need it, is shown as well.
ALONE is the data in the store that an image refers to, or its snapshots, and no
other; SHARED is what it shares with others, as lsdctl df tells it.`,
		Example: `  lsdctl tree rados://rbd
  lsdctl tree rados://rbd/golden --json`,
		Args: exactArgs("STORE[/IMAGE]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, st, of, err := openEither(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer st.Close()
			usage, err := a.measure(cmd.Context(), u, st, of)
			if err != nil {
				return err
			}
			trees := growTrees(usage.Images, of)
			if a.json {
				return a.printJSON(trees)
			}
			return a.printTrees(trees)
		},
	})
}

// openEither opens the store of that URL, or of the image of that URL, of which it returns the
// id.
func openEither(ctx context.Context, url string) (backend.URL, backend.Store, uuid.UUID, error) {
	u, name, err := parseImage(url)
	if err == nil {
		var st backend.Store
		if st, err = openWithin(ctx, u, open.Store); err == nil {
			id, lerr := lookUp(ctx, st, u, name)
			if lerr == nil {
				return u, st, id, nil
			}
			err = errors.Join(lerr, st.Close())
		}
	}
	s, serr := parseStore(url)
	if serr != nil {
		return u, nil, uuid.Nil, err
	}
	st, serr := openWithin(ctx, s, open.Store)
	if errors.Is(serr, backend.ErrNotFound) || err != nil && errors.Is(serr, backend.ErrPermanent) {
		return s, nil, uuid.Nil, fmt.Errorf("%s is neither an image nor a store: see lsdctl ls", url)
	}
	return s, st, uuid.Nil, timedOut(s, serr)
}

// tree is an image, and its clones below it, as tree --json prints it.
type tree struct {
	engine.ImageUsage
	Marked bool    `json:"marked,omitempty"` // it was asked for
	Clones []*tree `json:"clones,omitempty"`
}

// growTrees returns the trees that images are in, which are sorted; the branches are, too.
func growTrees(images []engine.ImageUsage, marked uuid.UUID) []*tree {
	byID := make(map[uuid.UUID]*tree, len(images))
	for _, im := range images {
		byID[im.ID] = &tree{ImageUsage: im, Marked: im.ID == marked}
	}
	roots := []*tree{}
	for _, im := range images {
		t, parent := byID[im.ID], byID[im.Parent]
		if parent == nil || below(byID, parent, im.ID) {
			roots = append(roots, t)
			continue
		}
		parent.Clones = append(parent.Clones, t)
	}
	return roots
}

// below reports whether an image is its own ancestor, as only damaged superblocks say: it is,
// or is below, t.
func below(byID map[uuid.UUID]*tree, t *tree, id uuid.UUID) bool {
	for n := 0; t != nil && n <= len(byID); n++ {
		if t.ID == id {
			return true
		}
		t = byID[t.Parent]
	}
	return t != nil
}

func (a *app) printTrees(trees []*tree) error {
	return a.table(func(row func(...any)) {
		row("NAME", "CLONED FROM", "PROVISIONED", "ALONE", "SHARED")
		for _, t := range trees {
			t.print(row, "", "")
		}
	})
}

// print prints the tree: its root behind a prefix, and what is below it behind another one.
func (t *tree) print(row func(...any), prefix, rest string) {
	name := shownName(t.ImageUsage)
	if t.Marked {
		name += " *"
	}
	if t.Error != "" {
		row(prefix+name, "error: "+t.Error)
	} else {
		row(prefix+name, t.from(), bytesize.Human(t.Provisioned), bytesize.Human(t.Alone), bytesize.Human(t.Shared))
	}
	for i, c := range t.Clones {
		if i < len(t.Clones)-1 {
			c.print(row, rest+"├─ ", rest+"│  ")
		} else {
			c.print(row, rest+"└─ ", rest+"   ")
		}
	}
}

// from tells of what the image was cloned.
func (t *tree) from() string {
	switch {
	case t.Snapshot != "":
		return "@" + t.Snapshot
	case !t.Cloned.IsZero():
		return "as of " + t.Cloned.Local().Format(time.DateTime)
	case t.Parent != uuid.Nil:
		return "what was removed"
	}
	return "-"
}
