package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"golang.org/x/sys/unix"
)

func TestParseDevice(t *testing.T) {
	for in, want := range map[string]int{"0": 0, "7": 7, "ublkb3": 3, "/dev/ublkb12": 12, "lib0": 1 << 20, "lib12": 1<<20 + 12} {
		if got, err := parseDevice(in); err != nil || got != want {
			t.Errorf("parseDevice(%q) = %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "-1", "/dev/sda", "ublkb", "ublkc0", "/dev/ublkb0p1", "1.5", "99999999999", "lib", "lib-1", "lib99999999"} {
		if got, err := parseDevice(in); err == nil {
			t.Errorf("parseDevice(%q) = %d", in, got)
		}
	}
}

// lsdctl runs a command line as the program would, with a daemon that is not
// there.
func lsdctl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return lsdctlWith(t, filepath.Join(t.TempDir(), "sock"), nil, args...)
}

// lsdctlWith is lsdctl with a daemon at the socket, and a file system that is frozen by
// freeze instead of the kernel, if that is not nil.
func lsdctlWith(t *testing.T, socket string, freeze func(string) (func() error, error), args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	a := newApp(&out, null)
	if freeze != nil {
		a.freeze = freeze
	}
	cmd := a.command()
	cmd.SetArgs(append(args, "--socket", socket, "--state-dir", filepath.Join(t.TempDir(), "state")))
	cmd.SetErr(&out)
	err = cmd.ExecuteContext(context.Background())
	return out.String(), err
}

func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := lsdctl(t, args...)
	if err != nil {
		t.Fatalf("lsdctl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// TestBadInput: each is refused with one line that has the given words, and
// changes nothing in the store.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	store := "file://" + dir + "/store"
	must(t, "create", store+"/there", "--size", "1M")
	must(t, "snap", "create", store+"/there@monday")
	must(t, "create", store+"/other", "--size", "1M")
	if err := os.MkdirAll(dir+"/other/x", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/short", []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, dir)
	for _, c := range []struct{ args, want string }{
		{"nonsense", "no command"},
		{"create", "STORE/IMAGE is missing"},
		{"create " + store + "/a", "--size is missing"},
		{"create " + store + "/a --size 0", "size 0"},
		{"create " + store + "/a --size 1000", "not a multiple"},
		{"create " + store + "/a --size 65T", "limit"},
		{"create " + store + "/a --size 16E", "limits"},
		{"create " + store + "/a --size -5", "not a size"},
		{"create " + store + "/a --size 1M --block-size 1024", "512 or 4096"},
		{"create " + store + "/a --size 1M --block-size 4G", "limits"},
		{"create " + store + "/a --size 1M --object-size 3", "object size"},
		{"create " + store + "/a --size 64T --object-size 1M", "needs 8388608"},
		{"create " + store + "/a --size 1M --colour red", "unknown flag"},
		{"create " + store + "/a b --size 1M", "too much"},
		{"create " + store + "/there --size 1M", "exists already"},
		{"create " + store + "/-a --size 1M", "image name"},
		{"create file://" + dir + "/other/a --size 1M", "not an lsd store"},
		{"create file://" + dir + "/new/a --size 0", "size 0"}, // and no new store
		{"resize " + store + "/there", "SIZE is missing"},
		{"resize " + store + "/there 0 --allow-shrink", "size 0"},
		{"resize " + store + "/there 65T", "limit"},
		{"resize " + store + "/there 1000000000", "not a multiple"},
		{"resize " + store + "/there ten", "size ten"},
		{"resize " + store + "/there 4K", "--allow-shrink"},
		{"resize " + store + "/none 2M", "no such image"},
		{"resize " + store + "/there@monday 2M", "image name"},
		{"create vm1 --size 1M", "not a URL"},
		{"create http://x/y --size 1M", "unknown scheme"},
		{"create file://x --size 1M", "absolute path"},
		{"create rados://rbd --size 1M", "names no image"},
		{"create rados://rbd/a?conf=" + dir + "/none --size 1M", "conf"},
		{"ls", "STORE is missing"},
		{"ls file://" + dir + "/none", "no store"},
		{"info " + store + "/none", "no such image"},
		{"rm " + store + "/none", "no such image"},
		{"rm file://" + dir + "/none/x", "no store"},
		{"add", "STORE/IMAGE is missing"},
		{"add vm1", "not a URL"},
		{"add mem:x", "tests"},
		{"create mem:x --size 1M", "tests"},
		{"ls mem:x", "tests"},
		{"info mem:x/y", "tests"},
		{"rm mem:x/y", "tests"},
		{"check mem:x/y", "tests"},
		{"log forget mem:x/y --all", "tests"},
		{"diff mem:x/y", "tests"},
		{"export mem:x/y " + dir + "/new", "tests"},
		{"export-diff mem:x/y " + dir + "/new", "tests"},
		{"export " + store + "/there", "FILE is missing"},
		{"export " + store + "/there " + dir + "/new --format vmdk", "raw or qcow2"},
		{"export " + store + "/there - --format qcow2", "standard output"},
		{"export " + store + "/there " + dir + "/short", "exists already"},
		{"export " + store + "/none " + dir + "/new", "no such image"},
		{"export-diff " + store + "/there@none " + dir + "/new", "no such snapshot"},
		{"export-diff " + store + "/there " + dir + "/new --from none", "no such snapshot"},
		{"export-diff " + store + "/there " + dir + "/new --from @monday", "snapshot name"},
		{"export-diff " + store + "/there " + dir + "/short", "exists already"},
		{"log salvage " + dir + "/other mem:x/y", "tests"},
		{"add " + store + "/there --queues 0", "--queues"},
		{"add " + store + "/there --depth 0", "--depth"},
		{"add " + store + "/there --log-size 0", "space"},
		{"add " + store + "/there --log-size x", "not a size"},
		{"add " + store + "/there --lease -1s", "negative"},
		{"add " + store + "/there --id -2", "--id -2: it must be from 0 to 1048575, or -1"},
		{"add " + store + "/there --id 1048576", "--id 1048576"},
		{"add " + store + "/there --id x", `--id "x": it is a whole number`},
		{"add " + store + "/there --size 1G", "an image has its own"},
		{"create " + store + "/there/a --size 1M", "inside the store"},
		{"add --null x", "too much"},
		{"add --null --size 0", "size 0"},
		{"list", "no lsdd answers"},
		{"status", "no lsdd answers"},
		{"status x", "not an lsd device"},
		{"flush 0", "no lsdd answers"},
		{"flush /dev/sda", "not an lsd device"},
		{"del", "DEVICE is missing"},
		{"del 0", "no lsdd answers"},
		{"del 0 --timeout 0s", "--timeout"},
		{"del 0 --timeout fast", "--timeout"},
		{"status 0 1", `"1" is too much`},
		{"help nonsense", "no command"},
		{"shutdown --timeout -1s", "--timeout -1s"},
		{"shutdown", "no lsdd answers"},
		{"daemon", "no lsdd answers"},
		{"log nonsense", "no command"},
		{"log ls --cache " + dir + "/none", "no such file"},
		{"log ls " + dir + "/none", "no such file"},
		{"log ls " + dir + "/short", dir + "/short: write log is corrupt: it is too short"},
		{"log ls " + dir + "/other", "neither a file nor a block device"},
		{"log ls /dev/null", "neither a file nor a block device"},
		{"log salvage " + dir + "/short " + store + "/new", "too short"},
		{"add " + store + "/there@monday", "a snapshot can be attached with --read-only alone"},
		{"add " + store + "/there --shared --read-only", "goes neither with --read-only nor"},
		{"add --null --shared", "goes neither with --read-only nor"},
		{"add " + store + "/there@ --read-only", "empty snapshot name"},
		{"add mem:x@y --read-only", "tests"},
		{"create " + store + "/new@monday --size 1M", "an image is wanted here"},
		{"info " + store + "/there@monday", "an image is wanted here"},
		{"rm " + store + "/there@monday", "an image is wanted here"},
		{"rm " + store + "/other --wait --no-wait", "give one of them"},
		{"rm " + store + "/other --wait=maybe", "--wait"},
		{"rm " + store + "/there", store + "/there: it has 1 snapshot, which would go with it: remove them first, or say --snapshots"},
		{"rename", "STORE/IMAGE is missing"},
		{"rename " + store + "/there", "NEW is missing"},
		{"rename " + store + "/none new", store + "/none: no such image"},
		{"rename " + store + "/none@monday new", "an image is wanted here"},
		{"rename " + store + "/there other", store + "/other exists already"},
		{"rename " + store + "/there there", store + "/there exists already"},
		{"rename " + store + "/there " + store + "/other", store + "/other exists already"},
		{"rename " + store + "/there file://" + dir + "/new/there", "both must be in the same store"},
		{"rename " + store + "/there +new", "begins with"},
		{"rename " + store + "/there new@monday", "bad image name"},
		{"rename " + store + "/there " + store + "/new@monday", "an image is wanted here"},
		{"rename " + store + "/there " + strings.Repeat("x", 97), "the limit is 96"},
		{"rename file://" + dir + "/none/x y", "no store"},
		{"rename mem:x y", "tests"},
		{"trash nonsense", "no command"},
		{"trash mv", "STORE/IMAGE is missing"},
		{"trash mv " + store + "/none", store + "/none: no such image"},
		{"trash mv " + store + "/there --for -1h", "it must be from 0"},
		{"trash mv " + store + "/there --for 2000000h", "it must be from 0"},
		{"trash mv " + store + "/~2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0", "begins with"},
		{"trash mv mem:x", "tests"},
		{"trash ls " + store + " x", "x"},
		{"trash ls file://" + dir + "/none", "no store"},
		{"trash restore", "STORE/ID is missing"},
		{"trash restore " + store + "/there", "there is not in the trash of " + store},
		{"trash restore " + store + "/2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0", "is not in the trash of " + store + ": see lsdctl trash ls"},
		{"trash restore " + store + "/there file://" + dir + "/new/there", "both must be in the same store"},
		{"trash restore " + store + "/there@monday", "is a snapshot's URL"},
		{"trash restore " + store + "/there a b", "b"},
		{"trash rm " + store + "/there", "there is not in the trash of " + store},
		{"trash rm " + store + "/there --wait --no-wait", "give one of them"},
		{"trash purge " + store + " --within -1h", "it must be 0 or more"},
		{"trash purge file://" + dir + "/none", "no store"},
		{"rename " + store + "/there ~2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0", "begins with"},
		{"create " + store + "/~2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0 --size 1M", "begins with"},
		{"snap nonsense", "no command"},
		{"snap create", "STORE/IMAGE@SNAPSHOT is missing"},
		{"snap create " + store + "/there", "names no snapshot"},
		{"snap create " + store + "/there@", "empty snapshot name"},
		{"snap create " + store + "/@monday", "empty image name"},
		{"snap create " + store + "/there@a@b", "bad snapshot name"},
		{"snap create " + store + "/there@-a", "begins with"},
		{"snap create " + store + "/there@" + strings.Repeat("x", 97), "snapshot name of 97 bytes: the limit is 96"},
		{"snap create " + store + "/there@monday", store + "/there@monday exists already: choose another name, or see lsdctl snap ls " + store + "/there"},
		{"snap create " + store + "/there@monday --freeze /proc", "exists already"},
		{"snap create " + store + "/none@monday", store + "/none: no such image"},
		{"snap create file://" + dir + "/none/x@monday", "no store"},
		{"snap create mem:x@monday", "tests"},
		{"snap create there@monday", "not a URL"},
		{"snap create " + store + "/there@new --timeout 0s", "--timeout 0s: it must be longer than 0"},
		{"snap create " + store + "/there@new --timeout -1s", "--timeout -1s"},
		{"snap create " + store + "/there@new --freeze=", "--freeze needs a mount point"},
		{"snap create " + store + "/there@new --freeze " + dir + "/none", "no such file"},
		{"snap create " + store + "/there@new --freeze " + dir + "/short", "not a directory"},
		{"snap create " + store + "/there@new --freeze " + dir + "/other/x", dir + "/other/x is not a mount point"},
		{"snap create " + store + "/there@new --freeze /proc", "/proc cannot be frozen"},
		{"snap ls", "STORE/IMAGE is missing"},
		{"snap ls " + store + "/none", "no such image"},
		{"snap ls " + store + "/there@monday", "an image is wanted here"},
		{"snap ls mem:x", "tests"},
		{"snap rm", "STORE/IMAGE@SNAPSHOT is missing"},
		{"snap rm " + store + "/there", "names no snapshot"},
		{"snap rm " + store + "/there@none", store + "/there: no such snapshot: none: see lsdctl snap ls " + store + "/there"},
		{"snap rm " + store + "/none@monday", store + "/none: no such image"},
		{"snap rm mem:x@y", "tests"},
		{"snap rename " + store + "/there@monday", "NEW is missing"},
		{"meta get " + store + "/there", "KEY is missing"},
		{"meta get " + store + "/there none", "there is no metadata of that key: none"},
		{"meta ls " + store + "/none", "no such image"},
		{"meta set " + store + "/there k", "VALUE is missing"},
		{"meta rm " + store + "/there", "KEY is missing"},
		{"meta rm " + store + "/there none", "there is no metadata of that key: none"},
		{"lock break " + store + "/there client.1", "COOKIE is missing"},
		{"lock break " + store + "/there client.1 c", "there is no such lock"},
		{"lock ls " + store + "/none", "no such image"},
		{"snap rename " + store + "/there@none new", "no such snapshot: none: see lsdctl snap ls"},
		{"snap rename " + store + "/none@monday new", "no such image"},
		{"snap rename " + store + "/there monday", "names no snapshot"},
		{"snap rename " + store + "/there@monday monday", "there is a snapshot of that name already: monday"},
		{"snap rename " + store + "/there@monday a@b", "bad snapshot name"},
		{"snap rename " + store + "/there@monday +a", "begins with"},
		{"snap rename " + store + "/there@monday " + strings.Repeat("x", 97), "the limit is 96"},
		{"snap rename " + store + "/there@monday " + store + "/other@tuesday", "of another image"},
		{"snap rename " + store + "/there@monday file://" + dir + "/new/there@tuesday", "of another image"},
		{"snap rename " + store + "/there@monday " + store + "/there", "names no snapshot"},
		{"snap rename mem:x@y z", "tests"},
		{"snap rollback", "STORE/IMAGE@SNAPSHOT is missing"},
		{"snap rollback " + store + "/there", "names no snapshot"},
		{"snap rollback " + store + "/there@", "empty snapshot name"},
		{"snap rollback " + store + "/there@none", store + "/there: no such snapshot: none: see lsdctl snap ls " + store + "/there"},
		{"snap rollback " + store + "/none@monday", store + "/none: no such image: see lsdctl ls " + store},
		{"snap rollback " + store + "/there@monday x", "too much"},
		{"snap rollback file://" + dir + "/none/x@y", "no store"},
		{"snap rollback mem:x@y", "tests"},
		{"clone", "STORE/IMAGE[@SNAPSHOT] is missing"},
		{"clone " + store + "/there", "STORE/NEW is missing"},
		{"clone " + store + "/there new x", "too much"},
		{"clone there new", "not a URL"},
		{"clone " + store + "/none new", store + "/none: no such image: see lsdctl ls " + store},
		{"clone " + store + "/none@monday new", store + "/none: no such image"},
		{"clone " + store + "/there@none new", store + "/there: no such snapshot: none: see lsdctl snap ls " + store + "/there"},
		{"clone " + store + "/there@ new", "empty snapshot name"},
		{"clone " + store + "/there other", store + "/other exists already: choose another name, or see lsdctl info"},
		{"clone " + store + "/there there", store + "/there exists already"},
		{"clone " + store + "/there@monday " + store + "/other", store + "/other exists already"},
		{"clone " + store + "/there file://" + dir + "/new/x", "both must be in the same store"},
		{"clone " + store + "/there@monday new@monday", "bad image name"},
		{"clone " + store + "/there " + store + "/new@monday", "an image is wanted here"},
		{"clone " + store + "/there -new", "unknown shorthand flag"},
		{"clone " + store + "/there +new", "begins with"},
		{"clone " + store + "/there " + strings.Repeat("x", 97), "the limit is 96"},
		{"clone " + store + "/there new --timeout 0s", "--timeout 0s: it must be longer than 0"},
		{"clone " + store + "/there new --timeout fast", "--timeout"},
		{"clone file://" + dir + "/none/x y", "no store"},
		{"clone mem:x y", "tests"},
		{"flatten", "STORE/IMAGE is missing"},
		{"flatten " + store + "/there x", "too much"},
		{"flatten there", "not a URL"},
		{"flatten " + store + "/none", store + "/none: no such image: see lsdctl ls " + store},
		{"flatten " + store + "/there@monday", "an image is wanted here"},
		{"flatten file://" + dir + "/none/x", "no store"},
		{"flatten mem:x", "tests"},
		{"children", "STORE/IMAGE is missing"},
		{"children " + store + "/none", store + "/none: no such image"},
		{"children " + store + "/there@monday", "an image is wanted here"},
		{"children mem:x", "tests"},
		{"df", "STORE is missing"},
		{"df " + store + " x", "too much"},
		{"df file://" + dir + "/none", "no store"},
		{"df mem:x", "tests"},
		{"tree", "STORE[/IMAGE] is missing"},
		{"tree " + store + " x", "too much"},
		{"tree " + store + "/none", "neither an image nor a store"},
		{"tree file://" + dir + "/other", "neither an image nor a store"},
		{"tree " + store + "/there@monday", "neither an image nor a store"},
		{"tree mem:x/y", "tests"},
		{"tree vm1", "not a URL"},
		{"gc", "STORE is missing"},
		{"gc " + store + " x", "too much"},
		{"gc file://" + dir + "/none", "no store"},
		{"gc " + store + "/there", "no store"},
		{"gc " + store + " --age 0s", "--age 0s: it must be longer than 0"},
		{"gc " + store + " --age -1h", "--age -1h"},
		{"gc " + store + " --age old", "--age"},
		{"gc mem:x", "tests"},
		{"log forget", "STORE/IMAGE is missing"},
		{"log forget " + store + "/there", "--all"},
		{"log forget " + store + "/there x y", `"y" is too much`},
		{"log forget file://" + dir + "/none/x --all", "no store"},
	} {
		out, err := lsdctl(t, strings.Fields(c.args)...)
		if err == nil {
			t.Errorf("lsdctl %s: no error", c.args)
			continue
		}
		line := api.OneLine(err)
		if !strings.Contains(line, c.want) || strings.Contains(line, "\n") || len(line) > 400 {
			t.Errorf("lsdctl %s: %q does not say %q", c.args, line, c.want)
		}
		if out != "" {
			t.Errorf("lsdctl %s: printed %q", c.args, out)
		}
	}
	if after := snapshot(t, dir); after != before {
		t.Errorf("files before:\n%safter:\n%s", before, after)
	}
}

// snapshot lists the files below dir that are not a store's scratch space.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && !strings.Contains(path, "/store/tmp") && !strings.Contains(path, "/store/locks") {
			b.WriteString(path + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestStoreCommands(t *testing.T) {
	store := "file://" + t.TempDir() + "/store"
	if out := must(t, "create", store+"/vm1", "--size", "20G", "--block-size", "512"); !strings.Contains(out, "made the store") {
		t.Errorf("create: %s", out)
	}
	if out := must(t, "create", store+"/vm2", "--size", "1.5G"); strings.Contains(out, "made the store") {
		t.Errorf("second create: %s", out)
	}
	var list []listed
	if err := json.Unmarshal([]byte(must(t, "ls", store, "--json")), &list); err != nil || len(list) != 2 || list[1].Size != 3<<29 {
		t.Errorf("ls: %+v, %v", list, err)
	}
	if out := must(t, "info", store+"/vm1"); !strings.Contains(out, "20 GiB") || !strings.Contains(out, "nobody") {
		t.Errorf("info: %s", out)
	}
	must(t, "rm", store+"/vm1")
	if out := must(t, "ls", store); strings.Contains(out, "vm1") || !strings.Contains(out, "vm2") {
		t.Errorf("ls: %s", out)
	}
}

// TestCorrupt: a damaged superblock is told, and can be removed.
func TestCorrupt(t *testing.T) {
	dir := t.TempDir()
	store := "file://" + dir + "/store"
	must(t, "create", store+"/vm1", "--size", "1M")
	found, err := filepath.Glob(dir + "/store/objects/*/super*")
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	b, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-3] ^= 1
	if err := os.WriteFile(found[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"info", store + "/vm1"}, {"rm", store + "/vm1"}} {
		if _, err := lsdctl(t, args...); err == nil || !strings.Contains(err.Error(), "corrupt") {
			t.Errorf("lsdctl %v: %v", args, err)
		}
	}
	if out := must(t, "ls", store); !strings.Contains(out, "corrupt") {
		t.Errorf("ls: %s", out)
	}
	if out := must(t, "rm", store+"/vm1", "--force"); !strings.HasPrefix(out, "removed "+store+"/vm1\nreclaimed its space") {
		t.Errorf("rm --force: %q", out)
	}
}

// TestHelp: every command has an example and a line about itself.
func TestHelp(t *testing.T) {
	root := newApp(&bytes.Buffer{}, os.Stderr).command()
	for _, c := range root.Commands() {
		if c.Short == "" || c.Example == "" && !c.HasSubCommands() {
			t.Errorf("%s has no help", c.CommandPath())
		}
		for _, s := range c.Commands() {
			if s.Short == "" || s.Example == "" {
				t.Errorf("%s has no help", s.CommandPath())
			}
		}
	}
}

// TestSecondSignal: a command that cannot heed a signal ends with another one.
func TestSecondSignal(t *testing.T) {
	if os.Getenv("LSDCTL_HANG") != "" {
		untilSignal()
		fmt.Println("waiting")
		select {}
	}
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run", "^TestSecondSignal$")
	cmd.Env = append(os.Environ(), "LSDCTL_HANG=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !bufio.NewScanner(out).Scan() {
		t.Fatal("it says nothing")
	}
	ended := make(chan error)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGINT {
				t.Errorf("it ended with %v", err)
			}
			return
		case <-time.After(20 * time.Millisecond):
			_ = cmd.Process.Signal(unix.SIGINT) // it may have ended
		}
	}
}
