package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/cmdline"
	"github.com/lsd-ceph/lsd/internal/plural"
	"github.com/spf13/cobra"
)

// Exit statuses of check, which are those of fsck in short.
const (
	statusErrors = 1 // something is wrong
	statusFailed = 2 // it could not be looked at
)

// A statusError ends the program with a status of its own.
type statusError struct {
	status int
	err    error // nil if all has been said
}

// Error returns the message, which may be empty.
func (e *statusError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

// Unwrap returns the error.
func (e *statusError) Unwrap() error { return e.err }

// failed makes an error one of a check that could not be made.
func failed(err error) error {
	var s *statusError
	if err == nil || errors.As(err, &s) {
		return err
	}
	return &statusError{statusFailed, err}
}

func (a *app) checkCommand() *cobra.Command {
	var o engine.CheckOptions
	var rate bytesize.Size
	args := exactArgs("STORE/IMAGE")
	cmd := &cobra.Command{
		Use:   "check STORE/IMAGE | STORE",
		Short: "Check an image, or that a store's names and images belong together",
		Long: `Check that an image in its store is whole: superblock, checkpoint, map, the
headers of all data objects and the map against them, the states that are kept
for left-over logs; and look for objects that nothing refers to. --deep reads all
data as well. Of a STORE, check that each name has an image and each image a name.

It needs no daemon, and changes nothing without --repair. That does only what
loses nothing: it removes what nothing refers to, and corrects counts; a STORE's
directory of names that is missing or damaged is made anew. An image that is
attached is checked as its owner goes on, and not repaired.

The exit status is 0 if nothing is wrong or all that was has been repaired, 1 if
something is, 2 if the check could not be made.`,
		Example: `  lsdctl check rados://rbd/vm2
  lsdctl check rados://rbd/vm2 --deep --rate 50M
  lsdctl check file:///srv/lsd/vm1 --repair
  lsdctl check rados://rbd`,
		Args: func(cmd *cobra.Command, list []string) error { return failed(args(cmd, list)) },
		RunE: func(cmd *cobra.Command, args []string) error {
			if rate > math.MaxInt64 {
				return failed(errors.New("--rate is beyond all limits"))
			}
			if rate > 0 && !o.Deep {
				return failed(errors.New("--rate bounds what --deep reads: give that, too"))
			}
			o.Rate = int64(rate)
			err := a.check(cmd.Context(), args[0], o)
			a.progress.end()
			return failed(err)
		},
	}
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return failed(cmdline.FlagError(c, err)) })
	f := cmd.Flags()
	f.BoolVar(&o.Deep, "deep", false, "read all data and verify its checksums")
	f.BoolVar(&o.Repair, "repair", false, "mend what can be mended without losing anything")
	f.Var(&rate, "rate", "most bytes that --deep reads in a second (default: no limit)")
	return a.jsonFlag(cmd)
}

func (a *app) check(ctx context.Context, url string, o engine.CheckOptions) error {
	began := time.Now()
	rep, err := a.checkURL(ctx, url, o)
	if err != nil {
		return err
	}
	a.progress.end()
	if a.json {
		err = a.printJSON(rep)
	} else {
		err = a.printReport(rep, o.Repair, time.Since(began))
	}
	if err == nil && !rep.Clean() {
		return &statusError{status: statusErrors}
	}
	return err
}

// checkURL checks the image of that URL, or the store if it is one.
func (a *app) checkURL(ctx context.Context, url string, o engine.CheckOptions) (*engine.CheckReport, error) {
	var rep *engine.CheckReport
	u, name, imageErr := parseImage(url)
	if imageErr == nil {
		rep, imageErr = a.checkImage(ctx, u, name, o)
		switch {
		case errors.Is(imageErr, engine.ErrRemoved):
			return nil, noImage(u, name, imageErr)
		case imageErr == nil && rep.ID == uuid.Nil: // its name could not be looked up
		case errors.Is(imageErr, backend.ErrNotFound), errors.Is(imageErr, backend.ErrPermanent):
		default:
			return rep, imageErr
		}
	}
	s, err := parseStore(url)
	if err != nil {
		return rep, imageErr
	}
	all, err := a.checkStore(ctx, s, o.Repair && !o.Deep)
	switch {
	case err == nil && o.Deep:
		return nil, fmt.Errorf("%s is a store: --deep is for an image", url)
	case !errors.Is(err, backend.ErrNotFound):
		return all, err
	case rep != nil:
		return rep, nil
	case errors.Is(imageErr, backend.ErrPermanent):
		return nil, fmt.Errorf("%s is neither an image nor a store: %w", url, imageErr)
	}
	return nil, fmt.Errorf("%s is neither an image nor a store: see lsdctl ls", url)
}

// checkImage checks an image; the error matches ErrNotFound if there is none.
func (a *app) checkImage(ctx context.Context, u backend.URL, name string, o engine.CheckOptions) (*engine.CheckReport, error) {
	st, err := openWithin(ctx, u, open.Store)
	if err != nil {
		return nil, timedOut(u, err)
	}
	defer st.Close()
	what := "checking " + u.Image(name)
	a.progress.show(api.Progress{What: what})
	o.Progress = func(done, total uint64) { a.progress.show(api.Progress{What: what, Done: done, Total: total}) }
	rep, err := engine.Check(ctx, st, name, u.Image(name), o)
	return rep, timedOut(u, err)
}

// checkStore checks a store; the error matches ErrNotFound if there is none.
func (a *app) checkStore(ctx context.Context, u backend.URL, repair bool) (*engine.CheckReport, error) {
	st, err := openWithin(ctx, u, open.Store)
	if err != nil {
		return nil, timedOut(u, err)
	}
	defer st.Close()
	a.progress.show(api.Progress{What: "checking " + u.String()})
	rep, err := engine.CheckStore(ctx, st, u.String(), repair)
	return rep, timedOut(u, err)
}

// printReport prints what was found, a line each, and a summary.
func (a *app) printReport(r *engine.CheckReport, repair bool, took time.Duration) error {
	var text bytes.Buffer
	say := func(format string, args ...any) { fmt.Fprintf(&text, format+"\n", args...) }
	for _, n := range r.Notes {
		say("note: %s", n)
	}
	bad, mendable := 0, 0
	for _, f := range r.Errors {
		if !f.Mended {
			bad++
			say("error: %s", f)
		}
	}
	for _, m := range r.Repairs {
		if m.Done {
			say("repaired: %s: %s", m.Object, m.What)
		} else {
			mendable++
		}
	}
	for _, k := range []struct {
		keys []string
		what string
	}{
		{r.Dead, "nothing refers to any more, for the owner to remove"},
		{r.Pending, "an owner was putting, or is, for the next attach to see to"},
	} {
		if n := len(k.keys); n > 0 {
			say("harmless: %s that %s: %s", plural.Count(n, "object"), k.what, k.keys[0])
		}
	}
	if n := len(r.Stale); n > 0 && !repair {
		say("harmless: %s that an earlier owner has left, for the next attach to remove, or --repair: %s", plural.Count(n, "object"), r.Stale[0])
	}
	if mendable > 0 && !repair {
		say("lsdctl check --repair would see to %s", plural.Count(mendable, "object"))
	}
	say("%s: %s, %s", r.Image, verdict(bad), summary(r, took))
	_, err := text.WriteTo(a.out)
	return err
}

func verdict(bad int) string {
	if bad == 0 {
		return "clean"
	}
	return plural.Count(bad, "error")
}

func summary(r *engine.CheckReport, took time.Duration) string {
	s := plural.Count(r.Objects, "object")
	if r.Epoch > 0 || r.Segments > 0 {
		s = plural.Count(r.Objects, "data object") + ", " + plural.Count(r.Segments, "map segment")
	}
	if r.Points > 0 {
		s += ", " + plural.Count(r.Points, "state") + " kept for logs"
	}
	if r.Read > 0 {
		s += fmt.Sprintf(", %s read", bytesize.Human(r.Read))
	}
	return s + fmt.Sprintf(", %v", took.Round(time.Millisecond))
}
