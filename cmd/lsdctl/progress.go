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

// A progress shows how far something has come, once it has taken a second: on
// one line of a terminal, else on a line every few seconds.
type progress struct {
	w     io.Writer
	tty   bool
	began time.Time
	last  time.Time
	width int // of what is on the line
}

const (
	progressAfter = time.Second
	progressEvery = 3 * time.Second
)

func newProgress(f *os.File) *progress {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &progress{w: f, tty: err == nil, began: time.Now()}
}

// show shows p if it is time.
func (g *progress) show(p api.Progress) {
	now := time.Now()
	if now.Sub(g.began) < progressAfter {
		return
	}
	if !g.tty && now.Sub(g.last) < progressEvery {
		return
	}
	g.last = now
	text := p.What
	if p.Total > 0 {
		text = fmt.Sprintf("%s: %s of %s, %d%%", p.What, bytesize.Human(p.Done), bytesize.Human(p.Total), p.Done*100/p.Total)
	}
	if !g.tty {
		fmt.Fprintln(g.w, text)
		return
	}
	fmt.Fprintf(g.w, "\r%s%s", text, strings.Repeat(" ", max(g.width-len(text), 0)))
	g.width = len(text)
}

// end clears the line.
func (g *progress) end() {
	if g.width > 0 {
		fmt.Fprintf(g.w, "\r%s\r", strings.Repeat(" ", g.width))
		g.width = 0
	}
}
