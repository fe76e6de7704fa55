package engine

import (
	"context"
	"errors"
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

func (p patient) Stat(ctx context.Context, key string) (size int64, err error) {
	err = p.try(ctx, func() error { size, err = p.Store.Stat(ctx, key); return err })
	return size, err
}

func (p patient) Load(ctx context.Context, key string) (b []byte, v backend.Version, err error) {
	err = p.try(ctx, func() error { b, v, err = p.Store.Load(ctx, key); return err })
	return b, v, err
}
