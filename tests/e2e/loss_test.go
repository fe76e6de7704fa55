//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

var powerCut = flag.String("e2e.powercut", "", "load: write until the power goes; check: what is left after that")

// TestJudge: the check of the stamps, which the tests rely on, finds what it is
// for.
func TestJudge(t *testing.T) {
	p := stampPlan{Seed: 3, Slots: 4}
	// apply leaves on a disk what the first n writes leave, the writers taking
	// turns, but for those that skip names; half is written in part.
	apply := func(n int, skip func(w int, k uint64) bool, half func(w int, k uint64) bool) []stamp {
		found := make([]stamp, p.size()/stampBlock)
		var acked vector
		for range n {
			for w := range stampWriters {
				k := acked[w] + 1
				offset, _, blocks := p.place(w, k)
				if half(w, k) {
					blocks /= 2
				}
				if !skip(w, k) {
					for b := range blocks {
						found[int(offset)/stampBlock+b] = stamp{Magic: stampMagic, Seed: p.Seed, Writer: uint64(w), Write: k, Block: uint64(b), Acked: acked}
					}
				}
				acked[w] = k
			}
		}
		return found
	}
	never := func(int, uint64) bool { return false }
	last, err := p.judge(apply(50, never, never))
	if err != nil || last != (vector{50, 50, 50, 50, 50, 50, 50, 50}) {
		t.Errorf("a whole disk: %v, %v", last, err)
	}
	if last, err = p.judge(apply(0, never, never)); err != nil || last.sum() != 0 {
		t.Errorf("an empty disk: %v, %v", last, err)
	}
	// The end of the order is missing: a prefix.
	if last, err = p.judge(apply(50, func(w int, k uint64) bool { return k > 49 && w > 2 }, never)); err != nil || last.sum() != 50*8-5 {
		t.Errorf("a prefix: %v, %v", last, err)
	}
	if _, err = p.judge(apply(50, func(w int, k uint64) bool { return k == 50 && w == 2 }, never)); err == nil {
		t.Error("a hole just before the end was not seen")
	}
	if _, err = p.judge(apply(50, func(w int, k uint64) bool { return w == 3 && k > 30 }, never)); err == nil {
		t.Error("a writer that stopped early was not seen")
	}
	holes, torn := 0, 0
	for k := uint64(45); k <= 50; k++ {
		_, slot, blocks := p.place(1, k)
		covered := false
		for later := k + 1; later <= 50; later++ {
			_, s, n := p.place(1, later)
			covered = covered || s == slot && n >= blocks
		}
		if covered {
			continue
		}
		_, err := p.judge(apply(50, func(w int, x uint64) bool { return w == 1 && x == k }, never))
		if err == nil {
			t.Errorf("write %d is missing, which was not seen", k)
		}
		holes++
		if blocks > 1 {
			if _, err := p.judge(apply(50, never, func(w int, x uint64) bool { return w == 1 && x == k })); err == nil {
				t.Errorf("write %d is there by half, which was not seen", k)
			}
			torn++
		}
	}
	if holes == 0 || torn == 0 {
		t.Errorf("%d holes, %d torn writes tried", holes, torn)
	}
}

// TestLostLog kills a host under load and takes its log away. The image opens on
// another host at a prefix, which holds all that had reached the store.
func TestLostLog(t *testing.T) {
	store := storeURL(t)
	for n := range pick(1, 6) {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			url := fmt.Sprintf("%s/disk%d", store, n)
			h := newHost(t, "lost")
			h.create(url, "1G")
			dev := h.add(url, "--lease", "2s", "--batch-age", "2s")
			plan := stampPlan{Seed: uint64(n), Slots: 16, Pause: 500}
			s := startStamps(t, dev, plan)
			s.awaitWrites(uint64(pick(300, 1000+700*n)), 3*time.Minute)
			before := s.acked()
			h.must("flush", dev)
			s.awaitWrites(uint64(pick(100, 100+300*n)), time.Minute)
			im := h.status(dev)
			h.die()
			begun, acked := read(&s.board.Begun), s.acked()
			aside := filepath.Join(ssdDir, "taken-away.log")
			if err := os.Rename(im.Log, aside); err != nil {
				t.Fatal(err)
			}
			defer os.Remove(aside)

			other := newHost(t, "finder")
			other.refused(other.addArgs(url, "--lease", "2s"), `attached by lost`, `--force`)
			found := other.add(url, "--force", "--lease", "2s")
			last := stamps(t, found, plan)
			atLeast(t, "what lsdctl flush had brought into the store", last, before)
			atLeast(t, "what was written at all", begun, last)
			t.Logf("%d of %d acknowledged writes are there, %d had to be", last.sum(), acked.sum(), before.sum())
			// It goes on from there.
			s2 := startStamps(t, found, stampPlan{Seed: 99, Slots: 16, Base: 512 << 20})
			s2.awaitWrites(50, time.Minute)
			acked = s2.stop()
			other.del(found)

			// The first host comes back: without its log it does not serve, and says
			// why; its users go on waiting until somebody decides.
			h.start()
			im = h.awaitStatus(dev, time.Minute, "it says that its log is missing", func(im api.Image) bool {
				return im.State != "active" && strings.Contains(im.Error, "log")
			})
			if !s.running() {
				t.Error("the writer on the first host got an error although nobody had decided that")
			}
			h.del(dev, "--force", "--timeout", "5s")
			if r := s.wait(time.Minute); r.failed == nil || !strings.Contains(r.stderr, "input/output error") {
				t.Errorf("the writer on the first host ended with %v", r.err())
			}
			found = other.add(url)
			if got := stamps(t, found, plan); got != last {
				t.Errorf("the image holds %v now, and held %v", got, last)
			}
			atLeast(t, "what was written on the second host", stamps(t, found, stampPlan{Seed: 99, Slots: 16, Base: 512 << 20}), acked)
			other.del(found)
		})
	}
}

// powerState is what the boot before the power cut leaves to the one after.
type powerState struct {
	URL, Dev string
	Plan     stampPlan
}

// TestPowerCut cuts the machine's power under load. What a completed flush or a
// FUA write covers is there afterwards, and the rest is a prefix.
func TestPowerCut(t *testing.T) {
	note := filepath.Join(*outDir, "powercut.json")
	switch *powerCut {
	case "load":
		h := newHost(t, "power")
		ps := powerState{URL: storeURL(t) + "/disk"}
		h.create(ps.URL, "1G")
		ps.Dev = h.add(ps.URL, "--lease", "10s", "--batch-age", "1s")
		ps.Plan = stampPlan{Seed: 9, Slots: 32, Sync: 50, FUA: true, Log: filepath.Join(*outDir, "promises")}
		b, err := json.Marshal(ps)
		if err == nil {
			err = os.WriteFile(note, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		s := startStamps(t, ps.Dev, ps.Plan)
		s.awaitWrites(uint64(pick(500, 5000)), 3*time.Minute)
		if read(&s.board.Flushed).sum() == 0 {
			t.Fatal("no flush has completed")
		}
		askHost(t, "power-cut")
		t.Error("the power is still on")
	case "check":
		b, err := os.ReadFile(note)
		if err != nil {
			t.Fatal(err)
		}
		var ps powerState
		if err := json.Unmarshal(b, &ps); err != nil {
			t.Fatal(err)
		}
		promised, lines, err := ps.Plan.promised()
		if err != nil || promised.sum() == 0 {
			t.Fatalf("nothing was promised: %v, %v", promised, err)
		}
		h := newHost(t, "power")
		h.awaitActive(ps.Dev) // by itself, under the same number
		last := stamps(t, ps.Dev, ps.Plan)
		atLeast(t, "what was flushed before the power cut", last, promised)
		t.Logf("%d writes are there, %d had to be, after %d flushes and FUA writes", last.sum(), promised.sum(), lines)
		h.del(ps.Dev)
		dev := h.add(ps.URL)
		if got := stamps(t, dev, ps.Plan); got != last {
			t.Errorf("from the store: %v, not %v", got, last)
		}
		h.del(dev)
	default:
		t.Fatal(errors.New("a power cut needs two boots: run it with scripts/e2e"))
	}
}
