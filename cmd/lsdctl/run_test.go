package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/api"
)

func TestPrepend(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", "A=x"},
		{"A=", "A=x"},
		{"A=y:z", "A=x:y:z"},
		{"AA=y", "AA=y A=x"},
	} {
		if got := strings.Join(prepend(strings.Fields(c.in), "A", "x"), " "); got != c.want {
			t.Errorf("prepend to %q: %q, want %q", c.in, got, c.want)
		}
	}
}

// TestRunEnv: a program finds the library that its store needs, and the daemon's socket.
func TestRunEnv(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file, err := backend.ParseStore("file:///srv/lsd")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runEnv(file, false, "/x/sock.librbd", nil); err == nil || !strings.Contains(err.Error(), "make install-librbd") {
		t.Errorf("without a library: %v", err)
	}
	dir := filepath.Join(filepath.Dir(exe), "librbd")
	for _, name := range []string{libraryName, preloadName} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	defer os.RemoveAll(dir)
	pool, err := backend.ParseStore("rados://rbd/ns")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		store  backend.URL
		shared bool
		want   []string
	}{
		{backend.URL{}, false, []string{"B=1", api.EnvLibrarySocket + "=/x/sock.librbd", "LD_LIBRARY_PATH=" + dir}},
		{pool, true, []string{"B=1", api.EnvLibrarySocket + "=/x/sock.librbd", api.EnvLibraryShared + "=1", api.EnvLibraryStore + "=rados://rbd/ns", "LD_LIBRARY_PATH=" + dir}},
		{file, false, []string{"B=1", api.EnvLibrarySocket + "=/x/sock.librbd", api.EnvLibraryStore + "=file:///srv/lsd", "LD_PRELOAD=" + filepath.Join(dir, preloadName)}},
	} {
		if got, err := runEnv(c.store, c.shared, "/x/sock.librbd", []string{"B=1", api.EnvLibrarySocket + "=/old"}); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("for %v: %q, %v; want %q", c.store, got, err, c.want)
		}
	}
}

// TestLibrarySocket: what the environment says of the socket counts, for the program as for a
// daemon that is started for it.
func TestLibrarySocket(t *testing.T) {
	a := newApp(os.Stdout, os.Stderr)
	a.socket = "/x/sock"
	for env, want := range map[string]string{"": "/x/sock.librbd", "/y": "/y"} {
		if got, err := a.librarySocket(env); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", env, got, err, want)
		}
	}
}

// TestRunRefused: what cannot be run is refused before a daemon is started.
func TestRunRefused(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "name the program"},
		{[]string{"--store", "nonsense", "--", "true"}, "nonsense"},
		{[]string{"--store", "mem:", "--", "true"}, "mem:"},
		{[]string{"--", "no-such-program"}, "no-such-program is not there"},
	} {
		a := newApp(os.Stdout, os.Stderr)
		cmd := a.command()
		cmd.SetArgs(append([]string{"--socket", filepath.Join(t.TempDir(), "sock"), "run"}, c.args...))
		if err := cmd.ExecuteContext(context.Background()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("run %q: %v, want %q", c.args, err, c.want)
		}
	}
}
