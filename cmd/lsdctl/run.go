package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	// The library that takes the place of Ceph's, and the one that takes librados' as well.
	libraryName = "librbd.so.1"
	preloadName = "librbd-preload.so"
)

func (a *app) runCommand() *cobra.Command {
	var store string
	cmd := &cobra.Command{
		Use:   "run [--store STORE] -- PROGRAM [ARGUMENT...]",
		Short: "Run a program that speaks librbd on lsd images",
		Long: `Run a program that was made for Ceph's librbd, unchanged, on lsd images: its
rbd_open and the like reach this host's lsdd, which is started if none runs. There is
no block device, and no kernel driver is needed.

The pool and namespace that the program names are the store: rbd:rbd/vm2 is
rados://rbd/vm2. With --store all that it names is there instead. That can be a
store which is not Ceph; then there need be no Ceph at all.`,
		Example: `  lsdctl run -- qemu-img convert -p image.qcow2 rbd:rbd/vm3
  lsdctl run --store file:///srv/lsd -- fio --name=x --ioengine=rbd --pool=any --rbdname=vm1 --rw=randwrite`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("name the program to run: see lsdctl run --help")
			}
			var u backend.URL
			if cmd.Flags().Changed("store") {
				var err error
				if u, err = backend.ParseStore(store); err == nil {
					err = notMem(u, nil)
				}
				if err != nil {
					return fmt.Errorf("--store %s: %w", store, err)
				}
			}
			return a.run(cmd.Context(), u, args)
		},
	}
	cmd.Flags().StringVar(&store, "store", "", "the store of all images, whatever pool the program names")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// run becomes the program.
func (a *app) run(ctx context.Context, u backend.URL, args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("%s is not there, or is no program", args[0])
	}
	env, err := a.runEnv(u, os.Environ())
	if err != nil {
		return err
	}
	if err := a.needDaemon(ctx, withoutDriver); err != nil {
		return err
	}
	a.progress.end()
	err = unix.Exec(path, args, env)
	return fmt.Errorf("run %s: %w", path, err)
}

// runEnv returns the environment in which a program finds the library, and the library the
// daemon, and the store u, unless that is the zero value.
func (a *app) runEnv(u backend.URL, env []string) ([]string, error) {
	socket, err := filepath.Abs(api.LibrarySocket(a.socket))
	if err != nil {
		return nil, err
	}
	env = append(env, api.EnvLibrarySocket+"="+socket)
	name := libraryName
	if u.Scheme != "" {
		env = append(env, api.EnvLibraryStore+"="+u.String())
		if u.Scheme != "rados" {
			name = preloadName
		}
	}
	lib, err := findLibrary(name)
	if err != nil {
		return nil, err
	}
	if name == preloadName {
		return prepend(env, "LD_PRELOAD", lib), nil
	}
	return prepend(env, "LD_LIBRARY_PATH", filepath.Dir(lib)), nil
}

// findLibrary finds one of the libraries: beside this program, or where it is installed.
func findLibrary(name string) (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	if past, err := filepath.EvalSymlinks(exe); err == nil {
		exe = past
	}
	dir := filepath.Dir(exe)
	for _, p := range []string{filepath.Join(dir, "librbd", name), filepath.Join(dir, "..", "lib", "lsd", name)} {
		if _, err := os.Stat(p); err == nil {
			return filepath.Clean(p), nil
		}
	}
	return "", fmt.Errorf("%s is neither in %s nor in ../lib/lsd beside it: make install-librbd", name, filepath.Join(dir, "librbd"))
}

// prepend puts a value before those of a variable, which are separated by colons.
func prepend(env []string, name, value string) []string {
	for i, v := range env {
		if old, ok := strings.CutPrefix(v, name+"="); ok {
			if old != "" {
				value += ":" + old
			}
			env[i] = name + "=" + value
			return env
		}
	}
	return append(env, name+"="+value)
}
