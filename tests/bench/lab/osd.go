package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Written returns the bytes that a process has had written to disks since it was started, what
// went past the page cache and what has gone into it.
func Written(pid int) (float64, error) {
	path := fmt.Sprintf("/proc/%d/io", pid)
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "write_bytes: "); ok {
			return strconv.ParseFloat(v, 64)
		}
	}
	return 0, fmt.Errorf("%s does not say what was written", path)
}

// OSDPid returns the OSD's process.
func (c *Cluster) OSDPid() int { return c.osd }

// DropCaches has the OSD forget what it has in memory of objects. What the kernel has in memory
// of the OSD's files is another matter: see the function of that name.
func (c *Cluster) DropCaches() error {
	said, err := c.ask("cache drop")
	if err == nil && len(said) > 0 { // it says nothing when it has
		err = errors.New(strings.TrimSpace(string(said)))
	}
	if err != nil {
		return fmt.Errorf("dropping the OSD's caches: %w", err)
	}
	return nil
}
