package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench/lab"
	"golang.org/x/sys/unix"
)

// The two servers do what those of the file-system benchmark filebench do, varmail and
// fileserver. They are here, for fio neither deletes files nor makes them as it goes.

const (
	mailClients  = 16
	mailSize     = 16 << 10 // on average, of a mail and of what is appended to one
	shareClients = 8
	shareSize    = 128 << 10
	shareAppend  = 16 << 10
)

// fillMail and fillShare make the files that are there in the beginning.
func fillMail(dir string, files int) error { return fillDir(dir, files, mailSize) }

func fillShare(dir string, files int) error { return fillDir(dir, files, shareSize) }

func fillDir(dir string, files, size int) error {
	b := randomBytes(1, 2*size)
	for i := range files {
		if err := os.WriteFile(fileName(dir, i), b[i%size:][:size], 0o644); err != nil {
			return err
		}
	}
	return nil
}

func fileName(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("f%05d", i)) }

// randomBytes returns n bytes that no store makes smaller.
func randomBytes(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), 1})
	_, _ = r.Read(b) // it cannot fail
	return b
}

// A client works on files that no other client touches.
type client struct {
	rng   *rand.Rand
	dir   string
	first int // of its files
	files int // how many
	data  []byte
	syncs []time.Duration // how long each fsync took
	done  int             // rounds
}

// clients makes some, which share the files.
func clients(n int, dir string, files, most int) (all []*client) {
	for i := range n {
		all = append(all, &client{
			rng: rand.New(rand.NewPCG(rand.Uint64(), uint64(i))), dir: dir,
			first: i * (files / n), files: files / n, data: randomBytes(uint64(i), 2*most),
		})
	}
	return all
}

// together has each client do a round after the other until there is to be no more, and returns how
// long that took.
func together(all []*client, round func(*client) error, more func(*client) bool) (time.Duration, error) {
	began := time.Now()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Go(func() {
			for errs[i] == nil && more(c) {
				errs[i] = round(c)
				c.done++
			}
		})
	}
	wg.Wait()
	return time.Since(began), errors.Join(errs...)
}

// one returns the name of one of its files.
func (c *client) one() string { return fileName(c.dir, c.first+c.rng.IntN(c.files)) }

// some returns bytes to write.
func (c *client) some(n int) []byte { return c.data[c.rng.IntN(len(c.data)-n):][:n] }

// use opens a file, does something with it and closes it.
func use(name string, flags int, do func(*os.File) error) error {
	f, err := os.OpenFile(name, flags, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(do(f), f.Close())
}

// replace deletes a file and makes it anew.
func (c *client) replace(do func(*os.File) error) error {
	name := c.one()
	if err := os.Remove(name); err != nil {
		return err
	}
	return use(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, do)
}

func readAllOf(f *os.File) error {
	_, err := io.Copy(io.Discard, f)
	return err
}

// put writes and waits for stable storage.
func (c *client) put(f *os.File) error {
	if _, err := f.Write(c.some(1 + c.rng.IntN(2*mailSize-1))); err != nil {
		return err
	}
	took, err := timed(f.Sync)
	c.syncs = append(c.syncs, took)
	return err
}

// mail is one round of a client of the mail server: a mail is deleted and another delivered; one is
// read and changed; one is read. What is written is on stable storage before it goes on.
func (c *client) mail() error {
	return errors.Join(
		c.replace(c.put),
		use(c.one(), os.O_RDWR|os.O_APPEND, func(f *os.File) error { return errors.Join(readAllOf(f), c.put(f)) }),
		use(c.one(), os.O_RDONLY, readAllOf),
	)
}

// mailServer has 16 clients do rounds for some time.
func mailServer(ctx context.Context, dir string, files int, length time.Duration) (lab.Figures, error) {
	all := clients(mailClients, dir, files, 2*mailSize)
	end := time.Now().Add(length)
	took, err := together(all, (*client).mail, func(*client) bool { return time.Now().Before(end) && ctx.Err() == nil })
	if err != nil {
		return nil, err
	}
	rounds, syncs := 0, []time.Duration(nil)
	for _, c := range all {
		rounds += c.done
		syncs = append(syncs, c.syncs...)
	}
	return lab.Figures{"ops/s": float64(rounds) / took.Seconds(), "p99 ms": ms(percentile(syncs, 0.99))}, ctx.Err()
}

// share is one round of a client of the file server: a file is deleted and another written, one
// becomes longer, one is read, and one is looked at. Nothing waits for stable storage.
func (c *client) share() error {
	_, err := os.Stat(c.one())
	return errors.Join(err,
		c.replace(func(f *os.File) error { _, err := f.Write(c.some(shareSize)); return err }),
		use(c.one(), os.O_WRONLY|os.O_APPEND, func(f *os.File) error { _, err := f.Write(c.some(shareAppend)); return err }),
		use(c.one(), os.O_RDONLY, readAllOf),
	)
}

// fileServer has 8 clients do a number of rounds together. It has ended when all of it is on stable
// storage: the time of that counts, else memory would be measured.
func fileServer(ctx context.Context, dir string, files, rounds int) (lab.Figures, error) {
	all := clients(shareClients, dir, files, shareSize)
	each := rounds / len(all)
	took, err := together(all, (*client).share, func(c *client) bool { return c.done < each && ctx.Err() == nil })
	if err != nil {
		return nil, err
	}
	rest, err := timed(func() error { return use(dir, os.O_RDONLY, func(f *os.File) error { return unix.Syncfs(int(f.Fd())) }) })
	if err != nil {
		return nil, fmt.Errorf("syncing %s: %w", dir, err)
	}
	return lab.Figures{"ops/s": float64(each*len(all)) / (took + rest).Seconds()}, ctx.Err()
}

// percentile returns the value of which a part of all is no larger, and 0 if there is none.
func percentile(all []time.Duration, part float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return all[min(len(all)-1, int(part*float64(len(all))))]
}
