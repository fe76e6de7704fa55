package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/spf13/cobra"
)

func (a *app) logSalvageCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "salvage LOG STORE/IMAGE",
		Short: "Bring back what a write log holds, as a new image",
		Long: `Make a new image of what a write log holds: its image as it was when the log's
ownership ended, with everything on top that never reached the store. Neither
the log nor its image is changed.`,
		Example: `  lsdctl log ls
  lsdctl log salvage /var/lib/lsd/cache/4c6b2d09-....log rados://rbd/vm2-salvaged`,
		Args: exactArgs("LOG", "STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, name, err := parseImage(args[1])
			if err != nil {
				return err
			}
			err = a.salvage(cmd.Context(), args[0], u, name)
			a.progress.end()
			return err
		},
	}
}

// salvage makes the image name, in the store u, of the log at path.
func (a *app) salvage(ctx context.Context, path string, u backend.URL, name string) error {
	lock, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	f, err := writelog.OpenFile(lock, path)
	if errors.Is(err, writelog.ErrLocked) {
		return fmt.Errorf("%s is in use by an image that is attached: what it holds is not lost", path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	blank, err := writelog.Blank(f)
	if err == nil && blank {
		return fmt.Errorf("%s is empty: it belongs to no image", path)
	}
	var h writelog.Header
	if err == nil {
		h, _, err = writelog.ReadHeader(f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	from, _, err := backend.ParseImage(h.ImageURL)
	if err != nil {
		return fmt.Errorf("%s is of an image that cannot be found: %w", path, err)
	}
	src, err := openStore(ctx, from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := openWithin(ctx, u, open.CreateStore)
	if err != nil {
		return timedOut(u, err)
	}
	defer dst.Close()
	// Before all the log is read for nothing.
	look, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	switch _, err := backend.Lookup(look, dst, name); {
	case err == nil:
		return fmt.Errorf("%s exists already: choose another name", u.Image(name))
	case !errors.Is(err, backend.ErrNotFound):
		return timedOut(u, err)
	}
	a.progress.show(api.Progress{What: "reading " + path})
	_, err = engine.Salvage(ctx, f, src, h.Image, dst, name, func(done, total uint64) {
		a.progress.show(api.Progress{What: "writing " + u.Image(name), Done: done * engine.SectorSize, Total: total * engine.SectorSize})
	})
	a.progress.end()
	switch {
	case errors.Is(err, backend.ErrExists):
		return fmt.Errorf("%s exists already: choose another name", u.Image(name))
	case err != nil:
		return fmt.Errorf("salvage %s, of %s: %w", path, h.ImageURL, lostNames(u, err))
	}
	fmt.Fprintf(a.out, "made %s of %s, in the history of epoch %d: the log is kept, remove it when the image is right\n", u.Image(name), h.ImageURL, h.Epoch)
	return nil
}
