package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
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
			dirty := []dirtyLog{{64 << 20, "4k"}}
			if !h.Short {
				dirty = append(dirty, dirtyLog{256 << 20, "4k"}, dirtyLog{1 << 30, "4k"}, dirtyLog{1 << 30, "64k"}, dirtyLog{4 << 30, "64k"})
			}
			m, err := lab.Turns(ctx, h, dirtyCases(dirty), []lab.Side[dirtyLog]{
				{Name: "lsd", Turn: t.lsd},
				{Name: "reading as much of the log", Turn: t.read},
			})
			if err != nil {
				return nil, err
			}
			return waits(m, "From kill -9 of the daemon to the first write that its block device completes"), nil
		}}
}

// takeovers are the sides.
type takeovers struct {
	h      *lab.Host
	daemon *lab.Daemon
	logs   map[dirtyLog]leftLog // of the last turn
}

// A leftLog is the file of a write log, and how many bytes of it were in use at the kill.
type leftLog struct {
	path string // another name of the file, which stays when the image is detached
	used uint64
}

func newTakeovers(ctx context.Context, h *lab.Host) (t *takeovers, err error) {
	t = &takeovers{h: h, logs: map[dirtyLog]leftLog{}}
	if _, err := h.Cluster(ctx); err != nil {
		return nil, err
	}
	if t.daemon, err = h.Daemon(ctx, "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	h.Defer(func() { _ = h.LetCluster(context.WithoutCancel(ctx), "resume") })
	return t, nil
}

// read reads as many bytes of the log's file as the recovery before has had to.
func (t *takeovers) read(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if err := t.h.Rest(ctx); err != nil {
		return nil, err
	}
	return readLog(ctx, t.h, t.logs[d].path, t.logs[d].used)
}

// lsd fills the log of a new image, kills the daemon under a client that writes one block after the
// other, and starts it again. It does not wait until all is in the store, which is through the
// emulated network and would take longer than all else.
func (t *takeovers) lsd(ctx context.Context, d dirtyLog) (lab.Figures, error) {
	if left, ok := t.logs[d]; ok {
		if err := os.Remove(left.path); err != nil {
			return nil, err
		}
		delete(t.logs, d)
	}
	path, err := t.attach(ctx, d)
	if err != nil {
		return nil, err
	}
	f, err := t.killed(ctx, path, d)
	return f, errors.Join(err, t.letGo(context.WithoutCancel(ctx), path))
}

// letGo detaches the device with what is in its log alone, and removes the log, which is kept for
// that.
func (t *takeovers) letGo(ctx context.Context, path string) error {
	im, err := onlyImage(ctx, t.daemon)
	if err != nil {
		return err
	}
	if _, err := t.daemon.Lsdctl(ctx, "del", path, "--force", "--timeout", "1s"); err != nil {
		return err
	}
	if err := os.Remove(im.Log); !errors.Is(err, os.ErrNotExist) { // all was in the store by then
		return err
	}
	return nil
}

// attach makes an image and attaches it. It is the daemon's without the store's word for as long as
// filling its log takes, which has room for more than twice as much as is to be in it: from half of
// it on writes are slowed down.
func (t *takeovers) attach(ctx context.Context, d dirtyLog) (string, error) {
	image := "rados://rbd/takeover/" + uuid.NewString()
	if _, err := t.daemon.Lsdctl(ctx, "create", image, "--size", "8G"); err != nil {
		return "", err
	}
	path, err := t.daemon.Lsdctl(ctx, "add", image, "--log-size", fmt.Sprint(max(256<<20, d.bytes/2*5)), "--lease", "10m")
	if err != nil {
		return "", err
	}
	path = strings.TrimSpace(path)
	return path, awaitBlockDevice(ctx, path)
}

// killed has the daemon of a device killed while the store stands still, and tells how long the
// client has waited.
func (t *takeovers) killed(ctx context.Context, path string, d dirtyLog) (lab.Figures, error) {
	if err := t.h.Rest(ctx); err != nil {
		return nil, err
	}
	if err := t.h.LetCluster(ctx, "pause"); err != nil {
		return nil, err
	}
	latencies := filepath.Join(t.h.Dir, "client_clat.log")
	_ = os.Remove(latencies) // of an earlier turn
	k, client, err := t.kill(ctx, path, d)
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
func (t *takeovers) kill(ctx context.Context, path string, d dirtyLog) (k kill, client chan error, err error) {
	if _, err := fioOn(ctx, t.h, path, "--rw=randwrite", "--bs="+d.block, "--iodepth=32", fmt.Sprintf("--io_size=%d", d.bytes)); err != nil {
		return k, nil, err
	}
	// It is still there when the daemon is back.
	took := lab.Pick(t.h.Effort, 12*time.Second, 15*time.Second) + time.Duration(d.bytes>>30)*20*time.Second
	client = make(chan error, 1)
	go func() {
		_, err := fioOn(ctx, t.h, path, "--rw=randwrite", "--bs=4k", "--iodepth=1", "--thinktime=1ms", "--time_based", fmt.Sprintf("--runtime=%d", took/time.Second),
			"--write_lat_log="+filepath.Join(t.h.Dir, "client"), "--per_job_logs=0", "--log_unix_epoch=1")
		client <- err
	}()
	time.Sleep(lab.Pick(t.h.Effort, 2*time.Second, 5*time.Second)) // it has begun
	im, err := onlyImage(ctx, t.daemon)
	switch {
	case err != nil:
	case im.Stats.Dirty < uint64(d.bytes):
		err = fmt.Errorf("%d bytes are in the log alone, not %d: the store does not stand still", im.Stats.Dirty, d.bytes)
	default:
		left := leftLog{im.Log + ".left", im.Stats.LogUsed}
		if err = os.Link(im.Log, left.path); err == nil {
			t.logs[d] = left
			k, err = killUnder(ctx, t.h, t.daemon)
		}
	}
	return k, client, err
}
