package lab

import (
	"context"
	"fmt"
	"os/exec"
	"syscall"
	"time"
)

// Hold keeps an image open through the library until the host is closed, so that it stays
// attached where no other client has it open, as one that is in use does. It returns when the
// image is attached.
func (d *Daemon) Hold(ctx context.Context, store, image string) error {
	// It reads one block again and again, slowly.
	cmd := d.Command(context.WithoutCancel(ctx), store, RBDArgs(image,
		"--rw=read", "--bs=4k", "--size=4k", "--rate_iops=1", "--time_based", "--runtime=86400")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // fio is two processes
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("holding %s: %w", image, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	d.host.Defer(func() { stopGroup(cmd, ended) })
	return Await(ctx, "fio holds "+image, 30*time.Second, func() (bool, error) {
		select {
		case err := <-ended:
			ended <- err
			return false, fmt.Errorf("it has ended: %v", err)
		default:
		}
		list, err := d.Client.Images(ctx)
		for _, im := range list {
			if im.URL == store+"/"+image && len(im.Clients) > 0 {
				return true, nil
			}
		}
		return false, err
	})
}

// stopGroup interrupts a program with all that it has started, and kills what stays.
func stopGroup(cmd *exec.Cmd, ended <-chan error) {
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT)
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
}
