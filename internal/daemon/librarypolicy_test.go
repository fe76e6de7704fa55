package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// needRoot skips a test that makes itself, or files, others'.
func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become others")
	}
}

// allow gives the daemon a policy.
func (h *host) allow(lines ...string) {
	h.w.t.Helper()
	p, err := policy.Parse("policy", strings.Join(lines, "\n"), policy.ByName)
	if err != nil {
		h.w.t.Fatal(err)
	}
	h.guard.current.Store(p)
}

// clientOf returns a client of a user's that has said hello.
func (h *host) clientOf(uid uint32, groups ...uint32) *libraryClient {
	h.w.t.Helper()
	c := h.dialAs(&policy.Caller{UID: uid, Groups: groups})
	c.hello()
	return c
}

// childOf is what a process of another user is to do: see TestLibraryOthers.
type childOf struct {
	UID, GID int
	Groups   []int
	Does     string
	Socket   string
	Own      uuid.UUID // vm1's
	Other    uuid.UUID // vm2's
}

const libraryChildEnv = "LSD_TEST_LIBRARY_CHILD"

// TestLibraryChild is the other process of TestLibraryOthers.
func TestLibraryChild(t *testing.T) {
	text := os.Getenv(libraryChildEnv)
	if text == "" {
		t.Skip("it is run by another test")
	}
	var q childOf
	err := json.Unmarshal([]byte(text), &q)
	if err == nil {
		// Of all threads: unix.Setgroups is of the one that happens to run this.
		err = errors.Join(syscall.Setgroups(q.Groups), syscall.Setgid(q.GID), syscall.Setuid(q.UID))
	}
	if err != nil {
		t.Fatal(err)
	}
	switch q.Does {
	case "owner":
		q.owner(t)
	case "reader":
		q.reader(t)
	case "all":
		q.all(t)
	case "stranger":
		c := q.dial(t)
		errnoIs(t, c.call(wire.Hello, &wire.HelloRequest{Low: 1, High: 1}, nil), unix.EPERM)
		c.ended()
	case "shut out":
		if _, err := net.Dial("unix", q.Socket); !errors.Is(err, unix.EACCES) {
			t.Errorf("dial: %v", err)
		}
	default:
		t.Errorf("what is %q?", q.Does)
	}
}

func (q childOf) dial(t *testing.T) *libraryClient {
	t.Helper()
	conn, err := net.Dial("unix", q.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &libraryClient{t: t, conn: conn.(*net.UnixConn)}
}

func (q childOf) client(t *testing.T) *libraryClient {
	t.Helper()
	c := q.dial(t)
	c.hello()
	return c
}

// owner may read and write vm1, and nothing else.
func (q childOf) owner(t *testing.T) {
	c := q.client(t)
	if err := c.open(wire.OpenRequest{}); err != nil {
		t.Fatal(err)
	}
	c.write(1000, 5000, 7)
	c.check(1000, 5000, 7)
	c.snapshot("s")
	errnoIs(t, c.call(wire.Resize, &wire.ResizeRequest{Size: 128 << 20}, &wire.SizeResult{}), unix.EPERM)
	other := q.client(t)
	for name, o := range map[string]wire.OpenRequest{
		"another image":                              {Image: "vm2"},
		"another image, to be read":                  {Image: "vm2", Flags: wire.OpenReadOnly},
		"an image that is not there":                 {Image: "vm3"},
		"another image's id":                         {Image: q.Other.String(), Flags: wire.OpenByID},
		"an id that is not there":                    {Image: uuid.NewString(), Flags: wire.OpenByID},
		"what is no id":                              {Image: "vm1", Flags: wire.OpenByID},
		"another image, again":                       {Image: q.Other.String(), ID: q.Other, Flags: wire.OpenByID | wire.OpenAgain},
		"another image again, by a name that it may": {ID: q.Other, Flags: wire.OpenAgain},
		"another store":                              {Store: "file:///srv/other"},
		"another store, nearby":                      {Store: "file:///srv/lsd/.."},
		"another configuration":                      {Store: "rados://p?conf=/tmp/evil"},
	} {
		err := other.open(o)
		if errnoIs(t, err, unix.EPERM); t.Failed() {
			t.Fatalf("%s: %v", name, err)
		}
	}
	errnoIs(t, other.call(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: "new", Size: 1 << 20}, nil), unix.EPERM)
	for _, image := range []string{"vm1", "vm2", "vm3"} {
		errnoIs(t, other.call(wire.Remove, &wire.RemoveRequest{Store: libraryURL, Image: image}, nil), unix.EPERM)
		errnoIs(t, other.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: image, Name: "x"}, nil), unix.EPERM)
	}
	q.lists(t, other, "vm1")
	errnoIs(t, other.call(wire.List, &wire.ListRequest{Store: "file:///srv/other"}, nil), unix.EPERM)
	if err := other.open(wire.OpenRequest{Image: q.Own.String(), Flags: wire.OpenByID | wire.OpenReadOnly}); err != nil {
		t.Errorf("by its id: %v", err)
	}
	other.check(1000, 5000, 7)
}

// lists checks which images there are for a client.
func (q childOf) lists(t *testing.T, c *libraryClient, want ...string) {
	t.Helper()
	var l wire.ListResult
	if err := c.call(wire.List, &wire.ListRequest{Store: libraryURL}, &l); err != nil {
		t.Error(err)
	}
	var got []string
	for _, im := range l.Images {
		got = append(got, im.Name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed: %q, want %q", got, want)
	}
}

// reader may read both images, by a supplementary group.
func (q childOf) reader(t *testing.T) {
	c := q.client(t)
	q.lists(t, c, "vm1", "vm2")
	errnoIs(t, c.open(wire.OpenRequest{Image: "vm2"}), unix.EPERM)
	if err := c.open(wire.OpenRequest{Image: "vm2", Flags: wire.OpenReadOnly}); err != nil {
		t.Fatal(err)
	}
	c.check(0, 4096, 0)
	if err := c.do(ringtest.Write, 0, make([]byte, 512)); err != unix.EROFS {
		t.Errorf("write: %v", err)
	}
	errnoIs(t, c.call(wire.Snapshot, &wire.SnapshotRequest{Name: "s2"}, nil), unix.EPERM)
}

// all may everything.
func (q childOf) all(t *testing.T) {
	c := q.client(t)
	if err := c.call(wire.Create, &wire.CreateRequest{Store: libraryURL, Image: "new", Size: 1 << 20}, &wire.CreateResult{}); err != nil {
		t.Errorf("create: %v", err)
	}
	q.lists(t, c, "new", "vm1", "vm2")
	if err := c.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "new", Name: "newer"}, nil); err != nil {
		t.Errorf("rename: %v", err)
	}
	if err := c.call(wire.Remove, &wire.RemoveRequest{Store: libraryURL, Image: "newer"}, nil); err != nil {
		t.Errorf("remove: %v", err)
	}
	errnoIs(t, c.open(wire.OpenRequest{Image: "newer"}), unix.ENOENT)
	errnoIs(t, c.open(wire.OpenRequest{Image: uuid.NewString(), Flags: wire.OpenByID}), unix.ENOENT)
}

// serve has the daemon serve a socket under a policy, or under none, which a group may use. It is
// where everybody comes.
func (h *host) serve(group string, lines ...string) {
	t := h.w.t
	t.Helper()
	dir, err := os.MkdirTemp("", "lsd-policy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := Config{LibrarySocket: filepath.Join(dir, "run", "librbd.sock"), LibraryGroup: group}
	if len(lines) > 0 {
		cfg.LibraryPolicy = filepath.Join(dir, "policy")
		if err := os.WriteFile(cfg.LibraryPolicy, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	defer unix.Umask(unix.Umask(0o077))
	if h.guard, err = newGuard(cfg, h.logger); err != nil {
		t.Fatal(err)
	}
	ln, err := h.guard.listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go h.serveLibrary(ln)
}

// run has another process do something.
func (q childOf) run(t *testing.T, h *host) {
	t.Helper()
	q.Socket = h.guard.socket
	q.Own, _ = h.w.id("vm1")
	q.Other, _ = h.w.id("vm2")
	text, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLibraryChild$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), libraryChildEnv+"="+string(text))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s, user %d: %v: %s", q.Does, q.UID, err, out)
	}
}

// TestLibraryOthers: processes of other users can do through the socket what the policy allows
// them, and nothing else, and do not learn what there is.
func TestLibraryOthers(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	h.serve("70000",
		"allow user:65534 "+libraryURL+" vm1 read,write",
		"allow user:65534 rados://p * read",
		"allow group:70001 "+libraryURL+" vm* read",
		"allow group:70002 * * read,write,manage")
	childOf{UID: 65534, GID: 65534, Does: "owner"}.run(t, h)
	childOf{UID: 60000, GID: 60000, Groups: []int{60000, 70001}, Does: "reader"}.run(t, h)
	childOf{UID: 60000, GID: 60000, Groups: make([]int, 200, 201), Does: "stranger"}.run(t, h)
	childOf{UID: 60000, GID: 60000, Groups: append(make([]int, 200), 70002), Does: "all"}.run(t, h)
	childOf{UID: 60000, GID: 70002, Does: "all"}.run(t, h)
	childOf{UID: 60000, GID: 65534, Groups: []int{70000, 65534}, Does: "stranger"}.run(t, h)
	childOf{UID: 0, GID: 65534, Groups: []int{65534}, Does: "all"}.run(t, h)
}

// TestLibraryGroup: without a policy the socket's group may everything, and others do not even
// get at it.
func TestLibraryGroup(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	h := w.newHost()
	h.serve("70000")
	if h.guard.file {
		t.Skip("this host has a policy")
	}
	childOf{UID: 60000, GID: 60000, Groups: []int{70000}, Does: "all"}.run(t, h)
	childOf{UID: 0, GID: 0, Does: "all"}.run(t, h)
	childOf{UID: 60000, GID: 60000, Does: "shut out"}.run(t, h)
	h.guard.current.Store(new(policy.Policy)) // as if the mode had been changed by mistake
	childOf{UID: 60000, GID: 60000, Groups: []int{70000}, Does: "stranger"}.run(t, h)
}

// TestLibraryPolicyNow: what counts is the name that an image has now, and what was allowed when
// it was opened.
func TestLibraryPolicyNow(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	h.allow("allow user:7 "+libraryURL+" vm1 read,write,manage", "allow user:7 "+libraryURL+" new* manage")
	id, _ := w.id("vm1")
	c := h.clientOf(7)
	if err := c.open(wire.OpenRequest{}); err != nil {
		t.Fatal(err)
	}
	h.allow("allow user:7 " + libraryURL + " x read")
	c.write(0, 4096, 1)
	c.snapshot("s")
	errnoIs(t, h.clientOf(7).open(wire.OpenRequest{}), unix.EPERM)
	h.allow("allow user:7 "+libraryURL+" vm1 read,write,manage", "allow user:7 "+libraryURL+" new* manage")
	other := h.clientOf(7)
	errnoIs(t, other.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "vm1", Name: "vm3"}, nil), unix.EPERM)
	errnoIs(t, other.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "vm2", Name: "new"}, nil), unix.EPERM)
	if err := other.call(wire.Rename, &wire.RenameRequest{Store: libraryURL, Image: "vm1", Name: "new"}, nil); err != nil {
		t.Fatal(err)
	}
	again := wire.OpenRequest{Image: id.String(), ID: id, Flags: wire.OpenByID | wire.OpenAgain}
	errnoIs(t, other.open(wire.OpenRequest{}), unix.ENOENT) // he may know that
	errnoIs(t, other.open(wire.OpenRequest{Image: "new"}), unix.EPERM)
	errnoIs(t, other.open(wire.OpenRequest{Image: id.String(), Flags: wire.OpenByID}), unix.EPERM)
	errnoIs(t, other.open(again), unix.EPERM)
	h.allow("allow user:7 " + libraryURL + " new read,write")
	if err := other.open(again); err != nil {
		t.Errorf("again: %v", err)
	}
	other.check(0, 4096, 1)
}

// TestLibraryPolicyComesBack: a client comes back to what it had open if the policy of the next
// daemon allows it.
func TestLibraryPolicyComesBack(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	h.allow("allow user:7 " + libraryURL + " vm1 read,write")
	c := h.clientOf(7)
	if err := c.open(wire.OpenRequest{}); err != nil {
		t.Fatal(err)
	}
	c.write(0, 4096, 1)
	h.crash()
	h.start()
	h.await(firstDoor, api.StateActive)
	id, _ := w.id("vm1")
	again := wire.OpenRequest{Image: id.String(), ID: id, Flags: wire.OpenByID | wire.OpenAgain}
	h.guard.current.Store(new(policy.Policy))
	errnoIs(t, h.clientOf(7).open(again), unix.EPERM)
	h.allow("allow user:7 " + libraryURL + " vm1 read")
	errnoIs(t, h.clientOf(7).open(again), unix.EPERM)
	h.allow("allow user:7 " + libraryURL + " vm1 read,write")
	c = h.clientOf(7)
	if err := c.open(again); err != nil {
		t.Fatal(err)
	}
	c.check(0, 4096, 1)
}

// TestLibraryForgedID: who can write to a store as he likes can give an image there the id of
// one in another store. He does not get that.
func TestLibraryForgedID(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	if err := h.handle(wire.OpenRequest{}).close(); err != nil {
		t.Fatal(err)
	}
	h.allow("allow user:7 file:///srv/mine * read,write,manage") // where the same objects are
	for _, flags := range []uint32{0, wire.OpenReadOnly} {
		errnoIs(t, h.clientOf(7).open(wire.OpenRequest{Store: "file:///srv/mine", Flags: flags}), unix.EPERM)
	}
	id, _ := w.id("vm1")
	errnoIs(t, h.clientOf(7).open(wire.OpenRequest{Store: "file:///srv/mine", Image: id.String(), ID: id, Flags: wire.OpenByID | wire.OpenAgain}), unix.EPERM)
	// He may call his image as one that he may use there.
	if err := engine.Rename(context.Background(), w.store, "vm1", "mine"); err != nil {
		t.Fatal(err)
	}
	h.allow("allow user:7 file:///srv/mine * read,write,manage", "allow user:7 "+libraryURL+" mine read,write")
	errnoIs(t, h.clientOf(7).open(wire.OpenRequest{Store: "file:///srv/mine", Image: "mine"}), unix.EPERM)
	h.allow("allow user:7 file:///srv/mine * read,write,manage", "allow user:7 "+libraryURL+" vm1 read,write")
	if err := h.clientOf(7).open(wire.OpenRequest{Store: "file:///srv/mine", Image: "mine"}); err != nil {
		t.Errorf("what he may have by both names: %v", err)
	}
}

// TestLibraryStorePath: others than root do not get at a store whose directory somebody else
// could make another.
func TestLibraryStorePath(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	h := w.newHost()
	dir := t.TempDir()
	if err := os.Symlink("/srv", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	h.allow("allow user:7 * * read,write,manage")
	for _, store := range []string{"file://" + dir + "/link", "file://" + dir + "/link/lsd", "file:///tmp/lsd-which-is-not-there"} {
		errnoIs(t, h.clientOf(7).call(wire.List, &wire.ListRequest{Store: store}, nil), unix.EPERM)
		if err := h.clientOf(0).call(wire.List, &wire.ListRequest{Store: store}, &wire.ListResult{}); err != nil {
			t.Errorf("root: %s: %v", store, err)
		}
	}
	if err := h.clientOf(7).call(wire.List, &wire.ListRequest{Store: "file://" + dir}, &wire.ListResult{}); err != nil {
		t.Errorf("%s: %v", dir, err)
	}
	errnoIs(t, h.clientOf(7).call(wire.List, &wire.ListRequest{Store: "mem:"}, nil), unix.EINVAL)
}

// TestLibraryPolicyFile: a daemon does not begin with a bad policy, and one that becomes bad, or
// is lost, changes nothing. The socket's mode is as the policy needs it.
func TestLibraryPolicyFile(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	cfg := Config{LibrarySocket: filepath.Join(dir, "sock"), LibraryPolicy: filepath.Join(dir, "policy"), LibraryGroup: "70000"}
	var log syncBuffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(cfg.LibraryPolicy, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(want string) {
		t.Helper()
		if _, err := newGuard(cfg, logger); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want one line with %q", err, want)
		}
	}
	refused("policy: no such file")
	write("allow user:7 * * read\nallow everybody\n")
	refused("policy:2: a line is: allow")
	write("allow group:70000 * vm1 read\n")
	cfg.LibraryGroup = "no-such-group"
	refused("group no-such-group of the library's socket")
	cfg.LibraryGroup = "70000"

	g, err := newGuard(cfg, logger)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := g.listen()
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	u := backend.URL{Scheme: backend.SchemeFile, Dir: "/srv"}
	check := func(uid uint32, want policy.Rights, mode os.FileMode) {
		t.Helper()
		g.refresh()
		if got := g.policy().In(policy.Caller{UID: uid, Groups: []uint32{70000}}, u).Rights("vm1"); got != want {
			t.Errorf("user %d may %v, want %v", uid, got, want)
		}
		st, err := os.Stat(cfg.LibrarySocket)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != mode {
			t.Errorf("the socket's mode is %v, want %v", st.Mode(), mode)
		}
	}
	check(7, policy.Read, 0o660)
	write("allow user:7 * * read,write\nallow user:nobody-of-that-name * * read\n")
	check(7, policy.Read|policy.Write, 0o666)
	if !strings.Contains(log.String(), "policy:2: user:nobody-of-that-name") {
		t.Errorf("log: %s", log.String())
	}
	write("allow user:7 * * everything\n")
	for range 3 {
		check(7, policy.Read|policy.Write, 0o666)
	}
	if n := strings.Count(log.String(), "policy:1: "); n != 1 {
		t.Errorf("%d times in the log: %s", n, log.String())
	}
	if err := os.Remove(cfg.LibraryPolicy); err != nil {
		t.Fatal(err)
	}
	check(7, policy.Read|policy.Write, 0o666)
	write("# nobody\n")
	check(7, 0, 0o660)
}

// TestLibraryPlaces: no user takes all places.
func TestLibraryPlaces(t *testing.T) {
	p := &places{user: make(map[uint32]int)}
	n := 0
	for ; p.take(7); n++ {
	}
	if n != maxUserSessions {
		t.Errorf("a user has %d places", n)
	}
	for ; p.take(0); n++ {
	}
	if n != maxSessions || p.take(8) {
		t.Errorf("all have %d places", n)
	}
	p.give(7)
	if !p.take(8) || p.take(8) {
		t.Error("one place was given back")
	}
}

// TestLibraryPolicyOfNames: what is asked for by names and ids beside the image that is open is
// bounded by the policy as well, by the names that images have, or had before they were thrown away.
func TestLibraryPolicyOfNames(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	root := h.handle(wire.OpenRequest{})
	root.snapshot("s")
	own, others := root.mustClone("s", "own-1"), root.mustClone("s", "secret")
	h.allow("allow user:7 "+libraryURL+" vm1 read", "allow user:7 "+libraryURL+" own-* read,write,manage", "allow user:8 "+libraryURL+" own-* manage")
	c := h.clientOf(7)
	for what, err := range map[string]error{
		"a clone by a name that is not its own": c.call(wire.Clone, cloneRequest("s", "secret-2"), nil),
		"a clone of what it may not read":       h.clientOf(8).call(wire.Clone, cloneRequest("s", "own-2"), nil),
		"another's image into the trash":        c.call(wire.TrashMove, &wire.TrashMoveRequest{Store: libraryURL, Image: "secret"}, nil),
	} {
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := c.call(wire.Clone, cloneRequest("s", "own-2"), nil); err != nil {
		t.Error(err)
	}
	user := h.clientOf(7)
	if err := user.open(wire.OpenRequest{Flags: wire.OpenReadOnly}); err != nil {
		t.Fatal(err)
	}
	copied := func(name string) error {
		return user.call(wire.Copy, &wire.CopyRequest{Store: libraryURL, Image: name}, &wire.CreateResult{})
	}
	errnoIs(t, copied("secret-2"), unix.EPERM)
	errnoIs(t, user.call(wire.SetMetadata, &wire.Metadatum{Key: "k", Value: "v"}, nil), unix.EPERM)
	errnoIs(t, user.call(wire.Lock, &wire.LockRequest{Cookie: "c"}, nil), unix.EPERM)
	errnoIs(t, user.call(wire.Flatten, nil, nil), unix.EPERM)
	if err := copied("own-3"); err != nil {
		t.Error(err)
	}
	thrown := map[uuid.UUID]string{own: "own-1", others: "secret"}
	for _, name := range thrown {
		root.must(wire.TrashMove, &wire.TrashMoveRequest{Store: libraryURL, Image: name})
	}
	if list := c.trash(); len(list) != 1 || list[0].ID != own {
		t.Errorf("the trash: %+v", list)
	}
	var children wire.ChildrenResult
	if err := user.call(wire.Children, &wire.ChildrenRequest{}, &children); err != nil {
		t.Fatal(err)
	}
	for _, x := range children.Children {
		if x.ID == others || (x.ID == own) != (x.Flags == wire.ChildRemoved) {
			t.Errorf("a child: %+v", x)
		}
	}
	restore := func(id uuid.UUID, name string) error {
		return c.call(wire.TrashRestore, &wire.TrashRestoreRequest{Store: libraryURL, Image: id.String(), Name: name}, nil)
	}
	for what, err := range map[string]error{
		"another's image, by its id":   h.clientOf(7).open(wire.OpenRequest{Image: others.String(), Flags: wire.OpenByID}),
		"another's image back":         restore(others, ""),
		"another's under an own name":  restore(others, "own-9"),
		"an own one under another's":   restore(own, "secret"),
		"one that is not there":        restore(uuid.New(), "own-9"),
		"another's image for ever":     c.call(wire.TrashRemove, &wire.TrashRemoveRequest{Store: libraryURL, Image: others.String(), Force: true}, nil),
		"the trash, of who may not":    h.clientOf(9).call(wire.ListTrash, &wire.TrashListRequest{Store: libraryURL}, &wire.TrashList{}),
		"a purge, of who may not read": h.clientOf(9).call(wire.TrashPurge, &wire.TrashPurgeRequest{Store: libraryURL}, nil),
	} {
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := h.clientOf(7).open(wire.OpenRequest{Image: own.String(), Flags: wire.OpenByID | wire.OpenReadOnly}); err != nil {
		t.Errorf("an own image in the trash: %v", err)
	}
	if err := restore(own, ""); err != nil {
		t.Error(err)
	}
	c.must(wire.TrashPurge, &wire.TrashPurgeRequest{Store: libraryURL})
	if list := root.trash(); len(list) != 1 || list[0].ID != others {
		t.Errorf("the trash after a purge by another user: %+v", list)
	}
}

// TestLibraryRings: a user other than root has so much of the rings' memory and no more, and gets
// it back.
func TestLibraryRings(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.makeLog("vm1")
	h.allow("allow user:7 " + libraryURL + " * read,write")
	h.guard.mu.Lock()
	h.guard.rings[7] = maxUserRings - ring.MinData
	h.guard.mu.Unlock()
	small := wire.OpenRequest{Entries: 8, Data: ring.MinData}
	c, other := h.clientOf(7), h.clientOf(7)
	errnoIs(t, other.open(wire.OpenRequest{Entries: 8, Data: ring.MinData + 4096}), unix.ENOMEM)
	errnoIs(t, other.open(wire.OpenRequest{Entries: 8, Data: 1 << 63}), unix.EINVAL)
	errnoIs(t, other.open(wire.OpenRequest{Image: "none", Entries: 8, Data: ring.MinData}), unix.ENOENT)
	if err := c.open(small); err != nil {
		t.Fatal(err)
	}
	errnoIs(t, other.open(small), unix.ENOMEM)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	if err := other.open(small); err != nil {
		t.Errorf("after the first was closed: %v", err)
	}
}
