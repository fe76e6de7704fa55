package file_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/file"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("LSD_TEST_FILE_CHILD"); dir != "" {
		name := os.Getenv("LSD_TEST_FILE_CHILD_NAME")
		if name == "stopped" {
			stoppedChild(dir)
		}
		child(dir, name)
	}
	os.Exit(m.Run())
}

func create(t testing.TB, dir string) *file.Store {
	t.Helper()
	s, err := file.Create(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func(*testing.T) backend.Store {
		dir := filepath.Join(t.TempDir(), "a", "store")
		return func(t *testing.T) backend.Store { return create(t, dir) }
	})
}

func TestOpenErrors(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	plain := write("plain", "x")
	foreign := filepath.Dir(write("foreign/x", "x"))
	future := filepath.Dir(write("future/lsd-store", "lsd file store 2\n"))
	empty := filepath.Join(dir, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	absent := filepath.Join(dir, "no", "such")
	for _, tt := range []struct {
		dir          string
		open, create error
	}{
		{plain, backend.ErrPermanent, backend.ErrPermanent},
		{plain + "/x", backend.ErrPermanent, backend.ErrPermanent},
		{foreign, backend.ErrPermanent, backend.ErrPermanent},
		{future, backend.ErrPermanent, backend.ErrPermanent},
		{empty, backend.ErrNotFound, nil},
		{absent, backend.ErrNotFound, nil},
	} {
		_, err := file.Open(ctx, tt.dir)
		storetest.WantError(t, "Open "+tt.dir, err, tt.open)
		s, err := file.Create(ctx, tt.dir)
		if tt.create != nil {
			storetest.WantError(t, "Create "+tt.dir, err, tt.create)
			continue
		}
		if err != nil {
			t.Errorf("Create %s: %v", tt.dir, err)
			continue
		}
		s.Close()
		if s, err = file.Open(ctx, tt.dir); err != nil {
			t.Errorf("Open %s after Create: %v", tt.dir, err)
			continue
		}
		s.Close()
	}
	if names, _ := filepath.Glob(foreign + "/*"); len(names) != 1 {
		t.Errorf("a refused directory was changed: %q", names)
	}
}

// TestInsideAnother: no store is made among the files of another one, which would
// remove it from its tmp. One that is there already is opened.
func TestInsideAnother(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "outer")
	create := func(dir string) error {
		s, err := file.Create(ctx, dir)
		if err == nil {
			s.Close()
		}
		return err
	}
	if err := errors.Join(create(dir), create(dir+"-inner")); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"tmp", "a", "a/b", "objects/a"} {
		if err := create(filepath.Join(dir, sub)); !errors.Is(err, backend.ErrPermanent) || !strings.Contains(err.Error(), "inside the store "+dir) {
			t.Errorf("in %s: %v", sub, err)
		}
	}
	if names, err := filepath.Glob(dir + "/*"); err != nil || len(names) != 4 {
		t.Errorf("there are %q (%v)", names, err)
	}
	inner := filepath.Join(dir, "inner")
	if err := errors.Join(os.Rename(dir+"-inner", inner), create(inner)); err != nil {
		t.Errorf("one of an earlier version: %v", err)
	}
}

func TestCreateRace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x", "y")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s, err := file.Create(context.Background(), dir)
			if err != nil {
				t.Errorf("Create: %v", err)
				return
			}
			defer s.Close()
			if err := s.Put(context.Background(), fmt.Sprint(i), nil); err != nil {
				t.Errorf("Put: %v", err)
			}
		})
	}
	wg.Wait()
	wantEmptyTmp(t, dir)
}

// wantEmptyTmp fails the test unless tmp is empty; no handle is open.
func wantEmptyTmp(t *testing.T, dir string) {
	t.Helper()
	if names, err := filepath.Glob(dir + "/tmp/*"); err != nil || len(names) != 0 {
		t.Errorf("left in tmp: %q, %v", names, err)
	}
}

// TestLostContents removes a store's contents under its feet: that must not
// look like a store whose objects were deleted.
func TestLostContents(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := create(t, dir)
	defer s.Close()
	if err := s.Put(ctx, "a/b", nil); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := os.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
	}
	_, getErr := s.Get(ctx, "a/b", nil, 0)
	_, statErr := s.Stat(ctx, "a/b")
	_, _, loadErr := s.Load(ctx, "m")
	_, swapErr := s.Swap(ctx, "m", backend.NoVersion, nil)
	for what, err := range map[string]error{
		"Put": s.Put(ctx, "a/c", nil), "Get": getErr, "Stat": statErr, "Delete": s.Delete(ctx, "a/b"),
		"List": s.List(ctx, "", func(string) error { return nil }), "Load": loadErr, "Swap": swapErr,
	} {
		storetest.WantError(t, what, err, backend.ErrPermanent)
	}
}

func TestStrangeFiles(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := create(t, dir)
	defer s.Close()
	objects := filepath.Join(dir, "objects")
	for _, err := range []error{
		os.Symlink("/etc/passwd", objects+"/link+obj"),
		os.Symlink("/etc", objects+"/etc"),
		unix.Mkfifo(objects+"/fifo+obj", 0o644),
		os.Mkdir(objects+"/dir+obj", 0o755),
		os.WriteFile(objects+"/bad+mut", []byte("short"), 0o644),
		os.WriteFile(objects+"/stray", nil, 0o644),
		os.WriteFile(objects+"/UPPER+obj", nil, 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"link", "etc/passwd", "fifo", "dir"} {
		_, err := s.Get(ctx, key, make([]byte, 10), 0)
		storetest.WantError(t, "Get "+key, err, backend.ErrPermanent)
	}
	_, _, err := s.Load(ctx, "bad")
	storetest.WantError(t, "Load of a corrupt object", err, backend.ErrPermanent)
	_, err = s.Swap(ctx, "bad", backend.NoVersion, nil)
	storetest.WantError(t, "Swap of a corrupt object", err, backend.ErrPermanent)
	_, err = s.Stat(ctx, "bad")
	storetest.WantError(t, "Stat of a corrupt object", err, backend.ErrPermanent)
	err = s.List(ctx, "", func(key string) error {
		if strings.ContainsAny(key, "+U") || key == "stray" {
			t.Errorf("List shows %q", key)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestReadOnly: a store that cannot be changed can be read; and a handle that only
// reads changes nothing where it could.
func TestReadOnly(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := create(t, dir)
	if err := s.Put(ctx, "a/b", []byte("data")); err != nil {
		t.Fatal(err)
	}
	v, err := s.Swap(ctx, "a/m", backend.NoVersion, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := os.Remove(filepath.Join(dir, "locks", "tmp")); err != nil {
		t.Fatal(err)
	}
	read := func(dir string) *file.Store {
		t.Helper()
		s, err := file.Open(ctx, dir)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 10)
		if n, err := s.Get(ctx, "a/b", p, 0); err != nil || string(p[:n]) != "data" {
			t.Errorf("Get: %q, %v", p[:n], err)
		}
		if data, got, err := s.Load(ctx, "a/m"); err != nil || got != v || string(data) != "one" {
			t.Errorf("Load: %q, %q, %v", data, got, err)
		}
		if is, err := s.Stat(ctx, "a/m"); err != nil || is.Size != 3 {
			t.Errorf("Stat: %+v, %v", is, err)
		}
		n := 0
		if err := s.List(ctx, "", func(string) error { n++; return nil }); err != nil || n != 2 {
			t.Errorf("List: %d, %v", n, err)
		}
		_, err = s.Get(ctx, "a/c", p, 0)
		storetest.WantError(t, "Get", err, backend.ErrNotFound)
		return s
	}
	read(dir).Close()
	wantEmptyTmp(t, dir)
	if _, err := os.Stat(filepath.Join(dir, "locks", "tmp")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("reading has made locks/tmp: %v", err)
	}
	s = read(storetest.ReadOnly(t, dir))
	defer s.Close()
	_, swapErr := s.Swap(ctx, "a/m", v, []byte("two"))
	for what, err := range map[string]error{"Put": s.Put(ctx, "a/c", nil), "Swap": swapErr, "Delete": s.Delete(ctx, "a/b")} {
		storetest.WantError(t, what, err, backend.ErrPermanent)
	}
}

// TestPutWaits: a first write that waits for the lock of tmp ends with its context.
func TestPutWaits(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	defer s.Close()
	f, err := os.Create(filepath.Join(dir, "locks", "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for what, write := range map[string]func(context.Context) error{
		"Swap": func(ctx context.Context) error { _, err := s.Swap(ctx, "m", backend.NoVersion, nil); return err },
		"Put":  func(ctx context.Context) error { return s.Put(ctx, "a", nil) },
	} {
		err := untilDeadline(write)
		storetest.WantError(t, what, err, backend.ErrTemporary)
		if err == nil || !strings.Contains(err.Error(), "for locks/tmp, which this process holds") {
			t.Errorf("%s: %v", what, err)
		}
	}
	f.Close()
	if err := s.Put(context.Background(), "a", nil); err != nil {
		t.Errorf("Put when the lock is free: %v", err)
	}
}

// TestFull fills a small file system, and empties it again.
func TestFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("lsd", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatalf("mount a small file system: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	ctx := context.Background()
	s := create(t, dir)
	defer s.Close()
	v, err := s.Swap(ctx, "m", backend.NoVersion, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(ctx, "a", make([]byte, 500<<10)); err != nil {
		t.Fatal(err)
	}
	err = s.Put(ctx, "b", make([]byte, 800<<10))
	storetest.WantError(t, "Put into a full store", err, backend.ErrTemporary)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Put into a full store: %v", err)
	}
	_, err = s.Swap(ctx, "m", v, make([]byte, 800<<10))
	storetest.WantError(t, "Swap in a full store", err, backend.ErrTemporary)
	if data, v2, err := s.Load(ctx, "m"); err != nil || v2 != v || string(data) != "one" {
		t.Errorf("Load = %q, %q, %v", data, v2, err)
	}
	_, err = s.Stat(ctx, "b")
	storetest.WantError(t, "Stat", err, backend.ErrNotFound)
	if err := s.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(ctx, "b", make([]byte, 800<<10)); err != nil {
		t.Errorf("Put after making room: %v", err)
	}
}

// child puts and swaps until it is killed, and says what was acknowledged.
func child(dir, name string) {
	ctx := context.Background()
	s, err := file.Open(ctx, dir)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		err := s.Put(ctx, fmt.Sprintf("%s/%d/%d", name, i/3, i), storetest.Pattern(uint64(i), i*1000%70000))
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("put", i)
		n, err := storetest.Increment(ctx, s, "counter")
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("count", n)
	}
}

// TestKill kills processes that put and swap, and checks that everything they
// were told is there, and nothing is there by half.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	create(t, dir).Close()
	rounds := 15
	if testing.Short() {
		rounds = 3
	}
	count := 0
	for round := range rounds {
		var wg sync.WaitGroup
		var mu sync.Mutex // guards count
		puts := make([]int, 2)
		for i := range puts {
			wg.Go(func() {
				n, c := runChild(t, dir, fmt.Sprintf("%d-%d", round, i))
				mu.Lock()
				defer mu.Unlock()
				puts[i], count = n, max(count, c)
			})
		}
		wg.Wait()
		s := create(t, dir)
		for i, n := range puts {
			checkChild(t, s, fmt.Sprintf("%d-%d", round, i), n)
		}
		// Each child may have made one increment that it did not tell of.
		c, err := storetest.Increment(context.Background(), s, "counter")
		if err != nil || int(c) <= count || int(c) > count+3 {
			t.Errorf("counter = %d, %v after %d were acknowledged", c, err, count)
		}
		count = int(c)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		wantEmptyTmp(t, dir)
	}
	t.Logf("%d increments", count)
}

// stoppedChild replaces the mutable object m, stopped in the middle of it, and goes
// on when it may and has been told to.
func stoppedChild(dir string) {
	ctx := context.Background()
	s, err := file.Open(ctx, dir)
	if err == nil {
		var v backend.Version
		if _, v, err = s.Load(ctx, "m"); err == nil {
			file.OnCompared(func() {
				unix.Kill(os.Getpid(), unix.SIGSTOP)
				os.Stdin.Read(make([]byte, 1)) // not every thread stops at once
			})
			_, err = s.Swap(ctx, "m", v, []byte("the child's"))
		}
	}
	fmt.Println("swapped:", err)
	os.Exit(0)
}

// A stopped child is one that has stopped between the look and the rename of a Swap.
type stopped struct {
	*exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

func startStopped(t *testing.T, dir string) stopped {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LSD_TEST_FILE_CHILD="+dir, "LSD_TEST_FILE_CHILD_NAME=stopped")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || !status.Stopped() {
			t.Fatalf("the child did not stop: %v, status %#x", err, status)
		}
		return stopped{cmd, in, bufio.NewScanner(out)}
	}
}

// untilDeadline calls fn, which waits for what does not come, with a deadline. One
// that is over before fn waits at all, on a machine with other work, tests nothing.
func untilDeadline(fn func(context.Context) error) error {
	for d := 20 * time.Millisecond; ; d *= 2 {
		ctx, cancel := context.WithTimeout(context.Background(), d)
		err := fn(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
}

// wantBusy fails the test unless err names the process that holds a lock.
func (c stopped) wantBusy(t *testing.T, what string, err error) {
	t.Helper()
	storetest.WantError(t, what, err, backend.ErrTemporary)
	if want := fmt.Sprintf("which process %d (%.15s) holds: it is stopped: end it", c.Process.Pid, filepath.Base(os.Args[0])); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v; want %q", what, err, want)
	}
}

// ours makes a store with an object m, and returns its version.
func ours(t *testing.T, dir string) (*file.Store, backend.Version) {
	t.Helper()
	s := create(t, dir)
	t.Cleanup(func() { s.Close() })
	v, err := s.Swap(context.Background(), "m", backend.NoVersion, []byte("ours"))
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

// TestStoppedHolder: while a process is stopped in the middle of a Swap, others
// that want the lock do not wait for ever, and are told whom they wait for. Nothing
// has changed under it when it goes on.
func TestStoppedHolder(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	s, v := ours(t, dir)
	child := startStopped(t, dir)

	child.wantBusy(t, "Swap", untilDeadline(func(ctx context.Context) error {
		_, err := s.Swap(ctx, "m", v, []byte("late"))
		return err
	}))
	child.wantBusy(t, "Delete", untilDeadline(func(ctx context.Context) error { return s.Delete(ctx, "m") }))
	s.SetPatience(50 * time.Millisecond)
	_, err := s.Swap(ctx, "m", v, []byte("late"))
	child.wantBusy(t, "Swap without a deadline", err)
	cancelled, cancel := context.WithCancel(ctx)
	time.AfterFunc(time.Millisecond, cancel)
	s.SetPatience(time.Minute)
	_, err = s.Swap(cancelled, "m", v, []byte("late"))
	storetest.WantError(t, "Swap that is cancelled", err, context.Canceled)

	// What needs no lock goes on.
	_, err = s.Swap(ctx, "m", "another", []byte("late"))
	storetest.WantError(t, "Swap of another version", err, backend.ErrConflict)
	if data, now, err := s.Load(ctx, "m"); err != nil || now != v || string(data) != "ours" {
		t.Errorf("Load = %q, %q, %v", data, now, err)
	}
	if err := s.Put(ctx, "o", nil); err != nil {
		t.Error(err)
	}
	create(t, dir).Close()

	if err := unix.Kill(child.Process.Pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	io.WriteString(child.in, "x")
	if !child.out.Scan() || child.out.Text() != "swapped: <nil>" {
		t.Errorf("the child, going on: %q, %v", child.out.Text(), child.out.Err())
	}
	_, err = s.Swap(ctx, "m", v, []byte("late"))
	storetest.WantError(t, "Swap after the child's", err, backend.ErrConflict)
	if data, now, err := s.Load(ctx, "m"); err != nil || now == v || string(data) != "the child's" {
		t.Errorf("Load = %q, %q, %v", data, now, err)
	}
}

// TestKilledHolder: the lock of a process that is stopped goes with the process.
func TestKilledHolder(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	s, v := ours(t, dir)
	child := startStopped(t, dir)
	swapped := make(chan error)
	s.SetPatience(time.Minute)
	go func() {
		_, err := s.Swap(ctx, "m", v, []byte("next"))
		swapped <- err
	}()
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-swapped; err != nil {
		t.Error(err)
	}
	if data, _, err := s.Load(ctx, "m"); err != nil || string(data) != "next" {
		t.Errorf("Load = %q, %v", data, err)
	}
}

// runChild runs a child, kills it, and returns how many puts, and which count,
// it was told.
func runChild(t *testing.T, dir, name string) (puts, count int) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LSD_TEST_FILE_CHILD="+dir, "LSD_TEST_FILE_CHILD_NAME="+name)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Error(err)
		return 0, 0
	}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return 0, 0
	}
	life := time.Duration(30+rand.IntN(150)) * time.Millisecond
	time.AfterFunc(life, func() { cmd.Process.Kill() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var what string
		var n int
		fmt.Sscan(lines.Text(), &what, &n)
		switch what {
		case "put":
			puts = n + 1
		case "count":
			count = n
		default:
			t.Errorf("child: %s", lines.Text())
		}
	}
	cmd.Wait()
	return puts, count
}

// checkChild checks the objects of a child that was told of n puts.
func checkChild(t *testing.T, s backend.Store, name string, n int) {
	p := make([]byte, 100000)
	for i := range n + 1 {
		key := fmt.Sprintf("%s/%d/%d", name, i/3, i)
		got, err := s.Get(context.Background(), key, p, 0)
		if i == n && errors.Is(err, backend.ErrNotFound) {
			return // not acknowledged
		}
		if err != nil || !bytes.Equal(p[:got], storetest.Pattern(uint64(i), i*1000%70000)) {
			t.Errorf("Get %s after a kill: %d bytes, %v, or they differ", key, got, err)
		}
	}
}

// TestStaleTmp checks that the files of a dead process go, and those of a
// living one stay.
func TestStaleTmp(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	living := create(t, dir)
	defer living.Close()
	if err := living.Put(ctx, "one", nil); err != nil {
		t.Fatal(err)
	}
	before, _ := filepath.Glob(dir + "/tmp/*")
	dead := filepath.Join(dir, "tmp", "dead")
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dead+"/7", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	next := create(t, dir)
	if err := next.Put(ctx, "two", nil); err != nil {
		t.Error(err)
	}
	next.Close()
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files of a dead process: %v", err)
	}
	if after, _ := filepath.Glob(dir + "/tmp/*"); len(before) != 1 || len(after) != 1 || before[0] != after[0] {
		t.Errorf("files of a living process: %q became %q", before, after)
	}
	if err := living.Put(ctx, "a", nil); err != nil {
		t.Error(err)
	}
}

func BenchmarkGet(b *testing.B) {
	s := create(b, b.TempDir())
	defer s.Close()
	const size = 8 << 20
	if err := s.Put(context.Background(), "img/data/1", make([]byte, size)); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	for i := 0; b.Loop(); i++ {
		if _, err := s.Get(context.Background(), "img/data/1", p, int64(i*len(p)%size)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPut8M(b *testing.B) {
	s := create(b, b.TempDir())
	defer s.Close()
	p := storetest.Pattern(1, 8<<20)
	b.SetBytes(int64(len(p)))
	for i := 0; b.Loop(); i++ {
		if err := s.Put(context.Background(), fmt.Sprintf("img/data/%d", i), p); err != nil {
			b.Fatal(err)
		}
	}
}

// TestModified: an object is as old as its file is here, whatever time what has copied it back has
// given that.
func TestModified(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	defer s.Close()
	if err := s.Put(t.Context(), "a/b", []byte("data")); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(-24 * time.Hour)
	found := 0
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			found++
			err = os.Chtimes(path, before, before)
		}
		return err
	}); err != nil || found == 0 {
		t.Fatal(found, err)
	}
	if is, err := s.Stat(t.Context(), "a/b"); err != nil || time.Since(is.Modified) > time.Hour {
		t.Errorf("Stat: %+v, %v", is, err)
	}
}
