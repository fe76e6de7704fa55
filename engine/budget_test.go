package engine

import (
	"context"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
)

func TestDestageMemory(t *testing.T) {
	m := destageMemory{limit: 10}
	own := map[string]int64{}
	for i, step := range []struct {
		image string
		n     int64 // taken, or given back
		ok    bool
	}{
		{"a", 4, true}, {"a", 4, true}, {"a", 4, false},
		{"b", 4, true},                   // its first
		{"b", 1, false},                  // all is used
		{"a", -4, true}, {"a", 4, false}, // half is b's
		{"b", 1, true}, {"b", 1, false},
		{"a", -4, true}, {"a", 4, true}, {"a", 1, true}, {"a", 1, false},
		{"b", -4, true}, {"b", -1, true}, {"a", 5, true},
		{"c", 99, true}, {"c", -99, true}, {"a", -10, true},
	} {
		if step.n < 0 {
			m.give(own[step.image], -step.n)
		} else if ok := m.take(own[step.image], step.n); ok != step.ok {
			t.Fatalf("step %d: %s has %d and takes %d: %t", i, step.image, own[step.image], step.n, ok)
		}
		if step.ok {
			own[step.image] += step.n
		}
	}
	if m.used != 0 || m.images != 0 {
		t.Errorf("%d bytes of %d images are left", m.used, m.images)
	}
}

// TestObjectsShareMemory: while the store is away, images keep as many objects at
// hand as their memory allows, one at least; all of it is free again at the end,
// also that of an image that ends with its objects unsent.
func TestObjectsShareMemory(t *testing.T) {
	down := faultstore.NewSwitch()
	st := faultstore.New(mem.New(), faultstore.If(faultstore.All(down.On, faultstore.Method(faultstore.Put)), faultstore.Fault{Before: backend.ErrTemporary}))
	shared := NewShared(Limits{Destage: 4 * (MinObjectSize + 128<<10)})
	var hosts []*host
	for i, name := range []string{"alpha", "beta", "gamma"} {
		h := newHost(t, name, st, uint64(i))
		h.shared = shared
		id, err := Create(context.Background(), st, name, CreateOptions{Size: 64 << 20, ObjectSize: MinObjectSize})
		if err == nil {
			err = h.open(id, false)
		}
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	down.Set(true)
	for i, want := range []int{4, 1, 1} {
		h := hosts[i]
		for n := uint64(0); n < 6*MinObjectSize/4096; n++ {
			h.mustWrite(n, n+1)
		}
		built := 0
		for _, b := range h.im.queue {
			if b.buf != nil {
				built++
			}
		}
		if built != want || len(h.im.queue) < 5 {
			t.Errorf("%s: %d objects of %d are at hand, want %d", h.name, built, len(h.im.queue), want)
		}
	}
	hosts[2].im.Abandon()
	down.Set(false)
	for _, h := range hosts[:2] {
		h.run(time.Minute)
		h.mustDestage()
		h.mustRead(5, 6)
	}
	if m := &shared.destage; m.used != 0 || m.images != 0 {
		t.Errorf("%d bytes of %d images are left", m.used, m.images)
	}
}
