package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/spf13/cobra"
)

func reportCommand() *cobra.Command {
	var figures, doc string
	c := &cobra.Command{
		Use: "report", Short: "Draw the figures, and write their tables into docs/benchmarks.md", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return report(figures, doc)
		},
	}
	c.Flags().StringVar(&figures, "figures", "docs/benchmarks", "directory with NAME.json of each comparison; plots go there, too")
	c.Flags().StringVar(&doc, "doc", "docs/benchmarks.md", "text whose places for tables are filled")
	return c
}

// report draws all figures of a directory and puts their tables into a text.
func report(figures, doc string) error {
	names, err := filepath.Glob(filepath.Join(figures, "*.json"))
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("there are no figures in %s", figures)
	}
	b, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	text := string(b)
	dir, err := filepath.Rel(filepath.Dir(doc), figures)
	if err != nil {
		return err
	}
	for _, name := range names {
		r, err := bench.Read(name)
		if err != nil {
			return err
		}
		for _, t := range r.Tables {
			if !t.Plot {
				continue
			}
			if err := os.WriteFile(filepath.Join(figures, r.PlotName(&t)), []byte(t.SVG()), 0o644); err != nil {
				return err
			}
		}
		if text, err = fill(text, r.Name, r.Markdown(filepath.ToSlash(dir))); err != nil {
			return fmt.Errorf("%s: %w", doc, err)
		}
	}
	return os.WriteFile(doc, []byte(text), 0o644)
}

// fill replaces what is between the marks of a name.
func fill(text, name, with string) (string, error) {
	begin, end := "<!-- figures: "+name+" -->\n", "<!-- end of figures -->"
	before, rest, ok := strings.Cut(text, begin)
	if !ok {
		return "", fmt.Errorf("there is no place for the figures of %s: a line %s", name, strings.TrimSpace(begin))
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return "", errors.New("the place for the figures of " + name + " has no end: a line " + end)
	}
	return before + begin + with + end + after, nil
}
