package boottime

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestNow compares with what the kernel says of itself: /proc/uptime counts the
// sleep too.
func TestNow(t *testing.T) {
	uptime := func() time.Duration {
		b, err := os.ReadFile("/proc/uptime")
		if err != nil {
			t.Fatal(err)
		}
		s, err := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(s * float64(time.Second))
	}
	const grain = 10 * time.Millisecond // of /proc/uptime
	before := uptime()
	now := Now()
	after := uptime()
	if now < before-grain || now > after+2*grain {
		t.Errorf("Now is %v, the host is up for %v to %v", now, before, after)
	}
	if later := Now(); later < now {
		t.Errorf("the clock went back from %v to %v", now, later)
	}
}

func TestNowAllocs(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { Now() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkNow(b *testing.B) {
	for b.Loop() {
		Now()
	}
}
