//go:build e2e

package e2e

import (
	"cmp"
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
	// longLease outlasts an outage until the log is full, which takes a minute or two
	// in a VM that is emulated.
	longLease = 10 * time.Minute
	// fullLog is what may be free of a log that is full: the largest write does not fit,
	// neither into what is left of a segment nor into what is left of the log.
	fullLog   = 3 << 20
	soakAreas = 8
	soakSlots = 32

	// Where on the disk they are. fio has the beginning.
	soakArea = 256 << 20 // the first one
	soakFill = 400 << 20 // what is written to fill the log
)

// soak is an image under load to which one thing after the other happens.
type soak struct {
	t     *testing.T
	h     *host
	rng   *rand.Rand
	url   string
	dev   string
	lease time.Duration // with which it is attached
	begin func()        // of an outage of the store
	end   func()

	plans [soakAreas]stampPlan // of the areas, as they were written last
	acked [soakAreas]vector
	done  map[string]int

	stopLoad func() // ends fio, which must have found all as it had written it
	fioRuns  int
	fills    int // of the log, by fio
}

// soakEvent is what may happen to the image.
type soakEvent struct {
	lease time.Duration // with which the image must be attached; 0: soakLease
	// do is called while writers write, and returns what there is to say of it. nil:
	// the image is detached and attached.
	do func() string
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
	s.attach(soakLease)
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
func (s *soak) events() map[string]soakEvent {
	some := func(most time.Duration) time.Duration { return time.Duration(s.rng.Int64N(int64(most))) }
	quiet := func(do func()) soakEvent { return soakEvent{do: func() string { do(); return "" }} }
	events := map[string]soakEvent{
		"kill -9": quiet(s.h.crash),
		"kill -9 while it recovers": quiet(func() {
			pid := s.h.pid()
			s.h.crash()
			eventually(s.t, 30*time.Second, "a new daemon", func() bool { p := s.h.pid(); return p != 0 && p != pid })
			time.Sleep(some(time.Second))
			s.h.crash()
		}),
		"pause within the lease": quiet(func() { s.pause(some(soakLease / 2)) }),
		"pause beyond the lease": quiet(func() { s.pause(soakLease + some(soakLease)) }),
		"outage":                 quiet(func() { s.begin(); time.Sleep(some(10 * time.Second)); s.end() }),
		"kill -9 in an outage": quiet(func() {
			s.begin()
			time.Sleep(some(2 * time.Second))
			s.h.crash()
			time.Sleep(some(2 * time.Second))
			s.end()
		}),
		"outage until the lease is over": {do: s.leaseOver},
		"outage until the log is full":   {lease: longLease, do: s.logFull},
		"detach":                         {}, // see episode
	}
	if *storeKind == "rados" {
		events["OSD paused"] = quiet(func() { askHost(s.t, "ceph pause"); time.Sleep(some(8 * time.Second)); askHost(s.t, "ceph resume") })
		events["OSD killed"] = quiet(func() {
			askHost(s.t, "ceph kill-osd")
			time.Sleep(some(4 * time.Second))
			askHost(s.t, "ceph start-osd")
		})
	}
	return events
}

// pause stops the daemon for a while.
func (s *soak) pause(d time.Duration) {
	s.t.Helper()
	pid := s.h.pid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(d)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		s.t.Fatal(err)
	}
}

// leaseOver is an outage until the lease has run out, which it does before the log
// is full: writes are in the log then, and are not acknowledged.
func (s *soak) leaseOver() string {
	s.t.Helper()
	s.begin()
	im := s.h.awaitStatus(s.dev, 3*time.Minute, "the lease is over", func(im api.Image) bool {
		if *storeKind == "file" {
			s.begin() // or superblocks go on to replace one another in the last free block
		}
		return isActive(im) && im.Stats.LeaseLeft == 0
	})
	s.end()
	return fmt.Sprintf("%d of %d MiB of the log were used", im.Stats.LogUsed>>20, im.Stats.LogSize>>20)
}

// logFull is an outage until the log is full, under a lease that is good for longer:
// nothing more goes into the log, and writes wait for room in it. What is written
// for that, in large blocks since small ones would take minutes, ends and is verified
// when the store is back.
func (s *soak) logFull() string {
	s.t.Helper()
	s.begin()
	s.fills++
	fill, err := spawn(nil, "fio", s.fill("--do_verify=1")...)
	if err != nil {
		s.t.Fatal(err)
	}
	defer fill.kill()
	used, since := uint64(0), time.Now()
	im := s.h.awaitStatus(s.dev, 5*time.Minute, "the log is full", func(im api.Image) bool {
		if !isActive(im) {
			return false
		}
		// From half of the log on writes wait now and then, and go on at 1 MiB/s at least
		// as long as there is room.
		if im.Stats.LogUsed != used {
			used, since = im.Stats.LogUsed, time.Now()
		}
		return im.Stats.Waiting > 0 && time.Since(since) > 5*time.Second && used > im.Stats.LogSize-fullLog
	})
	s.end()
	if im.Stats.LeaseLeft == 0 || !im.Stats.StoreDown {
		s.t.Errorf("the log is full, and not because the store alone is away: %+v", im.Stats)
	}
	if err := fill.wait(5 * time.Minute).err(); err != nil {
		s.t.Fatalf("%v\n%s", err, s.h.logTail())
	}
	return fmt.Sprintf("%.1f of %d MiB of the log used, %d writes waited, %.0f s of the lease were left",
		float64(im.Stats.LogUsed)/(1<<20), im.Stats.LogSize>>20, im.Stats.Waiting, im.Stats.LeaseLeft)
}

// fill returns fio's arguments for writing more than the log holds.
func (s *soak) fill(more ...string) []string {
	return append([]string{
		"--name=fill", "--filename=" + s.dev, "--direct=1", "--ioengine=libaio", "--allow_file_create=0",
		"--rw=write", "--bs=1M", "--iodepth=8", fmt.Sprintf("--offset=%d", soakFill), "--size=96M",
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", fmt.Sprintf("--randseed=%d", s.fills),
	}, more...)
}

// episode lets one thing happen to stamped writes in an area of their own, all of
// which must be there afterwards.
func (s *soak) episode(n int, name string, event soakEvent) uint64 {
	s.t.Helper()
	began := time.Now()
	if lease := cmp.Or(event.lease, soakLease); event.do == nil || lease != s.lease {
		s.detach()
		s.attach(lease)
	}
	area := n % soakAreas
	p := stampPlan{Seed: uint64(n + 1), Slots: soakSlots, Pause: 500, Base: soakArea + int64(area)<<24}
	run(s.t, "blkdiscard", "-o", fmt.Sprint(p.Base), "-l", fmt.Sprint(p.size()), s.dev)
	w := startStamps(s.t, s.dev, p)
	w.awaitWrites(uint64(20+s.rng.IntN(200)), 2*time.Minute)
	if event.do != nil {
		if said := event.do(); said != "" {
			s.t.Logf("%3d: %s: %s", n, name, said)
		}
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
func (s *soak) attach(lease time.Duration) {
	s.t.Helper()
	s.lease = lease
	s.dev = s.h.add(s.url, "--lease", lease.String(), "--batch-age", "500ms", "--store-timeout", "2s")
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
	if s.fills > 0 {
		if err := execute(5*time.Minute, nil, "fio", s.fill("--verify_only")...).err(); err != nil {
			s.t.Fatal(err)
		}
	}
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
