package policy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"
)

// A Stamp tells whether a file has changed: it is another then. The zero value is that of none.
type Stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// StampOf returns the stamp of the file at path, the zero value if it cannot be had.
func StampOf(path string) Stamp {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Stamp{}
	}
	return Stamp{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// Load reads the policy in a file, which must be such as only root, or the user that this process
// runs as, can change. The error is one line, and matches os.ErrNotExist where there is no file.
func Load(path string) (*Policy, error) {
	// A FIFO must not hold it up.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("%s is not a file", path)
	case !trusted(st.Uid):
		return nil, fmt.Errorf("%s belongs to user %d: it must be root's", path, st.Uid)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("%s can be written by others than root, its mode is %03o: chmod go-w", path, st.Mode&0o777)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the policy: %w", err)
	}
	return Parse(path, string(text), ByName)
}

// trusted reports whether what a user has is as good as root's.
func trusted(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// ByName finds users and groups on this host.
func ByName(group bool, name string) (uint32, error) {
	var text string
	if group {
		g, err := user.LookupGroup(name)
		if err != nil {
			return 0, unknownError(err)
		}
		text = g.Gid
	} else {
		u, err := user.Lookup(name)
		if err != nil {
			return 0, unknownError(err)
		}
		text = u.Uid
	}
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("its number is %q", text)
	}
	return uint32(id), nil
}

// ErrUnknown is matched by errors of ByName where the host has no such user or group.
var ErrUnknown = errors.New("there is none of that name here")

func unknownError(err error) error {
	var u user.UnknownUserError
	var g user.UnknownGroupError
	if errors.As(err, &u) || errors.As(err, &g) {
		return ErrUnknown
	}
	return err
}
