// Package backend defines the store: the place where an image's immutable
// objects, and its few small mutable ones, live. A package beside this one
// implements it for each kind of store; storetest holds the one suite that all
// of them must pass.
package backend

import (
	"context"
	"time"
)

// A Store keeps the objects of any number of images.
//
// There are two kinds of objects, and a key is only ever used for one of them.
//
// Immutable objects are created whole by Put and never change. Mutable objects
// are small (at most MaxMutable bytes) and change only by Swap.
//
// Keys are made by the engine: 1 to MaxKey bytes of [a-z0-9._-] and '/', no
// empty component, no component that begins with a dot.
//
// All methods may be called from any goroutine, any number at a time. Each
// blocks until it is done or ctx is, whichever is first. When ctx ends a call
// that changes something, the change may still take effect later: the caller
// must treat its outcome as unknown, as it must for ErrTemporary.
//
// Durability: when Put, Delete or Swap returns nil, the change survives a crash
// and a power cut of the store. Atomicity: a reader sees an object whole or not
// at all, at any time, also after a crash.
//
// Errors match, by errors.Is, exactly one of the classes ErrNotFound,
// ErrExists, ErrConflict, ErrTemporary, ErrPermanent, or else the error of ctx.
type Store interface {
	// Put creates the immutable object key with the given data, which the store
	// does not keep after it returns. It fails with ErrExists, and changes
	// nothing, when the key is there already: two writers can never overwrite
	// each other. A caller that repeats a Put whose outcome is unknown may
	// meet its own earlier success as ErrExists.
	Put(ctx context.Context, key string, data []byte) error

	// Get reads into p from offset off of the immutable object key and returns
	// the number of bytes read. It is less than len(p), with a nil error, only
	// where the object ends. It fails with ErrNotFound when the key is absent.
	Get(ctx context.Context, key string, p []byte, off int64) (int, error)

	// Stat returns what there is to be known of the object key, of either kind,
	// without its contents, or ErrNotFound.
	Stat(ctx context.Context, key string) (Info, error)

	// Delete removes the object key, of either kind, or fails with ErrNotFound.
	Delete(ctx context.Context, key string) error

	// List calls fn for every object, of either kind, whose key begins with
	// prefix, in no particular order; prefix may be empty. An object that is
	// created or deleted meanwhile may or may not appear. It stops at the
	// first error that fn returns, and returns it. It may cost time in
	// proportion to everything in the store, so nothing on an image's I/O or
	// recovery path calls it.
	List(ctx context.Context, prefix string, fn func(key string) error) error

	// Load returns the contents of the mutable object key and the version that
	// Swap needs to replace just these, or ErrNotFound. The caller owns the
	// slice.
	Load(ctx context.Context, key string) ([]byte, Version, error)

	// Swap replaces the contents of the mutable object key if its version still
	// is old, and returns the new version. With old == NoVersion the object
	// must not exist, and is created. It fails with ErrConflict, and changes
	// nothing, when the version is another one, when the object exists and old
	// is NoVersion, or when it does not exist and old is not. Versions of one
	// key are never reused, also not after Delete.
	Swap(ctx context.Context, key string, old Version, data []byte) (Version, error)

	// Close frees what the store holds. No other call may be running; those that
	// follow fail with ErrPermanent, but another Close does nothing.
	Close() error
}

// Info is what Stat returns.
type Info struct {
	Size int64 // bytes
	// Modified is when the contents last changed, by the clock of the store, in whole
	// seconds at least.
	Modified time.Time
}

// A Fencer is a Store that can shut a client out: whatever a fenced client still
// has under way, or tries later, does not take effect.
type Fencer interface {
	// Identity names the client by which this Store reaches the store at present,
	// for others to fence; "" if it cannot be named. It does not block.
	Identity() string

	// Fence shuts the client out that its Identity named. It fails with
	// ErrPermanent when that is not permitted here or identity is none.
	Fence(ctx context.Context, identity string) error
}

// A Version identifies one state of a mutable object. It means nothing outside
// the store and key it came from, but is stable across processes and hosts.
type Version string

// NoVersion is the version of a mutable object that does not exist.
const NoVersion Version = ""

// Limits that callers keep and stores check.
const (
	MaxKey     = 200      // bytes in a key
	MaxMutable = 16 << 20 // bytes in a mutable object
	MaxObject  = 64 << 20 // bytes in an immutable object
)
