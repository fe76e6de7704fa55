package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

func (a *app) diffCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "diff STORE/IMAGE[@FROM] [@TO]",
		Short: "Tell what has changed between two states of an image",
		Long: `Tell which ranges of an image have changed from the snapshot FROM to the snapshot
TO, or to the image as it is now; without FROM, which ranges hold data. Only the map
of the image is read, and of that only where the two differ.

A range that was written has changed, whatever was written. An image that is attached
is compared as far as it has reached the store.`,
		Example: `  lsdctl diff rados://rbd/vm2@monday @tuesday
  lsdctl diff rados://rbd/vm2@monday     # since then
  lsdctl diff rados://rbd/vm2 @monday    # all data of the snapshot
  lsdctl diff rados://rbd/vm2 --json`,
		Args: cmdline.Args(1, "STORE/IMAGE[@FROM]", "@TO"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, from, to, err := parseStates(args)
			if err != nil {
				return err
			}
			return a.diff(cmd.Context(), u, image, from, to)
		},
	})
}

// changed is a range of an image, as diff --json prints it.
type changed struct {
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
	Exists bool   `json:"exists"` // there is data; else it reads as zeroes
}

func (a *app) diff(ctx context.Context, u backend.URL, image, from, to string) error {
	return a.withDiff(ctx, u, image, from, to, func(from, to *engine.View) error {
		a.progress.end()
		out := bufio.NewWriter(a.out)
		print := printTable
		if a.json {
			print = printList
		}
		err := print(out, func(fn func(changed) error) error {
			return engine.Diff(ctx, from, to, func(r engine.Range) error { return fn(changed{r.Offset, r.Length, !r.Zero}) })
		})
		if e := out.Flush(); err == nil {
			err = e
		}
		return err
	})
}

// withDiff opens two states of an image, the first of which is nil if it has no name.
func (a *app) withDiff(ctx context.Context, u backend.URL, image, from, to string, fn func(from, to *engine.View) error) error {
	snaps := []string{to}
	if from != "" {
		snaps = append(snaps, from)
	}
	return a.withStates(ctx, u, image, snaps, func(views []*engine.View) error {
		var before *engine.View
		if from != "" {
			before = views[1]
		}
		return noImage(u, image, fn(before, views[0]))
	})
}

// printTable prints ranges as rbd diff does, as they come: there may be millions.
func printTable(out io.Writer, each func(func(changed) error) error) error {
	const line = "%-16v %-16v %s\n"
	var data, zeroes uint64
	n := 0
	err := each(func(r changed) (err error) {
		if n++; n == 1 {
			fmt.Fprintf(out, line, "OFFSET", "LENGTH", "TYPE")
		}
		if r.Exists {
			data += r.Length
			_, err = fmt.Fprintf(out, line, r.Offset, r.Length, "data")
		} else {
			zeroes += r.Length
			_, err = fmt.Fprintf(out, line, r.Offset, r.Length, "zero")
		}
		return err
	})
	switch {
	case err != nil:
	case n == 0:
		_, err = fmt.Fprintln(out, "nothing")
	default:
		_, err = fmt.Fprintf(out, "%s: %s of data, %s of zeroes\n", plural.Count(n, "range"), bytesize.Human(data), bytesize.Human(zeroes))
	}
	return err
}

// printList prints ranges as JSON, as they come.
func printList(out io.Writer, each func(func(changed) error) error) error {
	sep := "[\n"
	err := each(func(r changed) error {
		b, err := json.Marshal(r)
		if err == nil {
			_, err = fmt.Fprintf(out, "%s  %s", sep, b)
			sep = ",\n"
		}
		return err
	})
	if err == nil && sep == "[\n" {
		_, err = fmt.Fprintln(out, "[]")
	} else if err == nil {
		_, err = fmt.Fprintln(out, "\n]")
	}
	return err
}
