package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

// Formats of what is exported.
const (
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
	formatDiff  = "rbd diff v1"
)

// exported is what export and export-diff print with --json.
type exported struct {
	File   string `json:"file"`
	Format string `json:"format"`
	Size   uint64 `json:"size_bytes"`           // of the image
	Data   uint64 `json:"data_bytes"`           // that were read of it
	Zeroes uint64 `json:"zero_bytes,omitempty"` // of ranges that have become zeroes
}

func (a *app) exportCommand() *cobra.Command {
	var force bool
	format := ""
	cmd := &cobra.Command{
		Use:   "export STORE/IMAGE[@SNAPSHOT] FILE",
		Short: "Write an image to a file",
		Long: `Write a snapshot of an image, or the image as its store has it now, to a file, a
block device, or - for standard output. It does not have to be attached. If it is, what
is in the write log alone is not exported, and an export that takes long may find that
its owner has gone on: make a snapshot, and export that.

A file is sparse: it takes as much space as there is data. It appears when it is
whole, and an export that fails or is interrupted leaves nothing. With --format qcow2,
or a FILE that ends in .qcow2, it is converted by qemu-img, for which all data is
written twice in the directory of FILE.`,
		Example: `  lsdctl export rados://rbd/vm2@monday vm2.raw
  lsdctl export rados://rbd/vm2@monday vm2.qcow2
  lsdctl export rados://rbd/vm2@monday /dev/sdx --force
  lsdctl export rados://rbd/vm2@monday - | zstd > vm2.raw.zst`,
		Args: exactArgs("STORE/IMAGE[@SNAPSHOT]", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, snap, err := parseSource(args[0])
			if err != nil {
				return err
			}
			format, err := formatOf(format, args[1])
			if err != nil {
				return err
			}
			return a.export(cmd.Context(), u, image, snap, args[1], format, force)
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "raw or qcow2 (default: by the end of FILE's name, else raw)")
	cmd.Flags().BoolVar(&force, "force", false, "replace a FILE that exists, or overwrite a block device")
	return a.jsonFlag(cmd)
}

// formatOf returns the format in which a file is to be written, for which there is what it
// takes.
func formatOf(format, file string) (string, error) {
	if format == "" {
		format = formatRaw
		if strings.EqualFold(filepath.Ext(file), "."+formatQcow2) {
			format = formatQcow2
		}
	}
	switch {
	case format == formatRaw:
		return format, nil
	case format != formatQcow2:
		return "", fmt.Errorf("--format %s: it is raw or qcow2", format)
	case file == stdout:
		return "", errors.New("qcow2 cannot be written to standard output: name a file, or export it as raw")
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return "", errors.New("qcow2 is written by qemu-img, which is not installed: apt install qemu-utils, or use --format raw")
	}
	return format, nil
}

// toTarget opens FILE, has it written, and makes it what was to be.
func (a *app) toTarget(file string, force bool, write func(*target) (exported, error)) error {
	if a.json && file == stdout {
		return errors.New("--json and what is exported cannot both go to standard output")
	}
	t, err := a.newTarget(file, force)
	if err != nil {
		return err
	}
	defer t.drop()
	e, err := write(t)
	if err == nil {
		err = t.finish()
	}
	a.progress.end()
	e.File = file
	switch {
	case err != nil || t.stream != nil:
		return err
	case a.json:
		return a.printJSON(e)
	}
	what := fmt.Sprintf("%s of data", bytesize.Human(e.Data))
	if e.Format == formatDiff {
		what += fmt.Sprintf(" and %s of zeroes", bytesize.Human(e.Zeroes))
	}
	fmt.Fprintf(a.out, "wrote %s: %s, of an image of %s\n", file, what, bytesize.Human(e.Size))
	return nil
}

func (a *app) export(ctx context.Context, u backend.URL, image, snap, file, format string, force bool) error {
	return a.toTarget(file, force, func(t *target) (e exported, err error) {
		if t.device && format != formatRaw {
			return e, fmt.Errorf("%s is a block device, which takes --format raw alone", file)
		}
		err = a.withDiff(ctx, u, image, "", snap, func(_, v *engine.View) error {
			e, err = a.exportRaw(ctx, v, t)
			return err
		})
		if err == nil && format == formatQcow2 {
			err = a.convert(ctx, t)
		}
		e.Format = format
		return e, err
	})
}

// exportRaw writes all of a state of an image.
func (a *app) exportRaw(ctx context.Context, v *engine.View, t *target) (exported, error) {
	m, err := a.survey(ctx, nil, v, t)
	if err != nil {
		return m.exported, err
	}
	if err := t.open(); err != nil {
		return m.exported, err
	}
	if err := t.begin(v.Size()); err != nil {
		return m.exported, err
	}
	at := uint64(0)
	err = engine.DiffData(ctx, nil, v, func(r engine.Range, data []byte) error {
		if err := t.zero(at, r.Offset-at); err != nil {
			return err
		}
		at = r.Offset + r.Length
		m.show(r)
		return t.data(r.Offset, data)
	})
	if err == nil {
		err = t.zero(at, v.Size()-at)
	}
	return m.exported, err
}

// measured is how much there is to export, and how far that has come.
type measured struct {
	exported
	done     uint64 // bytes of data
	what     string
	progress *progress
}

// survey finds out how much has changed between two states, which it takes to read the map.
func (a *app) survey(ctx context.Context, from, to *engine.View, t *target) (*measured, error) {
	m := &measured{exported: exported{Size: to.Size()}, what: "writing " + t.name, progress: a.progress}
	if t.stream != nil {
		m.what = "exporting"
	}
	err := engine.Diff(ctx, from, to, func(r engine.Range) error {
		if r.Zero {
			m.Zeroes += r.Length
		} else {
			m.Data += r.Length
		}
		a.progress.show(api.Progress{What: "reading the map", Done: r.Offset, Total: to.Size()})
		return nil
	})
	return m, err
}

// show shows that data of a range has been read.
func (m *measured) show(r engine.Range) {
	if !r.Zero {
		m.done += r.Length
	}
	m.progress.show(api.Progress{What: m.what, Done: m.done, Total: m.Data})
}

// convert makes qcow2 of the raw file that a target has been written as, and which is one of
// its parts.
func (a *app) convert(ctx context.Context, t *target) error {
	a.progress.show(api.Progress{What: "converting " + t.name})
	raw := t.f
	defer raw.Close()
	f, err := t.newPart()
	if err != nil {
		return err
	}
	t.f = f
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-f", formatRaw, "-O", formatQcow2, raw.Name(), f.Name())
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("qemu-img: %w: %s: nothing of %s is kept", err, api.OneLine(errors.New(string(out))), t.name)
	}
	return nil
}
