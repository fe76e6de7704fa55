package lab

import (
	"context"
	"os"
	"os/exec"
	"strconv"
)

// RBDArgs returns the arguments of fio's rbd engine for a job on an image, whichever library that
// runs on.
func RBDArgs(image string, args ...string) []string {
	return FioArgs(append([]string{"--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=" + image}, args...)...)
}

// Librbd returns a program that is to run on Ceph's library, with its cache, which is that library's
// default, or without.
func (h *Host) Librbd(ctx context.Context, cache bool, args ...string) *exec.Cmd {
	cmd := h.Command(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "CEPH_ARGS=--rbd_cache="+strconv.FormatBool(cache))
	return cmd
}
