package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/lsd-ceph/lsd/ublk"
	"github.com/spf13/cobra"
)

// askTimeout bounds questions that the daemon answers at once.
const askTimeout = 15 * time.Second

func (a *app) client() *api.Client { return api.NewClient(a.socket) }

// ask runs a question with a time limit.
func ask(ctx context.Context, fn func(context.Context) error) error {
	ctx, stop := context.WithTimeout(ctx, askTimeout)
	defer stop()
	return fn(ctx)
}

func (a *app) addCommand() *cobra.Command {
	var q api.AttachRequest
	var logSize, logMemory, nullSize bytesize.Size
	cmd := &cobra.Command{
		Use:   "add STORE/IMAGE[@SNAPSHOT]",
		Short: "Attach an image as a block device, and print its path",
		Long: `Attach an image as a block device, and print its path. The daemon is started if
none answers.

Writes are acknowledged from a write log, a file in --cache (or a whole block
device), which should be on a local SSD that keeps what is flushed. The file is
made now and removed by lsdctl del.

A snapshot is attached with --read-only, beside its image or on another host.

With --shared programs that lsdctl run --shared has started may write to the image, too;
without, they can only read it while it is attached. A file system may be mounted on one
side alone, unless it is one for shared disks: it would be damaged.`,
		Example: `  lsdctl add rados://rbd/vm2
  lsdctl add rados://rbd/vm2 --cache /ssd/lsd --log-size 8G
  lsdctl add rados://rbd/vm2 --force      # its host is dead
  lsdctl add rados://rbd/vm2@monday --read-only
  lsdctl add rados://rbd/vm2 --shared     # librbd's clients may write beside it
  lsdctl add --null --size 10G            # no image: what ublk itself costs`,
		Args: func(cmd *cobra.Command, args []string) error {
			if q.Null {
				return exactArgs()(cmd, args)
			}
			return exactArgs("STORE/IMAGE")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				q.Image = args[0]
			}
			q.LogSize, q.LogMemory, q.Size = int64(logSize), int64(logMemory), uint64(nullSize)
			return a.add(cmd, q)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Cache, "cache", "", "directory for the write log, or a block device (default STATE-DIR/cache)")
	logSize = 1 << 30
	f.Var(&logSize, "log-size", "size of the write log")
	f.Var(&logMemory, "log-memory", "memory that holds the newest part of the log, a multiple of 8M (default 16M to 32M, as the daemon has it)")
	f.IntVar(&q.Queues, "queues", 1, "hardware queues of the block device")
	f.IntVar(&q.Depth, "depth", 128, "requests in each queue")
	f.BoolVar(&q.ReadOnly, "read-only", false, "take no ownership; shows the image as the store has it now")
	f.BoolVar(&q.Shared, "shared", false, "let programs write beside the device that lsdctl run --shared has started")
	f.BoolVar(&q.Force, "force", false, "take the image over from the host that has it")
	f.DurationVar(&q.Lease, "lease", 0, "how long the ownership lasts without a sign of life (default 1m)")
	f.BoolVar(&q.Null, "null", false, "no image: a device that forgets everything, for benchmarks; no data is copied where the kernel can leave that out")
	f.Var(&nullSize, "size", "size of a --null device (default 1G)")
	f.IntVar(&q.ID, "id", -1, "number of the device; -1: any")
	f.DurationVar(&q.BatchAge, "batch-age", 0, "longest that a write waits for its object to fill, or is kept back in a burst; behind one, twice that (default 5s)")
	f.Float64Var(&q.SpaceRatio, "space-ratio", 0, "space that the store may hold for each live byte before it is cleaned (default 1.3)")
	f.IntVar(&q.CheckpointEvery, "checkpoint-every", 0, "most data objects that recovery has to read the headers of (default 2048)")
	f.DurationVar(&q.StoreTimeout, "store-timeout", 0, "limit of one attempt of a store operation (default 20s)")
	return a.jsonFlag(cmd)
}

// checkAdd finds what can be known to be wrong without a daemon.
func checkAdd(cmd *cobra.Command, q api.AttachRequest) error {
	switch {
	case q.ID < -1 || q.ID > ublk.MaxID:
		return fmt.Errorf("--id %d: it must be from 0 to %d, or -1 for any", q.ID, ublk.MaxID)
	case q.Queues < 1:
		return fmt.Errorf("--queues %d: it must be 1 or more", q.Queues)
	case q.Depth < 1:
		return fmt.Errorf("--depth %d: it must be 1 or more", q.Depth)
	case q.Lease < 0 || q.BatchAge < 0 || q.StoreTimeout < 0 || q.CheckpointEvery < 0:
		return errors.New("a time or number is negative: see lsdctl add --help")
	case cmd.Flags().Changed("space-ratio") && !(q.SpaceRatio >= engine.MinSpaceRatio && q.SpaceRatio <= engine.MaxSpaceRatio):
		return fmt.Errorf("--space-ratio %v: it must be from %v to %v", q.SpaceRatio, engine.MinSpaceRatio, engine.MaxSpaceRatio)
	case cmd.Flags().Changed("lease") && q.Lease == 0:
		return errors.New("--lease 0: it must be from 1s to 1h")
	case q.LogSize == 0 || q.LogMemory == 0 && cmd.Flags().Changed("log-memory"):
		return errors.New("the write log needs some space: see lsdctl add --help")
	case q.LogSize < 0 || q.LogMemory < 0:
		return errors.New("size is beyond all limits")
	case !q.Null && cmd.Flags().Changed("size"):
		return errors.New("--size is that of a --null device: an image has its own")
	case q.Shared && (q.Null || q.ReadOnly):
		return errors.New("--shared is for an image that can be written to: it goes neither with --read-only nor with --null")
	case q.Null && cmd.Flags().Changed("size") && q.Size == 0:
		return errors.New("size 0: a device must have at least one block")
	case q.Null:
		return nil
	}
	u, _, snap, err := backend.ParseSource(q.Image)
	if err = notMem(u, err); err == nil && snap != "" && !q.ReadOnly {
		err = fmt.Errorf("%s: a snapshot can be attached with --read-only alone", q.Image)
	}
	return err
}

func (a *app) add(cmd *cobra.Command, q api.AttachRequest) error {
	if err := checkAdd(cmd, q); err != nil {
		return err
	}
	if q.Cache != "" {
		path, err := filepath.Abs(q.Cache)
		if err != nil {
			return err
		}
		q.Cache = path
	}
	ctx := cmd.Context()
	if err := a.needDaemon(ctx, withDriver); err != nil {
		return err
	}
	im, err := a.client().Attach(ctx, q, a.progress.show)
	a.progress.end()
	if err != nil {
		return err
	}
	if q.Shared && !im.Shared {
		a.remark(api.Done{Remarks: []string{im.Device + " is not shared: the lsdd that runs is an earlier release, and knows no --shared"}})
	}
	if a.json {
		return a.printJSON(im)
	}
	fmt.Fprintln(a.out, im.Device)
	return nil
}

func (a *app) listCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ps"},
		Short:   "List what is attached here",
		Example: `  lsdctl list
  lsdctl list --json`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []api.Image
			err := ask(cmd.Context(), func(ctx context.Context) (err error) {
				list, err = a.client().Images(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(list)
			}
			return a.table(func(row func(...any)) {
				row("DEVICE", "IMAGE", "SIZE", "DIRTY", "READ/S", "WRITE/S", "STATE")
				for _, i := range list {
					if s := i.Stats; s != nil {
						row(i.Device, i.URL, bytesize.Human(i.Size), bytesize.Human(s.Dirty), fmt.Sprintf("%.0f", s.ReadIOPS), fmt.Sprintf("%.0f", s.WriteIOPS), i.State)
					} else {
						row(i.Device, i.URL, bytesize.Human(i.Size), "-", "-", "-", i.State)
					}
				}
			})
		},
	})
}

func (a *app) statusCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "status [DEVICE]",
		Short: "Tell how attached images are, and what to do about what is wrong",
		Example: `  lsdctl status
  lsdctl status ublkb0 --json`,
		Args: cmdline.Args(0, "DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []api.Image
			err := ask(cmd.Context(), func(ctx context.Context) (err error) {
				if len(args) == 0 {
					list, err = a.client().Images(ctx)
					return err
				}
				id, err := parseDevice(args[0])
				if err != nil {
					return err
				}
				list = make([]api.Image, 1)
				list[0], err = a.client().Image(ctx, id)
				return err
			})
			switch {
			case err != nil:
				return err
			case a.json && len(args) == 1:
				return a.printJSON(list[0])
			case a.json:
				return a.printJSON(list)
			case len(list) == 0:
				fmt.Fprintln(a.out, "nothing is attached here")
			}
			for i, im := range list {
				if i > 0 {
					fmt.Fprintln(a.out)
				}
				if err := a.printStatus(im); err != nil {
					return err
				}
			}
			return nil
		},
	})
}

func (a *app) printStatus(im api.Image) error {
	return a.table(func(row func(...any)) {
		row(im.Device, im.URL)
		state := im.State
		if im.ReadOnly {
			state += ", read-only"
		}
		if im.Shared {
			state += ", shared"
		}
		row("state", fmt.Sprintf("%s since %s", state, im.Since.Local().Format(time.DateTime)))
		if im.Error != "" {
			row("why", im.Error)
		}
		row("size", fmt.Sprintf("%s, blocks of %d bytes", bytesize.Human(im.Size), im.BlockSize))
		if len(im.Clients) > 0 {
			row("librbd", "open in "+strings.Join(im.Clients, ", "))
		}
		if im.Restarts > 0 {
			row("reactor", fmt.Sprintf("replaced %d times", im.Restarts))
		}
		if im.Stats != nil {
			printStats(row, im)
		}
		for _, s := range im.Advice {
			row("->", s)
		}
	})
}

func printStats(row func(...any), im api.Image) {
	s := im.Stats
	if !im.ReadOnly {
		row("write log", fmt.Sprintf("%s of %s used (%d%%), %s in memory, %s", bytesize.Human(s.LogUsed), bytesize.Human(s.LogSize), s.LogUsed*100/max(s.LogSize, 1), bytesize.Human(uint64(im.LogMemory)), im.Log))
		if s.LogError != "" {
			row("log error", s.LogError)
		}
		row("dirty", fmt.Sprintf("%s not in the store yet, the oldest for %.1f s", bytesize.Human(s.Dirty), s.Lag))
		row("destage", fmt.Sprintf("%d objects under way, %d waiting; %d objects, %s since it was opened", s.Puts, s.Queued, s.PutCount, bytesize.Human(s.PutBytes)))
		row("ownership", fmt.Sprintf("epoch %d, lease good for %.0f s", s.Epoch, s.LeaseLeft))
	}
	row("in flight", fmt.Sprintf("%d writes and flushes, %d more wait for room in the log", s.InFlight, s.Waiting))
	row("requests", fmt.Sprintf("%d reads (%s), %d writes (%s), %d flushes, %d discards", s.Reads, bytesize.Human(s.ReadBytes), s.Writes, bytesize.Human(s.WriteByts), s.Flushes, s.Discards))
	row("rate", fmt.Sprintf("%.0f reads/s, %.0f writes/s", s.ReadIOPS, s.WriteIOPS))
	if c := s.ReadCache; c.Hits+c.Misses > 0 {
		row("read cache", fmt.Sprintf("%s found, %s not; %s read from the store", bytesize.Human(c.HitBytes), bytesize.Human(c.MissBytes), bytesize.Human(c.Fetched)))
	}
	if !im.ReadOnly {
		row("scrub", scrubStatus(s.Scrub))
	}
	errs := fmt.Sprintf("%d of the store (tried again), %d reads failed", s.StoreErrors, s.ReadErrors)
	if s.LastStoreError != "" {
		errs += fmt.Sprintf("; last %.0f s ago: %s", s.LastErrorAge, s.LastStoreError)
	}
	row("errors", errs)
	if im.StoreDownSince != nil {
		row("store", "down since "+im.StoreDownSince.Local().Format(time.DateTime))
	}
}

// scrubStatus tells how far the scrub is.
func scrubStatus(s engine.ScrubStats) string {
	text := "not running"
	if s.Running {
		text = fmt.Sprintf("at object %d: %d of %d objects in this pass", s.Object, s.Objects, s.Total)
	}
	if s.Passes > 0 {
		text += fmt.Sprintf("; the last pass took %.0f s and ended %.0f s ago", s.Last, s.Age)
	}
	return fmt.Sprintf("%s; %s read, %d damaged objects found", text, bytesize.Human(s.Bytes), s.Errors)
}

func (a *app) flushCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "flush DEVICE",
		Short: "Bring everything that has been acknowledged into the store",
		Long:  "Bring everything that has been acknowledged into the store. What is only in the page cache of this host is not: sync first.",
		Example: `  sync && lsdctl flush /dev/ublkb0
  timeout 60 lsdctl flush 0`,
		Args: exactArgs("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseDevice(args[0])
			if err != nil {
				return err
			}
			err = a.client().Flush(cmd.Context(), id, a.progress.show)
			a.progress.end()
			return err
		},
	}
}

func (a *app) delCommand() *cobra.Command {
	var q api.DetachRequest
	cmd := &cobra.Command{
		Use:   "del DEVICE",
		Short: "Detach an image",
		Long: `Bring everything into the store, then remove the block device and let go of the
image. A device that is in use stays, and so does one whose data does not reach
the store in time. Where part of the image's map is damaged in the store, it is
waited for as long as a lease, a minute at most; then the image goes without a
checkpoint of the map, and what could not be read is named.

With --force it goes in any case: its users get errors, and what is not in the
store by then stays in the write log, from which lsdctl add goes on.`,
		Example: `  lsdctl del /dev/ublkb0
  lsdctl del 0 --timeout 10m
  lsdctl del 0 --force --timeout 5s`,
		Args: exactArgs("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseDevice(args[0])
			if err != nil {
				return err
			}
			if q.Timeout <= 0 {
				return fmt.Errorf("--timeout %v: it must be longer than 0", q.Timeout)
			}
			done, err := a.client().Detach(cmd.Context(), id, q, a.progress.show)
			a.progress.end()
			a.remark(done)
			return err
		},
	}
	cmd.Flags().BoolVar(&q.Force, "force", false, "also a device that is in use, or whose data is not all in the store")
	cmd.Flags().DurationVar(&q.Timeout, "timeout", 30*time.Second, "how long to write to the store")
	return cmd
}

func (a *app) remark(d api.Done) {
	for _, r := range d.Remarks {
		fmt.Fprintln(a.progress.w, strings.TrimSpace(r))
	}
}

func (a *app) daemonCommand() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:     "daemon",
		Short:   "Tell which daemon answers",
		Example: "  lsdctl daemon --json",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var v api.Version
			err := ask(cmd.Context(), func(ctx context.Context) (err error) {
				v, err = a.client().Version(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(v)
			}
			return a.table(func(row func(...any)) {
				row("version", v.Version)
				row("process", v.PID)
				row("host", v.Host)
				row("socket", a.socket)
				row("state", v.StateDir)
				row("started", v.Started.Local().Format(time.DateTime))
			})
		},
	})
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of lsdctl",
		Example: "  lsdctl version",
		Args:    exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			fmt.Fprintln(a.out, version())
			return nil
		},
	}
}

func (a *app) shutdownCommand() *cobra.Command {
	var q api.ShutdownRequest
	cmd := &cobra.Command{
		Use:   "shutdown",
		Short: "End the daemon; the devices wait for the next one",
		Long: `End the daemon. The block devices stay: their users wait until a daemon runs
again. With --detach they are removed first, as by lsdctl del.`,
		Example: `  lsdctl shutdown
  lsdctl shutdown --detach --timeout 5m`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.Timeout <= 0 {
				return fmt.Errorf("--timeout %v: it must be longer than 0", q.Timeout)
			}
			done, err := a.client().Shutdown(cmd.Context(), q, a.progress.show)
			a.progress.end()
			a.remark(done)
			return err
		},
	}
	cmd.Flags().BoolVar(&q.Detach, "detach", false, "remove the devices")
	cmd.Flags().DurationVar(&q.Timeout, "timeout", 20*time.Second, "how long to write to the store")
	return cmd
}
