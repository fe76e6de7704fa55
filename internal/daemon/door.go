package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// firstDoor is the number of the first attachment without a block device: the kernel's have
// lower ones, up to ublk.MaxID.
const firstDoor = api.FirstLibrary

// doors stand in for the kernel where an image is attached for library clients alone: there is
// no block device, but its steps (added, served, left behind by a dead server, recovered,
// stopped) are the same, and with them all that an attachment does to survive a death.
type doors struct {
	holders func(id int) []string // who uses the attachment

	mu   sync.Mutex
	open map[int]*door // guarded by mu
}

// A door is what an attachment without a block device has in its place.
type door struct {
	doors *doors

	mu      sync.Mutex
	params  ublk.Params   // guarded by mu; but for its size it does not change
	state   ublk.State    // guarded by mu
	stopped chan struct{} // closed by stop
	done    chan struct{} // closed once nobody serves it any more
	err     error         // of the reactor; valid after done
}

var (
	_ kernel = (*doors)(nil)
	_ device = (*door)(nil)
)

func newDoors(holders func(id int) []string) *doors {
	return &doors{holders: holders, open: make(map[int]*door)}
}

// leftBehind makes the door of a dead daemon known: its clients wait for the next one.
func (k *doors) leftBehind(p ublk.Params) { k.put(p, ublk.StateQuiesced) }

func (k *doors) put(p ublk.Params, state ublk.State) *door {
	d := &door{doors: k, params: p, state: state, stopped: make(chan struct{}), done: make(chan struct{})}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open[p.ID] = d
	return d
}

func (k *doors) get(id int) (*door, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.open[id]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("attachment %s: %w", deviceName(id), ublk.ErrNoDevice)
}

// Add implements kernel.
func (k *doors) Add(_ context.Context, p ublk.Params) (device, error) {
	if _, err := k.get(p.ID); err == nil {
		return nil, unix.EEXIST
	}
	return k.put(p, ublk.StateDead), nil
}

// Recover implements kernel.
func (k *doors) Recover(_ context.Context, id int) (device, error) {
	d, err := k.get(id)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != ublk.StateQuiesced {
		return nil, ublk.ErrNotRecoverable
	}
	return k.put(d.params, ublk.StateQuiesced), nil
}

// replace returns a door in the place of one that somebody else serves: it is his no more.
func (k *doors) replace(p ublk.Params) device { return k.put(p, ublk.StateQuiesced) }

// Info implements kernel.
func (k *doors) Info(_ context.Context, id int) (ublk.Info, error) {
	d, err := k.get(id)
	if err != nil {
		return ublk.Info{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return ublk.Info{ID: id, State: d.state, ServerPID: -1}, nil
}

// List implements kernel: nobody else has doors.
func (*doors) List(context.Context) ([]ublk.Info, error) { return nil, nil }

// Stop implements kernel.
func (k *doors) Stop(_ context.Context, id int, force bool) error {
	d, err := k.get(id)
	if err != nil {
		return err
	}
	if h := k.holders(id); len(h) > 0 && !force {
		return &ublk.BusyError{ID: id, Name: deviceName(id), Holders: h}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != ublk.StateDead {
		d.state = ublk.StateDead
		close(d.stopped)
	}
	return nil
}

// Delete implements kernel.
func (k *doors) Delete(ctx context.Context, id int) error {
	if err := k.Stop(ctx, id, true); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.open, id)
	return nil
}

// Holders implements kernel.
func (k *doors) Holders(id int) []string { return k.holders(id) }

// Features implements kernel.
func (*doors) Features() (ublk.Features, error) { return 0, errors.New("there is no block device") }

// Slots implements device: rings have theirs.
func (*door) Slots() int { return 0 }

// Start implements device. Nothing comes through a door itself.
func (d *door) Start(_ context.Context, r *reactor.Reactor, _ ublk.Handler) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = ublk.StateLive
	go func() {
		defer close(d.done)
		select {
		case <-d.stopped:
			return
		case <-r.Done():
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.state == ublk.StateLive {
			d.state = ublk.StateQuiesced
			d.err = errors.Join(errors.New("the reactor ended"), r.Err())
		}
	}()
	return nil
}

// Stop implements device.
func (d *door) Stop(ctx context.Context, force bool) error {
	return d.doors.Stop(ctx, d.Params().ID, force)
}

// Delete implements device.
func (d *door) Delete(ctx context.Context, force bool) error {
	if err := d.Stop(ctx, force); err != nil {
		return err
	}
	return d.doors.Delete(ctx, d.Params().ID)
}

// Params implements device.
func (d *door) Params() ublk.Params {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.params
}

// Resize implements device.
func (d *door) Resize(_ context.Context, size uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.params.SizeBytes = size
	return nil
}

// Rest implements device: it has no memory.
func (*door) Rest() (bool, error) { return true, nil }

// Close implements device.
func (*door) Close() error { return nil }

// Done implements device.
func (d *door) Done() <-chan struct{} { return d.done }

// Err implements device.
func (d *door) Err() error { return d.err }
