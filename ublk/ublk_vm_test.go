//go:build ublk

// Tests against a real kernel: they need root and ublk_drv. Build them with
// "go test -c -tags ublk ./ublk" and run the binary on such a machine, or in a
// virtual machine: scripts/vm -- ./ublk.test.

package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/boottime"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"golang.org/x/sys/unix"
)

const serverEnv = "LSD_UBLK_TEST_SERVER"

func TestMain(m *testing.M) {
	if spec := os.Getenv(serverEnv); spec != "" {
		if err := serve(spec); err != nil {
			fmt.Fprintln(os.Stderr, "server:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// ram is a disk in memory.
type ram struct {
	data                        []byte
	reads, writes, fua, flushes atomic.Int64
	discards, zeroes, discarded atomic.Int64
}

func (m *ram) Handle(io *IO) {
	off := io.Sector * sectorSize
	n := uint64(io.Sectors) * sectorSize
	switch io.Op {
	case OpRead:
		m.reads.Add(1)
		copy(io.Buf, m.data[off:off+n])
	case OpWrite:
		m.writes.Add(1)
		if io.FUA {
			m.fua.Add(1)
		}
		copy(m.data[off:off+n], io.Buf)
	case OpFlush:
		m.flushes.Add(1)
	case OpDiscard:
		m.discards.Add(1)
		m.discarded.Add(int64(n))
		clear(m.data[off : off+n])
	case OpWriteZeroes:
		m.zeroes.Add(1)
		clear(m.data[off : off+n])
	default:
		io.Complete(-int32(unix.EOPNOTSUPP))
		return
	}
	io.Complete(int32(len(io.Buf)))
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// withoutEnv names features that all tests are to do without.
const withoutEnv = "LSD_UBLK_WITHOUT"

func open() (*Control, error) {
	c, err := OpenControl()
	if err != nil {
		return nil, err
	}
	f, err := ParseFeatures(os.Getenv(withoutEnv))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	c.Forgo(f)
	return c, nil
}

func openControl(t testing.TB) *Control {
	t.Helper()
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newReactor(t testing.TB, entries uint32) *reactor.Reactor {
	t.Helper()
	r, err := reactor.New(reactor.Config{Name: t.Name(), Entries: entries})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Stop(); <-r.Done() })
	return r
}

// start makes a device and serves it until the test's end.
func start(t testing.TB, c *Control, p Params, h Handler) *Device {
	t.Helper()
	ctx := testContext(t)
	r := newReactor(t, 0)
	p.ID = -1
	d, err := c.Add(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(testContext(t), true); err != nil && !errors.Is(err, ErrNoDevice) {
			t.Errorf("delete: %v", err)
		}
		if exists(d.Path()) {
			t.Errorf("%s is still there", d.Path())
		}
	})
	if err := d.Start(ctx, r, h); err != nil {
		t.Fatal(err)
	}
	return d
}

// run runs a command and fails the test when it fails.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func fio(t testing.TB, dev string, args ...string) {
	t.Helper()
	args = append([]string{"--name=x", "--filename=" + dev, "--direct=1", "--allow_file_create=0"}, args...)
	run(t, "fio", args...)
}

func sysfs(t testing.TB, d *Device, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestVMFeatures(t *testing.T) {
	c := openControl(t)
	f, err := c.Features()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("features %#x: %v", uint64(f), f)
	if want := FeatureRecovery | FeatureReissue | FeatureIoctlEncode; !f.Has(want) {
		t.Errorf("features lack %v", want&^f)
	}
}

func TestVMErrors(t *testing.T) {
	c, ctx := openControl(t), testContext(t)
	if _, err := c.Info(ctx, 999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Info: %v", err)
	}
	if _, err := c.Params(ctx, 999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Params: %v", err)
	}
	if err := c.Stop(ctx, 999, true); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Stop: %v", err)
	}
	if err := c.Stop(ctx, 999, false); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Stop without force: %v", err)
	}
	if err := c.Delete(ctx, 999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Delete: %v", err)
	}
	if err := c.DeleteAsync(ctx, 999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("DeleteAsync: %v", err)
	}
	if _, err := c.Recover(ctx, 999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Recover: %v", err)
	}
	if _, err := c.Add(ctx, Params{ID: -1, SizeBytes: 7}); err == nil {
		t.Error("a device of 7 bytes was added")
	}
	d, err := c.Add(ctx, Params{ID: 33, SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Add(ctx, Params{ID: 33, SizeBytes: 1 << 20}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("second Add: %v", err)
	}
	if _, err := c.Recover(ctx, 33); !errors.Is(err, ErrNotRecoverable) {
		t.Errorf("Recover of a device that was not started: %v", err)
	}
	list, err := c.List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != 33 || list[0].State != StateDead {
		t.Errorf("List: %+v, %v", list, err)
	}
	if err := d.Delete(ctx, false); err != nil {
		t.Errorf("Delete of a device that was not started: %v", err)
	}
	if list, err := c.List(ctx); err != nil || len(list) != 0 {
		t.Errorf("List at the end: %+v, %v", list, err)
	}
}

func TestVMNotRoot(t *testing.T) {
	cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/proc/self/exe", "-test.run=TestNotRootHelper", "-test.v")
	cmd.Path, _ = exec.LookPath("setpriv")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[4] = exe
	cmd.Env = append(os.Environ(), "LSD_UBLK_NOT_ROOT=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("only root")) {
		t.Errorf("%v: %s", err, out)
	}
}

func TestNotRootHelper(t *testing.T) {
	if os.Getenv("LSD_UBLK_NOT_ROOT") == "" {
		t.Skip("run by TestVMNotRoot")
	}
	_, err := OpenControl()
	t.Log(err)
	if !errors.Is(err, unix.EACCES) {
		t.Errorf("OpenControl: %v", err)
	}
}

// TestVMStartRefused starts a device whose reactor is gone, and one whose
// character device went away.
func TestVMStartRefused(t *testing.T) {
	c, ctx := openControl(t), testContext(t)
	d, err := c.Add(ctx, Params{ID: -1, SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	r := newReactor(t, 0)
	r.Stop()
	<-r.Done()
	if err := d.Start(ctx, r, Null{}); !errors.Is(err, reactor.ErrStopped) {
		t.Errorf("Start on a stopped reactor: %v", err)
	}
	if err := d.Delete(ctx, false); err != nil {
		t.Error(err)
	}

	if d, err = c.Add(ctx, Params{ID: -1, SizeBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	// The buffer address of one tag is missing: the kernel refuses its FETCH,
	// and would never answer START_DEV.
	d.tags[5].addr = 0
	begin := time.Now()
	if err := d.Start(ctx, newReactor(t, 0), Null{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Start with a bad tag: %v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("Start with a bad tag took %v", took)
	}
	if err := d.Delete(ctx, false); err != nil {
		t.Error(err)
	}
	if d.Err() == nil {
		t.Error("Err after a refused tag is nil")
	}
}

func TestVMParams(t *testing.T) {
	c := openControl(t)
	d := start(t, c, Params{SizeBytes: 64 << 20, LogicalBlock: 4096, PhysicalBlock: 4096, IOMin: 8192, IOOpt: 65536,
		MaxIOBytes: 512 << 10, VolatileCache: true, FUA: true, MaxDiscardBytes: 32 << 20, MaxZeroesBytes: 16 << 20, Depth: 16},
		&ram{data: make([]byte, 64<<20)})
	for name, want := range map[string]string{
		"size":                         "131072",
		"ro":                           "0",
		"queue/logical_block_size":     "4096",
		"queue/physical_block_size":    "4096",
		"queue/minimum_io_size":        "8192",
		"queue/optimal_io_size":        "65536",
		"queue/max_hw_sectors_kb":      "512",
		"queue/rotational":             "0",
		"queue/write_cache":            "write back",
		"queue/fua":                    "1",
		"queue/discard_max_bytes":      "33554432",
		"queue/write_zeroes_max_bytes": "16777216",
		"queue/nr_requests":            "16",
	} {
		if got := sysfs(t, d, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	p, err := c.Params(testContext(t), d.ID())
	if err != nil {
		t.Fatal(err)
	}
	if want := d.Params(); p != want {
		t.Errorf("Params = %+v, want %+v", p, want)
	}
	info, err := c.Info(testContext(t), d.ID())
	if err != nil || info.State != StateLive || info.ServerPID != os.Getpid() || info.Path() != d.Path() {
		t.Errorf("Info = %+v, %v", info, err)
	}
}

func TestVMReadOnly(t *testing.T) {
	m := &ram{data: bytes.Repeat([]byte("lsd."), 1<<20)}
	d := start(t, openControl(t), Params{SizeBytes: 4 << 20, ReadOnly: true}, m)
	if got := sysfs(t, d, "ro"); got != "1" {
		t.Errorf("ro = %s", got)
	}
	if f, err := os.OpenFile(d.Path(), os.O_WRONLY, 0); err == nil {
		if _, err := f.Write(make([]byte, 4096)); err == nil && f.Sync() == nil {
			t.Error("a write to a read-only device succeeded")
		}
		f.Close()
	}
	got, err := os.ReadFile(d.Path())
	if err != nil || !bytes.Equal(got, m.data) {
		t.Errorf("read %d bytes: %v", len(got), err)
	}
	if m.writes.Load() != 0 {
		t.Error("a write arrived")
	}
}

func TestVMVerify(t *testing.T) {
	for _, c := range []struct{ queues, depth int }{{1, 128}, {2, 1}, {3, 7}, {4, 32}} {
		t.Run(fmt.Sprintf("queues=%d,depth=%d", c.queues, c.depth), func(t *testing.T) {
			m := &ram{data: make([]byte, 64<<20)}
			d := start(t, openControl(t), Params{SizeBytes: 64 << 20, Queues: c.queues, Depth: c.depth,
				VolatileCache: true, FUA: true, MaxDiscardBytes: 1 << 30, MaxZeroesBytes: 1 << 30}, m)
			if got := d.Slots(); got != d.Params().Queues*c.depth {
				t.Errorf("%d slots", got)
			}
			// The page cache joins these up to the greatest request, and writes
			// back with a flush at the end.
			want := make([]byte, 8<<20)
			for i := range want {
				want[i] = byte(i>>9) ^ byte(i)
			}
			f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(want, 12345); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(m.data[12345:12345+len(want)], want) {
				t.Error("what was written is not what arrived")
			}
			f.Close()
			for _, bs := range []string{"512", "4k", "64k", "1m"} {
				size := "--size=8m"
				if bs == "512" {
					size = "--size=512k"
				}
				fio(t, d.Path(), "--ioengine=libaio", "--iodepth=32", "--rw=randwrite", "--bs="+bs, size, "--verify=crc32c", "--verify_fatal=1")
			}
			fio(t, d.Path(), "--ioengine=io_uring", "--iodepth=16", "--rw=randrw", "--bsrange=4k-1m", "--size=32m", "--io_size=32m", "--verify=crc32c", "--verify_fatal=1", "--numjobs=1")
		})
	}
}

// TestVMRest takes the buffers' memory away again and again, whenever no request
// is under way, while requests come and go: none may lose its data. When none come
// it can be taken at any time, also on a reactor that sleeps and is woken up for it.
func TestVMRest(t *testing.T) {
	c := openControl(t)
	m := &ram{data: make([]byte, 64<<20)}
	d := start(t, c, Params{SizeBytes: uint64(len(m.data)), Depth: 8}, m)
	var rests, busy atomic.Int64
	var failed atomic.Pointer[error]
	var timer *reactor.Timer
	again := func() {
		switch ok, err := d.Rest(); {
		case err != nil:
			failed.Store(&err)
			return
		case ok:
			rests.Add(1)
		default:
			busy.Add(1)
		}
		timer.Reset(500 * time.Microsecond)
	}
	d.reactor.Post(func() { timer = d.reactor.AfterFunc(0, again) })
	for _, depth := range []string{"1", "4"} {
		fio(t, d.Path(), "--ioengine=libaio", "--rw=randwrite", "--bssplit=4k/60:64k/30:1m/10", "--size=32m", "--iodepth="+depth,
			"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
	}
	if err := failed.Load(); err != nil {
		t.Error(*err)
	}
	if rests.Load() < 100 {
		t.Errorf("the memory was taken %d times (%d times there was a request): this tests nothing", rests.Load(), busy.Load())
	}
	t.Logf("the memory was taken %d times, and %d times there was a request", rests.Load(), busy.Load())

	d.reactor.Post(func() { timer.Stop() })
	const looks = 100
	idle := 0
	for range looks {
		time.Sleep(2 * time.Millisecond)
		err := d.reactor.Call(func() {
			ok, err := d.Rest()
			if err != nil {
				t.Error(err)
			}
			if ok {
				idle++
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if idle < looks*9/10 { // a wake-up of the time before may be left
		t.Errorf("the memory of an idle device was taken at %d of %d looks", idle, looks)
	}
}

// leased is a disk in memory whose changes are told in time only. Those that come too
// late are told again when there is time.
type leased struct {
	ram
	late  []*IO // the reactor's
	lates atomic.Int64
}

func (l *leased) Handle(io *IO) {
	if io.Op == OpRead {
		l.ram.Handle(io)
		return
	}
	l.writes.Add(1)
	copy(l.data[io.Sector*sectorSize:], io.Buf)
	io.CompleteInTime(int32(len(io.Buf)))
}

func (l *leased) Late(io *IO) {
	l.lates.Add(1)
	l.late = append(l.late, io)
}

func (l *leased) extend(r *reactor.Reactor, by time.Duration) {
	r.Ring().SetDeadline(boottime.Now() + by)
	list := l.late
	l.late = nil
	for _, io := range list {
		io.CompleteInTime(int32(len(io.Buf)))
	}
}

// TestVMInTime: the kernel takes no completion after the deadline and all of them
// before it, and none gets lost when it passes at any time.
func TestVMInTime(t *testing.T) {
	l := &leased{ram: ram{data: make([]byte, 64<<20)}}
	d := start(t, openControl(t), Params{SizeBytes: uint64(len(l.data)), Depth: 32}, l)
	r := d.reactor
	write := func() error {
		return exec.Command("dd", "if=/dev/zero", "of="+d.Path(), "bs=4k", "count=1", "oflag=direct", "conv=notrunc").Run()
	}
	written := make(chan error, 1)
	go func() { written <- write() }()
	select {
	case err := <-written:
		t.Fatalf("a write ended without a deadline that is still to come: %v", err)
	case <-time.After(3 * time.Second):
		if l.lates.Load() == 0 {
			t.Fatal("no write has arrived: this tests nothing")
		}
	}

	const lease, over = 20 * time.Millisecond, 10 * time.Millisecond
	end := make(chan struct{})
	var timer *reactor.Timer
	r.Post(func() {
		timer = r.AfterFunc(0, func() {
			select {
			case <-end:
				l.extend(r, time.Hour)
			default:
				l.extend(r, lease)
				timer.Reset(lease + over)
			}
		})
	})
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	args := []string{"--ioengine=libaio", "--rw=randrw", "--bs=4k", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"}
	for _, depth := range []string{"1", "32"} {
		fio(t, d.Path(), append(args, "--iodepth="+depth)...)
	}
	late := l.lates.Load()
	t.Logf("of %d writes %d were told too late at first", l.writes.Load(), late)
	if late < 50 {
		t.Error("this tests nothing")
	}
	close(end)
	time.Sleep(100 * time.Millisecond)
	late = l.lates.Load()
	fio(t, d.Path(), append(args, "--iodepth=32")...)
	if n := l.lates.Load(); n != late {
		t.Errorf("%d writes were told too late, an hour before the deadline", n-late)
	}
}

func TestVMDiscard(t *testing.T) {
	m := &ram{data: bytes.Repeat([]byte{0xa5}, 16<<20)}
	d := start(t, openControl(t), Params{SizeBytes: 16 << 20, MaxDiscardBytes: 4 << 20, MaxZeroesBytes: 2 << 20}, m)
	run(t, "blkdiscard", "-o", "1048576", "-l", "6291456", d.Path())
	if got := m.discarded.Load(); got != 6<<20 {
		t.Errorf("%d bytes discarded, want 6 MiB", got)
	}
	if n := m.discards.Load(); n < 2 {
		t.Errorf("%d discards for 6 MiB with at most 4 MiB each", n)
	}
	run(t, "blkdiscard", "-z", "-o", "8388608", "-l", "4194304", d.Path())
	if n := m.zeroes.Load(); n != 2 {
		t.Errorf("%d write-zeroes for 4 MiB with at most 2 MiB each", n)
	}
	for _, at := range []struct {
		off  int
		want byte
	}{{1<<20 - 1, 0xa5}, {1 << 20, 0}, {7<<20 - 1, 0}, {7 << 20, 0xa5}, {8 << 20, 0}, {12<<20 - 1, 0}, {12 << 20, 0xa5}} {
		if m.data[at.off] != at.want {
			t.Errorf("byte %d = %#x, want %#x", at.off, m.data[at.off], at.want)
		}
	}
}

func TestVMFlushAndFUA(t *testing.T) {
	for _, fua := range []bool{true, false} {
		m := &ram{data: make([]byte, 4<<20)}
		d := start(t, openControl(t), Params{SizeBytes: 4 << 20, VolatileCache: true, FUA: fua}, m)
		fio(t, d.Path(), "--rw=write", "--bs=4k", "--size=64k")
		if m.writes.Load() != 16 || m.fua.Load() != 0 {
			t.Errorf("plain writes: %d, %d of them FUA", m.writes.Load(), m.fua.Load())
		}
		before := m.flushes.Load()
		fio(t, d.Path(), "--rw=write", "--bs=4k", "--size=64k", "--fsync=1")
		// fio does not sync after its last write.
		if got := m.flushes.Load() - before; got < 15 || got > 20 {
			t.Errorf("%d flushes for 15 fsyncs", got)
		}
		before = m.flushes.Load()
		fio(t, d.Path(), "--rw=write", "--bs=4k", "--size=64k", "--sync=dsync")
		flushes := m.flushes.Load() - before
		// For O_DSYNC the kernel's block device sends both a FUA write, where it
		// can, and a flush.
		if fua && m.fua.Load() != 16 || !fua && m.fua.Load() != 0 || flushes < 16 {
			t.Errorf("FUA %v: 16 O_DSYNC writes were %d FUA writes and %d flushes", fua, m.fua.Load(), flushes)
		}
	}
	m := &ram{data: make([]byte, 4<<20)}
	d := start(t, openControl(t), Params{SizeBytes: 4 << 20}, m)
	fio(t, d.Path(), "--rw=write", "--bs=4k", "--size=64k", "--fsync=1")
	if m.flushes.Load() != 0 {
		t.Errorf("%d flushes without a volatile cache", m.flushes.Load())
	}
}

// TestVMErrorsReachUser checks that a handler's errno becomes one of the user,
// and a short read is continued rather than filled with what lies in memory.
func TestVMErrorsReachUser(t *testing.T) {
	var short atomic.Int64
	d := start(t, openControl(t), Params{SizeBytes: 4 << 20}, HandlerFunc(func(io *IO) {
		switch {
		case io.Op == OpRead && io.Sector >= 4096:
			io.Complete(-int32(unix.EIO))
		case io.Op == OpWrite:
			io.Complete(-int32(unix.ENOSPC))
		case io.Op == OpRead && io.Sectors > 8:
			short.Add(1)
			for i := range io.Buf[:4096] {
				io.Buf[i] = byte(io.Sector / 8)
			}
			io.Complete(4096)
		default:
			for i := range io.Buf {
				io.Buf[i] = byte((io.Sector + uint64(i/512)) / 8)
			}
			io.Complete(int32(len(io.Buf)))
		}
	}))
	f, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 65536, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(buf[:4096], 4096*sectorSize); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := f.WriteAt(buf[:4096], 0); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		t.Errorf("write: %v, want ENOSPC or EIO", err)
	}
	n, err := f.ReadAt(buf, 0)
	if err != nil && err != io.EOF || n != len(buf) || short.Load() == 0 {
		t.Errorf("read of 64 KiB in short pieces = %d, %v (%d short reads)", n, err, short.Load())
	}
	for i, b := range buf {
		if b != byte(i/4096) {
			t.Fatalf("byte %d = %d, want %d", i, b, i/4096)
		}
	}
}

func TestVMResize(t *testing.T) {
	c := openControl(t)
	m := &ram{data: make([]byte, 64<<20)}
	d := start(t, c, Params{SizeBytes: 16 << 20}, m)
	err := d.Resize(testContext(t), 64<<20)
	if f, _ := c.Features(); !f.Has(FeatureUpdateSize) {
		if !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("Resize without the feature: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := sysfs(t, d, "size"); got != strconv.Itoa(64<<20/512) {
		t.Errorf("size = %s sectors", got)
	}
	fio(t, d.Path(), "--rw=write", "--bs=1m", "--offset=48m", "--size=16m", "--verify=crc32c")
	if err := d.Resize(testContext(t), 1000); err == nil {
		t.Error("a size of 1000 bytes was accepted")
	}
}

func TestVMBusy(t *testing.T) {
	c := openControl(t)
	d := start(t, c, Params{SizeBytes: 16 << 20}, &ram{data: make([]byte, 16<<20)})
	holder := exec.Command("sleep", "1000")
	f, err := os.Open(d.Path())
	if err != nil {
		t.Fatal(err)
	}
	holder.ExtraFiles = []*os.File{f}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	want := fmt.Sprintf("process %d (sleep)", holder.Process.Pid)
	defer holder.Process.Kill()

	var busy *BusyError
	if err := d.Delete(testContext(t), false); !errors.As(err, &busy) || !slices.Contains(busy.Holders, want) {
		t.Errorf("Delete of a device in use: %v, want %s", err, want)
	}
	if info, err := c.Info(testContext(t), d.ID()); err != nil || info.State != StateLive {
		t.Errorf("after a refused Delete: %+v, %v", info, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	begin := time.Now()
	busy = nil
	if err := d.Delete(ctx, true); !errors.As(err, &busy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("forced Delete of a device in use: %v", err)
	} else if !slices.Contains(busy.Holders, want) {
		t.Errorf("forced Delete of a device in use: %v, want %s", err, want)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("a Delete bounded to a second took %v", took)
	}
	holder.Process.Kill()
	holder.Wait()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := c.Info(testContext(t), d.ID()); errors.Is(err, ErrNoDevice) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the device stays after its last user")
		}
	}
}

func TestVMHolders(t *testing.T) {
	d := start(t, openControl(t), Params{SizeBytes: 32 << 20}, &ram{data: make([]byte, 32<<20)})
	run(t, "mkfs.ext4", "-q", d.Path())
	dir := t.TempDir()
	run(t, "mount", d.Path(), dir)
	if h := Holders(d.ID()); !slices.Contains(h, "mount "+dir) {
		t.Errorf("mounted on %s: %v", dir, h)
	}
	var busy *BusyError
	if err := d.Stop(testContext(t), false); !errors.As(err, &busy) {
		t.Errorf("Stop of a mounted device: %v", err)
	}
	run(t, "umount", dir)
	run(t, "mkswap", d.Path())
	run(t, "swapon", d.Path())
	if h := Holders(d.ID()); !slices.Contains(h, "swap on "+d.Path()) {
		t.Errorf("swap: %v", h)
	}
	run(t, "swapoff", d.Path())
}

// TestVMStopUnderLoad stops a device by force while fio is at it.
func TestVMStopUnderLoad(t *testing.T) {
	d := start(t, openControl(t), Params{SizeBytes: 16 << 20, Queues: 2}, &ram{data: make([]byte, 16<<20)})
	cmd := exec.Command("fio", "--name=x", "--filename="+d.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=32",
		"--rw=randrw", "--bs=4k", "--time_based", "--runtime=1000", "--size=16m", "--allow_file_create=0")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	if err := d.Stop(testContext(t), true); err != nil {
		t.Error(err)
	}
	if err := d.Err(); err != nil {
		t.Errorf("Err after Stop: %v", err)
	}
	if cmd.Wait() == nil {
		t.Error("fio did not notice")
	}
}

// TestVMStuckStop shows that a handler which never answers makes Stop return
// with ctx, and no sooner forgotten than answered.
func TestVMStuckStop(t *testing.T) {
	var held atomic.Pointer[IO]
	got := make(chan struct{}, 1)
	stuck := atomic.Bool{}
	d := start(t, openControl(t), Params{SizeBytes: 16 << 20}, HandlerFunc(func(io *IO) {
		if stuck.Load() && held.CompareAndSwap(nil, io) {
			got <- struct{}{}
			return
		}
		io.Complete(int32(len(io.Buf)))
	}))
	stuck.Store(true)
	dd := exec.Command("dd", "if="+d.Path(), "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
	if err := dd.Start(); err != nil {
		t.Fatal(err)
	}
	<-got
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := d.Stop(ctx, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop with a stuck request: %v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("Stop took %v", took)
	}
	if err := d.reactor.Call(func() { io := held.Load(); io.Complete(int32(len(io.Buf))) }); err != nil {
		t.Fatal(err)
	}
	dd.Wait()
}

// TestVMReactorPanic recovers a device in the process that served it.
func TestVMReactorPanic(t *testing.T) {
	c := openControl(t)
	for i := range 5 {
		m := &ram{data: make([]byte, 16<<20)}
		panicked := make(chan error, 1)
		r, err := reactor.New(reactor.Config{Name: "victim", OnPanic: func(err error) { panicked <- err }})
		if err != nil {
			t.Fatal(err)
		}
		d, err := c.Add(testContext(t), Params{ID: -1, SizeBytes: 16 << 20, Queues: 2, VolatileCache: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Start(testContext(t), r, m); err != nil {
			t.Fatal(err)
		}
		load := exec.Command("fio", "--name=x", "--filename="+d.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=32",
			"--rw=randwrite", "--bs=4k", "--size=4m", "--verify=crc32c", "--verify_fatal=1", "--loops=3", "--allow_file_create=0")
		var out bytes.Buffer
		load.Stdout, load.Stderr = &out, &out
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(300+200*i) * time.Millisecond)
		r.Post(func() { panic("test") })
		<-panicked
		<-d.Done()
		if d.Err() == nil {
			t.Error("Err after a panic is nil")
		}
		d2, err := c.Recover(testContext(t), d.ID())
		if err != nil {
			t.Fatal(err)
		}
		if err := d2.Start(testContext(t), newReactor(t, 0), m); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := load.Wait(); err != nil {
			t.Errorf("fio: %v\n%s", err, out.String())
		}
		if err := d2.Delete(testContext(t), true); err != nil {
			t.Error(err)
		}
	}
}

// serve is a server process: "ID FILE SIZE [norecovery|idle]", an ID of -1 for a new
// device. The disk is FILE in memory, so it outlives the process. It prints the
// device's number when it serves, or when it could and is to be idle, and ends when the
// device does.
func serve(spec string) error {
	var id, size int
	var file, extra string
	fmt.Sscan(spec, &id, &file, &size, &extra)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	c, err := open()
	if err != nil {
		return err
	}
	r, err := reactor.New(reactor.Config{Name: "server"})
	if err != nil {
		return err
	}
	ctx := context.Background()
	var d *Device
	if id < 0 {
		d, err = c.Add(ctx, Params{ID: -1, SizeBytes: uint64(size), Queues: 2, Depth: 64, VolatileCache: true, FUA: true, NoRecovery: extra == "norecovery"})
	} else {
		d, err = c.Recover(ctx, id)
	}
	if err != nil {
		return err
	}
	if extra == "idle" {
		fmt.Println(d.ID())
		select {}
	}
	if err := d.Start(ctx, r, &ram{data: data}); err != nil {
		return err
	}
	fmt.Println(d.ID())
	<-d.Done()
	return d.Err()
}

// startServer starts a server process and returns the number of its device.
func startServer(t *testing.T, spec string) (*exec.Cmd, int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), serverEnv+"="+spec)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id int
	if _, err := fmt.Fscan(out, &id); err != nil {
		cmd.Process.Kill()
		t.Fatalf("the server does not start: %v", cmd.Wait())
	}
	return cmd, id
}

func shmFile(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join("/dev/shm", "ublk-test-"+strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(name) })
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// A victim is a server process that is killed and replaced by another one, which takes
// its device over.
type victim struct {
	*exec.Cmd
	id   int
	spec string // of the next one, with the device's number
}

// newVictim starts a server of a new device of size bytes, which goes when the test ends.
func newVictim(t *testing.T, c *Control, size int64) *victim {
	t.Helper()
	file := shmFile(t, size)
	v := new(victim)
	v.Cmd, v.id = startServer(t, fmt.Sprintf("-1 %s %d", file, size))
	v.spec = fmt.Sprintf("%d %s %d", v.id, file, size)
	t.Cleanup(func() {
		if err := c.Stop(testContext(t), v.id, true); err != nil {
			t.Error(err)
		}
		v.Wait()
		if err := c.Delete(testContext(t), v.id); err != nil {
			t.Error(err)
		}
	})
	return v
}

// kill kills the server and returns at once.
func (v *victim) kill() { v.Process.Kill() }

// replace starts the next server, of which extra is the last word of what it is told.
func (v *victim) replace(t *testing.T, extra string) {
	t.Helper()
	v.Cmd, _ = startServer(t, v.spec+" "+extra)
}

// TestVMKillServer kills the server's process under a verifying fio, again and
// again.
func TestVMKillServer(t *testing.T) {
	const size, kills = 32 << 20, 20
	c := openControl(t)
	v := newVictim(t, c, size)
	load := exec.Command("fio", "--name=x", "--filename="+blockPath(v.id), "--direct=1", "--ioengine=libaio", "--iodepth=32",
		"--rw=randwrite", "--bsrange=4k-256k", "--size=32m", "--io_size=1g", "--verify=crc32c", "--verify_fatal=1",
		"--verify_backlog=256", "--time_based", "--runtime=1000", "--allow_file_create=0")
	var out bytes.Buffer
	load.Stdout, load.Stderr = &out, &out
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- load.Wait() }()
	var slowest time.Duration
	for i := range kills {
		time.Sleep(time.Duration(100+37*i) * time.Millisecond)
		v.kill()
		if i%2 == 0 {
			v.Wait()
		} // else the next one starts while the old one dies
		begin := time.Now()
		old := v.Cmd
		v.replace(t, "")
		slowest = max(slowest, time.Since(begin))
		old.Wait()
		select {
		case err := <-exited:
			t.Fatalf("after kill %d fio ended: %v\n%s", i+1, err, out.String())
		default:
		}
		if info, err := c.Info(testContext(t), v.id); err != nil || info.State != StateLive || info.ServerPID != v.Process.Pid {
			t.Fatalf("after recovery %d: %+v, %v", i+1, info, err)
		}
	}
	t.Logf("%d kills; the slowest recovery took %v", kills, slowest)
	load.Process.Signal(os.Interrupt)
	// fio ends with status 128 after an interrupt, and says whether all was well.
	if err := <-exited; !strings.Contains(out.String(), " err= 0:") || strings.Contains(out.String(), "verify:") {
		t.Errorf("fio: %v\n%s", err, out.String())
	}
}

// TestVMKillInRecovery kills a server that has begun a recovery and not offered anything
// yet, twice: the next one gets the device.
func TestVMKillInRecovery(t *testing.T) {
	const size = 8 << 20
	c := openControl(t)
	v := newVictim(t, c, size)
	for _, extra := range []string{"idle", "idle", ""} {
		v.kill()
		v.Wait()
		v.replace(t, extra)
	}
	if out, err := exec.Command("dd", "if="+blockPath(v.id), "of=/dev/null", "bs=1M", "iflag=direct").CombinedOutput(); err != nil {
		t.Errorf("read the device: %v\n%s", err, out)
	}
}

// TestVMKillWithoutRecovery: nothing of a device without recovery stays.
func TestVMKillWithoutRecovery(t *testing.T) {
	file := shmFile(t, 16<<20)
	c := openControl(t)
	server, id := startServer(t, fmt.Sprintf("-1 %s %d norecovery", file, 16<<20))
	server.Process.Kill()
	server.Wait()
	for deadline := time.Now().Add(10 * time.Second); exists(blockPath(id)); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the block device stays")
		}
	}
	if _, err := c.Recover(testContext(t), id); !errors.Is(err, ErrNotRecoverable) {
		t.Errorf("Recover: %v", err)
	}
	if err := c.Delete(testContext(t), id); err != nil {
		t.Error(err)
	}
}

// TestVMRecoverLive: a device whose server lives is refused, in time.
func TestVMRecoverLive(t *testing.T) {
	c := openControl(t)
	d := start(t, c, Params{SizeBytes: 1 << 20}, &ram{data: make([]byte, 1<<20)})
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := c.Recover(ctx, d.ID())
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("Recover: %v", err)
	}
	fio(t, d.Path(), "--rw=write", "--bs=4k", "--size=64k", "--verify=crc32c")
}

// TestVMQuiescedDelete: a device that waits for a server can be removed.
func TestVMQuiescedDelete(t *testing.T) {
	file := shmFile(t, 16<<20)
	c := openControl(t)
	server, id := startServer(t, fmt.Sprintf("-1 %s %d", file, 16<<20))
	server.Process.Kill()
	server.Wait()
	for {
		info, err := c.Info(testContext(t), id)
		if err != nil {
			t.Fatal(err)
		}
		if info.State == StateQuiesced {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := c.Stop(testContext(t), id, false); err != nil {
		t.Error(err)
	}
	if err := c.Delete(testContext(t), id); err != nil {
		t.Error(err)
	}
}

// TestVMLegacy uses the command numbers of kernels before 6.4, which newer ones
// take too if they were built so.
func TestVMLegacy(t *testing.T) {
	c := openControl(t)
	c.legacy = true
	if _, err := c.Info(testContext(t), 999); !errors.Is(err, ErrNoDevice) {
		t.Skipf("no legacy commands: %v", err)
	}
	m := &ram{data: make([]byte, 16<<20)}
	d := start(t, c, Params{SizeBytes: 16 << 20}, m)
	fio(t, d.Path(), "--rw=randwrite", "--bs=4k", "--size=1m", "--verify=crc32c")
}

// TestVMAllocs counts allocations of the whole process while fio runs.
func TestVMAllocs(t *testing.T) {
	m := &ram{data: make([]byte, 16<<20)}
	d := start(t, openControl(t), Params{SizeBytes: 16 << 20}, m)
	cmd := exec.Command("fio", "--name=x", "--filename="+d.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=32",
		"--rw=randrw", "--bs=4k", "--size=16m", "--time_based", "--runtime=1000", "--allow_file_create=0")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	time.Sleep(2 * time.Second)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	ios := m.reads.Load() + m.writes.Load()
	time.Sleep(3 * time.Second)
	ios = m.reads.Load() + m.writes.Load() - ios
	runtime.ReadMemStats(&after)
	allocs := after.Mallocs - before.Mallocs
	t.Logf("%d allocations in %d requests", allocs, ios)
	if ios < 1000 || allocs > uint64(ios)/100 {
		t.Errorf("%d allocations in %d requests", allocs, ios)
	}
}

// sized is a Null that counts requests with data and those that came with a buffer.
type sized struct{ ios, bufs atomic.Int64 }

func (s *sized) Handle(io *IO) {
	if io.Op <= OpWrite {
		s.ios.Add(1)
	}
	if io.Buf != nil {
		s.bufs.Add(1)
	}
	Null{}.Handle(io)
}

// TestVMNoData: no data is copied for a handler that does not want any, where the kernel
// can leave it out, and requests end as ever.
func TestVMNoData(t *testing.T) {
	for _, forgo := range []Features{0, FeatureUserCopy, FeatureBatchIO} {
		t.Run("without "+forgo.String(), func(t *testing.T) {
			c := openControl(t)
			c.Forgo(forgo)
			h := new(sized)
			d := start(t, c, Params{SizeBytes: 64 << 20, Queues: 2, MaxDiscardBytes: 1 << 20, VolatileCache: true, NoData: true}, h)
			want := (c.features &^ forgo).Has(FeatureUserCopy)
			p, err := c.Params(testContext(t), d.ID())
			if err != nil || p.NoData != want {
				t.Errorf("Params: %+v, %v", p, err)
			}
			fio(t, d.Path(), "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bssplit=4k/80:1m/20", "--size=64m")
			run(t, "blkdiscard", "-o", "0", "-l", "4194304", d.Path())
			run(t, "blockdev", "--flushbufs", d.Path())
			if ios, bufs := h.ios.Load(), h.bufs.Load(); ios == 0 || (bufs == 0) != want {
				t.Errorf("%d requests, of which %d had a buffer", ios, bufs)
			}
		})
	}
}
