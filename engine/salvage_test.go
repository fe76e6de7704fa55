package engine

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// noDataStore is a store whose data objects cannot be read now.
type noDataStore struct{ backend.Store }

func (s noDataStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if strings.Contains(key, "/d/") {
		return 0, &backend.Error{Op: "get", Key: key, Class: backend.ErrTemporary}
	}
	return s.Store.Get(ctx, key, p, off)
}

// TestSalvageUnsettled: a host takes an image over by force, finds that it cannot read
// it, and gives it back: where the ownership before ended is in no superblock then. The
// log of that is salvaged with all that it had put, though none of it is in the log any
// more.
func TestSalvageUnsettled(t *testing.T) {
	racetest.Slow(t)
	ctx := context.Background()
	st := mem.New()
	id, err := Create(ctx, st, "disk", CreateOptions{Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	a := newHost(t, "alpha", st, 1)
	if a.im, err = Open(ctx, st, id, OpenOptions{Log: a.disk, URL: "mem:/disk", Host: a.name, Clock: a, Config: Config{Logger: quiet}}); err != nil {
		t.Fatal(err)
	}
	a.im.Start(a.env, a.disk.Device(), make([]byte, 2*writelog.SegmentSize))
	const writes = 10000
	for n := range uint64(writes) {
		a.mustWrite(n, n+1)
	}
	a.mustDestage()
	a.mustWrite(5, 77777) // in the log alone
	if a.im.log.Head() <= a.im.log.Size() || a.im.checkpoint.last != nil {
		t.Fatal("the log has not wrapped since the last checkpoint: this tests nothing")
	}
	a.disk.Kill()
	a.again()

	b := newHost(t, "beta", noDataStore{st}, 2)
	if err := b.open(id, true); !errors.Is(err, backend.ErrTemporary) {
		t.Fatalf("open of what cannot be read: %v", err)
	}
	var stale *StaleLogError
	if err := a.open(id, false); !errors.As(err, &stale) {
		t.Fatalf("alpha's log: %v, want it refused as stale", err)
	}
	saved, err := Salvage(ctx, a.disk, st, id, st, "saved", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := newHost(t, "gamma", st, 3)
	if err := c.open(saved, false); err != nil {
		t.Fatal(err)
	}
	c.mustRead(5, 77777)
	c.mustRead(6, 7)
	c.mustRead(writes-1, writes)
}

// TestSalvageEmptyLog: an object of the owner before has come after a log was made, and
// before the superblock says where its ownership begins. There is nothing in that log, but
// it can be told what the image was.
func TestSalvageEmptyLog(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	id := newImageIn(t, st)
	z := newHost(t, "zeta", st, 1)
	if err := z.open(id, false); err != nil {
		t.Fatal(err)
	}
	z.mustWrite(1, 1)
	z.mustDestage()
	z.mustWrite(2, 2)
	z.mustDestage()
	key := dataKey(id, 2, 1)
	late := make([]byte, 2<<20)
	n, err := st.Get(ctx, key, late, 0)
	if err == nil {
		err = st.Delete(ctx, key) // it is on its way
	}
	if err != nil {
		t.Fatal(err)
	}

	// Alpha dies between making the log its own and telling the superblock.
	a := newHost(t, "alpha", &unsettledStore{Store: st}, 2)
	if err := a.open(id, true); err == nil {
		t.Fatal("alpha has got the image")
	}
	if err := st.Put(ctx, key, late[:n]); err != nil {
		t.Fatal(err)
	}
	b := newHost(t, "beta", st, 3)
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	saved, err := Salvage(ctx, a.disk, st, id, st, "saved", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := newHost(t, "gamma", st, 4)
	if err := c.open(saved, false); err != nil {
		t.Fatal(err)
	}
	c.mustRead(2, 2)
}

// unsettledStore takes the first change of a superblock that gives the image an owner,
// and none after that.
type unsettledStore struct {
	backend.Store
	owned bool
}

func (s *unsettledStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	id, _ := uuid.Parse(strings.TrimSuffix(key, "/super"))
	sb, err := decodeSuperblock(b, id)
	if err != nil {
		return "", err
	}
	if s.owned {
		return "", &backend.Error{Op: "swap", Key: key, Class: backend.ErrTemporary}
	}
	s.owned = sb.Owner != nil && sb.Evict == nil && sb.Owner.Host == "alpha"
	return s.Store.Swap(ctx, key, old, b)
}

// dyingStore is a store of a process that dies at its n-th Put of a data object.
type dyingStore struct {
	backend.Store
	n int
}

func (s *dyingStore) dead(op, key string) error {
	if s.n > 0 {
		return nil
	}
	return &backend.Error{Op: op, Key: key, Class: backend.ErrTemporary}
}

func (s *dyingStore) Put(ctx context.Context, key string, b []byte) error {
	if s.n--; s.dead("put", key) != nil {
		return s.dead("put", key)
	}
	return s.Store.Put(ctx, key, b)
}

func (s *dyingStore) Delete(ctx context.Context, key string) error {
	if err := s.dead("delete", key); err != nil {
		return err
	}
	return s.Store.Delete(ctx, key)
}

func (s *dyingStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	if err := s.dead("load", key); err != nil {
		return nil, "", err
	}
	return s.Store.Load(ctx, key)
}

// TestSalvageInterrupted: what is left of a salvage that has died cannot be attached, and
// does not keep its name.
func TestSalvageInterrupted(t *testing.T) {
	racetest.Slow(t)
	ctx := context.Background()
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	for n := range uint64(800) { // more than three objects
		a.mustWrite(n, n+1)
	}
	a.disk.Kill()
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	if _, err := Salvage(ctx, a.disk, st, id, &dyingStore{st, 3}, "saved", nil); !errors.Is(err, backend.ErrTemporary) {
		t.Fatalf("salvage: %v", err)
	}
	if half, err := backend.Lookup(ctx, st, "saved"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("image %v can be found: %v", half, err)
	}
	before := objectsOf(t, st, id, "d")
	saved, err := Salvage(ctx, a.disk, st, id, st, "saved", nil)
	if err != nil {
		t.Fatal(err)
	}
	if now := objectsOf(t, st, id, "d"); now != before {
		t.Errorf("%d data objects of the image, %d before", now, before)
	}
	c := newHost(t, "gamma", st, 3)
	if err := c.open(saved, false); err != nil {
		t.Fatal(err)
	}
	c.mustRead(799, 800)
}
