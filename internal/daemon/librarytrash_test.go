package daemon

import (
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// trash returns the images in the trash, as a client is told, one page after the other.
func (c *libraryClient) trash() (list []wire.TrashedImage) {
	c.t.Helper()
	var after uuid.UUID
	for {
		var page wire.TrashList
		if err := c.call(wire.ListTrash, &wire.TrashListRequest{Store: libraryURL, After: after}, &page); err != nil {
			c.t.Fatal(err)
		}
		if list = append(list, page.Images...); !page.More {
			return list
		}
		after = list[len(list)-1].ID
	}
}

// must fails the test where a request that has no result does.
func (c *libraryClient) must(t wire.Type, q wire.Message) {
	c.t.Helper()
	if err := c.call(t, q, nil); err != nil {
		c.t.Fatalf("%v: %v", t, err)
	}
}

// TestLibraryTrash: an image goes to the trash with those who have it open, is opened by its id
// there, is not removed before its time or while it is in use, and comes back.
func TestLibraryTrash(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	id, err := w.id("vm1")
	if err != nil {
		t.Fatal(err)
	}
	user := h.handle(wire.OpenRequest{})
	user.write(0, 4096, 1)
	c := h.client()
	move := func(keep uint64) *wire.TrashMoveRequest {
		return &wire.TrashMoveRequest{Store: libraryURL, Image: "vm1", Keep: keep}
	}
	remove := func(force bool) error {
		return c.call(wire.TrashRemove, &wire.TrashRemoveRequest{Store: libraryURL, Image: id.String(), Force: force}, nil)
	}
	restore := func(name string) *wire.TrashRestoreRequest {
		return &wire.TrashRestoreRequest{Store: libraryURL, Image: id.String(), Name: name}
	}
	errnoIs(t, c.call(wire.TrashMove, move(1<<63), nil), unix.EINVAL)
	before := time.Now().Unix()
	c.must(wire.TrashMove, move(3600))
	errnoIs(t, c.call(wire.TrashMove, move(0), nil), unix.ENOENT)
	list := c.trash()
	if len(list) != 1 || list[0].ID != id || list[0].Name != "vm1" || list[0].Moved < before || list[0].Until-list[0].Moved != 3600 {
		t.Errorf("trash: %+v", list)
	}
	var names wire.ListResult
	if err := c.call(wire.List, &wire.ListRequest{Store: libraryURL}, &names); err != nil {
		t.Fatal(err)
	}
	for _, im := range names.Images {
		if im.ID == id {
			t.Errorf("it is listed as %s", im.Name)
		}
	}
	errnoIs(t, h.client().open(wire.OpenRequest{}), unix.ENOENT)
	user.write(4096, 4096, 2)
	errnoIs(t, remove(true), unix.EBUSY)
	if err := user.close(); err != nil {
		t.Fatal(err)
	}

	// Another image has its name now, and is another one.
	c.must(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: "vm1", Size: 8 << 20})
	h.makeLog("vm1")
	other := h.handle(wire.OpenRequest{})
	other.check(0, 4096, 0)
	again := h.handle(wire.OpenRequest{Image: id.String(), Flags: wire.OpenByID})
	if again.opened.ID != id || again.opened.Name != "vm1" {
		t.Errorf("opened %+v", again.opened)
	}
	again.check(0, 4096, 1)
	again.check(4096, 4096, 2)
	again.write(8192, 4096, 3)
	again.snapshot("s")
	if err := again.close(); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, remove(false), unix.EPERM)
	errnoIs(t, remove(true), unix.ENOTEMPTY)
	errnoIs(t, c.call(wire.TrashRestore, restore(""), nil), unix.EEXIST)
	errnoIs(t, c.call(wire.TrashRestore, restore("a/b"), nil), unix.EINVAL)
	errnoIs(t, c.call(wire.TrashRestore, restore(backend.TrashName(id)), nil), unix.EINVAL)
	c.must(wire.TrashRestore, restore("back"))
	errnoIs(t, c.call(wire.TrashRestore, restore("more"), nil), unix.ENOENT)
	errnoIs(t, remove(true), unix.ENOENT)
	back := h.handle(wire.OpenRequest{Image: "back"})
	back.check(8192, 4096, 3)
	if got := back.opened; got.ID != id || got.Name != "back" {
		t.Errorf("opened %+v", got)
	}
}

// TestLibraryTrashRemove: an image that need not be kept, or is removed with force, is gone with
// its data, also just after it was open.
func TestLibraryTrashRemove(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	id, err := w.id("vm1")
	if err != nil {
		t.Fatal(err)
	}
	user, c := h.handle(wire.OpenRequest{}), h.client()
	user.write(0, 4096, 1)
	c.must(wire.TrashMove, &wire.TrashMoveRequest{Store: libraryURL, Image: "vm1"})
	if err := user.close(); err != nil {
		t.Fatal(err)
	}
	for image, want := range map[string]unix.Errno{"": unix.ENOENT, "vm1": unix.ENOENT, uuid.New().String(): unix.ENOENT} {
		errnoIs(t, c.call(wire.TrashRemove, &wire.TrashRemoveRequest{Store: libraryURL, Image: image, Force: true}, nil), want)
		errnoIs(t, c.call(wire.TrashRestore, &wire.TrashRestoreRequest{Store: libraryURL, Image: image}, nil), want)
	}
	c.must(wire.TrashRemove, &wire.TrashRemoveRequest{Store: libraryURL, Image: id.String()})
	if list := c.trash(); len(list) > 0 {
		t.Errorf("trash: %+v", list)
	}
	if _, err := engine.InTrash(t.Context(), w.store, id); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it is there: %v", err)
	}
	if list := w.newHost().client().trash(); len(list) > 0 {
		t.Errorf("trash: %+v", list)
	}
}

// TestLibraryTrashPurge: a purge removes what need not be kept at a time, leaves what is in use or
// has snapshots, goes on past that, and tells of it.
func TestLibraryTrashPurge(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c := h.client()
	trash := func(name string, keep uint64) {
		t.Helper()
		c.must(wire.TrashMove, &wire.TrashMoveRequest{Store: libraryURL, Image: name, Keep: keep})
	}
	purge := func(at int64) error {
		return c.call(wire.TrashPurge, &wire.TrashPurgeRequest{Store: libraryURL, At: at}, nil)
	}
	for _, name := range []string{"a", "b", "later", "used"} {
		c.must(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: name, Size: 8 << 20})
	}
	h.makeLog("used")
	used := h.handle(wire.OpenRequest{Image: "used"})
	trash("a", 0)
	trash("b", 0)
	trash("used", 0)
	trash("later", 3600)
	if err := purge(1); err != nil || len(c.trash()) != 4 {
		t.Errorf("purged %v, left %+v", err, c.trash())
	}
	errnoIs(t, purge(0), unix.EBUSY)
	if list := c.trash(); len(list) != 2 {
		t.Errorf("left %+v", list)
	}
	used.snapshot("s")
	if err := used.close(); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, purge(1<<62), unix.ENOTEMPTY)
	if list := c.trash(); len(list) != 1 || list[0].Name != "used" {
		t.Errorf("left %+v", list)
	}
}
