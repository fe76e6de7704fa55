package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// takeover is recovery with a block device, which the kernel keeps for the next daemon: what is
// under way waits in it.
func takeover() comparison {
	return comparison{name: "takeover", title: "from kill -9 of the daemon to the first write that its block device completes", vm: true, ceph: true,
		run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
			t, err := newTakeovers(ctx, h)
			if err != nil {
				return nil, err
			}
			var cases []lab.Case[dirtyLog]
			for _, mib := range lab.Pick(h.Effort, []int64{64}, []int64{64, 256}) {
				cases = append(cases, lab.Case[dirtyLog]{Name: fmt.Sprintf("%d MiB of random writes of 4k", mib), Do: dirtyLog{mib << 20, "4k"}})
			}
			m, err := lab.Turns(ctx, h, cases, []lab.Side[dirtyLog]{
				{Name: "lsd", Turn: t.lsd},
				{Name: "reading as much of the log", Turn: t.read},
			})
			if err != nil {
				return nil, err
			}
			return waits(m, "From kill -9 of the daemon to the first write that its block device completes"), nil
		}}
}

// takeovers are the sides, on one device.
type takeovers struct {
	h      *lab.Host
	daemon *lab.Daemon
	path   string              // of the device
	log    string              // its write log's file
	logged map[dirtyLog]uint64 // bytes of the log that were in use at the last kill
}

func newTakeovers(ctx context.Context, h *lab.Host) (t *takeovers, err error) {
	const store = "rados://rbd/takeover"
	t = &takeovers{h: h, logged: map[dirtyLog]uint64{}}
	if _, err := h.Cluster(ctx); err != nil {
		return nil, err
	}
	if t.daemon, err = h.Daemon(ctx, "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	h.Defer(func() { _ = h.LetCluster(context.WithoutCancel(ctx), "resume") })
	if _, err := t.daemon.Lsdctl(ctx, "create", store+"/image", "--size", "1G"); err != nil {
		return nil, err
	}
	// A log of more than twice of what is to be in it: from half of it on writes are slowed down.
	path, err := t.daemon.Lsdctl(ctx, "add", store+"/image", "--log-size", lab.Pick(h.Effort, "256M", "1G"))
	if err != nil {
		return nil, err
	}
	t.path = strings.TrimSpace(path)
	im, err := onlyImage(ctx, t.daemon)
	t.log = im.Log
	return t, errors.Join(err, awaitBlockDevice(ctx, t.path))
}

// read reads as many bytes of the log's file as the recovery before has had to.
func (t *takeovers) read(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if err := t.h.Rest(ctx); err != nil {
		return nil, err
	}
	return readLog(ctx, t.h, t.log, t.logged[d])
}

// lsd fills the log, kills the daemon under a client that writes one block after the other, and
// starts it again.
func (t *takeovers) lsd(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if err := t.daemon.AwaitStored(ctx, settleLimit); err != nil {
		return nil, err
	}
	if err := t.h.Rest(ctx); err != nil {
		return nil, err
	}
	if err := t.h.LetCluster(ctx, "pause"); err != nil {
		return nil, err
	}
	latencies := filepath.Join(t.h.Dir, "client_clat.log")
	_ = os.Remove(latencies) // of an earlier turn
	k, client, err := t.kill(ctx, d)
	if err = errors.Join(err, t.h.LetCluster(context.WithoutCancel(ctx), "resume")); client != nil {
		err = errors.Join(err, <-client)
	}
	if err != nil {
		return nil, err
	}
	return k.figures(latencies, t.daemon.Log)
}

// kill fills the log, starts a client, and kills the daemon and starts it again. The client tells
// how it has ended.
func (t *takeovers) kill(ctx context.Context, d dirtyLog) (k kill, client chan error, err error) {
	if _, err := fioOn(ctx, t.h, t.path, "--rw=randwrite", "--bs="+d.block, "--iodepth=32", fmt.Sprintf("--io_size=%d", d.bytes)); err != nil {
		return k, nil, err
	}
	client = make(chan error, 1)
	go func() {
		_, err := fioOn(ctx, t.h, t.path, "--rw=randwrite", "--bs=4k", "--iodepth=1", "--thinktime=1ms", "--time_based", "--runtime=15",
			"--write_lat_log="+filepath.Join(t.h.Dir, "client"), "--per_job_logs=0", "--log_unix_epoch=1")
		client <- err
	}()
	time.Sleep(5 * time.Second) // it has begun
	im, err := onlyImage(ctx, t.daemon)
	switch {
	case err != nil:
	case im.Stats.Dirty < uint64(d.bytes):
		err = fmt.Errorf("%d bytes are in the log alone, not %d: the store does not stand still", im.Stats.Dirty, d.bytes)
	default:
		t.logged[d] = im.Stats.LogUsed
		k, err = killUnder(ctx, t.h, t.daemon)
	}
	return k, client, err
}
