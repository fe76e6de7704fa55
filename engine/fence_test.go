package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
)

// TestPauseBeforeAcknowledging: a host whose log has taken a write stops before
// it can say so, and goes on when its lease is over. The write is not
// acknowledged, wherever in the turn the pause was, and is when the lease has been
// renewed.
func TestPauseBeforeAcknowledging(t *testing.T) {
	for _, op := range []Op{Write, Flush, WriteZeroes} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			st := mem.New()
			id := newImageIn(t, st)
			h := newHost(t, "alpha", st, 1)
			if err := h.open(id, false); err != nil {
				t.Fatal(err)
			}
			h.mustWrite(1, 1)
			r := &Request{Op: op, Sector: 8, Sectors: 8, FUA: op == WriteZeroes, Buf: make([]byte, 4096)}
			if op == Flush {
				r.Sectors = 0
			}
			ended := false
			r.Done = doneFunc(func(*Request) { ended = true })
			h.im.Submit(r)
			h.im.log.Commit()
			for h.disk.Step() { // the SSD has done all it can
			}
			h.env.now += 10 * time.Second // the pause
			for range 10 {
				h.im.EndTurn()
				h.disk.Step()
			}
			if ended {
				t.Fatal("acknowledged although the lease was over")
			}
			h.run(10 * time.Second) // nobody has taken the image: it is renewed
			if !ended || r.Err != 0 {
				t.Errorf("after the renewal: ended %v, %v", ended, r.Err)
			}
		})
	}
}

// hookedStore calls loaded after each Load.
type hookedStore struct {
	backend.Store
	loaded func()
}

func (s hookedStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	b, v, err := s.Store.Load(ctx, key)
	s.loaded()
	return b, v, err
}

// TestOwnerThatRenewsAtTheLastMoment: the taker has found the lease over, and
// then the owner, which had only been slow, renews it. It stays the owner until it
// lets go by itself.
func TestOwnerThatRenewsAtTheLastMoment(t *testing.T) {
	inner := mem.New()
	id := newImageIn(t, inner)
	stuck := faultstore.NewSwitch() // so that alpha renews, and cannot let go
	a := newHost(t, "alpha", faultstore.New(inner, faultstore.If(faultstore.All(stuck.On, faultstore.Method(faultstore.Put)),
		faultstore.Fault{Before: backend.ErrTemporary})), 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	stuck.Set(true)
	a.mustWrite(1, 1)
	woken := false
	b := newHost(t, "beta", nil, 2)
	b.st = hookedStore{inner, func() {
		if b.env.now <= 10*time.Second || woken {
			return
		}
		// Beta has just read that the lease went unrenewed for all its length.
		woken = true
		a.env.now += b.env.now
		a.run(0)
		b.others = []*host{a}
	}}
	released := false
	// Before alpha gives up what it cannot put.
	a.env.AfterFunc(15*time.Second, func() { stuck.Set(false); released = true })
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	if !woken || !released {
		t.Fatalf("woken %v, released %v: beta took the image while alpha's lease was good", woken, released)
	}
	b.mustRead(1, 1)
	if a.im.state != Released {
		t.Errorf("alpha is %v, want released", a.im.state)
	}
}

// fencedStore is a store with clients that can be shut out.
type fencedStore struct {
	backend.Store
	name   string
	fenced map[string]bool // shared by all clients
	err    error           // of Fence
}

func (s *fencedStore) Identity() string { return s.name }

func (s *fencedStore) Fence(_ context.Context, identity string) error {
	if s.err != nil {
		return s.err
	}
	s.fenced[identity] = true
	return nil
}

func (s *fencedStore) Put(ctx context.Context, key string, data []byte) error {
	if s.fenced[s.name] {
		return &backend.Error{Op: "put", Key: key, Class: backend.ErrTemporary}
	}
	return s.Store.Put(ctx, key, data)
}

// TestSilentOwnerIsShutOut: where the store can do it, an owner that did not
// answer is shut out; one that let go, or that cannot be named, is not.
func TestSilentOwnerIsShutOut(t *testing.T) {
	denied := &backend.Error{Op: "fence", Class: backend.ErrPermanent, Cause: syscall.EACCES}
	for _, tt := range []struct {
		name   string
		client string
		lives  bool
		err    error
		want   bool
	}{
		{"silent", "1.2.3.4:0/77", false, nil, true},
		{"lets go", "1.2.3.4:0/77", true, nil, false},
		{"without a name", "", false, nil, false},
		{"not permitted", "1.2.3.4:0/77", false, denied, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inner := mem.New()
			fenced := map[string]bool{}
			id := newImageIn(t, inner)
			a := newHost(t, "alpha", &fencedStore{inner, tt.client, fenced, nil}, 1)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustWrite(1, 1)
			b := newHost(t, "beta", &fencedStore{inner, "1.2.3.5:0/78", fenced, tt.err}, 2)
			if tt.lives {
				b.others = []*host{a}
			}
			if err := b.open(id, true); err != nil {
				t.Fatal(err)
			}
			if fenced[tt.client] != tt.want || len(fenced) > 1 {
				t.Errorf("fenced: %v, want %v", fenced, tt.want)
			}
			b.mustWrite(2, 2)
			if tt.lives {
				return
			}
			a.env.now += 11 * time.Second
			a.run(time.Minute)
			if a.im.state != Fenced {
				t.Errorf("alpha is %v, want fenced", a.im.state)
			}
		})
	}
}

// TestClientIsRenamed: the superblock names the client that the owner has now.
func TestClientIsRenamed(t *testing.T) {
	st := &fencedStore{mem.New(), "1.2.3.4:0/1", map[string]bool{}, nil}
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	client := func() string {
		sb, _, err := loadSuperblock(context.Background(), st, id)
		if err != nil {
			t.Fatal(err)
		}
		return sb.Owner.Client
	}
	if c := client(); c != "1.2.3.4:0/1" {
		t.Errorf("client %q", c)
	}
	st.name = "1.2.3.4:0/2" // it had to connect anew
	h.run(10 * time.Second)
	if c := client(); c != "1.2.3.4:0/2" {
		t.Errorf("client %q after a renewal", c)
	}
	st.name = strings.Repeat("x", maxClient+1)
	h.run(10 * time.Second)
	if c := client(); c != "" {
		t.Errorf("client %q: a name without a bound in the superblock", c)
	}
}

// TestNoDeleteWithoutLease: what a checkpoint replaces stays while the lease is
// over, and for its last part.
func TestNoDeleteWithoutLease(t *testing.T) {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "alpha", st, 1)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	left := func(after time.Duration) time.Duration {
		h.env.now = h.im.super.until - 9*time.Second + after
		return h.im.mayDelete()
	}
	for _, tt := range []struct{ after, want time.Duration }{
		{0, 9 * time.Second}, {6 * time.Second, 3 * time.Second}, {7 * time.Second, 0}, {9 * time.Second, 0}, {time.Hour, 0},
	} {
		if got := left(tt.after); got != tt.want {
			t.Errorf("%v after the renewal: %v to delete in, want %v", tt.after, got, tt.want)
		}
	}
	h.im.remove(&removal{left: []garbage{object(SuperblockKey(id))}}, func() {})
	h.env.runJob()
	if _, _, err := loadSuperblock(context.Background(), st, id); err != nil {
		t.Errorf("deleted without a lease: %v", err)
	}
	h.im.fenced(errors.New("test"))
	h.env.now = 0
	if d := h.im.mayDelete(); d != 0 {
		t.Errorf("a fenced host has %v to delete in", d)
	}
}

// TestObjectThatComesLate: a host takes an image over, makes its log for what comes
// after the store's last record, and dies before the superblock says where its epoch
// begins. Then an object arrives that the old owner had under way, and it goes on
// from there: nobody has been told anything that its log does not begin after.
func TestObjectThatComesLate(t *testing.T) {
	ctx := context.Background()
	all, under := mem.New(), faultstore.NewSwitch()
	id := newImageIn(t, all)
	disk := newHost(t, "beta", all, 2).disk
	st := faultstore.New(all, func(op faultstore.Op) faultstore.Fault {
		h, _, err := writelog.ReadHeader(disk)
		if op.Method == faultstore.Swap && under.On(op) && err == nil && h.FirstSeq > 0 {
			return faultstore.Fault{Before: backend.ErrTemporary}
		}
		return faultstore.Fault{}
	})
	a := newHost(t, "alpha", all, 1)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 2; n++ {
		a.mustWrite(n, n)
		a.im.Destage(func(error) {})
		a.run(0)
	}
	late := dataKey(id, 2, 1)
	object, err := readWhole(ctx, all, late)
	if err != nil {
		t.Fatal(err)
	}
	if err := all.Delete(ctx, late); err != nil {
		t.Fatal(err)
	}

	b := newHost(t, "beta", st, 2)
	b.disk = disk
	under.Set(true)
	if err := b.open(id, true); err == nil {
		t.Fatal("opened without a superblock that says so")
	}
	if h, _, err := writelog.ReadHeader(disk); err != nil || h.FirstSeq != 2 {
		t.Fatalf("its log begins at %d, want 2: %v", h.FirstSeq, err)
	}
	under.Set(false)
	if err := all.Put(ctx, late, object); err != nil {
		t.Fatal(err)
	}
	b.again()
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.mustWrite(3, 3)
	for n := uint64(1); n <= 3; n++ {
		b.mustRead(n, n)
	}
	b.im.Abandon()
	b.again()
	if err := b.open(id, false); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 3; n++ {
		b.mustRead(n, n)
	}
}

// TestCloserIsTold: whoever closes an image is told how that ends, once, also if another
// host takes the image over when there is little left to do.
func TestCloserIsTold(t *testing.T) {
	for _, tt := range []struct {
		name, method, key string
		dirty             bool
	}{
		{"destage", faultstore.Put, "*/d/*", true},
		{"checkpoint", faultstore.Put, "*/c/*", true},
		{"removal", faultstore.Delete, "*/c/*", true},
		{"reaping", faultstore.Delete, "*/d/*", true},
		{"release", faultstore.Swap, "*/super", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inner := mem.New()
			id := newImageIn(t, inner)
			st := faultstore.New(inner.Handle())
			a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", inner, 2)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustOverwrite(2) // so that there is something to delete
			if tt.dirty {
				a.mustWrite(1, 9)
			}
			st.Inject(faultstore.If(faultstore.All(faultstore.Method(tt.method), faultstore.Key(tt.key)), faultstore.Fault{Before: backend.ErrTemporary}))
			var told []error
			a.im.Close(func(err error) { told = append(told, err) })
			a.run(time.Second)
			st.Inject(faultstore.If(faultstore.Any, faultstore.Fault{Before: backend.ErrTemporary}))
			a.run(time.Minute)
			if err := b.open(id, true); err != nil {
				t.Fatal(err)
			}
			st.Inject()
			a.run(time.Minute)
			if a.im.state != Fenced || len(told) != 1 || told[0] == nil {
				t.Errorf("the image is %v, who closed it was told %v", a.im.state, told)
			}
		})
	}
}
