// Package mem implements a store in memory, for tests and simulations. It is
// deterministic: what it answers, but for times, depends only on the calls made so far.
package mem

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// A Store is a handle on a store in memory. Make one with New.
type Store struct {
	objects *objects
	closed  bool // guarded by objects.mu
}

// objects is what the handles of a store share.
type objects struct {
	mu      sync.RWMutex
	data    map[string]object // guarded by mu; contents are never modified
	version uint64            // guarded by mu; the last version that was given
}

type object struct {
	data     []byte
	version  backend.Version // NoVersion if immutable
	modified time.Time
}

var _ backend.Store = (*Store)(nil)

// New returns a handle on a new, empty store.
func New() *Store {
	return &Store{objects: &objects{data: make(map[string]object)}}
}

// Handle returns another handle on the same store, which lives as long as any
// handle on it is used; closing one leaves the others open.
func (s *Store) Handle() *Store {
	return &Store{objects: s.objects}
}

// Clone returns a handle on a new store that holds what s holds now. The two
// are independent from then on.
func (s *Store) Clone() *Store {
	s.objects.mu.RLock()
	defer s.objects.mu.RUnlock()
	c := New()
	c.objects.version = s.objects.version
	for key, o := range s.objects.data {
		c.objects.data[key] = o
	}
	return c
}

// Size returns the number of objects and of bytes in them.
func (s *Store) Size() (objects int, bytes int64) {
	s.objects.mu.RLock()
	defer s.objects.mu.RUnlock()
	for _, o := range s.objects.data {
		bytes += int64(len(o.data))
	}
	return len(s.objects.data), bytes
}

func fail(op, key string, class, cause error) error {
	return &backend.Error{Op: op, Key: key, Class: class, Cause: cause}
}

// begin returns the error that a call ends with before it does anything: bad
// is what is wrong with its arguments.
func begin(ctx context.Context, op, key string, bad error) error {
	if bad != nil {
		return fail(op, "", backend.ErrPermanent, bad)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %s: %w", op, key, err)
	}
	return nil
}

var errClosed = errors.New("store is closed")

// open returns an error unless s is open; objects.mu is held.
func (s *Store) open(op, key string) error {
	if s.closed {
		return fail(op, key, backend.ErrPermanent, errClosed)
	}
	return nil
}

// find returns the object key, of either kind.
func (s *Store) find(op, key string) (object, error) {
	s.objects.mu.RLock()
	defer s.objects.mu.RUnlock()
	if err := s.open(op, key); err != nil {
		return object{}, err
	}
	o, ok := s.objects.data[key]
	if !ok {
		return object{}, fail(op, key, backend.ErrNotFound, nil)
	}
	return o, nil
}

// errKind says that a key was used for both kinds of objects.
var errKind = errors.New("the object is of the other kind")

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, data []byte) error {
	if err := begin(ctx, "put", key, backend.CheckPut(key, len(data))); err != nil {
		return err
	}
	s.objects.mu.Lock()
	defer s.objects.mu.Unlock()
	if err := s.open("put", key); err != nil {
		return err
	}
	if _, ok := s.objects.data[key]; ok {
		return fail("put", key, backend.ErrExists, nil)
	}
	s.objects.data[key] = object{data: slices.Clone(data), modified: time.Now()}
	return nil
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := begin(ctx, "get", key, backend.CheckGet(key, off)); err != nil {
		return 0, err
	}
	o, err := s.find("get", key)
	if err != nil {
		return 0, err
	}
	if o.version != backend.NoVersion {
		return 0, fail("get", key, backend.ErrPermanent, errKind)
	}
	if off >= int64(len(o.data)) {
		return 0, nil
	}
	return copy(p, o.data[off:]), nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := begin(ctx, "stat", key, backend.CheckKey(key)); err != nil {
		return backend.Info{}, err
	}
	o, err := s.find("stat", key)
	return backend.Info{Size: int64(len(o.data)), Modified: o.modified}, err
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := begin(ctx, "delete", key, backend.CheckKey(key)); err != nil {
		return err
	}
	s.objects.mu.Lock()
	defer s.objects.mu.Unlock()
	if err := s.open("delete", key); err != nil {
		return err
	}
	if _, ok := s.objects.data[key]; !ok {
		return fail("delete", key, backend.ErrNotFound, nil)
	}
	delete(s.objects.data, key)
	return nil
}

// List implements backend.Store. It goes in the order of the keys, over those
// that are there when it begins.
func (s *Store) List(ctx context.Context, prefix string, fn func(key string) error) error {
	if err := begin(ctx, "list", prefix, backend.CheckPrefix(prefix)); err != nil {
		return err
	}
	keys, err := s.keys(prefix)
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := begin(ctx, "list", prefix, nil); err != nil {
			return err
		}
		if err := fn(key); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) keys(prefix string) ([]string, error) {
	s.objects.mu.RLock()
	defer s.objects.mu.RUnlock()
	if err := s.open("list", prefix); err != nil {
		return nil, err
	}
	var keys []string
	for key := range s.objects.data {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys, nil
}

// Load implements backend.Store.
func (s *Store) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	if err := begin(ctx, "load", key, backend.CheckKey(key)); err != nil {
		return nil, backend.NoVersion, err
	}
	o, err := s.find("load", key)
	if err != nil {
		return nil, backend.NoVersion, err
	}
	if o.version == backend.NoVersion {
		return nil, backend.NoVersion, fail("load", key, backend.ErrPermanent, errKind)
	}
	return slices.Clone(o.data), o.version, nil
}

// Swap implements backend.Store.
func (s *Store) Swap(ctx context.Context, key string, old backend.Version, data []byte) (backend.Version, error) {
	if err := begin(ctx, "swap", key, backend.CheckSwap(key, len(data))); err != nil {
		return backend.NoVersion, err
	}
	s.objects.mu.Lock()
	defer s.objects.mu.Unlock()
	if err := s.open("swap", key); err != nil {
		return backend.NoVersion, err
	}
	o, ok := s.objects.data[key]
	if ok && o.version == backend.NoVersion {
		return backend.NoVersion, fail("swap", key, backend.ErrPermanent, errKind)
	}
	if o.version != old { // that of an absent object is NoVersion
		return backend.NoVersion, fail("swap", key, backend.ErrConflict, nil)
	}
	// One counter for all keys: a deleted key's versions need not be kept.
	s.objects.version++
	v := backend.Version(strconv.FormatUint(s.objects.version, 10))
	s.objects.data[key] = object{data: slices.Clone(data), version: v, modified: time.Now()}
	return v, nil
}

// Close implements backend.Store. The objects stay for other handles.
func (s *Store) Close() error {
	s.objects.mu.Lock()
	defer s.objects.mu.Unlock()
	s.closed = true
	return nil
}
