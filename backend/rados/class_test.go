package rados

import (
	"syscall"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
)

// TestClass: a full pool or cluster, and whatever else may pass, is tried again.
func TestClass(t *testing.T) {
	for errno, want := range map[syscall.Errno]error{
		syscall.ENOSPC:    backend.ErrTemporary,
		syscall.EDQUOT:    backend.ErrTemporary,
		syscall.ETIMEDOUT: backend.ErrTemporary,
		syscall.EIO:       backend.ErrTemporary,
		syscall.ESHUTDOWN: backend.ErrTemporary,
		syscall.ENOENT:    backend.ErrNotFound,
		syscall.EEXIST:    backend.ErrExists,
		syscall.EPERM:     backend.ErrPermanent,
		syscall.EINVAL:    backend.ErrPermanent,
	} {
		if got := class(-int(errno)); got != want {
			t.Errorf("%v is %v, want %v", errno, got, want)
		}
	}
}
