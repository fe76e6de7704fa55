// Lsdctl makes, attaches and looks after lsd images.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := untilSignal()
	defer stop()
	if err := newApp(os.Stdout, os.Stderr).command().ExecuteContext(ctx); err != nil {
		if line := api.OneLine(err); line != "" {
			fmt.Fprintf(os.Stderr, "lsdctl: %s\n", line)
		}
		stop()
		os.Exit(status(err))
	}
}

// untilSignal returns a context that ends with the first signal to end. The second one
// ends the program: a file system that hangs keeps a command from heeding the first.
func untilSignal() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// status returns the exit status for the error of a command.
func status(err error) int {
	var s *statusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &s):
		return s.status
	}
	return 1
}

// app is what the commands share.
type app struct {
	out      io.Writer
	progress *progress
	socket   string
	stateDir string
	json     bool
	// freeze is freezeFS.
	freeze func(mount string) (thaw func() error, err error)
}

func newApp(out io.Writer, errOut *os.File) *app {
	return &app{out: out, progress: newProgress(errOut), freeze: freezeFS}
}

// command returns the whole of lsdctl.
func (a *app) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lsdctl",
		Short: "Log-structured virtual disks on Ceph",
		Long: `lsdctl makes images in a store, attaches them to this host as /dev/ublkbN, and
tells how they are.

A store is rados://POOL[/NAMESPACE][?conf=PATH&id=CLIENT] or file:///DIR; an
image is STORE/NAME, a snapshot of it STORE/NAME@SNAPSHOT. A DEVICE is /dev/ublkb0, ublkb0 or 0, or lib0
of what librbd's clients alone use. Sizes are in bytes or
have a unit of 1024: 512, 4K, 20G, 1T.`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: false},
		PersistentPreRun: func(*cobra.Command, []string) {
			a.progress.began = time.Now()
		},
		PersistentPostRun: func(*cobra.Command, []string) { a.progress.end() },
		Args:              noSuchCommand,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetOut(a.out)
	cmd.SetFlagErrorFunc(cmdline.FlagError)
	f := cmd.PersistentFlags()
	f.StringVar(&a.socket, "socket", env(api.EnvSocket, api.DefaultSocket), "socket of the daemon ($"+api.EnvSocket+")")
	f.StringVar(&a.stateDir, "state-dir", env(api.EnvStateDir, api.DefaultStateDir), "state directory of a daemon that add starts ($"+api.EnvStateDir+")")
	cmd.AddCommand(
		a.createCommand(), a.lsCommand(), a.infoCommand(), a.checkCommand(), a.resizeCommand(), a.renameCommand(), a.rmCommand(), a.trashCommand(), a.snapCommand(),
		a.cloneCommand(), a.flattenCommand(), a.childrenCommand(), a.treeCommand(), a.dfCommand(), a.gcCommand(),
		a.diffCommand(), a.exportCommand(), a.exportDiffCommand(), a.importCommand(), a.importDiffCommand(), a.copyCommand(),
		a.metaCommand(), a.lockCommand(),
		a.addCommand(), a.runCommand(), a.listCommand(), a.statusCommand(), a.flushCommand(), a.delCommand(),
		a.featuresCommand(), a.logCommand(), a.daemonCommand(), a.cacheCommand(), a.versionCommand(), a.shutdownCommand(),
	)
	cmd.InitDefaultHelpCmd()
	for _, c := range cmd.Commands() {
		if c.Name() == "help" {
			c.Example = "  lsdctl help log salvage"
			c.Args = func(_ *cobra.Command, args []string) error {
				if about, _, err := cmd.Find(args); err == nil && about != cmd {
					return nil
				}
				return noSuchCommand(cmd, args)
			}
		}
	}
	return cmd
}

func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("there is no command %q: see lsdctl --help", args[0])
	}
	return nil
}

func env(name, other string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return other
}

// exactArgs wants the named arguments, all of them.
func exactArgs(names ...string) cobra.PositionalArgs {
	return cmdline.Args(len(names), names...)
}

// jsonFlag adds --json.
func (a *app) jsonFlag(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints aligned columns.
func (a *app) table(fill func(row func(cells ...any))) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fill(func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, c)
		}
		fmt.Fprintln(w)
	})
	return w.Flush()
}

// parseDevice returns the number of a device: /dev/ublkb0, ublkb0 or 0; or that of an attachment
// without one: lib0.
func parseDevice(s string) (int, error) {
	if n, ok := strings.CutPrefix(s, "lib"); ok {
		if i, err := strconv.ParseUint(n, 10, 20); err == nil {
			return api.FirstLibrary + int(i), nil
		}
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.TrimPrefix(s, "/dev/"), "ublkb"), 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%q is not an lsd device: write /dev/ublkb0, ublkb0 or 0, or lib0 for one without a block device", s)
	}
	return int(n), nil
}

func version() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}
