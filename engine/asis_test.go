package engine

import (
	"context"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// manifestStore calls hook right before the first look at a checkpoint's manifest.
type manifestStore struct {
	backend.Store
	hook func()
}

func (s *manifestStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	if hook := s.hook; hook != nil && strings.Contains(key, "/c/") {
		s.hook = nil
		hook()
	}
	return s.Store.Stat(ctx, key)
}

// TestReadOnlyBesideOwner: an image is opened read-only while its owner publishes a
// checkpoint and removes the one before.
func TestReadOnlyBesideOwner(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	n := uint64(0)
	checkpoint := func() {
		for last := a.im.checkpoint.last; a.im.checkpoint.last == last; {
			n++
			a.mustWrite(n%100, n)
			a.mustDestage()
		}
	}
	checkpoint()
	prying := &manifestStore{Store: st}
	prying.hook = checkpoint
	im, err := Open(context.Background(), prying, id, OpenOptions{ReadOnly: true, Config: Config{Logger: quiet}})
	if err != nil {
		t.Fatal(err)
	}
	if prying.hook != nil {
		t.Error("no manifest was read: this tests nothing")
	}
	b := newHost(t, "beta", st, 2)
	b.im = im
	im.Start(b.env, nil, nil)
	b.mustRead(n%100, n)
}

// TestReadOnlyIsNotOlder: while an image is opened read-only its owner goes on, and
// removes what the image was when that began. What is opened is no older than that.
func TestReadOnlyIsNotOlder(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	a, b := newHost(t, "alpha", inner, 1), newHost(t, "beta", nil, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustWrite(2, 1)
	a.mustDestage()
	loads := 0
	st := hookedStore{inner, func() {
		if loads++; loads == 1 || loads == 2 {
			a.mustOverwrite(4)
			a.mustWrite(2, uint64(10*loads))
			a.mustOverwrite(4)
		}
	}}
	var err error
	if b.im, err = Open(context.Background(), st, id, OpenOptions{ReadOnly: true, Clock: b, Config: Config{Logger: quiet}}); err != nil {
		t.Fatal(err)
	}
	b.im.Start(b.env, nil, nil)
	b.mustRead(1, 4)
	b.mustRead(2, 20)
}

// TestGrowBesideReaders: an image grows, and is written to beyond its old end, while somebody
// opens it who has looked at its superblock before.
func TestGrowBesideReaders(t *testing.T) {
	ctx, inner := context.Background(), mem.New()
	h, id := attached(t, inner, CreateOptions{Size: 10 * 4096, ObjectSize: MinObjectSize}, nil)
	h.mustWrite(9, 9)
	h.mustCheckpoint()
	prying := &manifestStore{Store: inner}
	prying.hook = func() {
		mustGrow(t, inner, id, 1<<30, h)
		h.mustWrite(1<<18-1, 5)
		h.mustDestage()
	}
	im, err := Open(ctx, prying, id, OpenOptions{ReadOnly: true, Config: Config{Logger: quiet}})
	if err != nil {
		t.Fatal(err)
	}
	b := newHost(t, "beta", inner, 2)
	b.im = im
	im.Start(b.env, nil, nil)
	b.mustRead(9, 9)
	b.mustRead(1<<18-1, 5)
	prying.hook = func() {
		mustGrow(t, inner, id, 2<<30, h)
		h.mustWrite(1<<19-1, 6)
		h.mustDestage()
	}
	if rep, err := Check(ctx, prying, "disk", "mem:/disk", CheckOptions{Deep: true}); err != nil || !rep.Clean() {
		t.Errorf("check: %v, %+v", err, rep)
	}
	if prying.hook != nil {
		t.Error("no manifest was read: this tests nothing")
	}
}
