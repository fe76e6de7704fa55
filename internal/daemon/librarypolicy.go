package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/peercred"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

const (
	// DefaultLibraryPolicy is the policy of a daemon that is told of none, if the file is there.
	DefaultLibraryPolicy = "/etc/lsd/librbd.policy"
	// DefaultLibraryGroup may use the library's socket where the daemon is told of no group, if
	// there is such a group.
	DefaultLibraryGroup = "lsd"
)

// A guard knows who may do what through the library's socket.
type guard struct {
	path   string // of the policy
	socket string // empty: there is none
	group  uint32 // the socket's, noGroup for none
	logger *slog.Logger

	current atomic.Pointer[policy.Policy]

	mu    sync.Mutex
	rings map[uint32]uint64 // guarded by mu; bytes of data of each user's rings

	// Of the goroutine that calls refresh; before that, of who makes the daemon.
	stamp policy.Stamp // of the policy as it was last looked at
	file  bool         // current comes from a file
	mode  os.FileMode  // the socket's
}

// noGroup is the number that no group has.
const noGroup = math.MaxUint32

// newGuard reads the policy that a daemon begins with.
func newGuard(cfg Config, logger *slog.Logger) (*guard, error) {
	g := &guard{path: cfg.LibraryPolicy, socket: cfg.LibrarySocket, group: noGroup, logger: logger, rings: make(map[uint32]uint64)}
	if err := g.findGroup(cfg.LibraryGroup); err != nil {
		return nil, err
	}
	setDefault(&g.path, DefaultLibraryPolicy)
	g.stamp = policy.StampOf(g.path)
	p, err := policy.Load(g.path)
	switch {
	case err == nil:
		g.use(p)
	case errors.Is(err, os.ErrNotExist) && cfg.LibraryPolicy == "":
		g.current.Store(new(policy.Policy))
		if g.group != noGroup {
			g.current.Store(policy.Group(g.group))
		}
	default:
		return nil, fmt.Errorf("policy of library clients: %w", err)
	}
	g.mode = g.wantedMode()
	return g, nil
}

// findGroup finds the socket's group by its name or number.
func (g *guard) findGroup(name string) error {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil && n != noGroup {
		g.group = uint32(n)
		return nil
	}
	gid, err := policy.ByName(true, orDefault(name, DefaultLibraryGroup))
	switch {
	case err == nil:
		g.group = gid
	case name != "" || !errors.Is(err, policy.ErrUnknown):
		return fmt.Errorf("group %s of the library's socket: %w", orDefault(name, DefaultLibraryGroup), err)
	}
	return nil
}

func orDefault(s, other string) string {
	setDefault(&s, other)
	return s
}

// use takes a policy that comes from the file.
func (g *guard) use(p *policy.Policy) {
	for _, line := range p.Unknown {
		g.logger.Warn("the policy of library clients names somebody who is not known here, and may do nothing until it is read again", "line", line)
	}
	g.file = true
	g.current.Store(p)
}

// policy returns the policy of now.
func (g *guard) policy() *policy.Policy { return g.current.Load() }

// wantedMode returns the mode that lets those connect whom the policy names, and no others if
// that can be said in a mode.
func (g *guard) wantedMode() os.FileMode {
	switch {
	case !g.policy().OnlyGroup(g.group):
		return 0o666 // who is at the other end is asked of each connection
	case g.group != noGroup:
		return 0o660
	}
	return 0o600
}

// refresh reads the policy again if the file is another than at the last look. One that is bad,
// or gone, leaves everything as it was: nobody gets more than was ever written.
func (g *guard) refresh() {
	now := policy.StampOf(g.path)
	if now == g.stamp {
		return
	}
	g.stamp = now
	p, err := policy.Load(g.path)
	if err != nil {
		g.logger.Error("the policy of library clients cannot be used: the one before stays", "err", err)
		return
	}
	g.use(p)
	g.logger.Info("the policy of library clients was read again", "path", g.path)
	mode := g.wantedMode()
	if g.socket == "" || mode == g.mode {
		return
	}
	g.mode = mode
	if err := os.Chmod(g.socket, mode); err != nil {
		g.logger.Error("the mode of the library's socket cannot be changed", "err", err)
	}
}

// listen makes the library's socket.
func (g *guard) listen() (*net.UnixListener, error) {
	gid := -1
	if g.group != noGroup {
		gid = int(g.group)
	}
	return listenFor(g.socket, g.mode, gid)
}

// A peer is the process at the other end of a connection to the library's socket.
type peer struct {
	who    string // for people
	caller policy.Caller
}

// libraryPeer says who is at the other end.
func libraryPeer(conn *net.UnixConn) (peer, error) {
	cred, err := peercred.Of(conn)
	if err != nil {
		return peer{}, err
	}
	p := peer{who: processName(cred.Pid), caller: policy.Caller{UID: cred.Uid}}
	if isOwner(cred.Uid) {
		p.caller.UID = 0
		return p, nil
	}
	p.who += fmt.Sprintf(" of user %d", cred.Uid)
	groups, err := peercred.Groups(conn)
	p.caller.Groups = append(groups, cred.Gid)
	return p, err
}

// Who may have how many connections at a time. No user can take them all.
const (
	maxSessions     = 4096
	maxUserSessions = 1024 // of each user other than root
	maxRefusals     = 16   // that are being told so
)

// places counts the connections to the library's socket.
type places struct {
	mu   sync.Mutex
	all  int            // guarded by mu
	user map[uint32]int // guarded by mu; by user
}

// take takes a place for a user, if there is one.
func (p *places) take(uid uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == maxSessions || uid != 0 && p.user[uid] == maxUserSessions {
		return false
	}
	p.all++
	p.user[uid]++
	return true
}

// give gives it back.
func (p *places) give(uid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if p.user[uid]--; p.user[uid] == 0 {
		delete(p.user, uid)
	}
}

// maxUserRings is how many bytes of data the rings of a user other than root may have together: it
// is this process's memory.
const maxUserRings = 8 << 30

// takeRing counts the data of a ring that the session is to have.
func (s *session) takeRing(n uint64) error {
	g := s.d.guard
	g.mu.Lock()
	defer g.mu.Unlock()
	if n > ring.MaxData {
		return nil // it is refused for that
	}
	if s.caller.UID != 0 && g.rings[s.caller.UID]+n > maxUserRings {
		return fmt.Errorf("user %d has rings of %d GiB, which is what a user may have: close images, or ask for smaller rings: %w", s.caller.UID, maxUserRings>>30, unix.ENOMEM)
	}
	g.rings[s.caller.UID] += n
	s.ring = n
	return nil
}

// giveRing takes it off again.
func (s *session) giveRing() {
	g := s.d.guard
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.rings[s.caller.UID] -= s.ring; g.rings[s.caller.UID] == 0 {
		delete(g.rings, s.caller.UID)
	}
	s.ring = 0
}

// refuseTimeout is how long a client that is refused may take to ask for anything.
const refuseTimeout = 5 * time.Second

// refusePeer tells a client that there is nothing for it.
func (d *Daemon) refusePeer(conn *net.UnixConn, p peer) {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(refuseTimeout)); err != nil {
		return
	}
	f, err := wire.NewReader(conn).Read()
	if err != nil {
		return
	}
	w := &answer{s: &session{d: d, conn: conn, peer: p}, request: f}
	_ = w.send(fmt.Errorf("user %d: nothing is allowed by the policy of library clients: %w", p.caller.UID, unix.EPERM)) // it is gone
}

// libraryStore parses the URL of a store that the client names, and says what it may do there. It
// fails where that is nothing.
func (s *session) libraryStore(text string) (backend.URL, policy.Grants, error) {
	u, err := backend.ParseStore(text)
	if err == nil && u.Scheme == backend.SchemeMem {
		err = errors.New("a mem: store lives and dies with one process: it is for tests")
	}
	if err != nil {
		return u, nil, invalid(err)
	}
	grants := s.d.guard.policy().In(s.caller, u)
	if len(grants) == 0 {
		return u, nil, s.denied(0, u.String())
	}
	if u.Scheme == backend.SchemeFile && s.caller.UID != 0 {
		if err := policy.CheckDir(u.Dir); err != nil {
			return u, nil, fmt.Errorf("%s is for root alone: %w: %w", u, err, unix.EPERM)
		}
	}
	return u, grants, nil
}

// libraryImage parses the store of an image that the client names, checks the name, and fails if
// the client may not do with it what it wants to, whether it is there or not.
func (s *session) libraryImage(store, image string, want policy.Rights) (backend.URL, error) {
	u, grants, err := s.libraryStore(store)
	if err == nil {
		err = invalid(backend.CheckImageName(image))
	}
	if err == nil && !grants.Allow(image, want) {
		err = s.denied(want, u.Image(image))
	}
	return u, err
}

// imageGrants says what the client may do in the store of the handle's image.
func (s *session) imageGrants() (policy.Grants, error) {
	u, _, _, err := backend.ParseSource(s.attachment().record().URL)
	if err != nil {
		return nil, err
	}
	return s.d.guard.policy().In(s.caller, u), nil
}

// denied says that the client may not do what it wants to.
func (s *session) denied(want policy.Rights, what string) error {
	right := "do anything with"
	if want != 0 {
		right = want.String()
	}
	return fmt.Errorf("user %d may not %s %s: the policy of library clients does not allow it: %w", s.caller.UID, right, what, unix.EPERM)
}

// handleRights returns the rights that a request needs that is for a handle. Those of the handle
// are what its image allowed when it was opened.
func handleRights(t wire.Type) policy.Rights {
	switch t {
	case wire.Close, wire.Stat, wire.ListSnapshots, wire.Parent, wire.Children, wire.Diff, wire.Copy,
		wire.ListMetadata, wire.GetMetadata, wire.Locks, wire.Times, wire.Watchers, wire.Features:
		return policy.Read
	case wire.Snapshot, wire.RemoveSnapshot, wire.RenameSnapshot, wire.RollBack,
		wire.SetMetadata, wire.RemoveMetadata, wire.SwitchFeatures, wire.Lock, wire.Unlock, wire.BreakLock:
		return policy.Write
	case wire.Resize, wire.Flatten:
		return policy.Manage
	}
	return policy.All // of what is not named here nobody has thought
}
