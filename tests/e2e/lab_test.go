//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What scripts/e2e tells the tests.
var (
	binDir    = flag.String("e2e.bin", "", "directory with lsdd and lsdctl")
	storeKind = flag.String("e2e.store", "file", "store of the images: file or rados")
	long      = flag.Bool("e2e.long", false, "the full sizes and counts")
	ssdDisk   = flag.String("e2e.ssd", "", "scratch disk for state and write logs")
	storeDisk = flag.String("e2e.storedisk", "", "scratch disk for file:// stores")
	keepDisks = flag.Bool("e2e.keepdisks", false, "the disks hold what the boot before left there")
	outDir    = flag.String("e2e.out", "", "directory for logs that outlive the machine, and for requests to its host")
)

const (
	ssdDir = "/run/lsd-e2e/ssd"   // ext4 on its own disk
	fsDir  = "/run/lsd-e2e/store" // another
	runDir = "/run/lsd-e2e/run"   // tmpfs
)

func TestMain(m *testing.M) {
	if tool := os.Getenv(toolEnv); tool != "" {
		os.Exit(runTool(tool))
	}
	flag.Parse()
	if f := flag.Lookup("test.list"); f != nil && f.Value.String() != "" {
		os.Exit(m.Run())
	}
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// setUp readies the disks. A lab that is not as it should be is a failure:
// nothing is skipped.
func setUp() error {
	if *binDir == "" || *outDir == "" || *ssdDisk == "" || *storeDisk == "" {
		return errors.New("run these tests with scripts/e2e")
	}
	if _, err := os.Stat("/dev/ublk-control"); err != nil {
		return fmt.Errorf("this kernel has no ublk: %w", err)
	}
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return err
	}
	for disk, dir := range map[string]string{*ssdDisk: ssdDir, *storeDisk: fsDir} {
		if err := mountDisk(disk, dir); err != nil {
			return err
		}
	}
	return nil
}

func mountDisk(disk, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if !*keepDisks {
		// Without a journal to initialize and tables to zero it takes no time.
		if r := execute(time.Minute, nil, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", disk); r.err() != nil {
			return r.err()
		}
	}
	if r := execute(time.Minute, nil, "mount", "-o", "noatime", disk, dir); r.err() != nil {
		return r.err()
	}
	return nil
}

// pick returns the value for the short or the long form of the tests.
func pick[T any](short, full T) T {
	if *long {
		return full
	}
	return short
}

// A result is what became of a command.
type result struct {
	cmd            string
	stdout, stderr string
	code           int // -1: a signal, or it did not end
	failed         error
	took           time.Duration
}

// err returns an error with all that the command said unless it succeeded.
func (r result) err() error {
	if r.failed == nil {
		return nil
	}
	return fmt.Errorf("%s: %w after %v\n%s%s", r.cmd, r.failed, r.took.Round(time.Millisecond), r.stdout, r.stderr)
}

// buffer may be read while a command that does not end still holds it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A process is a command that runs in a process group of its own.
type process struct {
	cmd            *exec.Cmd
	name           string
	stdout, stderr buffer
	done           chan struct{}
	err            error // valid after done
	began          time.Time
}

// spawn starts a command.
func spawn(env []string, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{}), began: time.Now()}
	p.name = strings.Join(append([]string{filepath.Base(name)}, args...), " ")
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = time.Second // a daemon that it started may hold the pipes
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		if errors.Is(p.err, exec.ErrWaitDelay) {
			p.err = nil
		}
		close(p.done)
	}()
	return p, nil
}

// kill ends the process group. What waits for a block device whose server is
// gone cannot be killed: it is not waited for.
func (p *process) kill() { _ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }

// wait waits for the end, at most for the given time; then the process is killed.
func (p *process) wait(timeout time.Duration) result {
	select {
	case <-p.done:
	case <-time.After(timeout):
		state := p.stack()
		p.kill()
		select {
		case <-p.done:
			return p.result(fmt.Errorf("no end within %v", timeout))
		case <-time.After(5 * time.Second):
			return p.result(fmt.Errorf("no end within %v, and it cannot be killed: %s", timeout, state))
		}
	}
	return p.result(p.err)
}

// running reports whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

func (p *process) result(err error) result {
	r := result{cmd: p.name, stdout: p.stdout.String(), stderr: p.stderr.String(), failed: err, took: time.Since(p.began), code: -1}
	select {
	case <-p.done:
		r.code = p.cmd.ProcessState.ExitCode()
	default:
	}
	return r
}

// stack says where in the kernel the process is.
func (p *process) stack() string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stack", p.cmd.Process.Pid))
	return strings.Join(strings.Fields(string(b)), " ")
}

// execute runs a command to its end.
func execute(timeout time.Duration, env []string, name string, args ...string) result {
	p, err := spawn(env, name, args...)
	if err != nil {
		return result{cmd: name, failed: err, code: -1}
	}
	return p.wait(timeout)
}

// run runs a command, which must succeed, and returns its output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := execute(2*time.Minute, nil, name, args...)
	if err := r.err(); err != nil {
		t.Fatal(err)
	}
	return r.stdout
}

// eventually waits until ok returns true.
func eventually(t testing.TB, timeout time.Duration, what string, ok func() bool) {
	t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > timeout {
			t.Fatalf("not within %v: %s", timeout, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

var requests atomic.Int64

// askHost has scripts/e2e, outside of the machine, do something that cannot be
// done inside, and waits until it is done.
func askHost(t testing.TB, what string) {
	t.Helper()
	name := filepath.Join(*outDir, fmt.Sprintf("request.%d.%d", os.Getpid(), requests.Add(1)))
	if err := os.WriteFile(name+".tmp", []byte(what+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".tmp", name); err != nil {
		t.Fatal(err)
	}
	var answer []byte
	eventually(t, 90*time.Second, "the host's answer to "+what, func() bool {
		var err error
		answer, err = os.ReadFile(name + ".done")
		return err == nil
	})
	if s := strings.TrimSpace(string(answer)); s != "ok" {
		t.Fatalf("host: %s: %s", what, s)
	}
}

// storeURL returns the URL of a new, empty store of the kind that is tested.
func storeURL(t testing.TB) string {
	name := strings.NewReplacer("/", "-", "_", "-").Replace(strings.ToLower(t.Name())) + "-" + strconv.FormatInt(requests.Add(1), 10)
	switch *storeKind {
	case "file":
		return "file://" + filepath.Join(fsDir, name)
	case "rados":
		return fmt.Sprintf("rados://rbd/%s-%d", name, os.Getpid())
	}
	t.Fatalf("store %q?", *storeKind)
	return ""
}

// fio runs fio on a device; it must succeed.
func fio(t testing.TB, dev string, timeout time.Duration, args ...string) {
	t.Helper()
	args = append([]string{"--name=x", "--filename=" + dev, "--direct=1", "--ioengine=libaio", "--allow_file_create=0"}, args...)
	if r := execute(timeout, nil, "fio", args...); r.err() != nil {
		t.Fatal(r.err())
	}
}

// mixed is a random write workload of 4 KiB to 1 MiB whose blocks carry their
// checksums. The same seed and size make the same writes.
func mixed(seed int, size string, more ...string) []string {
	return append([]string{
		"--rw=randwrite", "--bssplit=4k/40:8k/20:16k/10:32k/5:64k/10:128k/5:256k/5:512k/3:1m/2", "--size=" + size,
		"--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=1",
		"--randseed=" + strconv.Itoa(seed),
	}, more...)
}

// kernelErrors returns what the kernel has logged about I/O errors on a device.
func kernelErrors(t testing.TB, dev string) []string {
	t.Helper()
	out := run(t, "dmesg")
	name := filepath.Base(dev)
	return slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool {
		return !strings.Contains(l, "error") && !strings.Contains(l, "WARNING") || !strings.Contains(l, name)
	})
}

// clearKernelLog keeps what happened before out of kernelErrors.
func clearKernelLog(t testing.TB) { run(t, "dmesg", "-C") }

// mounted mounts a device for the rest of the test, or until the function that
// it returns is called.
func mounted(t testing.TB, dev, dir string, options ...string) (unmount func()) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", append(append([]string{}, options...), dev, dir)...)
	there := true
	unmount = func() {
		t.Helper()
		if there {
			there = false
			run(t, "umount", dir)
		}
	}
	t.Cleanup(func() {
		if there {
			there = false
			_ = execute(20*time.Second, nil, "umount", "-l", dir)
		}
	})
	return unmount
}

// watchNode checks all the time that a device node is there and stays the same
// device. It does not open it. The function that it returns ends that.
func watchNode(t testing.TB, dev string) (stop func()) {
	t.Helper()
	look := func() (uint64, error) {
		var st unix.Stat_t
		if err := unix.Stat(dev, &st); err != nil {
			return 0, err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return 0, errors.New("it is no block device")
		}
		_, err := os.Stat("/sys/block/" + filepath.Base(dev))
		return st.Rdev, err
	}
	first, err := look()
	if err != nil {
		t.Fatalf("%s: %v", dev, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			now, err := look()
			if err == nil && now != first {
				err = fmt.Errorf("it is device %#x, and was %#x", now, first)
			}
			if err != nil {
				ended <- fmt.Errorf("%s disappeared: %w", dev, err)
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
		ended <- nil
	}()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
