//go:build lab

package librbd_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/tests/bench"
)

var (
	rounds  = flag.Int("bench.rounds", 5, "turns that each side takes")
	seconds = flag.Int("bench.seconds", 4, "length of a random turn")
	only    = flag.String("bench.jobs", "", "only the jobs of whose names this regular expression finds a part")
	out     = flag.String("bench.out", "", "write the figures to this directory, as JSON")
)

// A job is what fio is to do.
type job struct {
	name  string
	args  []string
	image kind
	raw   bool // the plain file does it too
	store bool // the time is that until all of it is in the store
	warm  bool // all that it may read has been read twice before, after which caches have what they keep
}

// A kind says on which of lsd's images a job works. Ceph's librbd has one, which is full.
type kind int

const (
	fresh kind = iota // made for the turn, so that there is destaging and no cleaning
	full              // written all over again and again, so that there is cleaning as well
)

func random(rw string, depth int) []string {
	return []string{"--rw=" + rw, "--bs=4k", fmt.Sprintf("--iodepth=%d", depth), "--norandommap", "--time_based", fmt.Sprintf("--runtime=%d", *seconds)}
}

// sequential writes a part of an image that the log has room for.
func sequential(bs string, depth int) []string {
	return []string{"--rw=write", "--bs=" + bs, fmt.Sprintf("--iodepth=%d", depth), "--io_size=1g"}
}

func jobs() []job {
	chosen := regexp.MustCompile(*only)
	return slices.DeleteFunc(allJobs(), func(j job) bool { return !chosen.MatchString(j.name) })
}

func allJobs() []job {
	return []job{
		{name: "randwrite 4k, depth 1", args: random("randwrite", 1), raw: true},
		{name: "randwrite 4k, depth 32", args: random("randwrite", 32), raw: true},
		{name: "randwrite 4k, depth 128", args: random("randwrite", 128), raw: true},
		{name: "the same, depth 32, with cleaning", args: random("randwrite", 32), image: full},
		{name: "randread 4k, hot, depth 32", args: append(random("randread", 32), "--size=256m"), image: full, warm: true},
		{name: "write 64k, depth 32", args: sequential("64k", 32)},
		{name: "write 1m, depth 16", args: sequential("1m", 16)},
		{name: "write 1m, into the store", args: []string{"--rw=write", "--bs=1m", "--iodepth=16", "--io_size=2g", "--end_fsync=1"}, store: true},
	}
}

// A figure is what one turn has given.
type figure struct {
	rate  float64       // operations a second
	ops   float64       // in all
	cpu   time.Duration // of fio with the library, and of the daemon
	store time.Duration // of the OSD
}

// A contest is the sides of the comparison, on one cluster and one disk.
type contest struct {
	*host
	b    *testing.B
	file string // of the plain side
	osd  int    // its process
	made int    // images
}

// sides are who takes turns. The first one is lsd.
var sides = [...]string{"lsd", "librbd, cache on", "librbd, cache off", "io_uring on a file"}

// BenchmarkBesideLibrbd has fio's rbd engine work on lsd's library, on Ceph's with its cache and
// without, and on a plain file of the same disk without either, taking turns. Destaging runs: the
// daemon, the log, the OSD and its store share the processors and the disk.
func BenchmarkBesideLibrbd(b *testing.B) {
	c := newContest(b)
	all := make(map[string][][]figure)
	for round := range *rounds {
		for _, j := range jobs() {
			if all[j.name] == nil {
				all[j.name] = make([][]figure, len(sides))
			}
			for i := range sides {
				side := (i + round) % len(sides)
				if side == 3 && !j.raw {
					continue
				}
				f := c.turn(side, &j)
				all[j.name][side] = append(all[j.name][side], f)
				// At once: it takes half an hour.
				fmt.Fprintf(os.Stderr, "turn %d: %s: %s: %.0f a second; CPU of an operation %.1f µs, of the OSD %.1f µs\n",
					round+1, j.name, sides[side], f.rate, f.cpu.Seconds()*1e6/f.ops, f.store.Seconds()*1e6/f.ops)
			}
		}
	}
	c.write(all)
}

// newContest makes the daemon, and the images and the file that stay.
func newContest(b *testing.B) *contest {
	b.Helper()
	h := newHostIn(b, "rados", b.TempDir(), "--librbd-log-size", "4G", "--read-cache-size", "1G")
	c := &contest{host: h, b: b, file: filepath.Join(h.dir, "raw")}
	pid, err := os.ReadFile(filepath.Join(filepath.Dir(os.Getenv("CEPH_CONF")), "osd.pid"))
	if err == nil {
		c.osd, err = strconv.Atoi(strings.TrimSpace(string(pid)))
	}
	if err != nil {
		b.Fatalf("which process is the OSD: %v", err)
	}
	h.lsdctl("create", h.image("full"), "--size", "2G")
	h.shell(h.dir, "rbd create peer --size 2G --image-feature layering,exclusive-lock,object-map,fast-diff && fallocate -l 2G raw")
	fill := &job{name: "fill", args: []string{"--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1"}, image: full}
	for _, side := range []int{0, 1, 3} {
		c.turn(side, fill)
	}
	return c
}

// turn has one side do a job, once all have come to rest.
func (c *contest) turn(side int, j *job) figure {
	c.b.Helper()
	image := "full"
	if side == 0 && j.image == fresh {
		c.made++
		image = fmt.Sprintf("fresh%d", c.made)
		c.lsdctl("create", c.image(image), "--size", "2G")
		defer c.remove(image)
	}
	if side == 0 { // attached, so that what that takes is not counted
		c.fio(image, "--rw=read", "--bs=4k", "--size=2g", "--number_ios=1")
	}
	if j.warm {
		for range 2 {
			c.measure(side, image, &job{name: "read it into the caches", args: []string{"--rw=read", "--bs=1m", "--iodepth=16", "--size=256m"}})
		}
	}
	c.rest()
	daemon, osd := cpu(c.b, c.daemon.Process.Pid), cpu(c.b, c.osd)
	f, took := c.measure(side, image, j)
	if j.store && side == 0 {
		began := time.Now()
		c.await("it does not get into the store", time.Minute, func() bool { return c.dirty() == 0 })
		f.rate = f.ops / (took + time.Since(began)).Seconds()
	}
	c.rest()
	if side == 0 {
		f.cpu += cpu(c.b, c.daemon.Process.Pid) - daemon
	}
	f.store = cpu(c.b, c.osd) - osd
	return f
}

// measure runs fio, and returns what it says and for how long it has been at it.
func (c *contest) measure(side int, image string, j *job) (figure, time.Duration) {
	c.b.Helper()
	ctx, stop := context.WithTimeoutCause(c.b.Context(), 5*time.Minute, errors.New("it does not end"))
	defer stop()
	args := append([]string{"--size=2g", "--output-format=json"}, j.args...)
	var cmd *exec.Cmd
	switch side {
	case 0:
		cmd = c.command(ctx, c.fioArgs(image, args...)...)
	case 1, 2:
		all := c.fioArgs("peer", args...)
		cmd = exec.CommandContext(ctx, all[0], all[1:]...)
		cmd.Env = append(os.Environ(), "CEPH_ARGS=--rbd_cache="+strconv.FormatBool(side == 1))
	default:
		cmd = exec.CommandContext(ctx, "fio", append([]string{"--name=x", "--ioengine=io_uring", "--direct=1", "--filename=" + c.file, "--randrepeat=0"}, args...)...)
	}
	cmd.Dir = c.dir
	text, err := c.try(cmd)
	if err != nil {
		c.b.Fatalf("%s: %s: %v", sides[side], j.name, err)
	}
	f, took := parse(c.b, text)
	f.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return f, took
}

// parse reads what fio says.
func parse(b *testing.B, text string) (f figure, took time.Duration) {
	b.Helper()
	type dir struct {
		IOPS  float64 `json:"iops"`
		Total float64 `json:"total_ios"`
		MS    int64   `json:"runtime"`
	}
	var said struct {
		Jobs []struct {
			Error       int
			Read, Write dir
		}
	}
	_, text, _ = strings.Cut(text, "{")
	if err := json.Unmarshal([]byte("{"+text), &said); err != nil || len(said.Jobs) != 1 || said.Jobs[0].Error != 0 {
		b.Fatalf("fio says %q: %v", text, err)
	}
	d := said.Jobs[0].Read
	if w := said.Jobs[0].Write; w.Total > d.Total {
		d = w
	}
	if d.Total == 0 {
		b.Fatalf("fio has done nothing: %s", text)
	}
	return figure{rate: d.IOPS, ops: d.Total}, time.Duration(d.MS) * time.Millisecond
}

// dirty returns how much is not in the store yet. It asks the daemon without a program between, which
// would take a part of what is measured.
func (c *contest) dirty() (n uint64) {
	c.b.Helper()
	list, err := api.NewClient(c.socket).Images(c.b.Context())
	if err != nil {
		c.b.Fatal(err)
	}
	for _, im := range list {
		if im.Stats != nil {
			n += im.Stats.Dirty
		}
	}
	return n
}

// remove removes an image of lsd's.
func (c *contest) remove(image string) {
	c.b.Helper()
	for _, im := range c.attached() {
		c.lsdctl("del", im.Device)
	}
	c.lsdctl("rm", c.image(image))
}

// rest waits until nothing is left to do from earlier turns, on either side.
func (c *contest) rest() {
	c.b.Helper()
	const look, quiet = 500 * time.Millisecond, 25 * time.Millisecond
	calm := 0
	for end := time.Now().Add(2 * time.Minute); calm < 3; {
		before := cpu(c.b, c.daemon.Process.Pid) + cpu(c.b, c.osd)
		time.Sleep(look)
		if cpu(c.b, c.daemon.Process.Pid)+cpu(c.b, c.osd)-before <= quiet && c.dirty() == 0 {
			calm++
		} else {
			calm = 0
		}
		if time.Now().After(end) {
			c.b.Fatal("the daemon and the OSD do not come to rest")
		}
	}
}

// cpu returns the processors' time that a process has had.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	// utime and stime are the 14th and the 15th field; the second, in brackets, may have blanks.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int64
	for _, s := range fields[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ, which is 100 for all programs
}

// write writes the figures: lsd's beside each peer's, and what the processors give for a second of
// theirs.
func (c *contest) write(all map[string][][]figure) {
	c.b.Helper()
	rate := func(f figure) float64 { return f.rate }
	for _, set := range []struct {
		file, title, unit string
		peer              int
		of                func(figure) float64
	}{
		{"librbd-cache", "lsd's librbd beside Ceph's with its cache", "operations a second", 1, rate},
		{"librbd-nocache", "lsd's librbd beside Ceph's without its cache", "operations a second", 2, rate},
		{"librbd-raw", "lsd's librbd beside io_uring on a file", "operations a second", 3, rate},
		{"librbd-cpu", "what a second of a processor does, client and daemon", "operations", 1, func(f figure) float64 { return f.ops / f.cpu.Seconds() }},
		{"librbd-osd", "what a second of a processor does, OSD", "operations", 2, func(f figure) float64 { return f.ops / max(f.store.Seconds(), 0.01) }},
	} {
		res := bench.Results{Title: set.title, Unit: set.unit, Ours: sides[0], Peer: sides[set.peer],
			Command: fmt.Sprintf("make bench-librbd (%d turns, medians)", *rounds)}
		for _, j := range jobs() {
			row := bench.Row{Name: j.name}
			if len(all[j.name][set.peer]) == 0 || j.rw() == "randread" && set.file == "librbd-osd" {
				continue
			}
			for i := range all[j.name][0] {
				row.Ours = append(row.Ours, set.of(all[j.name][0][i]))
				row.Peer = append(row.Peer, set.of(all[j.name][set.peer][i]))
			}
			res.Rows = append(res.Rows, row)
		}
		if len(res.Rows) == 0 {
			continue // that peer had none of the chosen jobs
		}
		fmt.Fprintf(os.Stderr, "%s\n\n%s\n", res.Title, res.Table())
		if *out == "" {
			continue
		}
		if err := res.Write(filepath.Join(*out, set.file+".json")); err != nil {
			c.b.Fatal(err)
		}
	}
}

// rw returns what a job does.
func (j *job) rw() string { return strings.TrimPrefix(j.args[0], "--rw=") }
