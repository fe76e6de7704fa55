package daemon

import (
	"errors"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// TestLibraryEmpty: an image of 0 bytes is made and opened, and grows to any number of sectors, as
// a file would; nothing else is made of it before that.
func TestLibraryEmpty(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	if err := h.client().call(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: "new"}, nil); err != nil {
		t.Fatal(err)
	}
	h.makeLog("new")
	c := h.handle(wire.OpenRequest{Image: "new"})
	var st wire.StatResult
	if err := c.call(wire.Stat, nil, &st); err != nil || st.Size != 0 || c.Size() != 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := c.do(ringtest.Write, 0, make([]byte, 512)); err != unix.EINVAL {
		t.Errorf("write: %v", err)
	}
	errnoIs(t, c.call(wire.Snapshot, &wire.SnapshotRequest{Name: "s"}, nil), unix.EINVAL)
	errnoIs(t, c.call(wire.Copy, &wire.CopyRequest{Store: libraryURL, Image: "copy"}, nil), unix.EINVAL)
	h.crash()
	h.start()
	if err := c.open(wire.OpenRequest{Image: "new"}); err == nil {
		t.Error("opened on a connection that has ended")
	}
	c = h.handle(wire.OpenRequest{Image: "new", Flags: wire.OpenAgain, ID: st.ID})
	for _, size := range []uint64{512, 5 * 512, 1<<20 + 512} {
		if err := c.call(wire.Resize, &wire.ResizeRequest{Size: size}, nil); err != nil {
			t.Fatal(err)
		}
		c.write(size-512, 512, byte(size>>9))
	}
	c.check(512, 4*512-512, 0)
	c.check(4*512, 512, 5)
	errnoIs(t, c.call(wire.Resize, &wire.ResizeRequest{Size: 0, Shrink: true}, nil), unix.EINVAL)
	c.snapshot("s")

	if err := h.client().call(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: "empty"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := h.attach(t.Context(), api.AttachRequest{Image: libraryURL + "/empty", ID: -1}, func(api.Progress) {}); !errors.Is(err, engine.ErrEmpty) {
		t.Errorf("as a block device: %v", err)
	}
}
