package reactor

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/aio"
	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

func newReactor(t testing.TB, c Config) *Reactor {
	t.Helper()
	r, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Stop()
		waitDone(t, r)
	})
	return r
}

func waitDone(t testing.TB, r *Reactor) {
	t.Helper()
	select {
	case <-r.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the reactor does not end")
	}
}

func call(t testing.TB, r *Reactor, fn func()) {
	t.Helper()
	if err := r.Call(fn); err != nil {
		t.Fatal(err)
	}
}

func TestPostFromMany(t *testing.T) {
	r := newReactor(t, Config{Name: "test"})
	const goroutines, each = 16, 2000
	var sum int // the reactor's own: the race detector watches
	var last [goroutines]int
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range each {
				r.Post(func() {
					if last[g] != i {
						t.Errorf("goroutine %d: function %d ran, want %d", g, i, last[g])
					}
					last[g] = i + 1
					sum++
				})
				if i%100 == 0 {
					time.Sleep(time.Duration(rand.N(200)) * time.Microsecond)
				}
			}
		})
	}
	wg.Wait()
	var got int
	call(t, r, func() { got = sum })
	if got != goroutines*each {
		t.Errorf("%d functions ran, want %d", got, goroutines*each)
	}
}

// TestWakeFromSleep posts to a reactor that sleeps each time.
func TestWakeFromSleep(t *testing.T) {
	r := newReactor(t, Config{})
	for range 200 {
		for !r.sleeping.Load() {
			time.Sleep(10 * time.Microsecond)
		}
		call(t, r, func() {})
	}
}

// TestNice looks at what the kernel has of the reactor's thread, and that the others
// do not have it.
func TestNice(t *testing.T) {
	was, err := unix.SchedGetAttr(unix.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	nice := int(was.Nice) + 1 // needs no privilege
	r := newReactor(t, Config{Name: "test", Nice: nice})
	call(t, r, func() {
		a, err := unix.SchedGetAttr(0, 0)
		if err != nil || int(a.Nice) != nice {
			t.Errorf("the reactor has %+v, %v", a, err)
		}
		if a.Runtime != 0 && a.Runtime != uint64(slice.Nanoseconds()) { // 0: Linux before 6.12
			t.Errorf("a slice of %d ns", a.Runtime)
		}
	})
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		if a, err := unix.SchedGetAttr(tid, 0); err == nil && int(a.Nice) == nice {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d threads have the priority", n)
	}
}

// TestNiceRefused: a thread that may not have the priority goes on without, and the
// log says so.
func TestNiceRefused(t *testing.T) {
	var log bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends, with what it has lost
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&header, &caps[0]); err != nil {
			t.Error(err)
			return
		}
		caps[0].Effective &^= 1 << unix.CAP_SYS_NICE
		if err := unix.Capset(&header, &caps[0]); err != nil {
			t.Error(err)
			return
		}
		r := Reactor{log: slog.New(slog.NewTextHandler(&log, nil))}
		r.setNice(-5)
	}()
	<-done
	if !strings.Contains(log.String(), "gets no priority") {
		t.Errorf("the log says %q", log.String())
	}
}

func TestCallErrors(t *testing.T) {
	r := newReactor(t, Config{})
	call(t, r, func() {
		if err := r.Call(func() {}); !errors.Is(err, ErrOwnThread) {
			t.Errorf("Call on the reactor: %v", err)
		}
	})
	r.Stop()
	waitDone(t, r)
	if err := r.Call(func() {}); !errors.Is(err, ErrStopped) {
		t.Errorf("Call after the end: %v", err)
	}
	if err := r.Err(); err != nil {
		t.Errorf("Err after Stop: %v", err)
	}
	r.Post(func() { t.Error("a function ran after the end") })
	r.Stop()
}

func TestStopRunsWhatWasPosted(t *testing.T) {
	r := newReactor(t, Config{})
	var n int
	for range 100 {
		r.Post(func() { n++ })
	}
	r.Stop()
	waitDone(t, r)
	if n != 100 {
		t.Errorf("%d posted functions ran before the end, want 100", n)
	}
}

func TestThreadEnds(t *testing.T) {
	for range 20 {
		r := newReactor(t, Config{})
		if r.tid == unix.Getpid() {
			t.Fatal("a reactor runs on the main thread")
		}
		r.Stop()
		waitDone(t, r)
		if err := unix.Tgkill(unix.Getpid(), r.tid, 0); err != unix.ESRCH {
			t.Errorf("the reactor's thread is still there: %v", err)
		}
	}
}

func TestTimers(t *testing.T) {
	r := newReactor(t, Config{})
	var order []int
	done := make(chan struct{})
	call(t, r, func() {
		add := func(d time.Duration, i int) *Timer {
			return r.AfterFunc(d, func() { order = append(order, i) })
		}
		add(30*time.Millisecond, 3)
		add(10*time.Millisecond, 1)
		add(20*time.Millisecond, 2)
		stopped := add(15*time.Millisecond, 99)
		if !stopped.Stop() || stopped.Stop() {
			t.Error("Stop does not say whether the timer was pending")
		}
		moved := add(time.Hour, 4)
		moved.Reset(40 * time.Millisecond)
		r.AfterFunc(50*time.Millisecond, func() { close(done) })
	})
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("timers do not fire")
	}
	call(t, r, func() {
		if len(order) != 4 {
			t.Fatalf("fired: %v", order)
		}
		for i, v := range order {
			if v != i+1 {
				t.Errorf("fired in order %v", order)
			}
		}
	})
}

// TestTimerHeap compares the heap with a sorted model.
func TestTimerHeap(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var h timerHeap
	live := map[*Timer]bool{}
	for range 20000 {
		if rnd.IntN(2) == 0 || len(live) == 0 {
			tm := &Timer{when: time.Duration(rnd.IntN(1000)), pos: -1}
			h.add(tm)
			live[tm] = true
		} else {
			tm := h[rnd.IntN(len(h))]
			if rnd.IntN(2) == 0 {
				tm = h[0]
			}
			h.remove(tm)
			delete(live, tm)
		}
		if len(h) != len(live) {
			t.Fatalf("%d timers in the heap, want %d", len(h), len(live))
		}
		for i, tm := range h {
			if tm.pos != i || i > 0 && h[(i-1)/2].when > tm.when {
				t.Fatalf("heap broken at %d", i)
			}
		}
	}
}

func TestTimerRepeats(t *testing.T) {
	r := newReactor(t, Config{})
	done := make(chan struct{})
	var n int
	call(t, r, func() {
		var tm *Timer
		tm = r.AfterFunc(0, func() {
			if n++; n == 100 {
				close(done)
				return
			}
			tm.Reset(0)
		})
	})
	<-done
}

// TestTimerOncePerTurn: a timer that is set to fire at once by its own function fires in
// the next turn, however many other timers there are.
func TestTimerOncePerTurn(t *testing.T) {
	r := newReactor(t, Config{})
	done := make(chan struct{})
	fired, turn, last := 0, 0, -1
	call(t, r, func() {
		r.OnTurn(func() { turn++ })
		for range 20 {
			r.AfterFunc(time.Hour, func() {})
		}
		var tm *Timer
		tm = r.AfterFunc(0, func() {
			if turn == last {
				t.Errorf("it fires again in turn %d", turn)
			}
			last = turn
			if fired++; fired == 100 {
				close(done)
				return
			}
			tm.Reset(0)
		})
	})
	<-done
}

func TestTurnHook(t *testing.T) {
	r := newReactor(t, Config{})
	var posted, seen, turns int
	call(t, r, func() {
		r.OnTurn(func() {
			if posted > seen {
				turns++
				seen = posted
			}
		})
	})
	block := make(chan struct{})
	r.Post(func() { <-block })
	for range 50 {
		r.Post(func() { posted++ })
	}
	close(block)
	call(t, r, func() {
		if posted != 50 {
			t.Errorf("posted = %d", posted)
		}
	})
	call(t, r, func() {
		if seen != 50 || turns > 2 {
			t.Errorf("hook saw %d in %d turns; want all 50 in one or two", seen, turns)
		}
	})
}

func TestSpawn(t *testing.T) {
	r := newReactor(t, Config{})
	done := make(chan int)
	var state int
	r.Post(func() {
		r.Spawn(func() { time.Sleep(time.Millisecond) }, func() {
			state++
			done <- state
		})
	})
	if got := <-done; got != 1 {
		t.Errorf("state = %d", got)
	}
}

func TestPanicIsContained(t *testing.T) {
	other := newReactor(t, Config{Name: "other"})
	for name, boom := range map[string]func(*Reactor){
		"posted":  func(r *Reactor) { r.Post(func() { panic(errBoom) }) },
		"timer":   func(r *Reactor) { r.Post(func() { r.AfterFunc(0, func() { panic(errBoom) }) }) },
		"hook":    func(r *Reactor) { r.Post(func() { r.OnTurn(func() { panic(errBoom) }) }) },
		"spawned": func(r *Reactor) { r.Post(func() { r.Spawn(func() { panic(errBoom) }, nil) }) },
		"completion": func(r *Reactor) {
			r.Post(func() { r.Ring().Nop(completeFunc(func(int32, uint32) { panic(errBoom) })) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			var log syncBuffer
			reported := make(chan error, 1)
			r := newReactor(t, Config{
				Name:    name,
				Logger:  slog.New(slog.NewTextHandler(&log, nil)),
				OnPanic: func(err error) { reported <- err; panic("again") },
			})
			boom(r)
			if err := <-reported; !errors.Is(err, errBoom) {
				t.Errorf("reported %v", err)
			}
			waitDone(t, r)
			if !errors.Is(r.Err(), errBoom) {
				t.Errorf("Err() = %v", r.Err())
			}
			if s := log.String(); !strings.Contains(s, "boom") || !strings.Contains(s, "reactor_test.go") {
				t.Errorf("the log has no stack: %s", s)
			}
			if err := r.Call(func() {}); !errors.Is(err, ErrStopped) {
				t.Errorf("Call after a panic: %v", err)
			}
			call(t, other, func() {})
		})
	}
}

var errBoom = errors.New("boom")

type completeFunc func(int32, uint32)

func (f completeFunc) Complete(res int32, flags uint32) { f(res, flags) }

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// looper writes, syncs and reads back in turn, n rounds.
type looper struct {
	dev   aio.Device
	buf   []byte
	step  int
	left  int
	err   atomic.Int32
	ended chan struct{}
}

func (l *looper) start(n int) { l.left, l.step = n, 0; l.next() }

func (l *looper) next() {
	switch l.step % 3 {
	case 0:
		l.dev.WriteAt(l.buf, 0, l)
	case 1:
		l.dev.Sync(l)
	case 2:
		l.dev.ReadAt(l.buf, 0, l)
	}
	l.step++
}

func (l *looper) Complete(res int32, _ uint32) {
	if res < 0 {
		l.err.Store(res)
	}
	if l.step%3 == 0 {
		if l.left--; l.left == 0 {
			l.ended <- struct{}{}
			return
		}
	}
	l.next()
}

func newLooper(t testing.TB, r *Reactor) *looper {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := uring.NewArena(4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); a.Close() })
	return &looper{dev: r.File(int(f.Fd())), buf: a.Bytes(), ended: make(chan struct{}, 1)}
}

func TestAllocs(t *testing.T) {
	r := newReactor(t, Config{})
	l := newLooper(t, r)
	start := func() { l.start(10) }
	n := testing.AllocsPerRun(50, func() {
		r.Post(start)
		<-l.ended
	})
	if n != 0 {
		t.Errorf("%v allocations for ten rounds of write, sync, read", n)
	}
	if e := l.err.Load(); e != 0 {
		t.Errorf("I/O failed: %d", e)
	}
}

func TestTimerAllocs(t *testing.T) {
	r := newReactor(t, Config{})
	fired := make(chan struct{}, 1)
	var tm *Timer
	call(t, r, func() { tm = r.AfterFunc(time.Hour, func() { fired <- struct{}{} }) })
	reset := func() { tm.Reset(0) }
	if n := testing.AllocsPerRun(100, func() { r.Post(reset); <-fired }); n != 0 {
		t.Errorf("%v allocations for a timer", n)
	}
}

// TestStopWithIOInFlight ends a reactor whose operation never ends by itself.
func TestStopWithIOInFlight(t *testing.T) {
	r := newReactor(t, Config{})
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	a, err := uring.NewArena(64)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	call(t, r, func() {
		r.Ring().Read(p[0], a.Bytes()[:64], -1, completeFunc(func(int32, uint32) { t.Error("completed after Stop") }))
	})
	r.Stop()
	waitDone(t, r)
}

func BenchmarkPost(b *testing.B) {
	r := newReactor(b, Config{})
	fn := func() {}
	b.ReportAllocs()
	for b.Loop() {
		r.Post(fn)
	}
	call(b, r, fn)
	runtime.KeepAlive(r)
}

func BenchmarkCallSleeping(b *testing.B) {
	r := newReactor(b, Config{})
	ch := make(chan struct{}, 1)
	fn := func() { ch <- struct{}{} }
	b.ReportAllocs()
	for b.Loop() {
		r.Post(fn)
		<-ch
	}
}

type nopLoop struct {
	r    *Reactor
	left int
	end  chan struct{}
}

func (n *nopLoop) Complete(int32, uint32) {
	if n.left--; n.left <= 0 {
		if n.left == 0 {
			close(n.end)
		}
		return
	}
	n.r.Ring().Nop(n)
}

func BenchmarkTurn(b *testing.B) {
	r := newReactor(b, Config{})
	n := &nopLoop{r: r, left: b.N, end: make(chan struct{})}
	b.ReportAllocs()
	r.Post(func() { r.Ring().Nop(n) })
	<-n.end
}
