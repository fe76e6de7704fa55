package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A libraryJob is what fio is to do.
type libraryJob struct {
	args    []string
	full    bool  // lsd's image is one that is written all over again and again, so that there is cleaning; else a new one
	raw     bool  // the plain file does it too
	stored  bool  // the time is that until all of it is in the store
	bound   int64 // bytes a second that the OSD may write to its disk; 0: as many as it can
	warm    bool  // all that it may read has been read twice before, after which caches have what they keep
	reading bool
}

// library has fio's rbd engine, unchanged, work on lsd's library, on Ceph's with its cache and
// without, and fio's io_uring on a plain file of the same disk. Destaging runs: client, daemon,
// log, OSD and its store share the processors and the disk.
func library() comparison {
	return comparison{name: "library", title: "fio on lsd's librbd, on Ceph's, and on a plain file", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		l, err := newLibraries(ctx, h)
		if err != nil {
			return nil, err
		}
		sequential := func(bs string, depth int) []string {
			return []string{"--rw=write", "--bs=" + bs, fmt.Sprintf("--iodepth=%d", depth), "--io_size=" + lab.Pick(h.Effort, "256m", "1g")}
		}
		long := []string{"--rw=write", "--bs=1m", "--iodepth=16", "--io_size=" + lab.Pick(h.Effort, "512m", "2g"), "--end_fsync=1"}
		s := h.Seconds
		cases := []lab.Case[libraryJob]{
			{Name: "randwrite 4k, depth 1", Do: libraryJob{args: lab.Random("randwrite", 1, s), raw: true}},
			{Name: "randwrite 4k, depth 32", Do: libraryJob{args: lab.Random("randwrite", 32, s), raw: true}},
			{Name: "randwrite 4k, depth 128", Do: libraryJob{args: lab.Random("randwrite", 128, s), raw: true}},
			{Name: "the same, depth 32, with cleaning", Do: libraryJob{args: lab.Random("randwrite", 32, s), full: true}},
			{Name: "randread 4k, hot, depth 32", Do: libraryJob{args: append(lab.Random("randread", 32, s), "--size="+hotSize(h)), full: true, warm: true, reading: true}},
			{Name: "write 64k, depth 32", Do: libraryJob{args: sequential("64k", 32)}},
			{Name: "write 1m, depth 16", Do: libraryJob{args: sequential("1m", 16)}},
			{Name: "write 1m, into the store", Do: libraryJob{args: long, stored: true}},
			{Name: fmt.Sprintf("the same, onto a disk of %d MiB/s", slowLibraryDisk>>20), Do: libraryJob{args: long, stored: true, bound: slowLibraryDisk}},
		}
		if h.Short {
			cases = []lab.Case[libraryJob]{cases[1], cases[4], cases[7]} // fsync has depth 1
		}
		m, err := lab.Turns(ctx, h, cases, l.sides())
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("ops/s", bench.Table{Name: "rate", Title: "fio on lsd's librbd beside Ceph's, and on a plain file", Unit: "operations a second", Plot: true}),
			m.Table("µs CPU", bench.Table{Name: "cpu", Title: "CPU of an operation, client and daemon", Unit: "µs", Less: true}),
			m.Table("µs CPU in the OSD", bench.Table{Name: "osd", Title: "CPU of an operation, OSD", Unit: "µs", Less: true}),
		}, nil
	}}
}

// slowLibraryDisk is a bound that leaves the processors time to spare: what gets into the store is
// what its disk takes.
const slowLibraryDisk = 200 << 20

// hotSize is the size of the part of the images that reads which are to be hot are of.
func hotSize(h *lab.Host) string { return lab.Pick(h.Effort, "64m", "256m") }

// libraries are the sides, on one cluster and one disk.
type libraries struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *lab.Daemon
	store   string // of lsd's images
	made    int    // of those
	size    string // of all of them
}

// newLibraries makes the images and the file that stay, full.
func newLibraries(ctx context.Context, h *lab.Host) (l *libraries, err error) {
	l = &libraries{h: h, store: "rados://rbd/" + uuid.NewString(), size: lab.Pick(h.Effort, "512M", "2G")}
	if l.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	// Neither side scrubs: that goes by time, and rest would be waited for through all of it.
	if l.daemon, err = h.Daemon(ctx, "--librbd-log-size", "4G", "--read-cache-size", "1G", "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	if _, err := l.daemon.Lsdctl(ctx, "create", l.store+"/full", "--size", l.size); err != nil {
		return nil, err
	}
	if _, err := h.Shell(ctx, fmt.Sprintf("rbd create peer --size %s --image-feature layering,exclusive-lock,object-map,fast-diff && fallocate -l %[1]s raw", l.size)); err != nil {
		return nil, err
	}
	// Whoever is measured first waits until all have come to rest.
	for _, fio := range []fioRun{l.fioLSD(ctx, "full"), l.fioLibrbd(ctx, true), l.fioFile(ctx)} {
		if _, err := fio([]string{"--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1"}); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// A fioRun has fio do a job, with these arguments, on one image or file.
type fioRun func(args []string) (lab.Fio, error)

// fioLSD is on an image of lsd's, through its library.
func (l *libraries) fioLSD(ctx context.Context, image string) fioRun {
	return func(args []string) (lab.Fio, error) {
		return lab.RunFio(l.daemon.Command(ctx, l.store, l.engine(image, args)...))
	}
}

// fioLibrbd is on Ceph's image, through its library with its cache or without.
func (l *libraries) fioLibrbd(ctx context.Context, cache bool) fioRun {
	return func(args []string) (lab.Fio, error) {
		return lab.RunFio(l.h.Librbd(ctx, cache, l.engine("peer", args)...))
	}
}

// fioFile is on the plain file.
func (l *libraries) fioFile(ctx context.Context) fioRun {
	return func(args []string) (lab.Fio, error) {
		return l.h.Fio(ctx, append([]string{"--ioengine=io_uring", "--direct=1", "--size=" + l.size, "--filename=" + filepath.Join(l.h.Dir, "raw")}, args...)...)
	}
}

// sides returns them.
func (l *libraries) sides() []lab.Side[libraryJob] {
	all := []lab.Side[libraryJob]{
		{Name: "lsd", Turn: l.lsd},
		{Name: "librbd, cache on", Turn: l.librbd(true)},
		{Name: "librbd, cache off", Turn: l.librbd(false)},
		{Name: "io_uring on a file", Turn: l.file},
	}
	if l.h.Short {
		all = slices.Delete(all, 2, 3) // the cache is on by default
	}
	return all
}

// engine returns the arguments of fio's rbd engine for a job on an image.
func (l *libraries) engine(image string, j []string) []string {
	return lab.RBDArgs(image, append([]string{"--size=" + l.size}, j...)...)
}

// lsd does a job on lsd's library, on an image that is attached before, so that what that takes
// is not counted.
func (l *libraries) lsd(ctx context.Context, j libraryJob) (lab.Figures, error) {
	image := "full"
	if !j.full {
		l.made++
		image = fmt.Sprintf("fresh%d", l.made)
		if _, err := l.daemon.Lsdctl(ctx, "create", l.store+"/"+image, "--size", l.size); err != nil {
			return nil, err
		}
	}
	fio := l.fioLSD(ctx, image)
	if _, err := fio([]string{"--rw=read", "--bs=4k", "--number_ios=1"}); err != nil {
		return nil, err
	}
	f, err := l.measure(ctx, j, fio)
	if err != nil || j.full {
		return f, err
	}
	if err := l.daemon.Detach(ctx); err != nil {
		return nil, err
	}
	_, err = l.daemon.Lsdctl(ctx, "rm", l.store+"/"+image)
	return f, err
}

// librbd returns the side of Ceph's library, with its cache or without.
func (l *libraries) librbd(cache bool) func(context.Context, libraryJob) (lab.Figures, error) {
	return func(ctx context.Context, j libraryJob) (lab.Figures, error) {
		return l.measure(ctx, j, l.fioLibrbd(ctx, cache))
	}
}

// file does a job on a plain file, if it is one for that.
func (l *libraries) file(ctx context.Context, j libraryJob) (lab.Figures, error) {
	if !j.raw {
		return nil, nil
	}
	return l.measure(ctx, j, l.fioFile(ctx))
}

// measure does a job once all have come to rest, and counts what it costs until they have again.
func (l *libraries) measure(ctx context.Context, j libraryJob, fio fioRun) (lab.Figures, error) {
	if j.warm {
		for range 2 {
			if _, err := fio([]string{"--rw=read", "--bs=1m", "--iodepth=16", "--size=" + hotSize(l.h)}); err != nil {
				return nil, err
			}
		}
	}
	if err := l.h.Rest(ctx); err != nil {
		return nil, err
	}
	if err := l.h.SlowDown(j.bound); err != nil {
		return nil, err
	}
	daemon, osd, err := l.spent()
	if err != nil {
		return nil, err
	}
	f, err := fio(j.args)
	if err != nil {
		return nil, err
	}
	rate := f.Rate
	if j.stored {
		began := time.Now()
		if err := l.daemon.AwaitStored(ctx, time.Minute); err != nil {
			return nil, err
		}
		rate = f.Ops / (f.Took + time.Since(began)).Seconds()
	}
	if err := l.h.Rest(ctx); err != nil {
		return nil, err
	}
	daemon2, osd2, err := l.spent()
	if err != nil {
		return nil, err
	}
	figures := lab.Figures{"ops/s": rate, "µs CPU": (f.CPU + daemon2 - daemon).Seconds() * 1e6 / f.Ops}
	if !j.reading {
		figures["µs CPU in the OSD"] = (osd2 - osd).Seconds() * 1e6 / f.Ops
	}
	if f.SyncP99 > 0 {
		figures["p99 ms"] = ms(f.SyncP99)
	}
	return figures, nil
}

// spent returns the processors' time that the daemon and the OSD have had.
func (l *libraries) spent() (daemon, osd time.Duration, err error) {
	if daemon, err = lab.CPU(l.daemon.Pid()); err != nil {
		return 0, 0, err
	}
	o, err := l.cluster.OSD()
	return daemon, o.CPU, err
}
