package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	var shared bool
	cmd := &cobra.Command{
		Use:   "run [--store STORE] [--shared] -- PROGRAM [ARGUMENT...]",
		Short: "Run a program that speaks librbd on lsd images",
		Long: `Run a program that was made for Ceph's librbd, unchanged, on lsd images: its
rbd_open and the like reach this host's lsdd, which is started if none runs. There is
no block device, and no kernel driver is needed. Users other than root need an lsdd that
runs, and whose policy names them.

The pool and namespace that the program names are the store: rbd:rbd/vm2 is
rados://rbd/vm2. With --store all that it names is there instead. That can be a
store which is not Ceph; then there need be no Ceph at all.

With --shared the program may write to an image beside a block device of this host that
was attached with lsdctl add --shared, and such a device may be attached beside the
program. Both see each other's writes, but no file system may be mounted on one side while
the other one writes, unless it is one for shared disks: it would be damaged.`,
		Example: `  lsdctl run -- qemu-img convert -p image.qcow2 rbd:rbd/vm3
  lsdctl run --store file:///srv/lsd -- fio --name=x --ioengine=rbd --pool=any --rbdname=vm1 --rw=randwrite
  lsdctl run --shared -- qemu-io -f raw -c "write -P 7 0 4k" rbd:rbd/vm3   # beside /dev/ublkb0`,
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
			return a.run(cmd.Context(), u, shared, args)
		},
	}
	cmd.Flags().StringVar(&store, "store", "", "the store of all images, whatever pool the program names")
	cmd.Flags().BoolVar(&shared, "shared", false, "images that the program writes to may have a block device that is shared, too")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// run becomes the program.
func (a *app) run(ctx context.Context, u backend.URL, shared bool, args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("%s is not there, or is no program", args[0])
	}
	socket, err := a.librarySocket(os.Getenv(api.EnvLibrarySocket))
	if err != nil {
		return err
	}
	env, err := runEnv(u, shared, socket, os.Environ())
	if err != nil {
		return err
	}
	if err := a.needLibrary(ctx, socket); err != nil {
		return err
	}
	a.progress.end()
	err = unix.Exec(path, args, env)
	return fmt.Errorf("run %s: %w", path, err)
}

// librarySocket returns where library clients are served: where the environment says, which is
// also where a daemon that is started from here listens, or else beside the daemon's own socket.
func (a *app) librarySocket(env string) (string, error) {
	if env != "" {
		return env, nil
	}
	return filepath.Abs(api.LibrarySocket(a.socket))
}

// needLibrary makes sure that a daemon serves library clients. Users other than root cannot ask
// the daemon for anything else, nor start it; what they may do there is said when they do it.
func (a *app) needLibrary(ctx context.Context, socket string) error {
	if os.Geteuid() == 0 {
		return a.needDaemon(ctx, withoutDriver)
	}
	ctx, stop := context.WithTimeout(ctx, startTimeout)
	defer stop()
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		return c.Close()
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("no permission for %s: lsdd serves neither user %d nor its groups, see --librbd-group and --librbd-policy of lsdd", socket, os.Geteuid())
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("no lsdd answers at %s, and only root may start it", socket)
	}
	return fmt.Errorf("lsdd at %s: %w", socket, err)
}

// runEnv returns the environment in which a program finds the library, and the library the
// daemon, and the store u, unless that is the zero value. shared says that it shares its images
// with block devices; else the environment says whether it does.
func runEnv(u backend.URL, shared bool, socket string, env []string) ([]string, error) {
	env = setenv(env, api.EnvLibrarySocket, socket)
	if shared {
		env = setenv(env, api.EnvLibraryShared, "1")
	}
	name := libraryName
	if u.Scheme != "" {
		env = setenv(env, api.EnvLibraryStore, u.String())
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

// setenv returns the environment with another value of a variable: of two the first would count.
func setenv(env []string, name, value string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, name+"=") })
	return append(env, name+"="+value)
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
