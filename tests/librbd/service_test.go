//go:build lab

package librbd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// service starts a program that runs until the test ends.
func (h *host) service(name string, cmd *exec.Cmd) {
	h.t.Helper()
	log, err := os.Create(filepath.Join(h.dir, name+".log"))
	if err != nil {
		h.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { // the test's context has ended
		_ = cmd.Wait()
		if h.t.Failed() {
			text, _ := os.ReadFile(log.Name())
			h.t.Logf("%s said:\n%s", name, text)
		}
		log.Close()
	})
}

// awaitAnswer waits until a program that has been started answers.
func (h *host) awaitAnswer(name string, ask func() error) {
	h.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			h.t.Fatalf("%s does not answer: %v", name, err)
		}
	}
}

// plainly runs a program without the library and returns what it prints.
func (h *host) plainly(args ...string) (string, error) {
	cmd := exec.CommandContext(h.t.Context(), args[0], args[1:]...)
	cmd.Dir = h.dir
	return h.try(cmd)
}

// plain is plainly of what must end well.
func (h *host) plain(args ...string) {
	h.t.Helper()
	if out, err := h.plainly(args...); err != nil {
		h.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}
