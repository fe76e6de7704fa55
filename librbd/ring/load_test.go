package ring

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/reactor"
	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
	"golang.org/x/sys/unix"
)

// Each tag of a load has a region of the image of its own, and one of the data area.
const region = 16 << 10 // bytes

// A load is a client that reads and writes at random, and knows what it must read.
type load struct {
	client *ringtest.Client
	rnd    *rand.Rand
	shadow []byte
	tags   []ringtest.Request // what is under way
	free   []uint32
	pause  time.Duration // the longest between two requests

	late, done int
}

func newLoad(c *ringtest.Client, seed uint64) *load {
	l := &load{
		client: c,
		rnd:    rand.New(rand.NewPCG(seed, seed)),
		shadow: make([]byte, int(c.Entries)*region),
		tags:   make([]ringtest.Request, c.Entries),
	}
	for i := range c.Entries {
		l.free = append(l.free, i)
	}
	return l
}

// request returns a random request of the tag.
func (l *load) request(tag uint32) ringtest.Request {
	at, n := l.rnd.IntN(region-1024), 1+l.rnd.IntN(1000)
	r := ringtest.Request{Op: uint8(1 + l.rnd.IntN(5)), Tag: tag}
	switch r.Op {
	case ringtest.Flush:
		return r
	case ringtest.Discard, ringtest.WriteZeroes:
		at, n = at/512*512, (n+511)/512*512
	default:
		r.Data = uint64(tag)*region + uint64(at%512)
	}
	r.Offset, r.Length = uint64(int(tag)*region+at), uint64(n)
	p, mine := l.data(r), l.shadow[r.Offset:][:n]
	switch r.Op {
	case ringtest.Write:
		for i := range p {
			p[i] = byte(l.rnd.Uint32())
		}
		copy(mine, p)
	case ringtest.Read:
		for i := range p {
			p[i] = 0xee
		}
	default:
		clear(mine)
	}
	return r
}

// data returns where the request's data is.
func (l *load) data(r ringtest.Request) []byte {
	if r.Op > ringtest.Write {
		return nil
	}
	return l.client.Data[r.Data:][:r.Length]
}

// run ends when n requests have ended.
func (l *load) run(n int) error {
	for sent := 0; l.done < n; {
		for sent < n && len(l.free) > 0 && l.rnd.IntN(4) != 0 {
			i := l.rnd.IntN(len(l.free))
			tag := l.free[i]
			l.free = slices.Delete(l.free, i, i+1)
			l.tags[tag] = l.request(tag)
			l.client.Submit(l.tags[tag])
			sent++
		}
		if len(l.free) < len(l.tags) {
			done, err := l.client.Wait(patience)
			if err != nil {
				return fmt.Errorf("%d of %d requests have ended, %d are under way: %w", l.done, n, len(l.tags)-len(l.free), err)
			}
			if err := l.end(done); err != nil {
				return err
			}
		}
		if l.pause > 0 && l.rnd.IntN(8) == 0 {
			time.Sleep(time.Duration(l.rnd.Int64N(int64(l.pause))))
		}
	}
	return nil
}

// end takes a completion.
func (l *load) end(done ringtest.Completion) error {
	r := l.tags[done.Tag]
	if slices.Contains(l.free, done.Tag) || done.Res != 0 {
		return fmt.Errorf("completion %+v of %+v", done, r)
	}
	if done.Flags != 0 && l.rnd.IntN(2) == 0 {
		l.late++
		l.client.Submit(ringtest.Request{Op: ringtest.TooLate, Tag: done.Tag})
		return nil
	}
	if r.Op == ringtest.Read && !bytes.Equal(l.data(r), l.shadow[r.Offset:][:r.Length]) {
		return fmt.Errorf("%+v has read something else than was written", r)
	}
	l.free = append(l.free, done.Tag)
	l.done++
	return nil
}

// A lazy handler is an image in memory that completes requests in turns to come, in any
// order, some of them with a time.
type lazy struct {
	r     *reactor.Reactor
	mem   []byte
	rnd   *rand.Rand
	queue []*IO
	timer *reactor.Timer
}

func newLazy(r *reactor.Reactor, mem []byte) *lazy {
	l := &lazy{r: r, mem: mem, rnd: rand.New(rand.NewPCG(1, 2))}
	r.OnTurn(l.some)
	l.timer = r.AfterFunc(time.Hour, func() {})
	return l
}

func (l *lazy) Handle(io *IO) {
	switch at := l.mem[io.Offset:][:io.Length]; io.Op {
	case OpRead:
		copy(io.Buf, l.mem[io.Sector*sectorSize:])
	case OpWrite:
		copy(at, io.Data())
	default:
		clear(at)
	}
	l.queue = append(l.queue, io)
}

func (l *lazy) TakeBack(io *IO) { l.queue = append(l.queue, io) }

// some completes some of what waits.
func (l *lazy) some() {
	for len(l.queue) > 0 && l.rnd.IntN(3) != 0 {
		i := l.rnd.IntN(len(l.queue))
		io := l.queue[i]
		l.queue = slices.Delete(l.queue, i, i+1)
		if l.rnd.IntN(4) == 0 {
			io.CompleteUntil(0, l.r.Now())
		} else {
			io.Complete(0)
		}
	}
	if len(l.queue) > 0 { // another turn
		l.timer.Reset(time.Duration(l.rnd.IntN(50)) * time.Microsecond)
	}
}

// start runs the load on a thread of its own.
func (l *load) start(n int) <-chan error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- l.run(n)
	}()
	return done
}

func finish(t testing.TB, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(2 * patience):
		t.Fatal("the load does not end")
	}
}

// TestLoad has a client and a reactor that both sleep now and then. A lost wake-up would
// leave one of them asleep.
func TestLoad(t *testing.T) {
	var late, wakes, slept int
	for _, entries := range []uint32{8, 64} {
		for _, pause := range []time.Duration{0, 100 * time.Microsecond} {
			t.Run(fmt.Sprint(entries, pause), func(t *testing.T) {
				k := newRig(t, entries, &keeper{})
				k.move(t, make([]byte, int(entries)*region))
				l := newLoad(k.client, 1)
				l.pause = pause
				finish(t, l.start(20000))
				if len(k.broken) != 0 {
					t.Error(<-k.broken)
				}
				late, wakes, slept = late+l.late, wakes+l.client.Wakes, slept+l.client.Slept
			})
		}
	}
	if late == 0 || wakes == 0 || slept == 0 {
		t.Errorf("%d were late, %d wake-ups of the daemon, the client slept %d times", late, wakes, slept)
	}
}

// move has another reactor serve the ring, with an image in memory.
func (k *rig) move(t testing.TB, mem []byte) {
	t.Helper()
	left := make(chan struct{})
	call(t, k.r, func() { k.g.Unhook(k.c, func() { close(left) }) })
	await(t, left, "the end of what is under way")
	stop(t, k.r)
	k.r = newReactor(t)
	call(t, k.r, func() {
		k.g = NewGroup(k.r)
		k.g.Hook(Hooking{k.c, newLazy(k.r, mem)})
	})
}

// TestMoves moves a ring between reactors under load.
func TestMoves(t *testing.T) {
	k := newRig(t, 32, &keeper{})
	mem := make([]byte, 32*region)
	k.move(t, mem)
	done := newLoad(k.client, 2).start(20000)
	moves := 0
	for ; len(done) == 0; moves++ {
		time.Sleep(2 * time.Millisecond)
		k.move(t, mem)
	}
	finish(t, done)
	if len(k.broken) != 0 {
		t.Error(<-k.broken)
	}
	if moves < 3 {
		t.Errorf("it was moved %d times", moves)
	}
}

// TestDeaths has reactors die under load, and what they had given to their handlers
// completed once more when another one has it.
func TestDeaths(t *testing.T) {
	k := newRig(t, 32, &keeper{})
	mem := make([]byte, 32*region)
	k.move(t, mem)
	done := newLoad(k.client, 3).start(20000)
	deaths, repeated := 0, 0
	for ; len(done) == 0; deaths++ {
		time.Sleep(2 * time.Millisecond)
		k.r.Post(func() { panic("boom") })
		await(t, k.r.Done(), "the reactor's end")
		dead := k.c.session.h.(*lazy)
		repeated += k.c.Busy()
		k.r = newReactor(t)
		call(t, k.r, func() {
			k.g = NewGroup(k.r)
			k.g.Hook(Hooking{k.c, newLazy(k.r, mem)})
			for _, io := range dead.queue {
				io.Complete(syscall.ENODEV)
			}
		})
	}
	finish(t, done)
	if len(k.broken) != 0 {
		t.Error(<-k.broken)
	}
	if deaths < 3 || repeated == 0 {
		t.Errorf("%d deaths, with %d requests under way", deaths, repeated)
	}
}

// TestOrderAfterDeath: what was under way comes again in the order in which it was
// submitted, before what is new, and what was taken back is taken back.
func TestOrderAfterDeath(t *testing.T) {
	h := &keeper{}
	k := newRig(t, 8, h)
	flush := func(tag uint32) ringtest.Request { return ringtest.Request{Op: ringtest.Flush, Tag: tag} }
	k.client.Submit(flush(5), flush(0), flush(7), flush(1))
	k.turn(func() {})
	call(t, k.r, func() {
		h.handled[1].Complete(0)
		h.handled[2].CompleteUntil(0, 1)
	})
	k.wait()
	k.wait()
	k.client.Submit(flush(0), ringtest.Request{Op: ringtest.TooLate, Tag: 7})
	k.turn(func() {})
	k.r.Post(func() { panic("boom") })
	await(t, k.r.Done(), "the reactor's end")
	k.client.Submit(flush(2))

	var order []string
	old := h
	k.serve(handler{
		handle:   func(io *IO) { order = append(order, fmt.Sprint("handle ", io.Tag)); io.Complete(0) },
		takeBack: func(io *IO) { order = append(order, fmt.Sprint("take back ", io.Tag)); io.Complete(0) },
	})
	k.turn(func() {
		for _, io := range old.handled {
			io.Complete(syscall.EIO)
		}
	})
	want := "handle 5, take back 7, handle 1, handle 0, handle 2"
	if got := strings.Join(order, ", "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for range order {
		if done := k.wait(); done.Res != 0 {
			t.Errorf("%+v", done)
		}
	}
	k.none()
}

// TestEntriesTakenByTheDead: a reactor that dies in a handler has taken entries without
// saying so; the client sees that they are when the next one has it.
func TestEntriesTakenByTheDead(t *testing.T) {
	k := newRig(t, 8, handler{handle: func(*IO) { panic("boom") }})
	k.client.Submit(ringtest.Request{Op: ringtest.Flush})
	await(t, k.r.Done(), "the reactor's end")
	h := &keeper{}
	k.serve(h)
	if n := atomic.LoadUint32(k.client.Word(ringtest.SQHead)); n != 1 {
		t.Errorf("the head is at %d", n)
	}
	call(t, k.r, func() { h.handled[0].Complete(0) })
	k.wait()
}

// TestUnhook: nothing is taken any more, and done is told when the last request ends.
func TestUnhook(t *testing.T) {
	h := &keeper{}
	k := newRig(t, 8, h)
	k.client.Submit(ringtest.Request{Op: ringtest.Flush, Tag: 1})
	var before int
	k.turn(func() { before = k.r.Ring().Inflight() })
	left, twice := make(chan struct{}), 0
	call(t, k.r, func() {
		k.g.Unhook(k.c, func() { twice++; close(left) })
		k.g.Unhook(k.c, nil)
	})
	k.client.Submit(ringtest.Request{Op: ringtest.Flush, Tag: 2})
	k.client.Wake()
	k.turn(func() {})
	select {
	case <-left:
		t.Fatal("it ends with a request under way")
	default:
	}
	call(t, k.r, func() { h.handled[0].Complete(0) })
	k.wait()
	await(t, left, "the end")
	k.turn(func() {})
	call(t, k.r, func() {
		if n := k.r.Ring().Inflight(); n != before-1 {
			t.Errorf("%d operations in flight, were %d with the ring's", n, before)
		}
		if len(k.g.sessions) != 0 || k.c.session != nil || twice != 1 || len(h.handled) != 1 {
			t.Errorf("%d sessions, told %d times, %d requests", len(k.g.sessions), twice, len(h.handled))
		}
		k.g.Unhook(k.c, func() { twice++ })
		if twice != 2 {
			t.Error("who is not served is not let go of")
		}
		// And again, on the same reactor.
		k.g.Hook(Hooking{k.c, h})
	})
	k.turn(func() {})
	call(t, k.r, func() { h.handled[1].Complete(0) })
	if done := k.wait(); done.Tag != 2 {
		t.Errorf("%+v", done)
	}
}

// TestUnhookTwice: whoever waits for the end is told, and what was under way ends in the ring, whose
// memory may be closed then.
func TestUnhookTwice(t *testing.T) {
	h := &keeper{}
	k := newRig(t, 8, h)
	k.client.Submit(ringtest.Request{Op: ringtest.Flush, Tag: 1}, ringtest.Request{Op: ringtest.Flush, Tag: 2})
	k.turn(func() {})
	left, gone := make(chan struct{}), make(chan struct{})
	k.turn(func() { k.g.Unhook(k.c, func() { close(left) }) })
	k.turn(func() { k.g.Unhook(k.c, func() { close(gone) }) })
	k.turn(func() { h.handled[0].Complete(0) })
	if len(gone)+len(left) != 0 || k.c.Busy() != 1 {
		t.Errorf("%d requests are under way", k.c.Busy())
	}
	call(t, k.r, func() { h.handled[1].CompleteUntil(0, 1) })
	await(t, left, "the end")
	await(t, gone, "the end")
	for tag := range uint32(2) {
		if done, ok := k.client.Take(); !ok || done.Tag != 1+tag {
			t.Errorf("%+v, %v", done, ok)
		}
	}
	if err := k.c.Close(); err != nil {
		t.Error(err)
	}
	k.c.Memory().SetSize(1)
	h.handled[0].Complete(0) // nobody's any more
}

// TestManyRings has one reactor serve several, which come and go, and nothing of them is
// left.
func TestManyRings(t *testing.T) {
	r := newReactor(t)
	var g *Group
	var before int
	call(t, r, func() { g = NewGroup(r) })
	call(t, r, func() { before = r.Ring().Inflight() })
	files := openFiles(t)
	for round := range 20 {
		var loads []<-chan error
		var conns []*Conn
		var clients []*ringtest.Client
		for i := range 4 {
			m, err := NewMemory(Version, 8, MinData)
			if err != nil {
				t.Fatal(err)
			}
			client, err := ringtest.New(m.Files())
			if err != nil {
				t.Fatal(err)
			}
			c := NewConn(m, nil)
			call(t, r, func() { g.Hook(Hooking{c, &disk{mem: make([]byte, 8*region)}}) })
			loads = append(loads, newLoad(client, uint64(10*round+i)).start(200))
			conns, clients = append(conns, c), append(clients, client)
		}
		for i, done := range loads {
			finish(t, done)
			gone := make(chan struct{})
			call(t, r, func() { g.Unhook(conns[i], func() { close(gone) }) })
			await(t, gone, "the end of the session")
			if err := errors.Join(conns[i].Close(), clients[i].Close()); err != nil {
				t.Error(err)
			}
		}
	}
	call(t, r, func() {})
	call(t, r, func() {
		if n := r.Ring().Inflight(); n != before {
			t.Errorf("%d operations in flight, were %d", n, before)
		}
	})
	if n := openFiles(t); n != files {
		t.Errorf("%d open files, were %d", n, files)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestNothingAllocated: a request costs no memory.
func TestNothingAllocated(t *testing.T) {
	if racetest.Enabled {
		t.Skip("the race detector allocates")
	}
	k := newRig(t, 32, handler{
		handle:   func(io *IO) { io.CompleteUntil(0, 1) },
		takeBack: func(io *IO) { io.Complete(0) },
	})
	got := testing.AllocsPerRun(200, func() {
		for tag := range uint32(16) {
			k.client.Submit(ringtest.Request{Op: ringtest.Write, Tag: tag, Length: 512, Data: 4096})
		}
		for range 16 {
			k.client.Submit(ringtest.Request{Op: ringtest.TooLate, Tag: k.wait().Tag})
		}
		for range 16 {
			k.wait()
		}
	})
	if got != 0 {
		t.Errorf("%v allocations for 16 requests", got)
	}
}

// TestFullEventfd: a client whose eventfd takes no more, in a way that would have a
// write to it block, holds up neither the reactor nor the end of its session.
func TestFullEventfd(t *testing.T) {
	k := newRig(t, 8, handler{handle: func(io *IO) { io.Complete(0) }})
	fd := k.client.Files()[2]
	k.turn(func() {}) // what the session begins with has been written
	var count [8]byte
	for _, err := unix.Read(fd, count[:]); err != unix.EAGAIN; _, err = unix.Read(fd, count[:]) {
	}
	if _, err := unix.Write(fd, []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	for tag := range uint32(8) {
		atomic.StoreUint32(k.client.Word(ringtest.ClientSleep), 1)
		k.client.Submit(ringtest.Request{Op: ringtest.Flush, Tag: tag})
		k.turn(func() {})
		if _, ok := k.client.Take(); !ok {
			t.Fatal("no completion")
		}
	}
	var inflight int
	call(t, k.r, func() { inflight = k.r.Ring().Inflight() })
	if inflight > 3 { // the reactor's own, the poll, and one write
		t.Errorf("%d operations in flight", inflight)
	}
	gone := make(chan struct{})
	call(t, k.r, func() { k.g.Unhook(k.c, func() { close(gone) }) })
	await(t, gone, "the end of the session")
}

// TestMeddledEventfd: a client that takes the daemon's wake-ups, or changes how its
// eventfd is read, costs the reactor no turns.
func TestMeddledEventfd(t *testing.T) {
	k := newRig(t, 8, handler{handle: func(io *IO) { io.Complete(0) }})
	turns := 0
	call(t, k.r, func() { k.r.OnTurn(func() { turns++ }) })
	fd := k.client.Files()[1]
	var count [8]byte
	for i, nonblock := range []bool{true, false, true} {
		if err := unix.SetNonblock(fd, nonblock); err != nil {
			t.Fatal(err)
		}
		k.client.Wake()
		if i > 0 {
			if _, err := unix.Read(fd, count[:]); err != nil {
				t.Fatal(err)
			}
		}
		k.client.Submit(ringtest.Request{Op: ringtest.Flush})
		k.wait()
	}
	var before, after int
	call(t, k.r, func() { before = turns })
	time.Sleep(100 * time.Millisecond)
	call(t, k.r, func() { after = turns })
	if after-before > 4 {
		t.Errorf("%d turns of a reactor that has nothing to do", after-before)
	}
}

// BenchmarkRing measures what the ring itself costs: the handler does nothing.
func BenchmarkRing(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprint("depth=", depth), func(b *testing.B) {
			k := newRig(b, 64, handler{handle: func(io *IO) { io.Complete(0) }})
			b.ReportAllocs()
			b.ResetTimer()
			done := make(chan error, 1)
			go func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				done <- pump(k.client, depth, b.N)
			}()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
			b.ReportMetric(float64(k.client.Wakes)/float64(b.N), "wakes/op")
			b.ReportMetric(float64(k.client.Slept)/float64(b.N), "sleeps/op")
		})
	}
}

// pump keeps depth requests under way until n have ended.
func pump(c *ringtest.Client, depth, n int) error {
	write := func(tag uint32) ringtest.Request {
		return ringtest.Request{Op: ringtest.Write, Tag: tag, Length: 4096, Data: uint64(tag) * 4096}
	}
	sent := 0
	for ; sent < min(depth, n); sent++ {
		c.Submit(write(uint32(sent)))
	}
	for range n {
		done, err := c.Wait(patience)
		if err != nil {
			return err
		}
		if sent < n {
			c.Submit(write(done.Tag))
			sent++
		}
	}
	return nil
}

// TestPollEnds: a poll that the kernel has ended, for want of room for its completions,
// begins anew; one that it cannot do ends the client's.
func TestPollEnds(t *testing.T) {
	k := newRig(t, 8, &keeper{})
	k.turn(func() {})
	call(t, k.r, func() {
		before := k.r.Ring().Inflight()
		(*poller)(k.c.session).Complete(unix.POLLIN, 0)
		if n := k.r.Ring().Inflight(); n != before+1 {
			t.Errorf("%d operations in flight, were %d", n, before)
		}
		(*poller)(k.c.session).Complete(-int32(unix.ENOMEM), 0)
	})
	if err := k.c.Err(); !strings.Contains(fmt.Sprint(err), "wake-ups") {
		t.Error(err)
	}
}

// TestComesLate: what a client submits after the turn has looked, while the reactor's
// word still says that it is awake, is taken without a wake-up.
func TestComesLate(t *testing.T) {
	k := newRig(t, 8, handler{handle: func(io *IO) { io.Complete(0) }})
	submitted := false
	call(t, k.r, func() {
		k.r.OnTurn(func() {
			if !submitted {
				submitted = true
				k.client.Submit(ringtest.Request{Op: ringtest.Flush})
			}
		})
	})
	k.wait()
	if k.client.Wakes != 0 {
		t.Error("the daemon was woken")
	}
}

// count returns what the client's eventfd has counted, and takes it.
func (k *rig) count() uint64 {
	k.t.Helper()
	k.turn(func() {})
	var count [8]byte
	if _, err := unix.Read(k.client.Files()[2], count[:]); err != nil && err != unix.EAGAIN {
		k.t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(count[:])
}

// TestWakeUps: each is carried out, also when one is still in flight; a client that does
// not sleep gets none; and one that a dead reactor did not come to comes later.
func TestWakeUps(t *testing.T) {
	h := &keeper{}
	k := newRig(t, 8, h)
	k.count()
	k.turn(func() { k.c.session.wake(); k.c.session.wake() })
	if n := k.count(); n != 2 {
		t.Errorf("%d wake-ups, want 2", n)
	}
	flush := func(tag uint32) {
		k.client.Submit(ringtest.Request{Op: ringtest.Flush, Tag: tag})
		k.turn(func() {})
		k.turn(func() { h.handled[len(h.handled)-1].Complete(0) })
	}
	flush(0)
	if n := k.count(); n != 0 {
		t.Errorf("%d wake-ups of a client that is awake", n)
	}
	sleep := k.client.Word(ringtest.ClientSleep)
	atomic.StoreUint32(sleep, 1)
	flush(1)
	flush(2)
	if n := k.count(); n != 1 || atomic.LoadUint32(sleep) != 0 {
		t.Errorf("%d wake-ups of a client that went to sleep once", n)
	}
	k.r.Post(func() { panic("boom") })
	await(t, k.r.Done(), "the reactor's end")
	k.serve(h)
	if n := k.count(); n == 0 {
		t.Error("nobody looks whether the client was to be woken")
	}
}
