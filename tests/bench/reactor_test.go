package bench

import (
	"flag"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/lsd-ceph/lsd/internal/reactor"
)

var (
	dir     = flag.String("bench.dir", "", "directory on the disk to measure (default: the temporary directory)")
	rounds  = flag.Int("bench.rounds", 5, "turns that each side takes")
	seconds = flag.Int("bench.seconds", 3, "length of a turn")
)

// environment joins a reactor to the engine.
type environment struct{ *reactor.Reactor }

func (e environment) AfterFunc(d time.Duration, fn func()) engine.Timer {
	return e.Reactor.AfterFunc(d, fn)
}

func (environment) LeaseUntil(time.Duration) {}

// What is measured runs as the daemon does.
func init() { daemon.SpareProcessors() }

func newReactor(b *testing.B) *reactor.Reactor {
	b.Helper()
	r, err := reactor.New(reactor.Config{Name: "bench", Nice: daemon.ReactorNice, Spin: daemon.ReactorSpin()})
	if err != nil {
		b.Fatal(err)
	}
	return r
}

func call(b *testing.B, r *reactor.Reactor, fn func()) {
	b.Helper()
	if err := r.Call(fn); err != nil {
		b.Fatal(err)
	}
}
