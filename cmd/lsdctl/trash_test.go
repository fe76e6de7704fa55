package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
)

// TestTrashCommands: an image goes to the trash and comes back, by its id or by the name that it
// had, and is removed from there when it need not be kept any more.
func TestTrashCommands(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	for _, name := range []string{"vm1", "vm2"} {
		must(t, "create", store+"/"+name, "--size", "1M")
	}
	must(t, "snap", "create", store+"/vm1@s")
	must(t, "clone", store+"/vm1@s", "child")
	id := printed[described](t, "info", store+"/vm1").ID
	moved := printed[engine.Trashed](t, "trash", "mv", store+"/vm1", "--for", "1h")
	if moved.ID != id || moved.Name != "vm1" || moved.Until.Sub(moved.Since) != time.Hour {
		t.Errorf("moved %+v", moved)
	}
	if list := printed[[]listed](t, "ls", store); len(list) != 2 || list[0].Name != "child" || list[1].Name != "vm2" {
		t.Errorf("ls: %+v", list)
	}
	if list := printed[[]engine.Trashed](t, "trash", "ls", store); len(list) != 1 || list[0] != moved {
		t.Errorf("trash ls: %+v", list)
	}
	if out := must(t, "trash", "ls", store); !strings.Contains(out, id.String()+"  vm1") {
		t.Errorf("trash ls: %s", out)
	}
	for _, cmd := range []string{"df", "tree"} {
		if out := must(t, cmd, store); !strings.Contains(out, "vm1 (in the trash)") {
			t.Errorf("%s: %s", cmd, out)
		}
	}
	if out := must(t, "check", store); !strings.Contains(out, "2 images, and 1 in the trash") {
		t.Errorf("check: %s", out)
	}
	must(t, "clone", store+"/~"+id.String()+"@s", "second")
	must(t, "rm", store+"/second")

	must(t, "create", store+"/vm1", "--size", "1M")
	for args, want := range map[string]string{
		"trash restore " + store + "/vm1":               "there is another vm1 now",
		"trash restore " + store + "/vm1 vm2":           store + "/vm2 exists already",
		"trash rm " + store + "/vm1 --snapshots":        "it is to be kept until ",
		"trash rm " + store + "/vm1 --force":            "it has 1 snapshot",
		"trash rm " + store + "/" + uuid.New().String(): "is not in the trash",
	} {
		if _, err := lsdctl(t, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("lsdctl %s: %v; want %q", args, err, want)
		}
	}
	if out := must(t, "trash", "restore", store+"/"+id.String(), "back"); !strings.Contains(out, store+"/back is back") {
		t.Errorf("restore: %s", out)
	}
	if got := printed[described](t, "info", store+"/back").ID; got != id {
		t.Errorf("restored %v, not %v", got, id)
	}
	must(t, "trash", "mv", store+"/vm1")
	must(t, "rename", store+"/back", "vm1")
	must(t, "trash", "mv", store+"/vm1", "--for", "1h")
	if _, err := lsdctl(t, "trash", "restore", store+"/vm1"); err == nil || !strings.Contains(err.Error(), "2 images in the trash of "+store+" were called vm1") {
		t.Errorf("restored one of two: %v", err)
	}
	if r := printed[removedImage](t, "trash", "rm", store+"/~"+id.String(), "--force", "--snapshots", "--wait"); r.ID != id || r.Name != "vm1" || r.Space != spaceReclaimed {
		t.Errorf("trash rm: %+v", r)
	}
	if out := must(t, "trash", "rm", store+"/vm1"); !strings.HasPrefix(out, "removed vm1, ") {
		t.Errorf("trash rm: %s", out)
	}
	if list := printed[[]engine.Trashed](t, "trash", "ls", store); len(list) != 0 {
		t.Errorf("trash ls: %+v", list)
	}
}

// TestTrashAttached: an image that is attached is moved with force alone, and is not removed.
func TestTrashAttached(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	must(t, "create", store+"/vm1", "--size", "1M")
	im, detach := openedImage(t, store+"/vm1")
	if im == nil {
		t.Fatal("not open")
	}
	must(t, "trash", "mv", store+"/vm1", "--force")
	if list := printed[[]engine.Trashed](t, "trash", "ls", store); len(list) != 1 || list[0].Owner == "" {
		t.Errorf("trash ls: %+v", list)
	}
	detach()
	must(t, "trash", "rm", store+"/vm1")
}

// TestTrashPurge: a purge removes what need not be kept any more, and leaves and names what has
// snapshots.
func TestTrashPurge(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	for _, name := range []string{"now", "later", "snapped"} {
		must(t, "create", store+"/"+name, "--size", "1M")
	}
	must(t, "snap", "create", store+"/snapped@s")
	must(t, "trash", "mv", store+"/now")
	must(t, "trash", "mv", store+"/snapped")
	must(t, "trash", "mv", store+"/later", "--for", "1h")
	names := func() (list []string) {
		for _, x := range printed[[]engine.Trashed](t, "trash", "ls", store) {
			list = append(list, x.Name)
		}
		return list
	}
	if list := printed[[]engine.Trashed](t, "trash", "purge", store, "--dry-run"); len(list) != 2 || len(names()) != 3 {
		t.Errorf("purge would remove %+v, has left %v", list, names())
	}
	out, err := lsdctl(t, "trash", "purge", store)
	if err == nil || err.Error() != "1 image could not be removed" || !strings.Contains(out, "left snapped, ") || !strings.Contains(out, "removed now, ") || !strings.Contains(out, "removed 1 image from the trash") {
		t.Errorf("purge: %q, %v", out, err)
	}
	must(t, "trash", "rm", store+"/snapped", "--snapshots")
	if out := must(t, "trash", "purge", store); !strings.Contains(out, "removed 0 images") || len(names()) != 1 {
		t.Errorf("purge: %q, left %v", out, names())
	}
	if list := printed[[]removedImage](t, "trash", "purge", store, "--within", "2h"); len(list) != 1 || list[0].Name != "later" || len(names()) != 0 {
		t.Errorf("purge: %+v, left %v", list, names())
	}
	if left, err := backend.Names(context.Background(), opened(t, store)); err != nil || len(left) != 0 {
		t.Errorf("names: %v, %v", left, err)
	}
}
