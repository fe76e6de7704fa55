package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// destage has what a log holds written to the store, and nothing else: it is filled while the store
// stands still. Beside it is rados bench, with objects of the same size, as many at a time.
func destage() comparison {
	return comparison{name: "destage", title: "from the log into the store, beside rados bench", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		d, err := newDestaging(ctx, h)
		if err != nil {
			return nil, err
		}
		cases := []lab.Case[[]string]{
			{Name: "random writes of 4k", Do: []string{"--rw=randwrite", "--norandommap", "--bs=4k", "--iodepth=32"}},
			{Name: "writes of 1m in order", Do: []string{"--rw=write", "--bs=1m", "--iodepth=8"}},
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[[]string]{
			{Name: "lsd", Turn: d.lsd},
			{Name: "rados bench", Turn: d.bench},
		})
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("MiB/s", bench.Table{Name: "rate", Title: fmt.Sprintf("%d MiB from the log into the store", d.bytes>>20), Unit: "MiB a second", Plot: true}),
		}, nil
	}}
}

// destaging has lsd's image.
type destaging struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *lab.Daemon
	store   string // of the image
	bytes   int    // that are in the log
}

const destageImage = "image"

func newDestaging(ctx context.Context, h *lab.Host) (d *destaging, err error) {
	d = &destaging{h: h, store: "rados://rbd/" + uuid.NewString(), bytes: lab.Pick(h.Effort, 256, 1024) << 20}
	if d.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	// A log of more than twice of what is to be in it: from half of it on writes are slowed down.
	if d.daemon, err = h.Daemon(ctx, "--librbd-log-size", lab.Pick(h.Effort, "1G", "3G"), "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	h.Defer(func() { _ = d.letStore(context.WithoutCancel(ctx), "resume") })
	// The cleaner, for which there is nothing to do as long as no more is written than this, is
	// not measured here.
	if _, err = d.daemon.Lsdctl(ctx, "create", d.store+"/"+destageImage, "--size", "64G"); err != nil {
		return nil, err
	}
	return d, d.daemon.Hold(ctx, d.store, destageImage)
}

// letStore has the cluster pause or resume.
func (d *destaging) letStore(ctx context.Context, do string) error {
	_, err := d.h.Shell(ctx, d.cluster.Command(do))
	return err
}

// lsd fills the log while the store stands still, and lets it go on then.
func (d *destaging) lsd(ctx context.Context, how []string) (lab.Figures, error) {
	if err := d.h.Rest(ctx); err != nil {
		return nil, err
	}
	// The image is opened before.
	args := append([]string{fmt.Sprintf("--io_size=%d", d.bytes), "--size=64G", "--exec_prerun=" + d.cluster.Command("pause")}, how...)
	_, err := lab.RunFio(d.daemon.Command(ctx, d.store, lab.RBDArgs(destageImage, args...)...))
	dirty, asked := d.daemon.Dirty(ctx)
	if err == nil && asked == nil && dirty < uint64(d.bytes) {
		err = fmt.Errorf("%d of %d bytes are in the log alone: the store did not stand still", dirty, d.bytes)
	}
	began := time.Now()
	if err := errors.Join(err, asked, d.letStore(context.WithoutCancel(ctx), "resume")); err != nil {
		return nil, err
	}
	left, err := d.awaitStored(ctx)
	took := time.Since(began)
	return lab.Figures{"MiB/s": float64(dirty-left) / (1 << 20) / took.Seconds()}, err
}

// awaitStored waits until no more is in the log alone than does not fill an object, which waits
// for more, and returns how much that is.
func (d *destaging) awaitStored(ctx context.Context) (left uint64, err error) {
	return left, lab.Await(ctx, "all is in the store", settleLimit, func() (bool, error) {
		left, err = d.daemon.Dirty(ctx)
		return left < engine.DefaultObjectSize, err
	})
}

// bench has rados bench put about as much.
func (d *destaging) bench(ctx context.Context, _ []string) (lab.Figures, error) {
	if err := d.h.Rest(ctx); err != nil {
		return nil, err
	}
	rate, err := radosBench(ctx, d.h, lab.Pick(d.h.Effort, 1, 3))
	return lab.Figures{"MiB/s": rate}, err
}

// radosBench returns how many MiB a second rados bench puts in so many seconds, in objects of lsd's
// size, as many at a time as lsd.
func radosBench(ctx context.Context, h *lab.Host, seconds int) (float64, error) {
	said, err := h.Run(ctx, "rados", "bench", "-p", "rbd", fmt.Sprint(seconds), "write", "-b", "8388608", "-t", "8")
	if err != nil {
		return 0, err
	}
	return benchRate(said)
}
