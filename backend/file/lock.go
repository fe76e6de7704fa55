package file

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// numLocks is part of the format: all processes must take the same lock for
// the same key.
const numLocks = 64

// lockPatience is how long a call waits for a lock, if its context lets it. Locks
// are held for a look at a file and a rename, or for cleaning up in tmp. Who holds
// one for longer is stopped, or its file system hangs.
const lockPatience = 10 * time.Second

// A keyLock is held by who has put a value into it. It orders the goroutines
// of one handle, so that only one of them polls for the lock file.
type keyLock chan struct{}

// lock locks the mutable object key against all other handles of all
// processes, until the function that it returns is called. The error is that
// of ctx, a *busyError, or that of a file operation.
func (s *Store) lock(ctx context.Context, key string) (unlock func(), err error) {
	h := fnv.New32a()
	io.WriteString(h, key)
	i := h.Sum32() % numLocks
	name := fmt.Sprintf("%s/%02x", locksDir, i)
	w, stop := s.wait(ctx, name)
	defer stop()
	if err := w.enter(s.locks[i]); err != nil {
		return nil, err
	}
	f, err := w.flock()
	if err != nil {
		<-s.locks[i]
		return nil, err
	}
	return func() { f.Close(); <-s.locks[i] }, nil
}

// flock opens the file, which it makes if need be, and locks it. Closing it
// unlocks it. Errors are as those of lock.
func (s *Store) flock(ctx context.Context, name string) (*os.File, error) {
	w, stop := s.wait(ctx, name)
	defer stop()
	return w.flock()
}

// A lockWait is the wait for one lock.
type lockWait struct {
	s     *Store
	name  string
	ctx   context.Context // the caller's
	over  context.Context // the same, or patience has ended
	began time.Time
}

func (s *Store) wait(ctx context.Context, name string) (w *lockWait, stop func()) {
	over, stop := context.WithTimeout(ctx, s.patience)
	return &lockWait{s, name, ctx, over, time.Now()}, stop
}

// enter takes l. Like flock it fails only when it has found somebody there.
func (w *lockWait) enter(l keyLock) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-w.over.Done():
		return w.failed()
	}
}

// flock polls, because flock(2) cannot be interrupted: the lock is held for a
// moment, and rarely asked for by two.
func (w *lockWait) flock() (*os.File, error) {
	f, err := w.s.root.OpenFile(w.name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, fileMode)
	if err != nil {
		return nil, notAbsent(err)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		ok, err := tryFlock(f)
		if ok {
			return f, nil
		}
		if err == nil {
			select {
			case <-time.After(pause/2 + rand.N(pause)):
				continue
			case <-w.over.Done():
				err = w.failed()
			}
		}
		f.Close()
		return nil, err
	}
}

// failed returns the error for a lock that others have held for too long.
func (w *lockWait) failed() error {
	if errors.Is(w.ctx.Err(), context.Canceled) {
		return w.ctx.Err() // nobody wants to know
	}
	e := &busyError{lock: w.name, waited: time.Since(w.began)}
	if info, err := w.s.root.Stat(w.name); err == nil {
		e.holder = holderOf(info)
	}
	return e
}

// tryFlock locks f if nobody else has locked it, and says whether it did.
func tryFlock(f *os.File) (bool, error) {
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
		case nil:
			return true, nil
		case unix.EWOULDBLOCK:
			return false, nil
		case unix.EINTR:
		default:
			return false, err
		}
	}
}

// scratch returns this handle's directory in tmp, which it makes when something is
// written for the first time. Errors are as those of lock.
func (s *Store) scratch(ctx context.Context) (string, error) {
	w, stop := s.wait(ctx, tmpLock)
	defer stop()
	if err := w.enter(s.making); err != nil {
		return "", err
	}
	defer func() { <-s.making }()
	if s.alive == nil {
		if err := s.openTmp(ctx); err != nil {
			return "", err
		}
	}
	return s.tmp, nil
}

// openTmp makes this handle's directory in tmp, and removes those of handles
// that are gone: their lock is free. The lock of tmp keeps a directory that is
// just being made, and not locked yet, from looking like one of those.
func (s *Store) openTmp(ctx context.Context) error {
	all, err := s.flock(ctx, tmpLock)
	if err != nil {
		return err
	}
	defer all.Close()
	if err := s.removeStale(); err != nil {
		return err
	}
	tmp := tmpDir + "/" + randomID()
	if err := s.root.Mkdir(tmp, dirMode); err != nil {
		return notAbsent(err)
	}
	alive, err := s.flock(ctx, tmp+"/lock")
	if err != nil {
		return err
	}
	s.tmp, s.alive = tmp, alive
	return nil
}

// removeStale removes what dead handles left in tmp. The lock of tmp is held.
func (s *Store) removeStale() error {
	d, err := s.root.Open(tmpDir)
	if err != nil {
		return notAbsent(err)
	}
	defer d.Close()
	synced := false
	for {
		entries, err := d.ReadDir(100)
		for _, e := range entries {
			name := tmpDir + "/" + e.Name()
			if !e.IsDir() {
				// A file of create, at work or dead: it does not matter to it,
				// nor to us.
				continue
			}
			f, err := s.root.OpenFile(name+"/lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, fileMode)
			if errors.Is(err, fs.ErrNotExist) {
				continue // Close was faster
			}
			if err != nil {
				return err
			}
			dead, err := tryFlock(f)
			if dead && !synced {
				// An object that was linked, but its directory not flushed,
				// loses its second name now, which says so.
				synced, err = true, unix.Syncfs(int(d.Fd()))
			}
			if dead && err == nil {
				err = s.root.RemoveAll(name)
			}
			f.Close()
			if err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// closeTmp removes what openTmp made. A file that is still there is the second
// name of an object whose directory could not be flushed: it is left to
// removeStale, which flushes first.
func (s *Store) closeTmp() {
	if s.alive == nil {
		return
	}
	s.root.Remove(s.tmp + "/lock")
	s.root.Remove(s.tmp)
	s.alive.Close()
}
