package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/rawfile"
	"github.com/lsd-ceph/lsd/internal/transfer"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// importing says what is imported.
type importing struct {
	path   string // "-": standard input
	format string // "": raw, unless it looks as if it were not
	tmp    string // directory for what is converted
	create engine.CreateOptions
}

// imported is what import --json prints.
type imported struct {
	Name string    `json:"name"`
	ID   uuid.UUID `json:"id"`
	Size uint64    `json:"size_bytes"`
	Data uint64    `json:"data_bytes"`
}

func (a *app) importCommand() *cobra.Command {
	var x importing
	size, block, object := bytesize.Size(0), bytesize.Size(4096), bytesize.Size(engine.DefaultObjectSize)
	cmd := &cobra.Command{
		Use:   "import FILE|- STORE/IMAGE",
		Short: "Make an image of a file, a disk or standard input",
		Long: `Make a new image of a file, a block device, or, for "-", of standard input. The store
must be there. Holes, and blocks of zeroes, take no space.

The image is as large as the file, rounded up to whole blocks, or of --size, if that
is given and is no less; what is beyond the file reads as zeroes. Standard input is
read to its end. If what writes to it may fail before, check that: its end is all
that is seen of it.

A qcow2 file, with those that it is based on, is read by qemu-img, and is to be told by
--format: a disk with raw data on it may look like one. It is unpacked to a file without
a name in --tmp, which needs space for its data.

The image has its name once it is whole. What an import that was interrupted has written
is removed; if that was not possible, lsdctl gc does so. Of a disk that is in use, make a
snapshot, and import that.`,
		Example: `  lsdctl import disk.raw rados://rbd/vm2
  lsdctl import debian-12.qcow2 rados://rbd/debian --format qcow2 --size 20G
  lsdctl import /dev/vg0/vm2-snapshot rados://rbd/vm2
  set -o pipefail; zstd -dc disk.zst | lsdctl import - rados://rbd/vm2`,
		Args: exactArgs("FILE", "STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case cmd.Flags().Changed("size") && size == 0:
				return errors.New("size 0: an image must have at least one block")
			case block > 1<<20 || object > 1<<30:
				return errors.New("block size or object size is beyond all limits: see lsdctl import --help")
			case x.format != "" && x.format != formatRaw && x.format != formatQcow2:
				return fmt.Errorf("--format %s: it must be raw or qcow2", x.format)
			}
			u, name, err := parseImage(args[1])
			if err != nil {
				return err
			}
			x.path = args[0]
			x.create = engine.CreateOptions{Size: uint64(size), BlockSize: uint32(block), ObjectSize: uint32(object)}
			err = a.importFile(cmd.Context(), x, u, name)
			a.progress.end()
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&x.format, "format", "", "raw or qcow2 (default raw)")
	f.StringVar(&x.tmp, "tmp", tmpDir(), "directory in which a qcow2 file is unpacked")
	f.Var(&size, "size", "size of the image (default that of the file)")
	f.Var(&block, "block-size", "logical block: 512 or 4096")
	f.Var(&object, "object-size", "data in one object, 1M to 32M; more than 1M for images beyond 9T")
	return a.jsonFlag(cmd)
}

// tmpDir returns a directory for what may be large.
func tmpDir() string { return env("TMPDIR", "/var/tmp") }

func (a *app) importFile(ctx context.Context, x importing, u backend.URL, name string) error {
	src, err := openSource(x.path)
	if err != nil {
		return err
	}
	defer func() { src.Close() }()
	if x.format == "" && src.Begins("QFI\xfb") {
		return fmt.Errorf("%s looks like a qcow2 file: say --format qcow2, or --format raw if it is a disk that begins so", x.path)
	}
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := nameFree(ctx, st, u, name); err != nil {
		return err
	}
	if x.format == formatQcow2 {
		raw, err := a.unpack(ctx, x.path, x.tmp)
		if err != nil {
			return err
		}
		src.Close()
		src = raw
	}
	made, err := transfer.Import(ctx, st, name, src, x.create, a.transferOptions(u, name))
	a.progress.end()
	switch {
	case errors.Is(err, backend.ErrExists):
		return imageExists(u, name)
	case err != nil:
		return fmt.Errorf("import %s: %w", x.path, timedOut(u, storeFull(u, lostNames(u, err))))
	case a.json:
		return a.printJSON(imported{name, made.ID, made.Size, made.Data})
	}
	fmt.Fprintf(a.out, "made %s of %s, with %s of data: attach it with lsdctl add %s\n", u.Image(name), bytesize.Human(made.Size), bytesize.Human(made.Data), u.Image(name))
	return nil
}

// transferOptions returns how the image name is written.
func (a *app) transferOptions(u backend.URL, name string) transfer.Options {
	return transfer.Options{URL: u.Image(name), Logger: slog.New(slog.DiscardHandler), Progress: func(what string, done, total uint64) {
		if total == 0 && done > 0 {
			what += ", " + bytesize.Human(done)
		}
		a.progress.show(api.Progress{What: what, Done: done, Total: total})
	}}
}

// storeFull says so where err does.
func storeFull(u backend.URL, err error) error {
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT} {
		if errors.Is(err, full) {
			return fmt.Errorf("the store %s is full: %w", u, full)
		}
	}
	return err
}

// openSource opens what is to be imported.
func openSource(path string) (*rawfile.Source, error) {
	if path == "-" {
		return rawfile.New(os.Stdin, "standard input")
	}
	return rawfile.Open(path)
}

// nameFree fails if there is an image of that name, before something takes long for nothing.
func nameFree(ctx context.Context, st backend.Store, u backend.URL, name string) error {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	switch _, err := backend.Lookup(ctx, st, name); {
	case err == nil:
		return imageExists(u, name)
	case !errors.Is(err, backend.ErrNotFound):
		return timedOut(u, err)
	}
	return nil
}
