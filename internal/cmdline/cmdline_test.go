package cmdline

import (
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/spf13/cobra"
)

func TestErrors(t *testing.T) {
	for _, x := range []struct{ line, want string }{
		{"", "IMAGE is missing: see prog --help"},
		{"a b c", `"c" is too much: see prog --help`},
		{"a --colour", "unknown flag: --colour: see prog --help"},
		{"a --n", "flag needs an argument: --n: see prog --help"},
		{"a --n x", `--n "x": it is a whole number: see prog --help`},
		{"a --n 99999999999999999999", `--n "99999999999999999999": it is a whole number`},
		{"a --f x", `--f "x": it is a number`},
		{"a --d 5", `--d "5": it is a time: write`},
		{"a --b=2", `--b "2": it is true or false`},
		{"a --s -1", `--s: "-1" is not a size: write`},
		{"a --s 1.3M", "--s: size 1.3M is not a whole number of bytes"},
		{"a", ""},
		{"a b --n 1 --f 1.5 --d 5s --b --s 1.5G", ""},
	} {
		var s bytesize.Size
		c := &cobra.Command{
			Use: "prog", SilenceUsage: true, SilenceErrors: true, Args: Args(1, "IMAGE", "LOG"),
			RunE: func(*cobra.Command, []string) error { return nil },
		}
		c.SetFlagErrorFunc(FlagError)
		c.Flags().Int("n", 0, "")
		c.Flags().Float64("f", 0, "")
		c.Flags().Duration("d", time.Second, "")
		c.Flags().Bool("b", false, "")
		c.Flags().Var(&s, "s", "")
		c.SetArgs(strings.Fields(x.line))
		switch err := c.Execute(); {
		case x.want == "" && err != nil:
			t.Errorf("%s: %v", x.line, err)
		case x.want != "" && (err == nil || !strings.HasPrefix(err.Error(), x.want)):
			t.Errorf("%s: %v, want %q", x.line, err, x.want)
		}
	}
}
