package policy

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// CheckDir refuses a directory that somebody other than root could make another: one that is
// reached by way of a symbolic link, or of a directory in which others can put one. It need not
// be there yet; dir is absolute and clean. What was not refused stays what it is unless root, or
// the user that this process runs as, changes it.
func CheckDir(dir string) error {
	at, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { unix.Close(at) }()
	shared, err := checkOwner(at, "/")
	if err != nil {
		return err
	}
	sofar := "/"
	for part := range strings.SplitSeq(strings.TrimPrefix(dir, "/"), "/") {
		sofar = path.Join(sofar, part)
		next, err := unix.Openat(at, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		switch {
		case errors.Is(err, unix.ENOENT) && !shared:
			return nil // and nobody but root can make it
		case errors.Is(err, unix.ENOENT):
			return fmt.Errorf("%s is not there, and anybody could make it", sofar)
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return fmt.Errorf("%s is a symbolic link, or no directory", sofar)
		case err != nil:
			return fmt.Errorf("%s: %w", sofar, err)
		}
		unix.Close(at)
		at = next
		if shared, err = checkOwner(at, sofar); err != nil {
			return err
		}
	}
	if shared {
		return fmt.Errorf("%s can be written by anybody", dir)
	}
	return nil
}

// checkOwner refuses an open directory in which others than root can change what root has put
// there, and reports whether they can put something there at all.
func checkOwner(fd int, dir string) (shared bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	shared = st.Mode&0o022 != 0
	switch {
	case !trusted(st.Uid):
		return shared, fmt.Errorf("%s belongs to user %d, and not to root", dir, st.Uid)
	case shared && st.Mode&unix.S_ISVTX == 0:
		return shared, fmt.Errorf("%s can be written by others than root", dir)
	}
	return shared, nil
}
