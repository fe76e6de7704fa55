package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/ublk"
)

const (
	// quietTimeout bounds the wait for what an image has under way once it has
	// been closed or has died.
	quietTimeout = 30 * time.Second
	// lockTimeout bounds the wait for a log that a dead daemon's last writes
	// still hold.
	lockTimeout = 15 * time.Second
	pollEvery   = 5 * time.Millisecond
)

// A disk is an open image and the reactor that owns it, with or without a block
// device. A disk without an image fails or forgets everything it is asked.
type disk struct {
	logger  *slog.Logger
	reactor *reactor.Reactor
	env     *env
	front   *front        // the reactor's; nil for a null device
	image   *engine.Image // the reactor's; may be nil
	// dev is what it serves, nil while there is none. Who changes it does so on the reactor, with the
	// attachment's op and fit, where others than these may look.
	dev    device
	owner  *atomic.Pointer[attachment] // whose disk it is; the attachment's to change, with mu
	store  backend.Store
	log    *writelog.OSFile
	logID  uuid.UUID // uuid.Nil without a log
	mem    *uring.Arena
	shared *shared
	memory int64 // taken of shared.logMemory
	// borrowed is what the log is lent of shared.logPool: the reactor's, and free's when that has ended.
	borrowed borrower

	// The watcher's: see rest.
	requests  uint64
	puts      uint64
	busySince time.Time
	rested    bool

	refused atomic.Bool // see refuse

	// The reactor's: what it does for library clients.
	rings   *ring.Group // nil before the first one
	changes changes
	deaf    bool // as front's

	hooked hookedHandles

	closed chan struct{} // made by close; closed when it has ended
	err    error         // of close, valid after closed
}

// diskOptions is what a disk is made from.
type diskOptions struct {
	rec      record
	store    backend.Store // the disk's, also if it is not made
	log      *writelog.OSFile
	host     string
	env      hostEnv
	shared   *shared
	force    bool
	progress func(api.Progress)
	owner    *atomic.Pointer[attachment] // is told on the reactor if the image gets another size
	logger   *slog.Logger
	cache    *readCache
}

// openDisk opens the image of a record and starts its reactor.
func openDisk(ctx context.Context, o diskOptions) (_ *disk, err error) {
	d := &disk{logger: o.logger, store: o.store, log: o.log, shared: o.shared, owner: o.owner, borrowed: borrower{o.shared.logPool, map[*byte][]byte{}}}
	defer func() {
		if err != nil {
			d.free()
		}
	}()
	if err := d.startReactor(o.rec); err != nil {
		return nil, err
	}
	opt := engine.OpenOptions{
		ReadOnly: o.rec.ReadOnly,
		Snapshot: o.rec.Snapshot,
		URL:      o.rec.URL,
		Host:     o.host,
		Boot:     o.env.boot,
		Force:    o.force,
		Lease:    o.rec.Lease,
		Progress: func(what string) { o.progress(api.Progress{What: what}) },
		Config: engine.Config{
			BatchAge:        o.rec.BatchAge,
			CheckpointEvery: o.rec.CheckpointEvery,
			SpaceRatio:      o.rec.SpaceRatio,
			StoreTimeout:    o.rec.StoreTimeout,
			Shared:          o.shared.engine,
			LogPool:         &d.borrowed,
			ReadCache:       o.cache.Cache,
			ReadCacheDevice: o.cache.device(d.reactor),
			Resized:         func(sectors uint64) { resized(o.owner, sectors) },
			Logger:          o.logger,
		},
	}
	var mem []byte
	if !o.rec.ReadOnly {
		opt.Log = o.log
		if d.memory, err = o.shared.takeLogMemory(o.rec.LogMemory); err != nil {
			return nil, err
		}
		if d.mem, err = uring.NewArena(int(d.memory)); err != nil {
			return nil, err
		}
		mem = d.mem.Bytes()
	}
	im, err := openImage(ctx, &o, opt)
	if err != nil {
		return nil, err
	}
	d.image, d.changes.image = im, im
	err = d.reactor.Call(func() {
		if o.log == nil {
			im.Start(d.env, nil, nil)
		} else {
			im.Start(d.env, d.reactor.File(o.log.Fd()), mem)
			d.logID = im.Stats().LogID
		}
		d.reactor.OnTurn(im.EndTurn)
	})
	return d, err
}

// resized tells whose disk it is, on the reactor, that the image has another size. The disk may
// become another one's meanwhile.
func resized(owner *atomic.Pointer[attachment], sectors uint64) {
	for a := owner.Load(); ; {
		a.resized(sectors)
		b := owner.Load()
		if a == b {
			return
		}
		a = b
	}
}

// openImage is engine.Open, of which a panic is damage of the image: one that cannot be
// opened must not take those beside it along, at each start of the daemon anew. What it
// had of the memory for maps is lost, which so few attempts do not feel.
func openImage(ctx context.Context, o *diskOptions, opt engine.OpenOptions) (im *engine.Image, err error) {
	defer func() {
		if v := recover(); v != nil {
			o.logger.Error("panic while the image was opened", "panic", v, "stack", string(debug.Stack()))
			im, err = nil, fmt.Errorf("%w: panic: %v", engine.ErrCorrupt, v)
		}
	}()
	return engine.Open(ctx, o.store, o.rec.ImageID, opt)
}

// emptyDisk returns a disk without an image.
func emptyDisk(rec record, logger *slog.Logger) (*disk, error) {
	d := &disk{logger: logger, owner: new(atomic.Pointer[attachment])}
	return d, d.startReactor(rec)
}

func (d *disk) startReactor(rec record) error {
	r, err := reactor.New(reactor.Config{
		Name:   fmt.Sprintf("ublkb%d", rec.ID),
		Nice:   ReactorNice,
		Spin:   ReactorSpin(),
		Logger: d.logger,
	})
	if err != nil {
		return err
	}
	d.reactor, d.env = r, &env{r: r}
	return nil
}

// serve makes the disk serve dev, the device of that record. The disk has dev from here on, also
// when this fails.
func (d *disk) serve(ctx context.Context, dev device, rec *record) error {
	if rec.Null {
		d.dev = dev
		return dev.Start(ctx, d.reactor, ublk.Null{})
	}
	f := newFront(d.image, dev.Slots(), nil)
	if rec.Shared || d.hooked.any() { // a write of a client that is gone may be under way yet
		f.changes = &d.changes
	}
	d.stand(dev, f)
	return dev.Start(ctx, d.reactor, f)
}

// stand puts a device and its front in the place of those that the disk has.
func (d *disk) stand(dev device, f *front) {
	set := func() { d.dev, d.front = dev, f }
	if d.reactor.Call(set) != nil { // it has ended, and nobody else looks
		set()
	}
}

// stats returns what the image is doing, nil if there is none.
func (d *disk) stats(ctx context.Context) (*engine.Stats, error) {
	if d.image == nil {
		return nil, nil
	}
	var s engine.Stats
	if err := call(ctx, d.reactor, func() { s = d.image.Stats() }); err != nil {
		return nil, err
	}
	return &s, nil
}

// lost reports that the image has ended by itself: another host has it.
func lost(s *engine.Stats) bool {
	return s != nil && (s.State == engine.Fenced.String() || s.State == engine.Released.String())
}

// destage brings everything acknowledged so far into the store.
func (d *disk) destage(ctx context.Context, progress func(api.Progress)) error {
	if d.image == nil {
		return nil
	}
	done := make(chan error, 1)
	if err := call(ctx, d.reactor, func() { d.image.Destage(func(err error) { done <- err }) }); err != nil {
		return err
	}
	return d.follow(ctx, "writing to the store", done, progress)
}

// refresh has the image do what somebody else has asked of it in its store.
func (d *disk) refresh(ctx context.Context, progress func(api.Progress)) error {
	if d.image == nil {
		return nil
	}
	done := make(chan error, 1)
	if err := call(ctx, d.reactor, func() { d.image.Refresh(func(err error) { done <- err }) }); err != nil {
		return err
	}
	return d.follow(ctx, "writing to the store", done, progress)
}

// close destages, checkpoints and gives up the ownership. What it began goes on
// when ctx ends; a later call waits for it again.
func (d *disk) close(ctx context.Context, progress func(api.Progress)) error {
	if d.image == nil {
		return nil
	}
	if d.closed == nil {
		d.closed = make(chan struct{})
		done := func(err error) { d.err = err; close(d.closed) }
		d.reactor.Post(func() { d.image.Close(done) })
	}
	ended := make(chan error, 1)
	go func() {
		select {
		case <-d.closed:
			ended <- d.err
		case <-d.reactor.Done():
			ended <- d.died()
		case <-ctx.Done():
		}
	}()
	return d.follow(ctx, "writing to the store", ended, progress)
}

// died is the error of a disk whose reactor has ended.
func (d *disk) died() error {
	return fmt.Errorf("the image's reactor ended: %w", errors.Join(reactor.ErrStopped, d.reactor.Err()))
}

// errNotInTime says that a wait has ended before what it waited for.
var errNotInTime = errors.New("not everything is in the store yet")

// follow waits for done and tells how much is still dirty meanwhile.
func (d *disk) follow(ctx context.Context, what string, done <-chan error, progress func(api.Progress)) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	var most uint64
	for {
		select {
		case err := <-done:
			return err
		case <-d.reactor.Done():
			return d.died()
		case <-ctx.Done():
			return errors.Join(errNotInTime, context.Cause(ctx))
		case <-tick.C:
			s, err := d.stats(ctx)
			if err != nil {
				continue
			}
			most = max(most, s.Dirty)
			now := what
			if s.MapError != "" {
				now += ", but part of the map cannot be read: " + s.MapError
			}
			progress(api.Progress{What: now, Done: most - s.Dirty, Total: most})
		}
	}
}

// abandon ends the image's work where it stands, as a crash would. The kernel is
// not answered any more.
func (d *disk) abandon(ctx context.Context) error {
	return call(ctx, d.reactor, d.drop)
}

// refuse ends the image's work as abandon does, but tells the kernel: every request
// that waits, and every later one, gets an I/O error. What was acknowledged stays in
// the log, from which the image can be attached again.
func (d *disk) refuse() {
	if d.image == nil || d.refused.Swap(true) {
		return
	}
	d.reactor.Post(d.image.Abandon)
}

// dead reports whether the reactor has ended.
func (d *disk) dead() bool {
	select {
	case <-d.reactor.Done():
		return true
	default:
		return false
	}
}

// drop is abandon on the reactor.
func (d *disk) drop() {
	if d.front != nil {
		d.front.deaf = true
	}
	d.deaf = true
	if d.image != nil {
		d.image.Abandon()
	}
}

// release ends the reactor and frees everything, once the device is not served
// any more and the image has been closed, abandoned or lost, or its reactor has
// died.
func (d *disk) release() {
	ctx, stop := context.WithTimeout(context.Background(), quietTimeout)
	defer stop()
	if !d.awaitQuiet(ctx) {
		// A worker that hangs in the store. It may still use the memory; all it
		// can do to the store belongs to an epoch that is over then.
		d.logger.Error("something of the image is still running: its memory stays in use until the daemon ends")
		// It may still write where a library client waits for what it has read: the clients
		// come back, and get other memory.
		d.hooked.closeAll()
		d.reactor.Stop()
		<-d.reactor.Done()
		if d.log != nil {
			_ = d.log.Close() // lets go of its lock
		}
		return
	}
	d.reactor.Stop()
	<-d.reactor.Done()
	if d.dev != nil {
		<-d.dev.Done() // it sees only now that nobody serves it, and lets go of its node
		if err := d.dev.Close(); err != nil {
			d.logger.Error("close the device", "err", err)
		}
	}
	d.free()
}

// awaitQuiet waits until nothing uses the image's memory and files any more.
func (d *disk) awaitQuiet(ctx context.Context) bool {
	if d.image == nil {
		return true
	}
	for {
		quiet := false
		err := call(ctx, d.reactor, func() { quiet = d.image.Quiet() })
		if errors.Is(err, reactor.ErrStopped) {
			// It died, so the image is nobody's: end its work from here.
			d.dropDead()
			return d.env.wait(ctx)
		}
		if err == nil && quiet { // else it may still be about to say so
			return d.env.wait(ctx)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pollEvery):
		}
	}
}

// dropDead is drop after a panic of the reactor, which may have left anything
// half-done.
func (d *disk) dropDead() {
	defer func() {
		if v := recover(); v != nil {
			d.logger.Error("panic while closing what a panic has left", "panic", v)
		}
	}()
	d.drop()
}

// free gives back what the disk holds; nothing may be running.
func (d *disk) free() {
	if d.reactor != nil {
		d.reactor.Stop()
		<-d.reactor.Done()
	}
	d.borrowed.giveBack()
	errs := []error{d.changes.close(), d.hooked.putAll()}
	if d.mem != nil {
		errs = append(errs, d.mem.Close())
	}
	if d.memory > 0 {
		d.shared.logMemory.give(d.memory)
	}
	if d.log != nil {
		errs = append(errs, d.log.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	if err := errors.Join(errs...); err != nil {
		d.logger.Error("free an image", "err", err)
	}
}
