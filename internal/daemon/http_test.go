package daemon

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// TestAPI talks to a daemon over its socket, from attach to shutdown.
func TestAPI(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	ready := make(chan struct{})
	h.Daemon.cfg.Ready = func() { close(ready) }
	ended := make(chan error, 1)
	go func(d *Daemon) { ended <- d.Run(context.Background()) }(h.Daemon)
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	if st, err := os.Stat(h.cfg.Socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	c := api.NewClient(h.cfg.Socket)
	if v, err := c.Version(ctx); err != nil || v.PID != os.Getpid() || v.Host != h.cfg.Host {
		t.Errorf("version: %+v, %v", v, err)
	}
	var seen int
	im, err := c.Attach(ctx, api.AttachRequest{Image: "mem:vm1", ID: -1, LogSize: 256 << 20}, func(api.Progress) { seen++ })
	if err != nil {
		t.Fatal(err)
	}
	if seen == 0 {
		t.Error("no progress")
	}
	if _, err := c.Attach(ctx, api.AttachRequest{Image: "mem:none", ID: -1}, nil); err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("attach: %v", err)
	}
	w.kernel.write(t, im.ID, 8, 1)
	if err := c.Flush(ctx, im.ID, nil); err != nil {
		t.Error(err)
	}
	if err := c.Refresh(ctx, im.ID, nil); err != nil {
		t.Error(err)
	}
	if err := c.Refresh(ctx, 99, nil); err == nil || !strings.Contains(err.Error(), "not attached") {
		t.Errorf("refresh of device 99: %v", err)
	}
	gone := w.unname("vm2")
	if err := c.Reclaim(ctx, api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != nil {
		t.Error(err)
	}
	w.until("nothing is left of vm2", func() bool { return w.objectsOf(gone) == 0 })
	if err := c.Reclaim(ctx, api.ReclaimRequest{Store: "mem:"}); err == nil || !strings.Contains(err.Error(), "names no image") {
		t.Errorf("reclaim: %v", err)
	}
	if im, err = c.Image(ctx, im.ID); err != nil || im.Stats.Dirty != 0 || im.Stats.PutCount != 1 {
		t.Errorf("image: %+v, %v", im, err)
	}
	if _, err := c.Image(ctx, 99); err == nil || !strings.Contains(err.Error(), "not attached") {
		t.Errorf("image 99: %v", err)
	}
	if list, err := c.Images(ctx); err != nil || len(list) != 1 {
		t.Errorf("images: %+v, %v", list, err)
	}
	if f, err := c.Features(ctx); err != nil || len(f.Used) != 2 {
		t.Errorf("features: %+v, %v", f, err)
	}
	text := get(t, h.cfg.Socket, "/metrics")
	for _, line := range []string{`lsd_image_puts_total{device="0",image="mem:vm1"} 1`, `lsd_store_operations_total{object="data",operation="put"} 1`} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("there is no %s in the metrics: %s", line, text)
		}
	}
	if text := get(t, h.cfg.Socket, "/debug/pprof/cmdline"); text == "" {
		t.Error("no pprof")
	}
	testBlockProfile(t, h.cfg.Socket)
	if text := get(t, h.cfg.Socket, "/debug/pprof/mutex"); !strings.Contains(text, "?seconds=") {
		t.Errorf("waits for locks, with no time: %s", text)
	}
	if _, err := c.Detach(ctx, im.ID, api.DetachRequest{}, nil); err != nil {
		t.Error(err)
	}
	if _, err := c.Shutdown(ctx, api.ShutdownRequest{}, nil); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := c.Version(ctx); !errors.Is(err, api.ErrNoDaemon) {
		t.Errorf("version after the end: %v", err)
	}
}

// testBlockProfile: a profile of what goroutines wait for has one that waits meanwhile.
func testBlockProfile(t *testing.T, socket string) {
	t.Helper()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-time.After(5 * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	z, err := gzip.NewReader(strings.NewReader(get(t, socket, "/debug/pprof/block?seconds=1")))
	if err != nil {
		t.Fatal(err)
	}
	names, err := io.ReadAll(z)
	if err != nil || !bytes.Contains(names, []byte("testBlockProfile.func")) {
		t.Errorf("what goroutines wait for: %q, %v", names, err)
	}
}

func get(t *testing.T, socket, path string) string {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket)
	}}}
	defer c.CloseIdleConnections()
	resp, err := c.Get("http://lsdd" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestClientErrors: each failure to reach a daemon is one line that says what to do.
func TestClientErrors(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer stop()
	if _, err := api.NewClient(dir + "/none").Version(ctx); !errors.Is(err, api.ErrNoDaemon) {
		t.Errorf("no socket: %v", err)
	}
	ln, err := net.Listen("unix", dir+"/mute")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := api.NewClient(dir + "/mute").Version(ctx); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("a daemon that does not answer: %v", err)
	}
	cut, err := net.Listen("unix", dir+"/cut")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = api.NewSender(w, func() {}).Progress(api.Progress{What: "x"})
	})}
	go srv.Serve(cut)
	defer srv.Close()
	_, err = api.NewClient(dir+"/cut").Attach(context.Background(), api.AttachRequest{}, nil)
	if err == nil || !strings.Contains(err.Error(), "went away") {
		t.Errorf("a daemon that dies: %v", err)
	}
}
