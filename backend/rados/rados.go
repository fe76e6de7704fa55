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
// without rados_osd_op_timeout in ceph.conf, a call waits for the cluster.
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

	"github.com/ceph/go-ceph/rados"

	"github.com/lsd-ceph/lsd/backend"
)

// oidPrefix sets the store's objects apart in a pool that others use too.
const oidPrefix = "lsd."

// A Store is a handle on a store in a pool.
type Store struct {
	clusters *Clusters
	cluster  *cluster
	pool     string
	poolID   int64
	ioctx    *rados.IOContext
	running  sync.WaitGroup // operations, also those that nobody waits for
}

var _ backend.Store = (*Store)(nil)

// Open opens the store at u, whose scheme is rados. The pool must exist; a
// namespace does by being named. It fails with ErrPermanent when configuration,
// key or pool are missing, and with ErrTemporary when no monitor answers.
func (cs *Clusters) Open(ctx context.Context, u backend.URL) (*Store, error) {
	c, err := cs.acquire(ctx, clusterKey{u.Conf, u.ID})
	if err != nil {
		return nil, openFailed(ctx, u, err)
	}
	s := &Store{clusters: cs, cluster: c, pool: u.Pool}
	if err := s.openPool(ctx, u.Namespace); err != nil {
		cs.release(c)
		return nil, openFailed(ctx, u, err)
	}
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

// openPool sets ioctx and poolID. It may have to ask the monitors, which
// blocks: when ctx ends, what is under way keeps the connection until it is
// through.
func (s *Store) openPool(ctx context.Context, namespace string) error {
	select {
	case s.cluster.blocking <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	var ioctx *rados.IOContext
	var err error
	done := make(chan struct{})
	s.clusters.retain(s.cluster)
	go func() {
		defer s.clusters.release(s.cluster)
		defer func() { <-s.cluster.blocking }()
		ioctx, err = s.cluster.conn.OpenIOContext(s.pool)
		select {
		case done <- struct{}{}:
		case <-ctx.Done():
			if err == nil {
				ioctx.Destroy()
			}
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if errorCode(err) == -int(syscall.ENOENT) {
		return permanent("no such pool: %s; create it with: ceph osd pool create %s", s.pool, s.pool)
	}
	if err != nil {
		return err
	}
	ioctx.SetNamespace(namespace)
	s.ioctx = ioctx
	s.poolID = ioctx.GetPoolID()
	return nil
}

// Close implements backend.Store. The connection ends with the last store that
// uses it. Operations that were abandoned keep both for as long as they take,
// of which Close waits for a few seconds.
func (s *Store) Close() error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.running.Wait()
		s.ioctx.Destroy()
		s.clusters.release(s.cluster)
	}()
	select {
	case <-done:
	case <-time.After(closeTimeout):
	}
	return nil
}

// Addrs returns the addresses of the store's connection, as ceph osd blocklist
// takes them: what is blocklisted can do nothing to the cluster any more.
func (s *Store) Addrs() (string, error) {
	return s.cluster.conn.GetAddrs()
}

// begin returns the error that a call ends with before it does anything: bad
// is what is wrong with its arguments.
func begin(ctx context.Context, op, key string, bad error) error {
	if bad != nil {
		return &backend.Error{Op: op, Class: backend.ErrPermanent, Cause: bad}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %s: %w", op, key, err)
	}
	return nil
}

// end returns the error of a call whose operation returned ret and err.
func (s *Store) end(op, key string, ret int, err error) error {
	if err != nil {
		return fmt.Errorf("%s %s: %w", op, key, err) // the context's
	}
	if ret >= 0 {
		return nil
	}
	e := &backend.Error{Op: op, Key: key, Class: class(ret), Cause: errnoOf(ret)}
	if e.Class != backend.ErrNotFound {
		return e
	}
	// librados says the same when the whole pool is gone. Its own copy of the
	// map tells; this does not ask the cluster.
	if _, err := s.cluster.conn.GetPoolByID(s.poolID); err != nil {
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
		syscall.E2BIG, syscall.EFBIG, syscall.EMSGSIZE, syscall.ENAMETOOLONG,
		syscall.ESHUTDOWN: // blocklisted: nothing goes through until a new connection
		return backend.ErrPermanent
	}
	// ETIMEDOUT, ENOSPC, EDQUOT, EAGAIN, EBUSY, EIO and whatever else may pass.
	return backend.ErrTemporary
}

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, data []byte) error {
	if err := begin(ctx, "put", key, backend.CheckPut(key, len(data))); err != nil {
		return err
	}
	ret, err := s.put(ctx, oidPrefix+key, data)
	return s.end("put", key, ret, err)
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := begin(ctx, "get", key, backend.CheckGet(key, off)); err != nil {
		return 0, err
	}
	if len(p) == 0 || off >= backend.MaxObject {
		// To the cluster, a read of no bytes is one of all.
		_, ret, err := s.stat(ctx, oidPrefix+key)
		return 0, s.end("get", key, ret, err)
	}
	p = p[:min(int64(len(p)), backend.MaxObject-off)]
	ret, err := s.get(ctx, oidPrefix+key, p, off)
	if err := s.end("get", key, ret, err); err != nil {
		return 0, err
	}
	return min(ret, len(p)), nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (int64, error) {
	if err := begin(ctx, "stat", key, backend.CheckKey(key)); err != nil {
		return 0, err
	}
	size, ret, err := s.stat(ctx, oidPrefix+key)
	return size, s.end("stat", key, ret, err)
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := begin(ctx, "delete", key, backend.CheckKey(key)); err != nil {
		return err
	}
	ret, err := s.remove(ctx, oidPrefix+key)
	return s.end("delete", key, ret, err)
}

// List implements backend.Store. It goes through all objects of the pool's
// namespace, whosever they are.
func (s *Store) List(ctx context.Context, prefix string, fn func(key string) error) error {
	if err := begin(ctx, "list", prefix, backend.CheckPrefix(prefix)); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	select {
	case s.cluster.blocking <- struct{}{}:
	case <-ctx.Done():
		return s.end("list", prefix, 0, ctx.Err())
	}
	keys := make(chan string, 100)
	result := make(chan error, 1)
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		defer func() { <-s.cluster.blocking }()
		result <- s.iterate(ctx, prefix, keys)
		close(keys)
	}()
	for {
		select {
		case key, ok := <-keys:
			if !ok {
				return s.listEnd(prefix, <-result)
			}
			if err := begin(ctx, "list", prefix, nil); err != nil {
				return err
			}
			if err := fn(key); err != nil {
				return err
			}
		case <-ctx.Done():
			return s.end("list", prefix, 0, ctx.Err())
		}
	}
}

// iterate sends the keys that begin with prefix. It blocks in librados where
// ctx does not reach it.
func (s *Store) iterate(ctx context.Context, prefix string, keys chan<- string) error {
	it, err := s.ioctx.Iter()
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

func (s *Store) listEnd(prefix string, err error) error {
	if code := errorCode(err); code < 0 {
		return s.end("list", prefix, code, nil)
	}
	return s.end("list", prefix, 0, err)
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
	if err := begin(ctx, "load", key, backend.CheckKey(key)); err != nil {
		return nil, backend.NoVersion, err
	}
	for room := firstRoom; ; {
		data, attr, size, ret, err := s.load(ctx, oidPrefix+key, room)
		if err := s.end("load", key, ret, err); err != nil {
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
	if err := begin(ctx, "swap", key, backend.CheckSwap(key, len(data))); err != nil {
		return backend.NoVersion, err
	}
	conflict := &backend.Error{Op: "swap", Key: key, Class: backend.ErrConflict}
	oldAttr, err := hex.DecodeString(string(old))
	if err != nil || old != backend.NoVersion && len(oldAttr) != attrSize {
		return backend.NoVersion, conflict // no object has such a version
	}
	attr := newAttr(data)
	ret, err := s.swap(ctx, oidPrefix+key, oldAttr, attr, data)
	err = s.end("swap", key, ret, err)
	if err == nil {
		return backend.Version(hex.EncodeToString(attr)), nil
	}
	if errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrExists) || ret == -int(syscall.ECANCELED) {
		return backend.NoVersion, conflict
	}
	return backend.NoVersion, err
}
