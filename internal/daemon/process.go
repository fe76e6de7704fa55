package daemon

import (
	"errors"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// oomScore keeps the kernel from choosing the process that its own memory
// reclaim may depend on, while something else can be chosen.
const oomScore = -900

// ReactorNice is the nice value of the threads that serve the disks. They are what
// a request waits for, as kblockd is, which runs at -20; what the daemon does besides
// (building objects, checksums, the collector) is as important as other processes.
const ReactorNice = -10

// ReactorSpin is for how long these threads look for work before they sleep, while it comes that
// fast: to be woken takes 20 to 100 us on a virtual machine. On one processor there would be nobody
// to bring it meanwhile.
func ReactorSpin() time.Duration {
	if runtime.NumCPU() == 1 {
		return 0
	}
	return 100 * time.Microsecond
}

// PrepareProcess makes the process fit to serve disks of its own host: memory
// that stays, a low chance of being killed for it, limits out of the way, room for
// the reactors. What is refused is logged: the daemon works without it.
func PrepareProcess(logger *slog.Logger) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(oomScore)), 0); err != nil {
		logger.Warn("the kernel may kill this process when memory is short", "err", err)
	}
	raise(logger, "RLIMIT_MEMLOCK", unix.RLIMIT_MEMLOCK, unix.RLIM_INFINITY)
	raise(logger, "RLIMIT_NOFILE", unix.RLIMIT_NOFILE, 1<<20)
	// On fault: what is touched stays, what is not costs nothing.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		logger.Warn("memory cannot be locked: when it is short, a disk used by this host may hang", "err", err)
	}
	limitHeap()
	SpareProcessors()
}

// minPlaces is the least that SpareProcessors sets.
const minPlaces = 8

// SpareProcessors lets half as many goroutines again run as there are processors
// (GOMAXPROCS), and minPlaces at least, unless the environment says how many. A reactor
// that comes back from the kernel needs a place among them: if workers and the collector
// hold all, it waits until the runtime takes one away, up to 10 ms. With places to spare
// it is the kernel that chooses who runs, and it knows the reactors' priority. A call to
// the file system holds its place too, and while calls are shorter than the runtime cares
// for, their number is that of the places: on two processors with three places, a
// directory was asked for two things at a time. Limits of the control group that change
// later are not followed any more.
func SpareProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		n := runtime.GOMAXPROCS(0)
		runtime.GOMAXPROCS(max(n+(n+1)/2, minPlaces))
	}
}

// raise raises a limit to want, or as far as the process may.
func raise(logger *slog.Logger, name string, which int, want uint64) {
	var now unix.Rlimit
	if err := unix.Getrlimit(which, &now); err != nil || now.Cur >= want {
		return
	}
	err := unix.Setrlimit(which, &unix.Rlimit{Cur: want, Max: max(now.Max, want)})
	if err != nil {
		err = unix.Setrlimit(which, &unix.Rlimit{Cur: min(want, now.Max), Max: now.Max})
	}
	if err != nil {
		logger.Warn("a limit cannot be raised", "limit", name, "err", err)
	}
}

// DefaultBurstMemory returns the default of Config.BurstMemory: 2 GiB, but at most a tenth of the
// memory that there is. That is for a burst, which ends with 1 GiB (engine.Config.Burst), and for
// what is written while that is destaged.
func DefaultBurstMemory() int64 { return min(2<<30, int64(totalMemory()/10)) }

// DefaultReadCacheMemory returns the default of Config.ReadCacheMemory: 1 GiB, but at most a twentieth
// of the memory that there is.
func DefaultReadCacheMemory() int64 { return min(1<<30, int64(totalMemory()/20)) }

// totalMemory returns how much memory there is for this process, in bytes, or 0 if that is not known.
func totalMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		self = nil // a kernel without cgroups
	}
	return min(si.Totalram*uint64(si.Unit), cgroupLimit("/sys/fs/cgroup", self))
}

// cgroupLimit returns the least limit of memory, in bytes, that a process's cgroup and those around it
// have, or math.MaxUint64: a container's or a service's. root is where cgroups are mounted, and self
// what /proc/self/cgroup says (cgroups(7), version 2).
func cgroupLimit(root string, self []byte) uint64 {
	limit := uint64(math.MaxUint64)
	for line := range strings.Lines(string(self)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for dir := filepath.Join("/", path); ; dir = filepath.Dir(dir) {
			b, err := os.ReadFile(filepath.Join(root, dir, "memory.max"))
			if n, perr := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil && perr == nil { // else "max"
				limit = min(limit, n)
			}
			if dir == "/" {
				break
			}
		}
	}
	return limit
}

// limitHeap sets a soft limit to the heap, unless GOMEMLIMIT does: a quarter of
// the memory, beyond which the collector works harder.
func limitHeap() {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	if n := totalMemory(); n > 0 {
		debug.SetMemoryLimit(int64(max(n/4, 256<<20)))
	}
}

// Notify tells systemd about the service's state (sd_notify(3)), if it wants to
// know: "READY=1", "STOPPING=1".
func Notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = c.Write([]byte(state))
	return errors.Join(err, c.Close())
}
