package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// recoverTimeout bounds Recover's wait where ctx has no deadline.
const recoverTimeout = 60 * time.Second

// A Device is a ublk device that this process serves.
//
// Its life: Add or Recover, Start, then requests until Stop or until its reactor
// ends, Done, Close. Delete does all that is left of it. Its methods may not be
// called on a reactor (they wait for one), and not several at a time.
type Device struct {
	c        *Control
	info     Info
	params   Params
	recovery bool // END_USER_RECOVERY starts it

	char     int      // /dev/ublkcN; -1 when closed
	desc     [][]byte // the queues' descriptors, written by the kernel
	mem      *uring.Arena
	batchMem *uring.Arena // nil without FeatureBatchIO
	tags     []tag
	carriers []carrier // of all tags

	sectors atomic.Uint64 // the device's size

	reactor  *reactor.Reactor
	ring     *uring.Ring
	handler  Handler
	opCommit uint32 // of a single

	// The reactor's own.
	out     int   // carriers that have not ended
	tagErr  error // the first thing that failed for another reason than a stop
	failed  chan struct{}
	drained chan struct{} // closed when all carriers have ended

	done chan struct{}
	err  error // why the queues ended; valid after done
}

// Add creates a device that does not serve yet: see Start. Nothing is left
// behind when it fails.
func (c *Control) Add(ctx context.Context, p Params) (*Device, error) {
	p = p.withDefaults()
	if err := p.check(); err != nil {
		return nil, err
	}
	buf, err := binary.Append(nil, binary.NativeEndian, &devInfo{
		Queues:     uint16(p.Queues),
		Depth:      uint16(p.Depth),
		MaxIOBytes: uint32(p.MaxIOBytes),
		DevID:      uint32(p.ID), // -1: any
		ServerPID:  int32(os.Getpid()),
		Flags:      uint64(p.flags(c.features &^ c.forgone)),
	})
	if err != nil {
		panic(err) // devInfo has fields of fixed size only
	}
	if _, err := c.do(ctx, cmdAddDev, ctrlCmd{DevID: uint32(p.ID), QueueID: noQueue}, buf); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("ublk: device %d exists already: %w", p.ID, err)
		}
		return nil, err
	}
	info, err := decodeInfo(buf)
	if err != nil {
		return nil, err
	}
	d, err := c.finishAdd(ctx, info, p)
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), nodeTimeout)
		defer cancel()
		return nil, errors.Join(err, c.Delete(clean, info.ID))
	}
	return d, nil
}

func (c *Control) finishAdd(ctx context.Context, info Info, p Params) (*Device, error) {
	if want := p.flags(c.features&^c.forgone) &^ FeatureIoctlEncode; !info.Flags.Has(want) {
		return nil, fmt.Errorf("ublk: this kernel lacks %v", want&^info.Flags)
	}
	p.ID, p.Queues, p.Depth, p.MaxIOBytes = info.ID, info.Queues, info.Depth, info.MaxIOBytes
	if _, err := c.do(ctx, cmdSetParams, ctrlCmd{DevID: uint32(info.ID), QueueID: noQueue}, p.encode()); err != nil {
		return nil, err
	}
	d, err := c.newDevice(info, p)
	if err != nil {
		return nil, err
	}
	if err := d.open(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Recover takes over a device whose server is gone, with its users still
// holding it. Requests that the old server had are delivered again after Start,
// beside new ones; they may have been carried out before.
//
// Recover waits for the kernel to let go of the old server, until ctx ends, at
// most a minute. It fails with ErrNoDevice or ErrNotRecoverable when there is
// nothing to recover. A device whose server lives is not touched.
func (c *Control) Recover(ctx context.Context, id int) (*Device, error) {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	p, err := c.Params(ctx, id)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx, id)
	if err != nil {
		return nil, err
	}
	if p.NoRecovery || info.State == StateDead {
		return nil, fmt.Errorf("ublk: device %d is %v: %w", id, info.State, ErrNotRecoverable)
	}
	p.MaxIOBytes = info.MaxIOBytes
	// What takes time comes before the kernel's point of no return: kernels up
	// to 6.15 cannot start a recovery twice.
	d, err := c.newDevice(info, p)
	if err != nil {
		return nil, err
	}
	d.recovery = true
	err = d.startRecovery(ctx)
	if err == nil {
		err = d.open(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// startRecovery sends START_USER_RECOVERY until the kernel accepts it: EBUSY
// means that the old server, or the kernel's clean-up after it, is still there.
func (d *Device) startRecovery(ctx context.Context) error {
	for {
		_, err := d.c.do(ctx, cmdStartUserRecovery, ctrlCmd{DevID: uint32(d.info.ID), QueueID: noQueue}, nil)
		if err == nil {
			return nil
		}
		info, ierr := d.c.Info(ctx, d.info.ID)
		switch {
		case ierr != nil && ctx.Err() == nil:
			return ierr
		case errors.Is(err, unix.EINVAL) && info.State == StateQuiesced:
			// Another server began a recovery and died before it had offered any
			// tag: the kernel is still ready for one. See mapDescriptors.
			return nil
		case errors.Is(err, unix.EBUSY) && info.State != StateDead:
		case ctx.Err() == nil:
			return errors.Join(err, ErrNotRecoverable)
		}
		if serr := sleep(ctx, pollInterval); serr != nil {
			return fmt.Errorf("ublk: device %d is still served by process %d (%v): %w", d.info.ID, info.ServerPID, info.State, serr)
		}
	}
}

// newDevice allocates a device and its buffers.
func (c *Control) newDevice(info Info, p Params) (*Device, error) {
	n, size := info.Queues*info.Depth, info.MaxIOBytes
	if info.Flags.Has(FeatureUserCopy) {
		size = 0 // the kernel copies nothing, and refuses buffers
	}
	mem, err := uring.NewArena(max(n*size, 1))
	if err != nil {
		return nil, err
	}
	d := &Device{
		c:        c,
		info:     info,
		params:   p,
		char:     -1,
		mem:      mem,
		tags:     make([]tag, n),
		opCommit: c.number(ioCommitAndFetchReq),
		failed:   make(chan struct{}),
		drained:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	d.sectors.Store(p.SizeBytes / sectorSize)
	for i := range d.tags {
		d.tags[i].init(d, i/info.Depth, i%info.Depth, mem.Bytes()[i*size:(i+1)*size])
	}
	if err := d.makeCarriers(); err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return d, nil
}

// makeCarriers makes the carriers for what the device was made for.
func (d *Device) makeCarriers() error {
	if !d.info.Flags.Has(FeatureBatchIO) {
		d.carriers = newSingles(d.tags)
		return nil
	}
	var err error
	if d.batchMem, err = uring.NewArena(d.info.Queues * batchMemory(d.info.Depth)); err != nil {
		return err
	}
	d.carriers = newBatchQueues(d, d.batchMem.Bytes())
	return nil
}

// open opens the character device.
func (d *Device) open(ctx context.Context) error {
	path := charPath(d.info.ID)
	if err := awaitNode(ctx, path, unix.S_IFCHR); err != nil {
		return err
	}
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			d.char = fd
			return nil
		}
		// One process at a time: udev may be looking at the node, or the
		// kernel has not quite closed it for the old server.
		if err != unix.EBUSY && err != unix.EINTR {
			return fmt.Errorf("ublk: open %s: %w", path, err)
		}
		if serr := sleep(ctx, pollInterval); serr != nil {
			return fmt.Errorf("ublk: open %s: %w", path, err)
		}
	}
}

// mapDescriptors maps the queues' descriptors, which the tags read requests from.
//
// It comes after the tags have been offered. Kernels up to 6.15 let the process that was
// the first to map them do so, and no other one until the next recovery begins; and that
// can begin only when the server before has offered its tags. If that server had died
// with the descriptors mapped and no tag offered, nobody could take the device up again.
func (d *Device) mapDescriptors() error {
	page := os.Getpagesize()
	size := (d.info.Depth*sizeofIODesc + page - 1) / page * page
	stride := (maxQueueDepth*sizeofIODesc + page - 1) / page * page
	for q := range d.info.Queues {
		desc, err := unix.Mmap(d.char, int64(cmdBufOffset+q*stride), size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("ublk: map the descriptors of queue %d of %s: %w", q, charPath(d.info.ID), err)
		}
		d.desc = append(d.desc, desc)
		for t := range d.info.Depth {
			d.tags[q*d.info.Depth+t].desc = desc[t*sizeofIODesc : (t+1)*sizeofIODesc]
		}
	}
	return nil
}

// Rest gives the memory of the request buffers back while no request is under
// way; they take memory again as requests come. It is called on the reactor. It
// does nothing, and reports false, when a request is there or may be.
//
// The kernel puts a write's data into its buffer before it completes the fetch,
// and takes a read's out of it when it is told the result. With a ring that is
// still both have happened. Kernels before 6.5 can also do the first on the way
// back from any other system call, so the memory stays there; USER_COPY is as old
// as that change.
func (d *Device) Rest() (bool, error) {
	if d.ring == nil {
		return false, nil
	}
	if still, err := d.ring.Settle(); err != nil || !still {
		return false, err
	}
	for _, c := range d.carriers {
		if !c.idle() {
			return false, nil
		}
	}
	if !d.c.features.Has(FeatureUserCopy) {
		return true, nil
	}
	return true, d.mem.Release()
}

// ID returns the device's number.
func (d *Device) ID() int { return d.info.ID }

// Path returns the block device's node, which is there after Start.
func (d *Device) Path() string { return blockPath(d.info.ID) }

// Params returns the device's parameters with all defaults filled in.
func (d *Device) Params() Params {
	p := d.params
	p.SizeBytes = d.sectors.Load() * sectorSize
	return p
}

// Slots returns how many requests there can be at a time: IO.Index is below it.
func (d *Device) Slots() int { return len(d.tags) }

// Start lets r serve the device's requests with h and makes the block device
// appear, or go on if it was recovered. All queues are served by r's thread. The
// kernel's partition scan sends requests before Start returns, so r must be
// running free.
//
// It fails when ctx ends or the kernel refuses; the device is then to be
// deleted, or when it was recovered, closed. It may be called once.
func (d *Device) Start(ctx context.Context, r *reactor.Reactor, h Handler) error {
	if d.reactor != nil {
		return errors.New("ublk: device started twice")
	}
	d.reactor, d.handler = r, h
	var err error
	cerr := r.Call(func() {
		d.ring = r.Ring()
		err = d.offer()
	})
	go d.watch()
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("ublk: offer requests: %w", err)
	}
	if err := d.startDev(ctx); err != nil {
		return err
	}
	return awaitNode(ctx, d.Path(), unix.S_IFBLK)
}

// offer hands all tags to the kernel.
func (d *Device) offer() error {
	for _, c := range d.carriers {
		if err := c.offer(); err != nil {
			if d.out == 0 {
				close(d.drained)
			}
			return err
		}
		d.out++
	}
	if err := d.ring.Submit(); err != nil {
		return err
	}
	return d.mapDescriptors()
}

// startDev sends START_DEV or END_USER_RECOVERY. The kernel answers it when it
// has all tags, which is never if it has refused one.
func (d *Device) startDev(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-d.failed:
			cancel(d.tagErr)
		case <-d.done:
			cancel(errors.Join(errors.New("ublk: the reactor ended"), d.err))
		case <-ctx.Done():
		}
	}()
	cmd := cmdStartDev
	if d.recovery {
		cmd = cmdEndUserRecovery
	}
	_, err := d.c.do(ctx, cmd, ctrlCmd{DevID: uint32(d.info.ID), QueueID: noQueue, Data: uint64(os.Getpid())}, nil)
	return err
}

// ended says that a carrier's tags will not be used by the kernel any more, for the reason
// res. It runs on the reactor.
func (d *Device) ended(res int32) {
	if res != resAbort {
		d.fault(fmt.Errorf("ublk: device %d: request slot refused: %w", d.info.ID, unix.Errno(-res)))
	}
	if d.out--; d.out == 0 {
		close(d.drained)
	}
}

// fault takes note of what should not happen. It runs on the reactor.
func (d *Device) fault(err error) {
	if d.tagErr == nil {
		d.tagErr = err
		close(d.failed)
	}
}

// watch waits for the queues' end and closes the character device and its
// mappings, so that the kernel can let go of the device. A reactor must not do
// that itself: the close can wait for what the reactor has yet to do.
func (d *Device) watch() {
	select {
	case <-d.drained:
		d.err = d.tagErr
	case <-d.reactor.Done():
		select {
		case <-d.drained:
			d.err = d.tagErr
		default:
			if d.err = d.reactor.Err(); d.err == nil {
				d.err = reactor.ErrStopped
			}
		}
	}
	if err := d.closeChar(); err != nil && d.err == nil {
		d.err = err
	}
	close(d.done)
}

func (d *Device) closeChar() error {
	if d.char < 0 {
		return nil
	}
	err := unix.Close(d.char)
	d.char = -1
	// A mapping holds the file open as much as a descriptor does.
	for _, desc := range d.desc {
		err = errors.Join(err, unix.Munmap(desc))
	}
	d.desc = nil
	if err != nil {
		return fmt.Errorf("ublk: close %s: %w", charPath(d.info.ID), err)
	}
	return nil
}

// Done returns a channel that is closed when the device is not served any more:
// it was stopped, or its reactor ended. It is never closed before Start.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why the device is not served any more, nil when it was stopped.
// It is valid after Done.
func (d *Device) Err() error { return d.err }

// Resize changes the device's size, in bytes. It needs FeatureUpdateSize.
func (d *Device) Resize(ctx context.Context, size uint64) error {
	if !d.c.features.Has(FeatureUpdateSize) {
		return fmt.Errorf("ublk: this kernel cannot change a device's size: %w", unix.EOPNOTSUPP)
	}
	if size == 0 || size%uint64(d.params.LogicalBlock) != 0 {
		return fmt.Errorf("ublk: size of %d bytes is not a multiple of the block size %d", size, d.params.LogicalBlock)
	}
	old := d.sectors.Load()
	d.sectors.Store(max(old, size/sectorSize))
	_, err := d.c.do(ctx, cmdUpdateSize, ctrlCmd{DevID: uint32(d.info.ID), QueueID: noQueue, Data: size / sectorSize}, nil)
	if err != nil {
		d.sectors.Store(old)
		return err
	}
	d.sectors.Store(size / sectorSize)
	return nil
}

// Stop takes the block device away and waits until all its requests have ended.
// Unless force is set, a device in use is left alone and the error is a
// *BusyError. The reactor must go on serving meanwhile; ctx bounds the wait.
func (d *Device) Stop(ctx context.Context, force bool) error {
	if err := d.c.Stop(ctx, d.info.ID, force); err != nil {
		return err
	}
	if d.reactor == nil {
		return nil
	}
	select {
	case <-d.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("ublk: device %d has requests that do not end: %w", d.info.ID, context.Cause(ctx))
	}
}

// Delete stops the device if it is not stopped (by force, if force is set),
// frees it and its memory, and waits until its number is free. A *BusyError says
// who keeps it from that.
func (d *Device) Delete(ctx context.Context, force bool) error {
	if err := d.Stop(ctx, force); err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	return d.c.Delete(ctx, d.info.ID)
}

// Close lets go of the device without deleting it, and frees its buffers: no
// one may use any IO.Buf any more. It fails when the device is being served.
// After a reactor's panic the owner calls it once whatever that reactor had
// given the buffers to is done with them.
func (d *Device) Close() error {
	if d.reactor != nil {
		select {
		case <-d.done:
		default:
			return fmt.Errorf("ublk: device %d is being served", d.info.ID)
		}
	}
	err := d.closeChar()
	d.tags, d.carriers = nil, nil
	if d.batchMem != nil {
		err = errors.Join(err, d.batchMem.Close())
	}
	return errors.Join(err, d.mem.Close())
}
