package main

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// What all images of a set have together.
const (
	scaleDepth = 64
	scaleLog   = 5 << 30 // bytes: no log may be smaller than 65 MiB
)

// scale has one fio write to many images, and to one with many writes in flight. All images of a
// number are as large together as those of another, and so are lsd's logs.
func scale() comparison {
	return comparison{name: "scale", title: "1 to 64 images at once, and 1 to 1024 writes in flight", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		if _, err := h.Cluster(ctx); err != nil {
			return nil, err
		}
		images := bench.Table{Name: "images", Title: "Random writes of 4 KiB to many images at once", Unit: "writes a second in all", Plot: true}
		memory := bench.Table{Name: "memory", Title: "Resident memory at the most, client and daemon", Unit: "MiB", Less: true}
		threads := bench.Table{Name: "threads", Title: "Threads at the most, client and daemon", Unit: "threads", Less: true}
		daemon := bench.Table{Name: "daemon", Title: "Of this, the daemon", Unit: "as it says", Less: true}
		depth := bench.Table{Name: "depth", Title: "Random writes of 4 KiB to one image, with many in flight", Unit: "writes a second", Plot: true}
		latency := bench.Table{Name: "latency", Title: "99 of 100 of these take less than", Unit: "ms", Less: true, Plot: true}
		for _, n := range lab.Pick(h.Effort, []int{4}, []int{1, 4, 16, 64}) {
			many, deep, err := scaleTo(ctx, h, n)
			if err != nil {
				return nil, err
			}
			if many == nil {
				continue
			}
			join(&images, many.Table("writes/s", bench.Table{}))
			join(&memory, many.Table("MiB", bench.Table{}))
			join(&threads, many.Table("threads", bench.Table{}))
			join(&daemon, byPart(many, []lab.Metric{"MiB of the daemon", "threads of the daemon"}, bench.Table{}))
			join(&depth, deep.Table("writes/s", bench.Table{}))
			join(&latency, deep.Table("ms p99", bench.Table{}))
		}
		tables := []bench.Table{images, memory, threads, daemon, depth, latency}
		return slices.DeleteFunc(tables, func(t bench.Table) bool { return len(t.Rows) == 0 }), nil // --cases
	}}
}

// join appends the rows of a table to one with the same sides.
func join(t *bench.Table, more bench.Table) {
	if len(more.Rows) > 0 {
		t.Sides, t.Rows = more.Sides, append(t.Rows, more.Rows...)
	}
}

// scaleTo measures writes to so many images at once; and if it is one, with many in flight. Both
// are nil where no case of theirs is asked for.
func scaleTo(ctx context.Context, h *lab.Host, n int) (many, deep *lab.Measured, err error) {
	s := &imageSet{h: h, images: n, size: lab.Pick(h.Effort, 256, 2048) / n, store: "rados://rbd/" + uuid.NewString()}
	at := []lab.Case[int]{{Name: fmt.Sprintf("%d images, depth %d each", n, scaleDepth/n), Do: scaleDepth / n}}
	var depths []lab.Case[int]
	if n == 1 {
		at[0].Name = fmt.Sprintf("one image, depth %d", scaleDepth)
		for _, d := range []int{1, 4, 16, 64, 256, 1024} {
			depths = append(depths, lab.Case[int]{Name: fmt.Sprintf("depth %d", d), Do: d})
		}
	}
	if !slices.ContainsFunc(append(at, depths...), func(c lab.Case[int]) bool {
		asked, err := regexp.MatchString(h.Cases, c.Name)
		return asked || err != nil // which lab.Turns tells
	}) {
		return nil, nil, nil
	}
	h.Say("making %d of the images", n)
	if err := s.make(ctx); err != nil {
		return nil, nil, fmt.Errorf("making %d images: %w", n, err)
	}
	defer s.end()
	sides := []lab.Side[int]{
		{Name: "lsd", Turn: s.measureLSD},
		{Name: "librbd, cache on", Turn: s.measureLibrbd(true)},
		{Name: "librbd, cache off", Turn: s.measureLibrbd(false)},
	}
	// A first look does without the last one, and so does whoever has many writes in flight: the
	// cache is on by default.
	if many, err = lab.Turns(ctx, h, at, lab.Pick(h.Effort, sides[:2], sides)); err != nil {
		return nil, nil, err
	}
	deep, err = lab.Turns(ctx, h, depths, sides[:2])
	return many, deep, err
}

// An imageSet is a number of images of the same size, full, lsd's with a daemon of their own.
type imageSet struct {
	h      *lab.Host
	images int
	size   int // MiB, of each
	daemon *lab.Daemon
	store  string
	let    func() // has nobody hold lsd's images open; nil while nobody does
}

// name returns the name of an image of the set.
func (s *imageSet) name(i int) string { return fmt.Sprintf("image%d.%d", s.images, i) }

func (s *imageSet) make(ctx context.Context) (err error) {
	if s.daemon, err = s.h.Daemon(ctx, "--librbd-log-size", strconv.Itoa(scaleLog/s.images), "--scrub-rate", "0"); err != nil {
		return err
	}
	for i := range s.images {
		if _, err := s.daemon.Lsdctl(ctx, "create", s.store+"/"+s.name(i), "--size", fmt.Sprintf("%dM", s.size)); err != nil {
			return err
		}
		if _, err := s.h.Run(ctx, "rbd", "create", s.name(i), "--size", fmt.Sprintf("%dM", s.size), "--image-feature", "layering,exclusive-lock,object-map,fast-diff"); err != nil {
			return err
		}
	}
	if err := s.hold(ctx); err != nil {
		return err
	}
	s.h.Idle = time.Duration(s.images) * 500 * time.Microsecond // leases, mostly
	for _, cmd := range []*exec.Cmd{s.lsd(ctx, "--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"), s.librbd(ctx, true, "--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1")} {
		if _, err := lab.RunFio(cmd); err != nil {
			return err
		}
	}
	return nil
}

// hold has lsd's images open until the end, or the daemon would detach them between turns and make
// their logs anew.
func (s *imageSet) hold(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	cmd := s.lsd(ctx, "--rw=read", "--bs=4k", "--startdelay=1d") // it opens them before
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	ended := make(chan error, 1)
	go func() {
		_, err := lab.Output(cmd)
		ended <- err
	}()
	s.let = sync.OnceFunc(func() { stop(); <-ended })
	s.h.Defer(s.let)
	return lab.Await(ctx, "fio opens the images", 3*time.Minute, func() (bool, error) {
		select {
		case err := <-ended:
			ended <- err
			return false, fmt.Errorf("it has ended: %v", err)
		default:
		}
		list, err := s.daemon.Client.Images(ctx)
		open := 0
		for _, im := range list {
			open += len(im.Clients)
		}
		return open == s.images, err
	})
}

// end ends the daemon, which else would take its part of the processors.
func (s *imageSet) end() {
	s.h.Idle = 0
	s.let()
	s.daemon.End()
}

// fio returns a command of one fio with a job for each image of the set.
func (s *imageSet) fio(job ...string) []string {
	args := append([]string{"fio", "--randrepeat=0", "--output-format=json", "--group_reporting", "--ioengine=rbd", "--clientname=admin", "--pool=rbd", fmt.Sprintf("--size=%dm", s.size)}, job...)
	for i := range s.images {
		args = append(args, "--name="+s.name(i), "--rbdname="+s.name(i))
	}
	return args
}

// lsd returns a command that does a job on lsd's images.
func (s *imageSet) lsd(ctx context.Context, job ...string) *exec.Cmd {
	return s.daemon.Command(ctx, s.store, s.fio(job...)...)
}

// librbd returns a command that does a job on Ceph's images.
func (s *imageSet) librbd(ctx context.Context, cache bool, job ...string) *exec.Cmd {
	return s.h.Librbd(ctx, cache, s.fio(job...)...)
}

// job returns fio's arguments for random writes that go by time.
func (s *imageSet) job(depth int) []string {
	return lab.Random("randwrite", depth, s.h.Seconds)
}

func (s *imageSet) measureLSD(ctx context.Context, depth int) (lab.Figures, error) {
	f, held, err := s.measure(ctx, s.lsd(ctx, s.job(depth)...), s.daemon.Pid())
	if err != nil {
		return nil, err
	}
	f["MiB of the daemon"], f["threads of the daemon"] = held[1].Memory/(1<<20), held[1].Threads
	return f, nil
}

// measureLibrbd returns the side of Ceph's library, with its cache or without.
func (s *imageSet) measureLibrbd(cache bool) func(context.Context, int) (lab.Figures, error) {
	return func(ctx context.Context, depth int) (lab.Figures, error) {
		f, _, err := s.measure(ctx, s.librbd(ctx, cache, s.job(depth)...))
		return f, err
	}
}

// measure runs a command that is fio once all have come to rest, and looks at what it and the
// daemon have meanwhile.
func (s *imageSet) measure(ctx context.Context, fio *exec.Cmd, daemon ...int) (lab.Figures, []lab.Held, error) {
	if err := s.h.Rest(ctx); err != nil {
		return nil, nil, err
	}
	f, held, err := lab.RunFioLooking(fio, daemon...)
	if err != nil {
		return nil, nil, err
	}
	var all lab.Held
	for _, h := range held {
		all = all.Add(h)
	}
	return lab.Figures{
		"writes/s": f.Rate,
		"ms p99":   milliseconds(f.P99),
		"MiB":      all.Memory / (1 << 20),
		"threads":  all.Threads,
	}, held, nil
}
