package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/frame"
)

// TestMissingPart: an image that has lost an object is damaged; one that has lost its
// superblock is gone.
func TestMissingPart(t *testing.T) {
	ctx := context.Background()
	for _, super := range []bool{false, true} {
		for _, readOnly := range []bool{false, true} {
			st := mem.New()
			id := newImageIn(t, st)
			a := newHost(t, "alpha", st, 1)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustWrite(1, 1)
			a.mustClose()
			key := manifestKey(id, *a.im.checkpoint.last, 0)
			if super {
				key = SuperblockKey(id)
			}
			if err := st.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
			o := OpenOptions{ReadOnly: readOnly, Clock: a, Config: Config{Logger: quiet}}
			if !readOnly {
				o.Log = newHost(t, "beta", st, 2).disk
			}
			_, err := Open(ctx, st, id, o)
			if errors.Is(err, backend.ErrNotFound) != super || errors.Is(err, ErrCorrupt) == super {
				t.Errorf("%s is missing, read-only %v: %v", key, readOnly, err)
			}
		}
	}
}

// TestMissingPartOfWhole: what an attach does not find says nothing against the image if
// another host has changed it meanwhile, or if that cannot be known.
func TestMissingPartOfWhole(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	a, b := newHost(t, "alpha", inner, 1), newHost(t, "beta", inner, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustClose()
	// Beta takes it over, and has another checkpoint, while alpha recovers.
	a.again()
	a.st = &manifestStore{Store: inner, hook: func() {
		if err := b.open(id, true); err != nil {
			t.Fatal(err)
		}
		b.mustOverwrite(8)
		b.mustClose()
	}}
	if err := a.open(id, false); err == nil || errors.Is(err, ErrCorrupt) || errors.Is(err, backend.ErrNotFound) {
		t.Errorf("overtaken: %v", err)
	}
	// A store that has lost a manifest, and does not answer then.
	lost := false
	c := newHost(t, "gamma", faultstore.New(inner, func(op faultstore.Op) (f faultstore.Fault) {
		switch {
		case strings.Contains(op.Key, "/c/") && op.Method == faultstore.Stat:
			lost, f.Before = true, backend.ErrNotFound
		case lost && op.Method == faultstore.Load:
			f.Before = backend.ErrTemporary
		}
		return f
	}), 3)
	if err := c.open(id, false); !lost || !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("not known: %v", err)
	}
}

// looseOwner returns a host that has given the image up, everything in the store, while of
// the cleaner's objects the first one was refused.
func looseOwner(t *testing.T, st *faultstore.Store) *host {
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	stuck := ""
	st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
		if r := a.im.clean.running; stuck == "" && r != nil && r.objects > 0 {
			stuck = dataKey(id, a.im.accepted.object+1, 1)
		}
		if op.Method == faultstore.Put && op.Key == stuck {
			f.Before = backend.ErrTemporary
		}
		return f
	})
	rng := rand.New(rand.NewPCG(1, 1))
	for i := uint64(0); i < 60000 && stuck == ""; i++ {
		a.mustWrite(rng.Uint64N(4000), i)
	}
	var told []error
	a.im.Close(func(err error) { told = append(told, err) })
	a.mustBeAsked()
	a.run(time.Minute)
	if a.im.accepted.seq != a.im.sealed.seq || a.im.accepted == a.im.sealed || a.im.state != Released {
		t.Fatalf("accepted %v, sealed %v, %v: this tests nothing", a.im.accepted, a.im.sealed, a.im.state)
	}
	if len(told) != 1 || told[0] != nil {
		t.Errorf("who had closed it was told %v", told)
	}
	st.Inject()
	return a
}

// TestLooseEnd: an owner that goes while objects of its cleaner are under way has lost
// nothing, and what it leaves of them is removed.
func TestLooseEnd(t *testing.T) {
	for _, other := range []bool{false, true} {
		st := faultstore.New(mem.New())
		b := looseOwner(t, st)
		id := b.im.id
		if b.again(); other {
			b = newHost(t, "beta", st, 2)
		}
		if err := b.open(id, false); err != nil {
			t.Fatal(err)
		}
		if sb := b.im.super.sb; len(sb.Points) > 0 || len(sb.Stale) == 0 || sb.Loose {
			t.Errorf("points %v, stale %v, loose %v", sb.Points, sb.Stale, sb.Loose)
		}
		b.run(10 * time.Minute)
		b.mustClose()
		mustBeClean(t, st)
	}
}

// TestSpentLogLeavesNothing: an owner gives the image up with a record in its log alone
// that it has not acknowledged, and objects beyond a gap; its log turns out to hold no
// more than the store has. The objects are removed.
func TestSpentLogLeavesNothing(t *testing.T) {
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprintf("an attempt fails %v", fails), func(t *testing.T) { spentLogLeavesNothing(t, fails) })
	}
}

// spentLogLeavesNothing is TestSpentLogLeavesNothing; fails says that the first attempt
// to attach the image again takes it, and then cannot read it.
func spentLogLeavesNothing(t *testing.T, fails bool) {
	st := faultstore.New(mem.New())
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustDestage()
	// The first object is there, but the owner does not learn that.
	first, second := dataKey(id, 2, 1), dataKey(id, 3, 1)
	st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
		if op.Method == faultstore.Put && (op.Key == first || op.Key == second) {
			f.Before = backend.ErrTemporary
		}
		return f
	})
	for n := range uint64(3) {
		a.mustWrite(2, n)
		a.im.Destage(func(error) {})
		a.run(0)
	}
	a.mustBeAsked()
	a.run(time.Minute)
	if a.im.state != Released || !a.im.super.gaveUp {
		t.Fatalf("alpha is %v: this tests nothing", a.im.state)
	}
	st.Inject()
	// They come late, all but the last.
	for _, b := range a.im.queue[:2] {
		for _, o := range b.built {
			if err := st.Put(context.Background(), dataKey(id, o.header.seq, 1), o.bytes); err != nil {
				t.Fatal(err)
			}
		}
	}
	a.again()
	if fails {
		taken := false
		st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
			taken = taken || op.Method == faultstore.Swap
			if taken && op.Method == faultstore.Get {
				f.Before = backend.ErrPermanent
			}
			return f
		})
		if err := a.open(id, false); !taken || !errors.Is(err, backend.ErrPermanent) {
			t.Fatalf("%v: this tests nothing", err)
		}
		st.Inject()
	}
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	if sb := a.im.super.sb; len(sb.Points) > 0 || len(sb.Stale) == 0 || sb.Loose {
		t.Errorf("points %v, stale %v, loose %v", sb.Points, sb.Stale, sb.Loose)
	}
	a.mustRead(2, 2)
	a.run(10 * time.Minute)
	a.mustClose()
	mustBeClean(t, st)
}

// TestOtherVersionIsRefused: an image of another version of lsd is not taken: what is in its
// objects and its map could not be read, and what would be written could not be by those who
// made it.
func TestOtherVersionIsRefused(t *testing.T) {
	ctx := context.Background()
	for _, version := range []uint32{superOld - 1, superVersion + 1} {
		st := mem.New()
		h, id := attached(t, st, smallImage(), nil)
		h.mustWrite(1, 1)
		h.mustClose()
		b, v, err := st.Load(ctx, SuperblockKey(id))
		if err != nil {
			t.Fatal(err)
		}
		payload, err := frame.Decode(superMagic, b, superOld)
		if err != nil {
			t.Fatal(err)
		}
		other := frame.Encode(superMagic, version, payload)
		if _, err := st.Swap(ctx, SuperblockKey(id), v, other); err != nil {
			t.Fatal(err)
		}
		h.again()
		if err := h.open(id, true); !errors.Is(err, frame.ErrVersion) || errors.Is(err, ErrCorrupt) {
			t.Errorf("version %d is opened: %v", version, err)
		}
		if _, err := Check(ctx, st, "disk", "mem:/disk", CheckOptions{}); !errors.Is(err, frame.ErrVersion) {
			t.Errorf("version %d is checked: %v", version, err)
		}
		if b, _, err := st.Load(ctx, SuperblockKey(id)); err != nil || !bytes.Equal(b, other) {
			t.Errorf("the superblock of version %d has changed (%v)", version, err)
		}
	}
}

// panickingStore panics when a data object is read.
type panickingStore struct{ *mem.Store }

func (s panickingStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if strings.Contains(key, "/d/") {
		panic("this object")
	}
	return s.Store.Get(ctx, key, p, off)
}

// TestPanicOfHelper: a panic of a goroutine that helps recovery is that of whoever opens the
// image, and does not end the process.
func TestPanicOfHelper(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustWrite(1, 1)
	h.mustDestage()
	h.im.Abandon()
	defer func() {
		if v := recover(); v == nil || !strings.Contains(fmt.Sprint(v), "this object") {
			t.Errorf("recovered %v", v)
		}
	}()
	_, err := Open(context.Background(), panickingStore{st}, id, OpenOptions{ReadOnly: true, Config: Config{Logger: quiet}})
	t.Errorf("the image is opened: %v", err)
}

// latecomerStore has the first change of a superblock come when the second one is about to.
type latecomerStore struct {
	backend.Store
	first func() // that change, once it has been given up
}

// Swap implements backend.Store.
func (s *latecomerStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	if s.first == nil {
		s.first = func() { _, _ = s.Store.Swap(context.Background(), key, old, b) }
		return "", &backend.Error{Op: "swap", Key: key, Class: backend.ErrTemporary}
	}
	s.first()
	s.first = func() {}
	return s.Store.Swap(ctx, key, old, b)
}

// TestOpenAfterLateAttempt: an attach that was given up, and takes the image while the next one of
// the same host is at it, is not another host's.
func TestOpenAfterLateAttempt(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "alpha", &latecomerStore{Store: st}, 1)
	if err := h.open(id, false); !errors.Is(err, backend.ErrTemporary) {
		t.Fatal(err)
	}
	h.again()
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustFill(1000)
	h.mustClose()
}
