package inproc_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

const (
	size  = 64 << 20
	piece = 1 << 16
)

func newImage(t *testing.T, st backend.Store) uuid.UUID {
	t.Helper()
	id, err := engine.Create(t.Context(), st, "disk", engine.CreateOptions{Size: size, ObjectSize: engine.MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func open(t *testing.T, st backend.Store, id uuid.UUID) *inproc.Image {
	t.Helper()
	im, err := inproc.Open(t.Context(), st, id, inproc.Options{URL: "mem:/disk"})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestImage: what several goroutines write at one time, more than the log holds, is there in
// the end, and nothing else.
func TestImage(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := newImage(t, st)
	before := runtime.NumGoroutine()
	im := open(t, st, id)
	if im.Size() != size {
		t.Errorf("it has %d bytes", im.Size())
	}
	want := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	for round := range 4 {
		var wg sync.WaitGroup
		for w := range 4 {
			part := want[w*size/4:][:size/4]
			_, _ = rng.Read(part[:size/8])
			wg.Go(func() {
				for off := 0; off < size/8; off += piece {
					if err := im.WriteAt(ctx, part[off:][:piece], uint64(w*size/4+off)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if round == 1 {
			clear(want[:3<<20])
			if err := im.Discard(ctx, 0, 3<<20); err != nil {
				t.Fatal(err)
			}
		}
		if round == 2 {
			if err := im.Destage(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustHave(t, im, want)
	if err := im.Close(ctx); err != nil {
		t.Fatal(err)
	}
	again := open(t, st, id)
	mustHave(t, again, want)
	if err := again.Shrink(ctx, size/2, nil); err != nil {
		t.Fatal(err)
	}
	if again.Size() != size/2 {
		t.Errorf("it has %d bytes after it was made smaller", again.Size())
	}
	if err := again.WriteAt(ctx, want[:4096], size/2); err == nil {
		t.Error("written beyond the end")
	}
	if err := engine.Grow(ctx, st, id, size); err != nil {
		t.Fatal(err)
	}
	if err := again.Refresh(ctx); err != nil || again.Size() != size {
		t.Errorf("it has %d bytes after it was made larger: %v", again.Size(), err)
	}
	clear(want[size/2:])
	mustHave(t, again, want)
	if err := again.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines are left of %d", runtime.NumGoroutine(), before)
		}
	}
	if rep, err := engine.Check(ctx, st, "disk", "mem:/disk", engine.CheckOptions{Deep: true}); err != nil || !rep.Clean() {
		t.Errorf("%v, %+v", err, rep)
	}
}

func mustHave(t *testing.T, im *inproc.Image, want []byte) {
	t.Helper()
	got := make([]byte, 3<<20)
	for off := 0; off < len(want); off += len(got) {
		p := got[:min(len(got), len(want)-off)]
		if err := im.ReadAt(t.Context(), p, uint64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want[off:][:len(p)]) {
			t.Fatalf("wrong data in the %d bytes from %d", len(p), off)
		}
	}
}

// TestOneAtATime: nobody has the image beside a process that lives; of one that has died it
// is to be had after the lease.
func TestOneAtATime(t *testing.T) {
	t.Parallel()
	st := mem.New()
	id := newImage(t, st)
	im := open(t, st, id)
	var owned *engine.OwnedError
	if _, err := inproc.Open(t.Context(), st, id, inproc.Options{URL: "mem:/disk"}); !errors.As(err, &owned) || !owned.Command {
		t.Fatalf("opened twice: %v", err)
	}
	if err := im.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	gone, stop := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	stop(enough)
	if err := im.Close(gone); !errors.Is(err, enough) {
		t.Errorf("closed for one who has gone: %v", err)
	}
	next := open(t, st, id)
	if err := next.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestLost: who has lost the image is told so.
func TestLost(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := newImage(t, st)
	im := open(t, st, id)
	if _, err := engine.Remove(ctx, st, "disk", engine.RemoveOptions{URL: "mem:/disk", Force: true}); err != nil {
		t.Fatal(err)
	}
	if err := im.Refresh(ctx); err == nil {
		t.Error("an image that was removed has a superblock")
	}
	err := im.WriteAt(ctx, make([]byte, 4096), 0)
	if err == nil || err.Error() != "write 4096 bytes at 0: fenced: the image has been removed" {
		t.Errorf("written to an image that was removed: %v", err)
	}
	if err := im.Close(ctx); err == nil {
		t.Error("an image that was removed is given back")
	}
}

// TestPartialGivenBack: an image that has been filled for long is not taken by gc for one that
// was left when the filling began.
func TestPartialGivenBack(t *testing.T) {
	st := mem.New()
	id, err := engine.CreatePartial(t.Context(), st, "new", engine.CreateOptions{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	im, err := inproc.Open(t.Context(), st, id, inproc.Options{URL: "mem:/new", Partial: true})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found, err := engine.GC(t.Context(), st, engine.GCOptions{Age: 1500 * time.Millisecond}); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
	if err := engine.Finish(t.Context(), st, "new", id, 0); err != nil {
		t.Error(err)
	}
}

// TestSnapshotFenced: one that has lost the image, and does not know it yet, does not get a
// snapshot of what another one has written since.
func TestSnapshotFenced(t *testing.T) {
	st := mem.New()
	id := newImage(t, st)
	var down atomic.Bool
	cut := faultstore.New(st, func(faultstore.Op) faultstore.Fault {
		if down.Load() {
			return faultstore.Fault{Before: &backend.Error{Op: "any", Class: backend.ErrTemporary, Cause: errors.New("cut off")}}
		}
		return faultstore.Fault{}
	})
	first, err := inproc.Open(t.Context(), cut, id, inproc.Options{URL: "mem:/disk", Lease: engine.MinLease, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	down.Store(true)
	second := open(t, st, id)
	down.Store(false)
	if err := first.Snapshot(t.Context(), "s"); err == nil {
		t.Error("it was made")
	}
	_ = first.Close(t.Context())
	if err := second.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if list, err := engine.Snapshots(t.Context(), st, id); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
}
