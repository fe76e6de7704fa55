package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// original is an image that is copied.
type original struct {
	t     *testing.T
	st    backend.Store
	id    uuid.UUID
	rng   *rand.Rand
	disk  []byte            // what it is now
	snaps map[string][]byte // and was
	names []string          // in their order
}

// newOriginal makes an image with snapshots of several sizes, on several branches, which is a
// clone if that is wanted.
func newOriginal(t *testing.T, seed uint64, clone bool) *original {
	t.Helper()
	o := &original{t: t, st: mem.New(), rng: rand.New(rand.NewPCG(seed, 9)), snaps: map[string][]byte{}, disk: make([]byte, 6<<20)}
	o.id = blank(t, o.st, 6<<20)
	if clone {
		o.change()
		id, err := engine.Clone(t.Context(), o.st, o.id, "clone", engine.CloneOptions{})
		if err != nil {
			t.Fatal(err)
		}
		o.id = id
	}
	for i := range 4 {
		o.change()
		o.snapshot(fmt.Sprint("s", i))
	}
	if err := engine.Rollback(t.Context(), o.st, o.id, "s1", engine.RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	o.disk = bytes.Clone(o.snaps["s1"])
	o.change()
	o.snapshot("s4")
	o.change()
	return o
}

// change writes to it, and gives it another size.
func (o *original) change() {
	o.t.Helper()
	im, err := inproc.Open(o.t.Context(), o.st, o.id, quiet().inprocOptions())
	if err != nil {
		o.t.Fatal(err)
	}
	o.write(im)
	size := uint64(4+o.rng.IntN(4)) << 20
	if err := resize(o.t.Context(), o.st, o.id, im, size, quiet().withDefaults()); err != nil {
		o.t.Fatal(err)
	}
	o.disk = append(o.disk[:min(len(o.disk), int(size))], make([]byte, max(int(size)-len(o.disk), 0))...)
	o.write(im)
	if err := im.Close(o.t.Context()); err != nil {
		o.t.Fatal(err)
	}
}

// write writes to im, which is the image.
func (o *original) write(im *inproc.Image) {
	o.t.Helper()
	for range 20 {
		off := o.rng.IntN(len(o.disk)/4096) * 4096
		n := min((1+o.rng.IntN(100))*4096, len(o.disk)-off)
		p := o.disk[off:][:n]
		var err error
		if o.rng.IntN(4) == 0 {
			clear(p)
			err = im.Discard(o.t.Context(), uint64(off), uint64(n))
		} else {
			for i := 0; i < n; i += 512 { // some of it stays zeroes
				p[i] = byte(o.rng.Uint32())
			}
			if o.rng.IntN(4) == 0 {
				clear(p[:4096])
			}
			err = im.WriteAt(o.t.Context(), p, uint64(off))
		}
		if err != nil {
			o.t.Fatal(err)
		}
	}
}

func (o *original) snapshot(name string) {
	o.t.Helper()
	if _, err := engine.CreateSnapshot(o.t.Context(), o.st, o.id, name, engine.SnapshotOptions{}); err != nil {
		o.t.Fatal(err)
	}
	o.snaps[name], o.names = bytes.Clone(o.disk), append(o.names, name)
}

// mustEqual has a copy be as the image, with its snapshots if it is to have some.
func (o *original) mustEqual(dst backend.Store, id uuid.UUID, snaps bool) {
	t := o.t
	t.Helper()
	list, err := engine.Snapshots(t.Context(), dst, id)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range list {
		names = append(names, s.Name)
		mustRead(t, dst, id, s.ID, o.snaps[s.Name])
	}
	if want := o.names; snaps && !slices.Equal(names, want) || !snaps && len(names) > 0 {
		t.Errorf("snapshots %q, want %q", names, want)
	}
	mustRead(t, dst, id, uuid.Nil, o.disk)
	if got := snapshots(t, o.st, o.id); !slices.Equal(got, o.names) {
		t.Errorf("the snapshots of what was copied: %q, want %q", got, o.names)
	}
}

// mustRead has a state of an image be as is wanted.
func mustRead(t *testing.T, st backend.Store, id, snap uuid.UUID, want []byte) {
	t.Helper()
	v, err := engine.OpenView(t.Context(), st, id, engine.ViewOptions{Snapshot: snap})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	got := make([]byte, v.Size())
	if err := v.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("wrong data in %v: %d bytes, want %d", snap, len(got), len(want))
	}
}

func copying() CopyOptions { return CopyOptions{Options: quiet(), noteBytes: 1 << 20} }

func TestCopy(t *testing.T) {
	for _, clone := range []bool{false, true} {
		for _, headOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("clone %v, head %v", clone, headOnly), func(t *testing.T) {
				if !clone || headOnly {
					racetest.Slow(t)
				}
				t.Parallel()
				src := newOriginal(t, 1, clone)
				if err := engine.SetMetadata(t.Context(), src.st, src.id, "k", "v"); err != nil {
					t.Fatal(err)
				}
				if err := engine.Lock(t.Context(), src.st, src.id, engine.Locker{Client: "client.1"}, true, ""); err != nil {
					t.Fatal(err)
				}
				for _, dst := range []backend.Store{mem.New(), src.st} {
					o := copying()
					o.HeadOnly = headOnly
					made, err := Copy(t.Context(), src.st, src.id, dst, "new", o)
					if err != nil {
						t.Fatal(err)
					}
					if made.Size != uint64(len(src.disk)) || made.Resumed || made.Data == 0 || !headOnly && made.Snapshots != 5 {
						t.Errorf("%+v", made)
					}
					if dst != src.st {
						mustBeClean(t, dst, "new")
					}
					src.mustEqual(dst, made.ID, !headOnly)
					if v, err := engine.MetadataOf(t.Context(), dst, made.ID, "k"); v != "v" || err != nil {
						t.Errorf("metadata %q, %v", v, err)
					}
					if l, err := engine.LocksOf(t.Context(), dst, made.ID); len(l.Lockers) > 0 || err != nil {
						t.Errorf("locks were copied: %+v, %v", l, err)
					}
					info, err := engine.Describe(t.Context(), dst, "new")
					if err != nil || info.ID != made.ID || info.Parent != uuid.Nil || info.Owner != nil {
						t.Errorf("%+v, %v", info, err)
					}
					if _, err := Copy(t.Context(), src.st, src.id, dst, "new", o); !errors.Is(err, backend.ErrExists) {
						t.Errorf("copied over what is there: %v", err)
					}
					mustHave(t, dst, made.ID, made.Size, src.disk)
				}
			})
		}
	}
}

// TestCopyKilled: the process dies at any operation on one of the stores, again and again: the
// copy that comes to its end is right, and nothing else is left.
func TestCopyKilled(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			if seed > 0 {
				racetest.Slow(t)
			}
			t.Parallel()
			src := newOriginal(t, seed, seed%4 == 3)
			dst := mem.New()
			rng := rand.New(rand.NewPCG(seed, 2))
			resumed, lives := 0, 0
			var last error
			for {
				if lives++; lives > 60 {
					t.Fatalf("it does not come to an end: %v", last)
				}
				from, to := backend.Store(src.st), backend.Store(dst)
				n, done := 1+rng.IntN(60+10*lives), rng.IntN(2) == 0
				if rng.IntN(4) == 0 {
					from = dying(from, n, done)
				} else {
					to = dying(to, n, done)
				}
				made, err := Copy(t.Context(), from, src.id, to, "new", copying())
				if errors.Is(err, backend.ErrExists) { // only the answer to its last operation was lost
					made.ID, err = backend.Lookup(t.Context(), dst, "new")
				}
				if err == nil {
					t.Logf("%d lives, %d resumed", lives, resumed)
					src.released()
					mustBeClean(t, dst, "new")
					src.mustEqual(dst, made.ID, true)
					break
				}
				last = err
				if made.Resumed || errors.As(err, new(*Unfinished)) {
					resumed++
				}
			}
			// What an attempt had begun that did not come to be known to the source.
			if _, err := engine.GC(t.Context(), dst, engine.GCOptions{Age: 1}); err != nil {
				t.Fatal(err)
			}
			mustRemove(t, dst, "new")
			collectLater(t, dst) // lives that have ended may have had something under way
			if got := keys(t, dst); len(got) > 0 {
				t.Errorf("left %q", got)
			}
		})
	}
}

// released removes snapshots that were kept for copies of which nothing is left: that of a
// process that died when it had begun to remove them.
func (o *original) released() {
	o.t.Helper()
	for _, name := range snapshots(o.t, o.st, o.id) {
		if strings.HasPrefix(name, copyPrefix) {
			o.t.Logf("%s is left", name)
			if err := engine.RemoveSnapshot(o.t.Context(), o.st, o.id, name); err != nil {
				o.t.Fatal(err)
			}
		}
	}
}

// interrupted begins a copy that is interrupted when it has come to a state, and has written
// some of it.
func (o *original) interrupted(dst backend.Store, name string, co CopyOptions) *Unfinished {
	o.t.Helper()
	ctx, stop := context.WithCancelCause(o.t.Context())
	enough := errors.New("enough")
	co.noteBytes = 1 << 16
	co.Progress = func(what string, done, _ uint64) {
		if strings.HasPrefix(what, "copying "+name) && done > 0 {
			stop(enough)
		}
	}
	var u *Unfinished
	if _, err := Copy(ctx, o.st, o.id, dst, "new", co); !errors.As(err, &u) || !errors.Is(err, enough) {
		o.t.Fatalf("%v", err)
	}
	if _, err := backend.Lookup(o.t.Context(), dst, "new"); !errors.Is(err, backend.ErrNotFound) {
		o.t.Errorf("it has its name: %v", err)
	}
	return u
}

// TestCopyResumed: a copy goes on where it was, with what the source was when it began; and
// where the source has changed too much, it begins anew.
func TestCopyResumed(t *testing.T) {
	for name, x := range map[string]struct {
		at     string // where it is interrupted
		change func(o *original)
		anew   bool
		head   bool // the second time
	}{
		"nothing":          {at: "s2"},
		"at the first":     {at: "s0"},
		"at the last":      {at: copyPrefix},
		"written to":       {at: "s1", change: func(o *original) { disk := bytes.Clone(o.disk); o.change(); o.disk = disk }},
		"next was removed": {at: "s2", change: func(o *original) { o.remove("s2") }, anew: true},
		"one was removed":  {at: "s2", change: func(o *original) { o.remove("s0") }, anew: true},
		"later removed":    {at: "s2", change: func(o *original) { o.remove("s4") }},
		"renamed": {at: "s2", anew: true, change: func(o *original) {
			if err := engine.RenameSnapshot(o.t.Context(), o.st, o.id, "s0", "first"); err != nil {
				o.t.Fatal(err)
			}
			o.snaps["first"], o.names[0] = o.snaps["s0"], "first"
		}},
		"rotated": {at: "s2", anew: true, change: func(o *original) {
			// As for ages of snapshots: the oldest goes, and each gets the name of the one before.
			was := slices.Clone(o.names)
			o.remove(was[0])
			for i, name := range was[1:] {
				if err := engine.RenameSnapshot(o.t.Context(), o.st, o.id, name, was[i]); err != nil {
					o.t.Fatal(err)
				}
				o.snaps[was[i]], o.names[i] = o.snaps[name], was[i]
			}
		}},
		"head only":          {at: "s2", head: true, anew: true},
		"head only at first": {at: "s0", head: true, anew: true},
	} {
		t.Run(name, func(t *testing.T) {
			if name != "nothing" && name != "written to" {
				racetest.Slow(t)
			}
			t.Parallel()
			src := newOriginal(t, 5, false)
			dst := mem.New()
			u := src.interrupted(dst, x.at, copying())
			if x.change != nil {
				x.change(src)
			}
			o := copying()
			o.HeadOnly = x.head
			made, err := Copy(t.Context(), src.st, src.id, dst, "new", o)
			if err != nil {
				t.Fatal(err)
			}
			if made.Resumed == x.anew || (made.ID == u.ID) == x.anew {
				t.Errorf("%+v, was %v", made, u.ID)
			}
			src.mustEqual(dst, made.ID, !x.head)
			mustBeClean(t, dst, "new")
			mustRemove(t, dst, "new")
			collectLater(t, dst) // lives that have ended may have had something under way
			if got := keys(t, dst); len(got) > 0 {
				t.Errorf("left %q", got)
			}
		})
	}
}

func (o *original) remove(name string) {
	o.t.Helper()
	if err := engine.RemoveSnapshot(o.t.Context(), o.st, o.id, name); err != nil {
		o.t.Fatal(err)
	}
	o.names = slices.DeleteFunc(o.names, func(s string) bool { return s == name })
}

// TestCopyCollected: a copy that was interrupted, and collected, is begun anew; another
// command at it is refused.
func TestCopyCollected(t *testing.T) {
	racetest.Slow(t)
	src := newOriginal(t, 6, false)
	dst := mem.New()
	u := src.interrupted(dst, "s1", copying())
	im, err := inproc.Open(t.Context(), dst, u.ID, func() inproc.Options {
		o := quiet().inprocOptions()
		o.Partial = true
		return o
	}())
	if err != nil {
		t.Fatal(err)
	}
	var owned *engine.OwnedError
	if _, err := Copy(t.Context(), src.st, src.id, dst, "new", copying()); !errors.As(err, &owned) || !owned.Command {
		t.Errorf("two at one copy: %v", err)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found, err := engine.GC(t.Context(), dst, engine.GCOptions{}); err != nil || len(found) > 0 {
		t.Errorf("collected at once: %+v, %v", found, err)
	}
	if found, err := engine.GC(t.Context(), dst, engine.GCOptions{Age: 1}); err != nil || len(found) != 1 {
		t.Errorf("not collected: %+v, %v", found, err)
	}
	made, err := Copy(t.Context(), src.st, src.id, dst, "new", copying())
	if err != nil || made.ID == u.ID || made.Resumed {
		t.Fatalf("%+v, %v", made, err)
	}
	src.remove(u.Snapshot)
	src.mustEqual(dst, made.ID, true)
}

// TestCopyBeside: a command for which a copy does not fit leaves it to the one that is at it.
func TestCopyBeside(t *testing.T) {
	src := newOriginal(t, 6, false)
	dst := mem.New()
	u := src.interrupted(dst, "s1", copying())
	o := quiet().inprocOptions()
	o.Partial = true
	im, err := inproc.Open(t.Context(), dst, u.ID, o)
	if err != nil {
		t.Fatal(err)
	}
	head := copying()
	head.HeadOnly = true
	var owned *engine.OwnedError
	if _, err := Copy(t.Context(), src.st, src.id, dst, "new", head); !errors.As(err, &owned) || !owned.Command {
		t.Errorf("the second: %v", err)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	made, err := Copy(t.Context(), src.st, src.id, dst, "new", copying())
	if err != nil || made.ID != u.ID || !made.Resumed {
		t.Fatalf("%+v, %v", made, err)
	}
	src.mustEqual(dst, made.ID, true)
}

// TestCopyStoreFails: a store that fails for long ends a copy also while that waits for a
// snapshot of its own.
func TestCopyStoreFails(t *testing.T) {
	src := newOriginal(t, 6, false)
	dst := mem.New()
	u := src.interrupted(dst, "s0", copying())
	gone := &backend.Error{Op: "any", Class: backend.ErrTemporary, Cause: errors.New("the store is gone")}
	var down atomic.Bool
	failing := faultstore.New(dst, func(faultstore.Op) faultstore.Fault {
		if list, err := engine.Snapshots(context.Background(), dst, u.ID); err == nil && slices.ContainsFunc(list, func(s engine.Snapshot) bool { return s.Pending }) {
			down.Store(true)
		}
		if down.Load() {
			return faultstore.Fault{Before: gone}
		}
		return faultstore.Fault{}
	})
	ctx, stop := context.WithTimeoutCause(t.Context(), 40*time.Second, errors.New("it hangs"))
	defer stop()
	_, err := Copy(ctx, src.st, src.id, failing, "new", copying())
	if !down.Load() || ctx.Err() != nil || !errors.Is(err, gone) {
		t.Fatalf("down %v: %v", down.Load(), err)
	}
	made, err := Copy(t.Context(), src.st, src.id, dst, "new", copying())
	if err != nil || made.ID != u.ID {
		t.Fatalf("%+v, %v", made, err)
	}
	src.mustEqual(dst, made.ID, true)
}

// TestCopyAttached: whoever has the image attached goes on, and the copy is what it was when
// that began.
func TestCopyAttached(t *testing.T) {
	src := newOriginal(t, 7, false)
	im, err := inproc.Open(t.Context(), src.st, src.id, quiet().inprocOptions())
	if err != nil {
		t.Fatal(err)
	}
	src.write(im)
	want := bytes.Clone(src.disk)
	o := copying()
	o.Snapshot.Nudge = im.Refresh
	wrote := false
	o.Progress = func(what string, _, _ uint64) {
		if !wrote && strings.HasPrefix(what, "copying ") {
			wrote = true
			src.write(im)
		}
	}
	dst := mem.New()
	made, err := Copy(t.Context(), src.st, src.id, dst, "new", o)
	if err != nil || !wrote {
		t.Fatalf("%v, wrote %v", err, wrote)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	src.disk = want
	src.mustEqual(dst, made.ID, true)
}

// mustRemove removes an image, and what it was made of.
func mustRemove(t *testing.T, st backend.Store, name string) {
	t.Helper()
	id, err := engine.Remove(t.Context(), st, name, engine.RemoveOptions{Snapshots: true})
	if err == nil {
		_, err = engine.Reclaim(t.Context(), st, id, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestCopyLate: a command that comes to a copy when another one has brought it to its end, and
// somebody uses it, leaves it alone.
func TestCopyLate(t *testing.T) {
	racetest.Slow(t)
	src := newOriginal(t, 8, false)
	dst := mem.New()
	u := src.interrupted(dst, "s1", copying())
	two := [2]*copier{}
	for i := range two {
		o := copying()
		o.Options = o.withDefaults()
		two[i] = &copier{src: src.st, source: src.id, dst: dst, name: "new", o: o}
		if done, err := two[i].begin(t.Context()); done || err != nil {
			t.Fatal(done, err)
		}
	}
	if err := two[0].run(t.Context()); err != nil { // and it dies
		t.Fatal(err)
	}
	im, err := inproc.Open(t.Context(), dst, u.ID, quiet().inprocOptions())
	if err != nil {
		t.Fatal(err)
	}
	mine := bytes.Repeat([]byte("mine"), len(src.disk)/4)
	if err := im.WriteAt(t.Context(), mine, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := two[1].run(t.Context()); err == nil {
		t.Error("it was copied to")
	}
	mustHave(t, dst, u.ID, uint64(len(mine)), mine)
}

// TestCopyWholeTaken: what is to be copied as a whole is not taken for done because a copy of that
// name was made before, whose snapshot is still there.
func TestCopyWholeTaken(t *testing.T) {
	racetest.Slow(t)
	src, dst := newOriginal(t, 1, false), mem.New()
	made, err := Copy(t.Context(), src.st, src.id, dst, "new", copying())
	if err != nil {
		t.Fatal(err)
	}
	kept := copyPrefix + made.ID.String()
	if _, err := engine.CreateSnapshot(t.Context(), src.st, src.id, kept, engine.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	o := copying()
	o.Whole = true
	if again, err := Copy(t.Context(), src.st, src.id, dst, "new", o); !errors.Is(err, backend.ErrExists) {
		t.Errorf("%+v, %v", again, err)
	}
	list, err := engine.Snapshots(t.Context(), src.st, src.id)
	if err != nil || !slices.ContainsFunc(list, func(s engine.Snapshot) bool { return s.Name == kept }) {
		t.Errorf("the snapshot of the first copy has gone: %+v, %v", list, err)
	}
}
