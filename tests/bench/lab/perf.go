package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Perf counts events with perf stat.
type Perf struct {
	h      *Host
	events []string
}

// Perf returns what counts these events on this machine. Those after them it counts only if it can.
func (h *Host) Perf(ctx context.Context, must []string, may ...string) (*Perf, error) {
	if _, err := exec.LookPath("perf"); err != nil {
		return nil, errors.New("perf is not there: install linux-perf")
	}
	p := &Perf{h, slices.Concat(must, may)}
	args, out := p.args("probe")
	if _, err := h.Run(ctx, args[0], append(args[1:], "--", "true")...); err != nil {
		return nil, err
	}
	can, err := readPerf(out)
	if err != nil {
		return nil, err
	}
	p.events = nil
	for i, name := range slices.Concat(must, may) {
		if _, ok := can[name]; ok {
			p.events = append(p.events, name)
		} else if i < len(must) {
			return nil, fmt.Errorf("perf cannot count %s here: that takes root, and tracefs at /sys/kernel/tracing", name)
		}
	}
	return p, nil
}

// Counts reports whether it counts an event.
func (p *Perf) Counts(event string) bool {
	return slices.Contains(p.events, event)
}

// args returns the beginning of a command, and the file into which it writes what it has counted.
func (p *Perf) args(name string) (args []string, out string) {
	out = filepath.Join(p.h.Dir, "perf."+name)
	_ = os.Remove(out) // of an earlier time
	return []string{"perf", "stat", "-x", ",", "-o", out, "-e", strings.Join(p.events, ",")}, out
}

// Around returns the command that runs a program, and counts its events. What is called after its
// end returns them.
func (p *Perf) Around(program ...string) (args []string, counted func() (map[string]float64, error)) {
	args, out := p.args("program")
	return append(append(args, "--"), program...), func() (map[string]float64, error) { return readPerf(out) }
}

// Attach begins to count the events of a process that runs. What it returns ends that, once.
func (p *Perf) Attach(ctx context.Context, pid int) (counted func() (map[string]float64, error), err error) {
	args, out := p.args("process")
	var said bytes.Buffer
	cmd := p.h.Command(ctx, args[0], append(args[1:], "-p", strconv.Itoa(pid))...)
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	time.Sleep(300 * time.Millisecond) // it does not tell when it has begun
	return func() (map[string]float64, error) {
		_ = cmd.Process.Signal(os.Interrupt)
		err := cmd.Wait()
		// It may end itself by the signal that it was told to end with.
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			return nil, fmt.Errorf("perf: %w", err)
		}
		c, err := readPerf(out)
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
		}
		return c, nil
	}, nil
}

func readPerf(path string) (map[string]float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parsePerf(f)
}

// parsePerf returns the events that perf stat -x, has counted: lines of a number, its unit, the
// event's name and more. What it cannot count has no number.
func parsePerf(text io.Reader) (map[string]float64, error) {
	counts := map[string]float64{}
	s := bufio.NewScanner(text)
	for s.Scan() {
		fields := strings.Split(s.Text(), ",")
		if strings.HasPrefix(s.Text(), "#") || len(fields) < 3 || strings.HasPrefix(fields[0], "<") {
			continue
		}
		n, err := strconv.ParseFloat(fields[0], 64)
		if err != nil {
			return nil, fmt.Errorf("perf says %q", s.Text())
		}
		counts[fields[2]] = n
	}
	if s.Err() == nil && len(counts) == 0 {
		return nil, errors.New("perf has counted nothing")
	}
	return counts, s.Err()
}
