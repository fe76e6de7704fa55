package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

const (
	controlPath = "/dev/ublk-control"
	charClass   = "/sys/class/ublk-char"

	// pollInterval is the time between two looks at what has no event.
	pollInterval = 5 * time.Millisecond
	// nodeTimeout bounds the wait for a device node, which threads of the kernel's and
	// udev make: on a busy host they take seconds.
	nodeTimeout = 30 * time.Second
)

// Errors that callers may want to tell apart.
var (
	// ErrNoDriver says that the kernel has no ublk driver, or has not loaded it.
	ErrNoDriver = errors.New("the kernel's ublk driver is not there: modprobe ublk_drv (Linux 6.1 or newer, CONFIG_BLK_DEV_UBLK)")
	// ErrNoDevice says that there is no device of that number.
	ErrNoDevice = errors.New("no such ublk device")
	// ErrNotRecoverable says that a device has nothing to be recovered: it was
	// never started, has been stopped, or was made without recovery.
	ErrNotRecoverable = errors.New("the ublk device cannot be recovered")
)

// Control is the driver's control device. Its methods may be called from any
// goroutine but a reactor's (they block), several at a time.
type Control struct {
	f        *os.File
	features Features
	forgone  Features // not used for new devices; see Forgo
	legacy   bool     // a kernel before 6.4: commands without ioctl encoding
}

// OpenControl opens /dev/ublk-control and asks the driver for its features.
func OpenControl() (*Control, error) {
	f, err := os.OpenFile(controlPath, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("ublk: %s: %w", controlPath, ErrNoDriver)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("ublk: only root may use ublk: %w", err)
	case err != nil:
		return nil, fmt.Errorf("ublk: open the control device: %w", err)
	}
	c := &Control{f: f}
	if err := c.probe(); err != nil {
		f.Close()
		return nil, err
	}
	return c, nil
}

// Close closes the control device. Devices live on.
func (c *Control) Close() error {
	if err := c.f.Close(); err != nil {
		return fmt.Errorf("ublk: close the control device: %w", err)
	}
	return nil
}

// probe finds out what the driver can do. Kernels before 6.5 have no
// GET_FEATURES, those before 6.4 no ioctl encoding either; both still take
// commands by their old numbers, and have recovery.
func (c *Control) probe() error {
	buf := make([]byte, featuresLen)
	_, err := c.do(context.Background(), cmdGetFeatures, ctrlCmd{DevID: anyID}, buf)
	switch {
	case err == nil:
		c.features = Features(binary.NativeEndian.Uint64(buf))
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		c.legacy = true
		c.features = FeatureRecovery | FeatureReissue
	default:
		return err
	}
	return nil
}

// Forgo makes devices that are added from now on do without f as far as the driver leaves
// the choice: for comparisons, and in case that the driver's way to do it is broken. It is
// called before anything else.
func (c *Control) Forgo(f Features) { c.forgone |= f }

// Features returns what the driver can do.
func (c *Control) Features() (Features, error) { return c.features, nil }

// number returns the number to send for cmd.
func (c *Control) number(cmd command) uint32 {
	if c.legacy {
		cmd = cmd.legacy()
	}
	return uint32(cmd)
}

// do sends one control command and waits for its end or ctx's. buf is what the
// command reads or writes; it may be nil. The result is not negative.
//
// The kernel runs a command on a thread of its own and may take its time
// (DEL_DEV waits for the last user of the device). Each command therefore has
// a small ring of its own: commands do not wait for each other, and one that is
// given up goes on until the kernel ends it, without a hold on anything else.
func (c *Control) do(ctx context.Context, cmd command, cc ctrlCmd, buf []byte) (int, error) {
	x := &exchange{op: c.number(cmd), fd: int(c.f.Fd()), cmd: cc, in: slices.Clone(buf), ended: make(chan struct{})}
	go x.run(ctx)
	select {
	case <-x.ended:
	case <-ctx.Done():
		// A command that can be interrupted ends at once: prefer its answer.
		select {
		case <-x.ended:
		case <-time.After(200 * time.Millisecond):
			return 0, fmt.Errorf("ublk: %s: %w", cmd, context.Cause(ctx))
		}
		if x.err != nil || x.res < 0 {
			return 0, fmt.Errorf("ublk: %s: %w", cmd, context.Cause(ctx))
		}
	}
	if x.err != nil {
		return 0, fmt.Errorf("ublk: %s: %w", cmd, x.err)
	}
	if x.res < 0 {
		return 0, fmt.Errorf("ublk: %s: %w", cmd, unix.Errno(-x.res))
	}
	copy(buf, x.in)
	return int(x.res), nil
}

// exchange is one control command on its way.
type exchange struct {
	op  uint32
	fd  int
	cmd ctrlCmd
	in  []byte // the payload; the answer's once ended is closed

	ended chan struct{}
	err   error // the ring's
	res   int32
	back  bool
}

// Complete implements uring.Completer.
func (x *exchange) Complete(res int32, _ uint32) { x.res, x.back = res, true }

// run sends the command from a thread of its own and returns once the kernel
// has answered, whatever the caller does.
func (x *exchange) run(ctx context.Context) {
	defer close(x.ended)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	x.err = x.send(ctx)
}

func (x *exchange) send(ctx context.Context) error {
	ring, err := uring.New(uring.Options{Entries: 4, SQE128: true})
	if err != nil {
		return err
	}
	mem, err := uring.NewArena(max(len(x.in), 1))
	if err != nil {
		ring.Close()
		return err
	}
	copy(mem.Bytes(), x.in)
	if x.in != nil {
		x.cmd.Len = uint16(len(x.in))
		// Unsafe: the kernel is given the address of arena memory.
		x.cmd.Addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem.Bytes()))))
	}
	payload, err := binary.Append(nil, binary.NativeEndian, &x.cmd)
	if err != nil {
		panic(err) // ctrlCmd has fields of fixed size only
	}
	ring.Command(x.fd, x.op, payload, nil, x)
	err = x.await(ctx, ring)
	copy(x.in, mem.Bytes())
	if cerr := ring.Close(); err == nil {
		err = cerr
	}
	if !x.back {
		return err // the kernel may still write: leave the memory mapped
	}
	if merr := mem.Close(); err == nil {
		err = merr
	}
	return err
}

// await waits for the answer. When ctx ends first it asks the kernel to
// interrupt the command, and goes on waiting.
func (x *exchange) await(ctx context.Context, ring *uring.Ring) error {
	const look = 100 * time.Millisecond
	var cancelled bool
	for !x.back {
		if err := ring.SubmitAndWait(look); err != nil {
			return err
		}
		ring.Reap()
		if !x.back && !cancelled && ctx.Err() != nil {
			cancelled = true
			ring.CancelAll()
		}
	}
	return nil
}

// State is a device's state (UBLK_S_DEV_*, include/uapi/linux/ublk_cmd.h).
type State uint16

// The states.
const (
	StateDead     State = 0 // not started yet, or stopped
	StateLive     State = 1
	StateQuiesced State = 2 // its server is gone; requests wait for the next one
	StateFailIO   State = 3 // its server is gone; requests fail until the next one
)

// String returns the state's name.
func (s State) String() string {
	names := [...]string{"dead", "live", "quiesced", "fail-io"}
	if int(s) < len(names) {
		return names[s]
	}
	return "state " + strconv.Itoa(int(s))
}

// Info is what the driver knows of a device.
type Info struct {
	ID         int
	State      State
	Queues     int
	Depth      int
	MaxIOBytes int
	ServerPID  int // the server's process; -1 without one
	Flags      Features
}

// Path returns the block device's node.
func (i Info) Path() string { return blockPath(i.ID) }

func blockPath(id int) string { return fmt.Sprintf("/dev/ublkb%d", id) }
func charPath(id int) string  { return fmt.Sprintf("/dev/ublkc%d", id) }

// Info returns the device's state; ErrNoDevice when there is none. It does not
// touch the block device, so it answers even when the server is gone.
func (c *Control) Info(ctx context.Context, id int) (Info, error) {
	buf := make([]byte, sizeofDevInfo)
	_, err := c.do(ctx, cmdGetDevInfo, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, buf)
	if errors.Is(err, unix.EINVAL) {
		// Somebody's unprivileged device: it wants to see its path first.
		path := append([]byte(charPath(id)), 0)
		buf = append(path, buf...)
		_, err = c.do(ctx, cmdGetDevInfo2, ctrlCmd{DevID: uint32(id), QueueID: noQueue, DevPathLen: uint16(len(path))}, buf)
		buf = buf[len(path):]
	}
	if err != nil {
		return Info{}, noDevice(id, err)
	}
	return decodeInfo(buf)
}

// noDevice turns the driver's ways of saying that there is no device id into
// ErrNoDevice.
func noDevice(id int, err error) error {
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) && !exists(filepath.Join(charClass, "ublkc"+strconv.Itoa(id))) {
		return fmt.Errorf("ublk: device %d: %w", id, ErrNoDevice)
	}
	return err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func decodeInfo(buf []byte) (Info, error) {
	var d devInfo
	if _, err := binary.Decode(buf, binary.NativeEndian, &d); err != nil {
		return Info{}, fmt.Errorf("ublk: decode device info: %w", err)
	}
	return Info{
		ID:         int(d.DevID),
		State:      State(d.State),
		Queues:     int(d.Queues),
		Depth:      int(d.Depth),
		MaxIOBytes: int(d.MaxIOBytes),
		ServerPID:  int(d.ServerPID),
		Flags:      Features(d.Flags),
	}, nil
}

// Params returns the device's parameters, as far as the driver keeps them.
func (c *Control) Params(ctx context.Context, id int) (Params, error) {
	info, err := c.Info(ctx, id)
	if err != nil {
		return Params{}, err
	}
	buf := make([]byte, sizeofParams)
	binary.NativeEndian.PutUint32(buf, sizeofParams)
	if _, err := c.do(ctx, cmdGetParams, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, buf); err != nil {
		return Params{}, noDevice(id, err)
	}
	p, err := decodeParams(buf)
	if err != nil {
		return Params{}, err
	}
	p.ID, p.Queues, p.Depth = id, info.Queues, info.Depth
	p.NoRecovery = !info.Flags.Has(FeatureRecovery)
	p.NoData = info.Flags.Has(FeatureUserCopy)
	return p, nil
}

// List returns all ublk devices of this host, by number, whoever serves them.
func (c *Control) List(ctx context.Context) ([]Info, error) {
	entries, err := os.ReadDir(charClass)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the class comes with the first device
	}
	if err != nil {
		return nil, fmt.Errorf("ublk: list devices: %w", err)
	}
	var list []Info
	for _, e := range entries {
		id, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "ublkc"))
		if err != nil {
			continue
		}
		info, err := c.Info(ctx, id)
		if errors.Is(err, ErrNoDevice) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, info)
	}
	slices.SortFunc(list, func(a, b Info) int { return a.ID - b.ID })
	return list, nil
}

// Stop takes the block device away: requests in flight end, later ones fail.
// Unless force is set, a device that is in use is left alone and the error is
// a *BusyError. The kernel waits for requests that the server has, so the
// server must be running or gone, not hung; ctx bounds the wait.
//
// For a device of this process use Device.Stop.
func (c *Control) Stop(ctx context.Context, id int, force bool) error {
	cmd := cmdStopDev
	if !force {
		info, err := c.Info(ctx, id)
		if err != nil {
			return err
		}
		// TRY_STOP_DEV takes the disk's open_mutex, which a partition scan
		// holds for ever when its reads wait for a server that is gone.
		if c.features.Has(FeatureSafeStop) && info.State == StateLive {
			cmd = cmdTryStopDev
		} else if h := Holders(id); len(h) != 0 {
			return &BusyError{ID: id, Holders: h}
		}
	}
	_, err := c.do(ctx, cmd, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, nil)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return &BusyError{ID: id, Holders: Holders(id)}
	case cmd == cmdTryStopDev && errors.Is(err, unix.ENODEV):
		// There is no disk: not started, stopped, or no such device. Only the
		// plain command tells, and cancels what a server has waiting.
		_, err = c.do(ctx, cmdStopDev, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, nil)
	}
	return noDevice(id, err)
}

// Delete removes the device (stopping it by force if it was not stopped) and
// waits until its number is free, which takes until the last user has closed
// it. When ctx ends before, the error is a *BusyError that says who holds it;
// the device is then already out of service and vanishes with its last user.
//
// For a device of this process use Device.Delete.
func (c *Control) Delete(ctx context.Context, id int) error {
	_, err := c.do(ctx, cmdDelDev, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, nil)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return &BusyError{ID: id, Holders: Holders(id), Err: context.Cause(ctx)}
	}
	return noDevice(id, err)
}

// DeleteAsync is Delete without the wait. Kernels before 6.8 do not have it:
// the error is then EOPNOTSUPP.
func (c *Control) DeleteAsync(ctx context.Context, id int) error {
	_, err := c.do(ctx, cmdDelDevAsync, ctrlCmd{DevID: uint32(id), QueueID: noQueue}, nil)
	return noDevice(id, err)
}

// awaitNode waits until path is a node of the given type (unix.S_IFBLK, ...)
// and the kernel's device. devtmpfs and udev make nodes a moment after the
// kernel has made the device.
func awaitNode(ctx context.Context, path string, mode uint32) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil && st.Mode&unix.S_IFMT == mode {
			return nil
		}
		if err == nil {
			err = errors.New("not a device node")
		}
		if serr := sleep(ctx, pollInterval); serr != nil {
			return fmt.Errorf("ublk: %s does not appear (is devtmpfs mounted?): %w", path, err)
		}
	}
}

// sleep waits for d or until ctx ends, and returns ctx's error then.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
