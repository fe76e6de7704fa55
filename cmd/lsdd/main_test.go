package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/daemon"
)

// TestChildArgs: no spelling of --supervise reaches the child, which would start a
// child itself.
func TestChildArgs(t *testing.T) {
	got := childArgs([]string{"--supervise", "--socket", "/s", "--supervise=true", "--supervise=1", "--log-json", "--supervise=T"})
	if want := []string{"--socket", "/s", "--log-json"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestBadOptions: what is wrong with the command line is said before anything is
// touched.
func TestBadOptions(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	good := func() options {
		return options{
			cfg: daemon.Config{Socket: filepath.Join(dir, "s"), StateDir: dir, Host: "h", ExitTimeout: time.Second}, onTerm: "leave", logMemory: daemon.DefaultLogMemory, mapMemory: engine.DefaultMapMemory, destageMemory: engine.DefaultDestageMemory, readMemory: engine.DefaultReadMemory, libraryLog: daemon.DefaultLogSize,
		}
	}
	for _, tt := range []struct {
		change func(*options)
		want   string
	}{
		{func(o *options) { o.onTerm = "x" }, "--on-term x"},
		{func(o *options) { o.cfg.Host = "" }, "--host-name"},
		{func(o *options) { o.cfg.StateDir = "state" }, "absolute"},
		{func(o *options) { o.cfg.Socket = "/" + strings.Repeat("s", maxSocket) }, "--socket: a path of 100 bytes"},
		{func(o *options) { o.cfg.LibraryPolicy = "policy" }, "--librbd-policy policy"},
		{func(o *options) { o.libraryLog = 4096 }, "--librbd-log-size 4K: a write log of 4096 bytes"},
		{func(o *options) { o.cfg.ExitTimeout = -time.Second }, "--exit-timeout -1s"},
		{func(o *options) { o.logMemory = 1 << 20 }, "--log-memory-total 1M"},
		{func(o *options) { o.logMemory = 1 << 51 }, "--log-memory-total 2P"},
		{func(o *options) { o.mapMemory = 1 << 20 }, "--map-memory 1M"},
		{func(o *options) { o.scrubRate = 1 << 51 }, "--scrub-rate 2P"},
		{func(o *options) { o.ublkWithout = "BATCH_IO,BATCHES" }, "--ublk-without: ublk: there is no feature BATCHES"},
		{func(o *options) { o.mapMemory = 1 << 51 }, "--map-memory 2P"},
		{func(o *options) { o.destageMemory = 1 << 20 }, "--destage-memory 1M"},
		{func(o *options) { o.readMemory = 1 << 20 }, "--read-memory 1M"},
		{func(o *options) { o.burstMemory = 1 << 20 }, "--burst-memory 1M: it must be 0, for none, or from 8M to 1P"},
		{func(o *options) { o.burstMemory = 1 << 51 }, "--burst-memory 2P"},
		{func(o *options) { o.cacheMemory = 1 << 19 }, "--read-cache-memory 512K: it must be 0, for none, or from 1M to 1P"},
		{func(o *options) { o.cacheMemory = 1 << 51 }, "--read-cache-memory 2P"},
	} {
		o := good()
		tt.change(&o)
		status, err := o.run(context.Background())
		if status != 0 || err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("status %d, %v; want one line with %q", status, err, tt.want)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the state directory was made")
	}
}
