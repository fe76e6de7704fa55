package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/inproc"
	"github.com/spf13/cobra"
)

// closeTimeout bounds how long a command that was interrupted takes to give an image back.
const closeTimeout = 30 * time.Second

func (a *app) resizeCommand() *cobra.Command {
	var shrink bool
	cmd := &cobra.Command{
		Use:   "resize STORE/IMAGE SIZE",
		Short: "Make an image larger or smaller",
		Long: `Give an image another size, whether it is attached or not. Its block device has the
new size at once where the kernel can do that (UPDATE_SIZE in lsdctl features, from
Linux 6.16 on), else when it is attached the next time. What is new reads as zeroes.
A file system on it is to be made larger afterwards: resize2fs, xfs_growfs.

To make one smaller, make its file system smaller first, and say --allow-shrink:
what is beyond the new end is lost. An image that is attached is made smaller on the
host that has it. Snapshots and clones keep their size.`,
		Example: `  lsdctl resize rados://rbd/vm2 40G && resize2fs /dev/ublkb0
  lsdctl resize rados://rbd/vm2 10G --allow-shrink`,
		Args: exactArgs("STORE/IMAGE", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, image, err := parseImage(args[0])
			if err != nil {
				return err
			}
			size, err := bytesize.Parse(args[1])
			if err != nil {
				return fmt.Errorf("size %s: %w", args[1], err)
			}
			r := &resizer{app: a, u: u, image: image, size: size, shrink: shrink}
			err = r.run(cmd.Context())
			a.progress.end()
			return err
		},
	}
	cmd.Flags().BoolVar(&shrink, "allow-shrink", false, "also make it smaller, and lose what is beyond its new end")
	return a.jsonFlag(cmd)
}

// resizer gives one image another size.
type resizer struct {
	*app
	u      backend.URL
	image  string
	size   uint64
	shrink bool
}

// resized is what there is to be told.
type resized struct {
	Image  string `json:"image"`
	Size   uint64 `json:"size_bytes"`
	Before uint64 `json:"size_before_bytes"`
	// Device is the block device here, if there is one, and DeviceSize what it has.
	Device     string `json:"device,omitempty"`
	DeviceSize uint64 `json:"device_size_bytes,omitempty"`
	Remark     string `json:"remark,omitempty"`
}

func (r *resizer) run(ctx context.Context) error {
	st, err := openStore(ctx, r.u)
	if err != nil {
		return err
	}
	defer st.Close()
	look, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	info, err := engine.Describe(look, st, r.image)
	if err != nil {
		return timedOut(r.u, noImage(r.u, r.image, err))
	}
	if r.size < info.Size && !r.shrink {
		return r.wouldLose(info.Size)
	}
	done := resized{Image: r.u.Image(r.image), Size: r.size, Before: info.Size}
	switch here := r.attachment(ctx, info.ID); {
	case here != nil:
		err = r.here(ctx, here.ID, &done)
	case r.size < info.Size && info.Owner != nil && !info.Owner.Command:
		return fmt.Errorf("%s is attached by %s: make it smaller there, or lsdctl del it there first", done.Image, info.Owner.Host)
	case r.size < info.Size:
		err = r.offline(ctx, st, info.ID)
	default:
		err = engine.Grow(look, st, info.ID, r.size)
		if info.Owner != nil && info.Size != r.size {
			done.Remark = fmt.Sprintf("%s, which has it attached, finds that when it renews its lease, within 5 seconds", info.Owner.Host)
		}
	}
	switch {
	case errors.Is(err, engine.ErrShrinks):
		return r.wouldLose(0)
	case err != nil:
		return timedOut(r.u, fmt.Errorf("resize %s: %w", done.Image, err))
	}
	return r.print(&done)
}

// wouldLose says what it takes to make an image of so many bytes smaller; 0: of more than that.
func (r *resizer) wouldLose(size uint64) error {
	has := "more"
	if size > 0 {
		has = bytesize.Human(size)
	}
	return fmt.Errorf("%s has %s, and would lose what is beyond %s: make its file system smaller first, then say --allow-shrink", r.u.Image(r.image), has, bytesize.Human(r.size))
}

// here resizes the image by the daemon that has it attached as the device of that number.
func (r *resizer) here(ctx context.Context, id int, done *resized) error {
	im, err := r.client().Resize(ctx, id, api.ResizeRequest{Size: r.size, Shrink: r.shrink}, r.progress.show)
	if err != nil {
		return err
	}
	done.Device, done.DeviceSize = im.Device, im.Size
	if im.Size != r.size {
		done.Remark = fmt.Sprintf("this kernel cannot change the size of a device: %s has %s until the image is attached the next time (lsdctl del, then add)", im.Device, bytesize.Human(im.Size))
	}
	return nil
}

// offline makes an image smaller that nobody has attached.
func (r *resizer) offline(ctx context.Context, st backend.Store, id uuid.UUID) error {
	im, err := inproc.Open(ctx, st, id, inproc.Options{URL: r.u.Image(r.image), Progress: func(what string) { r.progress.show(api.Progress{What: what}) }})
	if err != nil {
		return err
	}
	err = im.Shrink(ctx, r.size, func(n, total uint64) {
		r.progress.show(api.Progress{What: "discarding what goes", Done: n, Total: total})
	})
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer stop()
	return errors.Join(err, im.Close(end))
}

func (r *resizer) print(d *resized) error {
	if r.json {
		return r.printJSON(d)
	}
	if d.Size == d.Before {
		fmt.Fprintf(r.out, "%s has %s already\n", d.Image, bytesize.Human(d.Size))
	} else {
		fmt.Fprintf(r.out, "%s has %s now, it had %s\n", d.Image, bytesize.Human(d.Size), bytesize.Human(d.Before))
	}
	switch {
	case d.Remark != "":
		fmt.Fprintln(r.out, d.Remark)
	case d.Device != "":
		fmt.Fprintf(r.out, "so has %s\n", d.Device)
	}
	return nil
}
