//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

var (
	soakFor  = flag.Duration("e2e.soak", time.Minute, "how long TestSoak goes on")
	soakSeed = flag.Uint64("e2e.seed", 0, "what TestSoak does, and in which order; 0: any")
	soakOnly = flag.String("e2e.events", "", "a regular expression: TestSoak does only these events")
)

const (
	soakLease = 4 * time.Second
	soakAreas = 8
	soakSlots = 32
)

// soak is an image under load to which one thing after the other happens.
type soak struct {
	t     *testing.T
	h     *host
	rng   *rand.Rand
	url   string
	dev   string
	begin func() // of an outage of the store
	end   func()

	plans [soakAreas]stampPlan // of the areas, as they were written last
	acked [soakAreas]vector
	done  map[string]int

	stopLoad func() // ends fio, which must have found all as it had written it
	fioRuns  int
}

// TestSoak lets everything happen to one image that can, again and again, in an
// order that a seed decides: the log is small enough to be full, and so much is
// overwritten that the cleaner has work.
func TestSoak(t *testing.T) {
	clearKernelLog(t)
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	s := &soak{t: t, h: newHost(t, "soak"), rng: rand.New(rand.NewPCG(seed, 1)), done: map[string]int{}}
	var store string
	store, s.begin, s.end = outage(t)
	s.url = store + "/disk"
	s.h.create(s.url, "512M", "--object-size", "1M")
	s.attach()
	// Each of them once before chance decides, so that a short run has seen all.
	events := s.events()
	names := make([]string, 0, len(events))
	only, err := regexp.Compile(*soakOnly)
	if err != nil {
		t.Fatal(err)
	}
	for name := range events {
		if only.MatchString(name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		t.Fatalf("no event matches %q", only)
	}
	slices.Sort(names)
	order := s.rng.Perm(len(names))
	writes := uint64(0)
	for n, began := 0, time.Now(); n < len(order) || time.Since(began) < *soakFor; n++ {
		k := s.rng.IntN(len(names))
		if n < len(order) {
			k = order[n]
		}
		writes += s.episode(n, names[k], events[names[k]])
	}
	cleaned := s.finish()
	var what []string
	for _, name := range names {
		what = append(what, fmt.Sprintf("%s %d", name, s.done[name]))
	}
	t.Logf("seed %d: %v; %d stamped writes, %d runs of fio, the cleaner moved %d MiB; all of it verified, and the check found nothing",
		seed, strings.Join(what, ", "), writes, s.fioRuns, cleaned>>20)
}

// events returns what may happen while writers write.
func (s *soak) events() map[string]func() {
	pause := func(d time.Duration) {
		pid := s.h.pid()
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(d)
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			s.t.Fatal(err)
		}
	}
	some := func(most time.Duration) time.Duration { return time.Duration(s.rng.Int64N(int64(most))) }
	events := map[string]func(){
		"kill -9": s.h.crash,
		"kill -9 while it recovers": func() {
			pid := s.h.pid()
			s.h.crash()
			eventually(s.t, 30*time.Second, "a new daemon", func() bool { p := s.h.pid(); return p != 0 && p != pid })
			time.Sleep(some(time.Second))
			s.h.crash()
		},
		"pause within the lease": func() { pause(some(soakLease / 2)) },
		"pause beyond the lease": func() { pause(soakLease + some(soakLease)) },
		"outage":                 func() { s.begin(); time.Sleep(some(10 * time.Second)); s.end() },
		"kill -9 in an outage": func() {
			s.begin()
			time.Sleep(some(2 * time.Second))
			s.h.crash()
			time.Sleep(some(2 * time.Second))
			s.end()
		},
		"outage until writes wait": func() {
			s.begin()
			// The log is full, or the lease has run out.
			s.h.awaitStatus(s.dev, 3*time.Minute, "writes wait", func(im api.Image) bool {
				return im.Stats != nil && (im.Stats.Waiting > 0 || im.Stats.LeaseLeft == 0)
			})
			s.end()
		},
		"detach": nil, // see episode
	}
	if *storeKind == "rados" {
		events["OSD paused"] = func() { askHost(s.t, "ceph pause"); time.Sleep(some(8 * time.Second)); askHost(s.t, "ceph resume") }
		events["OSD killed"] = func() {
			askHost(s.t, "ceph kill-osd")
			time.Sleep(some(4 * time.Second))
			askHost(s.t, "ceph start-osd")
		}
	}
	return events
}

// episode lets one thing happen to stamped writes in an area of their own, all of
// which must be there afterwards.
func (s *soak) episode(n int, name string, event func()) uint64 {
	s.t.Helper()
	began := time.Now()
	if event == nil {
		s.detach()
		s.attach()
	}
	area := n % soakAreas
	p := stampPlan{Seed: uint64(n + 1), Slots: soakSlots, Pause: 500, Base: 256<<20 + int64(area)<<24}
	run(s.t, "blkdiscard", "-o", fmt.Sprint(p.Base), "-l", fmt.Sprint(p.size()), s.dev)
	w := startStamps(s.t, s.dev, p)
	w.awaitWrites(uint64(20+s.rng.IntN(200)), 2*time.Minute)
	if event != nil {
		event()
	}
	w.awaitWrites(4*stampWriters, 2*time.Minute)
	s.plans[area], s.acked[area] = p, w.stop()
	s.verify(area)
	s.done[name]++
	s.t.Logf("%3d: %s, %d writes, %v", n, name, s.acked[area].sum(), time.Since(began).Round(time.Millisecond))
	return s.acked[area].sum()
}

// verify checks what was written last in an area.
func (s *soak) verify(area int) {
	s.t.Helper()
	if s.plans[area].Slots == 0 {
		return
	}
	if got := stamps(s.t, s.dev, s.plans[area]); got != s.acked[area] {
		s.t.Fatalf("area %d holds %v, acknowledged were %v\n%s", area, got, s.acked[area], s.h.logTail())
	}
}

// attach attaches the image, checks all of it, and puts fio to work on it.
func (s *soak) attach() {
	s.t.Helper()
	s.dev = s.h.add(s.url, "--lease", soakLease.String(), "--batch-age", "500ms", "--store-timeout", "2s")
	for area := range s.plans {
		s.verify(area)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.t.Cleanup(cancel)
	ended := make(chan error, 1)
	first := s.fioRuns
	go func() {
		var err error
		runs := first
		for ctx.Err() == nil && err == nil {
			runs++
			args := append([]string{"--name=x", "--filename=" + s.dev, "--direct=1", "--ioengine=libaio", "--allow_file_create=0"},
				mixed(runs, "64M", "--verify_backlog=64", "--do_verify=1", "--rate_iops=400")...)
			err = execute(15*time.Minute, nil, "fio", args...).err()
		}
		s.fioRuns = runs
		ended <- err
	}()
	s.stopLoad = func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Fatalf("fio: %v\n%s", err, s.h.logTail())
		}
	}
}

func (s *soak) detach() {
	s.t.Helper()
	s.stopLoad()
	s.h.del(s.dev)
}

// finish checks everything from the store alone, and then the store. It returns
// what the cleaner has moved since the last start of the daemon.
func (s *soak) finish() uint64 {
	s.t.Helper()
	s.stopLoad()
	s.h.must("flush", s.dev)
	cleaned := s.h.awaitActive(s.dev).Stats.Cleaned
	s.h.del(s.dev)
	s.dev = s.h.add(s.url)
	for area := range s.plans {
		s.verify(area)
	}
	fio(s.t, s.dev, 5*time.Minute, mixed(s.fioRuns, "64M", "--verify_only")...)
	if im := s.h.status(s.dev); im.Stats.ReadErrors != 0 {
		s.t.Errorf("%d read errors", im.Stats.ReadErrors)
	}
	if e := kernelErrors(s.t, s.dev); len(e) > 0 {
		s.t.Errorf("the kernel reports: %q", e)
	}
	s.h.del(s.dev)
	s.h.must("check", s.url, "--deep")
	return cleaned
}
