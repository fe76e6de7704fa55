package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// TestProgress: a bar on a terminal, which stays on its line, and plain lines elsewhere.
func TestProgress(t *testing.T) {
	const gib = 1 << 30
	start := time.Unix(1000, 0)
	type step struct {
		at   time.Duration
		p    api.Progress
		want string // what is written then
	}
	check := func(done, total uint64) api.Progress {
		return api.Progress{What: "checking file:///srv/lsd/vm1", Done: done, Total: total}
	}
	for _, x := range []struct {
		name    string
		tty     bool
		columns int
		steps   []step
	}{
		{"terminal", true, 120, []step{
			{0, check(0, 4*gib), ""},
			{2 * time.Second, check(gib, 4*gib), "\rchecking file:///srv/lsd/vm1 [######------------------] 25%, 1 GiB of 4 GiB, 512 MiB/s, 6s left"},
			{2*time.Second + 1, check(2*gib, 4*gib), ""},
			{4 * time.Second, check(4*gib, 4*gib), "\rchecking file:///srv/lsd/vm1 [########################] 100%, 4 GiB of 4 GiB, 1 GiB/s, 0s left "},
		}},
		{"narrow terminal", true, 70, []step{
			{0, check(0, 4*gib), ""},
			{2 * time.Second, check(gib, 4*gib), "\rm1 [######------------------] 25%, 1 GiB of 4 GiB, 512 MiB/s, 6s left"},
			{3 * time.Second, api.Progress{What: "short"}, "\rshort" + strings.Repeat(" ", 64)},
		}},
		{"tiny terminal", true, 20, []step{
			{2 * time.Second, check(gib, 4*gib), "\r [######-----------"},
		}},
		{"terminal of unknown size", true, 0, []step{
			{2 * time.Second, check(0, 4*gib), "\rchecking file:///srv/lsd/vm1 [------------------------] 0%, 0 B of 4 GiB"},
		}},
		{"pipe", false, 0, []step{
			{0, check(0, 4*gib), ""},
			{time.Second / 2, check(gib/2, 4*gib), ""},
			{2 * time.Second, check(gib, 4*gib), "checking file:///srv/lsd/vm1: 1 GiB of 4 GiB, 25%, 512 MiB/s, 6s left\n"},
			{3 * time.Second, check(2*gib, 4*gib), ""},
			{8 * time.Second, check(2*gib, 4*gib), "checking file:///srv/lsd/vm1: 2 GiB of 4 GiB, 50%, 256 MiB/s, 8s left\n"},
			{12 * time.Second, api.Progress{What: "something else"}, "something else\n"},
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			var out bytes.Buffer
			g := &progress{w: &out, tty: x.tty, began: start, columns: func() int { return x.columns }}
			for _, s := range x.steps {
				out.Reset()
				g.showAt(s.p, start.Add(s.at))
				if got := out.String(); got != s.want {
					t.Errorf("after %v: %q, want %q", s.at, got, s.want)
				}
				if n := len(strings.TrimPrefix(out.String(), "\r")); x.columns > 0 && n >= x.columns {
					t.Errorf("after %v: %d characters on a line of %d", s.at, n, x.columns)
				}
			}
			out.Reset()
			g.end()
			if got := out.String(); x.tty != strings.HasSuffix(got, "\r") || x.tty == (got == "") {
				t.Errorf("at the end: %q", got)
			}
		})
	}
}
