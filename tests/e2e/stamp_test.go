//go:build e2e

package e2e

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Stamped writes tell what a disk has kept of what was written to it.
//
// Eight writers, each with an area of its own, count their writes; a writer does
// one at a time. Write k of a writer is 1 to 16 blocks long and goes to the
// beginning of one of the writer's slots of 16 blocks; which one, and how long it
// is, follows from k. Each block says which write it is part of, and how many
// writes of each writer had been acknowledged when that write was begun.
//
// So of any state of the disk one can say
//   - K, the last write that is there, for each writer;
//   - that each slot looks exactly as the writes 1 to K leave it, in order and
//     none of them in part;
//   - that whatever had been acknowledged before some write began is there if
//     that write is: the state is a prefix.
const (
	stampWriters = 8
	stampBlock   = 4096
	slotBlocks   = 16
	slotSize     = slotBlocks * stampBlock
	stampMagic   = 0x6c73642d7374616d // "lsd-stam"
)

// toolEnv makes the test binary run as a process of its own: reads and writes of
// a block device whose server is dead cannot be killed, and must not be ours.
const toolEnv = "LSD_E2E_TOOL"

type vector [stampWriters]uint64

// stampPlan says what is written where.
type stampPlan struct {
	Seed  uint64 `json:"seed"`
	Slots uint64 `json:"slots"` // of each writer
	Base  int64  `json:"base"`  // where on the disk it begins
	Pause int    `json:"pause"` // microseconds after each write
	Sync  int    `json:"sync"`  // milliseconds between two flushes; 0: none
	Log   string `json:"log"`   // file that gets a line after each flush
	FUA   bool   `json:"fua"`   // one write in 16 with FUA
}

// size returns the bytes of the disk that the plan writes to.
func (p stampPlan) size() uint64 { return stampWriters * p.Slots * slotSize }

func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// place returns where write k of writer w goes, and its length in blocks.
func (p stampPlan) place(w int, k uint64) (offset int64, slot uint64, blocks int) {
	h := mix(p.Seed<<40 ^ uint64(w)<<36 ^ k)
	slot = h % p.Slots
	blocks = 1
	if h>>60 < 6 { // most writes are small
		blocks = 1 + int(h>>50%slotBlocks)
	}
	return p.Base + int64((uint64(w)*p.Slots+slot)*slotSize), slot, blocks
}

// A stamp is the beginning of each block.
type stamp struct {
	Magic, Seed   uint64
	Writer, Block uint64
	Write         uint64
	Acked         vector
	Sum           uint32 // of the block, as long as it is 0
}

const stampBytes = 8*5 + 8*stampWriters + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s *stamp) encode(b []byte) {
	for i := stampBytes &^ 7; i < stampBlock; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], s.Seed^s.Write<<24^s.Writer<<16^s.Block<<12^uint64(i)*0x9e3779b97f4a7c15)
	}
	_, _ = binary.Encode(b, binary.LittleEndian, s)
	binary.LittleEndian.PutUint32(b[stampBytes-4:], 0)
	binary.LittleEndian.PutUint32(b[stampBytes-4:], crc32.Checksum(b[:stampBlock], castagnoli))
}

// decode returns false for a block of zeroes.
func (s *stamp) decode(b []byte) (bool, error) {
	if allZero(b) {
		return false, nil
	}
	if _, err := binary.Decode(b, binary.LittleEndian, s); err != nil {
		return false, err
	}
	if s.Magic != stampMagic {
		return false, fmt.Errorf("no stamp: % x", b[:32])
	}
	binary.LittleEndian.PutUint32(b[stampBytes-4:], 0)
	if sum := crc32.Checksum(b, castagnoli); sum != s.Sum {
		return false, fmt.Errorf("block of write %d of writer %d: its checksum is %#x, not %#x", s.Write, s.Writer, sum, s.Sum)
	}
	return true, nil
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	return true
}

// stampBoard is where a writing process tells how far it has come: shared memory,
// so that it is exact at every moment, whatever becomes of the process.
type stampBoard struct {
	Begun, Acked, Flushed [stampWriters]atomic.Uint64
	Longest               atomic.Int64 // nanoseconds that a write took, since last asked
	Errors                atomic.Int64
}

func openBoard(path string) (*stampBoard, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		return nil, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*stampBoard)(unsafe.Pointer(&m[0])), nil
}

func read(v *[stampWriters]atomic.Uint64) (r vector) {
	for i := range r {
		r[i] = v[i].Load()
	}
	return r
}

func (v vector) sum() (n uint64) {
	for _, x := range v {
		n += x
	}
	return n
}

// aligned returns n bytes that may be read and written with O_DIRECT.
func aligned(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
}

// runTool is the main function of a tool's process.
func runTool(tool string) int {
	fs := flag.NewFlagSet(tool, flag.ExitOnError)
	dev := fs.String("dev", "", "")
	plan := fs.String("plan", "", "")
	board := fs.String("board", "", "")
	report := fs.String("report", "", "")
	writer := fs.Int("writer", 0, "")
	write := fs.Uint64("write", 0, "")
	_ = fs.Parse(os.Args[1:])
	var p stampPlan
	err := json.Unmarshal([]byte(*plan), &p)
	if err == nil {
		switch tool {
		case "write":
			err = p.write(*dev, *board)
		case "check":
			err = p.check(*dev, *report)
		case "read":
			err = p.readOne(*dev, *writer, *write)
		case "hold":
			err = holdLocks(*dev)
		default:
			err = fmt.Errorf("no tool %q", tool)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// write writes until SIGTERM, or until a write fails.
func (p stampPlan) write(dev, path string) error {
	board, err := openBoard(path)
	if err != nil {
		return err
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	var stop atomic.Bool
	var all sync.WaitGroup
	failed := make(chan error, stampWriters+1)
	for w := range stampWriters {
		all.Go(func() {
			if err := p.writer(dev, w, board, &stop); err != nil {
				board.Errors.Add(1)
				failed <- err
				stop.Store(true)
			}
		})
	}
	if p.Sync > 0 {
		all.Go(func() {
			if err := p.flusher(dev, board, &stop); err != nil {
				board.Errors.Add(1)
				failed <- err
				stop.Store(true)
			}
		})
	}
	ended := make(chan struct{})
	go func() { all.Wait(); close(ended) }()
	select {
	case <-term:
		stop.Store(true)
		<-ended
	case <-ended:
	}
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

func (p stampPlan) writer(dev string, w int, board *stampBoard, stop *atomic.Bool) error {
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dev, err)
	}
	defer unix.Close(fd)
	fua, err := unix.Open(dev, unix.O_RDWR|unix.O_DIRECT|unix.O_DSYNC|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dev, err)
	}
	defer unix.Close(fua)
	buf, err := aligned(slotSize)
	if err != nil {
		return err
	}
	s := stamp{Magic: stampMagic, Seed: p.Seed, Writer: uint64(w)}
	for k := board.Acked[w].Load() + 1; !stop.Load(); k++ {
		offset, _, blocks := p.place(w, k)
		s.Write, s.Acked = k, read(&board.Acked)
		for b := range blocks {
			s.Block = uint64(b)
			s.encode(buf[b*stampBlock:])
		}
		board.Begun[w].Store(k)
		f := fd
		if p.FUA && k%16 == 0 {
			f = fua
		}
		began := time.Now()
		if n, err := unix.Pwrite(f, buf[:blocks*stampBlock], offset); err != nil || n != blocks*stampBlock {
			return fmt.Errorf("write %d of writer %d: %d bytes, %w", k, w, n, err)
		}
		took := int64(time.Since(began))
		for old := board.Longest.Load(); took > old && !board.Longest.CompareAndSwap(old, took); {
			old = board.Longest.Load()
		}
		board.Acked[w].Store(k)
		if f == fua {
			if err := p.tell(w, k); err != nil {
				return err
			}
		}
		if p.Pause > 0 {
			time.Sleep(time.Duration(p.Pause) * time.Microsecond)
		}
	}
	return nil
}

// flusher flushes the disk now and then, and tells what must be there for ever.
func (p stampPlan) flusher(dev string, board *stampBoard, stop *atomic.Bool) error {
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for !stop.Load() {
		time.Sleep(time.Duration(p.Sync) * time.Millisecond)
		acked := read(&board.Acked)
		if err := unix.Fdatasync(fd); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		for w, k := range acked {
			board.Flushed[w].Store(max(k, board.Flushed[w].Load()))
		}
		if err := p.line(acked); err != nil {
			return err
		}
	}
	return nil
}

// tell says that a write with FUA is done.
func (p stampPlan) tell(w int, k uint64) error {
	var v vector
	v[w] = k
	return p.line(v)
}

// line appends what is on stable media to the plan's log with one write, which is
// in the host's hands when it returns.
func (p stampPlan) line(v vector) error {
	if p.Log == "" {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(p.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Close())
}

// promised returns what the plan's log says to be on stable media.
func (p stampPlan) promised() (m vector, lines int, err error) {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return m, 0, err
	}
	for l := range strings.Lines(string(b)) {
		if !strings.HasSuffix(l, "\n") {
			continue // the power went
		}
		var v vector
		if err := json.Unmarshal([]byte(l), &v); err != nil {
			return m, 0, fmt.Errorf("%s: %w", p.Log, err)
		}
		lines++
		for w := range m {
			m[w] = max(m[w], v[w])
		}
	}
	return m, lines, nil
}

// check reads the disk and writes to report which writes are there. It fails
// when the state is not one that writes in order have left.
func (p stampPlan) check(dev, report string) error {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dev, err)
	}
	defer unix.Close(fd)
	buf, err := aligned(1 << 20)
	if err != nil {
		return err
	}
	found := make([]stamp, p.size()/stampBlock)
	for at := int64(0); at < int64(p.size()); {
		n, err := unix.Pread(fd, buf[:min(len(buf), int(int64(p.size())-at))], p.Base+at)
		if err != nil || n <= 0 || n%stampBlock != 0 {
			return fmt.Errorf("read at %d: %d bytes, %w", at, n, err)
		}
		for b := 0; b < n; b += stampBlock {
			i := (at + int64(b)) / stampBlock
			if _, err := found[i].decode(buf[b : b+stampBlock]); err != nil {
				return fmt.Errorf("block %d: %w", i, err)
			}
		}
		at += int64(n)
	}
	last, err := p.judge(found)
	if err != nil {
		return err
	}
	b, err := json.Marshal(last)
	if err != nil {
		return err
	}
	return os.WriteFile(report, b, 0o644)
}

// judge returns the last write of each writer that is there.
func (p stampPlan) judge(found []stamp) (last vector, err error) {
	for _, s := range found {
		if s.Magic != 0 && s.Writer < stampWriters {
			last[s.Writer] = max(last[s.Writer], s.Write)
		}
	}
	want := make([]uint64, p.Slots*slotBlocks)
	for w := range stampWriters {
		clear(want)
		for k := uint64(1); k <= last[w]; k++ {
			_, slot, blocks := p.place(w, k)
			for b := range uint64(blocks) {
				want[slot*slotBlocks+b] = k
			}
		}
		base := w * len(want)
		for i, k := range want {
			s := found[base+i]
			if s.Write != k || k != 0 && (s.Writer != uint64(w) || s.Seed != p.Seed || s.Block != uint64(i%slotBlocks)) {
				return last, fmt.Errorf("writer %d: write %d is there, but its block %d of slot %d is of write %d (writer %d, block %d, seed %d), not of write %d",
					w, last[w], i%slotBlocks, i/slotBlocks, s.Write, s.Writer, s.Block, s.Seed, k)
			}
			for o := range stampWriters {
				if s.Acked[o] > last[o] {
					return last, fmt.Errorf("write %d of writer %d is there, which began after write %d of writer %d had been acknowledged; of that one there are only %d",
						k, w, s.Acked[o], o, last[o])
				}
			}
		}
	}
	return last, nil
}

// readOne reads where the write k of writer w went, which must be there, or one
// that is newer.
func (p stampPlan) readOne(dev string, w int, k uint64) error {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dev, err)
	}
	defer unix.Close(fd)
	buf, err := aligned(slotSize)
	if err != nil {
		return err
	}
	offset, _, blocks := p.place(w, k)
	if n, err := unix.Pread(fd, buf[:blocks*stampBlock], offset); err != nil || n != blocks*stampBlock {
		return fmt.Errorf("read of write %d of writer %d: %d bytes, %w", k, w, n, err)
	}
	var s stamp
	for b := range blocks {
		if there, err := s.decode(buf[b*stampBlock : (b+1)*stampBlock]); err != nil || !there || s.Write < k {
			return fmt.Errorf("write %d of writer %d: block %d is of write %d, %w", k, w, b, s.Write, err)
		}
	}
	return nil
}

// tool starts a tool's process.
func (p stampPlan) tool(t testing.TB, name string, args ...string) *process {
	t.Helper()
	plan, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	pr, err := spawn([]string{toolEnv + "=" + name}, "/proc/self/exe", append([]string{"-plan", string(plan)}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return pr
}

// A stamper is a process that writes.
type stamper struct {
	*process
	plan  stampPlan
	board *stampBoard
	t     testing.TB
}

// startStamps starts to write to a device.
func startStamps(t testing.TB, dev string, p stampPlan) *stamper {
	t.Helper()
	path := filepath.Join(runDir, fmt.Sprintf("board.%d", requests.Add(1)))
	board, err := openBoard(path)
	if err != nil {
		t.Fatal(err)
	}
	s := &stamper{p.tool(t, "write", "-dev", dev, "-board", path), p, board, t}
	t.Cleanup(s.kill)
	return s
}

func (s *stamper) acked() vector { return read(&s.board.Acked) }

// awaitWrites waits until so many more writes have been acknowledged.
func (s *stamper) awaitWrites(n uint64, timeout time.Duration) {
	s.t.Helper()
	goal := s.acked().sum() + n
	began := time.Now()
	for s.acked().sum() < goal {
		if !s.running() {
			s.t.Fatal("the writer ended: ", s.wait(0).err())
		}
		if time.Since(began) > timeout {
			s.t.Fatalf("%d writes, not %d, within %v", s.acked().sum()-goal+n, n, timeout)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// stop ends the writer, none of whose writes may have failed, and returns what
// was acknowledged.
func (s *stamper) stop() vector {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	if r := s.wait(time.Minute); r.err() != nil {
		s.t.Fatal(r.err())
	}
	return s.acked()
}

// stamps checks a device and returns the last write of each writer that is there.
func stamps(t testing.TB, dev string, p stampPlan) (last vector) {
	t.Helper()
	report := filepath.Join(runDir, fmt.Sprintf("report.%d", requests.Add(1)))
	if r := p.tool(t, "check", "-dev", dev, "-report", report).wait(2 * time.Minute); r.err() != nil {
		t.Fatal(r.err())
	}
	b, err := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(b, &last)
	}
	if err != nil {
		t.Fatal(err)
	}
	return last
}

// atLeast fails the test unless all writes of want are in got.
func atLeast(t testing.TB, what string, got, want vector) {
	t.Helper()
	for w := range want {
		if got[w] < want[w] {
			t.Errorf("%s: writer %d: its first %d writes are there, but %d must be (%v, want %v)", what, w, got[w], want[w], got, want)
			return
		}
	}
}
