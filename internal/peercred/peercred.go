// Package peercred asks the kernel who is at the other end of a unix socket: unix(7),
// SO_PEERCRED, and socket(7), SO_PEERGROUPS. What it answers is what was so when the socket was
// connected.
package peercred

import (
	"errors"
	"fmt"
	"net"
	"unsafe" // there is no wrapper for an option of so many numbers

	"golang.org/x/sys/unix"
)

// Of returns the process at the other end, and its user and primary group.
func Of(c *net.UnixConn) (cred *unix.Ucred, err error) {
	cerr := control(c, func(fd int) { cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(cerr, err)
}

// Groups returns the supplementary groups of the process at the other end.
func Groups(c *net.UnixConn) (groups []uint32, err error) {
	cerr := control(c, func(fd int) {
		for room := 64; ; {
			groups = make([]uint32, room)
			var n int
			if n, err = peerGroups(fd, groups); err == nil {
				groups = groups[:n]
				return
			}
			if !errors.Is(err, unix.ERANGE) || n <= room {
				return
			}
			room = n
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("groups of the process: %w", err)
	}
	return groups, nil
}

// peerGroups reads groups, of which there must be room for one at least, and returns how many
// there are. It fails with ERANGE if that is more than there is room for.
func peerGroups(fd int, groups []uint32) (int, error) {
	size := uint32(len(groups) * 4)
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
	if e != 0 {
		return int(size / 4), e
	}
	return int(size / 4), nil
}

func control(c *net.UnixConn, fn func(fd int)) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { fn(int(fd)) })
}
