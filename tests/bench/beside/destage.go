package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A destageJob is what the log is filled with, and how many bytes a second the OSD may write to its
// disk when that is written to the store; 0: as many as it can.
type destageJob struct {
	args  []string
	bound int64
}

// slowDisk is a bound that leaves the processors time to spare: what the store takes is what the
// disk does.
const slowDisk = 800 << 20

// destage has what a log holds written to the store, and nothing else: it is filled while the store
// stands still. Beside it is rados bench, with objects of the same size, as many at a time.
func destage() comparison {
	return comparison{name: "destage", title: "from the log into the store, beside rados bench", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		d, err := newDestaging(ctx, h)
		if err != nil {
			return nil, err
		}
		random, ordered := []string{"--rw=randwrite", "--norandommap", "--bs=4k", "--iodepth=32"}, []string{"--rw=write", "--bs=1m", "--iodepth=8"}
		slower := fmt.Sprintf(", onto a disk of %d MiB/s", slowDisk>>20)
		cases := []lab.Case[destageJob]{
			{Name: "random writes of 4k", Do: destageJob{args: random}},
			{Name: "writes of 1m in order", Do: destageJob{args: ordered}},
			{Name: "random writes of 4k" + slower, Do: destageJob{random, slowDisk}},
			{Name: "writes of 1m in order" + slower, Do: destageJob{ordered, slowDisk}},
		}
		if h.Short {
			cases = []lab.Case[destageJob]{cases[0], cases[2]}
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[destageJob]{
			{Name: "lsd", Turn: d.lsd},
			{Name: "rados bench", Turn: d.bench},
		})
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("MiB/s", bench.Table{Name: "rate", Title: fmt.Sprintf("%d MiB from the log into the store", d.bytes>>20), Unit: "MiB a second", Plot: true}),
			m.Table("client CPU", bench.Table{Name: "cpu", Title: "CPU of that: lsd's daemon, or rados bench", Unit: "seconds for a GiB", Less: true}),
			m.Table("OSD CPU", bench.Table{Name: "osd", Title: "CPU of the OSD for that", Unit: "seconds for a GiB", Less: true}),
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
	h.Defer(func() { _ = d.h.LetCluster(context.WithoutCancel(ctx), "resume") })
	// The cleaner, for which there is nothing to do as long as no more is written than this, is
	// not measured here.
	if _, err = d.daemon.Lsdctl(ctx, "create", d.store+"/"+destageImage, "--size", "64G"); err != nil {
		return nil, err
	}
	return d, d.daemon.Hold(ctx, d.store, destageImage)
}

// lsd fills the log while the store stands still, and lets it go on then.
func (d *destaging) lsd(ctx context.Context, j destageJob) (lab.Figures, error) {
	if err := d.begin(ctx, j); err != nil {
		return nil, err
	}
	// The image is opened before.
	args := append([]string{fmt.Sprintf("--io_size=%d", d.bytes), "--size=64G", "--exec_prerun=" + d.cluster.Command("pause")}, j.args...)
	_, err := lab.RunFio(d.daemon.Command(ctx, d.store, lab.RBDArgs(destageImage, args...)...))
	dirty, asked := d.daemon.Dirty(ctx)
	if err == nil && asked == nil && dirty < uint64(d.bytes) {
		err = fmt.Errorf("%d of %d bytes are in the log alone: the store did not stand still", dirty, d.bytes)
	}
	client, osd, counted := d.cpu()
	began := time.Now()
	if err := errors.Join(err, asked, counted, d.h.LetCluster(context.WithoutCancel(ctx), "resume")); err != nil {
		return nil, err
	}
	// What does not fill an object waits for more.
	left, err := d.daemon.AwaitDirty(ctx, engine.DefaultObjectSize-1, settleLimit)
	took := time.Since(began)
	if err != nil {
		return nil, err
	}
	client2, osd2, err := d.cpu()
	mib := float64(dirty-left) / (1 << 20)
	return destaged(mib/took.Seconds(), mib, client2-client, osd2-osd), err
}

// begin waits until all have come to rest, and bounds what the OSD may write.
func (d *destaging) begin(ctx context.Context, j destageJob) error {
	if err := d.h.SlowDown(0); err != nil { // as the job before has left it
		return err
	}
	if err := d.h.Rest(ctx); err != nil {
		return err
	}
	return d.h.SlowDown(j.bound)
}

// destaged returns the figures of so many MiB.
func destaged(rate, mib float64, client, osd time.Duration) lab.Figures {
	return lab.Figures{"MiB/s": rate, "client CPU": client.Seconds() * 1024 / mib, "OSD CPU": osd.Seconds() * 1024 / mib}
}

// cpu returns the processors' time that the daemon and the OSD have had.
func (d *destaging) cpu() (client, osd time.Duration, err error) {
	if client, err = lab.CPU(d.daemon.Pid()); err == nil {
		osd, err = lab.CPU(d.cluster.OSDPid())
	}
	return client, osd, err
}

// bench has rados bench put about as much.
func (d *destaging) bench(ctx context.Context, j destageJob) (lab.Figures, error) {
	if err := d.begin(ctx, j); err != nil {
		return nil, err
	}
	_, osd, err := d.cpu()
	if err != nil {
		return nil, err
	}
	b, err := runRadosBench(ctx, d.h, lab.Pick(d.h.Effort, 1, 3))
	if err != nil {
		return nil, err
	}
	_, osd2, err := d.cpu()
	return destaged(b.rate, b.mib, b.cpu, osd2-osd), err
}

// radosBench is what rados bench says of itself, and what it has taken.
type radosBench struct {
	rate, mib float64 // MiB a second, and in all
	cpu       time.Duration
}

const radosBenchMiB = 8 // of an object, as lsd's are

// runRadosBench has rados bench put objects for so many seconds, as many at a time as lsd.
func runRadosBench(ctx context.Context, h *lab.Host, seconds int) (b radosBench, err error) {
	cmd := h.Command(ctx, "rados", "bench", "-p", "rbd", fmt.Sprint(seconds), "write", "-b", fmt.Sprint(radosBenchMiB<<20), "-t", "8")
	said, err := lab.Output(cmd)
	if err != nil {
		return b, err
	}
	b, err = parseRadosBench(said)
	b.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return b, err
}

func parseRadosBench(said string) (b radosBench, err error) {
	if b.rate, err = radosBenchSays(said, "Bandwidth (MB/sec):"); err != nil { // of 1<<20 bytes
		return b, err
	}
	b.mib, err = radosBenchSays(said, "Total writes made:")
	b.mib *= radosBenchMiB
	return b, err
}

func radosBenchSays(said, what string) (float64, error) {
	_, after, ok := strings.Cut(said, what)
	if !ok {
		return 0, fmt.Errorf("rados bench says %q", said)
	}
	line, _, _ := strings.Cut(after, "\n")
	return strconv.ParseFloat(strings.TrimSpace(line), 64)
}
