// Package e2e tests what users run, as they run it: lsdd and lsdctl, a real
// kernel's block devices, real file systems, fio and QEMU on them, processes
// killed and power cut for real. scripts/e2e builds everything and runs the
// tests, in a virtual machine where this machine's kernel has no ublk.
package e2e
