package file

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// A busyError says that a lock was not to be had, who has it, and what to do.
type busyError struct {
	lock   string
	waited time.Duration
	holder process
}

// Error returns one line.
func (e *busyError) Error() string {
	who, do := "another process", "find and end it"
	if p := e.holder; p.id == os.Getpid() {
		who, do = "this process", "its file system hangs or is slow"
	} else if p.id != 0 {
		who, do = fmt.Sprintf("process %d (%s)", p.id, p.name), "if it hangs, end it"
		if p.stopped {
			do = fmt.Sprintf("it is stopped: end it, or let it go on with kill -CONT %d", p.id)
		}
	}
	return fmt.Sprintf("waited %v for %s, which %s holds: %s", e.waited.Round(10*time.Millisecond), e.lock, who, do)
}

// A process is another one of this host; the zero value is none that is known.
type process struct {
	id      int
	name    string
	stopped bool // by a signal or a debugger
}

// holderOf returns the process that has locked the file by flock. It is not known
// when it runs where this one cannot see it: on another host, in another container.
func holderOf(file fs.FileInfo) process {
	st, ok := file.Sys().(*syscall.Stat_t)
	if !ok {
		return process{}
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return process{}
	}
	for line := range strings.Lines(string(locks)) {
		pid, inode := parseLock(line)
		// The device that is named there is not stat's on every file system.
		if pid > 0 && inode == st.Ino && hasOpen(pid, file) {
			return describe(pid)
		}
	}
	return process{}
}

// parseLock returns who holds the flock of which inode by a line of /proc/locks,
// such as
//
//	1: FLOCK  ADVISORY  WRITE 708 fe:00:262143 0 EOF
//
// and 0 if it is about something else.
func parseLock(line string) (pid int, inode uint64) {
	f := strings.Fields(line)
	if len(f) < 6 || f[1] != "FLOCK" {
		return 0, 0
	}
	pid, err := strconv.Atoi(f[4])
	if err != nil {
		return 0, 0
	}
	inode, err = strconv.ParseUint(f[5][strings.LastIndexByte(f[5], ':')+1:], 10, 64)
	if err != nil {
		return 0, 0
	}
	return pid, inode
}

// hasOpen reports whether the process has the file open.
func hasOpen(pid int, file fs.FileInfo) bool {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return false
	}
	for _, fd := range fds {
		if info, err := os.Stat(fd); err == nil && os.SameFile(info, file) {
			return true
		}
	}
	return false
}

// describe returns name and state of the process by its line in /proc, such as
//
//	708 (lsdd) S 1 ...
func describe(pid int) process {
	p := process{id: pid, name: "?"}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return p
	}
	head, tail, _ := cutLast(string(b), ") ")
	if _, name, ok := strings.Cut(head, "("); ok {
		p.name = strings.Map(printable, name)
	}
	p.stopped = strings.HasPrefix(tail, "T") || strings.HasPrefix(tail, "t")
	return p
}

// cutLast is strings.Cut around the last sep: a name may hold one.
func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func printable(r rune) rune {
	if !unicode.IsPrint(r) {
		return '?'
	}
	return r
}
