package uring

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// polls counts the calls of a poll's Completer.
type polls struct {
	n    int
	res  int32
	over bool
}

func (p *polls) Complete(res int32, flags uint32) { p.n++; p.res, p.over = res, !More(flags) }

// await waits until cond holds.
func (p *polls) await(t *testing.T, r *Ring, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s in vain: %+v", what, *p)
		}
		if err := r.SubmitAndWait(100 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		r.Reap()
	}
}

func eventfd(t *testing.T, flags int) int {
	t.Helper()
	fd, err := unix.Eventfd(0, flags|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func add(t *testing.T, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
}

// TestPollIn: each write to an eventfd is seen, though nobody reads it and whatever its
// O_NONBLOCK; none is made up; and CancelFile ends it.
func TestPollIn(t *testing.T) {
	for name, flags := range map[string]int{"blocking": 0, "nonblocking": unix.EFD_NONBLOCK} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, Options{Entries: 8})
			fd, other := eventfd(t, flags), eventfd(t, flags)
			var p, q polls
			r.PollIn(fd, &p)
			r.PollIn(other, &q)
			for i := 1; i <= 20; i++ {
				add(t, fd)
				p.await(t, r, "a write", func() bool { return p.n == i })
				if p.over || p.res&unix.POLLIN == 0 {
					t.Fatalf("%+v", p)
				}
			}
			if err := r.SubmitAndWait(20 * time.Millisecond); err != nil {
				t.Fatal(err)
			}
			if r.Reap(); p.n != 20 || q.n != 0 {
				t.Errorf("%d and %d calls, want 20 and none", p.n, q.n)
			}
			r.CancelFile(fd)
			p.await(t, r, "the end", func() bool { return p.over })
			if p.res != -int32(unix.ECANCELED) || r.Inflight() != 1 {
				t.Errorf("%+v, %d in flight", p, r.Inflight())
			}
			r.CancelFile(fd) // nothing is there
			add(t, fd)
			add(t, other)
			q.await(t, r, "the other one", func() bool { return q.n == 1 })
			if p.n != 21 {
				t.Errorf("called after its end")
			}
		})
	}
}

// TestPollInBefore: what was there before the poll began counts.
func TestPollInBefore(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	fd := eventfd(t, 0)
	add(t, fd)
	var p polls
	r.PollIn(fd, &p)
	p.await(t, r, "what was there", func() bool { return p.n == 1 })
}

// TestCancelWrite cancels a write that the kernel cannot carry out.
func TestCancelWrite(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	fd := eventfd(t, 0)
	if _, err := unix.Write(fd, []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	one := newArena(t, 8)[:8]
	one[0] = 1
	var p polls
	r.Write(fd, one, -1, &p)
	if err := r.SubmitAndWait(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if r.Reap(); p.n != 0 {
		t.Fatalf("%+v", p)
	}
	r.CancelFile(fd)
	p.await(t, r, "the end", func() bool { return p.n == 1 })
	if p.res >= 0 {
		t.Errorf("%+v", p)
	}
}
