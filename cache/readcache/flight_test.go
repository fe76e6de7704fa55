package readcache

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// slow is content that takes a second to come.
type slow struct{ content }

func (s *slow) Fetch(ctx context.Context, first uint32, p []byte) error {
	select {
	case <-time.After(time.Second):
		return s.content.Fetch(ctx, first, p)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestSingleFlight: reads of the same blocks at one time fetch them once, with and
// without an SSD, and whatever of them each wants.
func TestSingleFlight(t *testing.T) {
	for name, c := range map[string]*Cache{"SSD": mustOpen(t, newMemFile(MinSize)), "none": None(Options{Logger: quiet})} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src := &slow{content{object: testObject(1)}}
				var all sync.WaitGroup
				for i := range 32 {
					all.Go(func() {
						u := c.Client()
						defer u.Close()
						k := key(c, 1)
						dst := make([]byte, (1+i%8)*BlockSize-512*(i%3))
						if _, err := u.Read(context.Background(), &k, 512*(i%3), dst, src, Keep); err != nil {
							t.Error(err)
						}
						check(t, k.Object, 512*(i%3), dst)
					})
				}
				all.Wait()
				if n := src.blocks.Load(); n != 8 {
					t.Errorf("%d blocks fetched, want 8", n)
				}
				if n := len(c.flights.of); n != 0 {
					t.Errorf("%d flights are left", n)
				}
			})
		})
	}
}

// TestCancelledFlight: a fetch that its reader gives up does not fail the others.
func TestCancelledFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := None(Options{Logger: quiet})
		k := key(c, 1)
		src := &slow{content{object: k.Object}}
		ctx, stop := context.WithCancel(context.Background())
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := c.Client().Read(ctx, &k, 0, make([]byte, BlockSize), src, Keep); !errors.Is(err, context.Canceled) {
				t.Errorf("the one who gave up: %v", err)
			}
		})
		time.Sleep(time.Second / 2)
		all.Go(func() {
			dst := make([]byte, BlockSize)
			if _, err := c.Client().Read(context.Background(), &k, 0, dst, src, Keep); err != nil {
				t.Errorf("the other one: %v", err)
			}
			check(t, k.Object, 0, dst)
		})
		time.Sleep(time.Second / 4)
		stop()
		all.Wait()
	})
}

// TestPanickedFlight: those who wait for a fetch that panics are told.
func TestPanickedFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := None(Options{Logger: quiet})
		k := key(c, 1)
		go func() {
			defer func() { _ = recover() }()
			_, _ = c.Client().Read(context.Background(), &k, 0, make([]byte, BlockSize), panics{}, Keep)
		}()
		time.Sleep(time.Second / 2)
		if _, err := c.Client().Read(context.Background(), &k, 0, make([]byte, BlockSize), panics{}, Keep); !errors.Is(err, errEnded) {
			t.Errorf("the one who waited: %v", err)
		}
	})
}

type panics struct{}

func (panics) Fetch(context.Context, uint32, []byte) error {
	time.Sleep(time.Second)
	panic("boom")
}

// TestAheadMemory: read-ahead keeps to its memory, and what nobody asks for makes
// room in the end.
func TestAheadMemory(t *testing.T) {
	c := None(Options{AheadMemory: 64 * BlockSize, Logger: quiet})
	u := c.Client()
	k := key(c, 1)
	src := &content{object: k.Object}
	claim := func(first, n uint32) bool {
		cl, _, ok := u.Claim(&k, Want{First: first, N: n, Asked: n})
		if ok {
			if err := u.Fly(context.Background(), cl, &k, src, Keep); err != nil {
				t.Fatal(err)
			}
		}
		return ok
	}
	for i := range uint32(4) {
		if !claim(i*16, 16) {
			t.Fatal("no memory for what fits")
		}
	}
	if _, seen, ok := u.Claim(&k, Want{First: 16, N: 32, Asked: 32}); ok || seen != 16 {
		t.Errorf("what is there is claimed again: %d, %v", seen, ok)
	}
	if claim(64, 16) {
		t.Fatal("more is held than there is memory for")
	}
	before := src.fetches.Load()
	if fetched := readFrom(t, u, src, 16*BlockSize, 16*BlockSize); fetched || src.fetches.Load() != before {
		t.Error("what was read ahead is fetched again")
	}
	if !claim(64, 16) {
		t.Error("what was asked for does not make room")
	}
	for range maxRefused {
		claim(128, 16)
	}
	if !claim(128, 16) {
		t.Error("what nobody asks for does not make room")
	}
	if n := c.Stats().Memory; n > 64*BlockSize+1024 {
		t.Errorf("%d bytes held", n)
	}
}

func readFrom(t *testing.T, u *Client, src Source, off, size int) bool {
	t.Helper()
	k := key(u.c, 1)
	dst := make([]byte, size)
	fetched, err := u.Read(context.Background(), &k, off, dst, src, Keep)
	if err != nil {
		t.Fatal(err)
	}
	check(t, k.Object, off, dst)
	return fetched
}

// TestNotBegun: who needs what is claimed, and not begun, does not wait for it.
func TestNotBegun(t *testing.T) {
	c := None(Options{Logger: quiet})
	u := c.Client()
	k := key(c, 1)
	src := &content{object: k.Object}
	claim, _, ok := u.Claim(&k, Want{First: 0, N: 8, Asked: 8, By: "me"})
	if !ok {
		t.Fatal("no claim")
	}
	if _, c := u.Ready(&k, 0, make([]byte, BlockSize)); c.By != "me" {
		t.Errorf("before it has begun: %+v", c)
	}
	if !readFrom(t, u, src, 2*BlockSize, BlockSize) {
		t.Error("who fetched it?")
	}
	if err := u.Fly(context.Background(), claim, &k, src, Keep); err != nil {
		t.Fatal(err)
	}
	if n := src.blocks.Load(); n != 8 {
		t.Errorf("%d blocks fetched, want 8", n)
	}
}

// TestQuit: a claim that has ended is not named to those who still have to wait, for the fetch of
// somebody else.
func TestQuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := None(Options{Logger: quiet})
		u := c.Client()
		k := key(c, 1)
		claim, _, ok := u.Claim(&k, Want{N: 8, Asked: 8, By: "me"})
		if !ok {
			t.Fatal("no claim")
		}
		src := &slow{content{object: k.Object}}
		read := make(chan error, 1)
		go func() {
			_, err := u.Read(context.Background(), &k, 0, make([]byte, BlockSize), src, Keep)
			read <- err
		}()
		synctest.Wait() // somebody else fetches it
		if err := u.Fly(context.Background(), claim, &k, src, Keep); err != nil {
			t.Fatal(err)
		}
		if _, c := u.Ready(&k, 0, make([]byte, BlockSize)); !c.Known || c.By != nil {
			t.Errorf("%+v", c)
		}
		if err := <-read; err != nil {
			t.Fatal(err)
		}
	})
}

// TestPieces: what the SSD has is read ahead from there if it is asked for in pieces, and stays in
// memory until it has been.
func TestPieces(t *testing.T) {
	f := newMemFile(MinSize)
	c := mustOpen(t, f)
	u := c.Client()
	k := key(c, 1)
	read(t, u, 1, 0, testSize, Keep)
	c.Close()
	c = mustOpen(t, f) // nothing of it is in memory
	u = c.Client()
	k = key(c, 1)
	src := &content{object: k.Object}
	if _, seen, claimed := u.Claim(&k, Want{N: 16, Asked: 3}); claimed || seen != 16 {
		t.Fatalf("%d blocks that are cached are seen to, claimed %t", seen, claimed)
	}
	for _, damaged := range []bool{false, true} {
		if damaged {
			f.mu.Lock()
			for i := BlockSize + 100; i < len(f.b); i += BlockSize {
				f.b[i] ^= 1
			}
			f.mu.Unlock()
		}
		before := c.Stats()
		claim, seen, claimed := u.Claim(&k, Want{N: 16, Asked: 3, Pieces: true})
		if !claimed || seen != 16 {
			t.Fatalf("damaged %t: %d blocks are seen to, claimed %t", damaged, seen, claimed)
		}
		if err := u.Fly(context.Background(), claim, &k, src, Keep); err != nil {
			t.Fatal(err)
		}
		if fetched := src.blocks.Load() > 0; fetched != damaged {
			t.Errorf("damaged %t: fetched %t", damaged, fetched)
		}
		for _, first := range []int{0, 7, 15} {
			got := make([]byte, BlockSize)
			if n, _ := u.Ready(&k, first*BlockSize, got); n != BlockSize {
				t.Fatalf("damaged %t: block %d is not there", damaged, first)
			}
			check(t, k.Object, first*BlockSize, got)
		}
		if n, _ := u.Ready(&k, 0, make([]byte, BlockSize)); n != 0 {
			t.Errorf("damaged %t: it stays when all has been asked for", damaged)
		}
		if s := c.Stats(); (s.Hits > before.Hits) == damaged || (s.Misses > before.Misses) != damaged {
			t.Errorf("damaged %t: counted %+v after %+v", damaged, s.ClientStats, before.ClientStats)
		}
	}
}

// TestReady: what was read ahead is there without a wait, once it has come, as far as
// it goes, and until all of it has been asked for.
func TestReady(t *testing.T) {
	c := None(Options{Logger: quiet})
	u := c.Client()
	k := key(c, 1)
	src := &content{object: k.Object}
	landed := false
	ready := func(off, size, want int, wantComing bool) {
		t.Helper()
		got, whole := make([]byte, size), make([]byte, 8*BlockSize)
		if err := src.Fetch(context.Background(), 0, whole); err != nil {
			t.Fatal(err)
		}
		n, coming := u.Ready(&k, off, got)
		if n != want || coming.Known != wantComing || (coming.By == "me") != (wantComing && !landed) || !bytes.Equal(got[:n], whole[off:][:n]) {
			t.Errorf("%d bytes from %d are ready, %+v, or not what was fetched; want %d, %t", n, off, coming, want, wantComing)
		}
	}
	ready(0, BlockSize, 0, false)
	claim, _, ok := u.Claim(&k, Want{First: 0, N: 8, Asked: 8, By: "me"})
	if !ok {
		t.Fatal("no claim")
	}
	ready(0, BlockSize, 0, true)
	ready(8*BlockSize, BlockSize, 0, false)
	if err := u.Fly(context.Background(), claim, &k, src, Keep); err != nil {
		t.Fatal(err)
	}
	landed = true
	ready(512, 1024, 1024, true)
	ready(0, 0, 0, true)
	ready(0, 4*BlockSize, 4*BlockSize, true)
	ready(4*BlockSize+512, 4*BlockSize-512, 4*BlockSize-512, true)
	ready(0, BlockSize, 0, false)
	if n := c.Stats().Memory; n > 1024 {
		t.Errorf("%d bytes are held", n)
	}
}

// TestStreamsAreNotKept: a long stream leaves nothing on the SSD the first time,
// and nearly all of it the second time: the ghost's buckets lose some.
func TestStreamsAreNotKept(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	for pass := range 3 {
		before := u.Stats().Fetched
		for n := range uint64(8) {
			read(t, u, n, 0, testSize, KeepKnown)
		}
		fetched := float64(u.Stats().Fetched-before) / (8 * testSize)
		if pass < 2 && fetched != 1 || pass == 2 && fetched > 0.1 {
			t.Errorf("pass %d: %.2f of it fetched", pass, fetched)
		}
		if s := c.Stats(); (s.Filled > 0) != (pass > 0) {
			t.Errorf("pass %d: %d bytes kept", pass, s.Filled)
		}
	}
}

// TestDroppedIsKeptNextTime: of a stream that comes for the second time faster than the SSD takes
// it, what is not kept is kept the third time, not the fourth.
func TestDroppedIsKeptNextTime(t *testing.T) {
	c := mustOpen(t, newMemFile(MinSize))
	u := c.Client()
	pass := func() (fetched float64) {
		before := u.Stats().Fetched
		for n := range uint64(8) {
			read(t, u, n, 0, testSize, KeepKnown)
		}
		return float64(u.Stats().Fetched-before) / (8 * testSize)
	}
	pass()
	c.maintain.Lock() // nothing is written
	pass()
	c.maintain.Unlock()
	c.Maintain()
	if s := c.Stats(); s.Dropped < testSize {
		t.Fatalf("%d bytes are dropped: this tests nothing", s.Dropped)
	}
	pass()
	if fetched := pass(); fetched > 0.1 {
		t.Errorf("%.2f of it is fetched the fourth time", fetched)
	}
}

// TestShortLastBlock: what was read ahead of an object whose last block is short is let go of
// when all of it has been read: nobody asks for the rest of that block.
func TestShortLastBlock(t *testing.T) {
	const size = 8*BlockSize + 512
	for _, ready := range []bool{true, false} {
		c := None(Options{Logger: quiet})
		u := c.Client()
		k := c.Key(testObject(1), size)
		src := &content{object: k.Object}
		claim, _, ok := u.Claim(&k, Want{First: 0, N: 9, Asked: 9})
		if !ok {
			t.Fatal("no claim")
		}
		if !ready { // it is fetched by who reads it, and kept for the others
			if _, err := u.Read(context.Background(), &k, 0, make([]byte, size), src, Keep); err != nil {
				t.Fatal(err)
			}
		}
		if err := u.Fly(context.Background(), claim, &k, src, Keep); err != nil {
			t.Fatal(err)
		}
		if ready {
			if n, _ := u.Ready(&k, 0, make([]byte, size)); n != size {
				t.Errorf("%d bytes are ready", n)
			}
		}
		if n := c.Stats().Memory; n > 1024 {
			t.Errorf("%d bytes are held (ready %t)", n, ready)
		}
	}
}
