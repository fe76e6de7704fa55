package daemon

import (
	"context"

	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/ublk"
)

// A kernel makes block devices: ublk.Control, or a model of it in tests.
type kernel interface {
	Add(context.Context, ublk.Params) (device, error)
	Recover(ctx context.Context, id int) (device, error)
	Info(ctx context.Context, id int) (ublk.Info, error)
	List(context.Context) ([]ublk.Info, error)
	Stop(ctx context.Context, id int, force bool) error
	Delete(ctx context.Context, id int) error
	Holders(id int) []string
	Features() (ublk.Features, error)
}

// A device is a block device that this process serves; see ublk.Device.
type device interface {
	Slots() int
	Start(context.Context, *reactor.Reactor, ublk.Handler) error
	Stop(ctx context.Context, force bool) error
	Delete(ctx context.Context, force bool) error
	Params() ublk.Params
	Resize(ctx context.Context, size uint64) error
	Rest() (bool, error)
	Close() error
	Done() <-chan struct{}
	Err() error
}

// driver is the kernel's ublk driver.
type driver struct{ *ublk.Control }

var _ device = (*ublk.Device)(nil)

// Add implements kernel.
func (d driver) Add(ctx context.Context, p ublk.Params) (device, error) {
	dev, err := d.Control.Add(ctx, p)
	if err != nil {
		return nil, err
	}
	return dev, nil
}

// Recover implements kernel.
func (d driver) Recover(ctx context.Context, id int) (device, error) {
	dev, err := d.Control.Recover(ctx, id)
	if err != nil {
		return nil, err
	}
	return dev, nil
}

// Holders implements kernel.
func (driver) Holders(id int) []string { return ublk.Holders(id) }
