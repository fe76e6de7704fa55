// Package daemon is lsdd: it holds the attached images of a host, each with a
// reactor of its own, and takes them up again after any death of itself.
//
// What is attached is written down (record) before anything of it exists, so
// that a daemon that starts finds it: a block device that waits for its server is
// recovered with its users still holding it, one that is gone with the boot is
// made again under the same number.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/durable"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// Config says how a daemon works.
type Config struct {
	Socket string
	// LibrarySocket is where library clients are served. Default: none are.
	LibrarySocket string
	// LibraryGroup may connect to it, and do everything where there is no policy: a name or a
	// number. Default: DefaultLibraryGroup, if there is such a group.
	LibraryGroup string
	// LibraryPolicy is the file that says who may do what there. Default: DefaultLibraryPolicy, if
	// that is there.
	LibraryPolicy string
	// LibraryLogSize is the size in bytes of the write log of an image that library clients open.
	// Default: DefaultLogSize.
	LibraryLogSize int64
	StateDir       string
	Host           string // named to others who want an image
	Version        string
	// ReadCache is the file of the read cache. Default: read-cache in the state
	// directory's cache.
	ReadCache string
	// ReadCacheSize is its size in bytes; 0 means that there is none.
	ReadCacheSize int64
	// ReadCacheMemory bounds the memory for what of it is read most, in bytes. Default
	// DefaultReadCacheMemory; negative: none.
	ReadCacheMemory int64
	// Forgo are features of the kernel's ublk driver that devices made from now on do without.
	Forgo ublk.Features
	// DetachOnExit removes the devices when the daemon is told to end; else they
	// wait for the next one.
	DetachOnExit bool
	// ExitTimeout bounds what is destaged before the end. Default 20 s.
	ExitTimeout time.Duration
	// LogMemory bounds the memory that all write logs have together, in bytes.
	// Default DefaultLogMemory.
	LogMemory int64
	// BurstMemory bounds the memory that is lent to write logs beyond that, while they are written to
	// faster than the store takes it, in bytes. Default DefaultBurstMemory; negative: none.
	BurstMemory int64
	// MapMemory is what the maps of all images may take together, in bytes.
	// Default engine.DefaultMapMemory.
	MapMemory int64
	// DestageMemory is what the data objects of all images that are built and put may
	// take together, in bytes. Default engine.DefaultDestageMemory.
	DestageMemory int64
	// ReadMemory is what reads of all images that the store has to answer may take
	// together, in bytes. Default engine.DefaultReadMemory.
	ReadMemory int64
	// ScrubRate bounds what is read back of all images to verify it, in bytes a
	// second; 0 means that nothing is.
	ScrubRate int64
	Logger    *slog.Logger
	// Ready is called once the socket answers; it may be nil.
	Ready func()
}

// A Daemon is one lsdd.
type Daemon struct {
	cfg      Config
	logger   *slog.Logger
	records  records
	reclaim  *reclaimer
	env      hostEnv
	shared   *shared
	openSt   func(context.Context, backend.URL) (backend.Store, error)
	createSt func(context.Context, backend.URL) (backend.Store, error) // openSt of one that is not there yet
	started  time.Time
	lock     *os.File
	ctx      context.Context // ends with the daemon's service
	cancel   context.CancelFunc

	readCache *readCache
	doors     *doors
	guard     *guard
	living    livingHandles

	openKernel func() (kernel, error)
	kernelMu   sync.Mutex
	kern       kernel // guarded by kernelMu; nil until it is needed

	serving context.Context // ends, under mu, when the daemon is told to end: nothing new is attached
	end     context.CancelFunc

	mu       sync.Mutex
	attached map[int]*attachment // guarded by mu; by device number

	exit     chan exitRequest
	recRetry time.Duration // first pause between attempts to take an image up
}

// hostEnv is what does not change while the host runs.
type hostEnv struct {
	boot uuid.UUID
}

// exitRequest asks Run to end.
type exitRequest struct {
	detach   bool
	timeout  time.Duration
	progress func(api.Progress)
	done     chan []string // gets the remarks when the devices are seen to
}

// New makes a daemon and takes the lock of its state directory. It fails with an
// error that matches ErrRefused when it makes no sense to try again.
func New(cfg Config) (*Daemon, error) {
	d, err := newDaemon(cfg)
	if err != nil {
		return nil, err
	}
	d.openKernel = d.openDriver
	return d, nil
}

// newDaemon is New without the kernel.
func newDaemon(cfg Config) (*Daemon, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.ReadCache == "" {
		cfg.ReadCache = filepath.Join(cfg.StateDir, "cache", "read-cache")
	}
	if cfg.ExitTimeout == 0 {
		cfg.ExitTimeout = 20 * time.Second
	}
	if cfg.LogMemory == 0 {
		cfg.LogMemory = DefaultLogMemory
	}
	if cfg.BurstMemory == 0 {
		cfg.BurstMemory = DefaultBurstMemory()
	}
	if cfg.ReadCacheMemory == 0 {
		cfg.ReadCacheMemory = DefaultReadCacheMemory()
	}
	d := &Daemon{
		shared:   newShared(cfg),
		cfg:      cfg,
		logger:   cfg.Logger,
		records:  records{filepath.Join(cfg.StateDir, "attachments")},
		started:  time.Now(),
		attached: make(map[int]*attachment),
		exit:     make(chan exitRequest),
		recRetry: 200 * time.Millisecond,
	}
	stores := new(open.Opener)
	d.openSt, d.createSt = stores.Store, stores.CreateStore
	d.doors = newDoors(d.clientsOf)
	var err error
	if d.guard, err = newGuard(cfg, cfg.Logger); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if err := durable.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: make the state directory: %w", ErrRefused, err)
	}
	if d.env.boot, err = bootID(); err != nil {
		return nil, err
	}
	if d.lock, err = lockStateDir(cfg.StateDir, cfg.Socket); err != nil {
		return nil, err
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.serving, d.end = context.WithCancel(d.ctx)
	d.reclaim = newReclaimer(d.serving, filepath.Join(cfg.StateDir, "reclaims"), d.logger, func(ctx context.Context, u backend.URL) (backend.Store, error) { return d.openSt(ctx, u) })
	d.readCache = openReadCache(cfg.ReadCache, cfg.ReadCacheSize, cfg.ReadCacheMemory, d.logger)
	return d, nil
}

// ErrRefused is matched when a daemon cannot start, and could not a moment later.
var ErrRefused = errors.New("cannot start")

func bootID() (uuid.UUID, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return uuid.Nil, fmt.Errorf("identity of this boot: %w", err)
	}
	return uuid.Parse(strings.TrimSpace(string(b)))
}

// lockStateDir makes sure that a state directory has one daemon. A daemon that
// is being replaced may take a moment to end.
func lockStateDir(dir, socket string) (*os.File, error) {
	path := filepath.Join(dir, "lsdd.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: lock the state directory: %w", ErrRefused, err)
	}
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline) {
			continue
		}
		who, _ := os.ReadFile(path)
		f.Close()
		return nil, fmt.Errorf("%w: another lsdd (%s) uses the state directory %s", ErrRefused, strings.TrimSpace(string(who)), dir)
	}
	// For whoever comes second; the lock itself is what counts.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendf(nil, "process %d, socket %s\n", os.Getpid(), socket), 0)
	}
	return f, nil
}

func (d *Daemon) openDriver() (kernel, error) {
	c, err := OpenDriver()
	if err != nil {
		return nil, err
	}
	c.Forgo(d.cfg.Forgo)
	return driver{c}, nil
}

// OpenDriver opens the kernel's ublk driver and loads it if need be.
func OpenDriver() (*ublk.Control, error) {
	c, err := ublk.OpenControl()
	if errors.Is(err, ublk.ErrNoDriver) {
		// Its own failure says nothing that the second attempt does not.
		_ = exec.Command("modprobe", "ublk_drv").Run()
		c, err = ublk.OpenControl()
	}
	return c, err
}

// kernel returns the kernel's driver, opening it when it is first needed.
func (d *Daemon) kernel() (kernel, error) {
	d.kernelMu.Lock()
	defer d.kernelMu.Unlock()
	if d.kern != nil {
		return d.kern, nil
	}
	k, err := d.openKernel()
	if err != nil {
		return nil, err
	}
	d.kern = k
	return k, nil
}

// Run serves until it is told to end, by ctx or by a client. Then it sees to the
// devices and returns.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.cancel()
	ln, err := listen(d.cfg.Socket)
	if err != nil {
		return err
	}
	srv := d.server()
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	if err := d.takeUp(); err != nil {
		return err
	}
	if d.cfg.LibrarySocket != "" { // now that it is known what clients may come back to
		lib, err := d.guard.listen()
		if err != nil {
			return err
		}
		defer lib.Close()
		go d.serveLibrary(lib)
	}
	go d.watch()
	if d.cfg.Ready != nil {
		d.cfg.Ready()
	}
	d.logger.Info("lsdd serves", "socket", d.cfg.Socket, "state", d.cfg.StateDir, "host", d.cfg.Host, "version", d.cfg.Version)
	select {
	case err = <-failed:
		err = fmt.Errorf("the socket failed: %w", err)
		d.leave(exitRequest{timeout: d.cfg.ExitTimeout, progress: func(api.Progress) {}})
	case <-ctx.Done():
		d.leave(exitRequest{detach: d.cfg.DetachOnExit, timeout: d.cfg.ExitTimeout, progress: func(api.Progress) {}})
	case q := <-d.exit:
		q.done <- d.leave(q)
		shut, stop := context.WithTimeout(context.Background(), time.Second)
		_ = srv.Shutdown(shut) // gives the answer time to get out
		stop()
	}
	srv.Close()
	return err
}

// listen makes a socket for root alone.
func listen(path string) (*net.UnixListener, error) { return listenFor(path, 0o600, -1) }

// listenFor makes a socket with that mode and group, -1 for the daemon's own. What a dead daemon
// left there is removed: the state directory's lock says that it is dead, unless the socket is
// another's.
func listenFor(path string, mode os.FileMode, group int) (*net.UnixListener, error) {
	if err := makeSocketDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("%w: make the socket's directory: %w", ErrRefused, err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("%w: another lsdd listens on %s: choose another --socket", ErrRefused, path)
	}
	if err := removeSocket(path); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	// Made under a name that nobody knows until its mode is right.
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	_ = os.Remove(tmp)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	ln.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Chown(tmp, -1, group), os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		ln.Close()
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return ln, nil
}

// makeSocketDir makes the directory of a socket, which everybody may pass through, whatever the
// umask says: the sockets have modes of their own.
func makeSocketDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil // it is somebody's
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// removeSocket removes the socket at path, if there is one. Anything else there stays.
func removeSocket(path string) error {
	st, err := os.Lstat(path)
	if err == nil && st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is there and is not a socket: choose another --socket", path)
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the old socket: %w", err)
	}
	return nil
}

// takeUp takes up what is recorded, in the background.
func (d *Daemon) takeUp() error {
	go d.readCache.load(d.ctx)
	recs, err := d.records.load(func(path string, err error) {
		d.logger.Error("this record of an attachment cannot be read, and is left as it is", "path", path, "err", err)
	})
	if err != nil {
		return err
	}
	recs = d.sortOut(recs)
	d.mu.Lock()
	for _, r := range recs {
		d.attached[r.ID] = newAttachment(d, r, api.StateRecovering)
		if r.ID >= firstDoor && r.Phase == phaseAttached && r.Boot == d.env.boot {
			d.doors.leftBehind(deviceParams(r))
		}
	}
	d.mu.Unlock()
	for _, a := range d.all() {
		a.logger.Info("taking up what was attached", "phase", a.rec.Phase)
		a.startKeeper()
	}
	d.reportStrangers()
	return d.reclaim.takeUp()
}

// reportStrangers logs the ublk devices that wait for a server and are not in
// the records: they may be another program's.
func (d *Daemon) reportStrangers() {
	if !exists("/dev/ublk-control") {
		return // no driver, no devices; it is loaded when it is needed
	}
	k, err := d.kernel()
	if err != nil {
		return
	}
	list, err := k.List(d.ctx)
	if err != nil {
		d.logger.Warn("cannot list the ublk devices", "err", err)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range list {
		if d.attached[i.ID] == nil && i.State == ublk.StateQuiesced {
			d.logger.Warn("a ublk device that is not in the records waits for its server: left alone", "device", i.Path(), "server", i.ServerPID)
		}
	}
}

// all returns the attachments in the order of their device numbers.
func (d *Daemon) all() []*attachment {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*attachment, 0, len(d.attached))
	for _, a := range d.attached {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b *attachment) int { return a.id - b.id })
	return list
}

// find returns the attachment of a device, nil if there is none.
func (d *Daemon) find(id int) *attachment {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.attached[id]
}

// forget drops an attachment that is over.
func (d *Daemon) forget(a *attachment) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attached[a.id] == a {
		delete(d.attached, a.id)
	}
	a.closeHandles()
}

// leave ends the service: all images destage as far as time allows, then the
// devices are removed, or left for the next daemon. It returns what the asker
// should know.
func (d *Daemon) leave(q exitRequest) []string {
	d.mu.Lock()
	d.end()
	d.mu.Unlock()
	d.logger.Info("lsdd ends", "detach", q.detach)
	ctx, stop := context.WithTimeout(context.Background(), q.timeout)
	defer stop()
	var mu sync.Mutex
	var remarks []string
	progress := func(p api.Progress) {
		mu.Lock()
		defer mu.Unlock()
		q.progress(p)
	}
	var all sync.WaitGroup
	for _, a := range d.all() {
		all.Go(func() {
			for _, r := range a.leave(ctx, q, progress) {
				mu.Lock()
				remarks = append(remarks, r)
				mu.Unlock()
			}
		})
	}
	all.Wait()
	d.cancel()
	d.reclaim.wait(reclaimEnd)
	// Its file is closed by the end of the process, which may still read it.
	d.readCache.Close()
	return remarks
}

// server returns the HTTP server of the socket.
func (d *Daemon) server() *http.Server {
	return &http.Server{
		Handler:           d.handler(),
		ConnContext:       withPeer,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(d.logger.Handler(), slog.LevelWarn),
	}
}
