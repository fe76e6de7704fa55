package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// nullSize is how many bytes a device has: the file in memory is there before it is measured.
const nullSize = 256 << 20

// null has fio work on block devices without storage: what the block layer, ublk and lsd's loop
// cost, and what each feature of ublk's does to that. All have one queue of 128 requests and
// blocks of 512 bytes.
func null() comparison {
	return comparison{name: "null", title: "the way to a block device and back, without storage", vm: true, run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		all, err := nullDevices(ctx, h)
		if err != nil {
			return nil, err
		}
		j := deviceJob{args: []string{fmt.Sprintf("--size=%d", nullSize)}}
		cases := slices.Concat(random(h, "randread", j), random(h, "randwrite", j), sequential(h, "read", j), sequential(h, "write", j))
		if h.Short {
			cases = []lab.Case[deviceJob]{cases[0], cases[3]}
		}
		m, err := lab.Turns(ctx, h, cases, sides(&devices{all: all}, func(ctx context.Context, b *blockDevice, j deviceJob) (lab.Figures, error) {
			f, err := fioOn(ctx, h, b.path, j.args...)
			return lab.Figures{"ops/s": f.Rate, "p99 µs": f.P99.Seconds() * 1e6}, err
		}))
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("ops/s", bench.Table{Name: "rate", Title: "Block devices without storage", Unit: "operations a second", Plot: true}),
			m.Table("p99 µs", bench.Table{Name: "p99", Title: "99th percentile", Unit: "µs", Less: true}),
		}, nil
	}}
}

// nullDevices makes one of each kind.
func nullDevices(ctx context.Context, h *lab.Host) (all []*blockDevice, err error) {
	type kind struct {
		name   string
		attach func(context.Context, *lab.Host) (path string, err error)
	}
	kinds := []kind{
		{"lsd --null", lsdNull()},
		{"lsd, data copied", lsdNull("--ublk-without", "USER_COPY")},
		{"lsd, no batches", lsdNull("--ublk-without", "BATCH_IO")},
		{"null_blk", nullBlk},
		{"loop on tmpfs", loopInMemory},
	}
	if os.Getenv("LSD_UBLKSRV") != "" {
		kinds = append(kinds, kind{"ublksrv's null", ublksrvNull})
	}
	for _, k := range kinds {
		path, err := k.attach(ctx, h)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", k.name, err)
		}
		if err := awaitBlockDevice(ctx, path); err != nil {
			return nil, fmt.Errorf("%s: %w", k.name, err)
		}
		all = append(all, &blockDevice{name: k.name, path: path})
	}
	return all, nil
}

// lsdNull attaches lsd's device without an image, in a daemon with these flags.
func lsdNull(flags ...string) func(context.Context, *lab.Host) (string, error) {
	return func(ctx context.Context, h *lab.Host) (string, error) {
		d, err := h.Daemon(ctx, append([]string{"--read-cache-size", "0"}, flags...)...)
		if err != nil {
			return "", err
		}
		path, err := d.Lsdctl(ctx, "add", "--null", "--size", fmt.Sprint(nullSize))
		return strings.TrimSpace(path), err
	}
}

// nullBlk makes a null_blk device.
func nullBlk(ctx context.Context, h *lab.Host) (string, error) {
	if _, err := h.Run(ctx, "modprobe", "null_blk", "nr_devices=0"); err != nil {
		return "", err
	}
	const dir = "/sys/kernel/config/nullb/nullb0"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	h.Defer(func() {
		_ = os.WriteFile(dir+"/power", []byte("0"), 0)
		_ = os.Remove(dir)
	})
	for _, s := range []string{fmt.Sprintf("size=%d", nullSize>>20), "blocksize=512", "irqmode=0", "queue_mode=2", "submit_queues=1", "hw_queue_depth=128", "power=1"} {
		name, value, _ := strings.Cut(s, "=")
		if err := tell(ctx, filepath.Join(dir, name), value); err != nil {
			return "", err
		}
	}
	return "/dev/nullb0", nil
}

// loopInMemory makes a loop device on a file in memory that has no holes.
func loopInMemory(ctx context.Context, h *lab.Host) (string, error) {
	const file = "/dev/shm/lsd-beside"
	h.Defer(func() { _ = os.Remove(file) })
	// Where the kernel has it as a module, nothing else loads that.
	if _, err := h.Shell(ctx, fmt.Sprintf("test -e /dev/loop-control || modprobe loop; dd if=/dev/zero of=%s bs=1M count=%d", file, nullSize>>20)); err != nil {
		return "", err
	}
	path, err := h.Run(ctx, "losetup", "--find", "--show", file)
	if err != nil {
		return "", err
	}
	path = strings.TrimSpace(path)
	h.Defer(func() { _, _ = h.Run(context.WithoutCancel(ctx), "losetup", "--detach", path) })
	return path, nil
}

// ublksrvNull has the reference server in C, of which the environment says where it is, make its
// null target: number 7, for lsd takes the first.
func ublksrvNull(ctx context.Context, h *lab.Host) (string, error) {
	program := os.Getenv("LSD_UBLKSRV")
	if !filepath.IsAbs(program) {
		return "", fmt.Errorf("LSD_UBLKSRV=%s: it must be the absolute path of the program ublk", program)
	}
	if _, err := h.Run(ctx, program, "add", "--type", "null", "--number", "7", "--queues", "1", "--depth", "128"); err != nil {
		return "", err
	}
	h.Defer(func() {
		ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer stop()
		_, _ = h.Run(ctx, program, "del", "--number", "7")
	})
	return "/dev/ublkb7", nil
}
