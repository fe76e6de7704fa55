package main

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

func (a *app) gcCommand() *cobra.Command {
	var remove bool
	age := engine.DefaultGCAge
	cmd := &cobra.Command{
		Use:   "gc STORE",
		Short: "Find what nothing in a store needs any more, and remove it",
		Long: `Find what is left of images that were removed and that no clone needs, and what
commands that were interrupted have left: images that were not made or filled to
their end, once they are older than --age and nobody writes to them, and so copies
that were to go on. It changes nothing unless --remove is given, and
can be used while images are attached. Of an image that was removed while a host had it,
or shortly after, something stays for some minutes, until nothing of that host can
come any more. What comes even later, of a host that stood still for longer than that,
and other objects of images that have neither name nor superblock, go when the last of
them is older than --age, unless clones are made of them. What an image that has a name
does not need any more is not looked for: whoever has that attached reclaims it, now or
next.`,
		Example: `  lsdctl gc rados://rbd
  lsdctl gc rados://rbd --remove`,
		Args: exactArgs("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := parseStore(args[0])
			switch {
			case err != nil:
				return err
			case age <= 0:
				return fmt.Errorf("--age %v: it must be longer than 0", age)
			}
			return a.gc(cmd.Context(), u, remove, age)
		},
	}
	cmd.Flags().BoolVar(&remove, "remove", false, "remove what is found")
	cmd.Flags().DurationVar(&age, "age", age, "how old what somebody has begun to make, or what nothing knows of, must be to count as left behind")
	return a.jsonFlag(cmd)
}

func (a *app) gc(ctx context.Context, u backend.URL, remove bool, age time.Duration) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	var late []string
	list, err := engine.GC(ctx, st, engine.GCOptions{
		DryRun: !remove, Age: age,
		Progress: func(what string) { a.progress.show(api.Progress{What: what}) },
		Late: func(name string, left time.Duration) {
			late = append(late, fmt.Sprintf("%s was removed, and a host may still write something of it: that goes with lsdctl gc %s --remove, in %v or later", name, u, left.Truncate(time.Second)+time.Second))
		},
		Kept: func(id uuid.UUID, why string) {
			late = append(late, fmt.Sprintf("objects of image %s stay, which has neither name nor superblock: %s; lsdctl check %s says what to do", id, why, u))
		},
	})
	a.progress.end()
	switch {
	case err != nil:
		return timedOut(u, lostNames(u, err))
	case a.json:
		return a.printJSON(list)
	}
	if len(list) > 0 {
		err = a.table(func(row func(...any)) {
			row("NAME", "WHAT", "OBJECTS")
			for _, g := range list {
				row(g.Name, g.What, g.Objects)
			}
		})
	}
	fmt.Fprintln(a.out, gcSummary(u, list, remove, age, len(late) > 0))
	for _, line := range late {
		fmt.Fprintln(a.out, line)
	}
	return err
}

// gcSummary tells what was found, and what to do about it. late says that there is something to
// be found later.
func gcSummary(u backend.URL, list []engine.Garbage, remove bool, age time.Duration, late bool) string {
	objects := 0
	for _, g := range list {
		objects += g.Objects
	}
	flags := "--remove"
	if age != engine.DefaultGCAge {
		flags = fmt.Sprintf("--age %v --remove", age)
	}
	switch {
	case len(list) == 0 && late:
		return "nothing is left behind that can go now"
	case len(list) == 0:
		return "nothing is left behind"
	case remove:
		return "removed " + plural.Count(objects, "object")
	}
	return fmt.Sprintf("nothing was changed: lsdctl gc %s %s would remove all that: %s", u, flags, plural.Count(objects, "object"))
}
