package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/policy"
	"github.com/lsd-ceph/lsd/librbd/ring"
	"github.com/lsd-ceph/lsd/librbd/wire"
	"github.com/lsd-ceph/lsd/ublk"
)

// A session is one connection of a library client: docs/format-librbd.md. One goroutine reads
// its requests, so that the client's death is seen at once, and one answers them, one by one.
type session struct {
	d    *Daemon
	conn *net.UnixConn
	peer
	version uint32 // of the ring; 0: it has not said hello

	// Of a handle: see open.
	handle *handle
	rights policy.Rights // to its image, as it was opened
	ring   uint64        // bytes of data of its ring, as the user's are counted
	before stateBefore   // with which the image was compared last
}

// serveLibrary serves library clients until the listener is closed.
func (d *Daemon) serveLibrary(ln *net.UnixListener) {
	sessions, refusals := &places{user: make(map[uint32]int)}, make(chan struct{}, maxRefusals)
	var said time.Time
	complain := func(msg string, args ...any) { // anybody can be the cause, as often as he likes
		if time.Since(said) > complainEvery {
			said = time.Now()
			d.logger.Warn(msg, args...)
		}
	}
	for {
		conn, err := ln.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			d.logger.Warn("a library client could not be served", "err", err)
			if !sleep(d.ctx, 100*time.Millisecond) {
				return
			}
			continue
		}
		p, err := libraryPeer(conn)
		switch {
		case err != nil:
			complain("a library client was refused", "who", p.who, "err", err)
			conn.Close()
		case !d.guard.policy().Names(p.caller):
			complain("a library client was refused: the policy does not name its user", "who", p.who)
			select {
			case refusals <- struct{}{}:
				go func() {
					defer func() { <-refusals }()
					d.refusePeer(conn, p)
				}()
			default:
				conn.Close()
			}
		case !sessions.take(p.caller.UID):
			complain("too many library clients", "most", maxSessions, "of one user", maxUserSessions, "who", p.who)
			conn.Close()
		default:
			go func() {
				defer sessions.give(p.caller.UID)
				d.serveSession(conn, p)
			}()
		}
	}
}

// complainEvery is how often at most it is logged that clients were refused.
const complainEvery = 5 * time.Second

// serveSession serves one connection to its end.
func (d *Daemon) serveSession(conn *net.UnixConn, p peer) {
	defer conn.Close()
	who := p.who
	s := &session{d: d, conn: conn, peer: p}
	ctx, gone := context.WithCancelCause(d.ctx)
	defer gone(nil)
	requests := make(chan wire.Frame)
	go func() {
		defer close(requests)
		err := readFrames(ctx, conn, requests)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			d.logger.Warn("a library client breaks the rules, or its connection has failed", "who", who, "err", err)
		}
		gone(errors.New("the client is gone"))
	}()
	defer s.end()
	defer conn.Close()
	defer func() {
		if v := recover(); v != nil { // it must not take what others use along
			d.logger.Error("panic in a request of a library client", "who", who, "panic", v, "stack", string(debug.Stack()))
		}
	}()
	for f := range requests {
		if err := s.answer(ctx, f); err != nil {
			return
		}
	}
}

// readFrames reads requests until the connection ends.
func readFrames(ctx context.Context, conn *net.UnixConn, to chan<- wire.Frame) error {
	r := wire.NewReader(conn)
	for {
		f, err := r.Read()
		if err != nil {
			return err
		}
		f.Payload = bytes.Clone(f.Payload) // it is the reader's
		select {
		case to <- f:
		case <-ctx.Done():
			return nil
		}
	}
}

// processName says which process that is, for people.
func processName(pid int32) string {
	who := fmt.Sprintf("process %d", pid)
	name, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "comm"))
	if err != nil {
		return who
	}
	// A process can give itself any name, and this one comes to terminals.
	shown := strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, strings.ToValidUTF8(strings.TrimSuffix(string(name), "\n"), "?"))
	return fmt.Sprintf("%s (%s)", who, shown)
}

// attachment returns what the session's handle is one of. That can be another one by now each
// time.
func (s *session) attachment() *attachment { return s.handle.at.Load() }

// onAttachment does something with what the handle is one of, which may have become another one
// before it had begun.
func (s *session) onAttachment(do func(*attachment) error) error {
	for {
		a := s.attachment()
		if err := do(a); err == nil || s.attachment() == a {
			return err
		}
	}
}

// refresh has the handle's image look at its superblock.
func (s *session) refresh(ctx context.Context) error {
	return s.onAttachment(func(a *attachment) error { return a.refresh(ctx, func(api.Progress) {}) })
}

// end gives up what the session holds.
func (s *session) end() {
	s.before.close()
	if s.handle != nil {
		s.handle.end()
		s.d.living.remove(s.handle)
		s.handle = nil
	}
	s.giveRing()
}

// answer does what one request asks, and answers it. An error ends the session.
func (s *session) answer(ctx context.Context, f wire.Frame) error {
	w := &answer{s: s, request: f}
	err := s.do(ctx, f, w)
	if errors.Is(err, errRules) {
		return err
	}
	return w.send(err)
}

// errRules ends the session of a client that does not keep to the protocol.
var errRules = errors.New("it breaks the rules")

// An answer is that to a request.
type answer struct {
	s       *session
	request wire.Frame
	result  wire.Message // nil: it has no fields
	files   []int        // that come with it
}

// progress tells the client how far its request has come.
func (w *answer) progress(p api.Progress) {
	b, err := wire.Append(nil, &wire.Progress{Done: p.Done, Total: p.Total})
	if err == nil {
		_ = w.write(w.request.Type.Progress(), b, progressTimeout) // a client that is gone ends the session
	}
}

// send sends the result, or the error that there is instead.
func (w *answer) send(why error) error {
	var b []byte
	if why == nil {
		if b, why = wire.AppendResult(nil, w.result); why == nil {
			return w.write(w.request.Type.Result(), b, resultTimeout, w.files...)
		}
	}
	return w.write(w.request.Type.Result(), wire.AppendError(nil, errnoOf(why), api.OneLine(why)), resultTimeout)
}

const (
	// resultTimeout and progressTimeout are for how long a client may not read what it is
	// told. While it does not, nobody else gets at what it has asked to be changed.
	resultTimeout   = 10 * time.Second
	progressTimeout = time.Second
)

// write sends a frame. One that the client does not take in time ends the session.
func (w *answer) write(t wire.Type, payload []byte, timeout time.Duration, files ...int) error {
	err := w.s.conn.SetWriteDeadline(time.Now().Add(timeout))
	if err == nil {
		err = w.writeFrame(t, payload, files...)
	}
	if err != nil { // the client may have a part of it
		w.s.conn.Close()
	}
	return err
}

func (w *answer) writeFrame(t wire.Type, payload []byte, files ...int) error {
	f := wire.Frame{Type: t, Number: w.request.Number, Payload: payload}
	if len(files) > 0 {
		return wire.WriteWithFiles(w.s.conn, f, files...)
	}
	return wire.NewWriter(w.s.conn).Write(f)
}

// errnoOf returns the errno that librbd's clients expect for an error.
func errnoOf(err error) syscall.Errno {
	var owned *engine.OwnedError
	var snapshots *engine.SnapshotsError
	var deferred *engine.DeferredError
	var busy *ublk.BusyError
	var errno syscall.Errno
	switch {
	case errors.Is(err, errNoImage), errors.Is(err, backend.ErrNotFound), errors.Is(err, engine.ErrNoSnapshot), errors.Is(err, engine.ErrRemoved),
		errors.Is(err, engine.ErrNoMetadata), errors.Is(err, engine.ErrNoLock), errors.Is(err, engine.ErrNoParent):
		return syscall.ENOENT
	case errors.Is(err, backend.ErrExists), errors.Is(err, engine.ErrSnapshotExists), errors.Is(err, engine.ErrLockExists):
		return syscall.EEXIST
	case errors.As(err, &owned), errors.As(err, &busy):
		return syscall.EBUSY
	case errors.As(err, &snapshots):
		return syscall.ENOTEMPTY
	case errors.As(err, &deferred):
		return syscall.EPERM
	case errors.Is(err, errDetached), errors.Is(err, errTaken):
		return syscall.ESTALE
	case errors.Is(err, engine.ErrFull):
		return syscall.ENOSPC
	case errors.Is(err, engine.ErrTooLong):
		return syscall.E2BIG
	case errors.Is(err, errAtIt), errors.Is(err, engine.ErrLocked), errors.Is(err, engine.ErrFlattening):
		return syscall.EBUSY
	case errors.Is(err, errEnding), errors.Is(err, context.Canceled):
		return syscall.EAGAIN
	case errors.Is(err, ring.ErrLimits), errors.Is(err, engine.ErrShrinks), errors.Is(err, errInvalid),
		errors.Is(err, engine.ErrMetadataText), errors.Is(err, engine.ErrLockText), errors.Is(err, engine.ErrFeatures), errors.Is(err, engine.ErrEmpty):
		return syscall.EINVAL
	case errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	case errors.As(err, &errno):
		return errno
	}
	return syscall.EIO
}

// errInvalid is matched by errors of what a client has asked for in vain at all times.
var errInvalid = errors.New("invalid")

// invalid makes an error match errInvalid, and say what it has said.
func invalid(err error) error {
	if err == nil {
		return nil
	}
	return invalidError{err}
}

// An invalidError is an error that matches errInvalid.
type invalidError struct{ error }

// Is implements what errors.Is asks.
func (invalidError) Is(target error) bool { return target == errInvalid }

// Unwrap implements what errors.Is asks.
func (e invalidError) Unwrap() error { return e.error }

// do does what a request asks.
func (s *session) do(ctx context.Context, f wire.Frame, w *answer) error {
	if f.Type != wire.Hello && s.version == 0 {
		return errRules
	}
	if f.Type >= wire.Stat || f.Type == wire.Close {
		if s.handle == nil {
			return errRules
		}
		if want := handleRights(f.Type); !s.rights.Has(want) {
			return s.denied(want, s.attachment().record().URL)
		}
		return s.doWithHandle(ctx, f, w)
	}
	switch f.Type {
	case wire.Hello:
		return s.hello(f, w)
	case wire.Open:
		return s.open(ctx, f, w)
	case wire.Create:
		return s.create(ctx, f, w)
	case wire.Remove:
		return s.remove(ctx, f)
	case wire.List:
		return s.list(ctx, f, w)
	case wire.Rename:
		return s.rename(ctx, f)
	case wire.TrashMove:
		return s.trashMove(ctx, f)
	case wire.ListTrash:
		return s.trashList(ctx, f, w)
	case wire.TrashRemove:
		return s.trashRemove(ctx, f)
	case wire.TrashRestore:
		return s.trashRestore(ctx, f)
	case wire.TrashPurge:
		return s.trashPurge(ctx, f, w)
	case wire.Clone:
		return s.clone(ctx, f, w)
	}
	return syscall.EOPNOTSUPP
}

// doWithHandle does what a request asks of an open image.
func (s *session) doWithHandle(ctx context.Context, f wire.Frame, w *answer) error {
	switch f.Type {
	case wire.Close:
		return s.closeHandle(ctx)
	case wire.Stat:
		return s.stat(ctx, w)
	case wire.ListSnapshots:
		return s.snapshots(ctx, w)
	case wire.Parent:
		return s.parent(ctx, w)
	case wire.Children:
		return s.children(ctx, f, w)
	case wire.Diff:
		return s.diff(ctx, f, w)
	case wire.Copy:
		return s.copy(ctx, f, w)
	case wire.ListMetadata, wire.GetMetadata:
		return s.metadata(ctx, f, w)
	case wire.Locks, wire.Lock, wire.Unlock, wire.BreakLock:
		return s.locks(ctx, f, w)
	case wire.Times:
		return s.times(ctx, w)
	case wire.Watchers:
		return s.watchers(ctx, w)
	case wire.Features:
		return s.features(ctx, w)
	}
	if s.handle.readOnly {
		return syscall.EROFS
	}
	switch f.Type {
	case wire.Resize:
		return s.resize(ctx, f, w)
	case wire.Snapshot:
		return s.snapshot(ctx, f)
	case wire.RemoveSnapshot:
		return s.removeSnapshot(ctx, f)
	case wire.RenameSnapshot:
		return s.renameSnapshot(ctx, f)
	case wire.RollBack:
		return s.rollBack(ctx, f, w)
	case wire.Flatten:
		return s.flatten(ctx, w)
	case wire.SetMetadata, wire.RemoveMetadata:
		return s.changeMetadata(ctx, f)
	case wire.SwitchFeatures:
		return s.switchFeatures(ctx, f)
	}
	return syscall.EOPNOTSUPP
}
