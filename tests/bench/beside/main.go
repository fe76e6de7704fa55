// Command beside measures lsd side by side with its peers: in one run, taking turns. Each
// comparison is a file; comparisons, below, has the list.
package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// A comparison is one question that is asked of all sides.
type comparison struct {
	name  string // of its figures' file, and of its place in docs/benchmarks.md
	title string
	vm    bool // it needs a kernel with ublk: it runs in a virtual machine
	ceph  bool // that has a cluster outside
	// prepare makes ready, outside of the virtual machine and before it is started, what would
	// take too long in there. It may be nil.
	prepare func(ctx context.Context, h *lab.Host) error
	// run measures it, on a host of its own.
	run func(ctx context.Context, h *lab.Host) ([]bench.Table, error)
}

// comparisons returns all, in the order in which they are run.
func comparisons() []comparison {
	return []comparison{
		writeLog(),
		null(),
		device(),
		syncs(),
		fsyncs(),
		library(),
		mercy(),
		destage(),
		overload(),
		clones(),
		fragmented(),
		recovery(),
		takeover(),
		processors(),
		scale(),
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal ends the program
	// Whoever reads what is said may go away: clusters and machines are to be ended nevertheless.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "beside: %v\n", err)
		stop()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	c := &cobra.Command{
		Use:   "beside",
		Short: "Measure lsd side by side with its peers, in one run, taking turns",
		Long: `Measure lsd side by side with its peers: in one run, taking turns, as ratios of medians.

The programs are those in bin/ (make build); clusters and virtual machines are made as they
are needed and gone afterwards. What is measured with --out docs/benchmarks is what
"beside report" then writes into docs/benchmarks.md.`,
		SilenceErrors: true, SilenceUsage: true,
	}
	c.AddCommand(listCommand(), runCommand(), insideCommand(), reportCommand())
	return c
}

func listCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the comparisons", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			for _, c := range comparisons() {
				fmt.Fprintf(cmd.OutOrStdout(), "%-10s %s\n", c.name, c.title)
			}
		},
	}
}

// options are those of run.
type options struct {
	lab.Effort
	only string
	out  string
	dir  string
	root string
}

// flags adds those flags that the command inside the virtual machine has, too.
func (o *options) flags(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&o.Short, "short", false, "a first look, small sizes, some of the cases and one turn: no figures to quote")
	f.IntVar(&o.Turns, "turns", 0, "turns that each side takes (default 5, with --short 1)")
	f.IntVar(&o.Seconds, "seconds", 0, "length of a turn that goes by time (default 4, with --short 1)")
	f.StringVar(&o.Cases, "cases", "", "only the cases in whose names this regular expression finds something")
	f.StringVar(&o.out, "out", "bin/beside.out", "write the figures to this directory, NAME.json for each comparison")
	f.StringVar(&o.root, "root", ".", "the project's directory, with bin/ and scripts/")
}

// complete checks the options and fills in what depends on others.
func (o *options) complete() (err error) {
	if _, err := regexp.Compile(o.Cases); err != nil {
		return fmt.Errorf("--cases: %w", err)
	}
	if o.Turns < 0 || o.Seconds < 0 {
		return fmt.Errorf("--turns and --seconds are numbers above 0")
	}
	if o.Turns == 0 {
		o.Turns = lab.Pick(o.Effort, 1, 5)
	}
	if o.Seconds == 0 {
		o.Seconds = lab.Pick(o.Effort, 1, 4)
	}
	for _, p := range []*string{&o.root, &o.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if o.dir == "" {
		o.dir = filepath.Join(o.root, ".cache")
	}
	for _, name := range []string{"bin/lsdd", "bin/lsdctl", "scripts/ceph"} {
		if _, err := os.Stat(filepath.Join(o.root, name)); err != nil {
			return fmt.Errorf("%s is not there: run make build in the project's directory, or name that with --root", name)
		}
	}
	if os.Getuid() != 0 {
		return fmt.Errorf("this must run as root: clusters, caches and block devices are root's")
	}
	return os.MkdirAll(o.out, 0o755)
}

func runCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "run", Short: "Measure all comparisons, or some", Args: cobra.NoArgs,
		Example: "  beside run --only library --cases 'depth 32$' --turns 3",
		RunE: func(cmd *cobra.Command, _ []string) error {
			chosen, err := o.chosen()
			if err != nil {
				return err
			}
			if err := o.complete(); err != nil {
				return err
			}
			return eachOf(cmd.Context(), chosen, cmd.ErrOrStderr(), o.measure)
		},
	}
	o.flags(c)
	c.Flags().StringVar(&o.only, "only", "", "only the comparisons of these names, a regular expression for all of a name")
	c.Flags().StringVar(&o.dir, "dir", "", "a directory on the disk that is measured (default: .cache in the project's)")
	return c
}

// eachOf measures one comparison after the other, until ctx ends. All of them take hours, so one that
// fails, and why, is told at once, and the others have their turn still.
func eachOf(ctx context.Context, chosen []comparison, w io.Writer, measure func(context.Context, comparison) error) error {
	var failed []string
	for _, c := range chosen {
		err := measure(ctx, c)
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", c.name, cmp.Or(err, ctx.Err()))
		}
		if err != nil {
			fmt.Fprintf(w, "== %s has failed: %v\n", c.name, err)
			failed = append(failed, c.name)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d of %d comparisons have failed: %s", len(failed), len(chosen), strings.Join(failed, ", "))
	}
	return nil
}

func (o *options) chosen() (all []comparison, err error) {
	re, err := regexp.Compile("^(?:" + o.only + ")$")
	if err != nil {
		return nil, fmt.Errorf("--only: %w", err)
	}
	for _, c := range comparisons() {
		if o.only == "" || re.MatchString(c.name) {
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("--only %s: there is no such comparison (see beside list)", o.only)
	}
	return all, nil
}

// measure runs one comparison, here or in the virtual machine, and writes what it has found.
func (o *options) measure(ctx context.Context, c comparison) error {
	began := time.Now()
	fmt.Fprintf(os.Stderr, "== %s: %s\n", c.name, c.title)
	h, err := lab.NewHost(o.Effort, o.root, o.dir)
	if err != nil {
		return err
	}
	defer h.Close()
	facts := lab.Machine(ctx, o.dir)
	var tables []bench.Table
	if c.vm {
		facts = append(facts, fmt.Sprintf("In a virtual machine on that, Linux %s, the CPU emulated unless the machine has KVM: only ratios say something", vmKernel))
		tables, err = o.inVM(ctx, h, c)
	} else {
		tables, err = c.run(ctx, h)
	}
	if err != nil {
		return err
	}
	r := &bench.Report{
		Name: c.name, Title: c.title, Date: time.Now().Format(time.DateOnly), Command: o.repeat(c.name),
		Machine: facts, Turns: o.Turns, Tables: tables,
	}
	if err := r.Write(filepath.Join(o.out, c.name+".json")); err != nil {
		return err
	}
	for _, t := range r.Tables {
		fmt.Printf("%s\n\n%s\n", t.Title, t.Markdown())
	}
	fmt.Fprintf(os.Stderr, "== %s: %.0f s\n", c.name, time.Since(began).Seconds())
	return nil
}

// repeat returns the command that measures this again.
func (o *options) repeat(name string) string {
	s := "make bench ONLY=" + name
	if o.Short {
		s = "make bench-short ONLY=" + name
	}
	if o.Turns != lab.Pick(o.Effort, 1, 5) {
		s += fmt.Sprintf(" TURNS=%d", o.Turns)
	}
	return s
}
