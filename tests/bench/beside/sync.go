package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
	"golang.org/x/sys/unix"
)

// syncWork is what one turn does with a device.
type syncWork func(ctx context.Context, b *blockDevice) (lab.Figures, error)

// syncSizes are the bytes of an image, of the file system at its beginning, and of a cache.
func syncSizes(h *lab.Host) (image, fs, cache int64) {
	return lab.Pick[int64](h.Effort, 256<<20, 1<<30), lab.Pick[int64](h.Effort, 192<<20, 768<<20), lab.Pick[int64](h.Effort, 512<<20, 1<<30)
}

// syncs has lsd's block device and its peers do work that waits for stable storage all the time:
// fio with an fsync after each write, on the device itself; and on ext4 on it SQLite, a mail server
// and, as the opposite, a file server that never asks for that.
//
// What a device has in its cache is brought into the cluster after each turn. File systems are
// mounted anew for each turn, so that no memory has their files.
func syncs() comparison {
	return comparison{
		name: "sync", title: "work that waits for stable storage: fsync, SQLite, a mail server", vm: true, ceph: true,
		prepare: prepareSyncs,
		run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
			image, fs, cache := syncSizes(h)
			d, err := newDevices(ctx, h, cache)
			if err != nil {
				return nil, err
			}
			m, err := lab.Turns(ctx, h, d.syncCases(image, fs), sides(d, func(ctx context.Context, b *blockDevice, work syncWork) (lab.Figures, error) {
				f, err := work(ctx, b)
				if err != nil {
					return nil, err
				}
				if err := b.settle(ctx); err != nil {
					return nil, err
				}
				return f, b.rest(ctx)
			}))
			if err != nil {
				return nil, err
			}
			return withRows(
				m.Table("ops/s", bench.Table{Name: "rate", Title: "Work that waits for stable storage", Unit: "operations a second", Plot: true}),
				m.Table("p99 ms", bench.Table{Name: "p99", Title: "99th percentile of an fsync; of SQLite's, of a transaction", Unit: "ms", Less: true}),
			), nil
		},
	}
}

// fsyncWrites returns the cases in which fio waits for stable storage after each write, and its
// arguments.
func fsyncWrites(h *lab.Host, seconds int) (cases []lab.Case[[]string]) {
	for _, bs := range lab.Pick(h.Effort, []string{"4k"}, []string{"4k", "8k", "16k"}) {
		cases = append(cases, lab.Case[[]string]{Name: "write " + bs + ", fsync after each", Do: []string{
			"--rw=randwrite", "--bs=" + bs, "--fsync=1", "--norandommap", "--time_based", fmt.Sprintf("--runtime=%d", seconds)}})
	}
	return cases
}

// syncCases returns the cases: fio's on what the file system leaves of the device.
func (d *devices) syncCases(image, fs int64) (cases []lab.Case[syncWork]) {
	add := func(name string, do syncWork) { cases = append(cases, lab.Case[syncWork]{Name: name, Do: do}) }
	if !d.h.Short { // fsyncs has one
		for _, c := range fsyncWrites(d.h, turnSeconds(d.h)) {
			add(c.Name, func(ctx context.Context, b *blockDevice) (lab.Figures, error) {
				f, err := fioOn(ctx, d.h, b.path, append(slices.Clip(c.Do), fmt.Sprintf("--offset=%d", fs), fmt.Sprintf("--size=%d", image-fs))...)
				return lab.Figures{"ops/s": f.Rate, "p99 ms": ms(f.SyncP99)}, err
			})
		}
	}
	length := time.Duration(turnSeconds(d.h)) * time.Second
	onFiles := func(name string, work func(ctx context.Context, dir string) (lab.Figures, error)) {
		add(name, func(ctx context.Context, b *blockDevice) (lab.Figures, error) { return d.onFileSystem(ctx, b, work) })
	}
	sqlite := func(file string) func(context.Context, string) (lab.Figures, error) {
		return func(ctx context.Context, dir string) (lab.Figures, error) {
			return transactions(ctx, d.h, filepath.Join(dir, file), length)
		}
	}
	if !d.h.Short {
		onFiles("SQLite, rollback journal", sqlite(rollbackDB))
	}
	onFiles("SQLite, write-ahead log", sqlite(walDB))
	onFiles("mail server", func(ctx context.Context, dir string) (lab.Figures, error) {
		return mailServer(ctx, filepath.Join(dir, mailDir), mailFiles(d.h), length)
	})
	if !d.h.Short {
		onFiles("file server", func(ctx context.Context, dir string) (lab.Figures, error) {
			return fileServer(ctx, filepath.Join(dir, shareDir), shareFiles(d.h), shareFiles(d.h)/4)
		})
	}
	return cases
}

func ms(d time.Duration) float64 { return d.Seconds() * 1e3 }

// onFileSystem mounts a device's file system for one piece of work.
func (d *devices) onFileSystem(ctx context.Context, b *blockDevice, work func(ctx context.Context, dir string) (lab.Figures, error)) (lab.Figures, error) {
	dir := filepath.Join(d.h.Dir, "mounted")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return within(ctx, settleLimit, "work on ext4 on "+b.path, func(ctx context.Context) (lab.Figures, error) {
		if _, err := d.h.Run(ctx, "mount", "-t", "ext4", "-o", "noatime", b.path, dir); err != nil {
			return nil, err
		}
		f, err := work(ctx, dir)
		if err2 := unix.Unmount(dir, 0); err == nil && err2 != nil {
			err = fmt.Errorf("unmounting %s: %w", dir, err2)
		}
		return f, err
	})
}

// Names in the file system.
const (
	rollbackDB = "rollback.db"
	walDB      = "wal.db"
	mailDir    = "mail"
	shareDir   = "share"
)

// mailFiles and shareFiles are how many files there are.
func mailFiles(h *lab.Host) int  { return lab.Pick(h.Effort, 320, 960) }
func shareFiles(h *lab.Host) int { return lab.Pick(h.Effort, 320, 1600) }

// prepareSyncs makes the images with their file system and what is in that.
func prepareSyncs(ctx context.Context, h *lab.Host) error {
	if _, err := exec.LookPath("sqlite3"); err != nil {
		return fmt.Errorf("there is no sqlite3: run scripts/setup bench")
	}
	image, fs, _ := syncSizes(h)
	content, err := randomFile(ctx, h, image)
	if err != nil {
		return err
	}
	tree := filepath.Join(h.Dir, "tree")
	for dir, fill := range map[string]func(dir string) error{
		mailDir:  func(dir string) error { return fillMail(dir, mailFiles(h)) },
		shareDir: func(dir string) error { return fillShare(dir, shareFiles(h)) },
	} {
		path := filepath.Join(tree, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := fill(path); err != nil {
			return err
		}
	}
	for file, mode := range map[string]string{rollbackDB: "delete", walDB: "wal"} {
		if err := makeDatabase(ctx, h, filepath.Join(tree, file), mode); err != nil {
			return err
		}
	}
	// Nothing is left to be zeroed in the background, and what is free has the random bytes.
	if _, err := h.Run(ctx, "mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-d", tree, content, fmt.Sprintf("%dk", fs>>10)); err != nil {
		return err
	}
	return importImages(ctx, h, content)
}
