package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// filled makes an image that has so many data objects, as far as a removal looks at them.
func filled(t *testing.T, url string, count int) uuid.UUID {
	t.Helper()
	must(t, "create", url, "--size", "1M")
	id := printed[described](t, "info", url).ID
	u, _, err := backend.ParseImage(url)
	if err != nil {
		t.Fatal(err)
	}
	st := opened(t, u.String())
	for n := range count {
		if err := st.Put(context.Background(), id.String()+"/d/0000000"+string('1'+rune(n))+".1", []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

// TestRmCommand: an image is gone at once, and what is said of its space is what becomes of it.
func TestRmCommand(t *testing.T) {
	const count = 3
	d := newStubDaemon(t)
	for _, tt := range []struct {
		name   string
		flags  []string
		daemon bool
		remark string
		space  string
		left   int // objects
	}{
		{"no daemon", nil, false, "reclaimed its space, as far as no clone needs it: 3 objects", spaceReclaimed, 0},
		{"daemon", nil, true, "lsdd reclaims its space in the background", spaceBackground, count + 1},
		{"wait", []string{"--wait"}, true, "reclaimed its space, as far as no clone needs it: 3 objects", spaceReclaimed, 0},
		{"no-wait", []string{"--no-wait"}, true, "its space is not reclaimed: lsdctl gc STORE --remove does that", spaceLeft, count + 1},
		{"no-wait without a daemon", []string{"--no-wait"}, false, "its space is not reclaimed: lsdctl gc STORE --remove does that", spaceLeft, count + 1},
	} {
		for _, json := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				store := "file://" + t.TempDir() + "/store"
				url := store + "/vm1"
				id := filled(t, url, count)
				socket := filepath.Join(t.TempDir(), "none")
				if tt.daemon {
					socket = d.socket
				}
				d.attach()
				args := append([]string{"rm", url}, tt.flags...)
				if json {
					args = append(args, "--json")
				}
				out, err := lsdctlWith(t, socket, nil, args...)
				if err != nil {
					t.Fatal(err)
				}
				if json {
					want := removedImage{Name: "vm1", ID: id, Space: tt.space, Objects: count}
					if tt.space != spaceReclaimed {
						want.Objects = 0
					}
					if got := decoded[removedImage](t, out); got != want {
						t.Errorf("rm --json: %+v, want %+v", got, want)
					}
				} else if want := "removed " + url + "\n" + strings.ReplaceAll(tt.remark, "STORE", store) + "\n"; out != want {
					t.Errorf("rm: %q, want %q", out, want)
				}
				if asked := d.was("POST " + api.PathReclaim); asked != (tt.space == spaceBackground) {
					t.Errorf("the daemon was asked: %v", asked)
				}
				if _, err := lsdctl(t, "info", url); err == nil || !strings.Contains(err.Error(), "no such image") {
					t.Errorf("info: %v", err)
				}
				if got := objects(t, opened(t, store)); len(got) != tt.left {
					t.Errorf("objects: %q", got)
				}
				must(t, "create", url, "--size", "2M") // its name is free
				must(t, "gc", store, "--remove")
				if got := objects(t, opened(t, store)); len(got) != 1 {
					t.Errorf("objects after gc: %q", got)
				}
			})
		}
	}
}

// TestRmAttached: of an image that was removed while a host had it what that may put later is
// said to be for whoever sees to it, and nothing waits for that.
func TestRmAttached(t *testing.T) {
	d := newStubDaemon(t)
	for _, tt := range []struct {
		name   string
		flags  []string
		daemon bool
		remark string // after what was reclaimed
		space  string
		left   int // objects
	}{
		{"no daemon", nil, false, "; what a host may still write goes with lsdctl gc STORE --remove, in 2m15s or later", spaceLate, 1},
		{"wait without a daemon", []string{"--wait"}, false, "; what a host may still write goes with lsdctl gc STORE --remove, in 2m15s or later", spaceLate, 1},
		{"wait", []string{"--wait"}, true, "; lsdd removes what a host may still write, in 2m15s", spaceBackground, 1},
		{"daemon", nil, true, "", spaceBackground, 4},
		{"no-wait", []string{"--no-wait"}, true, "", spaceLeft, 4},
	} {
		for _, json := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s json %v", tt.name, json), func(t *testing.T) {
				store := "file://" + t.TempDir() + "/store"
				url := store + "/vm1"
				filled(t, url, 3)
				id := printed[described](t, "info", url).ID
				attachedFor(t, store, id, 15*time.Second)
				socket := filepath.Join(t.TempDir(), "none")
				if tt.daemon {
					socket = d.socket
				}
				d.attach()
				args := append([]string{"rm", url, "--force"}, tt.flags...)
				if json {
					args = append(args, "--json")
				}
				out, err := lsdctlWith(t, socket, nil, args...)
				if err != nil {
					t.Fatal(err)
				}
				out = regexp.MustCompile(`2m\d+s`).ReplaceAllString(out, "2m15s") // some time has passed
				if json {
					got := decoded[removedImage](t, out)
					if late := got.Late >= 120 && got.Late <= 136; got.Space != tt.space || late != (tt.left == 1) {
						t.Errorf("rm --json: %+v", got)
					}
				} else if want := strings.ReplaceAll(tt.remark, "STORE", store) + "\n"; tt.remark != "" && !strings.HasSuffix(out, "clone needs it: 3 objects"+want) {
					t.Errorf("rm: %q, want %q", out, want)
				}
				if asked := d.was("POST " + api.PathReclaim); asked != (tt.space == spaceBackground) {
					t.Errorf("the daemon was asked: %v", asked)
				}
				if got := objects(t, opened(t, store)); len(got) != tt.left {
					t.Errorf("objects: %q", got)
				}
				waits := "vm1 was removed, and a host may still write something of it: that goes with lsdctl gc " + store + " --remove, in 2m"
				if tt.left > 1 {
					if out := must(t, "gc", store, "--remove"); !strings.Contains(out, "removed 3 objects\n"+waits) {
						t.Errorf("gc: %q", out)
					}
				}
				for _, args := range [][]string{{"gc", store}, {"gc", store, "--remove"}} {
					if out := must(t, args...); !strings.HasPrefix(out, "nothing is left behind that can go now\n"+waits) {
						t.Errorf("lsdctl %v: %q", args, out)
					}
				}
				if out := must(t, "check", store); !strings.Contains(out, "may come for") {
					t.Errorf("check: %q", out)
				}
				if got := objects(t, opened(t, store)); len(got) != 1 {
					t.Errorf("objects: %q", got)
				}
			})
		}
	}
}

// attachedFor takes an image that nobody has, with a lease of that length, and has its owner die.
func attachedFor(t *testing.T, store string, id uuid.UUID, lease time.Duration) {
	t.Helper()
	im, err := inproc.Open(t.Context(), opened(t, store), id, inproc.Options{Lease: lease})
	if err != nil {
		t.Fatal(err)
	}
	dead, stop := context.WithCancel(t.Context())
	stop()
	_ = im.Close(dead)
}

// TestRmFails: where the space cannot be reclaimed the image is removed all the same, and both
// are said.
func TestRmFails(t *testing.T) {
	for _, json := range []bool{false, true} {
		dir := t.TempDir()
		store := "file://" + dir + "/store"
		url := store + "/vm1"
		must(t, "create", url, "--size", "1M")
		must(t, "clone", url, store+"/vm2")
		lost := printed[described](t, "info", store+"/vm2").ID
		if err := opened(t, store).Delete(context.Background(), engine.SuperblockKey(lost)); err != nil {
			t.Fatal(err)
		}
		args := []string{"rm", url, "--wait"}
		if json {
			args = append(args, "--json")
		}
		out, err := lsdctl(t, args...)
		if err == nil || status(err) != 1 || !strings.HasPrefix(err.Error(), url+" is removed, but its space is not all reclaimed: ") ||
			!strings.HasSuffix(err.Error(), ": lsdctl gc "+store+" --remove does the rest") || strings.Contains(err.Error(), "\n") {
			t.Errorf("rm: %v", err)
		}
		if json {
			if got := decoded[removedImage](t, out); got.Space != spaceLeft || got.Error == "" || got.Objects != 0 {
				t.Errorf("rm --json: %+v", got)
			}
		} else if out != "removed "+url+"\n" {
			t.Errorf("rm: %q", out)
		}
		if out := must(t, "ls", store); strings.Contains(out, "vm1") {
			t.Errorf("ls: %q", out)
		}
	}
}

// TestRmInterrupted: who ends the command while it reclaims is told what is left to do.
func TestRmInterrupted(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	filled(t, store+"/vm1", 3)
	u, err := backend.ParseStore(store)
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var out strings.Builder
	a := newApp(writerFunc(func(p []byte) (int, error) {
		stop() // when it says that the image is removed
		return out.Write(p)
	}), null)
	a.socket = filepath.Join(t.TempDir(), "none")
	err = a.remove(ctx, u, "vm1", rmOptions{})
	if want := store + "/vm1 is removed, but its space is not all reclaimed: interrupted: lsdctl gc " + store + " --remove does the rest"; err == nil || err.Error() != want {
		t.Errorf("rm: %v, want %s", err, want)
	}
	if out.String() != "removed "+store+"/vm1\n" {
		t.Errorf("rm: %q", out.String())
	}
	if got := objects(t, opened(t, store)); len(got) != 4 {
		t.Errorf("objects: %q", got)
	}
	must(t, "gc", store, "--remove")
	if got := objects(t, opened(t, store)); len(got) != 0 {
		t.Errorf("objects: %q", got)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestHalfRemovedCommands: an image that has been removed but for its name is said to be that,
// and rm ends it.
func TestHalfRemovedCommands(t *testing.T) {
	ctx := context.Background()
	store := "file://" + t.TempDir() + "/store"
	url := store + "/vm1"
	id := filled(t, url, 3)
	st := opened(t, store)
	if _, err := engine.Remove(ctx, st, "vm1", engine.RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := backend.Link(ctx, st, "vm1", id); err != nil {
		t.Fatal(err)
	}
	const what = "removed, but for its name: lsdctl rm it again"
	if out := must(t, "ls", store); !strings.Contains(out, what) {
		t.Errorf("ls: %q", out)
	}
	if out := must(t, "info", url); !strings.Contains(out, what) || strings.Contains(out, "attached by") {
		t.Errorf("info: %q", out)
	}
	if i := printed[described](t, "info", url); !i.Removed {
		t.Errorf("info: %+v", i)
	}
	for _, args := range [][]string{{"clone", url, "vm2"}, {"snap", "create", url + "@monday"}, {"rename", url, "vm2"}, {"check", url}} {
		if _, err := lsdctl(t, args...); err == nil || !strings.Contains(err.Error(), "has been removed") {
			t.Errorf("lsdctl %v: %v", args, err)
		}
	}
	if got := printed[[]engine.Garbage](t, "gc", store); len(got) != 1 || got[0].Objects != 4 || !strings.Contains(got[0].What, "but for its name") {
		t.Errorf("gc: %+v", got)
	}
	must(t, "rm", url)
	if got := objects(t, st); len(got) > 0 {
		t.Errorf("objects: %q", got)
	}
	if _, err := backend.Lookup(ctx, st, "vm1"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("its name: %v", err)
	}
	if out := must(t, "rm", "--help"); !slices.ContainsFunc(strings.Split(out, "\n"), func(l string) bool { return strings.Contains(l, "--no-wait") }) {
		t.Errorf("rm --help: %s", out)
	}
}
