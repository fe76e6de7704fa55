// Lsdd is the daemon that serves the images attached to a host as block devices.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/lsd-ceph/lsd/ublk"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() { os.Exit(run()) }

// options are the flags.
type options struct {
	cfg           daemon.Config
	logMemory     bytesize.Size
	mapMemory     bytesize.Size
	destageMemory bytesize.Size
	readMemory    bytesize.Size
	scrubRate     bytesize.Size
	burstMemory   bytesize.Size
	readCache     bytesize.Size
	cacheMemory   bytesize.Size
	libraryLog    bytesize.Size
	envErr        error // of what the environment says
	supervise     bool
	logFile       string
	logJSON       bool
	verbose       bool
	onTerm        string
	ublkWithout   string
}

func run() int {
	var o options
	status := 0
	cmd := &cobra.Command{
		Use:   "lsdd",
		Short: "Serve lsd images as block devices",
		Long: `lsdd serves the images that lsdctl attaches to this host. It writes down what
is attached: whatever ends it, the next lsdd takes everything up again, and the
users of the block devices see a pause.

systemd runs it as lsd.service; without systemd, lsdctl add starts it with
--supervise.`,
		Example: `  lsdd                        # in the foreground
  lsdd --supervise            # started again whenever it dies
  lsdd --socket /run/b.sock --state-dir /var/lib/b --host-name b   # a second one`,
		Version:       version(),
		Args:          cmdline.Args(0),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			status, err = o.run(cmd.Context())
			return err
		},
	}
	cmd.SetFlagErrorFunc(cmdline.FlagError)
	host, _ := os.Hostname()
	f := cmd.Flags()
	f.StringVar(&o.cfg.Socket, "socket", env(api.EnvSocket, api.DefaultSocket), "listen on this unix socket ($"+api.EnvSocket+")")
	f.StringVar(&o.cfg.LibrarySocket, "librbd-socket", os.Getenv(api.EnvLibrarySocket), "serve librbd's clients on this unix socket ($"+api.EnvLibrarySocket+"; default: "+api.DefaultLibrarySocket+", or beside --socket)")
	f.StringVar(&o.cfg.LibraryGroup, "librbd-group", "", "let this group use that socket; without a policy its members may do everything (default: "+daemon.DefaultLibraryGroup+", if there is such a group)")
	f.StringVar(&o.cfg.LibraryPolicy, "librbd-policy", "", "file that says which users and groups may do what there (default: "+daemon.DefaultLibraryPolicy+", if it is there)")
	o.libraryLog = daemon.DefaultLogSize
	f.Var(&o.libraryLog, "librbd-log-size", "size of the write log of an image that they open")
	f.StringVar(&o.cfg.StateDir, "state-dir", env(api.EnvStateDir, api.DefaultStateDir), "write down what is attached here ($"+api.EnvStateDir+")")
	f.StringVar(&o.cfg.ReadCache, "read-cache", os.Getenv(envReadCache), "file of the read cache, on a local SSD ($"+envReadCache+"; default: cache/read-cache in the state directory)")
	o.readCache = daemon.DefaultReadCacheSize
	if v := os.Getenv(envReadCacheSize); v != "" {
		o.envErr = o.readCache.Set(v)
	}
	f.Var(&o.readCache, "read-cache-size", "size of the read cache, 0 for none ($"+envReadCacheSize+")")
	o.cacheMemory = bytesize.Size(daemon.DefaultReadCacheMemory())
	f.Var(&o.cacheMemory, "read-cache-memory", "memory for what of the read cache is read most, so that it is not read from the SSD; 0: none")
	f.StringVar(&o.cfg.Host, "host-name", host, "name of this host, for others who want an image")
	f.BoolVar(&o.supervise, "supervise", false, "run the daemon as a child, and again when it dies")
	f.StringVar(&o.ublkWithout, "ublk-without", "", "features of the kernel's ublk that new devices do without: BATCH_IO, USER_COPY")
	f.StringVar(&o.onTerm, "on-term", "leave", "what SIGTERM does with the devices: leave them to the next lsdd, or detach")
	f.DurationVar(&o.cfg.ExitTimeout, "exit-timeout", 20*time.Second, "how long to write to the store before the end")
	o.logMemory = daemon.DefaultLogMemory
	f.Var(&o.logMemory, "log-memory-total", "memory for the newest parts of all write logs together")
	o.burstMemory = bytesize.Size(daemon.DefaultBurstMemory())
	f.Var(&o.burstMemory, "burst-memory", "memory that is lent to write logs beyond that, in bursts, so that less is read back from their SSD; 0: none")
	o.mapMemory = engine.DefaultMapMemory
	f.Var(&o.mapMemory, "map-memory", "memory for the maps of all images together")
	o.destageMemory = engine.DefaultDestageMemory
	f.Var(&o.destageMemory, "destage-memory", "memory for the objects of all images that are on their way to the store")
	o.readMemory = engine.DefaultReadMemory
	f.Var(&o.readMemory, "read-memory", "memory for reads of all images that the store has to answer")
	o.scrubRate = daemon.DefaultScrubRate
	f.Var(&o.scrubRate, "scrub-rate", "bytes that are read back and verified in a second, of all images together; 0: none")
	f.StringVar(&o.logFile, "log-file", "", "append the log to this file (default: standard error)")
	f.BoolVar(&o.logJSON, "log-json", false, "log in JSON")
	f.BoolVar(&o.verbose, "verbose", false, "log more")
	if err := cmd.Execute(); err != nil {
		fmt.Fprintf(os.Stderr, "lsdd: %s\n", api.OneLine(err))
		if errors.Is(err, daemon.ErrRefused) || status == 0 {
			return daemon.ExitRefused
		}
		return status
	}
	return status
}

func env(name, other string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return other
}

// run does the work. A status of 0 with an error means that the command line is
// wrong.
func (o *options) run(ctx context.Context) (int, error) {
	switch {
	case o.onTerm != "leave" && o.onTerm != "detach":
		return 0, fmt.Errorf("--on-term %s: it is leave or detach", o.onTerm)
	case o.cfg.Host == "":
		return 0, errors.New("this host has no name: give it one with --host-name")
	case !filepath.IsAbs(o.cfg.StateDir) || !filepath.IsAbs(o.cfg.Socket):
		return 0, errors.New("--state-dir and --socket must be absolute paths")
	case o.cfg.LibrarySocket != "" && !filepath.IsAbs(o.cfg.LibrarySocket):
		return 0, fmt.Errorf("--librbd-socket %s: it must be an absolute path", o.cfg.LibrarySocket)
	case o.cfg.LibraryPolicy != "" && !filepath.IsAbs(o.cfg.LibraryPolicy):
		return 0, fmt.Errorf("--librbd-policy %s: it must be an absolute path", o.cfg.LibraryPolicy)
	case len(o.cfg.LibrarySocket) > maxSocket:
		return 0, fmt.Errorf("--librbd-socket: a path of %d bytes: the limit is %d", len(o.cfg.LibrarySocket), maxSocket)
	case len(o.cfg.Socket) > maxSocket:
		return 0, fmt.Errorf("--socket: a path of %d bytes: the limit is %d", len(o.cfg.Socket), maxSocket)
	case o.cfg.ExitTimeout <= 0:
		return 0, fmt.Errorf("--exit-timeout %v: it must be longer than 0", o.cfg.ExitTimeout)
	case o.burstMemory != 0 && o.burstMemory < writelog.SegmentSize, o.burstMemory > 1<<50:
		return 0, fmt.Errorf("--burst-memory %s: it must be 0, for none, or from 8M to 1P", &o.burstMemory)
	case o.scrubRate > 1<<50:
		return 0, fmt.Errorf("--scrub-rate %s: it must be at most 1P", &o.scrubRate)
	}
	for _, m := range []struct {
		flag string
		n    *bytesize.Size
		to   *int64
	}{
		{"--log-memory-total", &o.logMemory, &o.cfg.LogMemory},
		{"--map-memory", &o.mapMemory, &o.cfg.MapMemory},
		{"--destage-memory", &o.destageMemory, &o.cfg.DestageMemory},
		{"--read-memory", &o.readMemory, &o.cfg.ReadMemory},
	} {
		if *m.n < 16<<20 || *m.n > 1<<50 {
			return 0, fmt.Errorf("%s %s: it must be from 16M to 1P", m.flag, m.n)
		}
		*m.to = int64(*m.n)
	}
	var err error
	if o.cfg.Forgo, err = ublk.ParseFeatures(o.ublkWithout); err != nil {
		return 0, fmt.Errorf("--ublk-without: %w", err)
	}
	if err := writelog.CheckSize(int64(o.libraryLog)); err != nil {
		return 0, fmt.Errorf("--librbd-log-size %s: %w", &o.libraryLog, err)
	}
	o.cfg.LibraryLogSize = int64(o.libraryLog)
	o.cfg.ScrubRate = int64(o.scrubRate)
	if o.cfg.BurstMemory = int64(o.burstMemory); o.burstMemory == 0 {
		o.cfg.BurstMemory = -1
	}
	if err := o.sizeReadCache(); err != nil {
		return 0, err
	}
	logger, err := o.logger()
	if err != nil {
		return 0, err
	}
	if o.supervise {
		exe, err := os.Executable()
		if err != nil {
			return daemon.ExitFailed, err
		}
		return daemon.Supervise(ctx, logger, exe, childArgs(os.Args[1:]))
	}
	if err := daemon.BecomeIOFlusher(logger); err != nil {
		return daemon.ExitFailed, err
	}
	signal.Ignore(unix.SIGHUP) // a terminal that closes ends nothing
	// Stopped before Run returns: a second signal ends it at once.
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	if o.cfg.LibrarySocket == "" {
		o.cfg.LibrarySocket = api.LibrarySocket(o.cfg.Socket)
	}
	o.cfg.Version, o.cfg.Logger, o.cfg.DetachOnExit = version(), logger, o.onTerm == "detach"
	o.cfg.Ready = func() { notify(logger, "READY=1") }
	context.AfterFunc(ctx, func() {
		stop()
		notify(logger, "STOPPING=1")
	})
	d, err := daemon.New(o.cfg)
	if err != nil {
		return daemon.ExitFailed, err
	}
	daemon.PrepareProcess(logger)
	if err := d.Run(ctx); err != nil {
		return daemon.ExitFailed, err
	}
	return 0, nil
}

// maxSocket bounds the socket's path: the kernel takes 107 bytes, and the daemon
// makes it under a name that is longer by a dot and its process id.
const maxSocket = 99

// Environment variables for a daemon that lsdctl starts.
const (
	envReadCache     = "LSD_READ_CACHE"
	envReadCacheSize = "LSD_READ_CACHE_SIZE"
)

// sizeReadCache takes the read cache's flags.
func (o *options) sizeReadCache() error {
	if o.envErr != nil {
		return fmt.Errorf("$%s: %w", envReadCacheSize, o.envErr)
	}
	if o.cfg.ReadCache != "" && !filepath.IsAbs(o.cfg.ReadCache) {
		return fmt.Errorf("--read-cache %s: it must be an absolute path", o.cfg.ReadCache)
	}
	if o.readCache > readcache.MaxSize {
		return fmt.Errorf("--read-cache-size %s: it must be at most 8T", &o.readCache)
	}
	if o.cacheMemory != 0 && o.cacheMemory < readcache.SegmentSize || o.cacheMemory > 1<<50 {
		return fmt.Errorf("--read-cache-memory %s: it must be 0, for none, or from 1M to 1P", &o.cacheMemory)
	}
	if o.cfg.ReadCacheMemory = int64(o.cacheMemory); o.cacheMemory == 0 {
		o.cfg.ReadCacheMemory = -1
	}
	o.cfg.ReadCacheSize = int64(o.readCache)
	if o.cfg.ReadCacheSize == 0 {
		return nil
	}
	return readcache.CheckSize(o.cfg.ReadCacheSize)
}

func notify(logger *slog.Logger, state string) {
	if err := daemon.Notify(state); err != nil {
		logger.Warn("systemd cannot be told", "err", err)
	}
}

// childArgs returns the arguments without --supervise.
func childArgs(args []string) []string {
	return slices.DeleteFunc(slices.Clone(args), func(a string) bool {
		return a == "--supervise" || strings.HasPrefix(a, "--supervise=")
	})
}

func (o *options) logger() (*slog.Logger, error) {
	var w io.Writer = os.Stderr
	if o.logFile != "" {
		f, err := os.OpenFile(o.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open the log: %w", err)
		}
		w = f // until the process ends
	}
	opt := &slog.HandlerOptions{Level: slog.LevelInfo}
	if o.verbose {
		opt.Level = slog.LevelDebug
	}
	var h slog.Handler = slog.NewTextHandler(w, opt)
	if o.logJSON {
		h = slog.NewJSONHandler(w, opt)
	}
	l := slog.New(h)
	slog.SetDefault(l)
	return l, nil
}

// version returns what the build knows of itself.
func version() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := bi.Main.Version
	if v == "" {
		v = "(devel)"
	}
	return v
}
