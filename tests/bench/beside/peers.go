package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// bcacheOffset is where bcache's superblock ends in its image. Its default of 8 KiB would put all
// that follows across the borders of objects, of which bcache's documentation warns.
const bcacheOffset = 4 << 20

// krbd maps an image with nothing in between. It has no cache.
func (d *devices) krbd(ctx context.Context) (*blockDevice, error) {
	path, err := d.mapImage(ctx, bareImage)
	return &blockDevice{name: "krbd", path: path, settle: nothing, rest: nothing, empty: nothing}, err
}

func nothing(context.Context) error { return nil }

// mapImage maps an image until the host is closed.
func (d *devices) mapImage(ctx context.Context, image string) (path string, err error) {
	cluster, err := d.h.Cluster(ctx)
	if err != nil {
		return "", err
	}
	conf, err := os.ReadFile(cluster.Conf())
	if err != nil {
		return "", err
	}
	monitor, err := oldMonitor(string(conf))
	if err != nil {
		return "", fmt.Errorf("%s: %w", cluster.Conf(), err)
	}
	if err := d.shell(ctx, "modprobe rbd"); err != nil {
		return "", err
	}
	const bus = "/sys/bus/rbd"
	if err := tell(ctx, bus+"/add_single_major", fmt.Sprintf("%s name=admin rbd %s", monitor, image)); err != nil {
		return "", err
	}
	names, err := filepath.Glob(bus + "/devices/*/name")
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if text, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(text)) == image {
			id := filepath.Base(filepath.Dir(name))
			d.h.Defer(func() { d.undo(ctx, "unmapping "+image, bus+"/remove_single_major", id) })
			return "/dev/rbd" + id, nil
		}
	}
	return "", fmt.Errorf("image %s is mapped, but there is no device", image)
}

// oldMonitor returns the address at which the cluster's monitor speaks the protocol that the
// kernel's client has always known.
func oldMonitor(conf string) (string, error) {
	_, rest, _ := strings.Cut(conf, "v1:")
	address, _, ok := strings.Cut(rest, "]")
	if !ok {
		return "", errors.New("it names no monitor with the old protocol: [v2:...,v1:...]")
	}
	return address, nil
}

// bcache makes a device that writes back, with what its documentation says for benchmarks: no
// exception for sequential work, nor for a cache that is slow. Its writing back, of which it does
// little while less than a tenth of the cache is dirty, may begin after a second, not thirty, so
// that it can be waited for.
func (d *devices) bcache(ctx context.Context) (*blockDevice, error) {
	image, err := d.mapImage(ctx, bcacheImage)
	if err != nil {
		return nil, err
	}
	if err := d.shell(ctx, "modprobe bcache"); err != nil {
		return nil, err
	}
	c := &bcacheDevice{d: d, image: image, cache: d.h.Spare + "1"}
	d.h.Defer(func() {
		if err := c.stop(context.WithoutCancel(ctx)); err != nil {
			d.h.Say("stopping bcache: %v", err)
		}
	})
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return &blockDevice{name: "bcache", path: bcachePath, settle: c.settle, rest: nothing, empty: func(ctx context.Context) error {
		if err := c.stop(ctx); err != nil {
			return err
		}
		return c.start(ctx)
	}}, nil
}

// bcacheDevice is the one that there is.
type bcacheDevice struct {
	d            *devices
	image, cache string // devices
	set          string // its directory, while it runs
}

const (
	bcachePath = "/dev/bcache0"
	bcacheDir  = "/sys/block/bcache0/bcache/"
)

// start makes both superblocks anew: an empty cache, and what the image has.
func (c *bcacheDevice) start(ctx context.Context) error {
	if err := c.d.shell(ctx, `for dev in %s %s; do dd if=/dev/zero of=$dev bs=64K count=1 oflag=direct; done
		make-bcache --writeback --block 4k --data-offset %d -C %[1]s -B %[2]s`, c.cache, c.image, bcacheOffset/512); err != nil {
		return err
	}
	for _, dev := range []string{c.cache, c.image} {
		if err := tell(ctx, "/sys/fs/bcache/register", dev); err != nil {
			return err
		}
	}
	if err := lab.Await(ctx, "bcache has its cache", 20*time.Second, func() (bool, error) {
		set, err := filepath.EvalSymlinks(bcacheDir + "cache")
		c.set = set
		return err == nil && isBlockDevice(bcachePath) == nil, nil
	}); err != nil {
		return err
	}
	for _, s := range [][2]string{
		{bcacheDir + "cache_mode", "writeback"},
		{bcacheDir + "sequential_cutoff", "0"},
		{c.set + "/congested_read_threshold_us", "0"},
		{c.set + "/congested_write_threshold_us", "0"},
		{bcacheDir + "writeback_delay", "1"},
	} {
		if err := tell(ctx, s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}

// stop ends it; what is dirty then is lost.
func (c *bcacheDevice) stop(ctx context.Context) error {
	if c.set == "" {
		return nil
	}
	for _, path := range []string{bcacheDir + "stop", c.set + "/stop"} {
		if err := tell(ctx, path, "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return lab.Await(ctx, "bcache has gone", 30*time.Second, func() (bool, error) {
		_, err := os.Stat(c.set)
		_, err2 := os.Stat(bcacheDir)
		if gone := errors.Is(err, os.ErrNotExist) && errors.Is(err2, os.ErrNotExist); gone {
			c.set = ""
			return true, nil
		}
		return false, nil
	})
}

// settle has it write back as fast as it can until it is clean.
func (c *bcacheDevice) settle(ctx context.Context) error {
	if err := tell(ctx, bcacheDir+"writeback_percent", "0"); err != nil {
		return err
	}
	if err := lab.Await(ctx, "bcache is clean", settleLimit, func() (bool, error) {
		text, err := os.ReadFile(bcacheDir + "state")
		return strings.TrimSpace(string(text)) == "clean", err
	}); err != nil {
		return err
	}
	return tell(ctx, bcacheDir+"writeback_percent", "10")
}

// writecache makes a device of the device mapper with dm-writecache as it is.
func (d *devices) writecache(ctx context.Context) (*blockDevice, error) {
	image, err := d.mapImage(ctx, writecacheName)
	if err != nil {
		return nil, err
	}
	const path = "/dev/mapper/" + writecacheName
	cache := d.h.Spare + "2"
	// Nobody but dmsetup makes device nodes, and it leaves that to udev unless it is told.
	const dmsetup = "DM_DISABLE_UDEV=1 dmsetup"
	remove := func(ctx context.Context) error {
		return d.shell(ctx, "%s remove --retry %s", dmsetup, writecacheName)
	}
	start := func(ctx context.Context) error {
		// It makes a new cache where the first block is zero.
		return d.shell(ctx, `dd if=/dev/zero of=%s bs=64K count=1 oflag=direct
			%s create %s --table "0 $(blockdev --getsz %s) writecache s %[4]s %[1]s 4096 0"`, cache, dmsetup, writecacheName, image)
	}
	d.h.Defer(func() {
		if _, err := os.Stat(path); err == nil {
			_ = remove(context.WithoutCancel(ctx))
		}
	})
	return &blockDevice{
		name: "dm-writecache", path: path, writesOnly: true, rest: nothing,
		settle: func(ctx context.Context) error {
			return d.shell(ctx, "dmsetup message %s 0 flush", writecacheName)
		},
		empty: func(ctx context.Context) error {
			if err := remove(ctx); err != nil {
				return err
			}
			return start(ctx)
		},
	}, start(ctx)
}

// undo tells the kernel to let something go, for half a minute: who has used it may just end.
func (d *devices) undo(ctx context.Context, what, path, text string) {
	ctx = context.WithoutCancel(ctx)
	var last error
	if err := lab.Await(ctx, what, 30*time.Second, func() (bool, error) {
		last = tell(ctx, path, text)
		return last == nil, nil
	}); err != nil {
		d.h.Say("%v: %v", err, last)
	}
}
