package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// fragmented reads images in order that were written in blocks of 4 KiB at random, each once, and
// others that were written in order: first with nothing in any cache but the disk's own, then
// again at once, with what the first time has left there.
func fragmented() comparison {
	return comparison{name: "fragmented", title: "reading in order what was written at random, beside what was written in order", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		f, err := newFragmentation(ctx, h)
		if err != nil {
			return nil, err
		}
		cases := []lab.Case[[]string]{{Name: "read 1m, depth 8", Do: []string{"--bs=1m", "--iodepth=8"}}}
		if !h.Short {
			cases = append(cases, lab.Case[[]string]{Name: "read 128k, depth 1", Do: []string{"--bs=128k", "--iodepth=1"}})
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[[]string]{
			{Name: "lsd, written at random", Turn: f.lsd("random")},
			{Name: "lsd, written in order", Turn: f.lsd("ordered")},
			{Name: "librbd, written at random", Turn: f.librbd("random")},
			{Name: "librbd, written in order", Turn: f.librbd("ordered")},
		})
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("MiB/s", bench.Table{Name: "cold", Title: "Reading from the store, by how it was written", Unit: "MiB a second", Plot: true}),
			m.Table("MiB/s again", bench.Table{Name: "again", Title: "Reading the same again at once", Unit: "MiB a second"}),
			m.Table("operations for a MiB", bench.Table{Name: "operations", Title: "Operations of the OSD the first time", Unit: "for each MiB", Less: true}),
			m.Table("read for a byte", bench.Table{Name: "amplification", Title: "Read from the OSD the first time", Unit: "bytes for each byte", Less: true}),
		}, nil
	}}
}

// fragmentation has the images of both sides, one of each kind.
type fragmentation struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *coldDaemon
	store   string // of lsd's images
	size    string // of an image
}

// newFragmentation writes the images.
func newFragmentation(ctx context.Context, h *lab.Host) (f *fragmentation, err error) {
	f = &fragmentation{h: h, store: "rados://rbd/" + uuid.NewString(), size: lab.Pick(h.Effort, "96M", "384M")}
	if f.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	if f.daemon, err = newColdDaemon(ctx, h, "--librbd-log-size", "256M", "--read-cache-size", "1G"); err != nil {
		return nil, err
	}
	if err := f.write(ctx, "ordered", "--rw=write", "--bs=1m", "--iodepth=16"); err != nil {
		return nil, err
	}
	return f, f.write(ctx, "random", "--rw=randwrite", "--bs=4k", "--iodepth=32")
}

// write makes an image on both sides and writes all of it.
func (f *fragmentation) write(ctx context.Context, image string, how ...string) error {
	if _, err := f.daemon.Lsdctl(ctx, "create", f.store+"/"+image, "--size", f.size); err != nil {
		return err
	}
	if _, err := f.h.Run(ctx, "rbd", "create", image, "--size", f.size); err != nil {
		return err
	}
	how = append(how, "--end_fsync=1")
	if _, err := f.fio(ctx, image, how); err != nil {
		return err
	}
	_, err := f.fioPeer(ctx, image, how)
	return err
}

// fio has fio work on lsd's library.
func (f *fragmentation) fio(ctx context.Context, image string, args []string) (lab.Fio, error) {
	return lab.RunFio(f.daemon.Command(ctx, f.store, lab.RBDArgs(image, append([]string{"--size=" + f.size}, args...)...)...))
}

// fioPeer has fio work on Ceph's library, as it is.
func (f *fragmentation) fioPeer(ctx context.Context, image string, args []string) (lab.Fio, error) {
	return lab.RunFio(f.h.Librbd(ctx, true, lab.RBDArgs(image, append([]string{"--size=" + f.size}, args...)...)...))
}

// lsd returns the side of lsd's library, on one of the images. What attaching it takes is not
// counted.
func (f *fragmentation) lsd(image string) func(context.Context, []string) (lab.Figures, error) {
	return func(ctx context.Context, j []string) (lab.Figures, error) {
		if err := f.daemon.forget(ctx); err != nil {
			return nil, err
		}
		if _, err := f.fio(ctx, image, []string{"--rw=read", "--bs=4k", "--number_ios=1"}); err != nil {
			return nil, err
		}
		return f.measure(ctx, j, func(args []string) (lab.Fio, error) { return f.fio(ctx, image, args) })
	}
}

// librbd returns the side of Ceph's library, on one of the images.
func (f *fragmentation) librbd(image string) func(context.Context, []string) (lab.Figures, error) {
	return func(ctx context.Context, j []string) (lab.Figures, error) {
		return f.measure(ctx, j, func(args []string) (lab.Fio, error) { return f.fioPeer(ctx, image, args) })
	}
}

// measure reads all of an image twice.
func (f *fragmentation) measure(ctx context.Context, j []string, fio func(args []string) (lab.Fio, error)) (lab.Figures, error) {
	args := append([]string{"--rw=read"}, j...)
	if err := dropCaches(ctx, f.h, f.cluster); err != nil {
		return nil, err
	}
	before, err := f.cluster.OSD()
	if err != nil {
		return nil, err
	}
	first, err := fio(args)
	if err != nil {
		return nil, err
	}
	after, err := f.cluster.OSD()
	if err != nil {
		return nil, err
	}
	if err := f.h.Rest(ctx); err != nil {
		return nil, err
	}
	again, err := fio(args)
	if err != nil {
		return nil, err
	}
	d, n := after.Sub(before), first.Bytes*first.Took.Seconds()
	return lab.Figures{
		"MiB/s":                first.Bytes / (1 << 20),
		"MiB/s again":          again.Bytes / (1 << 20),
		"operations for a MiB": (d.Reads + d.Writes) / n * (1 << 20),
		"read for a byte":      d.ReadBytes / n,
	}, nil
}

// dropCaches waits for rest, and has OSD and kernel forget what they have in memory.
func dropCaches(ctx context.Context, h *lab.Host, c *lab.Cluster) error {
	if err := h.Rest(ctx); err != nil {
		return err
	}
	if err := c.DropCaches(); err != nil {
		return err
	}
	return lab.DropCaches()
}

// A coldDaemon can be made to forget what it has cached. It does not scrub, which would read
// from the store beside what is measured.
type coldDaemon struct {
	*lab.Daemon
	cache string // path of its read cache
}

func newColdDaemon(ctx context.Context, h *lab.Host, flags ...string) (*coldDaemon, error) {
	cache := filepath.Join(h.Dir, "read-cache")
	d, err := h.Daemon(ctx, append([]string{"--read-cache", cache, "--scrub-rate", "0"}, flags...)...)
	return &coldDaemon{d, cache}, err
}

// forget detaches all images and starts the daemon again, with an empty read cache.
func (d *coldDaemon) forget(ctx context.Context) error {
	if err := d.Detach(ctx); err != nil {
		// One of them may just have been let go of: its last client had closed it a while ago.
		if err := d.Detach(ctx); err != nil {
			return err
		}
	}
	if err := d.Kill(); err != nil {
		return err
	}
	if err := os.Remove(d.cache); err != nil {
		return fmt.Errorf("emptying the read cache: %w", err)
	}
	return d.Start(ctx)
}
