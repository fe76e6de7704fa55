package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/durable"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// DefaultLogSize is that of a write log, in bytes.
const DefaultLogSize = 1 << 30

// Other defaults of an attachment.
const (
	defaultQueues   = 1
	defaultDepth    = 128
	defaultNullSize = 1 << 30
	maxLogMemory    = 4 << 30
	maxDepth        = 4096
	maxQueues       = 128
	nullURL         = "null"
)

// lookTimeout bounds the first look at an image: a store that does not answer is
// told to the user soon.
const lookTimeout = 30 * time.Second

var (
	errEnding  = errors.New("the daemon is ending: try again in a moment")
	errNoImage = errors.New("no such image")
	// errAttached says that an image is attached on this host.
	errAttached = errors.New("is attached here already")
)

// attach makes a block device for a user who waits for it. When it fails,
// everything is as before. It ends with the daemon: a device that the kernel is
// starting when its server dies stays in the kernel's way until the host is rebooted.
func (d *Daemon) attach(ctx context.Context, q api.AttachRequest, progress func(api.Progress)) (im api.Image, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(d.serving, func() { cancel(errEnding) })()
	defer func() {
		if err != nil && context.Cause(ctx) == errEnding {
			err = errEnding
		}
		cancel(nil)
	}()
	rec, err := d.plan(ctx, q)
	if err != nil {
		return api.Image{}, err
	}
	k, first, err := d.maker(q.Library)
	if err != nil {
		return api.Image{}, err
	}
	var door *attachment
	if !q.Library {
		if door, err = d.makeRoom(ctx, &rec); err != nil {
			return api.Image{}, err
		}
	}
	if door != nil {
		defer func() { <-door.op }()
	}
	for next := max(q.ID, first); ; {
		a, err := d.reserve(ctx, k, rec, next, q.ID >= 0, door)
		if err != nil {
			return api.Image{}, err
		}
		err = a.attach(ctx, door, q.Force, progress)
		if err == nil {
			return a.describe(ctx), nil
		}
		if q.ID >= 0 || !errors.Is(err, unix.EEXIST) {
			return api.Image{}, err
		}
		next = a.id + 1 // another program was faster
	}
}

// maker returns what makes the device of an attachment, and the lowest number that it has.
func (d *Daemon) maker(library bool) (k kernel, first int, err error) {
	if library {
		return d.doors, firstDoor, nil
	}
	k, err = d.kernel()
	return k, 0, err
}

// plan makes a record of a request, without a device number yet, and looks at
// everything that can be looked at before anything is changed.
func (d *Daemon) plan(ctx context.Context, q api.AttachRequest) (record, error) {
	rec := record{
		Phase: phaseAttaching, Boot: d.env.boot, PID: os.Getpid(), Added: time.Now().UTC().Truncate(time.Second),
		LogSize: q.LogSize, LogMemory: q.LogMemory, Queues: q.Queues, Depth: q.Depth,
		ReadOnly: q.ReadOnly, Shared: q.Shared, Null: q.Null, Lease: q.Lease,
		BatchAge: q.BatchAge, CheckpointEvery: q.CheckpointEvery, SpaceRatio: q.SpaceRatio, StoreTimeout: q.StoreTimeout,
	}
	setDefault(&rec.LogSize, DefaultLogSize)
	setDefault(&rec.Queues, defaultQueues)
	setDefault(&rec.Depth, defaultDepth)
	if err := checkPlan(rec, q); err != nil {
		return record{}, err
	}
	if q.Null {
		rec.URL, rec.Size, rec.BlockSize = nullURL, q.Size, 512
		setDefault(&rec.Size, defaultNullSize)
		if rec.Size%uint64(rec.BlockSize) != 0 {
			return record{}, fmt.Errorf("size %d is not a multiple of %d", rec.Size, rec.BlockSize)
		}
		return rec, nil
	}
	return rec, d.planImage(ctx, &rec, q)
}

func setDefault[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

func checkPlan(rec record, q api.AttachRequest) error {
	switch {
	case q.ID < -1 || q.ID > ublk.MaxID:
		return fmt.Errorf("device number %d: it must be from 0 to %d, or -1 for any", q.ID, ublk.MaxID)
	case rec.Queues < 1 || rec.Queues > maxQueues:
		return fmt.Errorf("%d queues: there can be 1 to %d", rec.Queues, maxQueues)
	case rec.Depth < 1 || rec.Depth > maxDepth:
		return fmt.Errorf("queue depth %d: it must be from 1 to %d", rec.Depth, maxDepth)
	case writelog.CheckSize(rec.LogSize) != nil:
		return writelog.CheckSize(rec.LogSize)
	case rec.LogMemory != 0 && (rec.LogMemory < leastLogMemory || rec.LogMemory > maxLogMemory || rec.LogMemory%writelog.SegmentSize != 0):
		return fmt.Errorf("%d bytes of memory for the write log: it must be from %d to %d, a multiple of %d", rec.LogMemory, leastLogMemory, int64(maxLogMemory), writelog.SegmentSize)
	case rec.Lease != 0 && (rec.Lease < engine.MinLease || rec.Lease > engine.MaxLease):
		return fmt.Errorf("lease %v: it must be from %v to %v", rec.Lease, engine.MinLease, engine.MaxLease)
	case rec.SpaceRatio != 0 && !(rec.SpaceRatio >= engine.MinSpaceRatio && rec.SpaceRatio <= engine.MaxSpaceRatio):
		return fmt.Errorf("space ratio %v: it must be from %v to %v", rec.SpaceRatio, engine.MinSpaceRatio, engine.MaxSpaceRatio)
	case rec.CheckpointEvery < 0:
		return fmt.Errorf("%d data objects between checkpoints: it must be 1 or more", rec.CheckpointEvery)
	case q.Library && (q.Null || q.ID >= 0):
		return errors.New("what is attached for library clients has no device: neither a number nor a null one")
	case q.Shared && (q.Null || q.ReadOnly || q.Library):
		return errors.New("what can be shared is the device of an image that can be written to: neither a null one nor a read-only one")
	case !q.Null && q.Size != 0:
		return errors.New("a size can be given for a null device only: an image has its own")
	}
	return nil
}

// planImage completes a record with what the store says of the image, or of its
// snapshot.
func (d *Daemon) planImage(ctx context.Context, rec *record, q api.AttachRequest) error {
	u, name, snap, err := backend.ParseSource(q.Image)
	if err != nil {
		return err
	}
	rec.URL = u.Image(name)
	if snap != "" {
		rec.URL = u.Snapshot(name, snap)
	}
	if snap != "" && !rec.ReadOnly {
		return fmt.Errorf("%s: a snapshot can be attached with --read-only alone", rec.URL)
	}
	info, err := d.describeImage(ctx, u, name)
	if err != nil {
		return err
	}
	rec.ImageID, rec.Size, rec.BlockSize = info.ID, info.Size, info.BlockSize
	if snap != "" {
		if err := rec.planSnapshot(info, snap); err != nil {
			return fmt.Errorf("%s: %w: see lsdctl snap ls %s", rec.URL, err, u.Image(name))
		}
	}
	if rec.Size == 0 && !q.Library {
		return fmt.Errorf("%s: %w: a block device has one block at least", rec.URL, engine.ErrEmpty)
	}
	if rec.ReadOnly {
		return nil
	}
	if err := d.planLog(rec, q.Cache); err != nil {
		return err
	}
	if info.Owner != nil && !info.Owner.Command && !q.Force && !exists(rec.Log) && d.twin(rec, nil) == nil {
		return &engine.OwnedError{Image: rec.URL, Host: info.Owner.Host, Since: info.Owner.Since, Lease: info.Owner.Lease}
	}
	return nil
}

// describeImage returns what the store u says of the image of that name.
func (d *Daemon) describeImage(ctx context.Context, u backend.URL, name string) (engine.Info, error) {
	url := u.Image(name)
	ctx, stop := context.WithTimeout(ctx, lookTimeout)
	defer stop()
	st, err := d.openSt(ctx, u)
	if errors.Is(err, backend.ErrNotFound) {
		return engine.Info{}, fmt.Errorf("%s: %w: there is no store at %s", url, errNoImage, u)
	}
	if err != nil {
		return engine.Info{}, err
	}
	defer st.Close()
	info, err := engine.Describe(ctx, st, name)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return info, fmt.Errorf("%s: %w: see lsdctl ls %s, or make it with lsdctl create", url, errNoImage, u)
	case err == nil && info.Removed:
		return info, fmt.Errorf("%s: %w, but for its name: lsdctl rm it again", url, engine.ErrRemoved)
	case err != nil:
		return info, fmt.Errorf("%s: %w", url, err)
	}
	return info, nil
}

// planSnapshot completes a record with what the store says of a snapshot of its image.
func (r *record) planSnapshot(info engine.Info, name string) error {
	i := slices.IndexFunc(info.Snapshots, func(s engine.Snapshot) bool { return s.Name == name })
	switch {
	case i < 0:
		return engine.ErrNoSnapshot
	case info.Snapshots[i].Pending:
		return errors.New("it has been asked for, and the image's owner has not made it yet")
	}
	r.Snapshot, r.Size = info.Snapshots[i].ID, info.Snapshots[i].Size
	return nil
}

// planLog finds the place of the write log: in a directory, or all of a block
// device.
func (d *Daemon) planLog(rec *record, cache string) error {
	if cache == "" {
		cache = filepath.Join(d.cfg.StateDir, "cache")
		if err := durable.MkdirAll(cache, 0o700); err != nil {
			return fmt.Errorf("make the cache directory: %w", err)
		}
	}
	if !filepath.IsAbs(cache) {
		return fmt.Errorf("cache %s: it must be an absolute path", cache)
	}
	cache = filepath.Clean(cache)
	st, err := os.Stat(cache)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cache directory %s is not there: make it, on a local SSD", cache)
	case err != nil:
		return fmt.Errorf("cache directory: %w", err)
	case st.IsDir():
		rec.Log = filepath.Join(cache, rec.ImageID.String()+".log")
	case st.Mode()&fs.ModeDevice != 0 && st.Mode()&fs.ModeCharDevice == 0:
		rec.Log, rec.LogDevice = cache, true
		if a := d.twin(rec, nil); a != nil && a.record().Log == rec.Log {
			return nil // reserve says whose it is
		}
		return checkLogDevice(cache)
	default:
		return fmt.Errorf("cache %s is neither a directory nor a block device", cache)
	}
	return nil
}

// checkLogDevice makes sure that nothing but a write log is overwritten: the
// block device holds one, or zeroes where file systems, partition tables and the
// like have their marks.
func checkLogDevice(path string) error {
	// With O_EXCL the kernel refuses a device that is mounted or part of another.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("cache %s is in use: it is mounted, or part of another device", path)
	}
	if err != nil {
		return fmt.Errorf("cache device: %w", err)
	}
	defer f.Close()
	head := make([]byte, writelog.DataOffset)
	if _, err := io.ReadFull(f, head); err != nil {
		return fmt.Errorf("cache device %s: %w", path, err)
	}
	if _, _, err := writelog.ReadHeader(deviceFile{f, head}); err == nil {
		return nil
	}
	for _, c := range head {
		if c != 0 {
			return fmt.Errorf("cache device %s holds something that is not a write log: if it is not needed, blkdiscard -z -l 1M %s", path, path)
		}
	}
	return nil
}

// deviceFile is a block device of which only the beginning is looked at.
type deviceFile struct {
	*os.File
	head []byte
}

// ReadAt implements writelog.File.
func (d deviceFile) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d.head).ReadAt(p, off)
}

// Size implements writelog.File: a header that says more is checked when the log
// is opened.
func (deviceFile) Size() int64 { return writelog.MaxSize }

// Buffer implements writelog.File.
func (deviceFile) Buffer(n int) []byte { return make([]byte, n) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// twin returns another attachment that cannot be beside one of rec, but for door.
func (d *Daemon) twin(rec *record, door *attachment) *attachment {
	if rec.Null {
		return nil
	}
	for _, a := range d.all() {
		if r := a.record(); a != door && r.clash(rec) {
			return a
		}
	}
	return nil
}

// inTheWay says why an attachment of rec cannot be beside a.
func (a *attachment) inTheWay(rec *record) error {
	if r := a.record(); r.ImageID != rec.ImageID {
		return fmt.Errorf("%s is the write log of %s, attached as %s", rec.Log, r.URL, a.name())
	}
	return fmt.Errorf("%s %w, as %s", rec.URL, errAttached, a.name())
}

// reserve finds a free device number, from the given one on or exactly that, and
// makes the attachment known under it. It is going to take the place of door, if that is not nil.
func (d *Daemon) reserve(ctx context.Context, k kernel, rec record, from int, exactly bool, door *attachment) (*attachment, error) {
	if a := d.twin(&rec, door); a != nil {
		return nil, a.inTheWay(&rec)
	}
	for id := from; ; id++ {
		_, err := k.Info(ctx, id)
		switch {
		case errors.Is(err, ublk.ErrNoDevice):
		case err != nil:
			return nil, err
		case exactly:
			return nil, fmt.Errorf("%s is there already", deviceName(id))
		default:
			continue
		}
		rec.ID = id
		a := newAttachment(d, rec, api.StateAttaching)
		if ok, err := d.enter(a, door); err != nil {
			return nil, err
		} else if ok {
			return a, nil
		}
		if exactly {
			return nil, fmt.Errorf("%s is in the records already: see %s", deviceName(id), d.records.path(id))
		}
	}
}

// enter makes a known, with its op taken, unless its number is taken. It is going to take the place
// of door, if that is not nil.
func (d *Daemon) enter(a, door *attachment) (bool, error) {
	a.op <- struct{}{}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.serving.Err() != nil {
		return false, errEnding
	}
	if d.attached[a.id] != nil || exists(d.records.path(a.id)) { // the latter: one that could not be read
		return false, nil
	}
	for _, b := range d.attached { // two requests for one image at once
		r := b.record()
		doors := a.id >= firstDoor && b.id >= firstDoor && r.ImageID == a.rec.ImageID && r.Snapshot == a.rec.Snapshot
		if b != door && (doors || r.clash(&a.rec)) {
			return false, b.inTheWay(&a.rec)
		}
	}
	d.attached[a.id] = a
	return true, nil
}

// attach brings a new attachment up. The caller has entered it; when it fails,
// nothing of it is left. It takes the place of door, if that is not nil, of which the caller
// holds op.
func (a *attachment) attach(ctx context.Context, door *attachment, force bool, progress func(api.Progress)) (err error) {
	defer func() {
		if err != nil {
			a.d.forget(a) // before anybody else is at it
		}
		<-a.op
	}()
	rec := a.record()
	if door != nil && !door.record().ReadOnly {
		return a.takeOver(ctx, door)
	}
	if door != nil {
		undo, ierr := door.intend(&rec)
		if ierr != nil {
			return ierr
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, undo())
			}
		}()
	}
	if err := a.d.records.save(rec); err != nil {
		return err
	}
	made := false
	defer func() {
		if err == nil {
			return
		}
		if made {
			err = errors.Join(err, a.d.removeIfIdle(rec))
		}
		err = errors.Join(err, a.d.records.remove(rec.ID))
	}()
	if made, err = makeLog(ctx, rec, progress); err != nil {
		return err
	}
	if err := a.bringUp(ctx, bringUpOptions{fresh: true, force: force, progress: progress}); err != nil {
		return explainLocked(rec, err)
	}
	if door != nil {
		door.moveTo(a)
	}
	a.startKeeper()
	a.logger.Info("attached", "log", rec.Log)
	return nil
}

// explainLocked says who has the log of a record where that is why it could not be attached.
func explainLocked(rec record, err error) error {
	if errors.Is(err, writelog.ErrLocked) {
		err = fmt.Errorf("%s is attached by another lsdd of this host: %w", rec.URL, err)
	}
	return err
}

// makeLog makes the write log's file if there is none, and reports whether it
// did.
func makeLog(ctx context.Context, rec record, progress func(api.Progress)) (bool, error) {
	if rec.Log == "" || rec.LogDevice || exists(rec.Log) {
		return false, nil
	}
	err := writelog.MakeFile(ctx, rec.Log, rec.LogSize, func(n int64) {
		progress(api.Progress{What: "making the write log " + rec.Log, Done: uint64(n), Total: uint64(rec.LogSize)})
	})
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("%w: give it a smaller --log-size, or another --cache", err)
	}
	return err == nil, err
}

// removeIfIdle removes a log that was made for an attachment that has failed,
// unless the image has come to depend on it: then the next attach goes on from it.
func (d *Daemon) removeIfIdle(rec record) error {
	ctx, stop := context.WithTimeout(context.Background(), 5*time.Second)
	defer stop()
	f, err := writelog.OpenFile(ctx, rec.Log)
	if err != nil {
		return nil // somebody uses it
	}
	defer f.Close()
	blank, err := writelog.Blank(f)
	if err != nil {
		return err
	}
	if !blank && d.needsLog(ctx, rec, f) {
		return nil
	}
	return writelog.RemoveFile(rec.Log)
}

// needsLog reports whether the log holds something, or is that of the image's
// owner, or may be.
func (d *Daemon) needsLog(ctx context.Context, rec record, f *writelog.OSFile) bool {
	h, _, err := writelog.ReadHeader(f)
	if err != nil {
		return true
	}
	if last, err := writelog.LastSeq(ctx, f); err != nil || last > 0 {
		return true
	}
	u, _, _, err := backend.ParseSource(rec.URL)
	if err != nil {
		return true
	}
	st, err := d.openSt(ctx, u)
	if err != nil {
		return true
	}
	defer st.Close()
	info, err := engine.DescribeID(ctx, st, rec.ImageID) // the name may be another image's by now
	return err != nil || info.Owner != nil && info.Owner.Log == h.Log
}
