//go:build lab

package rados_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/rados"
	"github.com/lsd-ceph/lsd/backend/storetest"
	"github.com/lsd-ceph/lsd/internal/cephtest"
)

// An OSD that is killed must find its data again.
func TestMain(m *testing.M) { os.Exit(cephtest.Main(m, 0, "bluestore")) }

// ceph runs the command-line tool.
func ceph(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ceph", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ceph %q: %v: %s", args, err, out)
	}
	return string(out)
}

func open(t testing.TB, cs *rados.Clusters, u backend.URL) *rados.Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := cs.Open(ctx, u)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// place returns a namespace of its own for the test, emptied at its end.
func place(t testing.TB) backend.URL {
	u := backend.URL{Scheme: backend.SchemeRADOS, Pool: "rbd", Namespace: "test-" + uuid.NewString()}
	t.Cleanup(func() {
		var cs rados.Clusters
		s := open(t, &cs, u)
		defer s.Close()
		err := s.List(context.Background(), "", func(key string) error { return s.Delete(context.Background(), key) })
		if err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	})
	return u
}

func TestStore(t *testing.T) {
	// Every handle has a connection of its own, as in another process.
	storetest.Run(t, func(t *testing.T) func(*testing.T) backend.Store {
		u := place(t)
		return func(t *testing.T) backend.Store { return open(t, new(rados.Clusters), u) }
	})
}

func TestSharedConnection(t *testing.T) {
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	u := place(t)
	var cs rados.Clusters
	first := open(t, &cs, u)
	before := threads()
	var stores []*rados.Store
	for range 20 {
		stores = append(stores, open(t, &cs, u))
	}
	if n := threads(); n > before+15 {
		t.Errorf("20 more stores took %d threads more", n-before)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	for i, s := range stores {
		if err := s.Put(context.Background(), fmt.Sprint(i), nil); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	// The set is as good as new.
	s := open(t, &cs, u)
	if _, err := s.Stat(context.Background(), "7"); err != nil {
		t.Error(err)
	}
	s.Close()
}

// TestSharedPool checks that others' objects in the pool are let be.
func TestSharedPool(t *testing.T) {
	u := place(t)
	s := open(t, new(rados.Clusters), u)
	defer s.Close()
	for _, oid := range []string{"a", "rbd_header.x", "lsd.UPPER", "lsd."} {
		out, err := exec.Command("rados", "-p", u.Pool, "-N", u.Namespace, "create", oid).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		defer exec.Command("rados", "-p", u.Pool, "-N", u.Namespace, "rm", oid).Run()
	}
	err := s.List(context.Background(), "", func(key string) error {
		t.Errorf("List shows %q", key)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	_, err = s.Stat(context.Background(), "a")
	storetest.WantError(t, "Stat of another's object", err, backend.ErrNotFound)
	// An object of ours without its attribute is corrupt, not absent.
	if err := s.Put(context.Background(), "m", []byte("x")); err != nil {
		t.Fatal(err)
	}
	_, _, err = s.Load(context.Background(), "m")
	storetest.WantError(t, "Load of an immutable object", err, backend.ErrPermanent)
}

// TestFormat pins names and attributes, as the rados tool sees them.
func TestFormat(t *testing.T) {
	u := place(t)
	s := open(t, new(rados.Clusters), u)
	defer s.Close()
	v, err := s.Swap(context.Background(), "img/super", backend.NoVersion, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	tool := func(args ...string) []byte {
		out, err := exec.Command("rados", append([]string{"-p", u.Pool, "-N", u.Namespace}, args...)...).Output()
		if err != nil {
			t.Fatalf("rados %q: %v", args, err)
		}
		return out
	}
	if got := tool("get", "lsd.img/super", "-"); string(got) != "hello" {
		t.Errorf("contents %q", got)
	}
	attr := tool("getxattr", "lsd.img/super", "lsd.version")
	if fmt.Sprintf("%x", attr) != string(v) || len(attr) != 21 || attr[0] != 1 {
		t.Errorf("attribute %x of version %s", attr, v)
	}
	// A byte changed behind our back is found.
	cmd := exec.Command("rados", "-p", u.Pool, "-N", u.Namespace, "put", "lsd.img/super", "-")
	cmd.Stdin = strings.NewReader("hellp")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, _, err = s.Load(context.Background(), "img/super")
	storetest.WantError(t, "Load of a corrupt object", err, backend.ErrPermanent)
}

func TestOpenErrors(t *testing.T) {
	// A port that nobody listens at, and one that never answers.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	conf := func(text string) string {
		name := filepath.Join(t.TempDir(), "ceph.conf")
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	for _, tt := range []struct {
		what string
		u    backend.URL
		want error
		text string
	}{
		{"no pool", backend.URL{Pool: "nopool"}, backend.ErrPermanent, "no such pool: nopool; create it with: ceph osd pool create nopool"},
		{"no conf", backend.URL{Pool: "rbd", Conf: "/no/such/ceph.conf"}, backend.ErrPermanent, "cannot read /no/such/ceph.conf: no such file"},
		{"conf of no monitor", backend.URL{Pool: "rbd", Conf: conf("[global]\n")}, backend.ErrPermanent, "no monitors"},
		{"dead monitor", backend.URL{Pool: "rbd", Conf: conf("[global]\nmon host = v1:127.0.0.1:1\nauth client required = none\n")}, context.DeadlineExceeded, ""},
		{"silent monitor", backend.URL{Pool: "rbd", Conf: conf("[global]\nmon host = v1:" + silent.Addr().String() + "\nauth client required = none\n")}, context.DeadlineExceeded, ""},
	} {
		t.Run(tt.what, func(t *testing.T) {
			tt.u.Scheme = backend.SchemeRADOS
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			var cs rados.Clusters
			start := time.Now()
			s, err := cs.Open(ctx, tt.u)
			if err == nil {
				s.Close()
			}
			storetest.WantError(t, "Open", err, tt.want)
			if err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q; want one with %q", err, tt.text)
			}
			if d := time.Since(start); d > 4*time.Second {
				t.Errorf("Open took %v", d)
			}
		})
	}
}

func TestPoolDeleted(t *testing.T) {
	pool := "lsd-" + uuid.NewString()
	ceph(t, "osd", "pool", "create", pool, "1")
	s := open(t, new(rados.Clusters), backend.URL{Scheme: "rados", Pool: pool})
	defer s.Close()
	if err := s.Put(context.Background(), "a", nil); err != nil {
		t.Fatal(err)
	}
	ceph(t, "osd", "pool", "delete", pool, pool, "--yes-i-really-really-mean-it")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		_, err := s.Stat(ctx, "a")
		if err == nil {
			continue // the map takes a moment to come
		}
		storetest.WantError(t, "Stat in a deleted pool", err, backend.ErrPermanent)
		break
	}
}

// TestFull: while the pool is full, what takes no more room goes through: reads, the
// change of a mutable object to contents of the same length, and deletes, which are what
// makes room. The rest fails at once, for now.
func TestFull(t *testing.T) {
	s := open(t, new(rados.Clusters), place(t))
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	data := storetest.Pattern(1, 8<<20)
	put := func() error { return s.Put(ctx, uuid.NewString(), data) }
	for i := range 8 {
		if err := s.Put(ctx, fmt.Sprint(i), data); err != nil {
			t.Fatal(err)
		}
	}
	v, err := s.Swap(ctx, "m", backend.NoVersion, make([]byte, 4096))
	if err != nil {
		t.Fatal(err)
	}
	script := func(command string) {
		if err := cephtest.Script(command); err != nil {
			t.Error(err)
		}
	}
	script("full")
	defer script("room")
	for err == nil { // the OSD learns it from the monitor
		err = put()
	}
	storetest.WantError(t, "Put into a full pool", err, backend.ErrTemporary)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Put into a full pool: %v", err)
	}
	if n, err := s.Get(ctx, "1", make([]byte, 4096), 0); n != 4096 || err != nil {
		t.Errorf("Get: %d, %v", n, err)
	}
	if v, err = s.Swap(ctx, "m", v, storetest.Pattern(2, 4096)); err != nil {
		t.Errorf("Swap to the same length: %v", err)
	}
	_, err = s.Swap(ctx, "m", v, make([]byte, 8192))
	storetest.WantError(t, "Swap to another length", err, backend.ErrTemporary)
	if got, w, err := s.Load(ctx, "m"); err != nil || w != v || !bytes.Equal(got, storetest.Pattern(2, 4096)) {
		t.Errorf("Load: version %s, not %s; %v", w, v, err)
	}
	for i := range 8 {
		if err := s.Delete(ctx, fmt.Sprint(i)); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
	script("room")
	for err = put(); err != nil && ctx.Err() == nil; err = put() {
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("Put when there is room again: %v", err)
	}
}

// TestFence has one client shut another out. What the other one's connection has
// under way fails; all stores on that connection come back by themselves, with a
// connection of another name; a third client notices nothing.
func TestFence(t *testing.T) {
	u := place(t)
	var shared rados.Clusters
	first, second := open(t, &shared, u), open(t, &shared, u)
	defer first.Close()
	defer second.Close()
	by, other := open(t, new(rados.Clusters), u), open(t, new(rados.Clusters), u)
	defer by.Close()
	defer other.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	old := first.Identity()
	if old == "" || second.Identity() != old || by.Identity() == old || other.Identity() == by.Identity() {
		t.Fatalf("identities %q %q of one connection, %q %q of two", old, second.Identity(), by.Identity(), other.Identity())
	}
	v, err := first.Swap(ctx, "m", backend.NoVersion, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() { // as it comes: before, or not at all
			if err := first.Put(ctx, fmt.Sprintf("p/%d", i), storetest.Pattern(uint64(i), 4<<20)); err != nil {
				storetest.WantError(t, "Put by a client that is being fenced", err, backend.ErrTemporary)
			}
		})
	}
	if err := by.Fence(ctx, old); err != nil {
		t.Fatal(err)
	}
	defer ceph(t, "osd", "blocklist", "rm", old)
	if !strings.Contains(ceph(t, "osd", "blocklist", "ls"), old) {
		t.Errorf("%s is not blocklisted", old)
	}
	wg.Wait()
	failed := 0
	for _, s := range []*rados.Store{first, second} {
		for {
			_, err := s.Stat(ctx, "m")
			if err == nil {
				break
			}
			failed++
			storetest.WantError(t, "Stat by a fenced client", err, backend.ErrTemporary)
			if !strings.Contains(err.Error(), "blocklisted") {
				t.Errorf("error %q does not say why", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		if now := s.Identity(); now == "" || now == old || now != first.Identity() {
			t.Errorf("identity %q after %q: the stores should share a new connection", now, old)
		}
	}
	if failed == 0 {
		t.Error("nothing failed: the client was not shut out")
	}
	if _, err := first.Swap(ctx, "m", v, []byte("two")); err != nil {
		t.Errorf("Swap over the new connection: %v", err)
	}
	if _, err := other.Stat(ctx, "m"); err != nil {
		t.Errorf("a client that nobody fenced: %v", err)
	}
	if err := by.Put(ctx, "q", nil); err != nil {
		t.Errorf("the client that fenced: %v", err)
	}
}

// TestFenceLate closes a store whose connection is being replaced.
func TestFenceLate(t *testing.T) {
	u := place(t)
	s, by := open(t, new(rados.Clusters), u), open(t, new(rados.Clusters), u)
	defer by.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	old := s.Identity()
	if err := by.Fence(ctx, old); err != nil {
		t.Fatal(err)
	}
	defer ceph(t, "osd", "blocklist", "rm", old)
	for {
		if _, err := s.Stat(ctx, "m"); !errors.Is(err, backend.ErrNotFound) {
			storetest.WantError(t, "Stat by a fenced client", err, backend.ErrTemporary)
			break
		}
	}
	began := time.Now()
	if err := s.Close(); err != nil || time.Since(began) > 4*time.Second {
		t.Errorf("Close: %v after %v", err, time.Since(began))
	}
}

func TestFenceErrors(t *testing.T) {
	s := open(t, new(rados.Clusters), place(t))
	defer s.Close()
	for _, bad := range []string{"", "x", "10.0.0.1", "10.0.0.1:0", "10.0.0.1/7", "10.0.0.1:0/x", "10.0.0.1:0/-1", "10.0.0.1:0/7\",\"x", "[fe80::1%eth0]:0/7"} {
		err := s.Fence(context.Background(), bad)
		storetest.WantError(t, fmt.Sprintf("Fence(%q)", bad), err, backend.ErrPermanent)
	}
	if l := ceph(t, "osd", "blocklist", "ls"); strings.Contains(l, "10.0.0.1") {
		t.Errorf("blocklisted: %s", l)
	}
}

// TestPaused stops the cluster in its tracks. Calls return when their contexts
// end, though nothing answers; buffers that callers then use again are not
// written to; and after it all the store works on, with nothing torn.
func TestPaused(t *testing.T) {
	u := place(t)
	var cs rados.Clusters
	s := open(t, &cs, u)
	defer s.Close()
	data := storetest.Pattern(1, 1<<20)
	if err := s.Put(context.Background(), "a", data); err != nil {
		t.Fatal(err)
	}
	v, err := s.Swap(context.Background(), "m", backend.NoVersion, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	if err := cephtest.Script("pause"); err != nil {
		t.Fatal(err)
	}
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			if err := cephtest.Script("resume"); err != nil {
				t.Error(err)
			}
		}
	}
	defer resume()

	// More operations than librados itself would take in at once.
	const puts = 60
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	start := time.Now()
	var wg sync.WaitGroup
	call := func(what string, f func() error) {
		wg.Go(func() {
			storetest.WantError(t, what, f(), context.DeadlineExceeded)
			if d := time.Since(start); d > 3*time.Second {
				t.Errorf("%s returned after %v", what, d)
			}
		})
	}
	for i := range puts {
		call("Put", func() error { return s.Put(ctx, fmt.Sprintf("p/%d", i), storetest.Pattern(uint64(i), 4<<20)) })
	}
	buffers := make([][]byte, 8)
	for i := range buffers {
		buffers[i] = make([]byte, len(data))
		call("Get", func() error { _, err := s.Get(ctx, "a", buffers[i], 0); return err })
	}
	call("Stat", func() error { _, err := s.Stat(ctx, "a"); return err })
	call("Load", func() error { _, _, err := s.Load(ctx, "m"); return err })
	call("Swap", func() error { _, err := s.Swap(ctx, "m", v, []byte("two")); return err })
	call("Delete", func() error { return s.Delete(ctx, "p/none") })
	call("List", func() error { return s.List(ctx, "", func(string) error { return nil }) })
	call("Open", func() error { _, err := new(rados.Clusters).Open(ctx, u); return err })
	wg.Wait()

	// Without a deadline a call waits, and is answered in the end.
	late := make(chan error)
	go func() { late <- s.Put(context.Background(), "late", data) }()
	time.Sleep(200 * time.Millisecond)
	resume()
	if err := <-late; err != nil {
		t.Errorf("Put across the pause: %v", err)
	}

	p := make([]byte, 4<<20)
	done := 0
	for i := range puts {
		n, err := s.Get(context.Background(), fmt.Sprintf("p/%d", i), p, 0)
		if errors.Is(err, backend.ErrNotFound) {
			continue
		}
		done++
		if err != nil || !bytes.Equal(p[:n], storetest.Pattern(uint64(i), 4<<20)) {
			t.Errorf("Get of an object of unknown outcome: %d bytes, %v, or they differ", n, err)
		}
	}
	t.Logf("%d of %d cancelled puts took effect", done, puts)
	got, _, err := s.Load(context.Background(), "m")
	if err != nil || string(got) != "one" && string(got) != "two" {
		t.Errorf("Load after a Swap of unknown outcome: %q, %v", got, err)
	}
	for i, b := range buffers {
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("buffer %d was written to", i)
		}
	}
}

// TestOSDCrash kills the OSD while writers are at work; librados repeats what
// was in flight, and nobody may be told of a conflict with himself.
func TestOSDCrash(t *testing.T) {
	u := place(t)
	s := open(t, new(rados.Clusters), u)
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			v := backend.NoVersion
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				var err error
				data := storetest.Pattern(uint64(i), 100000)
				if err = s.Put(ctx, fmt.Sprintf("w%d/%d", w, i), data); err != nil {
					t.Errorf("Put: %v", err)
					return
				}
				if v, err = s.Swap(ctx, fmt.Sprintf("m%d", w), v, data); err != nil {
					t.Errorf("Swap: %v", err)
					return
				}
			}
		})
	}
	for range 2 {
		time.Sleep(time.Second)
		for _, command := range []string{"kill-osd", "start-osd"} {
			if err := cephtest.Script(command); err != nil {
				t.Error(err)
			}
		}
	}
	time.Sleep(time.Second)
	close(stop)
	wg.Wait()
}

// TestOSDCrashShort kills the OSD under callers that wait for less than the ten
// seconds after which librados itself asks where an OSD is now. They must find it
// all the same, however soon it is back.
func TestOSDCrashShort(t *testing.T) {
	u := place(t)
	s := open(t, new(rados.Clusters), u)
	defer s.Close()
	put := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		return s.Put(ctx, uuid.NewString(), storetest.Pattern(1, 1<<20))
	}
	round := func(down time.Duration) {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		defer wg.Wait()
		defer close(stop)
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						if put() != nil {
							time.Sleep(100 * time.Millisecond)
						}
					}
				}
			})
		}
		time.Sleep(time.Second)
		if err := cephtest.Script("kill-osd"); err != nil {
			t.Error(err)
		}
		time.Sleep(down)
		if err := cephtest.Script("start-osd"); err != nil {
			t.Error(err)
			return
		}
		began := time.Now()
		for {
			err := put()
			took := time.Since(began).Round(time.Millisecond)
			if err == nil {
				t.Logf("the OSD was away for %v: found after %v", down, took)
				return
			}
			if took > 30*time.Second {
				t.Errorf("the OSD was away for %v: not found within %v: %v", down, took, err)
				return
			}
		}
	}
	for _, down := range []time.Duration{0, 0, time.Second, 4 * time.Second} {
		round(down)
	}
}

func BenchmarkPut4M(b *testing.B) {
	s := open(b, new(rados.Clusters), place(b))
	defer s.Close()
	const size, depth = 4 << 20, 16
	data := storetest.Pattern(1, size)
	b.SetBytes(size)
	var wg sync.WaitGroup
	slots := make(chan struct{}, depth)
	for i := range b.N {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := s.Put(context.Background(), fmt.Sprintf("b/%d", i), data); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
}

func BenchmarkGet64K(b *testing.B) {
	s := open(b, new(rados.Clusters), place(b))
	defer s.Close()
	const size = 4 << 20
	if err := s.Put(context.Background(), "a", storetest.Pattern(1, size)); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(64 << 10)
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, 64<<10)
		for i := 0; pb.Next(); i++ {
			if _, err := s.Get(context.Background(), "a", p, int64(i*len(p)%size)); err != nil {
				b.Error(err)
			}
		}
	})
}
