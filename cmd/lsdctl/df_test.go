package main

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
)

// family makes a store with an image golden, whose snapshot v3 was cloned as vm1 and vm2, of which
// the first was cloned as try and removed, and an image plain beside them.
func family(t *testing.T) (store string) {
	t.Helper()
	store = "file://" + t.TempDir() + "/store"
	must(t, "create", store+"/plain", "--size", "1G")
	must(t, "create", store+"/golden", "--size", "20G")
	must(t, "snap", "create", store+"/golden@v3")
	must(t, "clone", store+"/golden@v3", "vm2")
	must(t, "clone", store+"/golden@v3", "vm1")
	must(t, "clone", store+"/vm1", "try")
	must(t, "rm", store+"/vm1", "--no-wait")
	return store
}

// TestDfCommand: df tells of each image, and of all, and of what it does not count.
func TestDfCommand(t *testing.T) {
	store := family(t)
	st := opened(t, store)
	id := printed[described](t, "info", store+"/plain").ID
	if err := st.Put(context.Background(), id.String()+"/d/00000001.9", make([]byte, 8192)); err != nil { // nobody's
		t.Fatal(err)
	}
	out := must(t, "df", store)
	if got := fields(t, out, 0); !slices.Equal(got, []string{"NAME", "PROVISIONED", "LIVE", "SNAPSHOTS", "SHARED", "ALONE", "RECLAIMABLE", "METADATA"}) {
		t.Errorf("df: %q", out)
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 9 || lines[8] != "" {
		t.Fatalf("df: %q", out)
	}
	var first []string
	for _, l := range lines[1:7] {
		first = append(first, strings.Join(strings.Fields(l)[:3], " "))
	}
	if want := []string{"golden 20 GiB", "plain 1 GiB", "try 20 GiB", "vm1 (removed) 0", "vm2 20 GiB", "TOTAL 61 GiB"}; !slices.Equal(first, want) {
		t.Errorf("df: %q, want %q", first, want)
	}
	if got := strings.Join(strings.Fields(lines[2]), " "); got != "plain 1 GiB 0 B 0 B 0 B 0 B 8 KiB 4 KiB" {
		t.Errorf("df: %q", got)
	}
	u := printed[engine.StoreUsage](t, "df", store)
	stored := uint64(0)
	for _, key := range append(objects(t, st), "directory") {
		is, err := st.Stat(context.Background(), key)
		if err != nil {
			t.Fatal(err)
		}
		stored += uint64(is.Size)
	}
	if u.Stored != stored || u.Objects != 7 || len(u.Images) != 5 || u.Total.Reclaimable != 8192 || u.Total.Provisioned != 61<<30 {
		t.Errorf("df --json: %+v, want %d bytes", u, stored)
	}
	if !strings.HasPrefix(lines[7], "the store holds ") || !strings.HasSuffix(lines[7], " in 7 objects") {
		t.Errorf("df: %q", lines[7])
	}
}

// TestDfDamaged: df says of what it does not know whether anything needs it.
func TestDfDamaged(t *testing.T) {
	store := family(t)
	st := opened(t, store)
	id := printed[described](t, "info", store+"/plain").ID
	if err := st.Put(context.Background(), id.String()+"/d/00000001.1", make([]byte, 8192)); err != nil {
		t.Fatal(err)
	}
	if err := st.Put(context.Background(), "strange", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := st.Delete(context.Background(), engine.SuperblockKey(id)); err != nil {
		t.Fatal(err)
	}
	out := must(t, "df", store)
	for _, want := range []string{"of 8 KiB of these it is not known", "1 object that lsd has not made", "what plain needs is not known: it has no superblock"} {
		if !strings.Contains(out, want) {
			t.Errorf("df: %q does not say %q", out, want)
		}
	}
}

// TestTreeCommand: clones are below what they were cloned from, sorted, with what they begin as.
func TestTreeCommand(t *testing.T) {
	store := family(t)
	must(t, "clone", store+"/golden", "vm0")
	tables := map[string]string{
		store: `NAME CLONED FROM
golden -
├─ vm0 @v3
├─ vm1 (removed) @v3
│  └─ try as of
└─ vm2 @v3
plain -`,
		store + "/try": `NAME CLONED FROM
golden -
├─ vm0 @v3
├─ vm1 (removed) @v3
│  └─ try * as of
└─ vm2 @v3`,
		store + "/plain": `NAME CLONED FROM
plain * -`,
	}
	for url, want := range tables {
		out := must(t, "tree", url)
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		wanted := strings.Split(want, "\n")
		if len(lines) != len(wanted) {
			t.Errorf("tree %s: %s", url, out)
			continue
		}
		for i, l := range lines {
			if !strings.HasPrefix(squeezed(l), squeezed(wanted[i])+" ") {
				t.Errorf("tree %s: %q, want %q", url, l, wanted[i])
			}
		}
		if !strings.HasSuffix(lines[0], "PROVISIONED  ALONE  SHARED") || !strings.HasSuffix(lines[1], "0 B    0 B") {
			t.Errorf("tree %s: %s", url, out)
		}
	}
	trees := printed[[]*tree](t, "tree", store+"/try")
	if len(trees) != 1 || trees[0].Name != "golden" || trees[0].Marked || len(trees[0].Clones) != 3 {
		t.Fatalf("tree --json: %+v", trees)
	}
	vm1 := trees[0].Clones[1]
	if vm1.Name != "vm1" || !vm1.Removed || vm1.Snapshot != "v3" || vm1.Parent != trees[0].ID || len(vm1.Clones) != 1 || !vm1.Clones[0].Marked {
		t.Errorf("tree --json: %+v", vm1)
	}
	must(t, "snap", "rm", store+"/golden@v3")
	if out := must(t, "tree", store); strings.Contains(out, "@v3") {
		t.Errorf("tree: %s", out)
	}
	must(t, "rm", store+"/golden")
	must(t, "rm", store+"/try")
	if out := must(t, "tree", store); strings.Contains(out, "try") || !strings.Contains(out, "vm2") {
		t.Errorf("tree: %s", out)
	}
}

// squeezed returns a line with single spaces.
func squeezed(s string) string { return strings.Join(strings.Fields(s), " ") }

// TestTreeLoops: images that are their own ancestors, as damaged superblocks may say, are shown.
func TestTreeLoops(t *testing.T) {
	store := family(t)
	images := printed[engine.StoreUsage](t, "df", store).Images
	for i := range images {
		images[i].Parent = images[(i+1)%len(images)].ID
	}
	if trees := growTrees(images, images[0].ID); len(trees) != len(images) {
		t.Errorf("%d trees", len(trees))
	}
	images[0].Parent = images[0].ID
	if trees := growTrees(images, images[0].ID); len(trees) == 0 {
		t.Error("no tree")
	}
}
