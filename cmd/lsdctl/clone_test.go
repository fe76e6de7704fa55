package main

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// printed decodes what a command prints as JSON.
func printed[T any](t *testing.T, args ...string) (v T) {
	t.Helper()
	return decoded[T](t, must(t, append(args, "--json")...))
}

// decoded returns what a command has printed as JSON.
func decoded[T any](t *testing.T, out string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return v
}

// opened opens the store of that URL.
func opened(t *testing.T, store string) backend.Store {
	t.Helper()
	u, err := backend.ParseStore(store)
	if err != nil {
		t.Fatal(err)
	}
	st, err := open.Store(context.Background(), u)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

// objects returns the keys of all objects of a store but the directory of names.
func objects(t *testing.T, st backend.Store) (keys []string) {
	t.Helper()
	err := st.List(context.Background(), "", func(key string) error {
		if key != backend.DirectoryKey {
			keys = append(keys, key)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// fields returns the cells of a line of a table.
func fields(t *testing.T, out string, line int) []string {
	t.Helper()
	lines := strings.Split(out, "\n")
	if len(lines) <= line {
		t.Fatalf("no line %d in %q", line, out)
	}
	return strings.Fields(lines[line])
}

// TestCloneCommands: clones of an image and of its snapshot are made, listed and removed,
// those that others were cloned from first.
func TestCloneCommands(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	url := store + "/vm1"
	must(t, "create", url, "--size", "20G")
	must(t, "snap", "create", url+"@monday")
	if out := must(t, "info", url); strings.Contains(out, "clone") {
		t.Errorf("info: %s", out)
	}
	if got := printed[[]child](t, "children", url); got == nil || len(got) != 0 {
		t.Errorf("children: %+v", got)
	}
	if out, want := must(t, "clone", url+"@monday", store+"/vm2"), "made "+store+"/vm2: attach it with lsdctl add "+store+"/vm2\n"; out != want {
		t.Errorf("clone: %q, want %q", out, want)
	}
	parent := printed[described](t, "info", url)
	made := printed[cloned](t, "clone", url, "vm3")
	if made.Name != "vm3" || made.ID == uuid.Nil || made.Parent != parent.ID || made.Snapshot != "" {
		t.Errorf("clone --json: %+v", made)
	}
	if of := printed[cloned](t, "clone", store+"/vm3", "vm4"); of.Parent != made.ID {
		t.Errorf("clone of a clone: %+v", of)
	}
	if got := printed[cloned](t, "clone", url+"@monday", "vm5"); got.Snapshot != "monday" {
		t.Errorf("clone --json: %+v", got)
	}
	if i := printed[described](t, "info", store+"/vm3"); i.Parent != parent.ID || i.ParentName != "vm1" || i.Size != 20<<30 || len(i.Clones) != 1 || len(i.Snapshots) != 0 {
		t.Errorf("info --json: %+v", i)
	}
	if out := must(t, "info", url); !slices.ContainsFunc(strings.Split(out, "\n"), func(l string) bool {
		return strings.HasPrefix(l, "clones ") && strings.HasSuffix(l, " 3: see lsdctl children "+url)
	}) {
		t.Errorf("info: %s", out)
	}
	must(t, "rename", url, "base")
	must(t, "rename", store+"/vm2", "two")
	if out := must(t, "info", store+"/vm3"); !strings.Contains(out, store+"/base\n") {
		t.Errorf("info: %s", out)
	}
	testChildren(t, store, made.ID)
	testRemoveParents(t, store)
}

// testChildren: the clones of base are told by the names that they have.
func testChildren(t *testing.T, store string, vm3 uuid.UUID) {
	t.Helper()
	st := opened(t, store)
	if err := backend.Unlink(context.Background(), st, "vm3", vm3); err != nil { // as when it has been removed and its own clone needs it
		t.Fatal(err)
	}
	out := must(t, "children", store+"/base")
	if got := fields(t, out, 0); !slices.Equal(got, []string{"NAME", "SIZE", "CREATED", "MADE", "AS"}) {
		t.Errorf("children: %q", out)
	}
	for n, want := range [][2]string{{"two", "vm2"}, {"removed", "vm3"}, {"vm5", "vm5"}} {
		if got := fields(t, out, n+1); got[0] != want[0] || got[1]+got[2] != "20GiB" || got[len(got)-1] != want[1] {
			t.Errorf("children: %q, want %q", got, want)
		}
	}
	list := printed[[]child](t, "children", store+"/base")
	if len(list) != 3 || list[0].Name != "two" || list[0].MadeAs != "vm2" || list[0].Removed || list[0].Size != 20<<30 ||
		list[1].Name != "" || list[1].ID != vm3 || !list[1].Removed || time.Since(list[1].Created) > time.Minute {
		t.Errorf("children: %+v", list)
	}
	if err := backend.Link(context.Background(), st, "vm3", vm3); err != nil {
		t.Fatal(err)
	}
}

// testRemoveParents removes images before their clones.
func testRemoveParents(t *testing.T, store string) {
	t.Helper()
	must(t, "rm", store+"/base", "--snapshots")
	must(t, "rm", store+"/vm3")
	for _, name := range []string{"two", "vm4", "vm5"} {
		if out := must(t, "check", store+"/"+name, "--deep"); !strings.Contains(out, "clean") {
			t.Errorf("check: %s", out)
		}
	}
	must(t, "create", store+"/base", "--size", "1M") // another one
	if i := printed[described](t, "info", store+"/two"); i.ParentName != "" {
		t.Errorf("info: %+v", i)
	}
	if out := must(t, "gc", store); out != "nothing is left behind\n" {
		t.Errorf("gc: %q", out)
	}
	for _, name := range []string{"vm4", "two", "base", "vm5"} {
		must(t, "rm", store+"/"+name)
	}
	if got := objects(t, opened(t, store)); len(got) > 0 {
		t.Errorf("objects: %q", got)
	}
	if got := printed[[]engine.Garbage](t, "gc", store); got == nil || len(got) != 0 {
		t.Errorf("gc: %+v", got)
	}
}

// TestRelatives: where an image was cloned from one that has no name any more, info says so.
func TestRelatives(t *testing.T) {
	u, err := backend.ParseStore("file:///store")
	if err != nil {
		t.Fatal(err)
	}
	parent := uuid.New()
	for _, x := range []struct {
		i    described
		want [][2]string
	}{
		{described{}, nil},
		{described{Info: engine.Info{Parent: parent}}, [][2]string{{"cloned from", parent.String() + ", removed"}}},
		{described{Info: engine.Info{Parent: parent}, ParentName: "vm1"}, [][2]string{{"cloned from", "file:///store/vm1"}}},
		{described{Info: engine.Info{Name: "vm2", Clones: make([]engine.Snapshot, 2)}}, [][2]string{{"clones", "2: see lsdctl children file:///store/vm2"}}},
	} {
		if got := relatives(u, x.i); !slices.Equal(got, x.want) {
			t.Errorf("%+v: %q, want %q", x.i, got, x.want)
		}
	}
}

// TestCloneAttached: this host's daemon is asked to look at what it has attached; if it does
// not do what it is asked for in time there is no clone.
func TestCloneAttached(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	url := store + "/vm1"
	must(t, "create", url, "--size", "1M")
	must(t, "snap", "create", url+"@monday")
	owned(t, url)
	info := printed[described](t, "info", url)
	d := newStubDaemon(t)
	for _, images := range [][]api.Image{nil, {{ID: 3, ImageID: info.ID}}} {
		d.attach(images...)
		_, err := lsdctlWith(t, d.socket, nil, "clone", url, "vm2", "--timeout", "600ms")
		if err == nil || !strings.HasPrefix(err.Error(), url+": busy, which has the image attached, has not made ") || !strings.Contains(err.Error(), "it is withdrawn") {
			t.Errorf("clone: %v", err)
		}
		if d.refreshed() != (images != nil) {
			t.Errorf("refreshed: %v, attached: %v", d.refreshed(), images)
		}
	}
	if i := printed[described](t, "info", url); len(i.Clones) != 0 {
		t.Errorf("clones: %+v", i.Clones)
	}
	if _, err := lsdctl(t, "info", store+"/vm2"); err == nil {
		t.Error("there is a clone")
	}
	// A snapshot is there already: nobody is asked.
	d.attach(api.Image{ID: 3, ImageID: info.ID})
	if _, err := lsdctlWith(t, d.socket, nil, "clone", url+"@monday", "vm2"); err != nil || d.refreshed() {
		t.Errorf("clone: %v, refreshed: %v", err, d.refreshed())
	}
}

// TestRollbackCommand: an image becomes what it was, unless another host has it attached; what
// this host has attached is its daemon's to roll back.
func TestRollbackCommand(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "20G")
	must(t, "snap", "create", url+"@monday")
	must(t, "snap", "create", url+"@tuesday")
	for _, snap := range []string{"monday", "tuesday", "monday"} {
		out := must(t, "snap", "rollback", url+"@"+snap)
		if !strings.HasPrefix(out, url+" is now what it was at "+snap+", made on ") || !strings.HasSuffix(out, ": 20 GiB\n") {
			t.Errorf("snap rollback: %q", out)
		}
	}
	if got := snapNames(t, url); !slices.Equal(got, []string{"monday", "tuesday"}) {
		t.Errorf("snapshots: %q", got)
	}
	owned(t, url)
	d := newStubDaemon(t)
	info := printed[described](t, "info", url)
	snap := api.Image{ID: 4, Device: "/dev/ublkb4", ImageID: info.ID, Snapshot: info.Snapshots[0].ID, ReadOnly: true}
	for _, x := range []struct {
		images []api.Image
		want   string
	}{
		{nil, url + ": it is attached by busy: lsdctl del it there first"},
		{[]api.Image{snap}, url + ": it is attached by busy: lsdctl del it there first"},
	} {
		d.attach(x.images...)
		if _, err := lsdctlWith(t, d.socket, nil, "snap", "rollback", url+"@monday"); err == nil || err.Error() != x.want {
			t.Errorf("snap rollback: %v, want %s", err, x.want)
		}
	}
	d.attach(snap, api.Image{ID: 3, Device: "/dev/ublkb3", ImageID: info.ID}) // then it is the daemon's
	if _, err := lsdctlWith(t, d.socket, nil, "snap", "rollback", url+"@monday"); err != nil || !d.was("POST /v1/images/3/rollback") {
		t.Errorf("snap rollback: %v", err)
	}
	if _, err := lsdctlWith(t, d.socket, nil, "snap", "rollback", url+"@sunday"); err == nil || !strings.Contains(err.Error(), "no such snapshot: sunday") {
		t.Errorf("snap rollback to nothing: %v", err)
	}
	if i := printed[described](t, "info", url); i.Epoch != info.Epoch || i.Owner == nil {
		t.Errorf("info: %+v", i)
	}
}

// leave leaves in a store a clone of vm1 that was not made to its end, and a removed image
// whose removal has not come to its end; two objects each make of them.
func leave(t *testing.T, store string, st backend.Store) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	lost := printed[cloned](t, "clone", store+"/vm1", "lost")
	must(t, "create", store+"/half", "--size", "1M")
	half := printed[described](t, "info", store+"/half")
	for _, key := range []string{half.ID.String() + "/d/00000001.1", half.ID.String() + "/d/00000002.1"} {
		if err := st.Put(ctx, key, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	id, err := engine.Remove(ctx, st, "half", engine.RemoveOptions{})
	if err != nil || id != half.ID {
		t.Fatal(id, err)
	}
	if _, err := engine.Reclaim(ctx, st, id, func(int, int) { stop() }); err == nil {
		t.Fatal("all of it was reclaimed")
	}
	if err := backend.Unlink(context.Background(), st, "lost", lost.ID); err != nil {
		t.Fatal(err)
	}
}

// TestGCCommand: what is left behind is told first, and removed when that is asked for.
func TestGCCommand(t *testing.T) {
	dir := t.TempDir()
	store := "file://" + dir + "/store"
	must(t, "create", store+"/vm1", "--size", "1M")
	must(t, "clone", store+"/vm1", "vm2")
	st := opened(t, store)
	leave(t, store, st)
	before := snapshot(t, dir)
	out := must(t, "gc", store, "--age", "1ns")
	if got := fields(t, out, 0); !slices.Equal(got, []string{"NAME", "WHAT", "OBJECTS"}) {
		t.Errorf("gc: %q", out)
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 5 {
		t.Fatalf("gc: %q", out)
	}
	slices.Sort(lines[1:3]) // by their ids, which are random
	if !strings.HasPrefix(lines[1], "half  it was removed") || !strings.HasPrefix(lines[2], "lost  it was not made") ||
		!strings.HasSuffix(lines[1], " 2") || !strings.HasSuffix(lines[2], " 1") ||
		lines[3] != "nothing was changed: lsdctl gc "+store+" --age 1ns --remove would remove all that: 3 objects" {
		t.Errorf("gc: %q", out)
	}
	if got := printed[[]engine.Garbage](t, "gc", store, "--age", "1ns"); len(got) != 2 {
		t.Errorf("gc --json: %+v", got)
	}
	if got := printed[[]engine.Garbage](t, "gc", store); len(got) != 1 || got[0].Name != "half" || got[0].Image == uuid.Nil {
		t.Errorf("gc of what is older than an hour: %+v", got)
	}
	if after := snapshot(t, dir); after != before {
		t.Errorf("files before:\n%safter:\n%s", before, after)
	}
	if out := must(t, "gc", store, "--age", "1ns", "--remove"); !strings.HasSuffix(out, "\nremoved 3 objects\n") {
		t.Errorf("gc --remove: %q", out)
	}
	if out := must(t, "gc", store, "--age", "1ns"); out != "nothing is left behind\n" {
		t.Errorf("gc again: %q", out)
	}
	if got := printed[[]child](t, "children", store+"/vm1"); len(got) != 1 || got[0].Name != "vm2" {
		t.Errorf("children: %+v", got)
	}
	must(t, "rm", store+"/vm1")
	must(t, "check", store+"/vm2", "--deep")
	must(t, "rm", store+"/vm2")
	if got := objects(t, st); len(got) > 0 {
		t.Errorf("objects: %q", got)
	}
}

// TestGCLostNames: without names nothing is garbage.
func TestGCLostNames(t *testing.T) {
	dir := t.TempDir()
	store := "file://" + dir + "/store"
	must(t, "create", store+"/vm1", "--size", "1M")
	must(t, "clone", store+"/vm1", "vm2")
	if err := opened(t, store).Delete(context.Background(), backend.DirectoryKey); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, filepath.Join(dir, "store"))
	_, err := lsdctl(t, "gc", store, "--remove", "--age", "1ns")
	if err == nil || !strings.Contains(err.Error(), "the directory of names is missing") || !strings.Contains(err.Error(), "see lsdctl check "+store) {
		t.Errorf("gc: %v", err)
	}
	if after := snapshot(t, filepath.Join(dir, "store")); after != before {
		t.Errorf("files before:\n%safter:\n%s", before, after)
	}
}
