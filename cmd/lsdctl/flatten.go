package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/inproc"
	"github.com/spf13/cobra"
)

func (a *app) flattenCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "flatten STORE/IMAGE",
		Short: "Make a clone an image that needs nothing of its parent",
		Long: `Move what a clone has in objects of its parent, and of those before it, into objects of
its own, and end its being a clone. Its data does not change, and it may be written to
meanwhile.

Nothing needs this: a clone reads as fast as other images, and its parent can always be
removed. It makes the clone independent of its parent, which then keeps nothing for
it. The price is a copy: what it shares with its parent is read and written once, and
takes space a second time while the parent, or another clone, has it too.

A snapshot or a clone of the image, made earlier, may need something of the parent
still. Then its present state alone is moved, and the command names what does: the
image stays a clone until these are removed and it is flattened again.

It can be paused: interrupt it (Ctrl-C) at any time, and the same command goes on from
there. What was moved stays moved. An image that is attached is flattened on the host
that has it, by its daemon, which pauses when the command ends; lsdctl del pauses it
too. One that nobody has attached is held by the command meanwhile.`,
		Example: `  lsdctl flatten rados://rbd/vm2
  timeout 1h lsdctl flatten rados://rbd/vm2    # an hour's worth; the next one goes on from there`,
		Args: exactArgs("STORE/IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, err := parseImage(args[0])
			if err != nil {
				return err
			}
			f := &flattener{app: a, u: u, image: image}
			err = f.run(cmd.Context())
			a.progress.end()
			return err
		},
	})
}

// flattener flattens one image.
type flattener struct {
	*app
	u     backend.URL
	image string
	st    backend.Store
}

// flattened is what flatten --json prints.
type flattened struct {
	Image  string    `json:"image"`
	Moved  uint64    `json:"moved_bytes"`     // this time
	Parent uuid.UUID `json:"parent,omitzero"` // that it was a clone of
	// Separated says that it is no clone, of anything, from now on.
	Separated bool `json:"separated"`
	// Needs is what needs something of the parent still, in a few words each.
	Needs []string `json:"needs"`
	// ParentSpace says what becomes of the space of a parent that has been removed, as rm does.
	ParentSpace string `json:"parent_space,omitempty"`
	Error       string `json:"error,omitempty"`
}

// errFlattenStopped says that the user has ended the command.
var errFlattenStopped = errors.New("interrupted: what was moved stays moved, and the same command goes on from there")

func (f *flattener) run(ctx context.Context) (err error) {
	if f.st, err = openStore(ctx, f.u); err != nil {
		return err
	}
	defer f.st.Close()
	info, err := f.describe(ctx)
	if err != nil {
		return err
	}
	done := flattened{Image: f.u.Image(f.image), Parent: info.Parent, Separated: true, Needs: []string{}}
	if info.Parent == uuid.Nil {
		return f.print(&done, nil)
	}
	if err := f.move(ctx, info, &done); err != nil {
		return fmt.Errorf("flatten %s: %w", done.Image, storeFull(f.u, err))
	}
	f.progress.show(api.Progress{What: "looking for what needs something of its parent"})
	found, err := engine.Separate(ctx, f.st, info.ID)
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("flatten %s: %w", done.Image, errFlattenStopped)
	case err != nil:
		return fmt.Errorf("flatten %s: all of it is moved, but it is a clone still: %w", done.Image, err)
	case slices.Contains(found.Needs, engine.PresentState):
		return fmt.Errorf("flatten %s: it was changed meanwhile, and needs something of its parent still: flatten it again", done.Image)
	}
	done.Separated = len(found.Needs) == 0
	done.Needs = append(done.Needs, found.Needs...)
	why := f.reclaimParent(ctx, info.Parent, &done)
	f.progress.end()
	return f.print(&done, why)
}

// describe returns what there is to know of the image.
func (f *flattener) describe(ctx context.Context) (engine.Info, error) {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	info, err := engine.Describe(ctx, f.st, f.image)
	if err == nil && info.Removed {
		err = engine.ErrRemoved
	}
	return info, timedOut(f.u, noImage(f.u, f.image, err))
}

// move moves what the present state has of its ancestors, wherever the image is attached.
func (f *flattener) move(ctx context.Context, info engine.Info, done *flattened) (err error) {
	switch here := f.attachment(ctx, info.ID); {
	case here != nil:
		var by api.Flattened
		by, err = f.client().Flatten(ctx, here.ID, f.progress.show)
		done.Moved = by.Moved
	case info.Owner != nil && !info.Owner.Command:
		return fmt.Errorf("it is attached by %s: flatten it there, or lsdctl del it there first", info.Owner.Host)
	default:
		return f.offline(ctx, info.ID, done)
	}
	if err != nil && ctx.Err() != nil {
		return errFlattenStopped
	}
	return err
}

// offline is move of an image that nobody has attached.
func (f *flattener) offline(ctx context.Context, id uuid.UUID, done *flattened) error {
	im, err := inproc.Open(ctx, f.st, id, inproc.Options{URL: done.Image, Progress: func(what string) { f.progress.show(api.Progress{What: what}) }})
	if err != nil {
		if ctx.Err() != nil {
			return errFlattenStopped
		}
		return err
	}
	err = im.Flatten(ctx, func(n, total uint64) {
		done.Moved = n
		f.progress.show(api.Progress{What: "moving what it has of its ancestors", Done: n, Total: total})
	})
	if err != nil && ctx.Err() != nil {
		err = errFlattenStopped
	}
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer stop()
	return errors.Join(err, im.Close(end))
}

// reclaimParent has reclaimed what the image needs no more of a parent that has been removed.
// An error says why that has not been done.
func (f *flattener) reclaimParent(ctx context.Context, parent uuid.UUID, done *flattened) error {
	look, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	info, err := engine.DescribeID(look, f.st, parent)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return nil // all of it is gone
	case err != nil || !info.Removed:
		return err
	}
	r := removedImage{ID: parent}
	err = f.space(ctx, f.u, f.st, &r, rmOptions{RemoveOptions: engine.RemoveOptions{URL: "its parent"}})
	done.ParentSpace = r.Space
	return err
}

// print tells what has been done, and why the space of the parent is not reclaimed, if it is
// to be.
func (f *flattener) print(d *flattened, why error) error {
	var err error
	if why != nil {
		d.Error = api.OneLine(why)
		err = fmt.Errorf("%s is flattened, but the space of its parent is not all reclaimed: %w: lsdctl gc %s --remove does the rest", d.Image, why, f.u)
	}
	if f.json {
		return errors.Join(f.printJSON(d), err)
	}
	switch {
	case d.Parent == uuid.Nil:
		fmt.Fprintf(f.out, "%s is no clone: there is nothing to flatten\n", d.Image)
	case d.Separated:
		fmt.Fprintf(f.out, "%s is no clone any more: %s were moved into objects of its own\n", d.Image, bytesize.Human(d.Moved))
	default:
		fmt.Fprintf(f.out, "%s were moved into objects of its own: the present state of %s needs nothing of its parent any more; these do: %s: it stays a clone until they are removed and it is flattened again\n",
			bytesize.Human(d.Moved), d.Image, strings.Join(d.Needs, ", "))
	}
	switch d.ParentSpace {
	case spaceReclaimed:
		fmt.Fprintln(f.out, "its parent had been removed: reclaimed the space of that, as far as no clone needs it")
	case spaceBackground:
		fmt.Fprintln(f.out, "its parent had been removed: lsdd reclaims the space of that in the background")
	case spaceLate:
		fmt.Fprintf(f.out, "its parent has been removed: reclaimed the space of that; what a host may still write goes with lsdctl gc %s --remove, some minutes from now\n", f.u)
	}
	return err
}
