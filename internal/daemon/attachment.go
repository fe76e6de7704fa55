package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

// An attachment is one block device and the image behind it.
//
// Its keeper, a goroutine, brings the image up and takes it up again when its
// reactor dies. Attach, detach and the daemon's end work on an attachment
// without its keeper: whoever holds op may stop and start it.
type attachment struct {
	d      *Daemon
	id     int
	logger *slog.Logger
	op     chan struct{} // holds a token while somebody is at it

	stop context.CancelFunc // of the keeper; guarded by op
	kept chan struct{}      // closed when the keeper has ended; guarded by op; nil without one

	fit sync.Mutex // held by who gives the device the size of the image: the keeper, or who holds op

	damaged int // attempts in a row that met damage in the store; the keeper's

	mu        sync.Mutex
	rec       record // guarded by mu, as all that follows
	disk      *disk  // nil while it is not open
	state     string // as long as the image itself has nothing to say
	err       error  // why it is in this state
	since     time.Time
	restarts  int
	storeDown time.Time // since when; zero: it is not
	stalled   bool      // a stall has been logged

	// handles are those of library clients. Each is hooked to disk, while there is one.
	handles map[*handle]struct{}
	unused  time.Time   // since when there are none, and it is active
	found   bool        // an earlier daemon has attached it
	anew    bool        // it was attaching it, so what its clients knew of the image may be out of date
	leaving atomic.Bool // see letGoUnused
}

func newAttachment(d *Daemon, rec record, state string) *attachment {
	a := &attachment{d: d, id: rec.ID, op: make(chan struct{}, 1), rec: rec, state: state, since: time.Now(), handles: make(map[*handle]struct{}), unused: time.Now(), found: state == api.StateRecovering}
	a.anew = a.found && rec.Phase == phaseAttaching
	a.logger = d.logger.With("device", a.name())
	if rec.URL != "" {
		a.logger = a.logger.With("image", rec.URL)
	}
	return a
}

func (a *attachment) name() string { return deviceName(a.id) }

// deviceName is what people call the attachment of a number.
func deviceName(id int) string {
	if id >= firstDoor {
		return fmt.Sprintf("lib%d", id-firstDoor)
	}
	return fmt.Sprintf("/dev/ublkb%d", id)
}

// kernel returns what makes the attachment's device.
func (a *attachment) kernel() (kernel, error) {
	if a.id >= firstDoor {
		return a.d.doors, nil
	}
	return a.d.kernel()
}

// busy says that it is in use, and by whom.
func (a *attachment) busy(holders []string) error {
	return &ublk.BusyError{ID: a.id, Name: a.name(), Holders: holders}
}

// takeWait is how long somebody who wants to change an attachment waits for another one who
// is at it: most are done by then.
const takeWait = time.Second

// take takes op, which the caller gives back.
func (a *attachment) take(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, takeWait)
	defer stop()
	select {
	case a.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %w", a.name(), errAtIt)
	}
}

// errAtIt says that somebody is at an attachment.
var errAtIt = errors.New("is being attached, detached or changed: wait for that")

func (a *attachment) record() record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rec
}

// writable fails unless what is attached is an image that can be written to, and stays so.
func (a *attachment) writable() error {
	switch rec := a.record(); {
	case rec.Null || rec.ReadOnly:
		return fmt.Errorf("%s is not an image that can be written to", a.name())
	case rec.Phase == phaseDetaching: // it has no device any more
		return fmt.Errorf("%s is being detached: wait for that", a.name())
	}
	return nil
}

// save writes the record down, changed by change.
func (a *attachment) save(change func(*record)) error {
	rec := a.record()
	change(&rec)
	if err := a.d.records.save(rec); err != nil {
		return err
	}
	a.mu.Lock()
	a.rec = rec
	a.mu.Unlock()
	return nil
}

func (a *attachment) setState(state string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state != state {
		a.since = time.Now()
		a.unused = a.since
	}
	a.state, a.err = state, err
}

func (a *attachment) setDisk(dk *disk) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.disk == dk {
		return // its handles are hooked
	}
	a.disk = dk
	if dk == nil {
		return
	}
	dk.hook(slices.Collect(maps.Keys(a.handles))...)
}

func (a *attachment) getDisk() *disk {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.disk
}
