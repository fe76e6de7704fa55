package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/inproc"
)

// baseAndClone makes vm1, which has something in it, and vm2, a clone of it.
func baseAndClone(t *testing.T) (store string, parent, clone uuid.UUID, want []byte) {
	t.Helper()
	store = newStore(t)
	path, want := diskFile(t, 10<<20)
	must(t, "import", path, store+"/vm1")
	made := printed[cloned](t, "clone", store+"/vm1", "vm2")
	return store, made.Parent, made.ID, want
}

// mustHaveOnly fails unless all objects of the store are those of the image id.
func mustHaveOnly(t *testing.T, store string, id uuid.UUID) {
	t.Helper()
	got := objects(t, opened(t, store))
	for _, key := range got {
		if !strings.HasPrefix(key, id.String()+"/") {
			t.Errorf("%s is left", key)
		}
	}
	if len(got) == 0 {
		t.Error("nothing is left")
	}
}

// TestFlattenNoClone: where there is nothing to flatten nothing is done.
func TestFlattenNoClone(t *testing.T) {
	dir := t.TempDir()
	url := "file://" + dir + "/store/vm1"
	must(t, "create", url, "--size", "1M")
	before := snapshot(t, dir)
	if out := must(t, "flatten", url); out != url+" is no clone: there is nothing to flatten\n" {
		t.Errorf("flatten: %q", out)
	}
	if got := printed[flattened](t, "flatten", url); got.Image != url || got.Moved != 0 || got.Parent != uuid.Nil || !got.Separated || got.Needs == nil || len(got.Needs) > 0 {
		t.Errorf("flatten --json: %+v", got)
	}
	owned(t, url) // whoever has it
	if out := must(t, "flatten", url); !strings.Contains(out, "nothing to flatten") {
		t.Errorf("flatten: %q", out)
	}
	if after := snapshot(t, dir); after != before {
		t.Errorf("files before:\n%safter:\n%s", before, after)
	}
}

// TestFlattenCommand: a clone that nobody has is flattened, has what it had, and is no clone any
// more: its parent goes with all of its space.
func TestFlattenCommand(t *testing.T) {
	store, parent, clone, want := baseAndClone(t)
	url := store + "/vm2"
	got := printed[flattened](t, "flatten", url)
	if got.Image != url || got.Moved == 0 || got.Parent != parent || !got.Separated || got.Needs == nil || len(got.Needs) > 0 || got.ParentSpace != "" || got.Error != "" {
		t.Errorf("flatten --json: %+v", got)
	}
	if i := printed[described](t, "info", url); i.Parent != uuid.Nil || i.Owner != nil {
		t.Errorf("info: %+v", i)
	}
	if got := printed[[]child](t, "children", store+"/vm1"); len(got) > 0 {
		t.Errorf("children: %+v", got)
	}
	if out := must(t, "flatten", url); out != url+" is no clone: there is nothing to flatten\n" {
		t.Errorf("flatten again: %q", out)
	}
	if !bytes.Equal(contentsOf(t, store+"/vm1"), want) {
		t.Error("wrong data in the parent")
	}
	must(t, "rm", store+"/vm1", "--wait")
	mustHaveOnly(t, store, clone)
	if !bytes.Equal(contentsOf(t, url), want) {
		t.Error("wrong data")
	}
	if out := must(t, "check", url, "--deep"); !strings.Contains(out, "clean") {
		t.Errorf("check: %s", out)
	}
	if out := must(t, "gc", store, "--age", "1ns"); out != "nothing is left behind\n" {
		t.Errorf("gc: %q", out)
	}
}

// TestFlattenOrphan: of a parent that has been removed the rest goes with the flattening of its
// last clone, by this host's daemon if there is one.
func TestFlattenOrphan(t *testing.T) {
	d := newStubDaemon(t)
	for _, daemon := range []bool{false, true} {
		store, parent, clone, want := baseAndClone(t)
		url := store + "/vm2"
		must(t, "rm", store+"/vm1", "--wait")
		socket, remark := filepath.Join(t.TempDir(), "none"), "reclaimed the space of that, as far as no clone needs it"
		if daemon {
			socket, remark = d.socket, "lsdd reclaims the space of that in the background"
		}
		d.attach()
		out, err := lsdctlWith(t, socket, nil, "flatten", url)
		if err != nil || !strings.HasPrefix(out, url+" is no clone any more: ") ||
			!strings.HasSuffix(out, "iB were moved into objects of its own\nits parent had been removed: "+remark+"\n") {
			t.Errorf("flatten: %q, %v", out, err)
		}
		if asked := d.was("POST " + api.PathReclaim); asked != daemon {
			t.Errorf("the daemon was asked: %v", asked)
		}
		if daemon { // which does nothing
			if _, err := engine.Reclaim(t.Context(), opened(t, store), parent, nil); err != nil {
				t.Fatal(err)
			}
		}
		mustHaveOnly(t, store, clone)
		if !bytes.Equal(contentsOf(t, url), want) {
			t.Error("wrong data")
		}
	}
}

// TestFlattenNeeds: what needs something of the parent still is named; once it has been removed
// the image is separated.
func TestFlattenNeeds(t *testing.T) {
	store, parent, clone, want := baseAndClone(t)
	url := store + "/vm2"
	must(t, "snap", "create", url+"@monday")
	must(t, "clone", url+"@monday", "vm3")
	out := must(t, "flatten", url)
	if !strings.Contains(out, "were moved into objects of its own: the present state of "+url+" needs nothing of its parent any more; these do: ") ||
		!strings.Contains(out, "snapshot monday") || !strings.Contains(out, "clone vm3") ||
		!strings.HasSuffix(out, ": it stays a clone until they are removed and it is flattened again\n") {
		t.Errorf("flatten: %q", out)
	}
	got := printed[flattened](t, "flatten", url) // which moves nothing
	if got.Moved != 0 || got.Parent != parent || got.Separated || len(got.Needs) != 2 {
		t.Errorf("flatten --json: %+v", got)
	}
	if i := printed[described](t, "info", url); i.Parent != parent {
		t.Errorf("info: %+v", i)
	}
	if !bytes.Equal(contentsOf(t, store+"/vm3"), want) {
		t.Error("wrong data in the clone")
	}
	must(t, "rm", store+"/vm3", "--wait")
	must(t, "snap", "rm", url+"@monday")
	if got := printed[flattened](t, "flatten", url); !got.Separated || len(got.Needs) > 0 {
		t.Errorf("flatten --json: %+v", got)
	}
	must(t, "rm", store+"/vm1", "--wait")
	mustHaveOnly(t, store, clone)
	if !bytes.Equal(contentsOf(t, url), want) {
		t.Error("wrong data")
	}
}

// TestFlattenAttached: what another host has attached is flattened there; what this host has,
// by its daemon.
func TestFlattenAttached(t *testing.T) {
	store, parent, clone, _ := baseAndClone(t)
	url := store + "/vm2"
	owned(t, url)
	d := newStubDaemon(t)
	readOnly := api.Image{ID: 4, Device: "/dev/ublkb4", URL: url, ImageID: clone, ReadOnly: true}
	for _, images := range [][]api.Image{nil, {readOnly}} {
		d.attach(images...)
		_, err := lsdctlWith(t, d.socket, nil, "flatten", url)
		if want := "flatten " + url + ": it is attached by busy: flatten it there, or lsdctl del it there first"; err == nil || err.Error() != want {
			t.Errorf("flatten: %v, want %s", err, want)
		}
	}
	d.attach(readOnly, api.Image{ID: 3, Device: "/dev/ublkb3", URL: url, ImageID: clone})
	// This one says that it has, and has not.
	if out, err := lsdctlWith(t, d.socket, nil, "flatten", url); err == nil || out != "" {
		t.Errorf("flatten: %q", out)
	}
	if !d.was("POST /v1/images/3/flatten") {
		t.Error("the daemon was not asked")
	}
	if i := printed[described](t, "info", url); i.Parent != parent {
		t.Errorf("info: %+v", i)
	}
}

// TestFlattenPrint: what is said is what has been done.
func TestFlattenPrint(t *testing.T) {
	parent := uuid.New()
	for _, x := range []struct {
		d    flattened
		why  error
		want string
		err  string
	}{
		{flattened{Separated: true}, nil, "U is no clone: there is nothing to flatten\n", ""},
		{flattened{Parent: parent, Separated: true, Moved: 3 << 29}, nil, "U is no clone any more: 1.5 GiB were moved into objects of its own\n", ""},
		{
			flattened{Parent: parent, Moved: 1 << 20, Needs: []string{"snapshot a", "clone vm3"}}, nil,
			"1 MiB were moved into objects of its own: the present state of U needs nothing of its parent any more; these do: snapshot a, clone vm3: it stays a clone until they are removed and it is flattened again\n", "",
		},
		{
			flattened{Parent: parent, Separated: true, ParentSpace: spaceBackground}, nil,
			"U is no clone any more: 0 B were moved into objects of its own\nits parent had been removed: lsdd reclaims the space of that in the background\n", "",
		},
		{
			flattened{Parent: parent, Separated: true, ParentSpace: spaceLeft}, errors.New("interrupted"),
			"U is no clone any more: 0 B were moved into objects of its own\n",
			"U is flattened, but the space of its parent is not all reclaimed: interrupted: lsdctl gc mem: --remove does the rest",
		},
	} {
		f := newFlattener(t, nil, "vm2")
		var out strings.Builder
		f.out = &out
		x.d.Image = "U"
		err := f.print(&x.d, x.why)
		if out.String() != x.want || (x.err == "") != (err == nil) || err != nil && err.Error() != x.err {
			t.Errorf("%+v: %q, %v", x.d, out.String(), err)
		}
	}
}

// newFlattener returns a flattener of an image of a store that a URL does not name.
func newFlattener(t *testing.T, st backend.Store, image string) *flattener {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	u, err := backend.ParseStore("mem:")
	if err != nil {
		t.Fatal(err)
	}
	a := newApp(io.Discard, null)
	a.socket = filepath.Join(t.TempDir(), "none")
	return &flattener{app: a, u: u, image: image, st: st}
}

// TestFlattenInterrupted: who ends the command is told that it can go on, which it does.
func TestFlattenInterrupted(t *testing.T) {
	st := mem.New()
	parent, err := engine.Create(t.Context(), st, "vm1", engine.CreateOptions{Size: 64 << 20, ObjectSize: engine.MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	im, err := inproc.Open(t.Context(), st, parent, inproc.Options{URL: "mem:vm1"})
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	if err := errors.Join(im.WriteAt(t.Context(), data, 0), im.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	clone, err := engine.Clone(t.Context(), st, parent, "vm2", engine.CloneOptions{})
	if err != nil {
		t.Fatal(err)
	}
	reads := faultstore.NewGate()
	f := newFlattener(t, faultstore.New(st, faultstore.If(
		faultstore.All(faultstore.Method(faultstore.Get), faultstore.Key(parent.String()+"/d/*")), faultstore.Fault{Gate: reads})), "vm2")
	info, err := f.describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var held sync.WaitGroup
	held.Go(func() {
		wait, over := context.WithTimeout(t.Context(), 10*time.Second)
		defer over()
		if err := reads.AwaitWaiting(wait, 1); err != nil {
			t.Errorf("it does not read: %v", err)
		}
		stop()
		time.Sleep(300 * time.Millisecond) // in which it would go on if it were not told
		reads.Open()
	})
	if err := f.move(ctx, info, &flattened{Image: "mem:vm2"}); !errors.Is(err, errFlattenStopped) || strings.Contains(err.Error(), "\n") {
		t.Errorf("interrupted: %v", err)
	}
	held.Wait()
	if s, err := engine.Separate(t.Context(), st, clone); err != nil || len(s.Needs) != 1 {
		t.Errorf("it needs %q: %v", s.Needs, err)
	}
	var done flattened
	if err := f.move(t.Context(), info, &done); err != nil || done.Moved == 0 {
		t.Errorf("again: %+v, %v", done, err)
	}
	if s, err := engine.Separate(t.Context(), st, clone); err != nil || len(s.Needs) > 0 {
		t.Errorf("it needs %q: %v", s.Needs, err)
	}
}

// TestFlattenInterruptedAttached: the same is said where the daemon was at it.
func TestFlattenInterruptedAttached(t *testing.T) {
	store, _, clone, _ := baseAndClone(t)
	url := store + "/vm2"
	owned(t, url)
	d := newStubDaemon(t)
	d.attach(api.Image{ID: 3, Device: "/dev/ublkb3", URL: url, ImageID: clone})
	ctx, stop := context.WithCancel(t.Context())
	gone := make(chan struct{})
	d.did = func() { stop(); <-gone }
	f := newFlattener(t, nil, "vm2")
	var err error
	if f.u, err = backend.ParseStore(store); err != nil {
		t.Fatal(err)
	}
	f.socket = d.socket
	err = f.run(ctx)
	close(gone)
	if want := "flatten " + url + ": interrupted: what was moved stays moved, and the same command goes on from there"; err == nil || err.Error() != want || status(err) != 1 {
		t.Errorf("flatten: %v, want %s", err, want)
	}
}
