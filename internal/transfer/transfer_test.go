package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
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

// disk is a Source of what is in memory, with holes left out where known is set.
type disk struct {
	data  []byte
	at    int
	known bool
	err   error // instead of the end
}

func (d *disk) Size() (uint64, bool) {
	if !d.known {
		return uint64(d.at), false
	}
	return uint64(len(d.data)), true
}

func (d *disk) Next(ctx context.Context, p []byte) (off uint64, n int, err error) {
	if ctx.Err() != nil {
		return 0, 0, context.Cause(ctx)
	}
	for d.known && d.at+4096 <= len(d.data) && isZero(d.data[d.at:][:4096]) {
		d.at += 4096
	}
	if d.at == len(d.data) {
		if d.err != nil {
			return 0, 0, d.err
		}
		return 0, 0, io.EOF
	}
	off, n = uint64(d.at), copy(p, d.data[d.at:])
	d.at += n
	return off, n, nil
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// contents returns n bytes, half of which are in blocks of zeroes.
func contents(n int, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	data := rand.NewChaCha8([32]byte{byte(seed)})
	b := make([]byte, n)
	for at := 0; at < n; {
		k := min(n-at, (1+rng.IntN(100))*4096)
		if rng.IntN(2) == 0 {
			_, _ = data.Read(b[at:][:k])
		}
		at += k
	}
	return b
}

// quiet are options for tests.
func quiet() Options {
	return Options{URL: "mem:/new", Logger: slog.New(slog.DiscardHandler), patience: 100 * time.Millisecond, lease: engine.MinLease}
}

// must has an image, of which a snapshot is wanted if one is named, have the contents, and
// zeroes beyond.
func mustHave(t *testing.T, st backend.Store, id uuid.UUID, size uint64, want []byte) {
	t.Helper()
	im, err := inproc.Open(t.Context(), st, id, quiet().inprocOptions())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := im.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	if im.Size() != size {
		t.Errorf("it has %d bytes, want %d", im.Size(), size)
	}
	want = append(bytes.Clone(want), make([]byte, int(size)-len(want))...)
	got := make([]byte, size)
	if err := im.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("wrong data")
	}
}

func (o Options) inprocOptions() inproc.Options {
	o = o.withDefaults()
	return o.inproc()
}

// keys returns what is in a store but the directory of names.
func keys(t *testing.T, st backend.Store) (list []string) {
	t.Helper()
	err := st.List(context.Background(), "", func(key string) error {
		if key != backend.DirectoryKey {
			list = append(list, key)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// mustBeClean has nothing be wrong with an image.
func mustBeClean(t *testing.T, st backend.Store, name string) {
	t.Helper()
	rep, err := engine.Check(t.Context(), st, name, "mem:/"+name, engine.CheckOptions{Deep: true})
	if err != nil || !rep.Clean() {
		t.Errorf("%v, %+v", err, rep)
	}
}

func TestImport(t *testing.T) {
	for i, x := range []struct {
		size, ask, want uint64
		block           uint32
	}{
		{20 << 20, 0, 20 << 20, 0},
		{20<<20 + 1, 0, 20<<20 + 4096, 4096},
		{20<<20 + 1, 0, 20<<20 + 512, 512},
		{3<<20 + 5000, 7 << 20, 7 << 20, 0},
		{1, 0, 4096, 0},
		{0, 1 << 20, 1 << 20, 0},
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d of %d, %v", x.size, x.ask, known), func(t *testing.T) {
				if i > 0 {
					racetest.Slow(t)
				}
				t.Parallel()
				st := mem.New()
				d := &disk{data: contents(int(x.size), 1), known: known}
				if x.size > 0 {
					d.data[x.size-1] = 1
				}
				made, err := Import(t.Context(), st, "new", d, engine.CreateOptions{Size: x.ask, BlockSize: x.block, ObjectSize: engine.MinObjectSize}, quiet())
				if err != nil {
					t.Fatal(err)
				}
				if made.Size != x.want || x.size >= 20<<20 && (made.Data < x.size/5 || made.Data > x.size*4/5) {
					t.Errorf("made %+v", made)
				}
				info, err := engine.Describe(t.Context(), st, "new")
				if err != nil || info.ID != made.ID || info.Size != x.want || info.Owner != nil {
					t.Errorf("%+v, %v", info, err)
				}
				mustBeClean(t, st, "new")
				mustHave(t, st, made.ID, x.want, d.data)
				mustBeClean(t, st, "new")
				if found, err := engine.GC(t.Context(), st, engine.GCOptions{Age: 1}); err != nil || len(found) > 0 {
					t.Errorf("gc: %+v, %v", found, err)
				}
			})
		}
	}
}

// TestImportRefused: what cannot be made leaves nothing.
func TestImportRefused(t *testing.T) {
	broken := errors.New("broken")
	for _, x := range []struct {
		src  disk
		size uint64
		want string
	}{
		{disk{}, 0, "there is nothing in it: an image must have at least one block"},
		{disk{known: true}, 0, "size 0: an image must have at least one block"},
		{disk{data: make([]byte, 5000), known: true}, 4096, "size 4096: there are 5000 bytes to import"},
		{disk{data: contents(5<<20, 1)}, 4 << 20, "size 4194304: there are 5242880 bytes to import"},
		{disk{data: contents(5<<20, 1), err: broken}, 0, "broken"},
		{disk{data: contents(5<<20, 1), err: broken, known: true}, 0, "broken"},
	} {
		st := mem.New()
		_, err := Import(t.Context(), st, "new", &x.src, engine.CreateOptions{Size: x.size, ObjectSize: engine.MinObjectSize}, quiet())
		if err == nil || err.Error() != x.want {
			t.Errorf("%v, want %s", err, x.want)
		}
		if got := keys(t, st); len(got) > 0 {
			t.Errorf("%s: left %q", x.want, got)
		}
	}
	st := mem.New()
	if _, err := engine.Create(t.Context(), st, "new", engine.CreateOptions{Size: 4096}); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(t.Context(), st, "new", &disk{data: make([]byte, 1)}, engine.CreateOptions{}, quiet()); !errors.Is(err, backend.ErrExists) {
		t.Error(err)
	}
	if got := keys(t, st); len(got) != 1 {
		t.Errorf("left %q", got)
	}
}

var errDied = &backend.Error{Op: "any", Class: backend.ErrPermanent, Cause: errors.New("the process has died")}

// dying returns the store of a process that dies with its n-th call, of which nothing or all
// is done.
func dying(st backend.Store, n int, done bool) backend.Store {
	calls := atomic.Int64{}
	return faultstore.New(st, func(faultstore.Op) faultstore.Fault {
		switch k := calls.Add(1); {
		case k < int64(n):
			return faultstore.Fault{}
		case k == int64(n) && done:
			return faultstore.Fault{After: errDied}
		}
		return faultstore.Fault{Before: errDied}
	})
}

// TestImportKilled: a process that dies while it imports leaves an image that is whole, or
// none, and nothing that gc does not find.
func TestImportKilled(t *testing.T) {
	data := contents(6<<20, 3)
	step := 3
	if testing.Short() {
		step = 12
	}
	for n := 1; n < 60; n += step {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			st := mem.New()
			src := &disk{data: data, known: n%5 > 1}
			_, err := Import(t.Context(), dying(st, n, n%2 == 1), "new", src, engine.CreateOptions{ObjectSize: engine.MinObjectSize}, quiet())
			id, lerr := backend.Lookup(t.Context(), st, "new")
			switch {
			case lerr == nil: // also where nobody heard of it
				mustHave(t, st, id, 6<<20, data)
				mustBeClean(t, st, "new")
				return
			case err == nil || !errors.Is(lerr, backend.ErrNotFound):
				t.Fatalf("no image: %v, %v", err, lerr)
			}
			collectLater(t, st)
			if got := keys(t, st); len(got) > 0 {
				t.Errorf("left %q", got)
			}
		})
	}
}

// collectLater collects garbage when nothing can come any more of processes that have died.
func collectLater(t *testing.T, st backend.Store) {
	t.Helper()
	later := func() time.Time { return time.Now().Add(2 * engine.MaxLease) }
	if _, err := engine.GC(t.Context(), st, engine.GCOptions{Age: 1, Now: later}); err != nil {
		t.Fatal(err)
	}
}

// TestImportInterrupted: one that is told to stop leaves nothing.
func TestImportInterrupted(t *testing.T) {
	for n := 1; n < 30; n += 3 {
		st := mem.New()
		ctx, stop := context.WithCancelCause(t.Context())
		enough := errors.New("enough")
		calls := atomic.Int64{}
		watched := faultstore.New(st, func(faultstore.Op) faultstore.Fault {
			if calls.Add(1) == int64(n) {
				stop(enough)
			}
			return faultstore.Fault{}
		})
		_, err := Import(ctx, watched, "new", &disk{data: contents(6<<20, 3)}, engine.CreateOptions{ObjectSize: engine.MinObjectSize}, quiet())
		if err == nil {
			continue
		}
		if !errors.Is(err, enough) && !errors.Is(err, context.Canceled) {
			t.Errorf("%d: %v", n, err)
		}
		if got := keys(t, st); len(got) > 0 {
			t.Errorf("%d: left %q", n, got)
		}
	}
}

// TestImportBesideGC: an image that is being written is not collected, however long that
// takes.
func TestImportBesideGC(t *testing.T) {
	st := mem.New()
	d := &disk{data: contents(6<<20, 3)}
	found := make(chan int, 1)
	o := quiet()
	o.Progress = func(what string, done, _ uint64) {
		if done < 5<<20 || len(found) > 0 {
			return
		}
		list, err := engine.GC(t.Context(), st, engine.GCOptions{Age: 1})
		if err != nil {
			t.Error(err)
		}
		found <- len(list)
	}
	made, err := Import(t.Context(), st, "new", d, engine.CreateOptions{ObjectSize: engine.MinObjectSize}, o)
	if err != nil {
		t.Fatal(err)
	}
	if n := <-found; n > 0 {
		t.Errorf("gc has found %d", n)
	}
	mustHave(t, st, made.ID, 6<<20, d.data)
}
