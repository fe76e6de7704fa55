package uring

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/boottime"
	"golang.org/x/sys/unix"
)

// before sends n commands under the deadline, to a file that has none, and returns
// how many the kernel carried out. Each has to end exactly once.
func before(t *testing.T, r *Ring, n int) int {
	t.Helper()
	fd := tempFile(t)
	cs := make([]result, n)
	for i := range cs {
		r.CommandBefore(fd, 1, nil, nil, &cs[i])
	}
	for end := time.Now().Add(5 * time.Second); ; {
		if err := r.SubmitAndWait(10 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		r.Reap()
		ended, done := 0, 0
		for _, c := range cs {
			switch {
			case c.n > 1:
				t.Fatalf("a command ended %d times", c.n)
			case c.n == 1 && c.res == -int32(unix.EOPNOTSUPP): // as far as it can come
				done++
			case c.n == 1 && !TooLate(c.res):
				t.Fatalf("a command ended with %v", unix.Errno(-c.res))
			}
			ended += c.n
		}
		switch {
		case ended == n:
			return done
		case time.Now().After(end):
			t.Fatalf("%d of %d commands have ended", ended, n)
		}
	}
}

// inflight returns the operations in flight but for the deadline.
func inflight(r *Ring) int {
	if r.deadline.on {
		return r.Inflight() - 1
	}
	return r.Inflight()
}

func TestDeadline(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	want := func(when string, want int) {
		t.Helper()
		if n := before(t, r, 9); n != want { // more than the queue has room for
			t.Errorf("%s %d of 9 commands were carried out, want %d", when, n, want)
		}
		if n := inflight(r); n != 0 {
			t.Errorf("%s %d operations are in flight", when, n)
		}
	}
	want("without a deadline", 0)
	r.SetDeadline(boottime.Now() + time.Hour)
	want("an hour before the deadline", 9)
	r.SetDeadline(boottime.Now() - time.Hour)
	want("with a deadline moved back", 9)
}

func TestDeadlinePasses(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	for range 3 {
		r.SetDeadline(boottime.Now() + 300*time.Millisecond)
		if n := before(t, r, 5); n != 5 {
			t.Fatalf("%d of 5 commands were carried out before the deadline", n)
		}
		time.Sleep(400 * time.Millisecond)
		if n := before(t, r, 5); n != 0 {
			t.Fatalf("%d of 5 commands were carried out after the deadline", n)
		}
	}
	// Moved at the moment when it fires, or after that and before it is reaped.
	at := boottime.Now() + 300*time.Millisecond
	r.SetDeadline(at)
	before(t, r, 1)
	time.Sleep(400 * time.Millisecond)
	r.SetDeadline(at + time.Hour)
	before(t, r, 1)
	if n := before(t, r, 5); n != 5 {
		t.Errorf("%d of 5 commands were carried out after the deadline had been moved late", n)
	}
}

// TestDeadlineStopped: a process stopped between its look at the clock and the
// system call does not get its commands through.
func TestDeadlineStopped(t *testing.T) {
	const helper = "LSD_TEST_DEADLINE_STOPPED"
	if os.Getenv(helper) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDeadlineStopped$", "-test.v")
		cmd.Env = append(os.Environ(), helper+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	runtime.LockOSThread()
	r := newRing(t, Options{})
	fd := tempFile(t)
	var c result
	r.SetDeadline(boottime.Now() + time.Second)
	before(t, r, 1)
	r.CommandBefore(fd, 1, nil, nil, &c)
	// Nothing of this process runs until its deadline is over.
	pid := strconv.Itoa(os.Getpid())
	waker := exec.Command("sh", "-c", "sleep 2; kill -CONT "+pid)
	waker.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := waker.Start(); err != nil {
		t.Fatal(err)
	}
	if boottime.Now() > r.deadline.at {
		t.Fatal("this machine took a second to start a program: it shows nothing")
	}
	// To this thread, which does not come back from the call: one to the process may
	// be taken by another, while this one goes on for a moment.
	if err := unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for c.n == 0 {
		if err := r.SubmitAndWait(time.Second); err != nil {
			t.Fatal(err)
		}
		r.Reap()
	}
	if !TooLate(c.res) {
		t.Errorf("the command ended with %d after a stop of two seconds", c.res)
	}
	_ = waker.Wait()
}

func TestDeadlineAllocs(t *testing.T) {
	r := newRing(t, Options{})
	r.SetDeadline(boottime.Now() + time.Hour)
	fd := tempFile(t)
	var c result
	n := testing.AllocsPerRun(100, func() {
		r.SetDeadline(r.deadline.at + 1)
		r.CommandBefore(fd, 1, nil, nil, &c)
		if err := r.SubmitAndWait(time.Second); err != nil {
			t.Fatal(err)
		}
		r.Reap()
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkCommandBefore is what the deadline costs for each command.
func BenchmarkCommandBefore(b *testing.B) {
	for _, guarded := range []bool{false, true} {
		name := "plain"
		if guarded {
			name = "before"
		}
		b.Run(name, func(b *testing.B) {
			r := newRing(b, Options{})
			r.SetDeadline(boottime.Now() + time.Hour)
			fd := tempFile(b)
			var c result
			b.ReportAllocs()
			for b.Loop() {
				for range 32 {
					if guarded {
						r.CommandBefore(fd, 1, nil, nil, &c)
					} else {
						r.Command(fd, 1, nil, nil, &c)
					}
				}
				if err := r.SubmitAndWait(time.Second); err != nil {
					b.Fatal(err)
				}
				r.Reap()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/32, "ns/command")
		})
	}
}
