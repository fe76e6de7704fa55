package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A dirtyLog is what is in the write log, and nowhere else, when the daemon is killed.
type dirtyLog struct {
	bytes int64
	block string // size of the writes
}

// dirtyCases returns a row for each.
func dirtyCases(all []dirtyLog) (cases []lab.Case[dirtyLog]) {
	for _, d := range all {
		cases = append(cases, lab.Case[dirtyLog]{Name: bytesize.Human(uint64(d.bytes)) + " of random writes of " + d.block, Do: d})
	}
	return cases
}

// recovery kills the daemon while a client writes, and starts it again at once: how long the client
// waits depends on how much there is in the write log that the store does not have. The log is
// filled while the store stands still, which goes on when the daemon dies.
func recovery() comparison {
	return comparison{name: "recovery", title: "from kill -9 of the daemon to the first completed write, against what is in its log alone", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		r, err := newRecoveries(ctx, h)
		if err != nil {
			return nil, err
		}
		dirty := []dirtyLog{{64 << 20, "4k"}}
		if !h.Short {
			dirty = append(dirty, dirtyLog{256 << 20, "4k"}, dirtyLog{1 << 30, "4k"}, dirtyLog{4 << 30, "4k"}, dirtyLog{1 << 30, "64k"}, dirtyLog{4 << 30, "64k"})
		}
		m, err := lab.Turns(ctx, h, dirtyCases(dirty), []lab.Side[dirtyLog]{
			{Name: "lsd", Turn: r.lsd},
			{Name: "reading as much of the log", Turn: r.read},
			{Name: "goal: 0.5 s and 1 s for a GiB", Turn: r.goal},
		})
		if err != nil {
			return nil, err
		}
		return waits(m, "From kill -9 of the daemon to the first completed write"), nil
	}}
}

// waits returns the tables of how long a client waits.
func waits(m *lab.Measured, title string) []bench.Table {
	return []bench.Table{
		m.Table("ms", bench.Table{Name: "wait", Title: title, Unit: "ms", Less: true, Plot: true}),
		byPart(m, []lab.Metric{ending, starting, opening, resuming}, bench.Table{Name: "phases", Title: "Of this, one after the other", Unit: "ms", Less: true}),
	}
}

// The parts of the wait, as metrics.
const (
	ending   lab.Metric = "ms until the old daemon is gone"
	starting lab.Metric = "ms until the new one has started"
	opening  lab.Metric = "ms until it has opened the image"
	resuming lab.Metric = "ms until the client has come back and written"
)

// byPart puts the figures of several metrics into one table, those of a case one below the other.
func byPart(m *lab.Measured, parts []lab.Metric, t bench.Table) bench.Table {
	rows := map[string][]bench.Row{} // by case
	var cases []string
	for _, p := range parts {
		of := m.Table(p, bench.Table{})
		for _, r := range of.Rows {
			if rows[r.Name] == nil {
				cases = append(cases, r.Name)
			}
			rows[r.Name] = append(rows[r.Name], bench.Row{Name: r.Name + ": " + string(p), Sides: r.Sides})
			t.Sides = of.Sides
		}
	}
	for _, c := range cases {
		t.Rows = append(t.Rows, rows[c]...)
	}
	return t
}

// recoveries are the sides, on one image.
type recoveries struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *lab.Daemon
	store   string
	size    string              // of the image
	logged  map[dirtyLog]uint64 // bytes of the log that were in use at the last kill
}

func newRecoveries(ctx context.Context, h *lab.Host) (r *recoveries, err error) {
	r = &recoveries{h: h, store: "rados://rbd/" + uuid.NewString(), size: lab.Pick(h.Effort, "2G", "8G"), logged: map[dirtyLog]uint64{}}
	if r.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	// A log of more than twice of what is to be in it: from half of it on writes are slowed down.
	if r.daemon, err = h.Daemon(ctx, "--librbd-log-size", lab.Pick(h.Effort, "1G", "10G"), "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	h.Defer(func() { _ = r.h.LetCluster(context.WithoutCancel(ctx), "resume") })
	_, err = r.daemon.Lsdctl(ctx, "create", r.store+"/image", "--size", r.size)
	return r, err
}

// fio runs fio on the image.
func (r *recoveries) fio(ctx context.Context, args ...string) error {
	all := append([]string{"fio", "--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=image", "--size=" + r.size, "--randrepeat=0", "--norandommap"}, args...)
	_, err := lab.Output(r.daemon.Command(ctx, r.store, all...))
	return err
}

// attach has the image attached, which it is for some seconds only when nobody has it open, and all
// at rest.
func (r *recoveries) attach(ctx context.Context) error {
	if err := r.h.Rest(ctx); err != nil {
		return err
	}
	if err := r.fio(ctx, "--name=attach", "--rw=read", "--bs=4k", "--number_ios=1"); err != nil {
		return err
	}
	return r.h.Rest(ctx)
}

// onlyImage returns what a daemon has attached.
func onlyImage(ctx context.Context, d *lab.Daemon) (im api.Image, err error) {
	list, err := d.Client.Images(ctx)
	if err != nil {
		return im, err
	}
	if len(list) != 1 || list[0].Stats == nil {
		return im, fmt.Errorf("%d images are attached, not one", len(list))
	}
	return list[0], nil
}

// goal is what is asked for.
func (r *recoveries) goal(_ context.Context, d dirtyLog) (lab.Figures, error) {
	return lab.Figures{"ms": 500 + 1000*float64(d.bytes)/(1<<30)}, nil
}

// read reads as many bytes of the log's file as the recovery before has had to: what the disk gives.
func (r *recoveries) read(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if err := r.attach(ctx); err != nil {
		return nil, err
	}
	im, err := onlyImage(ctx, r.daemon)
	if err != nil {
		return nil, err
	}
	return readLog(ctx, r.h, im.Log, r.logged[d])
}

// readLog reads so many bytes of a log's file.
func readLog(ctx context.Context, h *lab.Host, log string, bytes uint64) (lab.Figures, error) {
	f, err := h.Fio(ctx, "--rw=read", "--readonly", "--bs=1m", "--iodepth=4", "--ioengine=io_uring", "--direct=1", "--filename="+log, fmt.Sprintf("--size=%d", bytes>>20<<20))
	return lab.Figures{"ms": milliseconds(f.Took)}, err
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// lsd fills the log, kills the daemon under a client that writes one block after the other, and
// starts it again.
func (r *recoveries) lsd(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if err := r.attach(ctx); err != nil {
		return nil, err
	}
	latencies := filepath.Join(r.h.Dir, "client_clat.log")
	_ = os.Remove(latencies) // of an earlier turn
	ctx, stop := context.WithCancel(ctx)
	client := make(chan error, 1)
	go func() {
		// Both jobs have the image open before the first one begins.
		client <- r.fio(ctx,
			"--name=fill", "--rw=randwrite", "--bs="+d.block, "--iodepth=32", fmt.Sprintf("--io_size=%d", d.bytes), "--exec_prerun="+r.cluster.Command("pause"),
			"--name=client", "--stonewall", "--rw=randwrite", "--bs=4k", "--iodepth=1", "--thinktime=1ms", "--time_based", "--runtime=3",
			"--write_lat_log=client", "--per_job_logs=0", "--log_unix_epoch=1")
	}()
	k, err := r.kill(ctx, d, client)
	if err != nil {
		stop()
		return nil, errors.Join(err, <-client, r.h.LetCluster(context.WithoutCancel(ctx), "resume"))
	}
	err = <-client
	stop()
	if err != nil {
		return nil, err
	}
	return k.figures(latencies, r.daemon.Log)
}

// A kill is when a daemon was killed, and what happened then.
type kill struct {
	killed, gone time.Time
	said         int64 // length of the daemon's log before
}

// kill kills the daemon when as much as that is in its log alone, and starts it again.
func (r *recoveries) kill(ctx context.Context, d dirtyLog, client chan error) (k kill, err error) {
	// The image is the daemon's for a minute without the store's word for it.
	if err := r.await(ctx, d, client, 40*time.Second); err != nil {
		return k, err
	}
	time.Sleep(300 * time.Millisecond) // the client has begun
	im, err := onlyImage(ctx, r.daemon)
	if err != nil {
		return k, err
	}
	r.logged[d] = im.Stats.LogUsed
	return killUnder(ctx, r.h, r.daemon)
}

// killUnder kills a daemon under its clients, and starts it again at once, when the store goes on as
// well.
func killUnder(ctx context.Context, h *lab.Host, d *lab.Daemon) (k kill, err error) {
	is, err := os.Stat(d.Log)
	if err != nil {
		return k, err
	}
	k.said = is.Size()
	resumed := make(chan error, 1)
	k.killed = time.Now()
	go func() { resumed <- h.LetCluster(ctx, "resume") }()
	err = d.Kill()
	k.gone = time.Now()
	if err == nil {
		err = d.Start(ctx)
	}
	return k, errors.Join(err, <-resumed)
}

// await waits until the log is filled.
func (r *recoveries) await(ctx context.Context, d dirtyLog, client chan error, limit time.Duration) error {
	return lab.Await(ctx, "the log fills", limit, func() (bool, error) {
		select {
		case err := <-client:
			client <- err
			return false, errors.New("fio has ended before")
		default:
		}
		n, err := r.daemon.Dirty(ctx)
		return n >= uint64(d.bytes), err
	})
}

// figures returns what the client has seen, and the parts of it, from fio's log of latencies and
// from what the daemon has said.
func (k *kill) figures(latencies, said string) (lab.Figures, error) {
	f, err := os.Open(latencies)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ended, wait, err := longestWait(f)
	if err != nil {
		return nil, fmt.Errorf("fio's log: %w", err)
	}
	if ended.Before(k.killed) || ended.Add(-wait).After(k.killed.Add(time.Second)) {
		return nil, fmt.Errorf("the client's longest wait, %v until %v, has nothing to do with the daemon's end at %v", wait, ended, k.killed)
	}
	log, err := os.Open(said)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if _, err := log.Seek(k.said, io.SeekStart); err != nil {
		return nil, err
	}
	begun, done, err := takenUp(log)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", said, err)
	}
	return lab.Figures{
		"ms":     milliseconds(wait),
		ending:   milliseconds(k.gone.Sub(k.killed)),
		starting: milliseconds(begun.Sub(k.gone)),
		opening:  milliseconds(done.Sub(begun)),
		resuming: milliseconds(k.killed.Add(wait).Sub(done)),
	}, nil
}

// longestWait returns the operation that took longest of those in a log of latencies that fio has
// written: lines of the time when it ended, in milliseconds, what it took, in nanoseconds, and more.
func longestWait(log io.Reader) (ended time.Time, wait time.Duration, err error) {
	s := bufio.NewScanner(log)
	for s.Scan() {
		var ms, ns int64
		if _, err := fmt.Sscanf(s.Text(), "%d, %d,", &ms, &ns); err != nil {
			return ended, wait, fmt.Errorf("line %q: %w", s.Text(), err)
		}
		if time.Duration(ns) > wait {
			ended, wait = time.UnixMilli(ms), time.Duration(ns)
		}
	}
	if s.Err() == nil && wait == 0 {
		return ended, wait, errors.New("no operation is in it")
	}
	return ended, wait, s.Err()
}

// takenUp returns when a daemon has begun to take an image up and when it had, from what it says.
func takenUp(log io.Reader) (begun, done time.Time, err error) {
	line := regexp.MustCompile(`^time=(\S+) .*msg="(taking up what was attached|taken up)"`)
	s := bufio.NewScanner(log)
	for s.Scan() {
		m := line.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		t, err := time.Parse(time.RFC3339, m[1])
		if err != nil {
			return begun, done, fmt.Errorf("line %q: %w", s.Text(), err)
		}
		if m[2] == "taken up" {
			done = t
		} else {
			begun = t
		}
	}
	if s.Err() == nil && (begun.IsZero() || done.IsZero()) {
		return begun, done, errors.New("it does not say when the image was taken up")
	}
	return begun, done, s.Err()
}
