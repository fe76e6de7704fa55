// Package ringtest is a client of a ring for tests: it plays the C library.
package ringtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Operations and flags of the submission queue, as docs/format-librbd.md has them.
const (
	Read            = 1
	Write           = 2
	Flush           = 3
	Discard         = 4
	WriteZeroes     = 5
	TooLate         = 6
	CompareAndWrite = 7

	FUA     = 1
	Decided = 2
)

// Places in the header, in bytes.
const (
	SQTail      = 64
	SQHead      = 128
	CQTail      = 192
	CQHead      = 256
	DaemonSleep = 320
	ClientSleep = 384
	ImageSize   = 448
	Changes     = 456
	DecidedBits = 512
	queues      = 4096
)

// A Request is an entry of the submission queue.
type Request struct {
	Op, Flags uint8
	Zero      uint16
	Tag       uint32
	Offset    uint64
	Length    uint64
	Data      uint64
}

// A Completion is an entry of the completion queue.
type Completion struct {
	Tag   uint32
	Flags uint32 // 1: there is a time
	Res   int64
	Until time.Duration
	At    uint64 // where a comparison has found another byte
}

// A Client is the client's side of a ring. One goroutine uses it.
type Client struct {
	Version uint32
	Entries uint32
	Data    []byte // the data area
	// Wakes counts the wake-ups of the daemon, Slept those of the client.
	Wakes, Slept int

	mem  []byte
	fds  [3]int
	tail uint32
	head uint32
}

// New maps the ring whose descriptors are fds, of which it has copies of its own.
func New(fds [3]int) (*Client, error) {
	c := &Client{fds: [3]int{-1, -1, -1}}
	for i, fd := range fds {
		var err error
		if c.fds[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	var st unix.Stat_t
	err := unix.Fstat(c.fds[0], &st)
	if err == nil {
		c.mem, err = unix.Mmap(c.fds[0], 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err == nil {
		err = c.header()
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// header checks the header.
func (c *Client) header() error {
	le, h := binary.LittleEndian, c.mem
	c.Version, c.Entries = le.Uint32(h[4:]), le.Uint32(h[8:])
	start, size := le.Uint64(h[16:]), le.Uint64(h[24:])
	switch {
	case string(h[:4]) != "LRNG" || c.Version < 1 || c.Version > 2 || le.Uint32(h[12:]) != 0:
		return fmt.Errorf("header % x", h[:16])
	case crc32.Checksum(h[:32], crc32.MakeTable(crc32.Castagnoli)) != le.Uint32(h[32:]):
		return errors.New("the header's checksum is wrong")
	case start%4096 != 0 || start < queues+uint64(c.Entries)*96 || start+size != uint64(len(h)):
		return fmt.Errorf("%d bytes of data at %d, in %d with %d entries", size, start, len(h), c.Entries)
	}
	c.Data = h[start:]
	return nil
}

// Word returns the header's word of 4 bytes at off.
func (c *Client) Word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&c.mem[off])) }

// Size returns the size of the image.
func (c *Client) Size() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&c.mem[ImageSize])))
}

// Changes returns how often the image has changed, as the daemon says.
func (c *Client) Changes() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&c.mem[Changes])))
}

// Decided reports whether the compare and write of a tag had found what it was to find.
func (c *Client) Decided(tag uint32) bool {
	return atomic.LoadUint32(c.Word(DecidedBits+int(tag/32)*4))&(1<<(tag%32)) != 0
}

// Sleep says that the client sleeps.
func (c *Client) Sleep() { atomic.StoreUint32(c.Word(ClientSleep), 1) }

// Woken waits until the daemon has woken the client, whatever for, since it said that it sleeps.
func (c *Client) Woken(timeout time.Duration) error {
	for end := time.Now().Add(timeout); atomic.LoadUint32(c.Word(ClientSleep)) != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("not woken in %v", timeout)
		}
	}
	return nil
}

// Entry returns the bytes of the submission queue's entry n.
func (c *Client) Entry(n uint32) []byte {
	at := queues + 64*int(n&(c.Entries-1))
	return c.mem[at : at+64]
}

// Queue puts requests into the submission queue without telling the daemon.
func (c *Client) Queue(reqs ...Request) {
	for _, r := range reqs {
		e, le := c.Entry(c.tail), binary.LittleEndian
		clear(e)
		e[0], e[1] = r.Op, r.Flags
		le.PutUint16(e[2:], r.Zero)
		le.PutUint32(e[4:], r.Tag)
		le.PutUint64(e[8:], r.Offset)
		le.PutUint64(e[16:], r.Length)
		le.PutUint64(e[24:], r.Data)
		c.tail++
	}
}

// Submit puts requests into the submission queue, and wakes the daemon if it sleeps.
func (c *Client) Submit(reqs ...Request) {
	c.Queue(reqs...)
	c.Publish(c.tail)
}

// Publish makes the submission queue's tail known, and wakes the daemon if it sleeps.
func (c *Client) Publish(tail uint32) {
	atomic.StoreUint32(c.Word(SQTail), tail)
	if w := c.Word(DaemonSleep); atomic.LoadUint32(w) == 1 && atomic.SwapUint32(w, 0) == 1 {
		c.Wakes++
		c.Wake()
	}
}

// Wake wakes the daemon.
func (c *Client) Wake() {
	if _, err := unix.Write(c.fds[1], []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		panic(err)
	}
}

// Full reports whether the submission queue is full.
func (c *Client) Full() bool { return c.tail-atomic.LoadUint32(c.Word(SQHead)) == c.Entries }

// Take takes a completion, if there is one.
func (c *Client) Take() (Completion, bool) {
	if atomic.LoadUint32(c.Word(CQTail)) == c.head {
		return Completion{}, false
	}
	at := queues + 64*int(c.Entries) + 32*int(c.head&(c.Entries-1))
	e, le := c.mem[at:at+32], binary.LittleEndian
	done := Completion{
		Tag:   le.Uint32(e),
		Flags: le.Uint32(e[4:]),
		Res:   int64(le.Uint64(e[8:])),
		Until: time.Duration(le.Uint64(e[16:])),
		At:    le.Uint64(e[24:]),
	}
	c.head++
	atomic.StoreUint32(c.Word(CQHead), c.head)
	return done, true
}

// Wait takes a completion, and sleeps until there is one, at most for timeout.
func (c *Client) Wait(timeout time.Duration) (Completion, error) {
	sleep := c.Word(ClientSleep)
	defer atomic.StoreUint32(sleep, 0)
	for end := time.Now().Add(timeout); ; {
		if done, ok := c.Take(); ok {
			return done, nil
		}
		atomic.StoreUint32(sleep, 1)
		if atomic.LoadUint32(c.Word(CQTail)) != c.head {
			continue
		}
		left := time.Until(end)
		if left <= 0 {
			return Completion{}, fmt.Errorf("no completion in %v", timeout)
		}
		c.Slept++
		fds := []unix.PollFd{{Fd: int32(c.fds[2]), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return Completion{}, err
		}
		var count [8]byte
		if _, err := unix.Read(c.fds[2], count[:]); err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return Completion{}, err
		}
	}
}

// Files returns the client's descriptors, in the order of ring.Memory.Files.
func (c *Client) Files() [3]int { return c.fds }

// Close unmaps the ring and closes the client's descriptors.
func (c *Client) Close() error {
	var err error
	if c.mem != nil {
		err = unix.Munmap(c.mem)
		c.mem = nil
	}
	for i, fd := range c.fds {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
			c.fds[i] = -1
		}
	}
	return err
}
