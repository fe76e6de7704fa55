package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A blockDevice is one of those that are compared.
type blockDevice struct {
	name string // of the side
	path string // of its node
	// empty gives it an empty cache: what has been written need not be in the cluster
	// afterwards, unless it is lsd's, whose log has to be brought there to be empty.
	empty func(context.Context) error
	// settle brings all that has been written into the cluster.
	settle func(context.Context) error
	// rest waits until nothing is done in the background.
	rest func(context.Context) error
	// writesOnly says that its cache has only what was written, and has not been written back.
	writesOnly bool
}

// Names of images in the cluster, each as full as the others.
const (
	lsdStore       = "rados://rbd/lsd"
	bareImage      = "bare"
	bcacheImage    = "bcache"
	writecacheName = "writecache"
)

// devices are what the paper on LSVD compares: lsd, the kernel's client for RBD alone, and that
// under each of the kernel's two caches that write back. All have images of the same size and
// content in one cluster. lsd's write log and its read cache are together as large as either
// cache, files on a disk that is as those of the caches are: their files are beside each other on
// the machine outside.
type devices struct {
	h      *lab.Host
	cache  int64 // bytes of a cache
	daemon *lab.Daemon
	all    []*blockDevice
}

// importImages makes the images, outside of the virtual machine, where it takes a tenth of the
// time: each has what the file has.
func importImages(ctx context.Context, h *lab.Host, file string) error {
	for _, tool := range []string{"make-bcache", "dmsetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("there is no %s: run scripts/setup bench", tool)
		}
	}
	if _, err := h.Run(ctx, h.Program("lsdctl"), "import", file, lsdStore+"/disk"); err != nil {
		return err
	}
	_, err := h.Shell(ctx, fmt.Sprintf(`
		for image in %s %s; do rbd import --no-progress --image-feature layering %s rbd/$image; done
		{ head -c %d /dev/zero; cat %[3]s; } | rbd import --no-progress --image-feature layering - rbd/%[5]s`,
		bareImage, writecacheName, file, bcacheOffset, bcacheImage))
	return err
}

// randomFile makes a file of bytes that no store makes smaller.
func randomFile(ctx context.Context, h *lab.Host, size int64) (path string, err error) {
	path = filepath.Join(h.Dir, "content")
	_, err = h.Shell(ctx, fmt.Sprintf("head -c %d /dev/urandom >%s", size, path))
	return path, err
}

// newDevices makes them in the virtual machine, of the images that importImages has made.
func newDevices(ctx context.Context, h *lab.Host, cache int64) (*devices, error) {
	d := &devices{h: h, cache: cache}
	if err := d.divideSpare(ctx); err != nil {
		return nil, err
	}
	for _, attach := range []func(context.Context) (*blockDevice, error){d.lsd, d.krbd, d.bcache, d.writecache} {
		b, err := attach(ctx)
		if err != nil {
			return nil, err
		}
		if err := awaitBlockDevice(ctx, b.path); err != nil {
			return nil, err
		}
		d.all = append(d.all, b)
		d.h.Say("%s is there", b.name)
	}
	return d, nil
}

// divideSpare makes two parts of the spare disk and writes them once, as lsd does its log: the
// file outside has no holes afterwards.
func (d *devices) divideSpare(ctx context.Context) error {
	sectors := d.cache / 512
	for i := range int64(2) {
		if err := d.shell(ctx, "addpart %s %d %d %d", d.h.Spare, i+1, 2048+i*sectors, sectors); err != nil {
			return err
		}
		d.h.Defer(func() { _ = d.shell(context.WithoutCancel(ctx), "delpart %s %d", d.h.Spare, i+1) })
		if err := d.shell(ctx, "dd if=/dev/zero of=%s%d bs=4M count=%d oflag=direct", d.h.Spare, i+1, d.cache>>22); err != nil {
			return err
		}
	}
	return nil
}

// lsd attaches an image with a log of half the cache's size; the read cache has the other half. The
// daily scrub, which would begin at once, is left out: the others have none.
func (d *devices) lsd(ctx context.Context) (*blockDevice, error) {
	half := fmt.Sprint(d.cache / 2)
	var err error
	if d.daemon, err = d.h.Daemon(ctx, "--read-cache-size", half, "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	path, err := d.daemon.Lsdctl(ctx, "add", lsdStore+"/disk", "--log-size", half)
	if err != nil {
		return nil, err
	}
	settle := func(ctx context.Context) error {
		list, err := d.daemon.Client.Images(ctx)
		if err != nil {
			return err
		}
		for _, im := range list {
			if err := d.daemon.Client.Flush(ctx, im.ID, nil); err != nil {
				return fmt.Errorf("flushing %s: %w", im.Device, err)
			}
		}
		return d.daemon.AwaitStored(ctx, settleLimit)
	}
	return &blockDevice{name: "lsd", path: strings.TrimSpace(path), settle: settle, rest: d.h.Rest, empty: func(ctx context.Context) error {
		if err := settle(ctx); err != nil {
			return err
		}
		return d.h.Rest(ctx)
	}}, nil
}

// settleLimit is how long it may take until all that was written is in the cluster.
const settleLimit = 5 * time.Minute

// shell runs a script that may wait for a device.
func (d *devices) shell(ctx context.Context, format string, args ...any) error {
	script := fmt.Sprintf(format, args...)
	_, err := within(ctx, settleLimit, script, func(ctx context.Context) (string, error) { return d.h.Shell(ctx, script) })
	return err
}

// sides returns a side of each device.
func sides[T any](d *devices, turn func(context.Context, *blockDevice, T) (lab.Figures, error)) (all []lab.Side[T]) {
	for _, b := range d.all {
		all = append(all, lab.Side[T]{Name: b.name, Turn: func(ctx context.Context, do T) (lab.Figures, error) {
			return turn(ctx, b, do)
		}})
	}
	return all
}

// fioOn runs fio on a block device.
func fioOn(ctx context.Context, h *lab.Host, path string, args ...string) (lab.Fio, error) {
	// A name in /dev that is no device would be measured as a file in memory.
	if err := isBlockDevice(path); err != nil {
		return lab.Fio{}, err
	}
	all := append([]string{"--filename=" + path, "--direct=1", "--ioengine=libaio", "--allow_file_create=0"}, args...)
	return within(ctx, settleLimit, "fio on "+path, func(ctx context.Context) (lab.Fio, error) {
		return h.Fio(ctx, all...)
	})
}

// isBlockDevice returns an error unless the path is a block device's.
func isBlockDevice(path string) error {
	fi, err := os.Stat(path)
	if err == nil && fi.Mode().Type() != os.ModeDevice {
		err = fmt.Errorf("%s is no block device", path)
	}
	return err
}

// awaitBlockDevice waits until a device's node is there.
func awaitBlockDevice(ctx context.Context, path string) error {
	return lab.Await(ctx, path+" is a block device", 10*time.Second, func() (bool, error) {
		return isBlockDevice(path) == nil, nil
	})
}

// timed returns how long something takes.
func timed(do func() error) (time.Duration, error) {
	began := time.Now()
	err := do()
	return time.Since(began), err
}

// within does something that may wait for a device in the kernel, where nothing ends it: then it
// is left behind.
func within[T any](ctx context.Context, limit time.Duration, what string, do func(context.Context) (T, error)) (T, error) {
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := do(ctx)
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.v, r.err
	case <-time.After(10 * time.Second):
		var none T
		return none, fmt.Errorf("%s: it has not ended within %v, nor when it was killed", what, limit)
	}
}

// tell writes to a file of the kernel's.
func tell(ctx context.Context, path, text string) error {
	_, err := within(ctx, time.Minute, "writing to "+path, func(context.Context) (int, error) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		return f.WriteString(text)
	})
	if err != nil {
		return fmt.Errorf("telling the kernel %q: %w", text, err)
	}
	return nil
}
