//go:build lab

package engine

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/rados"
	"github.com/lsd-ceph/lsd/internal/cephtest"
)

func TestMain(m *testing.M) { os.Exit(cephtest.Main(m, 100, "memstore")) }

// newRADOS returns a function that opens a new, empty store by a connection of
// its own each time, as another host does.
func newRADOS(t testing.TB) func() backend.Store {
	u := backend.URL{Scheme: backend.SchemeRADOS, Pool: "rbd", Namespace: "engine-" + uuid.NewString()}
	return func() backend.Store {
		ctx, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		st, err := new(rados.Clusters).Open(ctx, u)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.Close() })
		return st
	}
}

// TestRADOSPausedHostIsFenced is TestPausedHostIsFenced on a real cluster, where
// the paused host's client is blocklisted too.
func TestRADOSPausedHostIsFenced(t *testing.T) { pausedHostIsFenced(t, newRADOS(t)) }

// TestRADOSNeighbourGoesOn: two images share a connection. One is taken by
// another host while this one is paused, which blocklists the connection: the
// image is fenced, and the other one goes on by itself.
func TestRADOSNeighbourGoesOn(t *testing.T) {
	open := newRADOS(t)
	st := open()
	taken, err := Create(context.Background(), st, "taken", CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	kept := newImageIn(t, st)
	a, n := newHost(t, "alpha", st, 1), newHost(t, "alpha", st, 2)
	for h, id := range map[*host]uuid.UUID{a: taken, n: kept} {
		if err := h.open(id, false); err != nil {
			t.Fatal(err)
		}
		h.mustWrite(1, 1)
	}
	old := st.(backend.Fencer).Identity()
	b := newHost(t, "beta", open(), 3)
	if err := b.open(taken, true); err != nil { // alpha is paused meanwhile
		t.Fatal(err)
	}
	b.mustWrite(1, 2)
	for _, h := range []*host{a, n} {
		h.env.now += 11 * time.Second
	}
	n.im.Destage(func(error) {})
	for deadline := time.Now().Add(30 * time.Second); a.im.state != Fenced || n.im.accepted.seq == 0; time.Sleep(10 * time.Millisecond) {
		a.run(time.Second)
		n.run(time.Second)
		if time.Now().After(deadline) {
			t.Fatalf("the image that was taken is %v, the other one has %+v", a.im.state, n.im.Stats())
		}
	}
	if now := st.(backend.Fencer).Identity(); now == old {
		t.Error("the connection was not shut out: this tests nothing")
	}
	n.mustWrite(2, 2)
	n.mustRead(1, 1)
	if s := n.im.Stats(); s.State != "active" || s.ReadErrors != 0 {
		t.Errorf("the other image: %+v", s)
	}
	b.mustRead(1, 2)
}

// TestRADOSCheck: an image on a real cluster is clean, and what is damaged there is
// named.
func TestRADOSCheck(t *testing.T) {
	c := newCheckedImageIn(t, newRADOS(t)())
	if rep := c.check(CheckOptions{Deep: true}); !rep.Clean() || len(rep.Errors)+len(rep.Dead) > 0 {
		t.Errorf("%s%+v", c.lines(rep), rep)
	}
	if rep, err := CheckStore(context.Background(), c.st, "rados://rbd", false); err != nil || !rep.Clean() {
		t.Errorf("store: %v, %+v", err, rep)
	}
	keys := c.keys("d/")
	c.corrupt(keys[len(keys)-1], flipLast)
	if rep := c.check(CheckOptions{Deep: true}); len(rep.Errors) != 1 || rep.Errors[0].Object != keys[len(keys)-1] {
		t.Errorf("%s is damaged: %s", keys[len(keys)-1], c.lines(rep))
	}
}

// mutableStore is a store whose mutable objects are in another one.
type mutableStore struct {
	*hugeStore
	mutable backend.Store
}

func (s *mutableStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	return s.mutable.Load(ctx, key)
}

func (s *mutableStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	return s.mutable.Swap(ctx, key, old, b)
}

func (s *mutableStore) Delete(ctx context.Context, key string) error {
	return s.mutable.Delete(ctx, key)
}

// BenchmarkRADOSSnapshots tells what these take on a real cluster, each of them, against the
// size of the image, and what a round trip takes: the longest of all runs as well. The image's
// data and map are made up as they are asked for, in this process.
func BenchmarkRADOSSnapshots(b *testing.B) {
	ctx := context.Background()
	for _, size := range constantSizes {
		huge := newHugeStore(b, size)
		before, _, err := loadSuperblock(ctx, huge, huge.id)
		if err != nil {
			b.Fatal(err)
		}
		st := &mutableStore{huge, newRADOS(b)()}
		if _, err := st.Swap(ctx, SuperblockKey(huge.id), backend.NoVersion, before.encode()); err != nil {
			b.Fatal(err)
		}
		if err := backend.Link(ctx, st, before.Name, huge.id); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%dGiB", size>>30), func(b *testing.B) {
			took := map[string][]time.Duration{}
			measure := func(name string, do func() error) {
				began := time.Now()
				if err := do(); err != nil {
					b.Fatal(err)
				}
				took[name] = append(took[name], time.Since(began))
			}
			for b.Loop() {
				measure("round trip", func() error { _, _, err := st.Load(ctx, SuperblockKey(huge.id)); return err })
				for _, op := range constantOps(huge.id) {
					measure(op.name, func() error { return op.do(ctx, st) })
				}
				if err := restoreImage(ctx, st, huge.id, before); err != nil {
					b.Fatal(err)
				}
			}
			var table strings.Builder
			for _, name := range slices.Sorted(maps.Keys(took)) {
				list := took[name]
				slices.Sort(list)
				fmt.Fprintf(&table, "; %s %.2f (%.2f)", name, list[len(list)/2].Seconds()*1000, list[len(list)-1].Seconds()*1000)
			}
			b.Logf("ms, median (longest) of %d%s", len(took["list"]), table.String())
		})
	}
}
