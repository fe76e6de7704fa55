package main

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/internal/uring"
)

// disk is an image that a test writes to as its users would, without a daemon and a device.
type disk struct {
	t   *testing.T
	url string
	st  backend.Store
	id  uuid.UUID
	log string // path of the write log
	f   *writelog.OSFile
	r   *reactor.Reactor
	mem *uring.Arena
	im  *engine.Image // nil when it is not attached
}

// diskEnv joins a reactor to the engine.
type diskEnv struct{ *reactor.Reactor }

func (e diskEnv) AfterFunc(d time.Duration, fn func()) engine.Timer {
	return e.Reactor.AfterFunc(d, fn)
}

func (diskEnv) LeaseUntil(time.Duration) {}

// newDisk returns the image of that URL, not attached.
func newDisk(t *testing.T, url string) *disk {
	t.Helper()
	u, name, err := backend.ParseImage(url)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, url: url, st: opened(t, u.String()), log: filepath.Join(t.TempDir(), "log")}
	if d.id, err = backend.Lookup(t.Context(), d.st, name); err != nil {
		t.Fatal(err)
	}
	if err := writelog.MakeFile(t.Context(), d.log, writelog.MinSize, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.detach)
	return d
}

// attach opens the image.
func (d *disk) attach() {
	d.t.Helper()
	ctx := context.Background()
	var err error
	if d.f, err = writelog.OpenFile(ctx, d.log); err != nil {
		d.t.Fatal(err)
	}
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	if d.im, err = engine.Open(ctx, d.st, d.id, engine.OpenOptions{Log: d.f, URL: d.url, Host: "here", Config: engine.Config{Logger: quiet}}); err != nil {
		d.t.Fatal(err)
	}
	if d.mem, err = uring.NewArena(2 * writelog.SegmentSize); err != nil {
		d.t.Fatal(err)
	}
	if d.r, err = reactor.New(reactor.Config{Name: "disk"}); err != nil {
		d.t.Fatal(err)
	}
	d.on(func() {
		d.im.Start(diskEnv{d.r}, d.r.File(d.f.Fd()), d.mem.Bytes())
		d.r.OnTurn(d.im.EndTurn)
	})
}

// on runs fn on the reactor.
func (d *disk) on(fn func()) {
	d.t.Helper()
	if err := d.r.Call(fn); err != nil {
		d.t.Fatal(err)
	}
}

// await has fn begin something on the reactor, and waits for its end.
func (d *disk) await(fn func(done func(error))) {
	d.t.Helper()
	ended := make(chan error, 1)
	d.on(func() { fn(func(err error) { ended <- err }) })
	if err := <-ended; err != nil {
		d.t.Fatal(err)
	}
}

// detach closes the image: all of it is in the store then.
func (d *disk) detach() {
	if d.im == nil {
		return
	}
	d.await(d.im.Close)
	d.im = nil
	d.r.Stop()
	<-d.r.Done()
	d.f.Close()
	d.mem.Close()
}

type doneFunc func(*engine.Request)

func (f doneFunc) RequestDone(r *engine.Request) { f(r) }

// write writes p at a byte, or discards as many bytes.
func (d *disk) write(op engine.Op, off int, p []byte) {
	d.t.Helper()
	r := &engine.Request{Op: op, Sector: uint64(off / engine.SectorSize), Sectors: uint32(len(p) / engine.SectorSize)}
	if op == engine.Write {
		r.Buf = p
	}
	d.await(func(done func(error)) {
		r.Done = doneFunc(func(r *engine.Request) {
			if r.Err != syscall.Errno(0) {
				done(r.Err)
				return
			}
			done(nil)
		})
		d.im.Submit(r)
	})
}

// destage brings all that was written into the store.
func (d *disk) destage() {
	d.t.Helper()
	d.await(d.im.Destage)
}

// snapshot makes a snapshot of the image, attached or not.
func (d *disk) snapshot(name string) {
	d.t.Helper()
	o := engine.SnapshotOptions{}
	if d.im != nil {
		o.Nudge = func(context.Context) error {
			d.await(d.im.Refresh)
			return nil
		}
	}
	if _, err := engine.CreateSnapshot(context.Background(), d.st, d.id, name, o); err != nil {
		d.t.Fatal(err)
	}
}
