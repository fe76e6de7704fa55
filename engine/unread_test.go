package engine

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// unreadImage is an image on host a whose segment 0 has changed since the last checkpoint and
// is not in memory. Segment 1 is in another map object. Of each segment the first hundred even
// blocks have a number of their own, and block 0 of segment 0 has 1000.
type unreadImage struct {
	t   *testing.T
	st  *faultstore.Store
	a   *host
	id  uuid.UUID
	key string // of the map object that has segment 0
	// How often who closed the image was told, and what at last.
	told int
	err  error
}

const unreadSegment = segmentSectors / 8 // blocks

func newUnreadImage(t *testing.T) *unreadImage {
	t.Helper()
	u := &unreadImage{t: t, st: faultstore.New(mem.New()), err: errors.New("not told")}
	u.a, u.id = attached(t, u.st, CreateOptions{Size: 128 << 20, ObjectSize: MinObjectSize}, nil)
	for n := range uint64(100) {
		u.a.mustWrite(unreadSegment+2*n, 200+n)
	}
	u.a.mustCheckpoint()
	for n := range uint64(100) {
		u.a.mustWrite(2*n, 1+n)
	}
	u.a.mustCheckpoint()
	whole := u.a.im.objs.place(kindWhole, 0).object
	if whole == u.a.im.objs.place(kindWhole, 1).object {
		t.Fatal("both segments are in one map object: this tests nothing")
	}
	u.key = mapKey(u.id, whole.at, whole.part)
	u.a.dropSegment(0)
	u.a.mustWrite(0, 1000)
	u.a.mustDestage()
	return u
}

// contents returns what the map object of segment 0 holds.
func (u *unreadImage) contents() []byte {
	u.t.Helper()
	b, err := readWhole(context.Background(), u.st, u.key)
	if err != nil {
		u.t.Fatal(err)
	}
	return b
}

// fails has reads of that object fail with err from now on, until it is called again with nil.
func (u *unreadImage) fails(err error) {
	u.st.Inject()
	if err != nil {
		u.st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key(u.key)), faultstore.Fault{Before: err}))
	}
}

func (u *unreadImage) close() {
	u.a.im.Close(func(err error) {
		u.told++
		u.err = err
	})
}

// mustWait runs the host, whose image must not be closed in that time.
func (u *unreadImage) mustWait(d time.Duration) {
	u.t.Helper()
	if u.a.run(d); u.told > 0 || u.a.im.state != Closing {
		u.t.Fatalf("the image is %v, who closed it was told %v", u.a.im.state, u.err)
	}
}

// mustEnd runs the host, whose image must be closed after that time.
func (u *unreadImage) mustEnd(d time.Duration) {
	u.t.Helper()
	if u.a.run(d); u.told != 1 || u.err != nil || u.a.im.state != Released || !u.a.im.Quiet() || u.a.im.super.gaveUp {
		u.t.Fatalf("who closed the image was told %v, %d times; it is %v, quiet %v, gave up %v", u.err, u.told, u.a.im.state, u.a.im.Quiet(), u.a.im.super.gaveUp)
	}
}

// superblock returns the superblock, which must say that nobody has the image, and nothing of a
// log that was cut off.
func (u *unreadImage) superblock() *superblock {
	u.t.Helper()
	sb, _, err := loadSuperblock(context.Background(), u.st, u.id)
	if err != nil || sb.Owner != nil || len(sb.Points) > 0 {
		u.t.Fatalf("superblock: %v, owner %+v, %d points", err, sb.Owner, len(sb.Points))
	}
	return sb
}

// mustOpen returns another host that has opened the image, which it gets without force and
// without a wait.
func (u *unreadImage) mustOpen(logger *slog.Logger) *host {
	u.t.Helper()
	b := newHost(u.t, "beta", u.st, 2)
	if err := b.open(u.id, false); err != nil {
		u.t.Fatal(err)
	}
	if b.im.logger = logger; b.env.now > 0 {
		u.t.Errorf("it was had after %v", b.env.now)
	}
	return b
}

// mustBeWhole reads all that was written, from a host that can read all of the map, and leaves
// nothing behind.
func (u *unreadImage) mustBeWhole(b *host) {
	u.t.Helper()
	b.mustRead(0, 1000)
	for n := range uint64(100) {
		b.mustRead(unreadSegment+2*n, 200+n)
		if n > 0 {
			b.mustRead(2*n, 1+n)
		}
	}
	b.run(5 * time.Minute)
	b.mustClose()
	mustBeClean(u.t, u.st)
}

// TestCloseWithDamagedMap: where a part of the map that has changed is damaged in the store, an
// image that is closed waits for it for about a lease, and goes without a checkpoint then:
// another host can have it at once, with everything that was acknowledged outside of that part,
// and all of it when the part has been brought back.
func TestCloseWithDamagedMap(t *testing.T) {
	for name, damage := range map[string]struct {
		err  error                                 // of each read, or
		mend func(*testing.T, *unreadImage) func() // damages the object itself
	}{
		"checksum": {mend: func(t *testing.T, u *unreadImage) func() {
			return u.replace(func(b []byte) []byte { b[len(b)-1] ^= 4; return b })
		}},
		"magic": {mend: func(t *testing.T, u *unreadImage) func() {
			return u.replace(func(b []byte) []byte { b[0] ^= 4; return b })
		}},
		"cut off": {mend: func(t *testing.T, u *unreadImage) func() {
			return u.replace(func(b []byte) []byte { return b[:len(b)-1] })
		}},
		"missing": {err: backend.ErrNotFound},
		"refused": {err: &backend.Error{Op: "get", Class: backend.ErrPermanent}},
		"EIO":     {err: &backend.Error{Op: "get", Class: backend.ErrTemporary, Cause: syscall.EIO}},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnreadImage(t)
			var mend func()
			if damage.mend != nil {
				mend = damage.mend(t, u)
			} else {
				u.fails(damage.err)
				mend = func() { u.fails(nil) }
			}
			var text bytes.Buffer
			u.a.im.logger = slog.New(slog.NewTextHandler(&text, nil))
			u.close()
			u.mustWait(9 * time.Second) // the lease is ten
			if s := u.a.im.Stats(); !strings.Contains(s.MapError, u.key) || strings.Contains(s.MapError, "\n") {
				t.Errorf("while it waits it says %q, not in one line that it is for %s", s.MapError, u.key)
			}
			u.mustEnd(11 * time.Second)
			if s := u.a.im.Stats(); !strings.Contains(s.MapError, u.key) {
				t.Errorf("who has closed it hears %q, and not of %s", s.MapError, u.key)
			}
			said := 0
			for line := range strings.Lines(text.String()) {
				if strings.Contains(line, "part of the map cannot be read") && strings.Contains(line, u.key) {
					said++
				}
			}
			if said != 2 {
				t.Errorf("the log has said %d times what cannot be read, not when it was found and when it was let go of:\n%s", said, text.String())
			}
			sb := u.superblock()
			intent := sb.Intent
			if intent == nil || intent.Object != u.a.im.accepted.object {
				t.Fatalf("nothing says what there is of the checkpoint: %+v", intent)
			}

			text.Reset()
			b := u.mustOpen(slog.New(slog.NewTextHandler(&text, nil)))
			if !slices.Contains(b.im.super.sb.Stale, staleObjects{Epoch: intent.Epoch, Object: intent.Object, Checkpoint: true}) {
				t.Errorf("the next owner has %+v to remove, and not what there is of the checkpoint", b.im.super.sb.Stale)
			}
			for n := range uint64(100) {
				b.mustRead(unreadSegment+2*n, 200+n)
			}
			err, ended, _ := b.do(Read, 2, 0, time.Minute)
			if retried := retryable(damage.err); retried == ended || ended && err != syscall.EIO {
				t.Errorf("a read of the damaged part: %v, ended %v", err, ended)
			} else if ended && !strings.Contains(text.String(), u.key) {
				t.Errorf("nothing names %s:\n%s", u.key, text.String())
			}
			b.mustWrite(1, 1)
			mend()
			b.run(time.Minute)
			b.mustRead(1, 1)
			u.mustBeWhole(b)
		})
	}
}

// replace makes the map object of segment 0 what change makes of it, and returns what brings it
// back.
func (u *unreadImage) replace(change func([]byte) []byte) (mend func()) {
	put := func(b []byte) {
		if err := replaceObject(context.Background(), u.st, u.key, b); err != nil {
			u.t.Fatal(err)
		}
	}
	whole := u.contents()
	put(change(slices.Clone(whole)))
	return func() { put(whole) }
}

// TestCloseWithMapMended: a part that can be read again in time is in the checkpoint.
func TestCloseWithMapMended(t *testing.T) {
	u := newUnreadImage(t)
	u.fails(backend.ErrNotFound)
	u.close()
	u.mustWait(8 * time.Second)
	u.fails(nil)
	u.mustEnd(6 * time.Second)
	if sb := u.superblock(); sb.Intent != nil || sb.Loose || sb.Checkpoint.Object != u.a.im.accepted.object || u.a.im.Stats().MapError != "" {
		t.Errorf("it was closed without a checkpoint: %+v, %q", sb, u.a.im.Stats().MapError)
	}
	u.mustBeWhole(u.mustOpen(quiet))
}

// TestCloseWithFullChanges: an image of which nothing more was accepted, because there has been
// no checkpoint for too long, is closed as well, and everything acknowledged is in the store.
func TestCloseWithFullChanges(t *testing.T) {
	u := newUnreadImage(t)
	u.fails(backend.ErrNotFound)
	const writes = 30
	for n := range uint64(writes) {
		u.a.mustWrite(unreadSegment+2*n+1, 2000+n)
		u.a.im.Destage(func(error) {})
		u.a.run(time.Second)
	}
	if u.a.im.accepted.seq == u.a.im.sealed.seq || u.a.im.checkpoint.running == nil {
		t.Fatal("everything was accepted: this tests nothing")
	}
	u.close()
	u.mustEnd(10 * time.Second) // it has waited for longer than a lease before
	u.superblock()
	b := u.mustOpen(quiet)
	for n := range uint64(writes) {
		b.mustRead(unreadSegment+2*n+1, 2000+n)
	}
	u.fails(nil)
	b.run(time.Minute)
	u.mustBeWhole(b)
}

// TestEvictedWithDamagedMap: so it is where another host asks for the image with force.
func TestEvictedWithDamagedMap(t *testing.T) {
	u := newUnreadImage(t)
	u.fails(backend.ErrNotFound)
	const writes = 30
	for n := range uint64(writes) {
		u.a.mustWrite(unreadSegment+2*n+1, 2000+n)
		u.a.im.Destage(func(error) {})
		u.a.run(time.Second)
	}
	if u.a.im.accepted.seq == u.a.im.sealed.seq {
		t.Fatal("everything was accepted: this tests nothing")
	}
	b := newHost(t, "beta", u.st, 2)
	b.others = []*host{u.a}
	if err := b.open(u.id, true); err != nil {
		t.Fatal(err)
	}
	if u.a.im.state != Released || u.a.im.super.gaveUp || len(b.im.super.sb.Points) > 0 {
		t.Errorf("alpha is %v, gave up %v, %d points are kept", u.a.im.state, u.a.im.super.gaveUp, len(b.im.super.sb.Points))
	}
	for n := range uint64(writes) {
		b.mustRead(unreadSegment+2*n+1, 2000+n)
	}
	u.fails(nil)
	b.run(time.Minute)
	u.mustBeWhole(b)
}

// TestCloseWaitsForStore: a part of the map, or a store, that does not answer is waited for, and
// the image is closed with a checkpoint when it does; or without one, some time after another host has asked for the image.
func TestCloseWaitsForStore(t *testing.T) {
	racetest.Slow(t)
	part := faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key("*/m/*"))
	refused := &backend.Error{Op: "any", Class: backend.ErrPermanent, Cause: errors.New("it has lost its marker")}
	for name, c := range map[string]struct {
		which faultstore.Cond
		err   error
		taken bool
	}{
		"part":                        {part, backend.ErrTemporary, false},
		"part, taken":                 {part, backend.ErrTemporary, true},
		"hangs":                       {part, context.DeadlineExceeded, false},
		"store":                       {faultstore.Any, backend.ErrTemporary, false},
		"store, says that it refuses": {faultstore.Any, refused, false},
		"store, says EIO":             {faultstore.Any, &backend.Error{Op: "any", Class: backend.ErrTemporary, Cause: syscall.EIO}, false},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnreadImage(t)
			u.st.Inject(faultstore.If(c.which, faultstore.Fault{Before: c.err}))
			u.close()
			u.mustWait(10 * time.Minute)
			if c.taken {
				b := newHost(t, "beta", u.st, 2)
				b.others = []*host{u.a}
				if err := b.open(u.id, true); err != nil {
					t.Fatal(err)
				}
				u.st.Inject()
				u.mustEnd(time.Minute)
				b.run(time.Minute)
				u.mustBeWhole(b)
				return
			}
			u.st.Inject()
			u.mustEnd(time.Minute)
			if sb := u.superblock(); sb.Intent != nil || sb.Loose || sb.Checkpoint.Object != u.a.im.accepted.object || u.a.im.Stats().MapError != "" {
				t.Errorf("it was closed without a checkpoint: %+v, %q", sb, u.a.im.Stats().MapError)
			}
			u.mustBeWhole(u.mustOpen(quiet))
		})
	}
}
