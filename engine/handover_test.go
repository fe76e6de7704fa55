package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// pryingStore calls hook right before the n-th load of a superblock from now.
type pryingStore struct {
	backend.Store
	n    int
	hook func()
}

func (s *pryingStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	if strings.HasSuffix(key, "/super") && s.hook != nil {
		if s.n--; s.n == 0 {
			hook := s.hook
			s.hook = nil
			hook()
		}
	}
	return s.Store.Load(ctx, key)
}

// TestForceWithOwnLog: a host attaches with force the log that the superblock names, and
// between its look at the log and the change another host takes the image over. What
// either log alone has stays: neither is begun anew, and the other's can be salvaged.
func TestForceWithOwnLog(t *testing.T) {
	racetest.Slow(t)
	for _, tt := range []struct {
		name   string
		writes uint64 // so many that the log has wrapped, or few
	}{{"new log", 1}, {"wrapped log", 9000}} {
		t.Run(tt.name, func(t *testing.T) {
			inner := mem.New()
			id := newImageIn(t, inner)
			prying := &pryingStore{Store: inner}
			a, c := newHost(t, "alpha", prying, 1), newHost(t, "gamma", inner, 2)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			for n := range tt.writes {
				a.mustWrite(1+n%4000, n+1)
			}
			a.mustDestage()
			a.mustWrite(5000, 2) // in alpha's log alone
			log := a.im.logID
			a.disk.Kill()
			a.again()
			var taken uuid.UUID
			prying.n, prying.hook = 3, func() { // Open has looked, and at the log; now it acquires
				if err := c.open(id, true); err != nil {
					t.Fatal(err)
				}
				c.mustWrite(3, 30000)
				c.mustDestage()
				c.mustWrite(4, 30001) // in gamma's log alone
				taken = c.im.logID
				c.disk.Kill()
			}
			var stale *StaleLogError
			for range 2 {
				if err := a.open(id, true); !errors.As(err, &stale) || stale.Records == 0 {
					t.Errorf("alpha's log: %v, want it refused as stale", err)
				}
				a.again()
			}
			b := newHost(t, "beta", inner, 3)
			if err := b.open(id, true); err != nil {
				t.Fatal(err)
			}
			b.mustRead(3, 30000)
			logs := map[uuid.UUID]bool{}
			for _, p := range b.im.super.sb.Points {
				logs[p.Log] = true
			}
			if !logs[log] || !logs[taken] {
				t.Errorf("points for the logs %v, want one for each of %v and %v", logs, log, taken)
			}
		})
	}
}

// TestLogIDTellsOwnershipsApart: a host whose ownership has been another's meanwhile
// gets a log of another id, also if it has never written: its users may know what is
// not so any more, and the daemon finds that out by the id.
func TestLogIDTellsOwnershipsApart(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	before := a.im.logID
	a.disk.Kill()
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.mustWrite(1, 2)
	b.mustClose()
	a.again()
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustRead(1, 2)
	if a.im.logID == before {
		t.Error("the log's id is the same")
	}
}

// TestForgottenOwnership: the log of an owner that was cut off is refused even when
// so many others were cut off after it that its point has gone, and so many have had
// the image after these that nobody knows where its ownership ended.
func TestForgottenOwnership(t *testing.T) {
	racetest.Slow(t)
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustDestage()
	a.mustWrite(2, 2) // in the log alone
	a.disk.Kill()
	n := uint64(10)
	next := func(force bool) *host {
		b := newHost(t, "beta", st, n)
		if err := b.open(id, force); err != nil {
			t.Fatal(err)
		}
		b.mustWrite(n%100, n)
		b.mustDestage()
		n++
		return b
	}
	for range maxCutOffs + 2 {
		next(true)
	}
	clean := next(true)
	log := clean.disk
	clean.mustClose()
	if n, err := ForgetLogs(context.Background(), st, id, uuid.Nil); n != maxCutOffs || err != nil {
		t.Fatalf("%d points, %v", n, err)
	}
	for range maxEpochs + 10 {
		next(false).mustClose()
	}
	sb, _, err := loadSuperblock(context.Background(), st, id)
	if err != nil {
		t.Fatal(err)
	}
	if len(sb.Epochs) > 0 && sb.Epochs[0].Epoch <= clean.im.super.sb.Epoch {
		t.Fatalf("epochs from %d on are known: this tests nothing", sb.Epochs[0].Epoch)
	}
	a.again()
	var stale *StaleLogError
	if err := a.open(id, false); !errors.As(err, &stale) {
		t.Errorf("a log that holds what no store has: %v, want it refused", err)
	}
	b := &host{t: t, name: "beta", st: st, disk: log, env: &simEnv{rng: clean.env.rng, disk: log}}
	if err := b.open(id, false); err != nil {
		t.Errorf("a log of an ownership that was given up in order: %v", err)
	}
}

// TestEvictedWhileAttaching: another host asks for the image between the two changes of
// the superblock that an attach makes. The owner lets go as soon as it serves.
func TestEvictedWhileAttaching(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	prying := &pryingStore{Store: inner}
	a, b := newHost(t, "alpha", prying, 1), newHost(t, "beta", inner, 2)
	asked := false
	prying.n, prying.hook = 3, func() { // Open has looked, and acquired; now it settles
		_, _, err := changeSuperblock(context.Background(), inner, id, func(sb *superblock) error {
			sb.Evict = &eviction{Epoch: sb.Epoch, By: "beta"}
			asked = sb.Owner != nil
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	if !asked {
		t.Fatal("nobody owned the image when beta asked for it")
	}
	a.run(time.Second)
	if a.im.state != Released {
		t.Fatalf("alpha is %v, want released", a.im.state)
	}
	if err := b.open(id, false); err != nil {
		t.Fatal(err)
	}
}

// TestEndNotSettled: a log is looked at while another host has taken the image over and
// has not yet said where the ownership before it ended. What came into the store after
// that host had looked counts only if it never comes to say so; else the log holds what
// no store has, and stays as it is.
func TestEndNotSettled(t *testing.T) {
	ctx := context.Background()
	for _, tt := range []struct{ owned, force, settles bool }{
		{true, false, true}, {true, true, true}, {true, true, false}, {false, false, true}, {false, false, false},
	} {
		t.Run(fmt.Sprintf("%+v", tt), func(t *testing.T) {
			st := faultstore.New(mem.New())
			id := newImageIn(t, st)
			a := newHost(t, "alpha", st, 1)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustWrite(1, 1)
			a.mustDestage()
			st.Inject(func(op faultstore.Op) (f faultstore.Fault) {
				if op.Method == faultstore.Put {
					f.Before = backend.ErrTemporary
				}
				return f
			})
			a.mustWrite(2, 2)
			a.im.Destage(func(error) {})
			a.run(0)
			a.disk.Kill()
			st.Inject()
			change := func(fn func(*superblock)) {
				t.Helper()
				if _, _, err := changeSuperblock(ctx, st, id, func(sb *superblock) error { fn(sb); return nil }); err != nil {
					t.Fatal(err)
				}
			}
			take := func(sb *superblock) {
				sb.Epoch++
				sb.Owner = &owner{Host: "beta", Log: uuid.New(), Lease: 10 * time.Second}
			}
			settle := func(sb *superblock) { // and lets go
				p := &sb.Points[0]
				p.Object, p.Settled = 1, true
				sb.Epochs = append(sb.Epochs, epochStart{Epoch: sb.Epoch, Object: 2, Seq: 2})
				sb.Owner = nil
			}
			change(func(sb *superblock) {
				if sb.cutOff(); tt.owned {
					take(sb)
				} else {
					sb.Owner = nil
				}
			})
			o := a.im.queue[0].built[0]
			if err := st.Put(ctx, dataKey(id, o.header.seq, o.header.epoch), o.bytes); err != nil {
				t.Fatal(err)
			}
			a.again()
			looks := 0
			a.st = hookedStore{st, func() {
				switch looks++; {
				case !tt.settles || tt.owned && !tt.force:
				case looks == 2 && !tt.owned:
					change(take)
				case looks == 3:
					change(settle)
				}
			}}
			err := a.open(id, tt.force)
			var by *OwnedError
			if tt.owned && !tt.force {
				if !errors.As(err, &by) {
					t.Errorf("while beta takes the image: %v", err)
				}
				change(settle)
				err = a.open(id, false)
			}
			var stale *StaleLogError
			switch {
			case !tt.settles && err != nil:
				t.Error(err)
			case !tt.settles:
				a.mustRead(2, 2)
			case !errors.As(err, &stale) || stale.Records != 1:
				t.Errorf("a log with one record more than the image has: %v", err)
			}
		})
	}
}

// TestStoreOlderThanLog: the store was brought back from a copy that is older than the
// last ownerships. The log is refused, and stays as it is.
func TestStoreOlderThanLog(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	a := newHost(t, "alpha", st, 1)
	again := func() error {
		a.disk.Kill()
		a.again()
		return a.open(id, false)
	}
	if err := again(); err != nil {
		t.Fatal(err)
	}
	a.mustWrite(1, 1)
	a.mustDestage()
	old := (&checkedImage{t, st, id}).copy(t)
	for n := range uint64(3) {
		if err := again(); err != nil {
			t.Fatal(err)
		}
		a.mustWrite(2, n)
	}
	for _, owned := range []bool{true, false} {
		if !owned {
			if _, _, err := changeSuperblock(context.Background(), old.st, id, func(sb *superblock) error { sb.Owner = nil; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		a.st = old.st
		var stale *StaleLogError
		if err := again(); !errors.As(err, &stale) {
			t.Errorf("owned %v: %v", owned, err)
		}
	}
	a.st = st
	if err := again(); err != nil {
		t.Fatal(err)
	}
	a.mustRead(2, 2)
}
