package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

// rmOptions says how an image is removed, and who reclaims its space.
type rmOptions struct {
	engine.RemoveOptions
	wait   bool // reclaim here
	noWait bool // do not reclaim
}

func (a *app) rmCommand() *cobra.Command {
	var o rmOptions
	cmd := &cobra.Command{
		Use:   "rm STORE/IMAGE",
		Short: "Remove an image and its data",
		Long: `Remove an image and its data. One that is attached is refused; --force removes
also that, and its users get errors. One that has snapshots is refused, unless
--snapshots says that they go with it. Clones of it go on: what they need of it
stays in the store, without a name, until they need it no longer.

The image is gone at once, however large it is, and its name is free. Its space is
reclaimed after that: by the daemon of this host, in the background, or, if none
runs or with --wait, by the command itself, which may be interrupted then. With
--no-wait, or after that, lsdctl gc finds what is left, and removes it. What the host
of an image that was attached may put until it notices goes some minutes later: the
daemon sees to that too, or lsdctl gc does.`,
		Example: `  lsdctl rm rados://rbd/vm2
  lsdctl rm rados://rbd/vm2 --snapshots --wait
  lsdctl rm rados://rbd/vm2 --force    # its host is gone for good`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, name, err := parseImage(args[0])
			switch {
			case err != nil:
				return err
			case o.wait && o.noWait:
				return errors.New("--wait and --no-wait: give one of them")
			}
			return a.remove(cmd.Context(), u, name, o)
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "also an image that is attached or damaged")
	cmd.Flags().BoolVar(&o.Snapshots, "snapshots", false, "also an image that has snapshots: they go with it")
	cmd.Flags().BoolVar(&o.wait, "wait", false, "reclaim its space before the command ends")
	cmd.Flags().BoolVar(&o.noWait, "no-wait", false, "leave its space to lsdctl gc")
	return a.jsonFlag(cmd)
}

// What becomes of the space of a removed image.
const (
	spaceReclaimed  = "reclaimed"  // it has been, but for what clones need
	spaceBackground = "background" // this host's daemon sees to it
	spaceLeft       = "left"       // all of it, or some, for lsdctl gc
	spaceLate       = "late"       // it has been, but what a host may still put is for lsdctl gc
)

// removedImage is what rm --json prints.
type removedImage struct {
	Name    string    `json:"name"`
	ID      uuid.UUID `json:"id"`
	Space   string    `json:"space"`
	Objects int       `json:"objects"` // that are gone
	// Late is for how many seconds a host may still put objects, if one had it attached, or had
	// lost it shortly before: whoever sees to them does so after that.
	Late  int    `json:"late_seconds,omitempty"`
	Error string `json:"error,omitempty"`
}

func (a *app) remove(ctx context.Context, u backend.URL, name string, o rmOptions) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	r := removedImage{Name: name}
	o.URL = u.Image(name)
	o.Progress = func(done, total int) {
		r.Objects++
		a.progress.show(api.Progress{What: fmt.Sprintf("removing %s: %d of %d objects", o.URL, done, total)})
	}
	if r.ID, err = a.unname(ctx, u, st, name, o.RemoveOptions); err != nil {
		return err
	}
	if !a.json {
		fmt.Fprintf(a.out, "removed %s\n", o.URL)
	}
	why := a.space(ctx, u, st, &r, o)
	a.progress.end()
	if why != nil {
		r.Error = api.OneLine(why)
		err = fmt.Errorf("%s is removed, but its space is not all reclaimed: %w: lsdctl gc %s --remove does the rest", o.URL, why, u)
	}
	if a.json {
		return errors.Join(a.printJSON(r), err)
	}
	if err == nil {
		fmt.Fprintln(a.out, r.remark(u))
	}
	return err
}

// unname removes the image, and returns its id.
func (a *app) unname(ctx context.Context, u backend.URL, st backend.Store, name string, o engine.RemoveOptions) (uuid.UUID, error) {
	if !o.Force {
		if id, err := backend.Lookup(ctx, st, name); err == nil {
			a.freeUnused(ctx, id)
			if o.Snapshots {
				err = a.notAttached(ctx, id, uuid.Nil)
			}
			if err != nil {
				return id, err
			}
		}
	}
	if !o.Force { // else the data of one that is damaged may go first
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, storeTimeout)
		defer stop()
	}
	id, err := engine.Remove(ctx, st, name, o)
	a.progress.end()
	var owned *engine.OwnedError
	if errors.As(err, &owned) && !owned.Command {
		return id, fmt.Errorf("%s is attached by %s: detach it there with lsdctl del; --force removes it all the same", o.URL, owned.Host)
	}
	return id, timedOut(u, noImage(u, name, err))
}

// space sees to the space of a removed image, and notes what has become of it. An error says
// why it was to be reclaimed here, and has not been.
func (a *app) space(ctx context.Context, u backend.URL, st backend.Store, r *removedImage, o rmOptions) error {
	r.Space = spaceReclaimed
	if _, err := st.Stat(ctx, engine.SuperblockKey(r.ID)); errors.Is(err, backend.ErrNotFound) {
		return nil // it was damaged
	}
	switch {
	case o.noWait:
		r.Space = spaceLeft
		return nil
	case !o.wait && a.askReclaim(ctx, u, r.ID) == nil:
		r.Space = spaceBackground
		return nil
	}
	late, err := engine.Reclaim(ctx, st, r.ID, func(done, total int) {
		r.Objects++
		a.progress.show(api.Progress{What: fmt.Sprintf("%s is removed; reclaiming its space, which can be interrupted: %d of %d objects", o.URL, done, total)})
	})
	if err != nil {
		r.Space = spaceLeft
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		return err
	}
	if late > 0 {
		r.Late = int(math.Ceil(late.Seconds()))
		if r.Space = spaceLate; o.wait && a.askReclaim(ctx, u, r.ID) == nil {
			r.Space = spaceBackground
		}
	}
	return nil
}

// askReclaim has this host's daemon reclaim what a removed image was made of, if one runs.
func (a *app) askReclaim(ctx context.Context, u backend.URL, id uuid.UUID) error {
	ctx, stop := context.WithTimeout(ctx, nudgeTimeout)
	defer stop()
	return a.client().Reclaim(ctx, api.ReclaimRequest{Store: u.String(), ImageID: id})
}

// remark tells what becomes of the space.
func (r *removedImage) remark(u backend.URL) string {
	late := time.Duration(r.Late) * time.Second
	switch {
	case r.Space == spaceLate:
		return fmt.Sprintf("%s; what a host may still write goes with lsdctl gc %s --remove, in %v or later", r.reclaimed(), u, late)
	case r.Space == spaceBackground && late > 0:
		return fmt.Sprintf("%s; lsdd removes what a host may still write, in %v", r.reclaimed(), late)
	case r.Space == spaceBackground:
		return "lsdd reclaims its space in the background"
	case r.Space == spaceLeft:
		return fmt.Sprintf("its space is not reclaimed: lsdctl gc %s --remove does that", u)
	}
	return r.reclaimed()
}

// reclaimed tells what has been reclaimed.
func (r *removedImage) reclaimed() string {
	return "reclaimed its space, as far as no clone needs it: " + plural.Count(r.Objects, "object")
}
