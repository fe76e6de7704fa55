package ublk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// BusyError says that a device is in use, and by whom as far as that can be
// found out.
type BusyError struct {
	ID      int
	Holders []string // what Holders said
	Err     error    // why waiting ended; may be nil
}

// Error implements error.
func (e *BusyError) Error() string {
	by := "an unknown user (another mount namespace, or the kernel)"
	if len(e.Holders) != 0 {
		by = strings.Join(e.Holders, ", ")
	}
	return fmt.Sprintf("ublk: %s is in use by %s", blockPath(e.ID), by)
}

// Unwrap returns why waiting ended.
func (e *BusyError) Unwrap() error { return e.Err }

// Holders says who uses the block device of that number or a partition of it:
// processes that have it open, mounts, swap, and block devices built on it. It
// looks at names in /proc and /sys only and never touches the device, which
// might not answer. It is a snapshot, and for people to read.
func Holders(id int) []string {
	name := fmt.Sprintf("ublkb%d", id)
	parts, _ := filepath.Glob(filepath.Join("/sys/block", name, name+"p*"))
	names := []string{name}
	for _, p := range parts {
		names = append(names, filepath.Base(p))
	}
	found := slices.Concat(openBy(names), mountsOf(name, names), swapOn(names), stackedOn(name, names))
	slices.Sort(found)
	return slices.Compact(found)
}

// openBy finds processes that have one of the devices open.
func openBy(names []string) []string {
	var found []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		fds, _ := os.ReadDir(filepath.Join(proc, "fd"))
		for _, fd := range fds {
			to, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
			if err != nil || !slices.Contains(names, strings.TrimPrefix(to, "/dev/")) {
				continue
			}
			comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
			found = append(found, fmt.Sprintf("process %s (%s)", filepath.Base(proc), strings.TrimSpace(string(comm))))
			break
		}
	}
	return found
}

// mountsOf finds mounts of the devices, in this mount namespace and in init's.
func mountsOf(disk string, names []string) []string {
	var found []string
	devs := map[string]bool{}
	for _, name := range names {
		path := filepath.Join("/sys/block", disk, name, "dev")
		if name == disk {
			path = filepath.Join("/sys/block", disk, "dev")
		}
		if dev, err := os.ReadFile(path); err == nil {
			devs[strings.TrimSpace(string(dev))] = true
		}
	}
	for _, file := range []string{"/proc/self/mountinfo", "/proc/1/mountinfo"} {
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			// 36 35 98:0 /root /mount/point ... (proc_pid_mountinfo(5)). btrfs
			// shows a device number of its own, and the device as its source.
			f := strings.Fields(line)
			if len(f) < 5 {
				continue
			}
			source := slices.ContainsFunc(f[5:], func(s string) bool {
				return slices.Contains(names, strings.TrimPrefix(s, "/dev/"))
			})
			if devs[f[2]] || source {
				found = append(found, "mount "+f[4])
			}
		}
	}
	return found
}

// swapOn finds the devices among the swap spaces.
func swapOn(names []string) []string {
	var found []string
	text, _ := os.ReadFile("/proc/swaps")
	for line := range strings.Lines(string(text)) {
		path, _, _ := strings.Cut(line, " ")
		if slices.Contains(names, strings.TrimPrefix(path, "/dev/")) {
			found = append(found, "swap on "+path)
		}
	}
	return found
}

// stackedOn finds block devices built on the devices: device mapper, md and
// the like in holders, loop devices by their backing file.
func stackedOn(disk string, names []string) []string {
	var found []string
	for _, pattern := range []string{"/sys/block/" + disk + "/holders/*", "/sys/block/" + disk + "/" + disk + "p*/holders/*"} {
		holders, _ := filepath.Glob(pattern)
		for _, h := range holders {
			found = append(found, "block device "+filepath.Base(h))
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		file, _ := os.ReadFile(l)
		if slices.Contains(names, strings.TrimPrefix(strings.TrimSpace(string(file)), "/dev/")) {
			found = append(found, "block device "+strings.Split(l, "/")[3])
		}
	}
	return found
}
