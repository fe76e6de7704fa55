package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// mustView opens a state of an image to be read.
func mustView(t *testing.T, st backend.Store, id, snapshot uuid.UUID) *View {
	t.Helper()
	v, err := OpenView(t.Context(), st, id, ViewOptions{Snapshot: snapshot, Config: Config{Logger: quiet}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	return v
}

// mustReadView reads a block of a view.
func mustReadView(t *testing.T, v *View, block, want uint64) {
	t.Helper()
	b := bytes.Repeat([]byte{0xee}, objectBlock)
	err := v.ReadAt(t.Context(), b, block*objectBlock)
	n := uint64(0)
	if err == nil {
		n, err = stamp(b, block*blockSectors)
	}
	if err != nil || n != want {
		t.Fatalf("block %d reads as %d (%v), want %d", block, n, err, want)
	}
}

// TestView: snapshots, and an image that is attached, read as they are, by any number of
// goroutines, in pieces of whatever size; what is in the log alone is not in the store.
func TestView(t *testing.T) {
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: 100<<20 + 4096, ObjectSize: MinObjectSize}, nil)
	const last = (100<<20 + 4096) / objectBlock
	h.mustFill(1000)
	h.mustWrite(last-1, 77)
	s := mustSnap(t, st, id, "s", h)
	for n := range uint64(20) { // a checkpoint between, and segments that are stored
		h.mustWrite(n, 2000+n)
		h.mustWrite(16384+n, 3000+n)
		h.mustDestage()
	}
	if err, _, _ := h.do(Discard, 30, 0, 0); err != 0 {
		t.Fatal(err)
	}
	h.mustDestage()
	h.mustWrite(40, 9999) // in the log alone
	was, now := mustView(t, st, id, s.ID), mustView(t, st, id, uuid.Nil)
	if now.Size() != last*4096 || now.BlockSize() != 4096 {
		t.Errorf("%d bytes, blocks of %d", now.Size(), now.BlockSize())
	}
	var readers sync.WaitGroup
	for r := range uint64(8) {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(r, 1))
			for range 50 {
				n := 1 + rng.Uint64N(1000)
				first := min(rng.Uint64N(3)*8192, last-n)
				b := bytes.Repeat([]byte{0xee}, int(n)*objectBlock)
				v, state := was, "was"
				if rng.IntN(2) > 0 {
					v, state = now, "now"
				}
				if err := v.ReadAt(context.Background(), b, first*objectBlock); err != nil {
					t.Error(err)
					return
				}
				for k := first; k < first+n; k++ {
					want := uint64(0)
					switch {
					case k == last-1:
						want = 77
					case state == "now" && k < 20:
						want = 2000 + k
					case state == "now" && k >= 16384 && k < 16384+20:
						want = 3000 + k - 16384
					case k < snapshotBlocks && !(state == "now" && k == 30):
						want = 1000 + k
					}
					if got, err := stamp(b[(k-first)*objectBlock:][:objectBlock], k*blockSectors); err != nil || got != want {
						t.Errorf("block %d as it %s: %d, %v, want %d", k, state, got, err, want)
						return
					}
				}
			}
		})
	}
	readers.Wait()
	for _, x := range []struct{ off, n uint64 }{{1, 512}, {512, 511}, {last * 4096, 512}, {1 << 63, 512}, {0, last*4096 + 512}} {
		if err := now.ReadAt(t.Context(), make([]byte, x.n), x.off); err == nil {
			t.Errorf("%d bytes at %d were read", x.n, x.off)
		}
	}
	if err := now.ReadAt(t.Context(), nil, last*4096); err != nil {
		t.Error(err)
	}
}

// TestViewOvertaken: what the owner of an image removes while the image is read is told
// apart from damage; a snapshot stays.
func TestViewOvertaken(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustDestage()
	now := mustView(t, st, id, uuid.Nil)
	mustReadView(t, now, 5, 1005)
	s := mustSnapshot(t, st, id, "s", h)
	kept := mustView(t, st, id, s.ID)
	for range 3 {
		h.mustFill(2000)
		h.mustCheckpoint()
		h.run(3 * leftoverGrace)
	}
	mustReadView(t, now, 6, 1006) // for the snapshot's sake
	mustReadView(t, kept, 7, 1007)
	fails := func(v *View, want string) {
		t.Helper()
		err := v.ReadAt(ctx, make([]byte, 4096), 0)
		if !errors.Is(err, ErrOvertaken) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	mustDropSnapshot(t, st, id, "s")
	h.run(3 * leftoverGrace)
	h.mustFill(3000)
	h.mustCheckpoint()
	h.run(3 * leftoverGrace)
	fails(now, "has gone on")
	fails(kept, "the snapshot has been removed")
	if err := Diff(ctx, kept, now, func(Range) error { return nil }); err != nil && !errors.Is(err, ErrOvertaken) {
		t.Error(err)
	}
	_, err := OpenView(ctx, st, id, ViewOptions{Snapshot: s.ID})
	if !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("a snapshot that is gone is opened: %v", err)
	}
	h.mustClose()
	last := mustView(t, st, id, uuid.Nil)
	mustReadView(t, last, 1, 3001)
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= last.im.accepted.object; n++ {
		_ = st.Delete(ctx, dataKey(id, n, sb.epochOf(n)))
	}
	if err := last.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, ErrCorrupt) || errors.Is(err, ErrOvertaken) {
		t.Errorf("an object is missing: %v", err)
	}
	if _, err := Remove(ctx, st, "disk", RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	fails(last, "the image has been removed")
	if _, err := OpenView(ctx, st, id, ViewOptions{}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("an image that is gone is opened: %v", err)
	}
}

// crowdStore lets no read of a data object end before so many of different ones are under
// way.
type crowdStore struct {
	backend.Store
	want int

	mu    sync.Mutex
	under map[string]bool // guarded by mu
	all   chan struct{}   // closed when they are
}

func (s *crowdStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if strings.Contains(key, "/d/") && s.enter(key) {
		select {
		case <-s.all:
		case <-time.After(20 * time.Second):
			return 0, fmt.Errorf("nobody else reads beside %s", key)
		}
	}
	return s.Store.Get(ctx, key, p, off)
}

func (s *crowdStore) enter(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.under == nil {
		return false
	}
	if s.under[key] = true; len(s.under) == s.want {
		close(s.all)
		s.under = nil
		return false
	}
	return true
}

// TestViewReadsSideBySide: one read of what several objects have asks for them at one time,
// and so does a stream of all data.
func TestViewReadsSideBySide(t *testing.T) {
	inner := mem.New()
	h, id := attached(t, inner, CreateOptions{Size: 128 << 20, ObjectSize: MinObjectSize}, nil)
	const objects = 6
	for n := range uint64(objects) {
		for k := range uint64(256) { // all of an object
			h.mustWrite(n*256+k, 1+n*256+k)
		}
		h.mustDestage()
	}
	h.mustClose()
	for _, how := range []string{"ReadAt", "DiffData"} {
		st := &crowdStore{Store: inner, want: objects, all: make(chan struct{})}
		v := mustView(t, st, id, uuid.Nil)
		st.under = map[string]bool{}
		var err error
		if how == "ReadAt" {
			err = v.ReadAt(t.Context(), make([]byte, objects<<20), 0)
		} else {
			err = DiffData(t.Context(), nil, v, func(Range, []byte) error { return nil })
		}
		if err != nil {
			t.Errorf("%s: %v", how, err)
		}
	}
}

// TestViewReadsTogether: pieces of an object are read together where they are near to each
// other, and what is between them does not count: damage there is passed over, and told
// where it is needed.
func TestViewReadsTogether(t *testing.T) {
	ctx, inner := t.Context(), mem.New()
	h, id := attached(t, inner, smallImage(), nil)
	h.mustFill(1000)
	h.mustDestage()
	for n := uint64(1); n < snapshotBlocks; n += 2 {
		h.mustWrite(n, 2000+n)
	}
	h.mustDestage()
	h.mustClose()
	st := &countedGets{Store: inner}
	v := mustView(t, st, id, uuid.Nil)
	b := make([]byte, snapshotBlocks*objectBlock)
	for range 2 {
		st.data.Store(0)
		if err := v.ReadAt(ctx, b, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := st.data.Load(); n != 2 {
		t.Errorf("%d reads of data, want one of each of two objects", n)
	}
	info := v.im.table.find(1)
	key := dataKey(id, 1, uint64(info.epoch))
	flip := func(block int) {
		t.Helper()
		if err := damage(ctx, inner, key, func(b []byte) int { b[info.headerBytes()+block*objectBlock] ^= 1; return len(b) }); err != nil {
			t.Fatal(err)
		}
	}
	flip(1) // has been overwritten
	clear(b)
	if err := v.ReadAt(ctx, b, 0); err != nil {
		t.Fatal(err)
	}
	for n := range uint64(snapshotBlocks) {
		if got, err := stamp(b[n*objectBlock:][:objectBlock], n*blockSectors); err != nil || got != 1000+n+n%2*1000 {
			t.Fatalf("block %d: %d, %v", n, got, err)
		}
	}
	flip(2)
	if err := v.ReadAt(ctx, b, 0); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "block 2 ") {
		t.Errorf("damage was read: %v", err)
	}
}

// TestViewForgetsSegments: a view keeps few segments of a large map, and a load that was told
// to stop fails nobody else.
func TestViewForgetsSegments(t *testing.T) {
	const segments = viewSegments + 40
	st := mem.New()
	h, id := attached(t, st, CreateOptions{Size: segments * 64 << 20, ObjectSize: MinObjectSize}, nil)
	for i := range uint64(segments) {
		h.mustWrite(i*16384, i+1)
	}
	h.mustCheckpoint()
	h.mustClose()
	v := mustView(t, st, id, uuid.Nil)
	dead, stop := context.WithCancel(t.Context())
	stop()
	for range 2 {
		for i := range uint64(segments) {
			if err := v.ReadAt(dead, make([]byte, 4096), i*64<<20); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			mustReadView(t, v, i*16384, i+1)
		}
	}
	if n, m := len(v.segments), len(v.order); n != viewSegments || m != n {
		t.Errorf("%d segments in memory, %d in order", n, m)
	}
}

// TestViewEntersChanges: what has changed since a segment was stored is entered in order, and
// what the cleaner has moved only where nothing newer is.
func TestViewEntersChanges(t *testing.T) {
	st := mem.New()
	v := mustView(t, st, newImageIn(t, st), uuid.Nil)
	p := v.im.objs
	for _, x := range []change{
		{object: 10, at: 0, n: 32, off: 0},
		{object: 11, at: 8, n: 8, off: 100},
		{object: 12, at: 24, n: 8, off: changeZeroes},
		{object: 13, at: 0, n: 32, off: changeMoves | 200},
	} {
		p.note(0, x)
	}
	p.bases[13] = 10
	span := v.enterChanges(0, extmap.NewSpan(0, segmentPages))
	got := ""
	for e := range extentsOf(span, 0) {
		got += fmt.Sprintf("%d+%d:%d/%d ", e.Sector, e.N, refOf(e.Loc).seq(), offsetOf(e.Loc))
	}
	if want := "0+8:13/200 8+8:11/100 16+8:13/216 "; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// hangingStore lets the first read of the map wait until its context ends.
type hangingStore struct {
	backend.Store
	once sync.Once
	hung chan struct{} // closed when it waits
}

func (s *hangingStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if strings.Contains(key, "/m/") {
		first := false
		s.once.Do(func() { first = true })
		if first {
			close(s.hung)
			<-ctx.Done()
			return 0, ctx.Err()
		}
	}
	return s.Store.Get(ctx, key, p, off)
}

// TestViewWaitsForAnother: who waits for a segment that another one reads, which is told to
// stop, reads it himself.
func TestViewWaitsForAnother(t *testing.T) {
	inner := mem.New()
	h, id := attached(t, inner, smallImage(), nil)
	h.mustWrite(1, 1)
	h.mustCheckpoint()
	h.mustClose()
	st := &hangingStore{Store: inner, hung: make(chan struct{})}
	v := mustView(t, st, id, uuid.Nil)
	ctx, stop := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- v.ReadAt(ctx, make([]byte, 4096), 0) }()
	<-st.hung
	go func() { time.Sleep(20 * time.Millisecond); stop() }()
	mustReadView(t, v, 1, 1)
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
