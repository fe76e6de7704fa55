package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/bytesize"
	"github.com/lsd-ceph/lsd/internal/daemon"
	"github.com/spf13/cobra"
)

func (a *app) logCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Look after write logs",
		Args:  noSuchCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.logLsCommand(), a.logSalvageCommand(), a.logForgetCommand())
	return cmd
}

func (a *app) logLsCommand() *cobra.Command {
	var caches []string
	cmd := &cobra.Command{
		Use:   "ls [FILE]...",
		Short: "List write logs, and tell what they hold",
		Long: `List the write logs of this host, and tell what they hold: those in the cache
directory, those of what is attached, and those in each --cache; or the files
that are named. Logs that are in use are not read.`,
		Example: `  lsdctl log ls
  lsdctl log ls --cache /ssd/lsd --json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			recorded, err := daemon.RecordedLogs(a.stateDir)
			if err != nil {
				return err
			}
			paths := args
			if len(args) == 0 {
				if paths, err = a.findLogs(recorded, caches); err != nil {
					return err
				}
			}
			list := []api.Log{}
			for _, p := range paths {
				a.progress.show(api.Progress{What: "reading " + p})
				l, err := readLog(cmd.Context(), p)
				if err != nil && len(args) > 0 {
					return withPath(p, err)
				}
				if err != nil {
					l.State = "error: " + api.OneLine(err)
				}
				if l.Image == "" {
					l.Image = recorded[p]
				}
				list = append(list, l)
			}
			a.progress.end()
			if a.json {
				return a.printJSON(list)
			}
			return a.table(func(row func(...any)) {
				row("LOG", "SIZE", "IMAGE", "EPOCH", "RECORDS", "DATA", "STATE")
				for _, l := range list {
					row(l.Path, bytesize.Human(uint64(l.Size)), orDash(l.Image), l.Epoch, l.Records, bytesize.Human(l.Data), l.State)
				}
			})
		},
	}
	cmd.Flags().StringArrayVar(&caches, "cache", nil, "look in this directory too")
	return a.jsonFlag(cmd)
}

// withPath adds the path that an error is about, unless it says so itself.
func withPath(path string, err error) error {
	if strings.Contains(err.Error(), path) {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// findLogs returns the paths of the logs that this host may have.
func (a *app) findLogs(recorded map[string]string, caches []string) ([]string, error) {
	paths := slices.Collect(maps.Keys(recorded))
	for _, dir := range append(caches, filepath.Join(a.stateDir, "cache")) {
		found, err := filepath.Glob(filepath.Join(dir, "*.log"))
		if err != nil {
			return nil, err
		}
		paths = append(paths, found...)
	}
	for _, dir := range caches {
		if _, err := os.Stat(dir); err != nil {
			return nil, err
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths), nil
}

// readLog tells what the log at path holds.
func readLog(ctx context.Context, path string) (api.Log, error) {
	l := api.Log{Path: path}
	if st, err := os.Stat(path); err == nil {
		l.Size = st.Size()
	}
	lock, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	f, err := writelog.OpenFile(lock, path)
	if errors.Is(err, writelog.ErrLocked) {
		l.InUse, l.State = true, "in use"
		return l, nil
	}
	if err != nil {
		return l, err
	}
	defer f.Close()
	l.Size = f.Size()
	blank, err := writelog.Blank(f)
	if err == nil && blank {
		l.State = "empty: belongs to no image"
		return l, nil
	}
	var h writelog.Header
	if err == nil {
		h, _, err = writelog.ReadHeader(f)
	}
	if err != nil {
		return l, err
	}
	l.LogID, l.Image, l.ImageID, l.Epoch = h.Log, h.ImageURL, h.Image, h.Epoch
	err = writelog.Search(ctx, f, func(r writelog.Found) {
		l.Records++
		l.Data += uint64(r.Data)
		l.LastSeq = max(l.LastSeq, r.Seq)
	})
	if err != nil {
		return l, err
	}
	l.State = logState(ctx, h)
	return l, nil
}

// logState compares a log with what the store says of its image.
func logState(ctx context.Context, h writelog.Header) string {
	u, name, err := backend.ParseImage(h.ImageURL)
	if err != nil {
		return "of an image that cannot be found: " + api.OneLine(err)
	}
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	st, err := open.Store(ctx, u)
	if err != nil {
		return "its store does not open: " + api.OneLine(timedOut(u, err))
	}
	defer st.Close()
	info, err := engine.Describe(ctx, st, name)
	switch {
	case errors.Is(err, backend.ErrNotFound) || err == nil && info.ID != h.Image:
		return "its image is gone, or has another name now"
	case err != nil:
		return "its image cannot be read: " + api.OneLine(err)
	case info.Owner != nil && info.Owner.Log == h.Log && h.Epoch <= info.Epoch:
		return "the image's own: lsdctl add goes on from it"
	}
	return fmt.Sprintf("of epoch %d, which is over (it is %d now): lsdctl add tells whether the store has all of it", h.Epoch, info.Epoch)
}
