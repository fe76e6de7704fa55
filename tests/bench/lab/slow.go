package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroups = "/sys/fs/cgroup"

// SlowDown has the OSD write no more than so many bytes a second to its disk, by a control group
// of its own, until it is called again or the host is closed; 0: as many as it can.
func (h *Host) SlowDown(bytes int64) error {
	if h.cluster == nil || h.cluster.osd == 0 {
		return errors.New("there is no OSD here that could be slowed down")
	}
	device, err := diskOf(h.Dir)
	if err != nil {
		return err
	}
	if h.slow == nil {
		if err := h.setApart(strconv.Itoa(h.cluster.osd)); err != nil {
			return err
		}
	}
	if err := write(filepath.Join(h.slow.own, h.slow.limit), device+" "+h.slow.bound(bytes)); err != nil {
		return fmt.Errorf("bounding what is written to device %s: %w", device, err)
	}
	return nil
}

// setApart gives a process a control group of its own until the host is closed.
func (h *Host) setApart(pid string) error {
	in, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return err
	}
	g, err := blockGroup(string(in))
	if err != nil {
		return err
	}
	if err := g.prepare(); err != nil {
		return err
	}
	g.own = filepath.Join(g.root, "lsd-beside."+pid)
	if err := os.Mkdir(g.own, 0o755); err != nil {
		return err
	}
	h.slow = &g
	h.Defer(func() {
		_ = write(filepath.Join(g.root, g.path, "cgroup.procs"), pid) // it may have ended
		_ = os.Remove(g.own)
	})
	return write(filepath.Join(g.own, "cgroup.procs"), pid)
}

// group is where a process is in the control groups that bound what is written to disks.
type group struct {
	root  string // of the hierarchy
	path  string // of the process, below root
	limit string // name of the file with the bounds
	key   string // before a bound
	none  string // instead of a bound, where there is to be none
	own   string // the group that SlowDown has made
}

// bound returns what is written into the file for so many bytes a second, after the disk's number.
func (g *group) bound(bytes int64) string {
	if bytes == 0 {
		return g.key + g.none
	}
	return g.key + strconv.FormatInt(bytes, 10)
}

// blockGroup finds in a process's list of control groups that for disks: of a hierarchy of its
// own, of the first version, or of the one that there is in the second.
func blockGroup(list string) (group, error) {
	unified := ""
	for line := range strings.Lines(list) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		if f[1] == "blkio" {
			return group{root: filepath.Join(cgroups, f[1]), path: f[2], limit: "blkio.throttle.write_bps_device", none: "0"}, nil
		}
		if f[1] == "" {
			unified = f[2]
		}
	}
	if unified == "" {
		return group{}, fmt.Errorf("the OSD is in no control group for disks: mount them at %s", cgroups)
	}
	return group{root: cgroups, path: unified, limit: "io.max", key: "wbps=", none: "max"}, nil
}

// prepare sees to it that groups below the root have the file with the bounds.
func (g group) prepare() error {
	var err error
	if g.key != "" {
		err = write(filepath.Join(g.root, "cgroup.subtree_control"), "+io")
	} else {
		_, err = os.Stat(filepath.Join(g.root, g.limit))
	}
	if err != nil {
		return fmt.Errorf("the OSD cannot be slowed down, the control groups at %s have no bounds for disks: %w", g.root, err)
	}
	return nil
}

// write writes to a file that is there.
func write(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// diskOf returns the number, as "254:0", of the disk that a directory is on: that of all of it,
// where there are partitions.
func diskOf(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	sys, err := filepath.EvalSymlinks("/sys/dev/block/" + number)
	if err != nil {
		return "", fmt.Errorf("%s is on no disk of its own that could be slowed down: name another directory with --dir", dir)
	}
	if _, err := os.Stat(filepath.Join(sys, "partition")); err != nil {
		return number, nil
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(sys), "dev"))
	return strings.TrimSpace(string(text)), err
}
