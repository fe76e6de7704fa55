package faultstore_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	. "github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func TestNoFaults(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func(*testing.T) backend.Store {
		s := mem.New()
		return func(*testing.T) backend.Store { return New(s.Handle()) }
	})
}

func TestBeforeAndAfter(t *testing.T) {
	ctx := context.Background()
	inner := mem.New()
	s := New(inner, If(All(Method(Put), Key("a/?"), First(1)), Fault{Before: backend.ErrTemporary}),
		If(All(Method(Put, Swap), Key("b/*")), Fault{After: backend.ErrTemporary}))

	if err := s.Put(ctx, "a/1", nil); !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("Put with a fault before: %v", err)
	}
	if _, err := inner.Stat(ctx, "a/1"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it took effect: %v", err)
	}
	if err := s.Put(ctx, "a/1", nil); err != nil {
		t.Errorf("second Put: %v", err)
	}
	if err := s.Put(ctx, "b/1", nil); !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("Put with a fault after: %v", err)
	}
	if _, err := inner.Stat(ctx, "b/1"); err != nil {
		t.Errorf("it had no effect: %v", err)
	}
	if err := s.Put(ctx, "b/1", nil); !errors.Is(err, backend.ErrExists) {
		t.Errorf("Put with a fault after, that fails itself: %v", err)
	}
	if v, err := s.Swap(ctx, "b/m", backend.NoVersion, nil); !errors.Is(err, backend.ErrTemporary) || v != backend.NoVersion {
		t.Errorf("Swap with a fault after: %q, %v", v, err)
	}
	if _, _, err := s.Load(ctx, "b/m"); err != nil {
		t.Errorf("it had no effect: %v", err)
	}
}

func TestLate(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	inner := mem.New()
	var effects []func()
	s := New(inner, If(All(Any, Not(Method(Stat))), Fault{Late: func(effect func()) { effects = append(effects, effect) }}))
	data := []byte("abc")
	if err := s.Put(ctx, "a", data); !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("Put with a late effect: %v", err)
	}
	if _, err := s.Swap(ctx, "m", backend.NoVersion, data); !errors.Is(err, backend.ErrTemporary) {
		t.Errorf("Swap with a late effect: %v", err)
	}
	if _, err := s.Get(ctx, "a", make([]byte, 3), 0); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("Get, which changes nothing: %v, want that it is made at once", err)
	}
	clear(data)
	cancel()
	for _, effect := range effects {
		effect()
	}
	p := make([]byte, 4)
	if n, err := inner.Get(context.Background(), "a", p, 0); err != nil || string(p[:n]) != "abc" {
		t.Errorf("the object that was put late: %q, %v", p[:n], err)
	}
	if b, _, err := inner.Load(context.Background(), "m"); err != nil || string(b) != "abc" {
		t.Errorf("the object that was swapped late: %q, %v", b, err)
	}
}

func TestSwitch(t *testing.T) {
	ctx := context.Background()
	outage := NewSwitch()
	s := New(mem.New(), If(outage.On, Fault{Before: backend.ErrTemporary}))
	for _, on := range []bool{false, true, false} {
		outage.Set(on)
		_, err := s.Stat(ctx, "a")
		if want := backend.ErrNotFound; on == errors.Is(err, want) {
			t.Errorf("switch %v: %v", on, err)
		}
	}
}

func TestGateAndDelay(t *testing.T) {
	ctx := context.Background()
	gate := NewGate()
	inner := mem.New()
	s := New(inner, If(Writes, Fault{Gate: gate}), If(Method(Get), Fault{Delay: time.Hour}))
	done := make(chan error)
	go func() { done <- s.Put(ctx, "a", nil) }()
	if err := gate.AwaitWaiting(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := inner.Stat(ctx, "a"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("Put passed a shut gate: %v", err)
	}
	gate.Open()
	if err := <-done; err != nil {
		t.Errorf("Put: %v", err)
	}
	gate.Shut()
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := s.Delete(short, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Delete at a shut gate: %v", err)
	}
	if _, err := s.Get(short, "a", nil, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("delayed Get: %v", err)
	}
}

func TestCorrupt(t *testing.T) {
	ctx := context.Background()
	s := New(mem.New())
	if err := s.Put(ctx, "a", make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Swap(ctx, "m", backend.NoVersion, []byte("xyz")); err != nil {
		t.Fatal(err)
	}
	s.Inject(If(Method(Get), Fault{Corrupt: FlipBit(9)}), If(Method(Load), Fault{Corrupt: Truncate(2)}))
	p := make([]byte, 8)
	if n, err := s.Get(ctx, "a", p, 0); err != nil || !bytes.Equal(p[:n], []byte{0, 2, 0}) {
		t.Errorf("Get = %v, %v", p[:n], err)
	}
	if data, _, err := s.Load(ctx, "m"); err != nil || string(data) != "xy" {
		t.Errorf("Load = %q, %v", data, err)
	}
}

func TestChanceIsSeeded(t *testing.T) {
	draw := func(seed uint64) (s string) {
		c := Chance(seed, 0.5)
		for range 64 {
			if c(Op{}) {
				s += "1"
			} else {
				s += "0"
			}
		}
		return s
	}
	first, second := draw(1), draw(1)
	if first != second || first == draw(2) {
		t.Error("the same seed gives different draws, or another seed the same")
	}
}
