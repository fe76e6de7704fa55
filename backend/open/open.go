// Package open opens a store of any kind by its URL.
package open

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/file"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/rados"
)

// An Opener opens stores, which share what can be shared: one connection for
// each Ceph cluster and client, and the contents of mem: stores, which live as
// long as the Opener. The zero value is ready to use; its methods may be
// called from any goroutine. It need not be closed: the stores are.
type Opener struct {
	clusters rados.Clusters

	mu  sync.Mutex
	mem map[string]*mem.Store // guarded by mu; by name
}

// Store opens the store at u, which the caller closes. It fails with
// ErrNotFound when u is a directory that is absent or empty, with ErrPermanent
// when the store is refused or set up wrongly, with ErrTemporary when it does
// not answer, or with the error of ctx. A mem: store is there when asked for.
func (o *Opener) Store(ctx context.Context, u backend.URL) (backend.Store, error) {
	return o.open(ctx, u, file.Open)
}

// CreateStore is as Store, but makes the directory of a file:// store if need
// be. A RADOS pool is its administrator's to make.
func (o *Opener) CreateStore(ctx context.Context, u backend.URL) (backend.Store, error) {
	return o.open(ctx, u, file.Create)
}

func (o *Opener) open(ctx context.Context, u backend.URL, openFile func(context.Context, string) (*file.Store, error)) (backend.Store, error) {
	switch u.Scheme {
	case backend.SchemeFile:
		s, err := openFile(ctx, u.Dir)
		if err != nil {
			return nil, err // not a nil *file.Store in an interface
		}
		return s, nil
	case backend.SchemeRADOS:
		s, err := o.clusters.Open(ctx, u)
		if err != nil {
			return nil, err
		}
		return s, nil
	case backend.SchemeMem:
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("open %s: %w", u, err)
		}
		return o.memStore(u.Pool), nil
	}
	return nil, &backend.Error{Op: "open", Class: backend.ErrPermanent, Cause: errors.New("unknown scheme " + u.Scheme)}
}

func (o *Opener) memStore(name string) *mem.Store {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.mem[name]
	if s == nil {
		s = mem.New()
		if o.mem == nil {
			o.mem = make(map[string]*mem.Store)
		}
		o.mem[name] = s
	}
	return s.Handle()
}

// Store opens the store at u by an Opener of its own.
func Store(ctx context.Context, u backend.URL) (backend.Store, error) {
	return new(Opener).Store(ctx, u)
}

// CreateStore creates and opens the store at u by an Opener of its own.
func CreateStore(ctx context.Context, u backend.URL) (backend.Store, error) {
	return new(Opener).CreateStore(ctx, u)
}
