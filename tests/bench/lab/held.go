package lab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Held is what a process has, or has had at the most.
type Held struct {
	Memory  float64 // resident, bytes
	Threads float64
}

// HeldBy returns what a process has now.
func HeldBy(pid int) (Held, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Held{}, err
	}
	return parseStatus(string(text))
}

// parseStatus returns what /proc/PID/status says.
func parseStatus(text string) (h Held, err error) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "Threads" {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
		if err != nil {
			return h, fmt.Errorf("a process's status: %w", err)
		}
		if name == "VmRSS" {
			h.Memory = n * 1024
		} else {
			h.Threads = n
		}
	}
	return h, nil
}

// Most returns the larger of both in everything.
func (h Held) Most(x Held) Held { return Held{max(h.Memory, x.Memory), max(h.Threads, x.Threads)} }

// Add returns what both have together.
func (h Held) Add(x Held) Held { return Held{h.Memory + x.Memory, h.Threads + x.Threads} }

// RunFioLooking is RunFio. It looks meanwhile at what that command has, and some other processes,
// and returns what each of them had at the most, the command first.
func RunFioLooking(cmd *exec.Cmd, others ...int) (Fio, []Held, error) {
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Start(); err != nil {
		return Fio{}, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	pids := append([]int{cmd.Process.Pid}, others...)
	most := make([]Held, len(pids))
	for {
		select {
		case err := <-ended:
			if err != nil {
				return Fio{}, nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(said.String()))
			}
			f, err := parseFio(out.String())
			f.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			return f, most, err
		case <-time.After(50 * time.Millisecond):
		}
		for i, pid := range pids {
			if h, err := HeldBy(pid); err == nil { // else it has ended
				most[i] = most[i].Most(h)
			}
		}
	}
}
