package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

// storeTimeout bounds commands that only look into a store.
const storeTimeout = 30 * time.Second

// parseImage parses the URL of an image in a store that outlives this process.
func parseImage(s string) (backend.URL, string, error) {
	u, name, err := backend.ParseImage(s)
	return u, name, notMem(u, err)
}

// parseStore parses the URL of a store that outlives this process.
func parseStore(s string) (backend.URL, error) {
	u, err := backend.ParseStore(s)
	return u, notMem(u, err)
}

func notMem(u backend.URL, err error) error {
	if err == nil && u.Scheme == backend.SchemeMem {
		err = errors.New("a mem: store lives and dies with one process: it is for tests")
	}
	return err
}

// openStore opens a store that must be there, bounded in time; the store outlives that.
func openStore(ctx context.Context, u backend.URL) (backend.Store, error) {
	st, err := openWithin(ctx, u, open.Store)
	if errors.Is(err, backend.ErrNotFound) {
		return nil, fmt.Errorf("there is no store at %s: lsdctl create makes one", u)
	}
	return st, timedOut(u, err)
}

// openWithin opens a store, bounded in time; the store outlives that.
func openWithin(ctx context.Context, u backend.URL, fn func(context.Context, backend.URL) (backend.Store, error)) (backend.Store, error) {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	return fn(ctx, u)
}

// timedOut makes an error of a store that does not answer in time readable.
func timedOut(u backend.URL, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the store %s does not answer", u)
	}
	return err
}

func (a *app) createCommand() *cobra.Command {
	var o engine.CreateOptions
	bytes, block, object := bytesize.Size(0), bytesize.Size(4096), bytesize.Size(engine.DefaultObjectSize)
	cmd := &cobra.Command{
		Use:   "create STORE/IMAGE --size SIZE",
		Short: "Make an empty image",
		Long:  "Make an empty image of up to 64T. It takes space in the store as it is written to.",
		Example: `  lsdctl create rados://rbd/vm2 --size 20G
  lsdctl create rados://pool/namespace/vm2?id=lsd --size 1T
  lsdctl create file:///var/lib/lsd/store/vm1 --size 20G --block-size 512`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("size") {
				return errors.New("--size is missing: see lsdctl create --help")
			}
			if block > 1<<20 || object > 1<<30 {
				return errors.New("block size or object size is beyond all limits: see lsdctl create --help")
			}
			o.Size, o.BlockSize, o.ObjectSize = uint64(bytes), uint32(block), uint32(object)
			return a.create(cmd.Context(), args[0], o)
		},
	}
	f := cmd.Flags()
	f.Var(&bytes, "size", "size of the disk, a multiple of the block size")
	f.Var(&block, "block-size", "logical block: 512 or 4096")
	f.Var(&object, "object-size", "data in one object, 1M to 32M; more than 1M for images beyond 9T")
	return cmd
}

func (a *app) create(ctx context.Context, url string, o engine.CreateOptions) error {
	u, name, err := parseImage(url)
	if err != nil {
		return err
	}
	// Tried on nothing first: a bad size must not leave a new store behind.
	if _, err := engine.Create(ctx, mem.New(), name, o); err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	st, err := open.Store(ctx, u)
	made := false
	if errors.Is(err, backend.ErrNotFound) {
		made = true
		st, err = open.CreateStore(ctx, u)
	}
	if err != nil {
		return timedOut(u, err)
	}
	defer st.Close()
	if _, err := engine.Create(ctx, st, name, o); err != nil {
		if errors.Is(err, backend.ErrExists) {
			return imageExists(u, name)
		}
		return timedOut(u, lostNames(u, err))
	}
	if made {
		fmt.Fprintf(a.out, "made the store %s\n", u)
	}
	fmt.Fprintf(a.out, "made %s of %s: attach it with lsdctl add %s\n", u.Image(name), bytesize.Human(o.Size), u.Image(name))
	return nil
}

// withStore opens the store of an image's URL for a command that looks at it.
func withStore(ctx context.Context, u backend.URL, fn func(context.Context, backend.Store) error) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	return timedOut(u, fn(ctx, st))
}

// listed is a line of ls. An image that cannot be read has an error.
type listed struct {
	engine.Info
	Error string `json:"error,omitempty"`
}

func (a *app) lsCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "ls STORE",
		Short: "List the images of a store",
		Example: `  lsdctl ls rados://rbd
  lsdctl ls file:///var/lib/lsd/store --json`,
		Args: exactArgs("STORE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := parseStore(args[0])
			if err != nil {
				return err
			}
			list := []listed{}
			err = withStore(cmd.Context(), u, func(ctx context.Context, st backend.Store) error {
				names, err := backend.Names(ctx, st)
				if err == nil && len(names) == 0 {
					err = noNames(ctx, st, u)
				}
				names = slices.DeleteFunc(names, func(e backend.Entry) bool { return backend.InTrash(e.Name) })
				for _, n := range names {
					a.progress.show(api.Progress{What: fmt.Sprintf("%d of %d images", len(list), len(names))})
					info, err := engine.Describe(ctx, st, n.Name)
					switch {
					case ctx.Err() != nil:
						return ctx.Err()
					case err != nil:
						list = append(list, listed{engine.Info{Name: n.Name, ID: n.ID}, api.OneLine(err)})
					default:
						list = append(list, listed{Info: info})
					}
				}
				return err
			})
			a.progress.end()
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(list)
			}
			return a.printImages(list)
		},
	})
}

// noNames says so if a store without names has lost them.
func noNames(ctx context.Context, st backend.Store, u backend.URL) error {
	lost, err := engine.LostDirectory(ctx, st)
	if lost {
		err = engine.ErrLostDirectory
	}
	return lostNames(u, err)
}

// lostNames adds to an error that says that the store has lost its names what to do.
func lostNames(u backend.URL, err error) error {
	if errors.Is(err, engine.ErrLostDirectory) {
		return fmt.Errorf("%s: %w: see lsdctl check %s", u, err, u)
	}
	return err
}

func (a *app) printImages(list []listed) error {
	return a.table(func(row func(...any)) {
		row("NAME", "SIZE", "BLOCK", "CREATED", "ATTACHED BY")
		for _, i := range list {
			if i.Error != "" {
				row(i.Name, "?", "?", "?", "error: "+i.Error)
				continue
			}
			owner := "-"
			switch {
			case i.Removed:
				owner = "removed, but for its name: lsdctl rm it again"
			case i.Owner != nil:
				owner = i.Owner.Host
			}
			row(i.Name, bytesize.Human(i.Size), i.BlockSize, i.Created.Local().Format(time.DateTime), owner)
		}
	})
}

func (a *app) infoCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "info STORE/IMAGE",
		Short:   "Tell what the store says of an image",
		Example: "  lsdctl info rados://rbd/vm2",
		Args:    exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, name, err := parseImage(args[0])
			if err != nil {
				return err
			}
			var info described
			err = withStore(cmd.Context(), u, func(ctx context.Context, st backend.Store) error {
				info, err = describe(ctx, st, name)
				return noImage(u, name, err)
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(info)
			}
			return a.printInfo(u, info)
		},
	})
}

// described is what info prints.
type described struct {
	engine.Info
	ParentName string `json:"parent_name,omitempty"` // that the image has now that this one was cloned from
}

func describe(ctx context.Context, st backend.Store, name string) (described, error) {
	info, err := engine.Describe(ctx, st, name)
	if err != nil || info.Parent == uuid.Nil {
		return described{Info: info}, err
	}
	names, err := namesByID(ctx, st)
	return described{info, names[info.Parent]}, err
}

// noImage says which image is not there.
func noImage(u backend.URL, name string, err error) error {
	switch {
	case errors.Is(err, engine.ErrRemoved):
		return fmt.Errorf("%s: %w, but for its name: lsdctl rm it again", u.Image(name), engine.ErrRemoved)
	case errors.Is(err, backend.ErrNotFound):
		return fmt.Errorf("%s: no such image: see lsdctl ls %s", u.Image(name), u)
	case err != nil:
		return fmt.Errorf("%s: %w", u.Image(name), err)
	}
	return nil
}

func (a *app) printInfo(u backend.URL, i described) error {
	return a.table(func(row func(...any)) {
		row("image", u.Image(i.Name))
		row("id", i.ID)
		row("size", fmt.Sprintf("%s (%d bytes)", bytesize.Human(i.Size), i.Size))
		row("block size", i.BlockSize)
		row("object size", bytesize.Human(uint64(i.ObjectSize)))
		row("created", i.Created.Local().Format(time.DateTime))
		row("epoch", i.Epoch)
		switch {
		case i.Removed:
			row("state", "removed, but for its name: lsdctl rm it again")
		case i.Owner == nil:
			row("attached by", "nobody")
		default:
			row("attached by", fmt.Sprintf("%s since %s, lease %v", i.Owner.Host, i.Owner.Since.Local().Format(time.DateTime), i.Owner.Lease))
		}
		if i.Evicting != "" {
			row("asked for by", i.Evicting)
		}
		if len(i.Snapshots) > 0 {
			row("snapshots", someSnapshots(u.Image(i.Name), i.Snapshots))
		}
		for _, r := range relatives(u, i) {
			row(r[0], r[1])
		}
		for _, b := range i.CutOff {
			row("kept for log", fmt.Sprintf("%s of %s, cut off in epoch %d: salvage it there, or lsdctl log forget", b.Log, b.Host, b.Epoch))
		}
	})
}

// someSnapshots tells how many snapshots an image has, and names the newest.
func someSnapshots(url string, list []engine.Snapshot) string {
	const most = 3
	names := make([]string, 0, most)
	for _, s := range list[max(len(list)-most, 0):] {
		names = append(names, s.Name)
	}
	text := fmt.Sprintf("%d: %s", len(list), strings.Join(names, ", "))
	if len(list) > most {
		text = fmt.Sprintf("%d, the last: %s; see lsdctl snap ls %s", len(list), strings.Join(names, ", "), url)
	}
	return text
}
