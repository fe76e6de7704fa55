package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/file"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

// The bounds that docs/operations.md gives.
const (
	idleImage     = 2 << 20 // bytes
	idleAfter     = 30 * time.Second
	imageFiles    = 8     // descriptors; a block device takes one more
	imageThreads  = 1 + 4 // its reactor; what the kernel may add for its ring
	daemonThreads = 64    // beside those, and the gates of directories
)

// crowdSize is a hundred images, or a few where the race detector makes them
// slow and hides what they cost.
func crowdSize() int {
	if racetest.Enabled {
		return 20
	}
	return 100
}

// usage is what the process uses.
type usage struct{ rss, locked, threads, files int }

// measure returns what the process uses when all that is garbage is gone.
func measure(t *testing.T) usage {
	t.Helper()
	runtime.GC()
	debug.FreeOSMemory()
	return measureNow(t)
}

// measureNow returns what the process uses, garbage included.
func measureNow(t *testing.T) usage {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var u usage
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "VmRSS:":
			u.rss = n << 10
		case "VmLck:":
			u.locked = n << 10
		case "Threads:":
			u.threads = n
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	u.files = len(fds)
	return u
}

// crowd is a host with many images in one directory.
type crowd struct {
	*host
	t   *testing.T
	ids []int
	buf []byte
}

// newCrowd attaches n images of a store that open opens. Their logs are sparse:
// nothing here depends on what is on the disk.
func newCrowd(t *testing.T, n int, open func() backend.Store) *crowd {
	w := newWorld(t)
	w.kernel.slots = 128 // as many as a real device has
	c := &crowd{host: w.newHost(), t: t}
	c.openSt = func(context.Context, backend.URL) (backend.Store, error) { return open(), nil }
	a, err := uring.NewArena(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.crash(); a.Close() })
	c.buf = a.Bytes()
	st := open()
	defer st.Close()
	cache := filepath.Join(c.dir, "cache")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		id, err := engine.Create(context.Background(), st, fmt.Sprint(i), engine.CreateOptions{Size: 20 << 30})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filepath.Join(cache, id.String()+".log"))
		if err == nil {
			err = f.Truncate(1 << 30)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return c
}

// attachAll attaches all images.
func (c *crowd) attachAll(n int, q api.AttachRequest) {
	c.t.Helper()
	for i := range n {
		q.Image, q.ID, q.LogSize = fmt.Sprintf("file:///crowd/%d", i), -1, 1<<30
		im, err := c.attach(context.Background(), q, func(api.Progress) {})
		if err != nil {
			c.t.Fatal(err)
		}
		c.ids = append(c.ids, im.ID)
	}
}

// write writes a MiB to an image at the given one.
func (c *crowd) write(id, at int) {
	c.t.Helper()
	d, err := c.w.kernel.get(id)
	if err != nil {
		c.t.Fatal(err)
	}
	io := make(fakeIO, 1)
	d.reactor.Post(func() {
		f := d.handler.(*front)
		s := &f.slots[0]
		s.io = io
		s.req.Op, s.req.Sector, s.req.Sectors, s.req.Buf = engine.Write, uint64(at)*2048, 2048, c.buf
		f.submit(s)
	})
	if res := <-io; res != 1<<20 {
		c.t.Fatalf("write to device %d: %d", id, res)
	}
}

// TestHundredImages: what a hundred images cost when they are attached, when they
// have been written to, and when they are idle again.
func TestHundredImages(t *testing.T) {
	const written = 4
	images := crowdSize()
	dir := t.TempDir()
	c := newCrowd(t, images, func() backend.Store {
		st, err := file.Create(context.Background(), dir)
		if err != nil {
			t.Fatal(err)
		}
		return st
	})
	before := measure(t)
	c.attachAll(images, api.AttachRequest{})
	attached := measure(t)
	for _, id := range c.ids {
		for i := range written {
			c.write(id, i)
		}
		if err := c.find(id).getDisk().destage(context.Background(), func(api.Progress) {}); err != nil {
			t.Fatal(err)
		}
	}
	used, began := measureNow(t), time.Now()
	// As watch does it, but for the time between; nothing else collects garbage.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var free time.Time
	awake := func(id int) bool { return !c.find(id).getDisk().rested }
	for now := began; now == began || !free.IsZero() || slices.ContainsFunc(c.ids, awake); now = now.Add(watchEvery) {
		if now.Sub(began) > idleAfter {
			t.Fatalf("device %d does not rest", c.ids[slices.IndexFunc(c.ids, awake)])
		}
		free = c.look(now, free)
		time.Sleep(10 * time.Millisecond) // for whatever an image has under way
	}
	idle := measureNow(t)
	each := func(u usage) string {
		n := float64(images)
		return fmt.Sprintf("%.2f MiB, %.1f threads, %.1f descriptors", float64(u.rss-before.rss)/n/(1<<20), float64(u.threads-before.threads)/n, float64(u.files-before.files)/n)
	}
	t.Logf("%d images, each: attached: %s; %d MiB written and destaged: %s; idle: %s", images, each(attached), written, each(used), each(idle))
	if n := (used.files - before.files) / images; n > imageFiles {
		t.Errorf("%d descriptors for each image, want %d at most", n, imageFiles)
	}
	if n := used.threads - before.threads; n > images*imageThreads+daemonThreads+gateData+gateSuper {
		t.Errorf("%d threads for %d images", n, images)
	}
	for _, id := range c.ids { // they work on
		c.write(id, written)
	}
	if racetest.Enabled {
		return // the detector's own memory is most of it
	}
	if n := (used.rss - before.rss) / images; n < written<<20 {
		t.Errorf("an image that was written to has %d bytes: this tests nothing", n)
	}
	for what, u := range map[string]usage{"after it was attached": attached, "idle": idle} {
		if n := (u.rss - before.rss) / images; n >= idleImage {
			t.Errorf("an image has %d bytes %s, want less than %d", n, what, idleImage)
		}
	}
}

// TestRestsAgain: an image whose cleaner has put objects, which takes no request,
// comes to rest once more.
func TestRestsAgain(t *testing.T) {
	h := newWorld(t).newHost()
	dk := h.find(h.add(api.AttachRequest{ID: -1})).getDisk()
	ctx, now := context.Background(), time.Now()
	var s engine.Stats
	rests := func(want bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			rested, err := dk.rest(ctx, now, &s)
			switch {
			case err != nil:
				t.Fatal(err)
			case rested == want:
				return
			case rested || time.Now().After(deadline):
				t.Fatalf("it rests: %v, want %v", rested, want)
			}
		}
	}
	rests(false) // not yet
	now = now.Add(restAfter)
	rests(true)
	rests(false) // it does
	s.PutCount++
	rests(true)
	s.Writes++
	rests(false) // it is busy
	now = now.Add(restAfter)
	rests(true)
}

// hungStore is a store whose data is behind a file system that does not answer:
// its calls block threads in the kernel, and no context ends them.
type hungStore struct {
	backend.Store
	pipe   int
	closed *atomic.Int64 // calls that are stuck
	most   *atomic.Int64
}

func (s *hungStore) hang() {
	n := s.closed.Add(1)
	for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	var b [1]byte
	_, _ = unix.Read(s.pipe, b[:]) // until the other end is closed
	s.closed.Add(-1)
}

func (s *hungStore) Put(ctx context.Context, key string, data []byte) error {
	s.hang()
	return s.Store.Put(ctx, key, data)
}

func (s *hungStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.hang()
	return s.Store.Get(ctx, key, p, off)
}

func (s *hungStore) Close() error { return nil }

// TestHungStore: a hundred images of a directory that hangs take no more threads
// than a few do, nor the memory of all objects that wait for it, and their leases are
// renewed meanwhile.
func TestHungStore(t *testing.T) {
	images := crowdSize()
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		t.Fatal(err)
	}
	wake := sync.OnceFunc(func() { unix.Close(p[1]) })
	t.Cleanup(func() { wake(); unix.Close(p[0]) })
	inner := mem.New()
	var stuck, most atomic.Int64
	c := newCrowd(t, images, func() backend.Store { return &hungStore{inner.Handle(), p[0], &stuck, &most} })
	c.attachAll(images, api.AttachRequest{BatchAge: 50 * time.Millisecond, Lease: 4 * time.Second})
	before := measure(t)
	for i := range 4 {
		for _, id := range c.ids {
			c.write(id, i)
		}
		time.Sleep(100 * time.Millisecond) // another object of each
	}
	for deadline := time.Now().Add(20 * time.Second); stuck.Load() < min(gateData, int64(images)); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d calls are stuck, want %d", stuck.Load(), gateData)
		}
	}
	time.Sleep(5 * time.Second) // longer than the lease
	u := measure(t)
	memory := int64(0)
	for _, id := range c.ids {
		s, err := c.find(id).getDisk().stats(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		memory += s.DestageMemory
	}
	t.Logf("%d threads more, %d calls stuck, %d MiB of objects", u.threads-before.threads, most.Load(), memory>>20)
	const object = engine.DefaultObjectSize + 1<<20 // and its header
	if limit := int64(engine.DefaultDestageMemory + images*object); memory > limit || memory < int64(images)*engine.DefaultObjectSize {
		t.Errorf("objects have %d bytes; want up to %d, and one for each image", memory, limit)
	}
	if n := u.threads - before.threads; n > images*(imageThreads-1)+gateData+gateSuper+daemonThreads {
		t.Errorf("%d threads more with a store that hangs", n)
	}
	if n := most.Load(); n > gateData {
		t.Errorf("%d calls at one time, want %d at most", n, gateData)
	}
	for _, id := range c.ids {
		c.write(id, 10) // acknowledged: so its lease is good
	}
	wake()
	for _, id := range c.ids {
		if err := c.find(id).getDisk().destage(context.Background(), func(api.Progress) {}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLogMemoryBudget: the logs' memory stays within the daemon's bound; who
// comes late gets less, and then a refusal of one line that changes nothing.
func TestLogMemoryBudget(t *testing.T) {
	for _, tt := range []struct {
		total int64
		want  []int64 // asked for
		got   []int64 // 0: refused
	}{
		{16 * segment, []int64{8 * segment, 8 * segment, 0}, []int64{8 * segment, 8 * segment, 0}},
		{16 * segment, []int64{12 * segment, 8 * segment, 2 * segment}, []int64{12 * segment, 4 * segment, 0}},
		{7 * segment, []int64{0, 0, 0, 0}, []int64{2 * segment, 2 * segment, 2 * segment, 0}},
		{256 * segment, []int64{0, 0}, []int64{4 * segment, 3 * segment}},
		{segment, []int64{0}, []int64{0}},
	} {
		s := newShared(Config{LogMemory: tt.total})
		sum := int64(0)
		for i, want := range tt.want {
			got, err := s.takeLogMemory(want)
			if got != tt.got[i] || (err == nil) != (got > 0) {
				t.Errorf("%d of %d: %d after %v: %d, %v; want %d", i, tt.total, want, tt.want[:i], got, err, tt.got[i])
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "--log-memory-total")) {
				t.Errorf("the refusal %q", err)
			}
			if sum += got; sum > tt.total {
				t.Errorf("%d of %d are taken", sum, tt.total)
			}
		}
	}
	s := newShared(Config{LogMemory: DefaultLogMemory})
	for i := range 100 {
		if _, err := s.takeLogMemory(0); err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
	}

	w := newWorld(t)
	h := w.newHost()
	h.shared.logMemory.total = 3 * segment
	id := h.add(api.AttachRequest{ID: -1})
	if im := h.await(id, api.StateActive); im.LogMemory != 2*segment {
		t.Errorf("the status has %d bytes of memory for the log", im.LogMemory)
	}
	records, logs := h.files()
	if _, err := h.attachReq(api.AttachRequest{ID: -1, Image: "mem:vm2"}); err == nil || !strings.Contains(err.Error(), "--log-memory-total") {
		t.Errorf("attached beyond the budget: %v", err)
	}
	if r, l := h.files(); r != records || l != logs {
		t.Errorf("a refusal left %d records and %d logs, before it were %d and %d", r, l, records, logs)
	}
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	h.add(api.AttachRequest{ID: -1, Image: "mem:vm2"}) // what was given back
}

// slowSink is a store that takes its time with data objects, and forgets them.
type slowSink struct{ *mem.Store }

func (s slowSink) Put(ctx context.Context, key string, data []byte) error {
	if !strings.Contains(key, "/d/") {
		return s.Store.Put(ctx, key, data)
	}
	time.Sleep(200 * time.Millisecond)
	return ctx.Err()
}

// TestBusyImages: while all images are written to faster than the store takes it,
// the daemon stays within the sum of what docs/operations.md lists.
func TestBusyImages(t *testing.T) {
	const logMemory, objects = 2 * writelog.SegmentSize, 128 << 20
	images, written := crowdSize(), 20
	inner := mem.New()
	c := newCrowd(t, images, func() backend.Store { return slowSink{inner.Handle()} })
	c.shared.engine = engine.NewShared(engine.Limits{Destage: objects, Map: 16 << 20})
	c.attachAll(images, api.AttachRequest{LogMemory: logMemory})
	before, most := measure(t), 0
	for i := range written {
		for _, id := range c.ids {
			c.write(id, i)
		}
		most = max(most, measureNow(t).rss)
	}
	const object = engine.DefaultObjectSize + 1<<20 // and its header
	limit := images*(logMemory+idleImage) + max(objects, images*object) + 16<<20
	t.Logf("%d images, %d MiB written to each: %d MiB at most, %d allowed", images, written, (most-before.rss)>>20, limit>>20)
	if !racetest.Enabled && most-before.rss > limit {
		t.Errorf("%d MiB, %d are allowed", (most-before.rss)>>20, limit>>20)
	}
}
