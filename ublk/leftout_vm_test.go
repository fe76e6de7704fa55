//go:build ublk

package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// What the driver offers and lsd's devices do without, each with it and without it, by a server
// that does nothing else: make bench-ublk. What came of it is in docs/benchmarks.md.

var (
	benchDisk  = flag.String("ublk.disk", "", "a block device without anything on it that may be lost: what is written goes there")
	benchTurns = flag.Int("ublk.turns", 5, "how often each is measured")
)

// bareSize is the size of a bare server's device in bytes, bareDepth the number of its tags in
// each queue.
const (
	bareSize  = 256 << 20
	bareDepth = 128
)

// cmdGetQueueAffinity is UBLK_U_CMD_GET_QUEUE_AFFINITY.
const cmdGetQueueAffinity command = ctrlR | 0x01

// bareConfig says how a bare server serves.
type bareConfig struct {
	name    string
	flags   Features
	queues  int  // the first threads have one each,
	threads int  // or several threads share the tags of the only one
	bound   bool // each thread to the processors of its queue
	disk    int  // what is written goes to this file, what is read comes from it; -1: it goes nowhere
	sum     bool // CRC32C is taken of what is written, and of what has been read
}

// bare is a server of one device. Its threads have a ring each, and know nothing of each other.
type bare struct {
	bareConfig
	*Device // which has neither a reactor nor use for its carriers
}

// bareThread is one thread of it.
type bareThread struct {
	*bare
	ring *giouring.Ring
	tags []*tag
	left int // tags that the kernel has not given back

	table *crc32.Table
	crc   uint32 // of all that was written, so that it is taken
}

// serveBare makes a device, serves it until the benchmark's end, and returns its path.
func serveBare(b *testing.B, c *Control, cfg bareConfig) string {
	b.Helper()
	s, err := addBare(testContext(b), c, cfg)
	if err != nil {
		b.Fatalf("%s: %v", cfg.name, err)
	}
	ended := make(chan error, cfg.threads)
	var offered sync.WaitGroup
	offered.Add(cfg.threads)
	for k := range cfg.threads {
		go func() { ended <- s.serve(k, &offered) }()
	}
	b.Cleanup(func() {
		if err := s.end(testContext(b), ended); err != nil {
			b.Errorf("%s: %v", cfg.name, err)
		}
	})
	offered.Wait()
	select {
	case err := <-ended:
		ended <- err
		b.Fatalf("%s: %v", cfg.name, err)
	default:
	}
	if _, err := c.do(testContext(b), cmdStartDev, ctrlCmd{DevID: uint32(s.ID()), QueueID: noQueue, Data: uint64(os.Getpid())}, nil); err != nil {
		b.Fatalf("%s: %v", cfg.name, err)
	}
	if err := awaitNode(testContext(b), s.Path(), unix.S_IFBLK); err != nil {
		b.Fatal(err)
	}
	return s.Path()
}

// addBare makes a device with exactly these flags, and what serving it takes.
func addBare(ctx context.Context, c *Control, cfg bareConfig) (*bare, error) {
	p := Params{ID: -1, SizeBytes: bareSize, Queues: cfg.queues, Depth: bareDepth, NoRecovery: true}.withDefaults()
	flags := cfg.flags | FeatureIoctlEncode
	buf, err := binary.Append(nil, binary.NativeEndian, &devInfo{
		Queues: uint16(p.Queues), Depth: uint16(p.Depth), MaxIOBytes: uint32(p.MaxIOBytes), DevID: anyID, ServerPID: int32(os.Getpid()), Flags: uint64(flags),
	})
	if err != nil {
		return nil, err
	}
	if _, err := c.do(ctx, cmdAddDev, ctrlCmd{DevID: anyID, QueueID: noQueue}, buf); err != nil {
		return nil, err
	}
	info, err := decodeInfo(buf)
	if err != nil {
		return nil, err
	}
	if !info.Flags.Has(flags) || info.Queues != p.Queues {
		return nil, fmt.Errorf("the kernel gave %d queues and %v, not %d and %v", info.Queues, info.Flags, p.Queues, flags)
	}
	if _, err := c.do(ctx, cmdSetParams, ctrlCmd{DevID: uint32(info.ID), QueueID: noQueue}, p.encode()); err != nil {
		return nil, err
	}
	d, err := c.newDevice(info, p)
	if err != nil {
		return nil, err
	}
	if err := d.open(ctx); err != nil {
		return nil, err
	}
	return &bare{cfg, d}, d.mapDescriptors()
}

// end takes the device away and waits for the threads.
func (s *bare) end(ctx context.Context, ended chan error) error {
	err := s.c.Stop(ctx, s.info.ID, true)
	for range s.threads {
		err = errors.Join(err, <-ended)
	}
	return errors.Join(err, s.Delete(ctx, true))
}

// tagsOf returns the tags of thread k: those of its queue, or each so many of the only one.
func (s *bare) tagsOf(k int) (tags []*tag) {
	for i := range s.Device.tags {
		if t := &s.Device.tags[i]; s.queues > 1 && int(t.io.Queue) == k || s.queues == 1 && i%s.threads == k {
			tags = append(tags, t)
		}
	}
	return tags
}

// serve is thread k. It returns when the kernel has given its tags back. Whatever happens it
// says, once, that it has offered them or never will.
func (s *bare) serve(k int, offered *sync.WaitGroup) (err error) {
	runtime.LockOSThread() // for good: the thread may be bound, and ends with this
	say := sync.OnceFunc(offered.Done)
	defer say()
	t := &bareThread{bare: s, ring: giouring.NewRing(), tags: s.tagsOf(k), table: crc32.MakeTable(crc32.Castagnoli)}
	if s.bound {
		if err := s.bind(k % s.queues); err != nil {
			return err
		}
	}
	if err := t.ring.QueueInit(4*bareDepth, giouring.SetupSubmitAll|giouring.SetupCoopTaskrun|giouring.SetupSingleIssuer|giouring.SetupDeferTaskrun); err != nil {
		return err
	}
	defer t.ring.QueueExit()
	if s.flags.Has(FeatureZeroCopy) {
		if _, err := t.ring.RegisterBuffersSparse(uint32(len(t.tags))); err != nil {
			return err
		}
	}
	for i := range t.tags {
		t.command(i, ioFetchReq, 0)
	}
	t.left = len(t.tags)
	if _, err := t.ring.Submit(); err != nil {
		return err
	}
	say()
	return t.loop()
}

// bind binds the thread to the processors of a queue.
func (s *bare) bind(queue int) error {
	var set unix.CPUSet
	mask := make([]byte, unsafe.Sizeof(set))
	if _, err := s.c.do(context.Background(), cmdGetQueueAffinity, ctrlCmd{DevID: uint32(s.ID()), QueueID: noQueue, Data: uint64(queue)}, mask); err != nil {
		return err
	}
	for i, bits := range mask {
		for bit := range 8 {
			if bits>>bit&1 != 0 {
				set.Set(i*8 + bit)
			}
		}
	}
	return unix.SchedSetaffinity(0, &set)
}

// loop serves.
func (t *bareThread) loop() error {
	cqes := make([]*giouring.CompletionQueueEvent, 4*bareDepth)
	for t.left > 0 {
		if _, err := t.ring.SubmitAndWait(1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		n := t.ring.PeekBatchCQE(cqes)
		for _, cqe := range cqes[:n] {
			i, ofDisk := int(cqe.UserData>>1), cqe.UserData&1 != 0
			switch {
			case ofDisk:
				t.done(i, cqe.Res)
			case cqe.Res == resOK:
				t.handle(i)
			case cqe.Res == resAbort:
				t.left--
			default:
				return fmt.Errorf("tag %d: %w", i, syscall.Errno(-cqe.Res))
			}
		}
		t.ring.CQAdvance(n)
	}
	return nil
}

// handle begins, or does, the request in a tag.
func (t *bareThread) handle(i int) {
	tag := t.tags[i]
	op := Op(binary.NativeEndian.Uint32(tag.desc[0:]))
	n := binary.NativeEndian.Uint32(tag.desc[4:]) * sectorSize
	at := binary.NativeEndian.Uint64(tag.desc[8:]) * sectorSize
	switch {
	case op > OpWrite:
		t.command(i, ioCommitAndFetchReq, 0)
		return
	case t.disk < 0:
		t.command(i, ioCommitAndFetchReq, int32(n))
		return
	}
	if op == OpWrite {
		t.check(tag.buf[:n])
	}
	e := t.sqe()
	switch zero := t.flags.Has(FeatureZeroCopy); {
	case zero && op == OpWrite: // the addresses in a buffer that a driver registers begin with 0
		e.PrepareWriteFixed(t.disk, 0, n, at, i)
	case zero:
		e.PrepareReadFixed(t.disk, 0, n, at, i)
	case op == OpWrite:
		e.PrepareWrite(t.disk, uintptr(tag.addr), n, at)
	default:
		e.PrepareRead(t.disk, uintptr(tag.addr), n, at)
	}
	e.UserData = uint64(i)<<1 | 1
}

// done ends the request in a tag that the disk has done.
func (t *bareThread) done(i int, res int32) {
	tag := t.tags[i]
	if Op(binary.NativeEndian.Uint32(tag.desc[0:])) == OpRead && res > 0 {
		t.check(tag.buf[:res])
	}
	t.command(i, ioCommitAndFetchReq, res)
}

// check takes a checksum where the server does that.
func (t *bareThread) check(p []byte) {
	if t.sum {
		t.crc ^= crc32.Checksum(p, t.table)
	}
}

// sqe returns a zeroed entry: there is room for one of each tag.
func (t *bareThread) sqe() *giouring.SubmissionQueueEntry {
	e := t.ring.GetSQE()
	*e = giouring.SubmissionQueueEntry{}
	return e
}

// command offers a tag, with the result of its request if there was one.
func (t *bareThread) command(i int, op command, res int32) {
	tag := t.tags[i]
	e := t.sqe()
	e.OpCode, e.Fd, e.Off, e.UserData = giouring.OpUringCmd, int32(t.char), uint64(t.c.number(op)), uint64(i)<<1
	// Unsafe: the payload is the last 16 bytes of an entry of 64 (struct io_uring_sqe).
	cmd := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(e), 48)), sizeofIOCmd)
	binary.NativeEndian.PutUint16(cmd[0:], tag.io.Queue)
	binary.NativeEndian.PutUint16(cmd[2:], tag.io.Tag)
	binary.NativeEndian.PutUint32(cmd[4:], uint32(res))
	switch {
	case t.flags.Has(FeatureAutoBufReg):
		e.Addr = uint64(i) // struct ublk_auto_buf_reg: the index of the ring's buffer
	case !t.flags.Has(FeatureUserCopy):
		binary.NativeEndian.PutUint64(cmd[8:], tag.addr)
	}
}

// A bareJob is what fio does.
type bareJob []string

// bareTurns measures devices side by side and prints the table.
func bareTurns(b *testing.B, title string, cases []lab.Case[bareJob], servers []bareConfig) {
	h, err := lab.NewHost(lab.Effort{Turns: *benchTurns}, "", b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close()
	c := openControl(b)
	var sides []lab.Side[bareJob]
	for _, cfg := range servers {
		path := serveBare(b, c, cfg)
		if cfg.disk >= 0 { // what is measured is no use unless it does what it says
			fio(b, path, "--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bssplit=4k/50:64k/40:1m/10", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
		}
		sides = append(sides, lab.Side[bareJob]{Name: cfg.name, Turn: func(ctx context.Context, j bareJob) (lab.Figures, error) {
			f, err := h.Fio(ctx, append([]string{"--filename=" + path, "--direct=1", "--ioengine=libaio", "--allow_file_create=0", "--time_based", "--runtime=2", fmt.Sprintf("--size=%d", bareSize)}, j...)...)
			return lab.Figures{"ops/s": f.Rate}, err
		}})
	}
	m, err := lab.Turns(context.Background(), h, cases, sides)
	if err != nil {
		b.Fatal(err)
	}
	t := m.Table("ops/s", bench.Table{Title: title, Unit: "operations a second"})
	fmt.Printf("\n%s\n", t.Markdown())
}

// BenchmarkVMZeroCopy writes to a disk: what is written is there by the driver's copy, or registered
// with the ring (UBLK_F_AUTO_BUF_REG). A copy of which a checksum is taken is what a disk with
// checksums cannot do without.
func BenchmarkVMZeroCopy(b *testing.B) {
	if *benchDisk == "" {
		b.Fatal("-ublk.disk is missing")
	}
	fd, err := unix.Open(*benchDisk, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC|unix.O_EXCL, 0)
	if err != nil {
		b.Fatalf("%s: %v", *benchDisk, err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	var cases []lab.Case[bareJob]
	for _, rw := range []string{"write", "read"} {
		for _, bs := range []string{"4k", "64k", "1m"} {
			cases = append(cases, lab.Case[bareJob]{Name: rw + " " + bs + ", depth 16", Do: bareJob{"--rw=" + rw, "--bs=" + bs, "--iodepth=16"}})
		}
	}
	bareTurns(b, "Zero copy", cases, []bareConfig{
		{name: "zero copy", flags: FeatureZeroCopy | FeatureAutoBufReg, queues: 1, threads: 1, disk: fd},
		{name: "copied", queues: 1, threads: 1, disk: fd},
		{name: "copied, CRC32C", queues: 1, threads: 1, disk: fd, sum: true},
	})
}

// BenchmarkVMThreads has nothing read and written: one thread, two that share the tags of one queue
// (UBLK_F_PER_IO_DAEMON), two with a queue each, and these bound to their queues' processors.
func BenchmarkVMThreads(b *testing.B) {
	if n := runtime.NumCPU(); n != 2 {
		b.Fatalf("there are %d processors, not two, one for each queue", n)
	}
	var cases []lab.Case[bareJob]
	for _, rw := range strings.Fields("randread randwrite") {
		for _, depth := range []int{1, 32, 128} {
			cases = append(cases, lab.Case[bareJob]{Name: fmt.Sprintf("%s 4k, depth %d", rw, depth), Do: bareJob{"--rw=" + rw, "--bs=4k", fmt.Sprintf("--iodepth=%d", depth)}})
		}
	}
	null := bareConfig{flags: FeatureUserCopy, disk: -1}
	with := func(name string, queues, threads int, bound bool) bareConfig {
		s := null
		s.name, s.queues, s.threads, s.bound = name, queues, threads, bound
		return s
	}
	bareTurns(b, "Threads of a device", cases, []bareConfig{
		with("one thread", 1, 1, false),
		with("two share a queue", 1, 2, false),
		with("two with a queue each", 2, 2, false),
		with("these bound", 2, 2, true),
	})
}
