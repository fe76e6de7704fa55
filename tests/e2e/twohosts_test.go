//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// TestTwoHosts: an image has one owner. Another host is refused; with --force
// the owner stops acknowledging, destages, lets go and says why.
func TestTwoHosts(t *testing.T) {
	first, second := newHost(t, "first"), newHost(t, "second")
	url := storeURL(t) + "/disk"
	first.create(url, "1G")
	dev := first.add(url, "--lease", "4s")
	plan := stampPlan{Seed: 7, Slots: 16, Pause: 500}
	s := startStamps(t, dev, plan)
	s.awaitWrites(200, time.Minute)
	epoch := first.status(dev).Stats.Epoch

	second.refused(second.addArgs(url, "--lease", "4s"), `attached by first\b`, `--force`)
	if l := second.list(); len(l) != 0 {
		t.Errorf("refused, and there: %+v", l)
	}
	if l, _ := filepath.Glob(filepath.Join(second.cache, "*.log*")); len(l) != 0 {
		t.Errorf("refused, and a log was left: %v", l)
	}
	second.refused([]string{"rm", url}, `attached by first\b`)
	s.awaitWrites(50, time.Minute) // the first one has not noticed

	found := second.add(url, "--lease", "4s", "--force")
	if r := s.wait(time.Minute); r.failed == nil || !strings.Contains(r.stderr, "input/output error") {
		t.Errorf("the writer on the first host ended with %v", r.err())
	}
	acked := s.acked()
	last := stamps(t, found, plan)
	atLeast(t, "what the first host had acknowledged", last, acked)
	atLeast(t, "what was written at all", read(&s.board.Begun), last)
	if now := second.status(found).Stats.Epoch; now <= epoch {
		t.Errorf("epoch %d after epoch %d", now, epoch)
	}

	im := first.awaitStatus(dev, time.Minute, "it says that it has let go", func(im api.Image) bool {
		return im.State == "released" || im.State == "fenced"
	})
	if !strings.Contains(im.Error, "second") || !strings.Contains(im.Error, "--force") || len(im.Advice) == 0 {
		t.Errorf("the first host does not say why it has let go: %q %q", im.Error, im.Advice)
	}
	if out := first.must("status", dev); !strings.Contains(out, "second") {
		t.Errorf("lsdctl status on the first host does not name the other one:\n%s", out)
	}
	// Reads fail there, too, at once.
	if r := plan.tool(t, "read", "-dev", dev, "-writer", "0", "-write", "1").wait(20 * time.Second); r.code != 1 || !strings.Contains(r.stderr, "input/output error") {
		t.Errorf("a read on the first host: %v", r.err())
	}
	first.del(dev)
	if got := stamps(t, found, plan); got != last {
		t.Errorf("the second host has %v, and had %v", got, last)
	}
	// Back again, in order.
	second.del(found)
	dev = first.add(url)
	if got := stamps(t, dev, plan); got != last {
		t.Errorf("back on the first host: %v, and was %v", got, last)
	}
	first.del(dev)
}

// TestStaleLog: a host dies with acknowledged writes in its log, another one
// takes the image. The log is refused, named and kept when the first host
// returns, and can be brought back as an image.
func TestStaleLog(t *testing.T) {
	first, second := newHost(t, "first"), newHost(t, "second")
	store := storeURL(t)
	url := store + "/disk"
	first.create(url, "1G")
	dev := first.add(url, "--lease", "2s", "--batch-age", "1h")
	// Something that both histories have, and something that only the log has.
	old := stampPlan{Seed: 20, Slots: 4, Base: 512 << 20}
	s := startStamps(t, dev, old)
	s.awaitWrites(100, time.Minute)
	common := s.stop()
	first.must("flush", dev)
	plan := stampPlan{Seed: 21, Slots: 16, Pause: 500}
	s = startStamps(t, dev, plan)
	s.awaitWrites(150, time.Minute)
	acked := s.stop()
	im := first.status(dev)
	if im.Stats.Dirty == 0 {
		t.Fatal("nothing is in the log alone")
	}
	first.die()

	found := second.add(url, "--lease", "2s", "--force")
	last := stamps(t, found, plan)
	atLeast(t, "what was acknowledged", acked, last)
	if last == acked {
		t.Fatal("everything was in the store: this tests nothing")
	}
	if got := stamps(t, found, old); got != common {
		t.Errorf("what was flushed: %v, want %v", got, common)
	}
	// A history of its own.
	branch := stampPlan{Seed: 22, Slots: 16, Pause: 500}
	s = startStamps(t, found, stampPlan{Seed: 22, Slots: 16, Base: 800 << 20})
	branch.Base = 800 << 20
	s.awaitWrites(50, time.Minute)
	branched := s.stop()

	first.start()
	im = first.awaitStatus(dev, time.Minute, "it refuses its log", func(im api.Image) bool { return im.State == api.StateFailed })
	for _, want := range []string{filepath.Base(im.Log), "epoch", "log salvage"} {
		if !strings.Contains(im.Error, want) {
			t.Errorf("the status does not say %q: %q", want, im.Error)
		}
	}
	if r := plan.tool(t, "read", "-dev", dev, "-writer", "0", "-write", "1").wait(20 * time.Second); r.code != 1 || !strings.Contains(r.stderr, "input/output error") {
		t.Errorf("a read of a device whose image is another's: %v", r.err())
	}
	first.del(dev)
	kept := func() {
		t.Helper()
		if _, err := os.Stat(im.Log); err != nil {
			t.Fatalf("the log was not kept: %v", err)
		}
	}
	kept()
	second.del(found)
	first.refused(first.addArgs(url), "epoch", "never reached the store", "log salvage", im.Log)
	first.refused(first.addArgs(url, "--force"), "epoch", "never reached the store", im.Log)
	kept()

	var logs []api.Log
	out := first.must("log", "ls", "--cache", first.cache, "--json")
	if err := json.Unmarshal([]byte(out), &logs); err != nil || len(logs) != 1 {
		t.Fatalf("lsdctl log ls: %v in %s", err, out)
	}
	l := logs[0]
	if l.Path != im.Log || l.Image != url || l.ImageID != im.ImageID || l.Epoch == 0 || l.Records == 0 || l.Data == 0 || l.InUse || l.State == "" {
		t.Errorf("lsdctl log ls: %+v, the log is %s", l, im.Log)
	}

	first.must("log", "salvage", im.Log, store+"/salvaged")
	kept()
	dev = first.add(store + "/salvaged")
	if got := stamps(t, dev, plan); got != acked {
		t.Errorf("the salvaged image holds %v, acknowledged were %v", got, acked)
	}
	if got := stamps(t, dev, old); got != common {
		t.Errorf("the salvaged image holds %v of what was flushed, %v were", got, common)
	}
	if got := stamps(t, dev, branch); got.sum() != 0 {
		t.Errorf("the salvaged image has %v of the other history", got)
	}
	first.del(dev)
	first.refused([]string{"log", "salvage", im.Log, store + "/salvaged"}, "exists|taken")

	// With the log out of the way the image itself is as the second host left it.
	if err := os.Rename(im.Log, im.Log+".old"); err != nil {
		t.Fatal(err)
	}
	dev = first.add(url)
	if got := stamps(t, dev, branch); got != branched {
		t.Errorf("the image holds %v of the second host's writes, not %v", got, branched)
	}
	first.del(dev)
}
