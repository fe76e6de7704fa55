package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// clones has many clones of one image read what machines read as they boot, all of them the
// same: one clone after the other, and four at a time; with nothing in any cache but the disk's
// own at first, then once more. Each clone is opened by a process of its own.
func clones() comparison {
	return comparison{name: "clones", title: "reading as at boot, from clones of one image", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		n := lab.Pick(h.Effort, 5, 20)
		c, err := newCloned(ctx, h, n)
		if err != nil {
			return nil, err
		}
		cases := []lab.Case[int]{{Name: "one after the other", Do: 1}}
		if !h.Short {
			cases = append(cases, lab.Case[int]{Name: "four at a time", Do: 4})
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[int]{
			{Name: "lsd", Turn: c.lsd},
			{Name: "librbd, cache on", Turn: c.librbd},
		})
		if err != nil {
			return nil, err
		}
		read := fmt.Sprintf("%d MiB from each of %d clones", c.bytes>>20, n)
		return []bench.Table{
			asRows(m, bench.Table{Name: "reads", Title: "Reading as at boot: " + read, Unit: "ms", Less: true, Plot: true},
				"the first clone", "each of the others", "each, once more"),
			asRows(m, bench.Table{Name: "whole", Title: "The same from the start of the program, with opening the clone", Unit: "ms", Less: true},
				"the first clone, in all", "each of the others, in all", "each, once more, in all", "each, four at a time, in all"),
			asRows(m, bench.Table{Name: "traffic", Title: "Read from the OSD by all of them", Unit: "MiB", Less: true},
				"one after the other", "once more", "four at a time"),
		}, nil
	}}
}

// cloned has the clones of both sides.
type cloned struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *coldDaemon
	store   string // of lsd's images
	images  []string
	trace   string // path of what is read, as fio takes it
	bytes   int    // in it
}

const clonedImage, clonedSnapshot = "base", "gold"

// newCloned makes the image, its snapshot and the clones.
func newCloned(ctx context.Context, h *lab.Host, n int) (c *cloned, err error) {
	size := lab.Pick(h.Effort, 256, 1024) << 20
	c = &cloned{h: h, store: "rados://rbd/" + uuid.NewString(), trace: filepath.Join(h.Dir, "boot")}
	if c.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	if c.daemon, err = newColdDaemon(ctx, h, "--librbd-log-size", "128M", "--read-cache-size", "1G"); err != nil {
		return nil, err
	}
	if err := c.makeBase(ctx, size); err != nil {
		return nil, err
	}
	for i := range n {
		clone := fmt.Sprintf("clone%d", i+1)
		if _, err := c.daemon.Lsdctl(ctx, "clone", c.store+"/"+clonedImage+"@"+clonedSnapshot, c.store+"/"+clone); err != nil {
			return nil, err
		}
		if _, err := h.Run(ctx, "rbd", "clone", "rbd/"+clonedImage+"@"+clonedSnapshot, "rbd/"+clone); err != nil {
			return nil, err
		}
		c.images = append(c.images, clone)
	}
	boot := bootReads(rand.New(rand.NewPCG(7, 13)), size, lab.Pick(h.Effort, 32, 128)<<20)
	for _, r := range boot {
		c.bytes += r.length
	}
	return c, os.WriteFile(c.trace, []byte(fioLog(boot)), 0o644)
}

// makeBase makes the image that is cloned on both sides, with the same random data.
func (c *cloned) makeBase(ctx context.Context, size int) error {
	if _, err := c.daemon.Lsdctl(ctx, "create", c.store+"/"+clonedImage, "--size", strconv.Itoa(size)); err != nil {
		return err
	}
	if _, err := c.h.Run(ctx, "rbd", "create", clonedImage, "--size", strconv.Itoa(size>>20)); err != nil {
		return err
	}
	write := []string{"--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1", "--randrepeat=1", "--refill_buffers"}
	if _, err := lab.RunFio(c.fio(ctx, clonedImage, write...)); err != nil {
		return err
	}
	if _, err := lab.RunFio(c.fioPeer(ctx, clonedImage, write...)); err != nil {
		return err
	}
	if _, err := c.daemon.Lsdctl(ctx, "snap", "create", c.store+"/"+clonedImage+"@"+clonedSnapshot); err != nil {
		return err
	}
	_, err := c.h.Shell(ctx, fmt.Sprintf("s=rbd/%s@%s; rbd snap create --no-progress $s && rbd snap protect $s", clonedImage, clonedSnapshot))
	return err
}

// fio returns fio on lsd's library.
func (c *cloned) fio(ctx context.Context, image string, args ...string) *exec.Cmd {
	return c.daemon.Command(ctx, c.store, lab.RBDArgs(image, args...)...)
}

// fioPeer returns fio on Ceph's library, as it is: with its cache.
func (c *cloned) fioPeer(ctx context.Context, image string, args ...string) *exec.Cmd {
	return c.h.Librbd(ctx, true, lab.RBDArgs(image, args...)...)
}

// lsd has lsd's clones read, of which a new daemon has nothing cached.
func (c *cloned) lsd(ctx context.Context, together int) (lab.Figures, error) {
	if err := c.daemon.forget(ctx); err != nil {
		return nil, err
	}
	return c.measure(ctx, together, c.fio)
}

// librbd has Ceph's clones read.
func (c *cloned) librbd(ctx context.Context, together int) (lab.Figures, error) {
	return c.measure(ctx, together, c.fioPeer)
}

// measure has all clones read, so many at a time.
func (c *cloned) measure(ctx context.Context, together int, fio func(ctx context.Context, image string, args ...string) *exec.Cmd) (lab.Figures, error) {
	if err := dropCaches(ctx, c.h, c.cluster); err != nil {
		return nil, err
	}
	cold, err := c.boot(ctx, together, fio)
	if err != nil {
		return nil, err
	}
	n, ms := float64(len(c.images)), func(d time.Duration) float64 { return d.Seconds() * 1e3 }
	if together > 1 {
		return lab.Figures{"each, four at a time, in all": ms(cold.all) / n, "four at a time": cold.mib}, nil
	}
	if err := c.h.Rest(ctx); err != nil {
		return nil, err
	}
	again, err := c.boot(ctx, together, fio)
	if err != nil {
		return nil, err
	}
	return lab.Figures{
		"the first clone":            ms(cold.first.reading),
		"each of the others":         ms(cold.reading-cold.first.reading) / (n - 1),
		"each, once more":            ms(again.reading) / n,
		"the first clone, in all":    ms(cold.first.all),
		"each of the others, in all": ms(cold.all-cold.first.all) / (n - 1),
		"each, once more, in all":    ms(again.all) / n,
		"one after the other":        cold.mib,
		"once more":                  again.mib,
	}, nil
}

// booted says how long the reading took, of one clone or of one after the other.
type booted struct{ reading, all time.Duration }

// bootedAll is that for all clones.
type bootedAll struct {
	booted
	first booted
	mib   float64 // that the OSD has sent
}

// boot has all clones read, so many at a time.
func (c *cloned) boot(ctx context.Context, together int, fio func(ctx context.Context, image string, args ...string) *exec.Cmd) (b bootedAll, err error) {
	before, err := c.cluster.OSD()
	if err != nil {
		return b, err
	}
	began := time.Now()
	for i := 0; i < len(c.images); i += together {
		took, err := bootTogether(c.commands(ctx, c.images[i:min(i+together, len(c.images))], fio))
		if err != nil {
			return b, err
		}
		b.reading += took
		if i == 0 {
			b.first = booted{took, time.Since(began)}
		}
	}
	b.all = time.Since(began)
	after, err := c.cluster.OSD()
	b.mib = after.Sub(before).ReadBytes / (1 << 20)
	return b, err
}

// commands returns the commands that have these clones read: each read waits for the one before.
// With more at a time fio (3.33) does not wait for the last ones of a log, whatever library it has:
// it frees their buffers, into which they come later.
func (c *cloned) commands(ctx context.Context, images []string, fio func(ctx context.Context, image string, args ...string) *exec.Cmd) (all []*exec.Cmd) {
	for _, image := range images {
		all = append(all, fio(ctx, image, "--read_iolog="+c.trace, "--replay_no_stall=1", "--iodepth=1"))
	}
	return all
}

// bootTogether runs commands beside one another, and returns the longest time that one has spent
// reading.
func bootTogether(all []*exec.Cmd) (longest time.Duration, err error) {
	type result struct {
		lab.Fio
		err error
	}
	results := make(chan result, len(all))
	for _, cmd := range all {
		go func() {
			f, err := lab.RunFio(cmd)
			results <- result{f, err}
		}()
	}
	for range all {
		r := <-results
		if r.err != nil {
			err = r.err
		}
		longest = max(longest, r.Took)
	}
	return longest, err
}

// A bootRead is one read.
type bootRead struct{ offset, length int }

// bootReads returns what a machine may read from a disk of some size as it boots, about so many
// bytes: files of 64 to 256 KiB, with readahead of 128 KiB, and four small reads of 4 to 16 KiB
// for each of them, here and there.
func bootReads(rng *rand.Rand, size, bytes int) (all []bootRead) {
	const block, ahead = 4 << 10, 128 << 10
	place := func(length int) int { return rng.IntN((size-length)/block+1) * block }
	for bytes > 0 {
		file := (64 + rng.IntN(49)*4) << 10
		bytes -= file
		for at := place(file); file > 0; at, file = at+ahead, file-ahead {
			all = append(all, bootRead{at, min(ahead, file)})
		}
		for range 4 {
			small := (1 + rng.IntN(4)) * block
			bytes -= small
			all = append(all, bootRead{place(small), small})
		}
	}
	return all
}

// fioLog returns reads as fio's --read_iolog takes them.
func fioLog(all []bootRead) string {
	var b strings.Builder
	b.WriteString("fio version 2 iolog\nimage add\nimage open\n")
	for _, r := range all {
		fmt.Fprintf(&b, "image read %d %d\n", r.offset, r.length)
	}
	b.WriteString("image close\n")
	return b.String()
}
