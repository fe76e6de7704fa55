//go:build lab

// Package cephtest gives tests a throw-away Ceph cluster.
package cephtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Main runs a package's tests on the cluster that CEPH_CONF names, or on one of
// their own whose ports are at the offset shift, and returns the exit status.
// Packages are tested side by side: each takes a shift of its own. The store of
// the OSD is memstore, which forgets all when the OSD ends, or bluestore.
func Main(m *testing.M, shift int, store string) int {
	if os.Getenv("CEPH_CONF") != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "lsd-ceph-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Setenv("CEPH_CONF", filepath.Join(dir, "ceph.conf"))
	defer Script("down")
	port := func(base int) string { return fmt.Sprint(base + shift) }
	if err := Script("up", "--store", store, "--mon-port", port(16790), "--mon-port2", port(13301), "--osd-ports", port(16850)); err != nil {
		fmt.Fprintln(os.Stderr, "no cluster to test with:", err)
		return 1
	}
	return m.Run()
}

// Script runs scripts/ceph on the cluster.
func Script(args ...string) error {
	_, self, _, _ := runtime.Caller(0)
	lab := filepath.Dir(os.Getenv("CEPH_CONF"))
	cmd := exec.Command(filepath.Join(filepath.Dir(self), "../../scripts/ceph"), append(args, "--dir", lab)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return cmd.Run()
}
