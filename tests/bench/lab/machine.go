package lab

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine returns the facts on which figures depend, a line each, of a host whose disk has dir.
func Machine(ctx context.Context, dir string) []string {
	var u unix.Utsname
	_ = unix.Uname(&u) // it cannot fail
	lines := []string{
		fmt.Sprintf("Machine: %d × %s, %s of memory, %s", runtime.NumCPU(), processor(), memory(), disk(dir)),
		fmt.Sprintf("Software: Linux %s, %s, %s, %s", unix.ByteSliceToString(u.Release[:]), version(ctx, "fio", "--version"),
			version(ctx, "ceph-osd", "--version"), runtime.Version()),
	}
	return lines
}

// version returns the first line that a program says of itself.
func version(ctx context.Context, name, flag string) string {
	out, err := exec.CommandContext(ctx, name, flag).Output()
	if err != nil {
		return "no " + name
	}
	line, _, _ := strings.Cut(string(out), "\n")
	line, _, _ = strings.Cut(line, " (") // the commit
	return line
}

// field returns what a file of lines "name : value" has of the first such name.
func field(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func processor() string {
	return cmp.Or(field("/proc/cpuinfo", "model name"), runtime.GOARCH)
}

func memory() string {
	var kb int64
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &kb); err != nil {
		return "some"
	}
	return fmt.Sprintf("%.0f GiB", float64(kb)/(1<<20))
}

// disk says what kind of disk and file system a directory is on.
func disk(dir string) string {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "a disk"
	}
	dev, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return "no disk of its own"
	}
	name := filepath.Base(dev)
	if b, err := os.ReadFile(filepath.Join(dev, "device/model")); err == nil {
		name = strings.TrimSpace(string(b))
	} else if strings.HasPrefix(name, "vd") {
		name = "a virtio disk"
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return name
	}
	kinds := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS", unix.BTRFS_SUPER_MAGIC: "Btrfs", unix.TMPFS_MAGIC: "tmpfs"}
	return name + " with " + cmp.Or(kinds[fs.Type], "some file system")
}
