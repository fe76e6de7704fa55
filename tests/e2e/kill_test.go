//go:build e2e

package e2e

import (
	"context"
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var killRounds = flag.Int("e2e.kills", 0, "rounds of TestKill, if that is more than it has anyway; every third has two kills")

// TestKill kills the daemon again and again under fio, which must not notice
// anything but a pause.
func TestKill(t *testing.T) {
	clearKernelLog(t)
	h := newHost(t, "kill")
	url := storeURL(t) + "/disk"
	h.create(url, "2G")
	dev := h.add(url)
	stopWatch := watchNode(t, dev)
	defer stopWatch()

	// Verified as they go and again at their end, one after the other until the
	// last kill is over.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type outcome struct {
		runs int
		err  error
	}
	ended := make(chan outcome, 1)
	go func() {
		var o outcome
		for ctx.Err() == nil && o.err == nil {
			o.runs++
			args := append([]string{"--name=x", "--filename=" + dev, "--direct=1", "--ioengine=libaio", "--allow_file_create=0"},
				mixed(o.runs, pick("24M", "96M"), "--verify_backlog=64", "--do_verify=1")...)
			o.err = execute(5*time.Minute, nil, "fio", args...).err()
		}
		ended <- o
	}()
	// Beside fio: writes that time the pause, and tell after each kill what is
	// there. Each time in a new place, where no later write covers a loss.
	rounds := max(pick(5, 20), *killRounds)
	plans := make([]stampPlan, rounds)
	acked := make([]vector, len(plans))
	var pauses []time.Duration
	kills, writes := 0, uint64(0)
	for n := range plans {
		plans[n] = stampPlan{Seed: uint64(n), Slots: 32, Pause: 1000, Base: 1<<30 + int64(n)<<24}
		s := startStamps(t, dev, plans[n])
		s.awaitWrites(uint64(50+rand.IntN(150)), time.Minute)
		s.board.Longest.Store(0)
		pid := h.pid()
		h.crash()
		kills++
		if n%3 == 1 {
			// Once more, while the next one is taking everything up.
			eventually(t, 30*time.Second, "a new daemon", func() bool { p := h.pid(); return p != 0 && p != pid })
			time.Sleep(time.Duration(rand.IntN(800)) * time.Millisecond)
			h.crash()
			kills++
		}
		// Each of the writers waits for its write at that moment, or soon after.
		s.awaitWrites(4*stampWriters, time.Minute)
		pauses = append(pauses, time.Duration(s.board.Longest.Load()))
		acked[n] = s.stop()
		writes += acked[n].sum()
		if got := stamps(t, dev, plans[n]); got != acked[n] {
			t.Fatalf("after kill %d the disk holds %v, acknowledged were %v\n%s", kills, got, acked[n], h.logTail())
		}
		select {
		case o := <-ended:
			t.Fatalf("fio ended: %v\n%s", o.err, h.logTail())
		default:
		}
	}
	cancel()
	o := <-ended
	if o.err != nil {
		t.Fatalf("run %d of fio: %v\n%s", o.runs, o.err, h.logTail())
	}
	stopWatch()
	im := h.awaitActive(dev)
	if im.Stats.ReadErrors != 0 {
		t.Errorf("%d read errors", im.Stats.ReadErrors)
	}
	if e := kernelErrors(t, dev); len(e) > 0 {
		t.Errorf("the kernel reports: %q", e)
	}
	h.del(dev)
	dev = h.add(url)
	fio(t, dev, 5*time.Minute, mixed(o.runs, pick("24M", "96M"), "--verify_only")...)
	for n, p := range plans {
		if got := stamps(t, dev, p); got != acked[n] {
			t.Errorf("after all kills, and from the store alone, the disk holds %v, acknowledged were %v", got, acked[n])
		}
	}
	h.del(dev)
	slices.Sort(pauses)
	t.Logf("%d kills, %d runs of fio, %d stamped writes; pause of a write: median %v, longest %v", kills, o.runs, writes,
		pauses[len(pauses)/2].Round(time.Millisecond), pauses[len(pauses)-1].Round(time.Millisecond))
}
