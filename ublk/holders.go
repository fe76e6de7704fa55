package ublk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// BusyError says that a device is in use, and by whom as far as that can be
// found out.
type BusyError struct {
	ID      int
	Name    string   // of what is in use, if that is not the block device of that number
	Holders []string // what Holders said
	Err     error    // why waiting ended; may be nil
}

// Error implements error.
func (e *BusyError) Error() string {
	by := "an unknown user (another mount namespace, or the kernel)"
	if len(e.Holders) != 0 {
		by = strings.Join(e.Holders, ", ")
	}
	if e.Name != "" {
		return fmt.Sprintf("%s is in use by %s", e.Name, by)
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
	disk := disk(fmt.Sprintf("ublkb%d", id))
	found := slices.Concat(disk.openBy(), disk.mounts(), disk.swap(), disk.stacked())
	slices.Sort(found)
	return slices.Compact(found)
}

// disk is the name of a block device.
type disk string

// is reports whether path is the node of the disk or of a partition of it, even
// of a disk that has been removed already.
func (d disk) is(path string) bool {
	name, ok := strings.CutPrefix(strings.TrimSuffix(path, " (deleted)"), "/dev/"+string(d))
	if !ok || name == "" {
		return ok
	}
	part, ok := strings.CutPrefix(name, "p")
	_, err := strconv.Atoi(part)
	return ok && err == nil
}

// openBy finds processes that have the disk open.
func (d disk) openBy() []string {
	var found []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		fds, _ := os.ReadDir(filepath.Join(proc, "fd"))
		for _, fd := range fds {
			to, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
			if err != nil || !d.is(to) {
				continue
			}
			comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
			found = append(found, fmt.Sprintf("process %s (%s)", filepath.Base(proc), strings.TrimSpace(string(comm))))
			break
		}
	}
	return found
}

// mounts finds mounts of the disk, in this mount namespace and in init's.
func (d disk) mounts() []string {
	var found []string
	devs := map[string]bool{}
	files, _ := filepath.Glob(fmt.Sprintf("/sys/block/%s/%[1]sp*/dev", d))
	for _, file := range append(files, fmt.Sprintf("/sys/block/%s/dev", d)) {
		if dev, err := os.ReadFile(file); err == nil {
			devs[strings.TrimSpace(string(dev))] = true
		}
	}
	for _, file := range []string{"/proc/self/mountinfo", "/proc/1/mountinfo"} {
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			// 36 35 98:0 /root /mount/point ... (proc_pid_mountinfo(5)). btrfs
			// shows a device number of its own, and the device as its source.
			f := strings.Fields(line)
			if len(f) >= 5 && (devs[f[2]] || slices.ContainsFunc(f[5:], d.is)) {
				found = append(found, "mount "+f[4])
			}
		}
	}
	return found
}

// swap finds the disk among the swap spaces.
func (d disk) swap() []string {
	var found []string
	text, _ := os.ReadFile("/proc/swaps")
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 0 && d.is(f[0]) {
			found = append(found, "swap on "+f[0])
		}
	}
	return found
}

// stacked finds block devices built on the disk: device mapper, md and the like
// in holders, loop devices by their backing file.
func (d disk) stacked() []string {
	var found []string
	for _, pattern := range []string{"/sys/block/%s/holders/*", "/sys/block/%s/%[1]sp*/holders/*"} {
		holders, _ := filepath.Glob(fmt.Sprintf(pattern, d))
		for _, h := range holders {
			found = append(found, "block device "+filepath.Base(h))
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		file, _ := os.ReadFile(l)
		if d.is(strings.TrimSpace(string(file))) {
			found = append(found, "block device "+strings.Split(l, "/")[3])
		}
	}
	return found
}
