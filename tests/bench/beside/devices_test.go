package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench"
)

func TestOldMonitor(t *testing.T) {
	for _, c := range []struct{ conf, want string }{
		{"[global]\nmon host = [v2:127.0.0.1:3300,v1:127.0.0.1:6789]\nauth = none\n", "127.0.0.1:6789"},
		{"mon host = [v1:10.0.0.1:1]", "10.0.0.1:1"},
		{"mon host = [v2:127.0.0.1:3300]\n", ""},
		{"mon host = 127.0.0.1\n", ""},
		{"", ""},
	} {
		got, err := oldMonitor(c.conf)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v", c.conf, got, err)
		}
	}
}

func TestIsBlockDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sda")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, file + "1", filepath.Dir(file), "/dev/null"} {
		if err := isBlockDevice(path); err == nil {
			t.Errorf("%s counts as a block device", path)
		}
	}
}

func TestWithin(t *testing.T) {
	failed := errors.New("it has failed")
	if v, err := within(t.Context(), time.Minute, "work", func(context.Context) (int, error) { return 3, failed }); v != 3 || err != failed {
		t.Errorf("work that ends: %v, %v", v, err)
	}
	_, err := within(t.Context(), time.Millisecond, "work", func(ctx context.Context) (int, error) {
		<-ctx.Done()
		return 0, context.Cause(ctx)
	})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("work that ends when it is told: %v", err)
	}
}

// TestTell: what cannot be told is an error that says what.
func TestTell(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stop")
	if err := tell(t.Context(), path, "1"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), `"1"`) {
		t.Errorf("no such file: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := tell(t.Context(), path, "1"); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); string(b) != "1" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestWithRows(t *testing.T) {
	full := bench.Table{Name: "full", Rows: []bench.Row{{Name: "x"}}}
	if got := withRows(bench.Table{Name: "empty"}, full, bench.Table{}); len(got) != 1 || got[0].Name != "full" {
		t.Errorf("%+v", got)
	}
}
