package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// overloadStore is what the OSD may write to its disk in a second: far less than it could, and
// than what lsd's client writes where nothing holds it up; about what Ceph's library has it write,
// which is more than twice of what is sent.
const overloadStore = 80 << 20

// overload writes 4 KiB blocks at random over four times what the log holds, and more than that
// in all, onto a store that is slower than the client. What the OSD may write to its disk is
// bounded (lab.Host.SlowDown), which holds for all sides alike, and for rados bench, which says
// what the store takes. Half of the time goes by before anything is measured.
func overload() comparison {
	return comparison{name: "overload", title: "writing for long onto a store that is slower than the client", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		o, err := newOverload(ctx, h)
		if err != nil {
			return nil, err
		}
		m, err := lab.Turns(ctx, h, []lab.Case[int]{{Name: "randwrite 4k, depth 32", Do: 32}}, []lab.Side[int]{
			{Name: "lsd", Turn: o.lsd},
			{Name: "librbd, cache on", Turn: o.librbd},
		})
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("writes/s", bench.Table{Name: "rate", Title: "4 KiB random writes onto a slow store, sustained", Unit: "writes a second", Plot: true}),
			m.Table("least", bench.Table{Name: "least", Title: "The slowest half second of these", Unit: "its part of the mean rate"}),
			asRows(m, bench.Table{Name: "latency", Title: "Latency of these writes", Unit: "ms", Less: true}, "p99", "p99.9", "longest"),
			asRows(m, bench.Table{Name: "store", Title: "What they make of the store's bandwidth", Unit: "1 is all that the store takes"},
				"store, MiB/s", "put for each byte written", "written, MiB/s", "of the store's bandwidth for that"),
		}, nil
	}}
}

// asRows returns one table of several metrics, a row for each that there is.
func asRows(m *lab.Measured, t bench.Table, of ...lab.Metric) bench.Table {
	all := t
	for _, metric := range of {
		one := m.Table(metric, t)
		for _, row := range one.Rows {
			row.Name = string(metric)
			all.Sides = one.Sides
			all.Rows = append(all.Rows, row)
		}
	}
	return all
}

// overloaded has an image of each side, on one cluster.
type overloaded struct {
	h       *lab.Host
	daemon  *lab.Daemon
	store   string // of lsd's image
	span    string // bytes of an image that are written, four times the log
	seconds int    // before anything is measured, and then again
}

const overloadImage = "busy"

// newOverload makes the images, has them written all over and then at random, and slows the OSD
// down.
func newOverload(ctx context.Context, h *lab.Host) (o *overloaded, err error) {
	o = &overloaded{h: h, store: "rados://rbd/" + uuid.NewString(), span: lab.Pick(h.Effort, "384M", "1G"), seconds: lab.Pick(h.Effort, 5, 20)}
	if _, err := h.Cluster(ctx); err != nil {
		return nil, err
	}
	if o.daemon, err = h.Daemon(ctx, "--librbd-log-size", lab.Pick(h.Effort, "96M", "256M"), "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	if _, err := o.daemon.Lsdctl(ctx, "create", o.store+"/"+overloadImage, "--size", "2G"); err != nil {
		return nil, err
	}
	if _, err := h.Run(ctx, "rbd", "create", overloadImage, "--size", "2G"); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1"},
		{"--rw=randwrite", "--bs=4k", "--iodepth=32", "--end_fsync=1", "--io_size=" + lab.Pick(h.Effort, "96m", "1g")},
	} {
		if _, err := lab.RunFio(o.fio(ctx, args)); err != nil {
			return nil, err
		}
		if _, err := lab.RunFio(o.fioPeer(ctx, args)); err != nil {
			return nil, err
		}
	}
	if err := o.daemon.Hold(ctx, o.store, overloadImage); err != nil {
		return nil, err
	}
	if err := h.Rest(ctx); err != nil {
		return nil, err
	}
	return o, h.SlowDown(overloadStore)
}

// engine returns the arguments of fio's rbd engine.
func (o *overloaded) engine(args []string) []string {
	return lab.RBDArgs(overloadImage, append([]string{"--size=" + o.span}, args...)...)
}

// fio returns fio on lsd's library.
func (o *overloaded) fio(ctx context.Context, args []string) *exec.Cmd {
	return o.daemon.Command(ctx, o.store, o.engine(args)...)
}

// fioPeer returns fio on Ceph's library, as it is: with its cache.
func (o *overloaded) fioPeer(ctx context.Context, args []string) *exec.Cmd {
	return o.h.Librbd(ctx, true, o.engine(args)...)
}

// lsd writes for long on lsd's library, and compares the rate with what rados bench puts: the
// store takes that, and of it what lsd puts for each byte that is written, from one rest to the
// next.
func (o *overloaded) lsd(ctx context.Context, depth int) (lab.Figures, error) {
	store, err := o.bench(ctx)
	if err != nil {
		return nil, err
	}
	if err := o.h.Rest(ctx); err != nil {
		return nil, err
	}
	before, err := o.stats(ctx)
	if err != nil {
		return nil, err
	}
	f, written, err := o.write(ctx, depth, o.fio)
	if err != nil {
		return nil, err
	}
	if err := o.h.Rest(ctx); err != nil {
		return nil, err
	}
	after, err := o.stats(ctx)
	if err != nil {
		return nil, err
	}
	put := float64(after.PutBytes-before.PutBytes) / float64(after.WriteByts-before.WriteByts)
	f["store, MiB/s"] = store
	f["put for each byte written"] = put
	f["written, MiB/s"] = written
	f["of the store's bandwidth for that"] = written * put / store
	return f, nil
}

// librbd writes for long on Ceph's library, from one rest to the next as well.
func (o *overloaded) librbd(ctx context.Context, depth int) (lab.Figures, error) {
	f, _, err := o.write(ctx, depth, o.fioPeer)
	if err != nil {
		return nil, err
	}
	return f, o.h.Rest(ctx)
}

// write writes at random, and returns the figures of the second half of the time, and MiB a
// second.
func (o *overloaded) write(ctx context.Context, depth int, fio func(context.Context, []string) *exec.Cmd) (lab.Figures, float64, error) {
	log := filepath.Join(o.h.Dir, "writes")
	f, err := lab.RunFio(fio(ctx, append(lab.Random("randwrite", depth, o.seconds), "--ramp_time="+strconv.Itoa(o.seconds),
		"--write_iops_log="+log, "--log_avg_msec=500")))
	if err != nil {
		return nil, 0, err
	}
	text, err := os.ReadFile(log + "_iops.1.log")
	if err != nil {
		return nil, 0, err
	}
	// The last half second may not have been over.
	rates, err := halfSeconds(string(text), 2*o.seconds-1)
	if err != nil {
		return nil, 0, err
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1e3 }
	return lab.Figures{"writes/s": f.Rate, "least": slices.Min(rates) / f.Rate, "p99": ms(f.P99), "p99.9": ms(f.P999), "longest": ms(f.Longest)},
		f.Bytes / (1 << 20), nil
}

// halfSeconds returns the rates of the first n half seconds in a log of fio's: lines of
// milliseconds, rate and more. fio leaves out those in which nothing was completed.
func halfSeconds(text string, n int) ([]float64, error) {
	rates := make([]float64, n)
	for line := range strings.Lines(text) {
		at, rest, _ := strings.Cut(line, ",")
		rate, _, _ := strings.Cut(rest, ",")
		ms, err := strconv.Atoi(strings.TrimSpace(at))
		if err != nil {
			return nil, fmt.Errorf("fio's log: %w", err)
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(rate), 64)
		if err != nil {
			return nil, fmt.Errorf("fio's log: %w", err)
		}
		if i := (ms+250)/500 - 1; i >= 0 && i < n {
			rates[i] = v
		}
	}
	return rates, nil
}

// bench returns how many MiB a second rados bench puts.
func (o *overloaded) bench(ctx context.Context) (float64, error) {
	b, err := runRadosBench(ctx, o.h, lab.Pick(o.h.Effort, 3, 5))
	if err == nil && b.rate > 1.5*overloadStore/(1<<20) {
		err = fmt.Errorf("the OSD takes %.0f MiB a second: it is not slowed down", b.rate)
	}
	return b.rate, err
}

// stats returns the counts of the one image that is attached.
func (o *overloaded) stats(ctx context.Context) (engine.Stats, error) {
	list, err := o.daemon.Client.Images(ctx)
	if err != nil {
		return engine.Stats{}, err
	}
	if len(list) != 1 || list[0].Stats == nil {
		return engine.Stats{}, fmt.Errorf("%d images are attached, or what there is has not been opened", len(list))
	}
	return *list[0].Stats, nil
}
