// Package file implements a store in a directory of a local file system.
//
// The directory holds
//
//	lsd-store             "lsd file store 1\n": says what this is
//	objects/K+obj         the immutable object of key K, as it is
//	objects/K+mut         the mutable object of key K, with a header
//	locks/00 ... locks/3f the locks of mutable objects, empty
//	locks/tmp             the lock of tmp, empty
//	tmp/ID/               files being written by one open handle
//	tmp/ID/lock           locked for as long as that handle is open
//
// where the slashes in K make directories. Keys have no '+', so that an object
// "a" and a directory "a" of the object "a/b" are never in each other's way.
//
// An object is written to tmp, flushed, and then appears under its name: an
// immutable one by link(2), which fails when the name is taken; a mutable one
// by rename(2), after a look at the version, under the lock of its key. All locks
// are flock(2)s, which the kernel drops when the process ends, however it ends.
// While it is stopped it keeps them: so they are held only for a moment, and
// nobody waits for one for ever.
//
// A name is durable only when its directory has been flushed too. Between
// link and that, the file has a second name, in tmp: so whoever finds an object
// with two names flushes its directory before relying on it, and nobody takes
// an object for durable that a power cut can still take away.
//
// The format is described in docs/format-file-store.md.
package file

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/durable"
)

const (
	marker     = "lsd-store"
	markerText = "lsd file store 1\n"

	objectsDir = "objects"
	locksDir   = "locks"
	tmpDir     = "tmp"
	tmpLock    = "locks/tmp"

	immutableSuffix = "+obj"
	mutableSuffix   = "+mut"

	dirMode  = 0o700
	fileMode = 0o600

	maxKnownDirs = 4096
)

// A Store is a handle on a store in a directory. Any number of handles, in any
// number of processes of one host, may be open on one directory. One that only
// reads changes nothing there, so the directory may be read-only for it.
//
// File operations cannot be interrupted: a call whose context ends returns
// after the step that it is in. A wait for a lock ends with the context, or after
// lockPatience, with an error that says who holds the lock.
type Store struct {
	root  *os.Root
	locks [numLocks]keyLock

	making keyLock  // guards tmp and alive until they are set
	tmp    string   // path of this handle's directory in tmp; see scratch
	alive  *os.File // the lock in it; nil before the handle has written anything
	last   atomic.Uint64

	patience time.Duration // lockPatience, but in tests

	mu    sync.Mutex
	known map[string]bool // guarded by mu; directories whose own name is durable
}

var (
	_ backend.Store       = (*Store)(nil)
	_ backend.RangeGetter = (*Store)(nil)
)

// Create makes dir, and the directories above it, into a store, and opens it.
// It opens it when it is a store already, and fails with ErrPermanent when it
// holds something else, or is inside another store, whose files it would be.
func Create(ctx context.Context, dir string) (*Store, error) {
	s, err := Open(ctx, dir)
	if !errors.Is(err, backend.ErrNotFound) {
		return s, err
	}
	if outer := storeAbove(dir); outer != "" {
		return nil, fail("create", dir, &permanentError{fmt.Sprintf("it is inside the store %s, whose images have names without a slash", outer)})
	}
	if err := create(dir); err != nil {
		return nil, fail("create", dir, err)
	}
	return Open(ctx, dir)
}

// storeAbove returns the store that dir would be inside, if there is one.
func storeAbove(dir string) string {
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		if _, err := os.Lstat(filepath.Join(dir, marker)); err == nil {
			return dir
		}
	}
	return ""
}

// create makes what Open needs. It may run in several processes at once, and
// after a crash of itself. The marker comes last.
func create(dir string) error {
	if err := durable.MkdirAll(dir, dirMode); err != nil {
		return err
	}
	for _, sub := range []string{objectsDir, locksDir, tmpDir} {
		if err := os.Mkdir(filepath.Join(dir, sub), dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	// The marker appears whole or not at all.
	f, err := os.CreateTemp(filepath.Join(dir, tmpDir), marker+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := writeSync(f, []byte(markerText)); err != nil {
		return err
	}
	if err := os.Link(f.Name(), filepath.Join(dir, marker)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// Open opens the store in dir. It fails with ErrNotFound when dir is absent or
// empty, and with ErrPermanent when it is no store.
func Open(ctx context.Context, dir string) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fail("open", dir, err)
	}
	s := &Store{root: root, making: make(keyLock, 1), known: make(map[string]bool), patience: lockPatience}
	for i := range s.locks {
		s.locks[i] = make(keyLock, 1)
	}
	if err := s.checkMarker(); err != nil {
		root.Close()
		return nil, fail("open", dir, err)
	}
	return s, nil
}

var errNotStore = errors.New("the directory is not an lsd store, and not empty")

// checkMarker returns fs.ErrNotExist if there could be a store here and is
// none, or an error if there is something else.
func (s *Store) checkMarker() error {
	f, err := s.root.Open(marker)
	if errors.Is(err, fs.ErrNotExist) {
		return s.checkEmpty()
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 100))
	if err != nil {
		return err
	}
	if string(b) != markerText {
		return &permanentError{fmt.Sprintf("%s says %q: this program knows %q", marker, bytes.TrimSpace(b), markerText[:len(markerText)-1])}
	}
	return nil
}

// checkEmpty returns fs.ErrNotExist if the directory is empty or holds only
// what a create that did not finish can leave.
func (s *Store) checkEmpty() error {
	d, err := s.root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(10)
	if err != nil && err != io.EOF {
		return err
	}
	for _, name := range names {
		switch name {
		case objectsDir, locksDir, tmpDir, "lost+found":
		case marker: // somebody has just made it
			return s.checkMarker()
		default:
			return errNotStore
		}
	}
	return &noStoreError{}
}

// A noStoreError says that there is no store, and what to do.
type noStoreError struct{}

func (*noStoreError) Error() string        { return "there is no lsd store in this directory" }
func (*noStoreError) Is(target error) bool { return target == fs.ErrNotExist }

// A permanentError is one that trying again does not help.
type permanentError struct{ text string }

func (e *permanentError) Error() string { return e.text }

// fail returns err with its class.
func fail(op, key string, err error) error {
	return &backend.Error{Op: op, Key: key, Class: class(err), Cause: cause(err)}
}

// failed is fail for calls that wait: err may also be the error of ctx.
func failed(ctx context.Context, op, key string, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return check(ctx, op, key)
	}
	return fail(op, key, err)
}

// cause strips what the caller knows, and what would make the error match a
// second class.
func cause(err error) error {
	var pathErr *fs.PathError
	var linkErr *os.LinkError
	switch {
	case errors.As(err, &pathErr):
		return pathErr.Err
	case errors.As(err, &linkErr):
		return linkErr.Err
	}
	return err
}

func class(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return backend.ErrNotFound
	}
	if errors.Is(err, fs.ErrExist) {
		return backend.ErrExists
	}
	var b *busyError
	if errors.As(err, &b) {
		return backend.ErrTemporary
	}
	var p *permanentError
	if errors.As(err, &p) || errors.Is(err, errNotStore) || errors.Is(err, fs.ErrClosed) {
		return backend.ErrPermanent
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return backend.ErrPermanent // os.Root refuses: a link leads out of the store
	}
	switch errno {
	case unix.EACCES, unix.EPERM, unix.EROFS, unix.ENOTDIR, unix.EISDIR, unix.ELOOP,
		unix.ENAMETOOLONG, unix.EINVAL, unix.EFBIG, unix.EXDEV, unix.EMLINK,
		unix.ENOSYS, unix.EOPNOTSUPP, unix.EBADF:
		return backend.ErrPermanent
	}
	// ENOSPC, EDQUOT, EIO, ENOMEM, EMFILE and whatever else may pass.
	return backend.ErrTemporary
}

// begin returns the error that a call ends with before it does anything: bad
// is what is wrong with its arguments.
func begin(ctx context.Context, op, key string, bad error) error {
	if bad != nil {
		return &backend.Error{Op: op, Class: backend.ErrPermanent, Cause: bad}
	}
	return check(ctx, op, key)
}

// check is called between the steps of a call.
func check(ctx context.Context, op, key string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %s: %w", op, key, err)
	}
	return nil
}

func immutablePath(key string) string { return objectsDir + "/" + key + immutableSuffix }
func mutablePath(key string) string   { return objectsDir + "/" + key + mutableSuffix }

// absent returns the error for an object that is not there. It makes sure that
// the store is: a directory whose contents were removed, or which is another
// file system's mount point, must not look like a store without objects.
func (s *Store) absent(op, key string) error {
	if _, err := s.root.Lstat(marker); err != nil {
		return &backend.Error{Op: op, Key: key, Class: backend.ErrPermanent, Cause: fmt.Errorf("the store has lost its file %s", marker)}
	}
	return &backend.Error{Op: op, Key: key, Class: backend.ErrNotFound}
}

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, data []byte) error {
	if err := begin(ctx, "put", key, backend.CheckPut(key, len(data))); err != nil {
		return err
	}
	name := immutablePath(key)
	// The cheap look spares writing what cannot be kept; link decides.
	if _, err := s.root.Lstat(name); err == nil {
		return s.putExists(key)
	}
	tmp, err := s.writeTmp(ctx, data)
	if err != nil {
		return failed(ctx, "put", key, err)
	}
	if err := check(ctx, "put", key); err != nil {
		s.root.Remove(tmp)
		return err
	}
	if err = s.makeDirs(path.Dir(name)); err == nil {
		err = s.root.Link(tmp, name)
	}
	if err != nil {
		s.root.Remove(tmp)
		if errors.Is(err, fs.ErrExist) {
			return s.putExists(key)
		}
		return fail("put", key, notAbsent(err))
	}
	if err := s.syncDir(path.Dir(name)); err != nil {
		// The temporary name stays: it says that the other is not durable.
		return fail("put", key, notAbsent(err))
	}
	s.root.Remove(tmp)
	return nil
}

// putExists returns ErrExists. The caller may find that the object is its own,
// of a Put that did not return, and rely on it: so it must be durable.
func (s *Store) putExists(key string) error {
	if err := s.syncDir(path.Dir(immutablePath(key))); err != nil {
		return fail("put", key, notAbsent(err))
	}
	return &backend.Error{Op: "put", Key: key, Class: backend.ErrExists}
}

// notAbsent keeps a directory that was removed under our feet from looking
// like an object that is not there, in calls that make one.
func notAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &permanentError{"a directory of the store was removed: " + cause(err).Error()}
	}
	return err
}

// makeDirs makes the directory dir, and those above it, durably.
func (s *Store) makeDirs(dir string) error {
	s.mu.Lock()
	known := s.known[dir]
	s.mu.Unlock()
	if known || dir == "." {
		return nil
	}
	parent := path.Dir(dir)
	if err := s.makeDirs(parent); err != nil {
		return err
	}
	if err := s.root.Mkdir(dir, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return notAbsent(err)
	}
	// Also if it existed: who made it may not have come to this yet.
	if err := s.syncDir(parent); err != nil {
		return notAbsent(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxKnownDirs {
		clear(s.known)
	}
	s.known[dir] = true
	return nil
}

func (s *Store) syncDir(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err = d.Sync(); errors.Is(err, unix.EINVAL) && readOnly(d) {
		return nil // a file system that has no fsync because it never changes
	}
	return err
}

func readOnly(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

// open opens the file of an object for reading, and makes sure that its name
// is durable.
func (s *Store) open(name string) (*os.File, fs.FileInfo, error) {
	f, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &permanentError{"not a regular file"}
	}
	if err == nil && links(info) > 1 {
		err = s.syncDir(path.Dir(name))
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// changed returns when a file was last changed: as the kernel has it, since what copies files back
// gives them the times that they had.
func changed(info fs.FileInfo) time.Time {
	at := info.ModTime()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		if c := time.Unix(st.Ctim.Unix()); c.After(at) {
			return c
		}
	}
	return at
}

func links(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Nlink)
	}
	return 2
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := begin(ctx, "get", key, backend.CheckGet(key, off)); err != nil {
		return 0, err
	}
	r := []backend.Range{{Off: off, P: p}}
	err := s.read(ctx, key, r)
	return r[0].N, err
}

// GetRanges implements backend.RangeGetter: it opens the file once.
func (s *Store) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	if err := begin(ctx, "get", key, backend.CheckRanges(key, ranges)); err != nil {
		return err
	}
	return s.read(ctx, key, ranges)
}

// read reads ranges of the immutable object key.
func (s *Store) read(ctx context.Context, key string, ranges []backend.Range) error {
	f, info, err := s.open(immutablePath(key))
	if errors.Is(err, fs.ErrNotExist) {
		return s.absent("get", key)
	}
	if err != nil {
		return fail("get", key, err)
	}
	defer f.Close()
	for i := range ranges {
		if err := check(ctx, "get", key); err != nil {
			return err
		}
		r := &ranges[i]
		if r.N = 0; r.Off >= info.Size() {
			continue
		}
		n, err := f.ReadAt(r.P, r.Off)
		if err != nil && err != io.EOF {
			return fail("get", key, err)
		}
		r.N = n
	}
	return nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := begin(ctx, "stat", key, backend.CheckKey(key)); err != nil {
		return backend.Info{}, err
	}
	f, info, err := s.open(immutablePath(key))
	header := int64(0)
	if errors.Is(err, fs.ErrNotExist) {
		f, info, err = s.open(mutablePath(key))
		header = mutableHeader
	}
	if errors.Is(err, fs.ErrNotExist) {
		return backend.Info{}, s.absent("stat", key)
	}
	if err != nil {
		return backend.Info{}, fail("stat", key, err)
	}
	defer f.Close()
	if info.Size() < header {
		return backend.Info{}, fail("stat", key, errCorrupt)
	}
	return backend.Info{Size: info.Size() - header, Modified: changed(info)}, nil
}

// Delete implements backend.Store. It leaves the directories of the key: one
// that is removed while another process puts into it would cost more than the
// few that a removed image leaves.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := begin(ctx, "delete", key, backend.CheckKey(key)); err != nil {
		return err
	}
	name := immutablePath(key)
	err := s.root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		name = mutablePath(key)
		err = s.removeMutable(ctx, key, name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return s.absent("delete", key)
	}
	if err == nil {
		err = s.syncDir(path.Dir(name))
	}
	if err != nil {
		return failed(ctx, "delete", key, err)
	}
	return nil
}

// removeMutable removes the mutable object under its lock: between a Swap's
// look at the version and its rename it must not go away.
func (s *Store) removeMutable(ctx context.Context, key, name string) error {
	if _, err := s.root.Lstat(name); err != nil {
		return err
	}
	unlock, err := s.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	return s.root.Remove(name)
}

// writeTmp writes data to a new file in tmp, flushes it, and returns its name.
func (s *Store) writeTmp(ctx context.Context, data ...[]byte) (string, error) {
	dir, err := s.scratch(ctx)
	if err != nil {
		return "", err
	}
	name := dir + "/" + strconv.FormatUint(s.last.Add(1), 10)
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return "", notAbsent(err)
	}
	if err := writeSync(f, data...); err != nil {
		s.root.Remove(name)
		return "", err
	}
	return name, nil
}

// writeSync writes data to f, flushes and closes it.
func writeSync(f *os.File, data ...[]byte) error {
	var err error
	for _, p := range data {
		if err == nil {
			_, err = f.Write(p)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	// A file system that reports a full disk only here does so before Sync
	// returns nil, but close has the last word.
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Close implements backend.Store.
func (s *Store) Close() error {
	s.closeTmp()
	return s.root.Close()
}

// randomID returns 32 hexadecimal digits that nobody else ever had.
func randomID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
