package main

import (
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/rbddiff"
	"github.com/spf13/cobra"
)

func (a *app) exportDiffCommand() *cobra.Command {
	var from string
	var force bool
	cmd := &cobra.Command{
		Use:   "export-diff STORE/IMAGE[@SNAPSHOT] FILE",
		Short: "Write what has changed in an image to a file",
		Long: `Write what has changed in an image from the snapshot --from, or from nothing, to a
snapshot, or to the image as its store has it now, to a file, or - for standard output.
It is in the format of rbd export-diff: rbd import-diff applies it to an image of Ceph
that has the snapshot --from. It costs what has changed, however large the image is.

The file appears when it is whole, and an export that fails or is interrupted leaves
nothing.`,
		Example: `  lsdctl export-diff rados://rbd/vm2@monday vm2-monday.diff
  lsdctl export-diff rados://rbd/vm2@tuesday vm2-tuesday.diff --from monday
  lsdctl export-diff rados://rbd/vm2@tuesday - --from monday | ssh backup rbd import-diff - rbd/vm2`,
		Args: exactArgs("STORE/IMAGE[@SNAPSHOT]", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, to, err := parseSource(args[0])
			if err == nil && cmd.Flags().Changed("from") {
				err = backend.CheckSnapshotName(from)
			}
			if err != nil {
				return err
			}
			return a.exportDiff(cmd.Context(), u, image, from, to, args[1], force)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "name of the snapshot from which on changes are written")
	cmd.Flags().BoolVar(&force, "force", false, "replace a FILE that exists")
	return a.jsonFlag(cmd)
}

func (a *app) exportDiff(ctx context.Context, u backend.URL, image, from, to, file string, force bool) error {
	return a.toTarget(file, force, func(t *target) (e exported, err error) {
		if t.device {
			return e, fmt.Errorf("%s is a block device: what has changed goes to a file, or to - for standard output", file)
		}
		err = a.withDiff(ctx, u, image, from, to, func(was, is *engine.View) error {
			e, err = a.writeDiff(ctx, was, is, rbddiff.Header{From: from, To: to, Size: is.Size()}, t)
			return err
		})
		e.Format = formatDiff
		return e, err
	})
}

// writeDiff writes what has changed between two states.
func (a *app) writeDiff(ctx context.Context, from, to *engine.View, h rbddiff.Header, t *target) (exported, error) {
	m, err := a.survey(ctx, from, to, t)
	if err != nil {
		return m.exported, err
	}
	if err := t.open(); err != nil {
		return m.exported, err
	}
	w, err := rbddiff.NewWriter(t, h)
	if err == nil {
		err = engine.DiffData(ctx, from, to, func(r engine.Range, data []byte) error {
			m.show(r)
			if r.Zero {
				return w.Zero(r.Offset, r.Length)
			}
			return w.Data(r.Offset, data)
		})
	}
	if err == nil {
		err = w.Close()
	}
	return m.exported, err
}
