package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/racetest"
	"golang.org/x/sys/unix"
)

const childEnv = "LSD_TEST_CHILD"

// TestMain is also the dummy daemon: it notes when it lives and how it ends.
func TestMain(m *testing.M) {
	dir := os.Getenv(childEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	// Before it says that it lives: whoever reads so may end it at once.
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	f, err := os.OpenFile(filepath.Join(dir, "starts"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		os.Exit(1)
	}
	fmt.Fprintln(f, os.Getpid(), time.Now().UnixNano())
	if b, err := os.ReadFile(filepath.Join(dir, "status")); err == nil {
		status, _ := strconv.Atoi(string(b))
		os.Exit(status)
	}
	<-term
	fmt.Fprintln(f, "term", 0)
	os.Exit(0)
}

type starts struct {
	t   *testing.T
	dir string
}

func (s starts) lines() [][]string {
	b, _ := os.ReadFile(filepath.Join(s.dir, "starts"))
	var list [][]string
	for line := range strings.Lines(string(b)) {
		list = append(list, strings.Fields(line))
	}
	return list
}

// await waits for line n and returns it.
func (s starts) await(n int) []string {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if l := s.lines(); len(l) > n {
			return l[n]
		}
	}
	s.t.Fatalf("the child was started %d times", len(s.lines()))
	return nil
}

func supervise(t *testing.T) (starts, chan int, context.CancelFunc) {
	dir := t.TempDir()
	t.Setenv(childEnv, dir)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan int, 1)
	go func() {
		status, err := Supervise(ctx, slog.New(slog.DiscardHandler), exe, nil)
		if err != nil {
			t.Error(err)
		}
		ended <- status
	}()
	return starts{t, dir}, ended, stop
}

// TestSuperviseRestarts: the child is back within 200 ms of its death, and told
// of the end.
func TestSuperviseRestarts(t *testing.T) {
	s, ended, stop := supervise(t)
	defer stop()
	for i := range 3 {
		pid, err := strconv.Atoi(s.await(i)[0])
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(atOnce + 50*time.Millisecond)
		killed := time.Now()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ns, err := strconv.ParseInt(s.await(i + 1)[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Unix(0, ns).Sub(killed); took > 200*time.Millisecond && !racetest.Enabled {
			t.Errorf("started again after %v", took)
		}
	}
	stop()
	if status := <-ended; status != 0 {
		t.Errorf("status %d", status)
	}
	if l := s.lines(); l[len(l)-1][0] != "term" {
		t.Error("the child was not told to end")
	}
}

// TestSuperviseBacksOff: a child that dies at once is not started in a tight
// loop, and one that will never do is not started again.
func TestSuperviseBacksOff(t *testing.T) {
	s, ended, stop := supervise(t)
	defer stop()
	status := filepath.Join(s.dir, "status")
	pid, err := strconv.Atoi(s.await(0)[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(status, []byte("3"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if n := len(s.lines()); n < 3 || n > 6 {
		t.Errorf("%d starts in a second", n)
	}
	if err := os.WriteFile(status, []byte(strconv.Itoa(ExitRefused)), 0o600); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-ended:
		if got != ExitRefused {
			t.Errorf("status %d", got)
		}
	case <-time.After(10 * time.Second):
		t.Error("a child that cannot start is started for ever")
	}
}
