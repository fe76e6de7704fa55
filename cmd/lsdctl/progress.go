package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"golang.org/x/sys/unix"
)

// A progress shows how far something has come, once it has taken a second: as a bar
// on one line of a terminal, else on a line every few seconds.
type progress struct {
	w       io.Writer
	tty     bool
	columns func() int // of the terminal; 0 if that is not known
	held    bool       // nothing is shown
	began   time.Time
	last    time.Time
	width   int // of what is on the line

	// What is being done, since when, and how much of it was done then.
	what  string
	since time.Time
	from  uint64
}

const (
	progressAfter = time.Second
	progressEvery = 3 * time.Second        // for a new line
	progressMoves = 100 * time.Millisecond // for a line of a terminal
	progressBar   = 24                     // columns
)

func newProgress(f *os.File) *progress {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &progress{w: f, tty: err == nil, began: time.Now(), columns: func() int {
		size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
		if err != nil {
			return 0
		}
		return int(size.Col)
	}}
}

// show shows p if it is time.
func (g *progress) show(p api.Progress) { g.showAt(p, time.Now()) }

// hold keeps everything from being shown, or ends that.
func (g *progress) hold(on bool) { g.held = on }

func (g *progress) showAt(p api.Progress, now time.Time) {
	if g.held {
		return
	}
	if p.What != g.what || p.Done < g.from || g.since.IsZero() {
		g.what, g.since, g.from = p.What, now, p.Done
	}
	every := progressEvery
	if g.tty {
		every = progressMoves
	}
	if now.Sub(g.began) < progressAfter || now.Sub(g.last) < every {
		return
	}
	g.last = now
	pace := g.pace(p, now.Sub(g.since))
	switch {
	case g.tty:
		g.redraw(p, pace)
	case p.Total > 0:
		fmt.Fprintf(g.w, "%s: %s, %d%%%s\n", p.What, amount(p), percent(p), pace)
	default:
		fmt.Fprintln(g.w, p.What)
	}
}

// redraw shows p on the terminal's line, which it must not leave.
func (g *progress) redraw(p api.Progress, pace string) {
	rest := ""
	if p.Total > 0 {
		full := int(min(p.Done, p.Total) * progressBar / p.Total)
		rest = fmt.Sprintf(" [%s%s] %d%%, %s%s", strings.Repeat("#", full), strings.Repeat("-", progressBar-full), percent(p), amount(p), pace)
	}
	what := []rune(p.What)
	if columns := g.columns(); columns > 0 {
		// The end of a name says more than its beginning.
		what = what[max(len(what)-max(columns-1-len(rest), 0), 0):]
		rest = rest[:min(len(rest), columns-1)]
	}
	width := len(what) + len(rest)
	fmt.Fprintf(g.w, "\r%s%s%s", string(what), rest, strings.Repeat(" ", max(g.width-width, 0)))
	g.width = width
}

func percent(p api.Progress) uint64 { return p.Done * 100 / p.Total }

func amount(p api.Progress) string {
	return bytesize.Human(p.Done) + " of " + bytesize.Human(p.Total)
}

// pace tells how fast p goes on, after some time, and how long that will be.
func (g *progress) pace(p api.Progress, d time.Duration) string {
	done := p.Done - g.from
	if p.Total == 0 || done == 0 || d < progressAfter {
		return ""
	}
	rate := float64(done) / d.Seconds()
	left := time.Duration(float64(p.Total-min(p.Done, p.Total)) / rate * float64(time.Second))
	return fmt.Sprintf(", %s/s, %v left", bytesize.Human(uint64(rate)), left.Round(time.Second))
}

// end clears the line.
func (g *progress) end() {
	if g.width > 0 {
		fmt.Fprintf(g.w, "\r%s\r", strings.Repeat(" ", g.width))
		g.width = 0
	}
}
