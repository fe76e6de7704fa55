package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A cpuJob is what fio is to do.
type cpuJob struct {
	args []string
	warm int // times that what it reads has been read before
}

// processors counts what an operation of 4 KiB takes of the processors: instructions where the
// machine counts them, else time; system calls, and changes of the thread. lsd's are those of the
// client and of the daemon, destaging and cleaning included, librbd's those of the client. What fio
// and both libraries take to begin and to end is not counted, nor is the OSD.
func processors() comparison {
	return comparison{name: "cpu", title: "instructions or time, system calls, allocations of a 4 KiB operation", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		c, err := newCounting(ctx, h)
		if err != nil {
			return nil, err
		}
		cases := []lab.Case[cpuJob]{
			{Name: "randwrite 4k, depth 1", Do: cpuJob{args: lab.Random("randwrite", 1, h.Seconds)}},
			{Name: "randwrite 4k, depth 32", Do: cpuJob{args: lab.Random("randwrite", 32, h.Seconds)}},
			{Name: "randread 4k, hot, depth 32", Do: cpuJob{args: append(lab.Random("randread", 32, h.Seconds), "--size=256m"), warm: 2}},
		}
		if h.Short {
			cases = cases[1:2]
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[cpuJob]{
			{Name: "lsd, client and daemon", Turn: c.turn(c.lsd())},
			{Name: "librbd, cache on", Turn: c.turn(c.librbd(true))},
			{Name: "librbd, cache off", Turn: c.turn(c.librbd(false))},
		})
		if err != nil {
			return nil, err
		}
		return c.tables(m), nil
	}}
}

// The events that are counted.
const (
	systemCalls = "raw_syscalls:sys_enter"
	switches    = "context-switches"
	userCode    = "instructions:u"
	kernelCode  = "instructions:k"
	yields      = "syscalls:sys_enter_sched_yield"
)

// What an operation takes, as metrics: of the whole, and of its parts.
const (
	wholeWork  lab.Metric = "work"
	wholeCalls lab.Metric = "system calls"
	wholeTurns lab.Metric = "switches"
)

// counting is what the sides have in common.
type counting struct {
	h      *lab.Host
	perf   *lab.Perf
	daemon *lab.Daemon
	store  string // of lsd's image
	size   string // of the images
}

// newCounting makes the images, full.
func newCounting(ctx context.Context, h *lab.Host) (c *counting, err error) {
	c = &counting{h: h, store: "rados://rbd/" + uuid.NewString(), size: lab.Pick(h.Effort, "256M", "2G")}
	if c.perf, err = h.Perf(ctx, []string{systemCalls, switches}, userCode, kernelCode, yields); err != nil {
		return nil, err
	}
	if _, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	// The daemon is to tell what collections of garbage cost it.
	if err := os.Setenv("GODEBUG", "gctrace=1"); err != nil {
		return nil, err
	}
	c.daemon, err = h.Daemon(ctx, "--librbd-log-size", "4G", "--read-cache-size", "1G", "--scrub-rate", "0")
	if err := errors.Join(err, os.Unsetenv("GODEBUG")); err != nil {
		return nil, err
	}
	if _, err := c.daemon.Lsdctl(ctx, "create", c.store+"/image", "--size", c.size); err != nil {
		return nil, err
	}
	if _, err := h.Run(ctx, "rbd", "create", "image", "--size", c.size, "--image-feature", "layering,exclusive-lock,object-map,fast-diff"); err != nil {
		return nil, err
	}
	for _, s := range []counted{c.lsd(), c.librbd(true)} {
		if _, err := lab.RunFio(s.command(ctx, c.fio("--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1"))); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// fio returns fio's arguments for a job.
func (c *counting) fio(job ...string) []string {
	return lab.RBDArgs("image", append([]string{"--size=" + c.size}, job...)...)
}

// A counted is a side.
type counted struct {
	command func(ctx context.Context, args []string) *exec.Cmd // that runs a program on its library
	daemon  bool                                               // its daemon counts, too
}

func (c *counting) lsd() counted {
	return counted{daemon: true, command: func(ctx context.Context, args []string) *exec.Cmd {
		return c.daemon.Command(ctx, c.store, args...)
	}}
}

func (c *counting) librbd(cache bool) counted {
	return counted{command: func(ctx context.Context, args []string) *exec.Cmd {
		return c.h.Librbd(ctx, cache, args...)
	}}
}

// A cost is what a job has taken.
type cost struct {
	ops            float64
	client, daemon spent
	mallocs, bytes float64 // of the daemon
	gc             float64 // µs
}

// spent is what the job has taken of one process.
type spent struct {
	user, kernel    float64 // instructions, or µs
	calls, switches float64
	yields          float64 // of calls
}

func (s *spent) work() float64 { return s.user + s.kernel }

// sub returns what was spent beyond another one.
func (s spent) sub(x spent) spent {
	return spent{s.user - x.user, s.kernel - x.kernel, s.calls - x.calls, s.switches - x.switches, s.yields - x.yields}
}

// per returns what each of so many operations took.
func (s spent) per(ops float64) spent {
	return spent{s.user / ops, s.kernel / ops, s.calls / ops, s.switches / ops, s.yields / ops}
}

// turn returns what a side does in its turn: the job; and once, before the first, one of a single
// operation, which tells what it takes to begin and to end.
func (c *counting) turn(s counted) func(context.Context, cpuJob) (lab.Figures, error) {
	var single *cost
	return func(ctx context.Context, j cpuJob) (lab.Figures, error) {
		if single == nil {
			k, err := c.count(ctx, s, c.fio("--rw=randread", "--bs=4k", "--number_ios=1"))
			if err != nil {
				return nil, err
			}
			single = &k
		}
		for range j.warm {
			if _, err := lab.RunFio(s.command(ctx, c.fio("--rw=read", "--bs=1m", "--iodepth=16", "--size=256m"))); err != nil {
				return nil, err
			}
		}
		k, err := c.count(ctx, s, c.fio(j.args...))
		if err != nil {
			return nil, err
		}
		return c.figures(s, k, *single), nil
	}
}

// count has fio do a job once all have come to rest, and counts what it takes until they have again.
func (c *counting) count(ctx context.Context, s counted, fio []string) (k cost, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if err := c.h.Rest(ctx); err != nil {
		return k, err
	}
	daemon := func() error { return nil }
	if s.daemon {
		if daemon, err = c.watch(ctx, &k); err != nil {
			return k, err
		}
	}
	args, counted := c.perf.Around(fio...)
	cmd := s.command(ctx, args)
	f, err := lab.RunFio(cmd)
	if err != nil {
		return k, err
	}
	events, err := counted()
	if err != nil {
		return k, err
	}
	k.ops, k.client = f.Ops, c.spent(events, cmd.ProcessState.UserTime(), cmd.ProcessState.SystemTime())
	return k, daemon()
}

// spent returns what a process has taken, from what was counted and from the time that it has had.
func (c *counting) spent(events map[string]float64, user, kernel time.Duration) spent {
	s := spent{calls: events[systemCalls], switches: events[switches], yields: events[yields], user: microseconds(user), kernel: microseconds(kernel)}
	if c.instructions() {
		s.user, s.kernel = events[userCode], events[kernelCode]
	}
	return s
}

// instructions reports whether instructions are counted, not time.
func (c *counting) instructions() bool { return c.perf.Counts(userCode) && c.perf.Counts(kernelCode) }

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// watch begins to count what the daemon does. What it returns waits until all have come to rest,
// and enters it in k.
func (c *counting) watch(ctx context.Context, k *cost) (ended func() error, err error) {
	pid := c.daemon.Pid()
	counted, err := c.perf.Attach(ctx, pid)
	if err != nil {
		return nil, err
	}
	user, kernel, err := lab.CPUTimes(pid)
	if err != nil {
		return nil, err
	}
	is, err := os.Stat(c.daemon.Log)
	if err != nil {
		return nil, err
	}
	const mallocs, bytes = "go_memstats_mallocs_total", "go_memstats_alloc_bytes_total"
	before, err := c.daemon.Metrics(ctx, mallocs, bytes)
	if err != nil {
		return nil, err
	}
	return func() error {
		if err := c.h.Rest(ctx); err != nil {
			return err
		}
		after, err := c.daemon.Metrics(ctx, mallocs, bytes)
		if err != nil {
			return err
		}
		user2, kernel2, err := lab.CPUTimes(pid)
		if err != nil {
			return err
		}
		events, err := counted()
		if err != nil {
			return err
		}
		k.daemon = c.spent(events, user2-user, kernel2-kernel)
		k.mallocs, k.bytes = after[mallocs]-before[mallocs], after[bytes]-before[bytes]
		k.gc, err = collectedSince(c.daemon.Log, is.Size())
		return err
	}, nil
}

// figures returns what each operation of a job took beyond what a job of one operation takes.
func (c *counting) figures(s counted, all, single cost) lab.Figures {
	ops := all.ops - single.ops
	client, daemon := all.client.sub(single.client).per(ops), all.daemon.sub(single.daemon).per(ops)
	f := lab.Figures{
		wholeWork:  client.work() + daemon.work(),
		wholeCalls: client.calls + daemon.calls,
		wholeTurns: client.switches + daemon.switches,
	}
	if !s.daemon {
		return f
	}
	f[c.part("client: %s")] = client.work()
	f[c.part("client: %s, in the kernel")] = client.kernel
	f["client: system calls"] = client.calls
	f["client: switches of the thread"] = client.switches
	f[c.part("daemon: %s")] = daemon.work()
	f[c.part("daemon: %s, in the kernel")] = daemon.kernel
	f["daemon: system calls"] = daemon.calls
	if c.perf.Counts(yields) {
		f["daemon: rounds of looking for work before it sleeps"] = daemon.yields
	}
	f["daemon: switches of the thread"] = daemon.switches
	f["daemon: allocations"] = max(0, all.mallocs-single.mallocs) / ops // it does more by itself than for the one
	f["daemon: bytes allocated"] = max(0, all.bytes-single.bytes) / ops
	f["daemon: µs of collecting garbage"] = max(0, all.gc-single.gc) / ops
	return f
}

// parts are the names of the metrics of lsd's parts.
func (c *counting) parts() (list []lab.Metric) {
	for _, name := range []string{
		"client: %s", "client: %s, in the kernel", "client: system calls", "client: switches of the thread",
		"daemon: %s", "daemon: %s, in the kernel", "daemon: system calls", "daemon: rounds of looking for work before it sleeps",
		"daemon: switches of the thread", "daemon: allocations", "daemon: bytes allocated", "daemon: µs of collecting garbage",
	} {
		list = append(list, c.part(name))
	}
	return list
}

// part puts what is counted into a name.
func (c *counting) part(name string) lab.Metric {
	return lab.Metric(strings.ReplaceAll(name, "%s", c.unit()))
}

func (c *counting) unit() string {
	if c.instructions() {
		return "instructions"
	}
	return "µs"
}

func (c *counting) tables(m *lab.Measured) []bench.Table {
	work := bench.Table{Name: "work", Title: "Instructions of a 4 KiB operation", Unit: "instructions", Less: true, Plot: true}
	if !c.instructions() {
		work.Title, work.Unit = "Time of the processors for a 4 KiB operation (this machine counts no instructions)", "µs"
	}
	return []bench.Table{
		m.Table(wholeWork, work),
		m.Table(wholeCalls, bench.Table{Name: "calls", Title: "System calls of a 4 KiB operation", Unit: "system calls", Less: true, Plot: true}),
		m.Table(wholeTurns, bench.Table{Name: "switches", Title: "How often a processor changes the thread for a 4 KiB operation", Unit: "times", Less: true}),
		byPart(m, c.parts(), bench.Table{Name: "parts", Title: "lsd's client and daemon, for each operation", Unit: "as it says", Less: true}),
	}
}

// collectedSince returns the processors' time, in µs, that collections of garbage took of which a
// Go program's log tells from an offset on.
func collectedSince(log string, offset int64) (float64, error) {
	f, err := os.Open(log)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return 0, err
	}
	return collected(f)
}

// collected returns what the lines of GODEBUG=gctrace=1 say: the time of each collection's phases,
// that of the one in the middle in the goroutines that allocate, in workers, and in those that
// would have been idle (package runtime).
func collected(log io.Reader) (us float64, err error) {
	line := regexp.MustCompile(`^gc \d+ @.* ms clock, ([\d.]+)\+([\d.]+)/([\d.]+)/([\d.]+)\+([\d.]+) ms cpu,`)
	s := bufio.NewScanner(log)
	for s.Scan() {
		m := line.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		for _, text := range m[1:] {
			ms, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return 0, fmt.Errorf("line %q: %w", s.Text(), err)
			}
			us += ms * 1e3
		}
	}
	return us, s.Err()
}
