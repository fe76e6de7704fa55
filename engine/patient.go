package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// patient is a store whose reads are tried a few times while it cannot answer,
// so that one lost answer does not end the recovery of an image, which reads
// many objects. Changes are not repeated here: their outcome is unknown.
type patient struct {
	backend.Store
	clock Clock
}

const (
	patientTries = 5
	patientPause = 50 * time.Millisecond // before the second try; it doubles
)

// patiently returns a store whose reads are tried a few times.
func patiently(st backend.Store) patient {
	if p, ok := st.(patient); ok {
		return p
	}
	return patient{st, Real{}}
}

func (p patient) try(ctx context.Context, read func() error) error {
	for n := range patientTries - 1 {
		err := read()
		if !errors.Is(err, backend.ErrTemporary) {
			return err
		}
		if p.clock.Sleep(ctx, patientPause<<n) != nil {
			return err
		}
	}
	return read()
}

func (p patient) Get(ctx context.Context, key string, b []byte, off int64) (n int, err error) {
	err = p.try(ctx, func() error { n, err = p.Store.Get(ctx, key, b, off); return err })
	return n, err
}

func (p patient) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	err = p.try(ctx, func() error { info, err = p.Store.Stat(ctx, key); return err })
	return info, err
}

func (p patient) Load(ctx context.Context, key string) (b []byte, v backend.Version, err error) {
	err = p.try(ctx, func() error { b, v, err = p.Store.Load(ctx, key); return err })
	return b, v, err
}

// prompt is a store that has only so long for each answer, so that one that hangs
// shows, however much there is to read in all. A call that is not answered in time
// fails with ErrTemporary.
type prompt struct {
	backend.Store
	timeout time.Duration
}

func (p prompt) do(ctx context.Context, op, key string, call func(context.Context) error) error {
	short, stop := context.WithTimeout(ctx, p.timeout)
	defer stop()
	err := call(short)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return &backend.Error{Op: op, Key: key, Class: backend.ErrTemporary, Cause: fmt.Errorf("no answer within %v", p.timeout)}
	}
	return err
}

func (p prompt) Get(ctx context.Context, key string, b []byte, off int64) (n int, err error) {
	err = p.do(ctx, "get", key, func(ctx context.Context) error { n, err = p.Store.Get(ctx, key, b, off); return err })
	return n, err
}

func (p prompt) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	err = p.do(ctx, "stat", key, func(ctx context.Context) error { info, err = p.Store.Stat(ctx, key); return err })
	return info, err
}

func (p prompt) Load(ctx context.Context, key string) (b []byte, v backend.Version, err error) {
	err = p.do(ctx, "load", key, func(ctx context.Context) error { b, v, err = p.Store.Load(ctx, key); return err })
	return b, v, err
}

func (p prompt) Swap(ctx context.Context, key string, old backend.Version, b []byte) (v backend.Version, err error) {
	err = p.do(ctx, "swap", key, func(ctx context.Context) error { v, err = p.Store.Swap(ctx, key, old, b); return err })
	return v, err
}
