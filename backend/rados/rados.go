// Package rados implements a store in a RADOS pool, by librados.
//
// The object of key K is the RADOS object "lsd.K" in the store's pool and
// namespace. A mutable one has the attribute lsd.version, which tells its
// version. One RADOS operation, which the cluster does whole or not at all,
// compares it and replaces contents and attribute.
//
// All operations are asynchronous ones of librados, and a call whose context
// ends returns at once: its operation is cancelled, and what librados still
// has to do with it happens in memory that is not the caller's. librados
// repeats operations by itself for as long as the cluster is away, and the
// cluster recognizes what it has done already; so without an end of ctx, and
// without rados_osd_op_timeout in ceph.conf, a call waits for the cluster. A
// call that did not wait long enough has the map of the cluster brought up to
// date, for the next one.
//
// While the pool is full, what takes no more room goes through: Get, Delete, a Swap to
// contents that are not longer. The rest fails at once with ErrTemporary, not, as is
// usual with librados, when there is room again.
//
// The format is described in docs/format-rados-store.md.
package rados

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// oidPrefix sets the store's objects apart in a pool that others use too.
const oidPrefix = "lsd."

// A Store is a handle on a store in a pool.
type Store struct {
	clusters        *Clusters
	key             clusterKey
	pool, namespace string

	ctx        context.Context // ends with the store
	cancel     context.CancelFunc
	background sync.WaitGroup // making a new link

	mu       sync.Mutex
	link     *link // guarded by mu
	renewing bool  // guarded by mu: link is dead, and another one in the making
}

var (
	_ backend.Store       = (*Store)(nil)
	_ backend.RangeGetter = (*Store)(nil)
)

// Open opens the store at u, whose scheme is rados. The pool must exist; a
// namespace does by being named. It fails with ErrPermanent when configuration,
// key or pool are missing, and with ErrTemporary when no monitor answers.
func (cs *Clusters) Open(ctx context.Context, u backend.URL) (*Store, error) {
	s := &Store{clusters: cs, key: clusterKey{u.Conf, u.ID}, pool: u.Pool, namespace: u.Namespace}
	l, err := cs.openLink(ctx, s.key, s.pool, s.namespace)
	if err != nil {
		return nil, openFailed(ctx, u, err)
	}
	s.link = l
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return s, nil
}

// openFailed returns the error of Open for err, which is ctx's, an openError,
// or one of go-ceph.
func openFailed(ctx context.Context, u backend.URL, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return fmt.Errorf("open %s: %w", u, err)
	}
	e := &backend.Error{Op: "open", Key: u.String(), Class: backend.ErrTemporary, Cause: err}
	var oe *openError
	if errors.As(err, &oe) {
		e.Class, e.Cause = oe.class, oe.cause
	}
	return e
}

// Close implements backend.Store. The connection ends with the last store that
// uses it. Operations that were abandoned keep both for as long as they take,
// of which Close waits for a few seconds.
func (s *Store) Close() error {
	s.mu.Lock()
	closed := s.ctx.Err() != nil
	s.cancel() // no call begins from here on
	s.mu.Unlock()
	if closed {
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.background.Wait()
		s.link.close(s.clusters) // nobody else is there any more
	}()
	select {
	case <-done:
	case <-time.After(closeTimeout):
	}
	return nil
}

// begin returns the link for a call's operation, which ends with running.Done, or
// the error that the call ends with before it does anything: bad is what is wrong
// with its arguments.
func (s *Store) begin(ctx context.Context, op, key string, bad error) (*link, error) {
	if bad != nil {
		return nil, &backend.Error{Op: op, Class: backend.ErrPermanent, Cause: bad}
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s %s: %w", op, key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, &backend.Error{Op: op, Key: key, Class: backend.ErrPermanent, Cause: errors.New("store is closed")}
	}
	s.link.running.Add(1)
	return s.link, nil
}

// end returns the error of a call whose operation, on l, returned ret and err.
func (s *Store) end(l *link, op, key string, ret int, err error) error {
	// ETIMEDOUT is the end of rados_osd_op_timeout.
	if err != nil || syscall.Errno(-ret) == syscall.ETIMEDOUT {
		s.clusters.unanswered(l.cluster)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", op, key, err) // the context's
	}
	if ret >= 0 {
		return nil
	}
	if syscall.Errno(-ret) == syscall.ESHUTDOWN {
		s.shutOut(l)
	}
	e := &backend.Error{Op: op, Key: key, Class: class(ret), Cause: errnoOf(ret)}
	if e.Class != backend.ErrNotFound {
		return e
	}
	// librados says the same when the whole pool is gone. Its own copy of the
	// map tells; this does not ask the cluster.
	if _, err := l.cluster.conn.GetPoolByID(l.poolID); err != nil {
		e.Class, e.Cause = backend.ErrPermanent, fmt.Errorf("pool %s was deleted", s.pool)
	}
	return e
}

// class returns the class of the negative return value of librados.
func class(ret int) error {
	switch syscall.Errno(-ret) {
	case syscall.ENOENT:
		return backend.ErrNotFound
	case syscall.EEXIST:
		return backend.ErrExists
	case syscall.EPERM, syscall.EACCES, syscall.EROFS, // of the client
		syscall.EINVAL, syscall.ERANGE, syscall.EDOM, syscall.EOPNOTSUPP,
		syscall.E2BIG, syscall.EFBIG, syscall.EMSGSIZE, syscall.ENAMETOOLONG:
		return backend.ErrPermanent
	}
	// ETIMEDOUT, ENOSPC, EDQUOT, EAGAIN, EBUSY, EIO and whatever else may pass; so
	// does ESHUTDOWN, blocklisted, with the next connection.
	return backend.ErrTemporary
}

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, data []byte) error {
	l, err := s.begin(ctx, "put", key, backend.CheckPut(key, len(data)))
	if err != nil {
		return err
	}
	defer l.running.Done()
	ret, err := l.put(ctx, oidPrefix+key, data)
	return s.end(l, "put", key, ret, err)
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	l, err := s.begin(ctx, "get", key, backend.CheckGet(key, off))
	if err != nil {
		return 0, err
	}
	defer l.running.Done()
	if len(p) == 0 || off >= backend.MaxObject {
		// To the cluster, a read of no bytes is one of all.
		_, ret, err := l.stat(ctx, oidPrefix+key)
		return 0, s.end(l, "get", key, ret, err)
	}
	p = p[:min(int64(len(p)), backend.MaxObject-off)]
	ret, err := l.get(ctx, oidPrefix+key, p, off)
	if err := s.end(l, "get", key, ret, err); err != nil {
		return 0, err
	}
	return min(ret, len(p)), nil
}

// GetRanges implements backend.RangeGetter.
func (s *Store) GetRanges(ctx context.Context, key string, ranges []backend.Range) error {
	l, err := s.begin(ctx, "get", key, backend.CheckRanges(key, ranges))
	if err != nil {
		return err
	}
	defer l.running.Done()
	ret, err := l.getRanges(ctx, oidPrefix+key, ranges)
	return s.end(l, "get", key, ret, err)
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	l, err := s.begin(ctx, "stat", key, backend.CheckKey(key))
	if err != nil {
		return backend.Info{}, err
	}
	defer l.running.Done()
	is, ret, err := l.stat(ctx, oidPrefix+key)
	return is, s.end(l, "stat", key, ret, err)
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	l, err := s.begin(ctx, "delete", key, backend.CheckKey(key))
	if err != nil {
		return err
	}
	defer l.running.Done()
	ret, err := l.remove(ctx, oidPrefix+key)
	return s.end(l, "delete", key, ret, err)
}

// List implements backend.Store. It goes through all objects of the pool's
// namespace, whosever they are.
func (s *Store) List(ctx context.Context, prefix string, fn func(key string) error) error {
	l, err := s.begin(ctx, "list", prefix, backend.CheckPrefix(prefix))
	if err != nil {
		return err
	}
	defer l.running.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	select {
	case l.cluster.blocking <- struct{}{}:
	case <-ctx.Done():
		return s.end(l, "list", prefix, 0, ctx.Err())
	}
	keys := make(chan string, 100)
	result := make(chan error, 1)
	l.running.Add(1)
	go func() {
		defer l.running.Done()
		defer func() { <-l.cluster.blocking }()
		result <- l.iterate(ctx, prefix, keys)
		close(keys)
	}()
	for {
		select {
		case key, ok := <-keys:
			if !ok {
				return s.listEnd(l, prefix, <-result)
			}
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("list %s: %w", prefix, err)
			}
			if err := fn(key); err != nil {
				return err
			}
		case <-ctx.Done():
			return s.end(l, "list", prefix, 0, ctx.Err())
		}
	}
}

// iterate sends the keys that begin with prefix. It blocks in librados where
// ctx does not reach it.
func (l *link) iterate(ctx context.Context, prefix string, keys chan<- string) error {
	it, err := l.ioctx.Iter()
	if err != nil {
		return err
	}
	defer it.Close()
	for it.Next() {
		key, ok := strings.CutPrefix(it.Value(), oidPrefix)
		if !ok || !strings.HasPrefix(key, prefix) || backend.CheckKey(key) != nil {
			continue // somebody else's
		}
		select {
		case keys <- key:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return it.Err()
}

func (s *Store) listEnd(l *link, prefix string, err error) error {
	if code := errorCode(err); code < 0 {
		return s.end(l, "list", prefix, code, nil)
	}
	return s.end(l, "list", prefix, 0, err)
}

// The attribute of a mutable object: format version, random bytes, CRC32C.
const (
	attrFormat = 1
	attrSize   = 1 + 16 + 4

	firstRoom = 64 << 10 // that Load tries with
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newAttr returns an attribute for data that no object ever had.
func newAttr(data []byte) []byte {
	attr := make([]byte, 1+16, attrSize)
	attr[0] = attrFormat
	rand.Read(attr[1:])
	return binary.LittleEndian.AppendUint32(attr, attrSum(attr, data))
}

func attrSum(attr, data []byte) uint32 {
	return crc32.Update(crc32.Checksum(attr[:1+16], castagnoli), castagnoli, data)
}

func checkAttr(attr, data []byte) error {
	if len(attr) != attrSize {
		return errors.New("the object is no mutable one, or its attribute lsd.version is corrupt")
	}
	if attr[0] != attrFormat {
		return fmt.Errorf("the object has format version %d: this program knows %d", attr[0], attrFormat)
	}
	if binary.LittleEndian.Uint32(attr[1+16:]) != attrSum(attr, data) {
		return errors.New("the object is corrupt: CRC32C mismatch")
	}
	return nil
}

// Load implements backend.Store.
func (s *Store) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	l, err := s.begin(ctx, "load", key, backend.CheckKey(key))
	if err != nil {
		return nil, backend.NoVersion, err
	}
	defer l.running.Done()
	for room := firstRoom; ; {
		data, attr, size, ret, err := l.load(ctx, oidPrefix+key, room)
		if err := s.end(l, "load", key, ret, err); err != nil {
			return nil, backend.NoVersion, err
		}
		if size > uint64(room) && size <= backend.MaxMutable {
			room = int(size) // and if it grew meanwhile, once more
			continue
		}
		if err := checkAttr(attr, data); err != nil {
			return nil, backend.NoVersion, &backend.Error{Op: "load", Key: key, Class: backend.ErrPermanent, Cause: err}
		}
		return data, backend.Version(hex.EncodeToString(attr)), nil
	}
}

// Swap implements backend.Store.
func (s *Store) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	l, err := s.begin(ctx, "swap", key, backend.CheckSwap(key, len(data)))
	if err != nil {
		return backend.NoVersion, err
	}
	defer l.running.Done()
	conflict := &backend.Error{Op: "swap", Key: key, Class: backend.ErrConflict}
	oldAttr, err := hex.DecodeString(string(old))
	if err != nil || old != backend.NoVersion && len(oldAttr) != attrSize {
		return backend.NoVersion, conflict // no object has such a version
	}
	attr := newAttr(data)
	ret, err := l.swap(ctx, oidPrefix+key, oldAttr, attr, data)
	err = s.end(l, "swap", key, ret, err)
	if err == nil {
		return backend.Version(hex.EncodeToString(attr)), nil
	}
	if errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrExists) || ret == -int(syscall.ECANCELED) {
		return backend.NoVersion, conflict
	}
	return backend.NoVersion, err
}
