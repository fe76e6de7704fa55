package inproc_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// newClone makes an image with data in several objects, and a clone of it.
func newClone(t *testing.T, st backend.Store) (parent, clone uuid.UUID, want []byte) {
	t.Helper()
	parent = newImage(t, st)
	im := open(t, st, parent)
	want = make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(want[:8<<20])
	if err := im.WriteAt(t.Context(), want[:8<<20], 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	clone, err := engine.Clone(t.Context(), st, parent, "clone", engine.CloneOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return parent, clone, want
}

// needs returns what of the image needs something of its parent.
func needs(t *testing.T, st backend.Store, id uuid.UUID) []string {
	t.Helper()
	s, err := engine.Separate(t.Context(), st, id)
	if err != nil {
		t.Fatal(err)
	}
	return s.Needs
}

// TestFlatten: a flattening is paused when its context ends, and another one goes on; then the
// image needs nothing of its parent.
func TestFlatten(t *testing.T) {
	st := mem.New()
	parent, clone, want := newClone(t, st)
	reads := faultstore.NewGate()
	reads.Open()
	im := open(t, faultstore.New(st, faultstore.If(
		faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key(parent.String()+"/d/*")), faultstore.Fault{Gate: reads})), clone)
	enough := errors.New("enough")
	ctx, stop := context.WithCancelCause(t.Context())
	reads.Shut()
	var held sync.WaitGroup
	held.Go(func() {
		wait, over := context.WithTimeout(t.Context(), 10*time.Second)
		defer over()
		if err := reads.AwaitWaiting(wait, 1); err != nil {
			t.Errorf("it does not read: %v", err)
		}
		stop(enough)
		time.Sleep(300 * time.Millisecond) // in which it would go on if it were not told
		reads.Open()
	})
	if err := im.Flatten(ctx, nil); !errors.Is(err, engine.ErrPaused) || !errors.Is(err, enough) {
		t.Errorf("flattened for one who has gone: %v", err)
	}
	held.Wait()
	if err := im.Flatten(ctx, nil); !errors.Is(err, enough) {
		t.Errorf("begun for one who has gone: %v", err)
	}
	time.Sleep(100 * time.Millisecond)
	if got := needs(t, st, clone); len(got) != 1 {
		t.Errorf("while it is paused these need something: %q", got)
	}
	var moved, all uint64
	err := im.Flatten(t.Context(), func(done, total uint64) {
		if done < moved || done > total {
			t.Errorf("%d of %d bytes, after %d", done, total, moved)
		}
		moved, all = done, total
	})
	if err != nil || moved == 0 || moved != all {
		t.Errorf("moved %d of %d bytes: %v", moved, all, err)
	}
	mustHave(t, im, want)
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustBeAlone(t, st, clone, want)
}

// mustBeAlone ends that the image is a clone of disk, and removes that.
func mustBeAlone(t *testing.T, st backend.Store, id uuid.UUID, want []byte) {
	t.Helper()
	if got := needs(t, st, id); len(got) > 0 {
		t.Errorf("these need something of the parent: %q", got)
	}
	parent, err := engine.Remove(t.Context(), st, "disk", engine.RemoveOptions{})
	if err == nil {
		_, err = engine.Reclaim(t.Context(), st, parent, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := st.List(t.Context(), parent.String()+"/", func(key string) error {
		t.Errorf("%s is left", key)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	im := open(t, st, id)
	mustHave(t, im, want)
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestFlattenStoreFails: a store that fails for too long ends the wait, and the flattening; the
// same can be done again later.
func TestFlattenStoreFails(t *testing.T) {
	t.Parallel()
	st := mem.New()
	_, clone, want := newClone(t, st)
	outage := faultstore.NewSwitch()
	failing := faultstore.New(st, faultstore.If(outage.On, faultstore.Fault{Before: &backend.Error{Op: "any", Class: backend.ErrTemporary}}))
	im, err := inproc.Open(t.Context(), failing, clone, inproc.Options{
		URL: "mem:/clone", Patience: 1200 * time.Millisecond, Lease: engine.MinLease, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	outage.Set(true)
	if err := im.Flatten(t.Context(), nil); !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("flattened without a store: %v", err)
	}
	_ = im.Close(t.Context())
	outage.Set(false)
	again := open(t, st, clone)
	if err := again.Flatten(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := again.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustBeAlone(t, st, clone, want)
}
