package main

import (
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A deviceJob is what fio is to do.
type deviceJob struct {
	args    []string
	into    bool // the time is that until all of it is in the cluster
	reading bool // what the cache has
}

// deviceSizes are the bytes of an image, of a cache, and of what is read.
func deviceSizes(h *lab.Host) (image, cache, hot int64) {
	return lab.Pick[int64](h.Effort, 256<<20, 2<<30), lab.Pick[int64](h.Effort, 512<<20, 2<<30), lab.Pick[int64](h.Effort, 32<<20, 256<<20)
}

// device has fio work on lsd's block device and on the kernel's client for RBD, alone and under
// bcache and dm-writecache.
//
// What is read is hot: a part of the image that has been read four times before, one MiB at a time, so
// that lsd and bcache have it in their caches, and the OSD in its memory. dm-writecache, which
// keeps only what is written, has written it instead. Writes begin with an empty cache and go to all
// of the image; none fills a cache, nor makes dm-writecache begin to write back. lsd destages
// meanwhile. What writing back takes is in the case that ends when all is in the cluster.
func device() comparison {
	return comparison{
		name: "device", title: "the block device, beside the kernel's RBD, alone and under its caches", vm: true, ceph: true,
		prepare: func(ctx context.Context, h *lab.Host) error {
			image, _, _ := deviceSizes(h)
			content, err := randomFile(ctx, h, image)
			if err != nil {
				return err
			}
			return importImages(ctx, h, content)
		},
		run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
			image, cache, hot := deviceSizes(h)
			d, err := newDevices(ctx, h, cache)
			if err != nil {
				return nil, err
			}
			reads, err := d.reads(ctx, hot)
			if err != nil {
				return nil, err
			}
			writes, err := d.writes(ctx, image)
			if err != nil {
				return nil, err
			}
			return withRows(
				reads.Table("ops/s", bench.Table{Name: "read", Title: "Reads of what the caches have", Unit: "operations a second", Plot: true}),
				writes.Table("ops/s", bench.Table{Name: "write", Title: "Writes to an empty cache", Unit: "operations a second", Plot: true}),
				reads.Table("p99 ms", bench.Table{Name: "read-p99", Title: "99th percentile of those reads", Unit: "ms", Less: true}),
				writes.Table("p99 ms", bench.Table{Name: "write-p99", Title: "99th percentile of those writes", Unit: "ms", Less: true}),
			), nil
		},
	}
}

// withRows returns those tables in which there is something: --cases may choose none of one kind.
func withRows(all ...bench.Table) (some []bench.Table) {
	for _, t := range all {
		if len(t.Rows) > 0 {
			some = append(some, t)
		}
	}
	return some
}

// turnSeconds is the length of a turn in the virtual machine: half of the usual one, for there are
// many.
func turnSeconds(h *lab.Host) int { return max(1, h.Seconds/2) }

// random returns the cases of 4 KiB at random places, at three depths.
func random(h *lab.Host, rw string, j deviceJob) (cases []lab.Case[deviceJob]) {
	for _, depth := range lab.Pick(h.Effort, []int{32}, []int{1, 32, 128}) {
		c := j
		c.args = append(lab.Random(rw, depth, turnSeconds(h)), j.args...)
		cases = append(cases, lab.Case[deviceJob]{Name: fmt.Sprintf("%s 4k, depth %d", rw, depth), Do: c})
	}
	return cases
}

// sequential returns the cases in order of place, with two sizes.
func sequential(h *lab.Host, rw string, j deviceJob) (cases []lab.Case[deviceJob]) {
	for _, bs := range lab.Pick(h.Effort, []string{"64k"}, []string{"64k", "1m"}) {
		c := j
		c.args = append([]string{"--rw=" + rw, "--bs=" + bs, "--iodepth=16", "--time_based", fmt.Sprintf("--runtime=%d", turnSeconds(h))}, j.args...)
		cases = append(cases, lab.Case[deviceJob]{Name: rw + " " + bs + ", depth 16", Do: c})
	}
	return cases
}

// reads has all devices read what they have been made to have in their caches.
func (d *devices) reads(ctx context.Context, hot int64) (*lab.Measured, error) {
	j := deviceJob{reading: true, args: []string{fmt.Sprintf("--size=%d", hot)}}
	cases := append(random(d.h, "randread", j), sequential(d.h, "read", j)...)
	warm := map[*blockDevice]bool{}
	return lab.Turns(ctx, d.h, cases, sides(d, func(ctx context.Context, b *blockDevice, j deviceJob) (lab.Figures, error) {
		if !warm[b] {
			if err := d.warm(ctx, b, hot); err != nil {
				return nil, err
			}
			warm[b] = true
		}
		f, err := fioOn(ctx, d.h, b.path, j.args...)
		return lab.Figures{"ops/s": f.Rate, "p99 ms": f.P99.Seconds() * 1e3}, err
	}))
}

// warm has a device's cache keep what will be read. lsd's keeps of a stream what comes for the second
// time, or for the third and fourth where it comes faster than the SSD takes it.
func (d *devices) warm(ctx context.Context, b *blockDevice, hot int64) error {
	ways := []string{"read", "read", "read", "read"}
	if b.writesOnly {
		ways = []string{"write", "read"}
	}
	for _, rw := range ways {
		if _, err := fioOn(ctx, d.h, b.path, "--rw="+rw, "--bs=1m", "--iodepth=4", fmt.Sprintf("--size=%d", hot)); err != nil {
			return fmt.Errorf("warming its cache: %w", err)
		}
	}
	return b.rest(ctx)
}

// writes has all devices write, each time with an empty cache in the beginning.
func (d *devices) writes(ctx context.Context, image int64) (*lab.Measured, error) {
	j := deviceJob{args: []string{fmt.Sprintf("--size=%d", image)}}
	cases := append(random(d.h, "randwrite", j), sequential(d.h, "write", j)...)
	mib := lab.Pick(d.h.Effort, 4, 16)
	cases = append(cases, lab.Case[deviceJob]{Name: fmt.Sprintf("randwrite 4k, %d MiB, into the cluster", mib), Do: deviceJob{into: true, args: append([]string{
		"--rw=randwrite", "--bs=4k", "--iodepth=32", fmt.Sprintf("--io_size=%dm", mib),
	}, j.args...)}})
	for _, b := range d.all {
		if err := b.empty(ctx); err != nil {
			return nil, fmt.Errorf("%s: emptying its cache: %w", b.name, err)
		}
	}
	return lab.Turns(ctx, d.h, cases, sides(d, d.write))
}

// write does a job, and leaves an empty cache.
func (d *devices) write(ctx context.Context, b *blockDevice, j deviceJob) (lab.Figures, error) {
	f, err := fioOn(ctx, d.h, b.path, j.args...)
	if err != nil {
		return nil, err
	}
	figures := lab.Figures{"ops/s": f.Rate, "p99 ms": f.P99.Seconds() * 1e3}
	if j.into {
		took, err := timed(func() error { return b.settle(ctx) })
		if err != nil {
			return nil, err
		}
		figures = lab.Figures{"ops/s": f.Ops / (f.Took + took).Seconds()}
	}
	if err := b.empty(ctx); err != nil {
		return nil, fmt.Errorf("emptying the cache: %w", err)
	}
	return figures, nil
}
