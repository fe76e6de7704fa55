package uring

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newRing locks the test to its thread and makes a ring on it.
func newRing(t testing.TB, o Options) *Ring {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func newArena(t testing.TB, size int) []byte {
	t.Helper()
	a, err := NewArena(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a.Bytes()
}

func tempFile(t testing.TB) int {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// result counts completions and keeps the last result.
type result struct {
	n   int
	res int32
}

func (r *result) Complete(res int32, _ uint32) { r.n++; r.res = res }

// wait runs the ring until c has been completed n times.
func wait(t testing.TB, r *Ring, c *result, n int) int32 {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); c.n < n; {
		if time.Now().After(deadline) {
			t.Fatalf("%d completions after 10 s, want %d", c.n, n)
		}
		if err := r.SubmitAndWait(time.Second); err != nil {
			t.Fatal(err)
		}
		r.Reap()
	}
	return c.res
}

func TestReadWriteSync(t *testing.T) {
	for _, sqe128 := range []bool{false, true} {
		r := newRing(t, Options{Entries: 4, SQE128: sqe128})
		fd := tempFile(t)
		mem := newArena(t, 8192)
		w, rd := mem[:4096], mem[4096:8192]
		for i := range w {
			w[i] = byte(i * 7)
		}
		var c result
		// More rounds than the rings have entries: all indices wrap.
		for i := range 50 {
			clear(rd)
			off := int64(i) * 4096
			r.Write(fd, w, off, &c)
			if got := wait(t, r, &c, 3*i+1); got != 4096 {
				t.Fatalf("write = %d", got)
			}
			r.Fsync(fd, i%2 == 0, &c)
			if got := wait(t, r, &c, 3*i+2); got != 0 {
				t.Fatalf("fsync = %d", got)
			}
			r.Read(fd, rd, off, &c)
			if got := wait(t, r, &c, 3*i+3); got != 4096 || !bytes.Equal(w, rd) {
				t.Fatalf("read = %d, equal %v", got, bytes.Equal(w, rd))
			}
		}
		r.Read(99999, rd, 0, &c)
		if got := wait(t, r, &c, c.n+1); got != -int32(unix.EBADF) {
			t.Errorf("read of a bad file = %d, want -EBADF", got)
		}
	}
}

func TestFixed(t *testing.T) {
	r := newRing(t, Options{})
	fd := tempFile(t)
	mem := newArena(t, 8192)
	if err := r.RegisterFiles([]int{-1, fd}); err != nil {
		t.Fatal(err)
	}
	if err := r.RegisterBuffers([][]byte{mem[:4096], mem[4096:]}); err != nil {
		t.Fatal(err)
	}
	copy(mem, "fixed")
	var c result
	r.WriteFixed(Fixed(1), mem[:512], 0, 0, &c)
	if got := wait(t, r, &c, 1); got != 512 {
		t.Fatalf("write = %d", got)
	}
	r.ReadFixed(Fixed(1), mem[4096:4096+512], 0, 1, &c)
	if got := wait(t, r, &c, 2); got != 512 || !bytes.Equal(mem[:512], mem[4096:4096+512]) {
		t.Fatalf("read = %d", got)
	}
	r.ReadFixed(Fixed(1), mem[4096:], 0, 0, &c) // not inside buffer 0
	if got := wait(t, r, &c, 3); got != -int32(unix.EFAULT) {
		t.Errorf("read outside of the buffer = %d, want -EFAULT", got)
	}
}

// TestSubmitWhenFull queues far more than either queue holds: nothing may be
// lost (submission first, then completion overflow).
func TestSubmitWhenFull(t *testing.T) {
	r := newRing(t, Options{Entries: 4, CQEntries: 8})
	const n = 5000
	var c result
	for range n {
		r.Nop(&c)
	}
	wait(t, r, &c, n)
	if r.Inflight() != 0 {
		t.Errorf("%d in flight at the end", r.Inflight())
	}
	if r.Reap() != 0 || c.n != n {
		t.Errorf("%d completions, want %d", c.n, n)
	}
}

// chain queues another burst from within a completion.
type chain struct {
	r    *Ring
	c    *result
	left int
}

func (c *chain) Complete(int32, uint32) {
	c.c.n++
	if c.left > 0 {
		c.left--
		for range 20 {
			c.r.Nop(c.c)
		}
		c.r.Nop(c)
	}
}

func TestQueueFromCompletion(t *testing.T) {
	r := newRing(t, Options{Entries: 4, CQEntries: 8})
	var c result
	r.Nop(&chain{r, &c, 100})
	wait(t, r, &c, 101+20*100)
}

func TestStaleCompletion(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	var c result
	data := r.hold(&c, false)
	if r.release(data, 0) == nil {
		t.Fatal("live completion not found")
	}
	for _, stale := range []uint64{data, 1 << 40, 0xffffffff} {
		if r.release(stale, 0) != nil {
			t.Errorf("stale user_data %#x found a Completer", stale)
		}
	}
	if r.Inflight() != 0 {
		t.Errorf("%d in flight", r.Inflight())
	}
}

func TestTimeout(t *testing.T) {
	r := newRing(t, Options{})
	start := time.Now()
	if err := r.SubmitAndWait(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 15*time.Millisecond || d > 5*time.Second {
		t.Errorf("a wait of 20 ms took %v", d)
	}
	start = time.Now()
	if err := r.SubmitAndWait(0); err != nil || time.Since(start) > time.Second {
		t.Errorf("poll took %v: %v", time.Since(start), err)
	}
}

func newWaker(t testing.TB, r *Ring) *Waker {
	t.Helper()
	w, err := NewWaker(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close() // before the waker's memory goes
		w.Close()
	})
	return w
}

func TestWaker(t *testing.T) {
	r := newRing(t, Options{})
	w := newWaker(t, r)
	for range 100 {
		go w.Wake()
		if err := r.SubmitAndWait(-1); err != nil {
			t.Fatal(err)
		}
		for r.Reap() == 0 {
			if err := r.SubmitAndWait(-1); err != nil {
				t.Fatal(err)
			}
		}
	}
	if w.Err() != nil {
		t.Error(w.Err())
	}
}

// TestSettle: a ring that was woken up is still when what was queued is with the
// kernel, although the waker waits for the next time; one that has a completion is
// not.
func TestSettle(t *testing.T) {
	r := newRing(t, Options{})
	w := newWaker(t, r)
	settle := func(want bool) {
		t.Helper()
		switch still, err := r.Settle(); {
		case err != nil:
			t.Fatal(err)
		case still != (want && r.deferTW):
			t.Fatalf("Settle reports %v, want %v", still, want && r.deferTW)
		}
	}
	for range 100 {
		w.Wake()
		for r.Reap() == 0 {
			if err := r.SubmitAndWait(-1); err != nil {
				t.Fatal(err)
			}
		}
		settle(true)
		settle(true)
		var c result
		r.Nop(&c)
		settle(false)
		settle(false)
		if r.Reap() != 1 {
			t.Fatal("there was nothing to reap")
		}
		settle(true)
	}
}

func TestOtherThread(t *testing.T) {
	r := newRing(t, Options{})
	errc := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		errc <- r.SubmitAndWait(time.Millisecond)
	}()
	if err := <-errc; r.deferTW && !errors.Is(err, unix.EEXIST) {
		t.Errorf("wait on another thread: %v, want EEXIST", err)
	}
}

func TestCommandErrors(t *testing.T) {
	r := newRing(t, Options{})
	var c result
	r.Command(tempFile(t), 1, make([]byte, CmdSize), nil, &c)
	if got := wait(t, r, &c, 1); got != -int32(unix.EOPNOTSUPP) {
		t.Errorf("command to a plain file = %d, want -EOPNOTSUPP", got)
	}
	defer func() {
		if recover() == nil {
			t.Error("a payload that does not fit was accepted")
		}
	}()
	r.Command(0, 1, make([]byte, CmdSize+1), nil, &c)
}

// TestPrompt: a wait goes on with what ends as it is submitted, for a while, and is over
// with anything else.
func TestPrompt(t *testing.T) {
	r := newRing(t, Options{})
	fd := tempFile(t)
	for _, c := range []struct {
		prompt          int
		timeout, atMost time.Duration
	}{{1, 30 * time.Millisecond, 30 * time.Millisecond}, {3, -1, promptTimeout}} {
		var prompt, other result
		for range c.prompt {
			r.Command(fd, 1, nil, nil, &prompt)
			r.Prompt()
		}
		begin := time.Now()
		if err := r.SubmitAndWait(c.timeout); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < c.atMost*9/10 {
			t.Errorf("the wait ended after %v, want %v", took, c.atMost)
		}
		if r.Reap(); prompt.n != c.prompt {
			t.Fatalf("%d of %d commands have ended", prompt.n, c.prompt)
		}
		r.Command(fd, 1, nil, nil, &prompt)
		r.Prompt()
		r.Nop(&other)
		begin = time.Now()
		if err := r.SubmitAndWait(-1); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > promptTimeout/2 {
			t.Errorf("the wait ended %v after something had happened", took)
		}
		r.Reap()
	}
	// What has been submitted by another call counts no more.
	var prompt, other result
	r.Command(fd, 1, nil, nil, &prompt)
	r.Prompt()
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	r.Reap()
	r.Nop(&other)
	begin := time.Now()
	if err := r.SubmitAndWait(-1); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > promptTimeout/2 {
		t.Errorf("the wait ended %v after something had happened", took)
	}
}

// TestAmend changes commands before they are submitted, and not after that.
func TestAmend(t *testing.T) {
	for _, o := range []Options{{Entries: 4}, {Entries: 4, SQE128: true}} {
		r := newRing(t, o)
		fd := tempFile(t)
		for range 5 { // the queue wraps around
			var a, b result
			qa := r.Command(fd, 1, []byte("first"), nil, &a)
			qb := r.Command(fd, 1, []byte("second"), nil, &b)
			if !r.Amend(qa, []byte("other")) || !r.Amend(qb, nil) || !r.Amend(qb, []byte("another")) {
				t.Fatal("a command that was queued could not be amended")
			}
			for q, want := range map[Queued]string{qa: "other", qb: "another"} {
				got := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(r.entry(q)), cmdOffset)), r.payloadRoom())
				if !bytes.Equal(got, append([]byte(want), make([]byte, len(got)-len(want))...)) {
					t.Errorf("payload %q, want %q", got, want)
				}
			}
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			if r.Amend(qa, nil) || r.Amend(qb, nil) {
				t.Error("a command that was submitted has been amended")
			}
			wait(t, r, &a, 1)
			wait(t, r, &b, 1)
		}
	}
}

// TestCloseInFlight closes a ring with a read pending that never ends by itself.
func TestCloseInFlight(t *testing.T) {
	r := newRing(t, Options{})
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	var c result
	r.Read(p[0], newArena(t, 64)[:64], -1, &c)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if c.n != 0 || r.Inflight() != 0 && r.Inflight() != r.cmds {
		t.Errorf("after Close: %d completions, %d in flight", c.n, r.Inflight())
	}
	if err := r.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestBadOptions(t *testing.T) {
	for _, o := range []Options{
		{Entries: maxEntries + 1},
		{Entries: 64, CQEntries: 32},
		{Entries: 1, CQEntries: 2*maxEntries + 1},
	} {
		if r, err := New(o); err == nil {
			r.Close()
			t.Errorf("New(%+v) succeeded", o)
		}
	}
	if _, err := NewArena(0); err == nil {
		t.Error("an empty arena was made")
	}
}

func TestLayout(t *testing.T) {
	// Sizes of linux/io_uring.h and linux/time_types.h.
	if s := unsafe.Sizeof(eventsArg{}); s != 24 {
		t.Errorf("sizeof(struct io_uring_getevents_arg) = %d, want 24", s)
	}
	if s := unsafe.Sizeof(kernelTimespec{}); s != 16 {
		t.Errorf("sizeof(struct __kernel_timespec) = %d, want 16", s)
	}
}

func TestAllocs(t *testing.T) {
	r := newRing(t, Options{})
	fd := tempFile(t)
	p := newArena(t, 4096)
	var c result
	n := testing.AllocsPerRun(200, func() {
		r.Write(fd, p, 0, &c)
		r.Read(fd, p, 0, &c)
		r.Fsync(fd, true, &c)
		want := c.n + 3
		for c.n < want {
			if err := r.SubmitAndWait(time.Second); err != nil {
				t.Fatal(err)
			}
			r.Reap()
		}
	})
	if n != 0 {
		t.Errorf("%v allocations for a write, read and sync", n)
	}
}

func BenchmarkNop(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run("depth="+string(rune('0'+depth/10))+string(rune('0'+depth%10)), func(b *testing.B) {
			r := newRing(b, Options{})
			var c result
			b.ReportAllocs()
			for i := 0; i < b.N; i += depth {
				for range depth {
					r.Nop(&c)
				}
				if err := r.SubmitAndWait(0); err != nil {
					b.Fatal(err)
				}
				r.Reap()
			}
		})
	}
}

// TestArenaRelease gives memory back that is locked, as all of the daemon's is.
func TestArenaRelease(t *testing.T) {
	const size = 1 << 20
	a, err := NewArena(size)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := a.Bytes()
	resident := func() (n int) {
		pages := make([]byte, size/os.Getpagesize())
		// Unsafe: the kernel fills pages during the call only.
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), size, uintptr(unsafe.Pointer(&pages[0])))
		if errno != 0 {
			t.Fatal(errno)
		}
		for _, p := range pages {
			n += int(p & 1)
		}
		return n
	}
	if err := unix.Mlock(b); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for i := range b {
			b[i] = 0xff
		}
		if n := resident(); n != size/os.Getpagesize() {
			t.Fatalf("%d pages are resident", n)
		}
		if err := a.Release(); err != nil {
			t.Fatal(err)
		}
		if n := resident(); n != 0 {
			t.Errorf("%d pages are resident after Release", n)
		}
		if b[0] != 0 || b[size-1] != 0 {
			t.Error("the memory kept its contents")
		}
		if err := a.Release(); err != nil { // again
			t.Error(err)
		}
	}
}

// TestSettleOverflow: a ring is not still while there are completions that had no room
// in their queue.
func TestSettleOverflow(t *testing.T) {
	r := newRing(t, Options{Entries: 4, CQEntries: 4})
	const n = 32
	var c result
	for range n {
		r.Nop(&c)
	}
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	for reaped := r.Reap(); reaped < n; reaped += r.Reap() {
		if still, err := r.Settle(); err != nil || still {
			t.Fatalf("after %d of %d completions the ring is still: %v, %v", reaped, n, still, err)
		}
		if err := r.SubmitAndWait(0); err != nil {
			t.Fatal(err)
		}
	}
	if still, err := r.Settle(); err != nil || still != r.deferTW {
		t.Errorf("after all completions the ring is still: %v, %v", still, err)
	}
}

// TestPopulate: an arena whose pages are there already is still all zeroes, and can be written to.
func TestPopulate(t *testing.T) {
	a, err := NewArena(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	resident := func() (n int) {
		t.Helper()
		there := make([]byte, len(a.Bytes())/os.Getpagesize())
		if _, _, err := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&a.Bytes()[0])), uintptr(len(a.Bytes())), uintptr(unsafe.Pointer(&there[0]))); err != 0 {
			t.Fatal(err)
		}
		for _, b := range there {
			n += int(b & 1)
		}
		return n
	}
	if n := resident(); n > 0 {
		t.Fatalf("%d pages are there: this tests nothing", n)
	}
	if err := a.Populate(); err != nil {
		t.Fatal(err)
	}
	if n := resident(); n != len(a.Bytes())/os.Getpagesize() {
		t.Errorf("%d pages are there", n)
	}
	for i, b := range a.Bytes() {
		if b != 0 {
			t.Fatalf("byte %d is %d", i, b)
		}
		a.Bytes()[i] = 1
	}
}
