package inproc_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// put has w write p at off.
func put(t *testing.T, w *inproc.Writer, p []byte, off int) {
	t.Helper()
	b, err := w.Buffer()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(b[:copy(b, p)], uint64(off)); err != nil {
		t.Fatal(err)
	}
}

// TestWriter: what was written last is there, also where pieces overlap.
func TestWriter(t *testing.T) {
	st := mem.New()
	im := open(t, st, newImage(t, st))
	w := inproc.NewWriter(t.Context(), im, false)
	want := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	data := rand.NewChaCha8([32]byte{2})
	at := 0
	for range 300 {
		n := (1 + rng.IntN(inproc.PieceSize/512)) * 512
		if at+n > size || rng.IntN(4) == 0 {
			at = rng.IntN((size-n)/512) * 512
		}
		if rng.IntN(5) == 0 {
			clear(want[at:][:n])
			if err := w.Discard(uint64(at), uint64(n)); err != nil {
				t.Fatal(err)
			}
		} else {
			_, _ = data.Read(want[at:][:n])
			put(t, w, want[at:][:n], at)
		}
		at += n
	}
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	mustHave(t, im, want)
	w.Stop()
	if _, err := w.Buffer(); err == nil {
		t.Error("written after the end")
	}
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestWriterSparse: zeroes are left out, and nothing else.
func TestWriterSparse(t *testing.T) {
	st := mem.New()
	im := open(t, st, newImage(t, st))
	w := inproc.NewWriter(t.Context(), im, true)
	want := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	wrote := 0
	for at := 0; at < size; at += 4096 {
		if rng.IntN(3) == 0 {
			want[at+rng.IntN(4096)] = 1
			wrote += 4096
		}
	}
	for at := 0; at < size; at += inproc.PieceSize {
		put(t, w, want[at:][:inproc.PieceSize], at)
	}
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := w.Wrote(); got != uint64(wrote) {
		t.Errorf("%d bytes were written, want %d", got, wrote)
	}
	mustHave(t, im, want)
	w.Stop()
	if err := im.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestStoreFails: a store that fails for too long, or is full, ends what waits for it, and the
// image can be had again.
func TestStoreFails(t *testing.T) {
	const patience = 1200 * time.Millisecond
	for _, x := range []struct {
		err   error
		least time.Duration
	}{
		{&backend.Error{Op: "put", Class: backend.ErrTemporary}, patience},
		{&backend.Error{Op: "put", Class: backend.ErrTemporary, Cause: syscall.ENOSPC}, 0},
	} {
		t.Run(x.err.Error(), func(t *testing.T) {
			t.Parallel()
			inner := mem.New()
			outage := faultstore.NewSwitch()
			st := faultstore.New(inner, faultstore.If(faultstore.All(faultstore.Method(faultstore.Put), outage.On), faultstore.Fault{Before: x.err}))
			id := newImage(t, st)
			im, err := inproc.Open(t.Context(), st, id, inproc.Options{URL: "mem:/disk", Patience: patience, Lease: engine.MinLease})
			if err != nil {
				t.Fatal(err)
			}
			if err := im.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 4096), 0); err != nil {
				t.Fatal(err)
			}
			outage.Set(true)
			began := time.Now()
			err = im.Destage(t.Context())
			if took := time.Since(began); took < x.least || took > x.least+10*time.Second || x.least == 0 && took >= patience {
				t.Errorf("it took %v", took)
			}
			if !errors.Is(err, x.err) || !strings.HasPrefix(err.Error(), "the store fails: put "+id.String()) {
				t.Errorf("destaged: %v", err)
			}
			if err := im.Close(context.Background()); !errors.Is(err, x.err) {
				t.Errorf("closed: %v", err)
			}
			outage.Set(false)
			again := open(t, st, id)
			if err := again.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}
