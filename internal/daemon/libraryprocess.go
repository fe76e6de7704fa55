package daemon

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/lsd-ceph/lsd/internal/peercred"
)

// A process is that at the other end of a library client's connection.
type process struct {
	host  string // this one
	pid   int32
	began string // when, in the kernel's units since it booted; empty where that cannot be told
}

// processAt says who is at the other end of a connection.
func (d *Daemon) processAt(conn *net.UnixConn) (process, error) {
	cred, err := peercred.Of(conn)
	if err != nil {
		return process{}, err
	}
	p := process{host: d.cfg.Host, pid: cred.Pid}
	if stat, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(p.pid), "stat")); err == nil {
		p.began = startTime(string(stat))
	}
	return p, nil
}

// startTime returns when a process began, from its stat file: proc(5). The name of the program,
// in parentheses, may have any bytes.
func startTime(stat string) string {
	const after = 22 - 2 // field 22; the name is field 2
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < after {
		return ""
	}
	return fields[after-1]
}

// number is that of the process among all of all hosts: the same for all its handles, also when
// another daemon serves them. It has no more bits than a float64 can hold.
func (p process) number() uint64 {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%d\n%s", p.host, boot, p.pid, p.began))
	return max(binary.LittleEndian.Uint64(sum[:])>>(64-53), 1)
}

// address is where the process is, in the form of an address of Ceph's.
func (p process) address() string { return fmt.Sprintf("%s:0/%d", p.host, p.pid) }

// client is how the process is named as a holder of locks: by all its handles, as the clients of
// Ceph are by all images that they have open.
func (p process) client() string { return fmt.Sprintf("client.%d", p.number()) }
