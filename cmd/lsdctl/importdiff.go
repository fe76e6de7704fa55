package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/transfer"
	"github.com/spf13/cobra"
)

// importedDiff is what import-diff --json prints.
type importedDiff struct {
	Name   string    `json:"name"`
	ID     uuid.UUID `json:"id"`
	From   string    `json:"from,omitempty"`
	To     string    `json:"to,omitempty"`
	Size   uint64    `json:"size_bytes"` // of the disk, by the diff
	Data   uint64    `json:"data_bytes"`
	Zeroes uint64    `json:"zero_bytes"`
}

func (a *app) importDiffCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "import-diff FILE|- STORE/IMAGE",
		Short: "Apply what export-diff has written to an image",
		Long: `Apply a file, or standard input, that lsdctl export-diff or rbd export-diff has written
to an image that is not attached: its data and zeroes, its size, in whole blocks, and
then the snapshot that it leads to, if it names one.

The image must have the snapshot that the file begins with, and be what it was then; for
a file that begins with none, it must hold no data. With --force that is not looked at,
and the image may become something that never was.

A file is read to its end first, and one that is damaged or cut off changes nothing; with
standard input that shows when it is too late. If something was changed and not all of
it, the message says so: lsdctl snap rollback to the snapshot before brings the image
back; to apply the same file again with --force is good as well.`,
		Example: `  lsdctl create rados://rbd/vm2 --size 20G
  lsdctl import-diff vm2-monday.diff rados://rbd/vm2
  ssh backup rbd export-diff --from-snap monday rbd/vm2@tuesday - | lsdctl import-diff - rados://rbd/vm2`,
		Args: exactArgs("FILE", "STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, name, err := parseImage(args[1])
			if err != nil {
				return err
			}
			err = a.importDiff(cmd.Context(), args[0], u, name, force)
			a.progress.end()
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if the image has changed since the snapshot that the file begins with")
	return a.jsonFlag(cmd)
}

func (a *app) importDiff(ctx context.Context, path string, u backend.URL, name string, force bool) error {
	f, label := os.Stdin, "standard input"
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return err
		}
		defer f.Close()
		label = path
	}
	r := a.countReads(ctx, f)
	if r.total > 0 {
		r.what = "checking " + label
		if _, err := transfer.CheckDiff(r); err != nil {
			return fmt.Errorf("%s: %w", label, err)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("%s: %w", label, err)
		}
		r.done = 0
	}
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	id, err := lookUp(ctx, st, u, name)
	if err != nil {
		return err
	}
	r.what = "applying " + label
	d, err := transfer.ApplyDiff(ctx, st, id, r, force, a.transferOptions(u, name))
	a.progress.end()
	switch {
	case err != nil:
		return a.notApplied(ctx, u, name, id, label, d, err)
	case a.json:
		return a.printJSON(importedDiff{name, id, d.From, d.To, d.Size, d.Data, d.Zeroes})
	}
	now := u.Image(name)
	if d.To != "" {
		now = u.Snapshot(name, d.To)
	}
	fmt.Fprintf(a.out, "applied %s: %s is there, of %s, with %s of data changed\n", label, now, bytesize.Human(d.Size), bytesize.Human(d.Data))
	return nil
}

// notApplied says what has become of a diff, and what to do.
func (a *app) notApplied(ctx context.Context, u backend.URL, name string, id uuid.UUID, label string, d transfer.Diff, err error) error {
	var owned *engine.OwnedError
	var part *transfer.PartError
	url := u.Image(name)
	switch {
	case errors.As(err, &owned) && owned.Command:
		return err
	case errors.As(err, &owned):
		return fmt.Errorf("%s: %w", url, a.detachFirst(ctx, id, owned.Host))
	case errors.As(err, &part):
		back := fmt.Sprintf("lsdctl snap rollback %s brings it back", u.Snapshot(name, d.From))
		if d.From == "" {
			back = "lsdctl rm it"
		}
		return fmt.Errorf("%s holds part of %s: %w: %s, or apply all of it with --force", url, label, storeFull(u, part.Err), back)
	case errors.Is(err, transfer.ErrOtherState):
		return fmt.Errorf("%s, %s: %w: see lsdctl snap rollback; --force applies it all the same", url, label, err)
	case errors.Is(err, engine.ErrNoSnapshot) || errors.Is(err, engine.ErrSnapshotExists):
		return fmt.Errorf("%s, %s: %w: see lsdctl snap ls %s", url, label, err, url)
	}
	return fmt.Errorf("%s, %s: %w", url, label, timedOut(u, err))
}

// countedReader shows how far a file has been read.
type countedReader struct {
	r           io.Reader
	show        func(api.Progress)
	what        string
	done, total uint64 // bytes; total is 0 if that is not known
}

// countReads returns a reader of f, with its size if it is a file. Reads end with ctx.
func (a *app) countReads(ctx context.Context, f *os.File) *countedReader {
	r := &countedReader{r: transfer.Interruptible(ctx, f), show: a.progress.show}
	at, err := f.Seek(0, io.SeekCurrent)
	if info, serr := f.Stat(); serr == nil && info.Mode().IsRegular() && err == nil && at == 0 {
		r.total = uint64(info.Size())
	}
	return r
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.done += uint64(n)
	what := r.what
	if r.total == 0 {
		what += ", " + bytesize.Human(r.done)
	}
	r.show(api.Progress{What: what, Done: r.done, Total: r.total})
	return n, err
}
