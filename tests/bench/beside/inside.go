package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
	"github.com/spf13/cobra"
)

// vmKernel is the kernel of the virtual machine, one of those that scripts/vm fetches.
const vmKernel = "7.2"

// inVM has a comparison measured in a virtual machine: by this program, started again there.
func (o *options) inVM(ctx context.Context, h *lab.Host, c comparison) ([]bench.Table, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	shared := filepath.Join(h.Dir, "out")
	if err := os.Mkdir(shared, 0o755); err != nil {
		return nil, err
	}
	args := []string{"--kernel", vmKernel, "--mem", "6G", "--timeout", "7200", "--share", shared,
		"--disk", filepath.Join(h.Dir, "disk") + ":24G", "--disk", filepath.Join(h.Dir, "spare") + ":24G"}
	if c.ceph {
		cluster, err := h.Cluster(ctx)
		if err != nil {
			return nil, err
		}
		args = append(args, "--ceph", cluster.Dir)
	}
	if c.prepare != nil {
		if err := c.prepare(ctx, h); err != nil {
			return nil, fmt.Errorf("preparing: %w", err)
		}
	}
	for _, name := range passedOn {
		args = append(args, "--env", name)
	}
	args = append(args, "--", self, "inside", c.name, "--root", o.root, "--out", shared,
		"--short="+strconv.FormatBool(o.Short), "--turns", strconv.Itoa(o.Turns), "--seconds", strconv.Itoa(o.Seconds), "--cases", o.Cases)
	cmd := exec.CommandContext(ctx, filepath.Join(o.root, "scripts/vm"), args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it cleans up
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("in the virtual machine: %w", err)
	}
	r, err := bench.Read(filepath.Join(shared, c.name+".json"))
	if err != nil {
		return nil, err
	}
	return r.Tables, nil
}

// passedOn are variables of the environment that comparisons heed.
var passedOn = [...]string{"LSD_UBLKSRV"}

// insideCommand is what runs in the virtual machine.
func insideCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "inside NAME", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			o.only = args[0]
			if err := o.complete(); err != nil {
				return err
			}
			chosen, err := o.chosen()
			if err != nil {
				return err
			}
			const disk, dir = "/dev/vda", "/run/lsd-beside"
			if err := mount(ctx, disk, dir); err != nil {
				return err
			}
			h, err := lab.NewHost(o.Effort, o.root, dir)
			if err != nil {
				return err
			}
			defer h.Close()
			h.VM, h.Spare = true, "/dev/vdb"
			tables, err := chosen[0].run(ctx, h)
			if err != nil {
				return err
			}
			r := bench.Report{Name: chosen[0].name, Tables: tables}
			return r.Write(filepath.Join(o.out, r.Name+".json"))
		},
	}
	o.flags(c)
	return c
}

// mount makes a file system on a disk of the virtual machine, and mounts it.
func mount(ctx context.Context, disk, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, args := range [][]string{
		// Without tables to zero in the background, which would be measured, too.
		{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", disk},
		{"mount", "-o", "noatime", disk, dir},
	} {
		if _, err := lab.Output(exec.CommandContext(ctx, args[0], args[1:]...)); err != nil {
			return err
		}
	}
	return nil
}
